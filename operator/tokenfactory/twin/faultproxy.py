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
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
from aiohttp import web
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


@dataclass(slots=True)
class Fault:
    """What goes wrong, for the first `times` requests that match."""

    match: Match
    times: int = 1
    met: int = field(default=0, init=False)
    happened: asyncio.Event = field(default_factory=asyncio.Event, init=False)


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


class FaultProxy:
    """`async with FaultProxy(kubeconfig) as proxy: proxy.inject(Cut(watches)); ...`."""

    def __init__(self, upstream: Path) -> None:
        self._upstream = upstream
        self._faults: list[Fault] = []
        self._open = asyncio.Event()
        self._open.set()
        self._healed = asyncio.Event()
        self._transports: set[asyncio.BaseTransport] = set()
        self._stack = contextlib.AsyncExitStack()
        self.requests: list[Seen] = []
        self.url = ""

    async def __aenter__(self) -> Self:
        configuration = await from_kubeconfig(self._upstream)()
        self._ours = await self._session(configuration)
        configuration.cert_file = configuration.key_file = None
        self._theirs = await self._session(configuration)
        server = web.Server(self._handle)
        runner = web.ServerRunner(server, shutdown_timeout=0)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.drop_connections()
        await self._stack.aclose()

    async def _session(self, configuration: Any) -> aiohttp.ClientSession:
        rest = RESTClientObject(configuration)
        connector = aiohttp.TCPConnector(ssl=rest.ssl_context, limit=0)
        timeout = aiohttp.ClientTimeout(total=None)
        session = aiohttp.ClientSession(
            configuration.host,
            connector=connector,
            timeout=timeout,
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
        for transport in list(self._transports):
            transport.abort()  # type: ignore[attr-defined]

    def kubeconfig(self, folder: Path, *, token_file: Path | None = None) -> Path:
        """A kubeconfig for this proxy, with the upstream's identity or with a token."""
        user = {} if token_file is None else {"tokenFile": str(token_file)}
        path = folder / "proxied.kubeconfig"
        named = {
            "clusters": [{"name": "proxy", "cluster": {"server": self.url}}],
            "users": [{"name": "proxy", "user": user}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
        }
        path.write_bytes(msgspec.json.encode({**named, "current-context": "proxy"}))
        return path

    # --- what it does

    def _next_fault(self, seen: Seen) -> Fault | None:
        for fault in self._faults:
            if fault.met < fault.times and fault.match(seen):
                fault.met += 1
                return fault
        return None

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        seen = Seen(request.method, request.path, dict(request.query))
        self.requests.append(seen)
        transport = request.transport
        assert transport is not None
        self._transports.add(transport)
        try:
            await self._open.wait()
            fault = self._next_fault(seen)
            if isinstance(fault, Answer):
                fault.happened.set()
                return _answer(fault)
            return await self._forward(request, seen, fault)
        finally:
            self._transports.discard(transport)

    async def _forward(self, request: web.BaseRequest, seen: Seen, fault: Fault | None) -> web.StreamResponse:
        session = self._theirs if "Authorization" in request.headers else self._ours
        headers = {name: value for name, value in request.headers.items() if name.lower() not in _HOP_BY_HOP}
        body = await request.read()
        try:
            async with session.request(
                request.method, request.path_qs, data=body or None, headers=headers
            ) as upstream:
                if isinstance(fault, LoseAnswer):
                    await upstream.read()
                    self._abort(request, fault)
                kept = {
                    name: value for name, value in upstream.headers.items() if name.lower() not in _HOP_BY_HOP
                }
                response = web.StreamResponse(status=upstream.status, headers=kept)
                await response.prepare(request)
                await self._pump(request, response, upstream, fault, watch=seen.is_watch)
                await response.write_eof()
                return response
        except aiohttp.ClientConnectorError:
            self._abort(request, fault)
            raise

    async def _pump(
        self, request: web.BaseRequest, response: web.StreamResponse, upstream: aiohttp.ClientResponse,
        fault: Fault | None, *, watch: bool,
    ) -> None:  # fmt: skip
        passed = 0
        async for line in _lines(upstream, watch=watch):
            await self._open.wait()
            if isinstance(fault, (Cut, Stall, Inject)) and passed == fault.after_lines:
                await self._break(request, response, fault, line)
                return
            await response.write(line)
            passed += 1

    async def _break(
        self, request: web.BaseRequest, response: web.StreamResponse, fault: Cut | Stall | Inject, line: bytes
    ) -> None:
        if isinstance(fault, Cut):
            await response.write(line[: len(line) // 2])
            self._abort(request, fault)
        fault.happened.set()
        if isinstance(fault, Inject):
            await response.write(fault.line + b"\n")
        if isinstance(fault, Stall):
            await self._healed.wait()

    @staticmethod
    def _abort(request: web.BaseRequest, fault: Fault | None) -> None:
        if fault is not None:
            fault.happened.set()
        if request.transport is not None:
            request.transport.abort()
        raise asyncio.CancelledError


def _answer(fault: Answer) -> web.Response:
    status = {
        "kind": "Status",
        "code": fault.code,
        "reason": fault.reason,
        "message": "the fault proxy said so",
    }
    return web.Response(
        status=fault.code,
        headers=dict(fault.headers),
        body=msgspec.json.encode(status),
        content_type="application/json",
    )


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
