"""One connection pool to the API server, for everything in this process.

Configuration and TLS come from `kubernetes.aio`, the one client of this product; requests and answers stay bytes,
so that each object is decoded once, straight into the caller's type. (The generated models cost about fifty times as
much per pod.)

What is tried again: 429 always, since nothing was done; 401 once, with credentials read anew; a lost answer or 5xx
only where doing it twice does no harm.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Hashable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar

import aiohttp
import msgspec
from kubernetes.aio.client.rest import RESTClientObject

from tokenfactory.api.meta import Resource
from tokenfactory.kube.backoff import Backoff
from tokenfactory.kube.credentials import Credentials, default_loader
from tokenfactory.kube.errors import ApiError, UnauthorizedError, UnreachableError, error_of
from tokenfactory.kube.ratelimit import RateLimiter
from tokenfactory.kube.resources import Key, object_path
from tokenfactory.kube.sockets import keepalive_socket

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Resource)
Guard = Callable[[], None]
"""Called right before each attempt to write; raises when we may no longer."""

JSON = "application/json"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
_TRANSPORT_FAULTS = (aiohttp.ClientError, TimeoutError, OSError)
_RETRIED_CODES = frozenset({429, 500, 502, 503, 504})


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    path: str
    query: Mapping[str, str]
    body: bytes | None
    content_type: str
    guard: Guard | None


class Client:
    """Requests to one API server. Safe to share between tasks of one event loop."""

    def __init__(
        self,
        credentials: Credentials,
        *,
        limiter: RateLimiter | None = None,
        user_agent: str = "tokenfactory",
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._credentials = credentials
        self._limiter = limiter
        self._user_agent = user_agent
        self._backoff = backoff
        self._sessions: dict[Hashable, aiohttp.ClientSession] = {}

    @classmethod
    async def connect(
        cls, kubeconfig: Path | None = None, *, context: str | None = None, **options: Any
    ) -> Client:
        """From the named kubeconfig, else as the pod that we run in, else from the user's kubeconfig."""
        return cls(await Credentials.read(default_loader(kubeconfig, context)), **options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for session in self._sessions.values():
            await session.close()
        self._sessions.clear()

    def _session(self) -> aiohttp.ClientSession:
        """The pool for the present address and certificates; older ones end with the client."""
        identity = self._credentials.identity
        session = self._sessions.get(identity)
        if session is None:
            configuration = self._credentials.configuration
            rest = RESTClientObject(configuration)
            session = aiohttp.ClientSession(
                base_url=configuration.host,
                connector=aiohttp.TCPConnector(
                    ssl=rest.ssl_context, limit=rest.maxsize, socket_factory=keepalive_socket
                ),
                trust_env=True,
                # Compressing costs both ends more than the wire does inside a cluster.
                headers={"Accept-Encoding": "identity", "Accept": JSON, "User-Agent": self._user_agent},
                read_bufsize=2**21,  # a watch event may be as large as an etcd value
            )
            self._sessions[identity] = session
        return session

    async def _headers(self, content_type: str | None) -> dict[str, str]:
        headers = {} if content_type is None else {"Content-Type": content_type}
        authorization = await self._credentials.current()
        if authorization is not None:
            headers["Authorization"] = authorization
        return headers

    async def _attempt(self, call: _Call, seconds: float) -> bytes:
        headers = await self._headers(None if call.body is None else call.content_type)
        if call.guard is not None:
            call.guard()  # P5: after every wait, right before the bytes leave
        doing = f"{call.method} {call.path}"
        timeout = aiohttp.ClientTimeout(total=seconds, sock_connect=min(seconds, 5.0))
        try:
            async with self._session().request(
                call.method, call.path, params=call.query, data=call.body, headers=headers, timeout=timeout
            ) as response:
                answer = await response.read()
        except _TRANSPORT_FAULTS as fault:
            raise await self._unreachable(doing, fault) from fault
        if response.status < 300:
            return answer
        error = error_of(doing, response.status, answer, response.headers.get("Retry-After"))
        if isinstance(error, UnauthorizedError):
            await self._credentials.refresh(headers.get("Authorization"))
        raise error

    async def _unreachable(self, doing: str, fault: BaseException) -> UnreachableError:
        if isinstance(fault, aiohttp.ClientSSLError):  # an authority or certificate may have been renewed
            await self._credentials.refresh(self._credentials.authorization)
        return UnreachableError(doing, fault, sent=not isinstance(fault, aiohttp.ClientConnectorError))

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: object = None,
        content_type: str = JSON,
        repeatable: bool | None = None,
        guard: Guard | None = None,
        seconds: float = 30.0,
        attempt_seconds: float = 10.0,
        urgent: bool = False,
    ) -> bytes:
        """The answer's body, after as many attempts as do no harm within `seconds`.

        `repeatable` says that doing it twice equals doing it once (default: only reading). `urgent` does not wait
        for the rate limit: for what lowers power and what keeps a Lease.
        """
        data = None if body is None else msgspec.json.encode(body)
        call = _Call(method, path, query or {}, data, content_type, guard)
        repeatable = method == "GET" if repeatable is None else repeatable
        deadline = time.monotonic() + seconds
        backoff = self._backoff()
        refreshed = False
        while True:
            if self._limiter is not None and not urgent:
                await self._limiter.wait()
            try:
                left = max(0.1, deadline - time.monotonic())
                return await self._attempt(call, min(attempt_seconds, left))
            except UnauthorizedError:
                if refreshed:
                    raise
                refreshed = True
            except (ApiError, UnreachableError) as error:
                pause = _pause(error, backoff, repeatable=repeatable)
                if pause is None or time.monotonic() + pause >= deadline:
                    raise
                log.info("request tried again in %.1f s: %s", pause, error)
                await asyncio.sleep(pause)

    @asynccontextmanager
    async def stream(
        self, path: str, query: Mapping[str, str], *, silent_seconds: float
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """An answer without an end. Nothing read for `silent_seconds` ends it as unreachable."""
        headers = await self._headers(None)
        doing = f"WATCH {path}"
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=silent_seconds)
        try:
            response = await self._session().get(path, params=query, headers=headers, timeout=timeout)
            answer = b"" if response.status < 300 else await response.read()
        except _TRANSPORT_FAULTS as fault:
            raise await self._unreachable(doing, fault) from fault
        try:
            if response.status >= 300:
                error = error_of(doing, response.status, answer, response.headers.get("Retry-After"))
                if isinstance(error, UnauthorizedError):
                    await self._credentials.refresh(headers.get("Authorization"))
                raise error
            yield _chunks(doing, response)
        finally:
            response.close()

    async def get(self, kind: type[T], key: Key, **options: Any) -> T:
        return msgspec.json.decode(await self.request("GET", object_path(kind, key), **options), type=kind)


async def _chunks(doing: str, response: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """What comes, as it comes. Only faults of the connection are named as such, never those of the reader."""
    try:
        async for data in response.content.iter_any():
            yield data
    except _TRANSPORT_FAULTS as fault:
        raise UnreachableError(doing, fault, sent=True) from fault


def _pause(error: ApiError | UnreachableError, backoff: Backoff, *, repeatable: bool) -> float | None:
    """Seconds until the next attempt, or None where another attempt could do harm or cannot help."""
    if isinstance(error, UnreachableError):
        return backoff.next() if repeatable or not error.sent else None
    if error.code not in _RETRIED_CODES or not (repeatable or error.code == 429):
        return None
    return max(backoff.next(), error.retry_after_seconds or 0.0)
