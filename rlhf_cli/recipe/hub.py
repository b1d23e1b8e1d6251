"""Whether the hub can be reached. Its libraries try for half a minute, for every file anew, before they look into their
cache or give up; one connection tells. No torch."""

from __future__ import annotations

import socket
import sys
import threading
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

PATIENCE = 4.0
"""Seconds."""


@cache
def unreachable() -> str:
    """Why it cannot be reached; empty when it can, and when that is not known: behind a proxy, or told to stay offline.

    Once it cannot, the libraries of this process are told to use what is in their cache.
    """
    from huggingface_hub import constants

    place = urlsplit(constants.ENDPOINT)
    host, port = place.hostname or "", place.port or (80 if place.scheme == "http" else 443)
    behind = place.scheme in getproxies() and not proxy_bypass(host)
    if constants.HF_HUB_OFFLINE or behind:
        return ""
    reason = _connect(host, port)
    if not reason:
        return ""
    constants.HF_HUB_OFFLINE = True
    if (datasets := sys.modules.get("datasets")) is not None:
        datasets.config.HF_HUB_OFFLINE = True
    return f"{host}: {reason}"


def _connect(host: str, port: int) -> str:
    """Why no connection can be made in time, also by who looks up names; empty when one can."""
    found = ["no answer"]

    def attempt() -> None:
        try:
            socket.create_connection((host, port), PATIENCE).close()
            found[0] = ""
        except OSError as error:
            found[0] = error.strerror or str(error)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0]
