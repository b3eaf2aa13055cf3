"""Clocks and workload profiles: set where a pod's grant asks, taken back when it goes, and never in a limit's way."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.unit.agent.hollow import Node
from tests.unit.agent.virtual import run

from tokenfactory.agent.metrics import render
from tokenfactory.agent.nvml import ClockRange, Failure, FailureKind
from tokenfactory.agent.tune import PROFILES
from tokenfactory.api import actuators as api

BOTH = api.Actuators(locked_clocks=api.ClockRange(max_mhz=1_410), workload_power_profile="MaxQ")
CLOCKS = api.Actuators(locked_clocks=api.ClockRange(min_mhz=300, max_mhz=1_200))


def story(tell: Callable[[Node], Awaitable[None]]) -> None:
    async def whole() -> None:
        node = Node()
        try:
            await tell(node)
        finally:
            await node.stop()

    run(whole())


def state(node: Node) -> list[tuple[ClockRange | None, frozenset[int]]]:
    return [(gpu.clocks, gpu.profiles) for gpu in node.nvml.gpus.values()]


FREE = (None, frozenset())
TUNED = (ClockRange(0, 1_410), frozenset({PROFILES["MaxQ"]}))


def condition(node: Node) -> tuple[str, str, str] | None:
    found = [it for it in node.api.status.conditions if it.type == "Tuned"]
    return (found[0].status, found[0].reason, found[0].message) if found else None


async def begin(node: Node, actuators: api.Actuators | None = BOTH, **more: object) -> None:
    node.api.grant(pods=(node.use("a", 0, 1, actuators=actuators, **more),))
    await node.settle(hold=86_400_000)


def test_the_gpus_of_a_pod_are_tuned_as_its_grant_says_and_no_other() -> None:
    async def tell(node: Node) -> None:
        await begin(node)
        await node.until(lambda: state(node) == [TUNED] * 2 + [FREE] * 6)
        await node.until(lambda: condition(node) == ("True", "AsAsked", ""))
        assert [gpu.actuators for gpu in node.api.status.gpus] == [BOTH] * 2 + [None] * 6
        assert {gpu for gpu, _ in node.nvml.tunings} == {"GPU-0", "GPU-1"}
        asked = len(node.nvml.tunings)
        await asyncio.sleep(120)
        assert len(node.nvml.tunings) == asked, "what is as asked is not asked again"

    story(tell)


@pytest.mark.parametrize("end", ["the pod ends", "it asks no more", "a stranger takes over"])
def test_what_was_set_is_taken_back(end: str) -> None:
    async def tell(node: Node) -> None:
        await begin(node)
        await node.until(lambda: state(node)[:2] == [TUNED] * 2)
        if end == "it asks no more":
            node.api.grant(pods=(node.use("a", 0, 1),))
        else:
            node.kubelet.pods = ()
        if end == "a stranger takes over":
            node.use("stranger", 0, 1)
        await node.until(lambda: state(node) == [FREE] * 8)
        await node.until(lambda: condition(node) is None)
        assert all(gpu.actuators is None for gpu in node.api.status.gpus)

    story(tell)


def test_another_wish_takes_the_place_of_the_one_before() -> None:
    async def tell(node: Node) -> None:
        await begin(node)
        await node.until(lambda: state(node)[:2] == [TUNED] * 2)
        node.api.grant(pods=(node.use("a", 0, 1, actuators=CLOCKS),))
        await node.until(lambda: state(node)[:2] == [(ClockRange(300, 1_200), frozenset())] * 2)

    story(tell)


def test_an_agent_that_is_killed_is_followed_by_one_that_undoes_what_it_did() -> None:
    async def tell(node: Node) -> None:
        await begin(node)
        await node.until(lambda: [gpu.actuators for gpu in node.api.status.gpus][:2] == [BOTH] * 2)
        await node.kill()
        node.kubelet.pods = ()
        node.start()
        await node.until(lambda: state(node) == [FREE] * 8)
        await node.until(lambda: all(gpu.actuators is None for gpu in node.api.status.gpus))
        assert {gpu for gpu, _ in node.nvml.tunings} == {"GPU-0", "GPU-1"}

    story(tell)


def test_an_agent_that_is_killed_is_followed_by_one_that_sets_nothing_anew() -> None:
    async def tell(node: Node) -> None:
        await begin(node)
        await node.until(lambda: [gpu.actuators for gpu in node.api.status.gpus][:2] == [BOTH] * 2)
        asked = len(node.nvml.tunings)
        await node.kill()
        node.start()
        node.api.renew()
        await node.until(lambda: node.agent.state.looked_at == set(node.nvml.gpus))
        await asyncio.sleep(60)
        assert len(node.nvml.tunings) == asked
        assert [gpu.actuators for gpu in node.api.status.gpus] == [BOTH] * 2 + [None] * 6

    story(tell)


def test_a_driver_that_was_loaded_anew_is_tuned_anew() -> None:
    async def tell(node: Node) -> None:
        await begin(node)
        await node.until(lambda: state(node)[:2] == [TUNED] * 2)
        node.nvml.gone = True
        await node.until(lambda: node.agent.state.open_failure is not None)
        node.nvml.reload()
        await node.until(lambda: state(node) == [TUNED] * 2 + [FREE] * 6)

    story(tell)


@pytest.mark.parametrize("kind", [FailureKind.NO_PERMISSION, FailureKind.NOT_SUPPORTED, FailureKind.UNKNOWN])
def test_what_cannot_be_set_is_told_costs_no_cap_and_is_tried_again_where_that_can_help(
    kind: FailureKind,
) -> None:
    async def tell(node: Node) -> None:
        for gpu in node.nvml.gpus.values():
            gpu.untunable = Failure(kind, "lock_clocks", gpu.uuid)
        await begin(node)
        await node.until(lambda: (condition(node) or ("",))[0] == "False")
        assert kind.value in condition(node)[2]
        assert node.limits() == [600_000] * 2 + [250_000] * 6
        assert all(gpu.healthy for gpu in node.api.status.gpus)
        assert "tokenfactory_agent_untuned_gpus 2.0" in render(node.agent).decode()
        await asyncio.sleep(1_200)
        tries = len(node.nvml.tunings) // 4
        assert tries == 1 if kind is FailureKind.NOT_SUPPORTED else 5 < tries < 20
        for gpu in node.nvml.gpus.values():
            gpu.untunable = None
        if kind is not FailureKind.NOT_SUPPORTED:
            await node.until(lambda: condition(node) == ("True", "AsAsked", ""), within=400)
        node.kubelet.pods = ()
        await node.until(lambda: condition(node) is None)
        assert state(node) == [FREE] * 8

    story(tell)


def test_a_profile_that_the_gpu_does_not_offer_does_not_cost_its_clocks() -> None:
    async def tell(node: Node) -> None:
        node.nvml.offered = frozenset()
        await begin(node)
        await node.until(lambda: (condition(node) or ("",))[0] == "False")
        assert "offers no MaxQ" in condition(node)[2]
        assert state(node)[:2] == [(ClockRange(0, 1_410), frozenset())] * 2
        node.kubelet.pods = ()
        await node.until(lambda: state(node) == [FREE] * 8)

    story(tell)


def test_a_clear_that_silently_does_nothing_is_seen_and_tried_again() -> None:
    async def tell(node: Node) -> None:
        await begin(node)
        await node.until(lambda: state(node)[:2] == [TUNED] * 2)
        node.nvml.gpus["GPU-1"].clings = True
        node.kubelet.pods = ()
        await node.until(lambda: (condition(node) or ("",))[0] == "False")
        assert "read back" in condition(node)[2]
        assert [gpu.actuators for gpu in node.api.status.gpus][:2] == [None, BOTH]
        node.nvml.gpus["GPU-1"].clings = False
        await node.until(lambda: condition(node) is None, within=400)
        assert state(node) == [FREE] * 8

    story(tell)


def test_a_clock_above_its_lock_is_seen_and_locked_again() -> None:
    async def tell(node: Node) -> None:
        node.nvml.gpus["GPU-0"].sm_mhz = 1_980
        await begin(node)
        await node.until(lambda: state(node)[:2] == [TUNED] * 2)
        await asyncio.sleep(30)
        assert condition(node) == ("True", "AsAsked", "")
        node.nvml.gpus["GPU-0"].clocks = None  # somebody's `nvidia-smi -rgc`
        await node.until(lambda: (condition(node) or ("",))[0] == "False")
        assert "1980 MHz seen" in condition(node)[2]
        assert state(node)[0] == TUNED
        await node.until(lambda: condition(node) == ("True", "AsAsked", ""))

    story(tell)


def test_profiles_have_nvmls_numbers() -> None:
    import pynvml

    names = {
        "LLMInference": "LLM_INFERENCE",
        "LLMTraining": "LLM_TRAINING",
        "MaxP": "MAX_P",
        "MaxQ": "MAX_Q",
        "MemoryBound": "MEMORY_BOUND",
    }
    for name, number in PROFILES.items():
        assert getattr(pynvml, f"NVML_POWER_PROFILE_{names.get(name, name.upper())}") == number
