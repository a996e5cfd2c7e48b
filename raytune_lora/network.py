"""Whether what a start depends on answers, found in seconds: clients of their own try again for minutes."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

SECONDS = 5.0  # to connect


def unreachable(host: str, port: int, seconds: float = SECONDS) -> str | None:
    """Why nothing listens there; None where something does.

    Args:
        host: name or address.
        port: of TCP.
        seconds: after which it does not answer; names are looked up within them.
    """
    found = [f"no answer in {seconds:g} s"]

    def connect() -> None:
        try:
            with socket.create_connection((host, port), timeout=seconds):
                found.append("")
        except OSError as error:
            found.append(error.strerror or str(error))

    thread = threading.Thread(target=connect, daemon=True)  # a resolver has a patience of its own
    thread.start()
    thread.join(seconds)
    return found[-1] or None


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
    why = unreachable(where.hostname or "", where.port or (443 if where.scheme == "https" else 80))
    return why and f"{where.hostname}: {why}"
