"""Endpoints that are slow, lying, huge or hostile: the agent says so and goes on."""

import asyncio
import gzip
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from tokenfactory.agent.nim import LARGEST_DOCUMENT, Meter, ScrapeError, Scraper, Target, endpoint_of

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
GOOD = b'vllm:generation_tokens_total{model_name="m"} 42\n'


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[str]:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(reader, writer)
        except (ConnectionError, asyncio.CancelledError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


def http(body: bytes, status: str = "200 OK", headers: str = "", only: str = "") -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = (await reader.readuntil(b"\r\n\r\n")).decode()
        code, content = (status, body) if not only or f"GET {only} " in request else ("404 Not Found", b"")
        writer.write(f"HTTP/1.1 {code}\r\nContent-Length: {len(content)}\r\n{headers}\r\n".encode() + content)
        await writer.drain()

    return answer


def endless(piece: bytes, head: bytes) -> Answer:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()

    return answer


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()


async def _slowloris(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    while True:
        writer.write(b"v")
        await writer.drain()
        await asyncio.sleep(0.02)


async def _cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + GOOD)
    await writer.drain()


OK_HEAD = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
PATIENCE = {"silent": 0.2, "a byte now and then": 0.2, "endless chunk extension": 0.2}
"""Seconds, for those that only a timeout ends; the rest must end by themselves."""
HOSTILE: dict[str, tuple[Answer, str]] = {
    "silent": (_silent, "within"),
    "a byte now and then": (_slowloris, "within"),
    "cut in the middle": (_cut, "Payload"),
    "redirect": (http(b"", "302 Found", "Location: http://169.254.169.254/\r\n"), "HTTP 302"),
    "error": (http(b"", "500 Internal Server Error"), "HTTP 500"),
    "gzip bomb": (http(gzip.compress(b"0" * 10**7), headers="Content-Encoding: gzip\r\n"), "compressed"),
    "huge": (endless(b"10000\r\n" + b"# x\n" * 16384 + b"\r\n", OK_HEAD), str(LARGEST_DOCUMENT)),
    "one endless line": (endless(b"10000\r\n" + b"x" * 65536 + b"\r\n", OK_HEAD), str(LARGEST_DOCUMENT)),
    "endless headers": (endless(b"X-A: " + b"b" * 4000 + b"\r\n", b"HTTP/1.1 200 OK\r\n"), "HTTP|Header|400"),
    "one endless header": (endless(b"b" * 65536, b"HTTP/1.1 200 OK\r\nX-A: "), "."),
    "endless chunk extension": (endless(b"b" * 65536, OK_HEAD + b"1;x="), "."),
    "not http": (endless(b"\x00\xff" * 1000, b""), "."),
    "html": (http(b"<html></html>", headers="Content-Type: text/html\r\n"), "engines.toml"),
    "json": (http(b'[{"iter": 1}]', headers="Content-Type: application/json\r\n"), "engines.toml"),
    "negative length": (http(b"", headers="Content-Length: -5\r\n"), "."),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_endpoint_gives_an_error_in_bounded_time_and_memory(name: str) -> None:
    answer, words = HOSTILE[name]
    scraper = Scraper(allow_loopback=True, timeout_seconds=PATIENCE.get(name, 30))
    loop_turns = 0

    async def count() -> None:
        nonlocal loop_turns
        while True:
            loop_turns += 1
            await asyncio.sleep(0.001)

    async with serving(answer) as url:
        counting = asyncio.create_task(count())
        tracemalloc.start()
        try:
            with pytest.raises(ScrapeError, match=words):
                await scraper.scrape(url)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
            counting.cancel()
            await scraper.close()
    assert peak < 3 * LARGEST_DOCUMENT
    assert loop_turns > 0


@pytest.mark.parametrize("path", ["/v1/metrics", "/metrics", "/prometheus/metrics", "/own/path"])
async def test_the_path_is_found_and_remembered(path: str) -> None:
    asked = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        asked.append(request.split()[1].decode())
        await http(GOOD, only=path)(_again(request), writer)

    scraper = Scraper(allow_loopback=True)
    async with serving(answer) as url:
        granted = url + ("/own/path" if path == "/own/path" else "")
        await scraper.scrape(granted)
        first = len(asked)
        reading = await scraper.scrape(granted)
    await scraper.close()
    assert sum(reading.generated_tokens.values()) == 42
    assert asked[first:] == [path]


def _again(request: bytes) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    reader.feed_data(request)
    reader.feed_eof()
    return reader


async def test_trtllm_json_at_metrics_is_passed_over_for_its_prometheus_path() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        body = b"trtllm_generation_tokens_total 7\n" if b"/prometheus/" in request else b"[]"
        await http(body)(_again(request), writer)

    scraper = Scraper(allow_loopback=True)
    async with serving(answer) as url:
        assert (await scraper.scrape(url)).engine == "tensorrt-llm"
    await scraper.close()


ADDRESSES = {
    "http://10.1.2.3:8000": "http://10.1.2.3:8000",
    "https://[fd00::5]:8443/metrics": "https://[fd00::5]:8443",
    "http://[::ffff:10.1.2.3]:80": "http://10.1.2.3:80",
}
REFUSED = [
    "http://127.0.0.1:8000",
    "http://[::1]:8000",
    "http://[::ffff:127.0.0.1]:8000",
    "http://169.254.169.254:80/latest/meta-data",
    "http://[fe80::1]:8000",
    "http://0.0.0.0:8000",
    "http://224.0.0.1:8000",
    "http://255.255.255.255:8000",
    "http://metadata.google.internal:80",
    "http://model.default.svc:8000",
    "http://user:pw@10.1.2.3:8000",
    "http://10.1.2.3",
    "file:///etc/passwd",
    "unix:///run/x.sock",
    "gopher://10.1.2.3:70",
    "http://10.1.2.3:99999",
    "http://0x7f000001:80",
    "",
]


@pytest.mark.parametrize("url", ADDRESSES)
def test_a_pods_address_is_accepted(url: str) -> None:
    assert endpoint_of(url).base == ADDRESSES[url]


@pytest.mark.parametrize("url", REFUSED)
def test_what_is_no_pods_address_is_never_asked(url: str) -> None:
    with pytest.raises(ScrapeError):
        endpoint_of(url)


def test_loopback_is_for_tests_and_demos_only() -> None:
    assert endpoint_of("http://127.0.0.1:8000", allow_loopback=True).paths[0] == "/v1/metrics"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_one_bad_pod_does_not_spoil_the_round_of_the_others() -> None:
    clock = Clock()
    tokens = 0

    async def energy() -> dict[str, int | None]:
        return {"g0": int(clock.now * 500_000), "g1": int(clock.now * 300_000)}

    async def scrape(url: str) -> object:
        if url == "bad":
            raise ScrapeError("HTTP 500")
        if url == "crash":
            raise RuntimeError("unexpected")
        from tests.unit.agent.test_metering import reading

        return reading(float(tokens))

    meter = Meter(scrape, energy, monotonic=clock, wall=lambda: "now")
    targets = tuple(Target(uid=u, pod=f"ns/{u}", url=u, gpus=1) for u in ("good", "bad", "crash"))
    holders = {"g0": {"good": 1.0}, "g1": {"bad": 0.5, "crash": 0.5}}
    for _ in range(3):
        await meter.round(targets, holders)
        clock.now += 10
        tokens += 5_000
    account = meter.accounts["good"].report(clock.now)
    assert (account.generated_tokens, account.millijoules) == (10_000, 20 * 500_000)
    assert set(meter.problems) == {"ns/bad", "ns/crash"}
    await meter.round((), {})
    assert meter.accounts == {}
    assert meter.energy.millijoules == {}


async def test_energy_is_taken_at_the_moment_of_the_reading_not_of_the_round() -> None:
    clock = Clock()
    tokens = 0

    async def energy() -> dict[str, int | None]:
        return {"g0": int(clock.now * 500_000)}

    async def slow(_url: str) -> object:
        from tests.unit.agent.test_metering import reading

        taken = reading(float(tokens))
        clock.now += 2
        return taken

    meter = Meter(slow, energy, monotonic=clock, wall=lambda: "now")
    target = (Target(uid="u", pod="ns/u", url="u", gpus=1),)
    await meter.round(target, {"g0": {"u": 1.0}})
    clock.now += 8
    tokens += 1_000
    await meter.round(target, {"g0": {"u": 1.0}})
    window = meter.accounts["u"].last_window
    assert window is not None
    assert window.seconds == 10
    assert window.millijoules == 10 * 500_000
