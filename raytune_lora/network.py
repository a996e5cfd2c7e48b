"""Whether what a start depends on answers, found in seconds: clients of their own try again for minutes."""

from __future__ import annotations

import math
import socket
import threading
import time
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 5.0  # to connect
_REMEMBERED = 30.0  # seconds for which what was found of the hub is taken as known: a start asks several times
_ASKED: dict[str, tuple[float, str | None]] = {}
_HEADER, _SETTINGS = 9, 4  # of an HTTP/2 frame: its bytes, and a type


def unreachable(host: str, port: int, seconds: float = SECONDS, *, grpc: bool = False) -> str | None:
    """Why nothing listens there; None where something does.

    Args:
        host: name or address.
        port: of TCP.
        seconds: after which it does not answer; names are looked up within them.
        grpc: whether it is to speak gRPC, as Ray does.
    """
    found = [f"no answer in {seconds:g} s"]

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=seconds) as server:
                found.append("" if not grpc or _speaks_http2(server) else "something else listens there")
        except TimeoutError:
            return
        except OSError as error:
            found.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)  # a resolver has a patience of its own
    thread.start()
    thread.join(seconds)
    return found[-1] or None


def _speaks_http2(server: socket.socket) -> bool:
    """Whether a server answers the preface of HTTP/2 with its settings (RFC 9113, 3.4), as gRPC does."""
    server.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0)))
    header = server.recv(_HEADER, socket.MSG_WAITALL)
    return len(header) == _HEADER and header[3] == _SETTINGS


def hub_unreachable() -> str | None:
    """Why the Hugging Face hub cannot be asked; None where it can.

    That is the hub of ``HF_ENDPOINT``, and the proxy on the way to it where the environment names one.
    """
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint = urlsplit(constants.ENDPOINT)
    host, proxies = endpoint.hostname or "", getproxies()
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    where = urlsplit(proxy) if proxy and not proxy_bypass(host) else endpoint
    asked, why = _ASKED.get(where.geturl(), (-math.inf, None))
    if time.monotonic() - asked > _REMEMBERED:
        why = unreachable(where.hostname or "", where.port or (443 if where.scheme == "https" else 80))
        why = why or _silent(constants.ENDPOINT)
        _ASKED[where.geturl()] = time.monotonic(), why
    return why and f"{where.hostname}: {why}"


def _silent(url: str) -> str | None:
    """Why the hub's own client gets no answer from a server that takes connections; None where it gets one."""
    from huggingface_hub import get_session

    try:
        get_session().head(url, timeout=SECONDS)
    except Exception as error:  # the client's transport has errors of its own, another kind in each of its versions
        timeout = "timeout" in type(error).__name__.lower()
        return f"no answer in {SECONDS:g} s" if timeout else str(error).strip() or type(error).__name__
    return None
