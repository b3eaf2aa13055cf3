"""Further actuators over the C library: what a grant asks is what the GPU then has, and a limit never waits for it."""

import pytest

from tokenfactory.agent.faults import Faults
from tokenfactory.agent.holders import holdings
from tokenfactory.agent.nvml import ClockRange, FailureKind
from tokenfactory.agent.parts import PodDevices, SystemClock
from tokenfactory.agent.state import AgentState
from tokenfactory.agent.tune import PROFILES, Tuner
from tokenfactory.api import actuators as api
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec, PodGrant
from tokenfactory.planning.power.governor import Decision

BOTH = api.Actuators(
    locked_clocks=api.ClockRange(min_mhz=600, max_mhz=1_200), workload_power_profile="LLMInference"
)


class Node:
    """GPU 0 is held by a pod that asks for `BOTH`; GPU 1 by nobody."""

    def __init__(self, hardware, driver, gpus) -> None:
        self.hardware, self.driver, self.gpus = hardware, driver, gpus
        self.state = AgentState(name="n", faults=Faults(lambda: driver.identity), gpus=gpus)
        self.state.decision = Decision("Obeying", {}, {}, 1, True, {}, None)
        self.tuner = Tuner(self.state, driver, SystemClock(), lambda: None)

    async def hold(self, *held: str) -> None:
        grant = PodGrant(namespace="ns", name="p", uid="u", class_name="c", gpus=1, actuators=BOTH)
        self.state.node = GPUNode(spec=GPUNodeSpec(pods=(grant,)))
        pods = (PodDevices("ns", "p", held),) if held else ()
        self.state.holdings = holdings((gpu.uuid for gpu in self.gpus), pods, self.state.node.spec)
        await self.tuner.round()

    def truth(self, index: int) -> tuple[int, int, int]:
        gpu = self.hardware.gpus[index]
        return gpu.get("locked_min_mhz"), gpu.get("locked_max_mhz"), gpu.get("profiles_requested")[0]

    @property
    def failure(self):
        return self.state.untuned.get(self.gpus[0].uuid)


@pytest.fixture
async def make(make_node, open_driver):
    async def made(product: str, **options) -> Node:
        hardware = make_node(product, 2)
        driver = await open_driver(hardware, **options)
        return Node(hardware, driver, await driver.inventory())

    return made


FREE = (0, 0, 0)
SET = (600, 1_200, 1 << PROFILES["LLMInference"])


async def test_what_a_grant_asks_is_set_and_taken_back_at_its_end(make):
    node = await make("B200")
    await node.hold(node.gpus[0].uuid)
    assert [node.truth(0), node.truth(1)] == [SET, FREE]
    assert (await node.driver.read(node.gpus[0].uuid)).sm_mhz <= 1_200
    await node.hold()
    assert [node.truth(0), node.truth(1)] == [FREE, FREE]
    assert node.state.tuned == node.state.untuned == {}


async def test_hopper_takes_the_clocks_and_says_that_it_has_no_such_profile(make):
    node = await make("H100")
    await node.hold(node.gpus[0].uuid)
    assert node.truth(0) == (600, 1_200, 0)
    assert node.failure.kind is FailureKind.NOT_SUPPORTED
    await node.hold()
    assert node.truth(0) == FREE
    assert node.failure is None


async def test_without_permission_nothing_is_set_and_that_is_told(make):
    node = await make("B200")
    node.hardware.allow_writes(False)
    await node.hold(node.gpus[0].uuid)
    assert node.truth(0) == FREE
    assert node.failure.kind is FailureKind.NO_PERMISSION


async def test_a_clear_that_silently_does_nothing_is_told(make):
    node = await make("B200")
    await node.hold(node.gpus[0].uuid)
    node.hardware.gpus[0].set(ignore_profile_clear=1)
    await node.hold()
    assert "[6] read back" in node.failure.text
    assert node.state.tuned[node.gpus[0].uuid].workload_power_profile == "LLMInference"


async def test_an_actuator_that_hangs_keeps_no_limit_out(make):
    node = await make("B200", deadline_seconds=0.1)
    node.hardware.fail("nvmlDeviceSetGpuLockedClocks", hang=True)
    await node.hold(node.gpus[0].uuid)
    assert node.failure.kind is FailureKind.TIMEOUT
    assert node.driver.stuck == frozenset()
    limits = await node.driver.set_limit(node.gpus[0].uuid, 400_000)
    assert limits.enforced_milliwatts == 400_000
    assert await node.driver.lock_clocks(node.gpus[1].uuid, ClockRange(0, 900)) is not None
    assert (await node.driver.read(node.gpus[0].uuid)).enforced_milliwatts == 400_000


async def test_a_lost_gpu_is_a_failure_and_the_other_is_tuned(make):
    node = await make("B200")
    node.hardware.gpus[0].lose()
    await node.hold(*(gpu.uuid for gpu in node.gpus[:1]))
    assert node.failure.kind is FailureKind.LOST
    await node.hold(node.gpus[1].uuid)
    assert node.truth(1) == SET
