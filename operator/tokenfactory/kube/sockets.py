"""Sockets that notice within half a minute that the other end is gone.

Without this, a watch through a dead network path looks exactly like a quiet one until its read deadline.
"""

from __future__ import annotations

import socket
from typing import Any

_OPTIONS = (
    ("SO_KEEPALIVE", socket.SOL_SOCKET, 1),
    ("TCP_KEEPIDLE", socket.IPPROTO_TCP, 10),
    ("TCP_KEEPINTVL", socket.IPPROTO_TCP, 5),
    ("TCP_KEEPCNT", socket.IPPROTO_TCP, 3),
    ("TCP_USER_TIMEOUT", socket.IPPROTO_TCP, 25_000),
    ("TCP_NODELAY", socket.IPPROTO_TCP, 1),
)


def keepalive_socket(address: tuple[Any, ...]) -> socket.socket:
    family, kind, protocol, *_ = address
    made = socket.socket(family=family, type=kind, proto=protocol)
    made.setblocking(False)
    for name, level, value in _OPTIONS:
        option = getattr(socket, name, None)  # not every system has each of them
        if option is not None:
            made.setsockopt(level, option, value)
    return made
