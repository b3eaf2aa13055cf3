"""GPUs, drivers and BMCs that fail under an agent, in virtual time: it loses no cap and claims none."""

import asyncio

from tests.unit.agent.hollow import CHAT, DEFAULT, IDLE, Node
from tests.unit.agent.stories import applied, story

from tokenfactory.agent.nvml import FailureKind, Recovery, Wear, Xid
from tokenfactory.agent.startgate import StartGate
from tokenfactory.agent.state import PEAK_SECONDS


def test_a_limit_that_was_reset_is_set_again_at_once() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        node.nvml.gpus["GPU-3"].limit = DEFAULT
        took = await node.until(lambda: node.limits()[3] == 250_000)
        assert took <= node.pace.observe + 0.1
        assert node.agent.enforcer.resets_found == 1

    story(tell)


def test_a_bmc_that_lowers_a_limit_is_reported_and_left_alone() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        before = len(node.nvml.sets)
        node.nvml.gpus["GPU-3"].limit = 220_000
        await node.until(lambda: node.api.status.gpus[3].enforced_milliwatts == 220_000)
        assert len(node.nvml.sets) == before
        assert applied(node) == {"site": 1, "rack": 1}

    story(tell)


def test_a_limit_that_did_not_take_is_never_acknowledged_and_is_told() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        node.nvml.gpus["GPU-5"].stubborn = True
        node.api.publish("rack", 2, {CHAT: (300_000, 200_000)})
        await node.until(lambda: node.limits().count(300_000) == 7)
        await asyncio.sleep(60)
        assert applied(node)["rack"] == 1
        assert node.api.status.gpus[5].enforced_milliwatts == 600_000
        condition = next(it for it in node.api.status.conditions if it.type == "Capped")
        assert (condition.status, condition.reason) == ("False", "LimitDoesNotHold")
        node.nvml.gpus["GPU-5"].stubborn = False
        await node.until(lambda: applied(node)["rack"] == 2)

    story(tell)


def test_a_gpu_that_does_not_tell_its_draw_counts_at_all_that_it_may_draw() -> None:
    """Charges may exceed a limit by what is measured: nothing that is not measured may pass for nothing."""

    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        await node.until(lambda: node.api.status.draw_milliwatts == 8 * 400_000, within=60)
        node.nvml.gpus["GPU-2"].failure = FailureKind.UNKNOWN
        await node.until(lambda: node.api.status.draw_milliwatts == 7 * 400_000 + DEFAULT, within=60)

    story(tell)


def test_a_draw_between_two_reports_is_told_with_the_next_two_and_then_forgotten() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        await node.until(lambda: node.api.status.draw_milliwatts == 8 * 400_000, within=60)
        loop = asyncio.get_running_loop()
        for gpu in ("GPU-1", "GPU-2"):  # one after the other: together they never draw as much as both peaks
            node.nvml.gpus[gpu].draw = lambda _: 590_000
            await asyncio.sleep(node.pace.observe + 0.1)
            node.nvml.gpus[gpu].draw = lambda _: 400_000
        over = loop.time()
        await node.until(lambda: node.api.status.peak_milliwatts == 7 * 400_000 + 590_000, within=31)
        assert node.api.status.draw_milliwatts == 8 * 400_000
        reports = node.agent.reporter.writes
        await node.until(lambda: node.api.status.peak_milliwatts == 8 * 400_000, within=100)
        assert node.agent.reporter.writes - reports >= 2
        assert loop.time() - over >= PEAK_SECONDS - node.pace.observe

    story(tell)


def test_a_call_that_hangs_holds_up_only_its_own_gpu() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        back = node.nvml.gpus["GPU-0"].hang = asyncio.Event()
        node.api.publish("rack", 2, {CHAT: (500_000, 200_000)})
        await asyncio.sleep(0.05)
        node.api.publish("rack", 3, {CHAT: (300_000, 200_000)})
        took = await node.until(lambda: node.limits()[1:] == [300_000] * 7)
        assert took < 0.05
        await asyncio.sleep(30)
        assert applied(node)["rack"] == 1
        assert node.api.status.mode == "Degraded"
        assert not node.api.status.gpus[0].healthy
        assert node.api.status.gpus[0].enforced_milliwatts == DEFAULT  # unknown: as much as it can be
        back.set()
        await node.until(lambda: applied(node)["rack"] == 3, within=15)
        assert node.limits() == [300_000] * 8

    story(tell)


def test_a_lost_gpu_costs_the_others_nothing() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        node.nvml.gpus["GPU-2"].failure = FailureKind.LOST
        await node.until(lambda: node.api.status.gpu_count == 7)
        assert not node.api.status.gpus[2].healthy
        node.api.publish("rack", 2, {IDLE: (210_000, 200_000)})
        await node.until(lambda: [v for n, v in enumerate(node.limits()) if n != 2] == [210_000] * 7)
        assert applied(node)["rack"] == 1

    story(tell)


def test_a_gpu_that_told_nothing_at_the_start_is_capped_once_it_does() -> None:
    async def tell(node: Node) -> None:
        node.nvml.gpus["GPU-2"].failure = FailureKind.UNKNOWN
        node.api.grant()
        node.api.publish("site", 1, {IDLE: (250_000, 250_000)})
        node.api.publish("rack", 1, {IDLE: (250_000, 250_000)})
        node.api.renew()
        node.start()
        await asyncio.sleep(20)
        node.api.renew()
        assert node.limits().count(250_000) == 7
        assert not node.api.status.capped
        assert node.api.status.applied == ()
        node.nvml.gpus["GPU-2"].failure = None
        await node.until(lambda: node.api.status.capped)
        assert node.limits() == [250_000] * 8

    story(tell)


def test_a_gpu_that_vanishes_is_never_acknowledged_without() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        node.nvml.gone = True
        await node.until(lambda: node.api.status.mode == "Degraded")
        gone = node.nvml.gpus.pop("GPU-7")
        node.nvml.reload()
        await node.until(lambda: node.limits() == [250_000] * 7)
        node.api.publish("rack", 2, {IDLE: (210_000, 200_000)})
        await node.until(lambda: node.limits() == [210_000] * 7)
        await asyncio.sleep(30)
        assert applied(node)["rack"] == 1
        assert node.api.status.gpus[7].enforced_milliwatts == DEFAULT
        node.nvml.gpus["GPU-7"] = gone

    story(tell)


def test_a_driver_that_goes_and_comes_back_with_default_limits_is_capped_again() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        node.nvml.gone = True
        await node.until(lambda: node.api.status.mode == "Degraded")
        node.nvml.reload()
        await node.until(lambda: node.limits() == [250_000] * 8)
        await node.until(lambda: node.api.status.mode == "Obeying" and node.api.status.capped)

    story(tell)


def test_while_the_driver_is_gone_from_the_start_what_was_left_is_not_wiped() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        await node.kill()
        before = applied(node)
        node.nvml.gone = True
        node.start()
        await node.until(lambda: node.api.status.mode == "Degraded")
        assert applied(node) == before
        assert not node.api.status.capped
        assert len(node.api.status.gpus) == 8

    story(tell)


def test_a_gpu_that_draws_more_than_its_cap_gets_a_lower_one_and_that_is_told() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle(hold=86_400_000)
        node.nvml.gpus["GPU-4"].draw = lambda gpu: 690_000 if gpu.limit > 520_000 else gpu.limit
        await node.until(lambda: node.limits()[4] <= 510_000)
        assert node.limits()[:4] == [600_000] * 4
        await node.until(lambda: any("withheld" in fault for fault in node.api.status.gpus[4].faults))
        node.nvml.gpus["GPU-4"].draw = lambda gpu: 300_000
        assert await node.until(lambda: node.limits()[4] == 600_000, within=1_500) > 1_000
        await node.until(lambda: node.api.status.gpus[4].faults == ())

    story(tell)


def test_xids_and_wear_are_told_and_the_facilitys_brake_is_not_the_nodes_fault() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        node.nvml.queue.put_nowait(Xid("GPU-1", 79))
        await node.until(lambda: any("79" in fault for fault in node.api.status.gpus[1].faults))
        node.nvml.wears["GPU-6"] = Wear(recovery=Recovery.GPU_RESET)
        await node.until(lambda: not node.api.status.gpus[6].healthy, within=70)
        assert node.agent.state.faults.lemon_score(0) > 0

    story(tell)


def capped_reason(node: Node) -> str:
    return next(it.reason for it in node.api.status.conditions if it.type == "Capped")


def test_a_gpu_that_nvml_counts_and_does_not_hand_out_keeps_the_node_from_being_capped() -> None:
    """It may be drawing at its default limit: without it, not every limit was read back."""

    async def tell(node: Node) -> None:
        node.nvml.gpus["GPU-3"].hidden = FailureKind.TIMEOUT
        node.api.grant(pods=(node.use("a", 0, 1),))
        node.api.publish("site", 1, {CHAT: (600_000, 300_000), IDLE: (250_000, 250_000)}, 86_400_000)
        node.api.publish("rack", 1, {CHAT: (650_000, 350_000), IDLE: (250_000, 250_000)}, 86_400_000)
        node.api.renew()
        node.start()
        await node.until(lambda: len(node.api.status.gpus) == 7)
        node.api.renew()
        await node.until(lambda: node.api.status.mode == "Obeying")
        await asyncio.sleep(60)
        assert not node.api.status.capped
        assert not applied(node)
        assert capped_reason(node) == "GPUsMissing"
        assert (await StartGate(node.agent).ask("uid-a")).reason == "NodeNotCapped"
        node.nvml.gpus["GPU-3"].hidden = None
        await node.until(lambda: node.api.status.capped and len(node.api.status.gpus) == 8)
        assert node.limits() == [600_000] * 2 + [250_000] * 6
        assert (await StartGate(node.agent).ask("uid-a")).may_start

    story(tell)


def test_a_gpu_that_fell_off_the_bus_before_the_start_does_not_hold_up_the_others() -> None:
    async def tell(node: Node) -> None:
        node.nvml.gpus["GPU-3"].hidden = FailureKind.LOST
        await node.settle()
        assert len(node.api.status.gpus) == 7
        assert [it.status for it in node.api.status.conditions if it.type == "Healthy"] == ["False"]

    story(tell)


def test_a_gpu_that_is_gone_when_the_agent_restarts_stays_in_the_status_until_the_next_boot() -> None:
    """A model may be at work on it, at the limit that it had."""

    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle(hold=86_400_000)
        await node.kill()
        node.nvml.gpus["GPU-3"].hidden = FailureKind.LOST
        node.start()
        node.api.renew()
        await node.until(lambda: len([gpu for gpu in node.api.status.gpus if not gpu.healthy]) == 1)
        gone = next(gpu for gpu in node.api.status.gpus if not gpu.healthy)
        assert (gone.uuid, gone.enforced_milliwatts, gone.pod) == ("GPU-3", 600_000, "inference/a")
        assert node.api.status.enforced_milliwatts == 8 * 600_000
        assert node.api.status.gpu_count == 7
        await node.kill()
        node.nvml.reboot("boot-2")
        node.start()
        await node.until(lambda: node.api.status.boot_id == "boot-2")
        assert len(node.api.status.gpus) == 7

    story(tell)
