"""Scraping the model servers of this node. They run other people's code: nothing they answer may hurt the agent.

An address is read only if the GPUNode's spec grants it and it is a plain http(s) address of a pod: no names (no
resolver to be fooled), no loopback or link-local (no cloud metadata), no redirects, no compression, and bounds on
time, headers, size, line and series. Certificates are not verified: pods have self-made ones, and a liar on the pod
network can say no more than a lying pod could.
"""

from __future__ import annotations

import asyncio
import ipaddress
import ssl
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

import msgspec

from tokenfactory.agent.engines import engine_table
from tokenfactory.agent.exposition import ExpositionError, ExpositionReader, Reading
from tokenfactory.agent.meter import EnergyBook, PodAccount

if TYPE_CHECKING:
    import aiohttp

SCRAPE_TIMEOUT_SECONDS: Final = 2.0
LARGEST_DOCUMENT: Final = 4 * 1024 * 1024
CHUNK: Final = 64 * 1024
AT_ONCE: Final = 4
PATHS: Final = ("/v1/metrics", "/metrics", "/prometheus/metrics")
_STATUS_OK: Final = 200
_STATUS_ELSEWHERE: Final = frozenset({404, 405, 501})


class ScrapeError(Exception):
    """The endpoint gave no reading; the message says why, in words for an SRE."""


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One pod whose model is metered."""

    uid: str
    pod: str
    url: str
    gpus: int


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    base: str
    paths: tuple[str, ...]


def endpoint_of(url: str, *, allow_loopback: bool = False) -> Endpoint:
    """The address that a grant names, or ScrapeError with what is wrong with it."""
    try:
        parsed = urlsplit(url)
        port = parsed.port
        address = ipaddress.ip_address(parsed.hostname or "")
    except ValueError as e:
        raise ScrapeError(
            f"{url[:200]!r} is not a pod's address: write for example http://10.1.2.3:8000"
        ) from e
    if parsed.scheme not in ("http", "https") or parsed.username or parsed.password or port is None:
        raise ScrapeError(f"{url[:200]!r} must be http:// or https:// with an address and a port")
    address = getattr(address, "ipv4_mapped", None) or address
    if (address.is_loopback and not allow_loopback) or any(
        (address.is_link_local, address.is_multicast, address.is_unspecified, _is_reserved(address))
    ):
        raise ScrapeError(f"{address} is not the address of a pod")
    path = parsed.path
    paths = PATHS if path in ("", "/") else (path, *(other for other in PATHS if other != path))
    host = f"[{address}]" if address.version == 6 else str(address)
    return Endpoint(base=f"{parsed.scheme}://{host}:{port}", paths=paths)


def _is_reserved(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    # 240.0.0.0/4; IPv6's "reserved" ranges overlap loopback, so only IPv4 is asked.
    return address.version == 4 and address.is_reserved


class Scraper:
    """Reads one endpoint at a time for each caller; holds one HTTP session and which path worked where."""

    def __init__(
        self, *, allow_loopback: bool = False, timeout_seconds: float = SCRAPE_TIMEOUT_SECONDS
    ) -> None:
        self._allow_loopback = allow_loopback
        self._timeout = timeout_seconds
        self._session: aiohttp.ClientSession | None = None
        self._paths: dict[str, str] = {}

    async def scrape(self, url: str) -> Reading:
        endpoint = endpoint_of(url, allow_loopback=self._allow_loopback)
        known = self._paths.get(url)
        paths = (known, *(p for p in endpoint.paths if p != known)) if known else endpoint.paths
        problem = ScrapeError("nothing was asked")
        try:
            async with asyncio.timeout(self._timeout):
                for path in paths:
                    try:
                        reading = await self._read(endpoint.base + path)
                    except (ExpositionError, _NotHereError) as e:
                        problem = ScrapeError(f"{path}: {e}")
                        continue
                    self._paths[url] = path
                    return reading
        except TimeoutError as e:
            raise ScrapeError(f"no complete answer within {self._timeout:g} s") from e
        self._paths.pop(url, None)
        raise problem

    async def _read(self, url: str) -> Reading:
        import aiohttp

        reader = ExpositionReader(engine_table())
        size = 0
        try:
            async with self._http().get(url, allow_redirects=False) as response:
                if response.status in _STATUS_ELSEWHERE:
                    raise _NotHereError(f"HTTP {response.status}")
                if response.status != _STATUS_OK:
                    raise ScrapeError(f"HTTP {response.status}")
                if response.headers.get("Content-Encoding", "identity").lower() != "identity":
                    raise ScrapeError("compressed without being asked to")
                async for chunk in response.content.iter_chunked(CHUNK):
                    size += len(chunk)
                    if size > LARGEST_DOCUMENT:
                        raise ScrapeError(f"more than {LARGEST_DOCUMENT} bytes")
                    reader.feed(chunk)
                    await asyncio.sleep(0)  # a long document must not hold up the path that obeys
        except (aiohttp.ClientError, OSError, ValueError) as e:
            if isinstance(e, ExpositionError):
                raise
            raise ScrapeError(f"{type(e).__name__}: {e}"[:300]) from e
        return reader.reading()

    def _http(self) -> aiohttp.ClientSession:
        import aiohttp

        if self._session is None:
            unverified = ssl.create_default_context()
            unverified.check_hostname = False
            unverified.verify_mode = ssl.CERT_NONE
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=AT_ONCE * 2, ssl=unverified, force_close=True),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                headers={"Accept": "text/plain; version=0.0.4", "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=self._timeout),
                read_bufsize=CHUNK,
            )
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None


class _NotHereError(Exception):
    """The server lives, but its metrics are at another path."""


ReadEnergy = Callable[[], Awaitable[Mapping[str, int | None]]]
"""GPU uuid → millijoules since the driver loaded, None where it cannot be read."""


class Meter:
    """Rounds over all pods of the node: energy, scrapes, energy, then one window for each pod."""

    def __init__(
        self,
        scrape: Callable[[str], Awaitable[Reading]],
        read_energy: ReadEnergy,
        *,
        monotonic: Callable[[], float] = time.monotonic,
        wall: Callable[[], str],
    ) -> None:
        self._scrape = scrape
        self._read_energy = read_energy
        self._monotonic = monotonic
        self._wall = wall
        self.energy = EnergyBook()
        self.accounts: dict[str, PodAccount] = {}
        self.problems: dict[str, str] = {}
        self.failures = 0

    async def round(self, targets: tuple[Target, ...], holders: Mapping[str, Mapping[str, float]]) -> None:
        """One reading of every pod. Never raises for what a pod answers."""
        uids = {target.uid for target in targets}
        self.accounts = {uid: account for uid, account in self.accounts.items() if uid in uids}
        self.energy.forget_all_but({*uids, *(uid for shares in holders.values() for uid in shares)})
        started = await self._attribute(holders)
        before = dict(self.energy.millijoules)
        gate = asyncio.Semaphore(AT_ONCE)
        read = await asyncio.gather(*(self._one(target, gate) for target in targets))
        ended = await self._attribute(holders)
        self.problems = {}
        for target, (at, result) in zip(targets, read, strict=True):
            if isinstance(result, str):
                self.problems[target.pod] = result
                self.failures += 1
                continue
            share = (at - started) / (ended - started) if ended > started else 1.0
            at_start, at_end = before.get(target.uid, 0.0), self.energy.millijoules.get(target.uid, 0.0)
            account = self.accounts.get(target.uid)
            if account is None:
                account = PodAccount(pod=target.pod, uid=target.uid, gpus=target.gpus)
                self.accounts[target.uid] = account
            refused = account.refused_windows
            account.update(
                result,
                at=at,
                millijoules=at_start + (at_end - at_start) * min(1.0, max(0.0, share)),
                breaks=self.energy.breaks.get(target.uid, 0),
                wall=self._wall(),
            )
            if account.refused_windows > refused:
                self.problems[target.pod] = "its token counter cannot be true: it fell or jumped"
            elif result.refused:
                self.problems[target.pod] = f"{result.refused} samples are no counts"

    async def _attribute(self, holders: Mapping[str, Mapping[str, float]]) -> float:
        self.energy.attribute(await self._read_energy(), holders)
        return self._monotonic()

    async def _one(self, target: Target, gate: asyncio.Semaphore) -> tuple[float, Reading | str]:
        async with gate:
            asked = self._monotonic()
            try:
                reading = await self._scrape(target.url)
            except ScrapeError as e:
                return asked, str(e)
            except Exception as e:
                return asked, f"{type(e).__name__}: {e}"[:300]
            return (asked + self._monotonic()) / 2, reading
