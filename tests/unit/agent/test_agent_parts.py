"""The small rooms of the agent, each by itself."""

import asyncio
import json
import logging
import subprocess
import sys
import threading
from http import HTTPStatus
from types import SimpleNamespace

import pytest
from tests.unit.agent.hollow import CHAT, Node
from tests.unit.agent.virtual import run
from typer.testing import CliRunner

from tokenfactory.agent import main
from tokenfactory.agent.following import LiveSheets
from tokenfactory.agent.holders import holdings
from tokenfactory.agent.main import AgentOptions
from tokenfactory.agent.metrics import render
from tokenfactory.agent.parts import PodDevices
from tokenfactory.agent.sources import SheetBook
from tokenfactory.agent.waiting import GateAnswer, ask
from tokenfactory.agent.watchdog import EXIT_STUCK, Progress, Watchdog
from tokenfactory.agent.web import MOST_CONNECTIONS, Answer, WebServer
from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec, ClassCap, EarlierCaps, Renewal
from tokenfactory.api.gpu_node import GPUNodeSpec, PodGrant
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.cli.main import app
from tokenfactory.kube.logs import JsonFormatter

# --- who holds what


def grant(name: str, class_name: str = CHAT) -> PodGrant:
    return PodGrant(namespace="ns", name=name, uid=f"u-{name}", class_name=class_name, gpus=1, metrics="m")


HOLDERS = {
    "nobody": ((), ""),
    "a granted pod": (("a",), "u-a"),
    "a stranger": (("x",), "?ns/x"),
    "two of one class": (("a", "b"), "u-a"),
    "two of different classes": (("a", "c"), "?ns/a"),
    "one of ours and a stranger": (("a", "x"), "?ns/a"),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_a_gpu_counts_for_a_pod_only_if_all_its_holders_are_known_and_alike(name: str) -> None:
    pods, uid = HOLDERS[name]
    spec = GPUNodeSpec(pods=(grant("a"), grant("b"), grant("c", "ns/other/m@X")))
    held = holdings(["g"], tuple(PodDevices("ns", pod, ("g",)) for pod in pods), spec)
    assert held.of("g").uid == uid
    assert sum(held.shares.get("g", {"": 1}).values()) == 1


def test_mig_devices_share_by_their_number() -> None:
    pods = (PodDevices("ns", "a", ("g", "g", "g")), PodDevices("ns", "b", ("g",)))
    held = holdings(["g"], pods, GPUNodeSpec(pods=(grant("a"), grant("b"))))
    assert held.shares == {"g": {"u-a": 0.75, "u-b": 0.25}}
    assert [target.uid for target in held.targets] == ["u-a", "u-b"]


# --- sheets


def sheet(epoch: int, cap: int, **more) -> CapSheet:
    spec = CapSheetSpec(
        domain="d", tree="t", term=1, epoch=epoch, caps=(ClassCap(class_name="c", cap=cap),), **more
    )
    return CapSheet(metadata=ObjectMeta(name="d"), spec=spec)


def test_a_sheet_is_converted_when_what_agents_obey_changes_and_not_for_the_ledgers_memory() -> None:
    book, told = SheetBook(), []
    book.listen("t", lambda: told.append(1))
    first = sheet(1, 500)
    book.take(None, first)
    held = book.sheets["d"]
    remembers = sheet(1, 500, earlier=(EarlierCaps(through=1, caps=()),))
    book.take(first, remembers)
    assert book.sheets["d"] is held
    assert len(told) == 1
    book.take(remembers, sheet(2, 400))
    assert book.sheets["d"].caps["c"].cap == 400
    book.take(sheet(2, 400), None)
    assert "d" not in book.sheets
    assert len(told) == 3


def test_a_renewal_is_no_sheet_and_one_of_a_tree_left_is_forgotten() -> None:
    book = SheetBook()
    spec = CapSheetSpec(domain="t", tree="t", term=1, epoch=1, renewal=Renewal(sequence=7))
    book.take(None, CapSheet(metadata=ObjectMeta(name="t.renewal"), spec=spec))
    assert dict(book.renewals) == {"t": 7}
    assert not book.sheets
    book.take(None, sheet(1, 500))
    book.forget("t", [sheet(1, 500)])
    assert not book.renewals
    assert not book.sheets


def test_a_sheet_that_moves_to_another_tree_is_kept_whichever_watch_tells_of_it_first() -> None:
    book, here, there = SheetBook(), sheet(1, 500), sheet(2, 500)
    book.take(None, here)
    book.take(None, there)
    book.take(here, None)
    assert book.sheets["d"].epoch == 2
    book.forget("t", [here])
    assert book.sheets["d"].epoch == 2
    book.forget("t", [there])
    assert "d" not in book.sheets


# --- the watchdog


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def wall(self) -> str:
        return "now"


def test_a_part_that_stands_still_ends_the_process_and_one_that_gets_round_does_not() -> None:
    clock, ended = Clock(), []
    progress = Progress(clock)
    progress.expect("obey", 10)
    progress.expect("meter", 100)
    watchdog = Watchdog(progress, grace=3.0, end=ended.append)
    clock.now = 29
    assert progress.late() == {"obey": 29}
    assert watchdog.check()
    progress.beat("obey")
    clock.now = 45
    assert watchdog.check()
    clock.now = 60
    assert not watchdog.check()
    assert ended == [EXIT_STUCK]


def test_the_watchdog_needs_no_event_loop() -> None:
    clock, ended = Clock(), threading.Event()
    progress = Progress(clock)
    progress.expect("obey", 1)
    watchdog = Watchdog(progress, every_seconds=0.001, end=lambda _: ended.set())
    watchdog.start()
    clock.now = 100.0
    assert ended.wait(10)
    watchdog.stop()


# --- the web server


async def echo(rest: str) -> Answer:
    if rest == "crash":
        raise RuntimeError("boom")
    return Answer(HTTPStatus.OK, rest.encode())


async def request(port: int, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


REQUESTS = {
    b"GET /e/abc HTTP/1.1\r\n\r\n": b"200",
    b"GET /e/abc?q=1 HTTP/1.1\r\nHost: x\r\n\r\n": b"200",
    b"GET /e/crash HTTP/1.1\r\n\r\n": b"500",
    b"GET /other HTTP/1.1\r\n\r\n": b"404",
    b"POST /e/abc HTTP/1.1\r\n\r\n": b"405",
    b"\r\n\r\n": b"405",
    b"GET\r\n\r\n": b"404",
    b"x" * 20_000 + b"\r\n\r\n": b"",
}


@pytest.mark.parametrize("data", REQUESTS)
async def test_the_web_server_answers_what_it_should(data: bytes) -> None:
    server = WebServer({"/e/": echo})
    port = await server.start("127.0.0.1", 0)
    answer = await request(port, data)
    await server.close()
    assert answer.split(b" ")[1:2] == ([REQUESTS[data]] if REQUESTS[data] else [])


async def test_silent_clients_do_not_keep_others_out_for_ever_nor_use_more_than_their_share() -> None:
    server = WebServer({"/e/": echo})
    port = await server.start("127.0.0.1", 0)
    silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(MOST_CONNECTIONS)]
    assert await request(port, b"GET /e/a HTTP/1.1\r\n\r\n") == b""
    for _, writer in silent:
        writer.close()
    async with asyncio.timeout(20):
        while not await request(port, b"GET /e/a HTTP/1.1\r\n\r\n"):
            pass
    await server.close()


# --- waiting for the cap


class Gate:
    """What `wait-cap` talks to."""

    def __init__(self, *answers: GateAnswer | bytes) -> None:
        self.answers = list(answers)
        self.paths: list[str] = []

    async def route(self, rest: str) -> Answer:
        self.paths.append(rest)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, bytes):
            return Answer(HTTPStatus.OK, answer)
        from msgspec import json as codec

        status = HTTPStatus.OK if answer.may_start else HTTPStatus.SERVICE_UNAVAILABLE
        return Answer(status, codec.encode(answer))


NOT_YET = GateAnswer(may_start=False, reason="NoGPUs", message="none yet")
YES = GateAnswer(may_start=True, reason="Capped", message="capped", gpus=("GPU-1",))
NEVER = GateAnswer(may_start=False, reason="Released", message="taken back", final=True)


async def wait_cap(gate: Gate, *more: str) -> SimpleNamespace:
    server = WebServer({"/v1/start/": gate.route})
    port = await server.start("127.0.0.1", 0)
    arguments = ["wait-cap", f"--port={port}", "--node-ip=127.0.0.1", "--pod-uid=uid-1", *more]
    try:
        return await asyncio.to_thread(CliRunner().invoke, app, arguments)
    finally:
        await server.close()


async def test_wait_cap_waits_says_once_what_for_and_lets_the_model_start() -> None:
    gate = Gate(NOT_YET, NOT_YET, YES)
    result = await wait_cap(gate)
    assert result.exit_code == 0
    assert result.output.count("none yet") == 1
    assert "GPU-1" in result.output
    assert gate.paths == ["uid-1"] * 3


async def test_wait_cap_ends_at_once_where_waiting_cannot_help() -> None:
    gate = Gate(NEVER)
    result = await wait_cap(gate)
    assert (result.exit_code, len(gate.paths)) == (1, 1)
    assert "taken back" in result.output


async def test_wait_cap_gives_up_when_its_patience_ends() -> None:
    result = await wait_cap(Gate(NOT_YET), "--patience-seconds=0.2")
    assert result.exit_code == 1
    assert "gave up" in result.output


@pytest.mark.parametrize("body", [b"", b"not json", b"[]", b'{"may_start": "yes"}'])
async def test_what_is_no_clear_yes_is_a_no(body: bytes) -> None:
    result = await wait_cap(Gate(body), "--patience-seconds=0")
    assert result.exit_code == 1
    assert "not as an agent does" in result.output


def test_nobody_there_is_a_no() -> None:
    answer = ask("127.0.0.1", 1, "uid")
    assert (answer.may_start, answer.final, answer.reason) == (False, False, "NoAgent")


def test_wait_cap_without_a_pod_uid_says_what_to_set() -> None:
    result = CliRunner().invoke(app, ["wait-cap"], env={"POD_UID": ""})
    assert result.exit_code == 2
    assert "metadata.uid" in result.output


def test_a_wrong_pace_says_what_to_write() -> None:
    result = CliRunner().invoke(app, ["agent", "--node=n", "--pace=sleep=1"])
    assert result.exit_code == 2
    assert "observe" in result.output


# --- what others read


def test_a_log_line_is_one_event_with_its_keys() -> None:
    record = logging.getLogger("x").makeRecord(
        "x", logging.WARNING, "f", 1, "XID", (), None, extra={"node": "n1", "xid": 79}
    )
    event = json.loads(JsonFormatter().format(record))
    assert (event["event"], event["level"], event["node"], event["xid"]) == ("XID", "warning", "n1", 79)


def test_every_metric_has_the_products_prefix_and_tells_what_holds() -> None:
    async def tell() -> str:
        node = Node()
        node.api.grant(pods=(node.use("a", 0, 1, url="http://pod"),))
        await node.settle(hold=600_000)
        await asyncio.sleep(60)
        text = render(node.agent).decode()
        await node.stop()
        return text

    text = run(tell())
    names = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert all(name.startswith(("tokenfactory_agent_", "tokenfactory_gpu_")) for name in names)
    assert 'tokenfactory_gpu_enforced_power_limit_watts{gpu="GPU-0",index="0"' in text
    assert 'tokenfactory_agent_mode{mode="Obeying"} 1.0' in text
    assert 'tokenfactory_agent_generated_tokens_total{pod="inference/a",uid="uid-a"}' in text
    assert "tokenfactory_agent_tokens_per_joule{" in text
    assert 'bound_by="Sheet site"' in text
    assert "tokenfactory_agent_hold_left_seconds " in text


def test_options_have_the_defaults_of_a_real_node() -> None:
    options = AgentOptions(node="n")
    assert options.gate_port == 9402
    assert not options.scrape_loopback


LEAN = """
import sys
from tokenfactory.agent.__main__ import enter_without_init
assert enter_without_init("kubernetes", "kubernetes.aio.config")
import tokenfactory.agent.main
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""
BROKEN = """
import sys
from tokenfactory.agent.__main__ import enter_without_init
assert not enter_without_init("kubernetes", "kubernetes.no_such_module")
import kubernetes
print(kubernetes.client.__name__)
"""


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_the_process_holds_nothing_that_an_agent_never_uses() -> None:
    loaded = python(LEAN).split()
    unwanted = {"kopf", "requests", "requests_oauthlib", "oauthlib", "typer", "rich", "numpy", "grpc_tools"}
    assert unwanted.isdisjoint(loaded)
    assert {"aiohttp", "kubernetes", "pynvml"} <= set(loaded)


def test_a_package_that_cannot_be_entered_so_is_loaded_as_usual() -> None:
    assert python(BROKEN).strip() == "kubernetes.client"


# --- the process's own parts


class Beats:
    """Heartbeats that end as told, and when they were tried."""

    def __init__(self, *outcomes: object) -> None:
        self.outcomes = list(outcomes)
        self.at: list[float] = []

    def __call__(self, *_args: object, **_options: object) -> "Beats":
        return self

    async def beat(self) -> bool:
        self.at.append(asyncio.get_running_loop().time())
        outcome = self.outcomes.pop(0) if self.outcomes else True
        if isinstance(outcome, BaseException):
            raise outcome
        return bool(outcome)


def beating(monkeypatch, beats: Beats, late: dict[str, float], seconds: float) -> list[float]:
    async def tell() -> list[float]:
        monkeypatch.setattr(main, "Heartbeat", beats)
        agent = SimpleNamespace(progress=SimpleNamespace(late=lambda: late))
        task = asyncio.create_task(main._beat(None, agent, AgentOptions(node="n", heartbeat_seconds=5)))
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(seconds)
        task.cancel()
        return [at - began for at in beats.at]

    return run(tell())


def test_a_beat_that_failed_is_made_again_soon_and_not_a_whole_period_later(monkeypatch) -> None:
    at = beating(monkeypatch, Beats(True, TimeoutError(), False, True), {}, 12)
    assert at[1] == pytest.approx(5)
    assert at[3] - at[1] < 1
    assert at[4] - at[3] == pytest.approx(5)


def test_an_agent_that_does_not_get_round_does_not_beat(monkeypatch) -> None:
    assert beating(monkeypatch, Beats(), {"obey": 40.0}, 30) == []


def test_a_sheet_that_cannot_be_read_counts_as_absent() -> None:
    sheets = LiveSheets(None, None)
    sheets._book.take(None, sheet(1, 500))
    assert set(sheets.sheets) == {"d"}
    cache = SimpleNamespace(undecodable={("", "d"): "spec.caps: no array"})
    sheets._watches["t"] = SimpleNamespace(cache=cache)
    assert set(sheets.sheets) == set()


async def test_liveness_means_progress_and_names_the_part_that_makes_none(tmp_path) -> None:
    late: dict[str, float] = {}
    agent = SimpleNamespace(
        progress=SimpleNamespace(late=lambda: late), state=SimpleNamespace(decision=None, node=None)
    )
    ports = tmp_path / "ports"
    options = AgentOptions(node="n", address="127.0.0.1", gate_port=0, metrics_port=0, ports_file=str(ports))
    await main._serve(agent, options, lambda: True)
    port = json.loads(await asyncio.to_thread(ports.read_text))["metrics"]

    async def healthz() -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /healthz HTTP/1.1\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return answer

    assert (await healthz()).startswith(b"HTTP/1.1 200")
    late["obey"] = 31.4
    answer = await healthz()
    assert answer.startswith(b"HTTP/1.1 503")
    assert b"obey: nothing for 31 s" in answer
