"""Whether what a start depends on answers, found in seconds: clients of their own try again for minutes."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 5.0  # to connect
_PATIENT = 60.0  # seconds after which a thread that nobody waits for ends
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

    def connect() -> None:
        with socket.create_connection((host, port), timeout=seconds) as server:
            if grpc and not _speaks_http2(server):
                raise OSError("something else listens there")

    return failure(connect, seconds)  # a resolver has a patience of its own


def failure(ask: Callable[[], Any], seconds: float) -> str | None:
    """Why something outside does not do what it is asked within so many seconds; None where it does."""
    found = [f"no answer in {seconds:g} s"]

    def run() -> None:
        try:
            ask()
        except TimeoutError:
            return
        except Exception as error:  # clients have errors of their own
            said = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
            found.append(said.splitlines()[0])
        else:
            found.append("")

    thread = threading.Thread(target=run, daemon=True)
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
    from huggingface_hub import constants, get_session

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    endpoint = urlsplit(constants.ENDPOINT)
    host, proxies = endpoint.hostname or "", getproxies()
    proxy = proxies.get(endpoint.scheme) or proxies.get("all")
    where = urlsplit(proxy) if proxy and not proxy_bypass(host) else endpoint
    asked, why = _ASKED.get(where.geturl(), (-math.inf, None))
    if time.monotonic() - asked > _REMEMBERED:
        why = unreachable(where.hostname or "", where.port or (443 if where.scheme == "https" else 80))
        why = why or failure(lambda: get_session().head(constants.ENDPOINT, timeout=_PATIENT), SECONDS)
        _ASKED[where.geturl()] = time.monotonic(), why
    return why and f"{where.hostname}: {why}"
