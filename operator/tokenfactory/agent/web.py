"""The smallest HTTP server that answers probes, Prometheus and the start gate.

GET only, one request per connection, no body read, everything bounded: pods of the node can reach it, and they run
other people's code.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Final

log = logging.getLogger(__name__)

MOST_CONNECTIONS: Final = 64
LONGEST_REQUEST: Final = 8192
PATIENCE_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Answer:
    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"


Route = Callable[[str], Awaitable[Answer]]
"""Called with what follows the route's prefix in the path."""


class WebServer:
    """Serves routes by the longest prefix that fits."""

    def __init__(self, routes: Mapping[str, Route]) -> None:
        self._routes = dict(sorted(routes.items(), key=lambda item: -len(item[0])))
        self._server: asyncio.Server | None = None
        self._connections = 0

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, which matters when 0 was asked for."""
        self._server = await asyncio.start_server(self._handle, host, port, limit=LONGEST_REQUEST)
        return int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            if self._connections <= MOST_CONNECTIONS:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                async with asyncio.timeout(ANSWER_SECONDS):
                    answer = await self._answer(head)
                    writer.write(_wire(answer))
                    await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # whoever asked is gone, too slow or talks something else
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(self, head: bytes) -> Answer:
        method, _, rest = head.partition(b"\r\n")[0].partition(b" ")
        path = rest.partition(b" ")[0].decode("latin-1").partition("?")[0]
        if method != b"GET":
            return Answer(HTTPStatus.METHOD_NOT_ALLOWED, b"only GET\n")
        for prefix, route in self._routes.items():
            if path == prefix or (prefix.endswith("/") and path.startswith(prefix)):
                try:
                    return await route(path[len(prefix) :])
                except Exception:
                    log.exception("a request failed", extra={"path": path[:200]})
                    return Answer(
                        HTTPStatus.INTERNAL_SERVER_ERROR, b"the agent failed to answer; see its log\n"
                    )
        return Answer(HTTPStatus.NOT_FOUND, b"no such page\n")


def _wire(answer: Answer) -> bytes:
    head = (
        f"HTTP/1.1 {answer.status.value} {answer.status.phrase}\r\n"
        f"Content-Type: {answer.content_type}\r\nContent-Length: {len(answer.body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + answer.body
