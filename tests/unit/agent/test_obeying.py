"""What an agent does with its sheets, in virtual time: obey, acknowledge, fall back, come back, survive faults."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.unit.agent.hollow import CHAT, DEFAULT, IDLE, LOWEST, Node
from tests.unit.agent.virtual import run

from tokenfactory.agent.nvml import FailureKind, Recovery, Wear, Xid
from tokenfactory.agent.startgate import StartGate


def story(tell: Callable[[Node], Awaitable[None]], gpus: int = 8) -> None:
    async def whole() -> None:
        node = Node(gpus)
        try:
            await tell(node)
        finally:
            await node.stop()

    run(whole())


def applied(node: Node) -> dict[str, int]:
    return {it.domain: it.epoch for it in node.api.status.applied}


def test_each_gpu_gets_the_lowest_sheet_of_its_class_and_that_is_acknowledged() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0, 1, 2, 3),))
        await node.settle()
        await node.until(lambda: node.limits() == [600_000] * 4 + [250_000] * 4)
        await node.until(lambda: applied(node) == {"site": 1, "rack": 1})
        assert [gpu.class_name for gpu in node.api.status.gpus] == [CHAT] * 4 + [IDLE] * 4
        assert node.api.status.gpus[0].pod == "inference/a"
        assert node.api.status.enforced_milliwatts == 4 * 600_000 + 4 * 250_000
        assert node.api.status.observed_generation == 1

    story(tell)


def test_a_cut_is_set_on_all_gpus_at_once_and_acknowledged_without_a_wait() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        node.api.publish("rack", 2, {CHAT: (300_000, 200_000), IDLE: (200_000, 200_000)})
        took = await node.until(lambda: applied(node)["rack"] == 2)
        assert node.limits() == [300_000] * 8
        assert took < 0.015 + 0.002 + 0.005  # one NVML call and one write, with nothing slept between

    story(tell)


def test_a_reading_begun_before_a_cut_does_not_overrule_what_was_read_back_after_it() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        node.nvml.read_seconds = 1.0
        await node.settle(hold=600_000)
        before = len(node.nvml.sets)
        for epoch in range(2, 12):
            node.api.publish("rack", epoch, {CHAT: (600_000 - epoch * 10_000, 200_000)})
            await asyncio.sleep(1.3)
        assert node.agent.enforcer.resets_found == 0
        assert len(node.nvml.sets) - before == 8 * 10
        assert applied(node)["rack"] == 11

    story(tell)


def test_before_the_sheets_were_listed_nothing_is_taken_for_their_absence() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        await node.kill()
        stored, node.api.stored = node.api.stored, {}
        node.api.synced = False
        node.start()
        await asyncio.sleep(20)
        assert node.limits() == [600_000] * 8
        for sheet in stored.values():
            node.api._store(sheet)
        node.api.synced = True
        node.api.renew()
        await asyncio.sleep(1)
        assert node.limits() == [600_000] * 8
        assert applied(node) == {"site": 1, "rack": 1}

    story(tell)


def test_an_older_sheet_is_not_obeyed() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        node.api.publish("rack", 5, {CHAT: (300_000, 200_000)})
        await node.until(lambda: node.limits() == [300_000] * 8)
        node.api.publish("rack", 4, {CHAT: (700_000, 700_000)})
        await asyncio.sleep(20)
        assert max(node.limits()) <= 300_000

    story(tell)


def test_without_renewals_the_fallback_comes_when_hold_ends_and_leaves_with_the_next() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        last = asyncio.get_running_loop().time()
        node.api.renew()
        await asyncio.sleep(0.1)
        node.api.partition()
        await node.until(lambda: node.limits() == [300_000] * 8, within=70)
        assert asyncio.get_running_loop().time() - last == pytest.approx(60, abs=0.1)
        assert node.agent.state.decision is not None
        assert node.agent.state.decision.mode == "Fallback"
        node.api.heal()
        node.api.renew()
        await node.until(lambda: node.limits() == [600_000] * 8)
        await node.until(lambda: node.api.status.mode == "Obeying")

    story(tell)


def test_a_gpu_held_by_a_stranger_is_left_alone_and_one_held_by_nobody_idles() -> None:
    async def tell(node: Node) -> None:
        node.use("stranger", 0)
        await node.settle()
        await node.until(lambda: node.limits()[1:] == [250_000] * 7)
        assert node.limits()[0] == DEFAULT
        assert node.api.status.gpus[0].class_name.startswith("unmanaged@")
        assert node.api.status.gpus[0].pod_uid == ""

    story(tell)


def test_a_kubelet_that_answers_late_costs_a_gpu_in_use_nothing_and_one_that_never_does_lowers_all() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        node.kubelet.silent = True
        node.api.publish("site", 1, {CHAT: (600_000, 600_000), IDLE: (250_000, 250_000)})
        node.api.publish("rack", 1, {CHAT: (600_000, 600_000), IDLE: (250_000, 250_000)})
        node.api.renew()
        node.start()
        await asyncio.sleep(10)
        assert node.limits() == [DEFAULT] * 8
        assert not node.api.status.capped
        await node.until(lambda: node.limits() == [250_000] * 8)
        node.kubelet.silent = False
        node.api.renew()
        await node.until(lambda: node.limits()[0] == 600_000)

    story(tell)


def test_a_pod_that_holds_more_than_was_charged_may_not_start() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0, 1, granted=1),))
        await node.settle()
        answer = await StartGate(node.agent).ask("uid-a")
        assert (answer.may_start, answer.final, answer.reason) == (False, True, "MoreThanGranted")

    story(tell)


def test_the_gate_opens_only_when_the_pods_caps_were_read_back() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        gate = StartGate(node.agent)
        assert (await gate.ask("uid-a")).reason == "NotGranted"
        node.nvml.gpus["GPU-1"].failure = FailureKind.NO_PERMISSION
        await node.until(lambda: node.api.status.gpu_count == 7)
        node.api.grant(pods=(node.use("a", 0, 1),))
        await asyncio.sleep(1)
        answer = await gate.ask("uid-a")
        assert (answer.may_start, answer.final) == (False, False)
        assert "no permission" in answer.message
        node.nvml.gpus["GPU-1"].failure = None
        await asyncio.sleep(15)
        answer = await gate.ask("uid-a")
        assert answer.may_start, answer
        assert node.limits()[:2] == [600_000] * 2
        assert answer.gpus == ("GPU-0", "GPU-1")

    story(tell)


def test_the_gate_reads_limits_anew_so_that_no_model_starts_on_one_that_was_just_reset() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        await node.settle()
        gate = StartGate(node.agent)
        assert (await gate.ask("uid-a")).may_start
        node.nvml.gpus["GPU-0"].limit = DEFAULT
        assert (await gate.ask("uid-a")).may_start
        assert node.limits()[0] == 600_000

    story(tell)


def test_asking_the_gate_asks_the_kubelet_and_does_not_wait_for_its_turn() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        await node.until(lambda: not node.agent._wake.is_set())
        node.api.grant(pods=(node.use("a", 0),))
        await asyncio.sleep(0)
        begin = asyncio.get_running_loop().time()
        assert (await StartGate(node.agent).ask("uid-a")).may_start
        assert asyncio.get_running_loop().time() - begin < 0.1

    story(tell)


def test_a_released_pod_may_not_start_again() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0, released=True),))
        await node.settle()
        answer = await StartGate(node.agent).ask("uid-a")
        assert (answer.may_start, answer.final) == (False, True)

    story(tell)


def test_a_silent_kubelet_keeps_what_was_known_and_the_gate_shut() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        await node.settle()
        node.kubelet.silent = True
        answer = await StartGate(node.agent).ask("uid-a")
        assert answer.reason == "KubeletSilent"
        await asyncio.sleep(30)
        assert node.limits()[0] == 600_000
        condition = next(it for it in node.api.status.conditions if it.type == "PodsKnown")
        assert (condition.status, condition.reason) == ("False", "KubeletSilent")

    story(tell)


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


def test_a_restart_without_an_api_server_keeps_the_caps_and_never_raises_them() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        node.api.publish("rack", 2, {CHAT: (400_000, 200_000)})
        await node.until(lambda: node.limits() == [400_000] * 8)
        await node.kill()
        node.api.partition()
        node.start()
        for _ in range(100):
            await asyncio.sleep(1)
            assert max(node.limits()) <= 400_000
        await node.kill()
        node.api.heal()

    story(tell)


@pytest.mark.parametrize("milliseconds", [0, 1, 5, 14, 15, 16, 17, 18, 20, 40])
def test_killed_at_any_moment_of_a_cut_the_next_agent_ends_in_the_same_place(milliseconds: int) -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        highest = max(node.limits())
        node.api.publish("rack", 2, {CHAT: (300_000, 200_000), IDLE: (200_000, 200_000)})
        await asyncio.sleep(milliseconds / 1000)
        await node.kill()
        node.start()
        node.api.renew()
        await node.until(lambda: node.limits() == [300_000] * 8)
        await node.until(lambda: applied(node)["rack"] == 2)
        assert max(node.limits()) <= highest

    story(tell)


def test_a_restart_says_nothing_worse_than_what_is_true() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", *range(8)),))
        await node.settle()
        await node.kill()
        node.api.writes.clear()
        node.start()
        await asyncio.sleep(1)
        node.api.renew()
        await asyncio.sleep(1)
        assert all(status.capped and status.mode != "Degraded" for _, status in node.api.writes)
        assert all({it.epoch for it in status.applied} == {1} for _, status in node.api.writes)
        assert node.limits() == [600_000] * 8

    story(tell)


def test_after_a_reboot_nothing_starts_before_it_is_capped_anew() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        await node.settle()
        await node.kill()
        node.nvml.reboot("boot-2")
        for gpu in node.nvml.gpus.values():
            gpu.failure = FailureKind.NO_PERMISSION
        node.start()
        await node.until(lambda: node.api.status.boot_id == "boot-2")
        assert not node.api.status.capped
        assert (await StartGate(node.agent).ask("uid-a")).reason == "NodeNotCapped"
        for gpu in node.nvml.gpus.values():
            gpu.failure = None
        node.api.renew()
        await asyncio.sleep(1)
        node.api.renew()
        await node.until(lambda: node.api.status.capped)
        assert node.limits() == [600_000] + [250_000] * 7
        assert (await StartGate(node.agent).ask("uid-a")).may_start

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


def test_a_settled_node_writes_twice_a_minute_and_sets_nothing() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0, url="http://pod"),))
        await node.settle(hold=600_000)
        await asyncio.sleep(60)
        writes, sets, steps = len(node.api.writes), len(node.nvml.sets), node.agent.state.steps
        for _ in range(60):
            node.api.renew()
            await asyncio.sleep(10)
        assert len(node.api.writes) - writes <= 600 / 30 + 1
        assert len(node.nvml.sets) == sets
        assert node.agent.state.steps - steps < 600
        meter = node.api.status.meters[0]
        assert meter.generated_tokens > 30_000
        assert meter.millijoules > 0

    story(tell)


def test_a_failing_report_is_made_again_with_what_is_true_then() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        node.api.cut = True
        node.nvml.gpus["GPU-0"].limit = 210_000
        await asyncio.sleep(20)
        assert node.agent.reporter.failures > 3
        node.nvml.gpus["GPU-0"].limit = 220_000
        node.api.cut = False
        await node.until(lambda: node.api.status.gpus[0].enforced_milliwatts == 220_000)

    story(tell)


def test_an_ordered_end_leaves_the_caps() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        await node.stop()
        assert node.limits() == [250_000] * 8

    story(tell)


def test_a_class_that_no_sheet_lists_gets_the_minimum() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        await node.settle()
        node.api.publish("rack", 2, {IDLE: (250_000, 250_000)})
        await node.until(lambda: node.limits()[0] == LOWEST)

    story(tell)


@pytest.mark.slow
def test_a_simulated_day_of_sheets_ends_where_the_last_sheet_says_without_drift_or_leak() -> None:
    async def tell(node: Node) -> None:
        import gc
        import random

        draw = random.Random(5)
        node.api.grant(pods=(node.use("a", *range(8), url="http://pod"),))
        await node.settle()
        loop = asyncio.get_running_loop()
        begin, epoch, sizes = loop.time(), 1, []
        while loop.time() - begin < 86_400:
            epoch += 1
            cap = draw.randrange(LOWEST, DEFAULT, 1000)
            node.api.publish("rack", epoch, {CHAT: (cap, LOWEST), IDLE: (LOWEST, LOWEST)})
            node.api.renew()
            await node.until(lambda: applied(node)["rack"] == epoch)  # noqa: B023
            assert node.limits() == [min(cap, 600_000)] * 8
            await asyncio.sleep(draw.uniform(10, 50))
            if epoch % 500 == 0:
                node.api.writes.clear()
                node.nvml.sets.clear()
                gc.collect()
                sizes.append((len(gc.get_objects()), len(asyncio.all_tasks())))
        seconds = loop.time() - begin
        meter = node.agent.meter.accounts["uid-a"]
        assert meter.millijoules == pytest.approx(seconds * 8 * 400_000, rel=0.01)
        assert sizes[-1][0] < sizes[1][0] + 2_000
        assert sizes[-1][1] == sizes[1][1]

    story(tell)
