"""A reverse proxy that misbehaves on demand, in front of a real API server.

What is real stays real: versions, conflicts, bookmarks and watch history come from the API server. Only the way there
is broken: answers that are lost after the work was done, connections cut in the middle of an object, watches that
fall silent, 409, 410, 429 and 5xx at the moment that hurts most.

Its own side is plain HTTP on loopback. A request without an Authorization header goes on with the identity of the
kubeconfig that the proxy was given; one with a token goes on with that token alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import parse_qsl, urlsplit

import aiohttp
import msgspec
from kubernetes.aio.client.rest import RESTClientObject

from tokenfactory.kube.credentials import from_kubeconfig

_HOP_BY_HOP = frozenset({"connection", "content-length", "host", "keep-alive", "transfer-encoding"})


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it came in."""

    method: str
    path: str
    query: Mapping[str, str]

    @property
    def is_watch(self) -> bool:
        return self.query.get("watch") in {"1", "true"}


F = TypeVar("F", bound="Fault")
Match = Callable[[Seen], bool]


def watches(seen: Seen) -> bool:
    return seen.is_watch


def lists(seen: Seen) -> bool:
    return seen.method == "GET" and not seen.is_watch


def writes(seen: Seen) -> bool:
    return seen.method not in {"GET", "HEAD"}


def nth(number: int, match: Match) -> Match:
    """The `number`-th request from now on that matches, counted from 1; and none after it."""
    seen = itertools.count(1)
    return lambda request: match(request) and next(seen) == number


@dataclass(slots=True)
class Fault:
    """What goes wrong, for the first `times` requests that match."""

    match: Match
    times: int = 1
    met: int = field(default=0, init=False)
    happened: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    """Set once it went wrong for the last of the `times`."""

    def note(self) -> None:
        if self.met >= self.times:
            self.happened.set()


@dataclass(slots=True)
class Answer(Fault):
    """The API server is not asked: this is the answer."""

    code: int = 500
    reason: str = "InternalError"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class LoseAnswer(Fault):
    """The API server does what was asked; nobody is told."""


@dataclass(slots=True)
class Crash(Fault):
    """The client dies of its own request: before anybody was asked, or, `landed`, once it has been done."""

    kill: Callable[[], None] = lambda: None
    landed: bool = False

    def strike(self) -> None:
        """Nothing of the client is left when this returns, but what it had sent before."""
        self.kill()
        self.note()


@dataclass(slots=True)
class Cut(Fault):
    """After so many whole lines, half of the next, then the connection is gone. (A list is one line.)"""

    after_lines: int = 0


@dataclass(slots=True)
class Stall(Fault):
    """After so many lines nothing comes any more, on a connection that stays open."""

    after_lines: int = 0


@dataclass(slots=True)
class Inject(Fault):
    """After so many lines this one, which the API server never sent; then the watch ends."""

    line: bytes = b""
    after_lines: int = 0


def expired_line() -> bytes:
    """The line with which an API server ends a watch whose history is gone."""
    status = {"kind": "Status", "code": 410, "reason": "Expired", "message": "too old resource version"}
    return msgspec.json.encode({"type": "ERROR", "object": status})


class _Broken(Exception):  # noqa: N818 - it is on purpose
    """The connection ends here, without another word."""


class FaultProxy:
    """`async with FaultProxy(kubeconfig) as proxy: proxy.inject(Cut(watches)); ...`."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._faults: list[Fault] = []
        self._open = asyncio.Event()
        self._open.set()
        self._healed = asyncio.Event()
        self._connections: set[asyncio.Task[None]] = set()
        self._stack = contextlib.AsyncExitStack()
        self.requests: list[Seen] = []
        self.url = ""

    async def __aenter__(self) -> Self:
        configuration = await from_kubeconfig(self._upstream)()
        self._ours = await self._session(configuration)
        configuration.cert_file = configuration.key_file = None
        self._theirs = await self._session(configuration)
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._stack.callback(server.close)
        host, port = server.sockets[0].getsockname()[:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drop_connections()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._stack.aclose()

    async def _session(self, configuration: Any) -> aiohttp.ClientSession:
        rest = RESTClientObject(configuration)
        token = configuration.api_key.get("BearerToken")
        session = aiohttp.ClientSession(
            configuration.host,
            connector=aiohttp.TCPConnector(ssl=rest.ssl_context, limit=0),
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Authorization": token} if token else {},
            auto_decompress=False,
            read_bufsize=2**21,
        )
        return await self._stack.enter_async_context(session)

    # --- what the test says

    def inject(self, fault: F) -> F:
        self._faults.append(fault)
        self._healed.clear()
        return fault

    def heal(self) -> None:
        """No fault from now on, for what is already under way as well."""
        self._faults.clear()
        self._open.set()
        self._healed.set()

    def partition(self) -> None:
        """Nothing passes, in either direction, and no connection ends: packets are lost."""
        self._open.clear()

    def drop_connections(self) -> None:
        for connection in self._connections:
            connection.cancel()

    def kubeconfig(self, folder: Path, *, token_file: Path | None = None) -> Path:
        """A kubeconfig for this proxy, with the upstream's identity or with a token."""
        user = {} if token_file is None else {"tokenFile": str(token_file)}
        path = folder / (
            "proxied.kubeconfig" if token_file is None else f"proxied-{token_file.name}.kubeconfig"
        )
        named = {
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": "proxy", "user": user}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
        }
        path.write_bytes(msgspec.json.encode({**named, "current-context": "proxy"}))
        return path

    # --- what it does

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request after the other, until somebody has had enough."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (request := await _read_request(reader)) is not None:
                await self._answer(request, reader, writer)
        except (_Broken, ConnectionError, asyncio.IncompleteReadError, aiohttp.ClientError):
            pass
        except asyncio.CancelledError:  # drop_connections: asyncio.streams must not hear of it
            pass
        finally:
            writer.transport.abort()
            self._connections.discard(task)

    def _next_fault(self, seen: Seen) -> Fault | None:
        for fault in self._faults:
            if fault.met < fault.times and fault.match(seen):
                fault.met += 1
                return fault
        return None

    async def _answer(
        self, request: _Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        seen = request.seen()
        self.requests.append(seen)
        await self._open.wait()
        fault = self._next_fault(seen)
        if isinstance(fault, Answer):
            fault.note()
            await _write_answer(writer, fault)
            return
        if isinstance(fault, Crash) and not fault.landed:
            fault.strike()
            raise _Broken
        session = self._theirs if "authorization" in request.headers else self._ours
        async with session.request(
            request.method, request.target, data=request.body or None, headers=request.headers
        ) as upstream:
            if isinstance(fault, LoseAnswer):
                await upstream.read()
                fault.note()
                raise _Broken
            if isinstance(fault, Crash):
                await upstream.read()
                fault.strike()
                raise _Broken
            pump = asyncio.ensure_future(self._pump(writer, upstream, fault, watch=seen.is_watch))
            if not seen.is_watch:
                await pump
                return
            # A watch also ends when its reader goes: nothing else comes on this connection meanwhile.
            gone = asyncio.ensure_future(reader.read(1))
            try:
                await asyncio.wait({pump, gone}, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    raise _Broken
                await pump
            finally:
                gone.cancel()
                pump.cancel()
                await asyncio.gather(gone, pump, return_exceptions=True)

    async def _pump(
        self,
        writer: asyncio.StreamWriter,
        upstream: aiohttp.ClientResponse,
        fault: Fault | None,
        *,
        watch: bool,
    ) -> None:
        kept = {name: value for name, value in upstream.headers.items() if name.lower() not in _HOP_BY_HOP}
        _write_head(writer, upstream.status, {**kept, "Transfer-Encoding": "chunked"})
        passed = 0
        async for line in _lines(upstream, watch=watch):
            await self._open.wait()
            if isinstance(fault, Cut) and passed == fault.after_lines:
                _write_chunk(writer, line[: len(line) // 2])
                await writer.drain()
                fault.note()
                raise _Broken
            if isinstance(fault, Stall) and passed == fault.after_lines:
                fault.note()
                await self._healed.wait()
            if isinstance(fault, Inject) and passed == fault.after_lines:
                fault.note()
                _write_chunk(writer, fault.line + b"\n")
                break
            _write_chunk(writer, line)
            await writer.drain()
            passed += 1
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@dataclass(frozen=True, slots=True)
class _Request:
    method: str
    target: str
    headers: Mapping[str, str]
    body: bytes

    def seen(self) -> Seen:
        parts = urlsplit(self.target)
        return Seen(self.method, parts.path, dict(parse_qsl(parts.query, keep_blank_values=True)))


async def _read_request(reader: asyncio.StreamReader) -> _Request | None:
    """The next request of a connection, or None at its end. Bodies have a Content-Length, as our clients send."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    first, *rest = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ")
    pairs = (line.split(":", 1) for line in rest if line)
    headers = {name.strip().lower(): value.strip() for name, value in pairs}
    if "chunked" in headers.get("transfer-encoding", ""):
        message = "the fault proxy reads no chunked requests: send a Content-Length"
        raise ValueError(message)
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    kept = {name: value for name, value in headers.items() if name not in _HOP_BY_HOP}
    return _Request(method, target, kept, body)


def _write_head(writer: asyncio.StreamWriter, code: int, headers: Mapping[str, str]) -> None:
    lines = [f"HTTP/1.1 {code} {HTTPStatus(code).phrase}", *(f"{name}: {headers[name]}" for name in headers)]
    writer.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))


def _write_chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    if data:  # an empty chunk would be the end
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))


async def _write_answer(writer: asyncio.StreamWriter, fault: Answer) -> None:
    status = {
        "kind": "Status",
        "code": fault.code,
        "reason": fault.reason,
        "message": "the fault proxy said so",
    }
    body = msgspec.json.encode(status)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), **fault.headers}
    _write_head(writer, fault.code, headers)
    writer.write(body)
    await writer.drain()


async def _lines(upstream: aiohttp.ClientResponse, *, watch: bool) -> AsyncIterator[bytes]:
    """The lines of a watch as they come; any other answer as one."""
    if not watch:
        yield await upstream.read()
        return
    rest = b""
    async for data in upstream.content.iter_any():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line + b"\n"
