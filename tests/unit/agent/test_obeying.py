"""What an agent does with its sheets, in virtual time: obey, acknowledge, fall back, come back."""

import asyncio

import pytest
from tests.unit.agent.hollow import CHAT, DEFAULT, IDLE, LOWEST, Node
from tests.unit.agent.stories import applied, story


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
