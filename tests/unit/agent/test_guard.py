"""Who draws more than was allowed is cut at once, a GPU or a whole node, and gets it back late."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.agent.hollow import CHAT, Node
from tests.unit.agent.virtual import run

from tokenfactory.agent.guard import (
    NODE_SETTLE_SECONDS,
    Measured,
    NodeMeasured,
    Share,
    Watched,
    guarded,
    take_back,
    watch,
    watch_node,
)
from tokenfactory.agent.metrics import render
from tokenfactory.agent.nvml import FailureKind
from tokenfactory.agent.overhead import SAMPLES, SEASONED, with_margin

# --- a GPU

QUIET = Measured(draw_milliwatts=500_000, enforced_milliwatts=600_000, min_milliwatts=200_000, since=0.0)
LOUD = Measured(draw_milliwatts=690_000, enforced_milliwatts=600_000, min_milliwatts=200_000, since=0.0)


def withheld(guard) -> int:
    return guard["g"].withheld_milliwatts


def test_one_reading_above_is_a_transient_and_two_are_not() -> None:
    once = watch({}, {"g": LOUD}, 10)
    assert withheld(once) == 0
    assert withheld(watch(once, {"g": QUIET}, 15)) == 0
    assert withheld(watch(watch(once, {"g": QUIET}, 15), {"g": LOUD}, 20)) == 0
    assert withheld(watch(once, {"g": LOUD}, 15)) == 90_000


def test_a_sensors_error_is_no_overshoot() -> None:
    near = Measured(draw_milliwatts=630_000, enforced_milliwatts=600_000, min_milliwatts=200_000, since=0.0)
    assert withheld(watch(watch({}, {"g": near}, 10), {"g": near}, 15)) == 0


def test_a_limit_just_changed_is_not_judged_yet() -> None:
    fresh = Measured(draw_milliwatts=690_000, enforced_milliwatts=300_000, min_milliwatts=200_000, since=9.0)
    guard = watch(watch({}, {"g": fresh}, 10), {"g": fresh}, 11)
    assert withheld(guard) == 0


def test_the_guard_never_raises_and_stops_at_the_minimum() -> None:
    guard = watch(watch({}, {"g": LOUD}, 10), {"g": LOUD}, 15)
    assert guarded(guard, "g", 600_000) == 510_000
    assert guarded(guard, "other", 600_000) == 600_000
    least = Measured(draw_milliwatts=400_000, enforced_milliwatts=200_000, min_milliwatts=200_000, since=0.0)
    for at in range(20, 100, 5):
        guard = watch(guard, {"g": least}, at)
    assert withheld(guard) == 90_000


def test_a_gpu_that_tells_nothing_gets_nothing_back() -> None:
    guard = watch(watch({}, {"g": LOUD}, 10), {"g": LOUD}, 15)
    assert withheld(watch(guard, {}, 20)) == 90_000


# --- the node

CALM = NodeMeasured(draw_milliwatts=6_900_000, allowed_milliwatts=7_000_000, since=0.0)
OVER = NodeMeasured(draw_milliwatts=7_500_000, allowed_milliwatts=7_000_000, since=0.0)
NEAR = NodeMeasured(draw_milliwatts=7_200_000, allowed_milliwatts=7_000_000, since=0.0)


def test_a_node_is_cut_after_two_readings_in_a_row_and_by_all_that_is_too_much() -> None:
    assert watch_node(0, OVER, 100) == (1, 0)
    assert watch_node(1, CALM, 110) == (0, 0)
    assert watch_node(1, OVER, 110) == (0, 500_000)
    assert watch_node(1, NEAR, 110) == (0, 0)


def test_a_meter_that_lags_behind_a_limit_is_not_judged_yet() -> None:
    fresh = NodeMeasured(OVER.draw_milliwatts, OVER.allowed_milliwatts, since=100.0)
    assert watch_node(1, fresh, 100 + NODE_SETTLE_SECONDS - 1) == (1, 0)


shares = st.dictionaries(
    st.sampled_from([f"GPU-{n}" for n in range(8)]),
    st.builds(Share, st.integers(200_000, 700_000), st.integers(50_000, 720_000), st.just(200_000)),
    min_size=1,
)
held = st.dictionaries(
    st.sampled_from([f"GPU-{n}" for n in range(8)]), st.builds(Watched, st.integers(0, 300_000))
)


@given(shares, held, st.integers(1, 3_000_000))
def test_what_is_taken_back_is_taken_off_what_is_drawn_and_nothing_ever_rises(gpus, guard, excess) -> None:
    after = take_back(guard, gpus, excess, now=50.0)

    def drawn(state) -> dict[str, int]:
        return {
            gpu: max(it.min_milliwatts, min(guarded(state, gpu, it.cap_milliwatts), it.draw_milliwatts))
            for gpu, it in gpus.items()
        }

    before_draw, after_draw = drawn(guard), drawn(after)
    room = sum(before_draw.values()) - 200_000 * len(gpus)
    assert sum(before_draw.values()) - sum(after_draw.values()) >= min(excess, room)
    for gpu in gpus:
        assert guarded(after, gpu, 700_000) <= guarded(guard, gpu, 700_000)
        assert after_draw[gpu] >= 200_000
    assert {gpu: it for gpu, it in after.items() if gpu not in gpus} == {
        gpu: it for gpu, it in guard.items() if gpu not in gpus
    }


# --- an agent with a meter


def story(tell: Callable[[Node], Awaitable[None]], rest: int, charged: int) -> None:
    async def whole() -> None:
        node = Node(rest=rest)
        node.api.grant(pods=(node.use("a", *range(8)),), overhead_milliwatts=charged)
        await node.settle(hold=86_400_000)
        try:
            await tell(node)
        finally:
            await node.stop()

    run(whole())


def condition(node: Node) -> tuple[str, str]:
    return next(
        ((it.status, it.reason) for it in node.api.status.conditions if it.type == "NodePower"), ("", "")
    )


def busy(node: Node) -> None:
    for gpu in node.nvml.gpus.values():
        gpu.draw = lambda it: it.limit


def test_a_node_that_draws_more_than_it_is_charged_is_cut_at_once_and_says_so() -> None:
    async def tell(node: Node) -> None:
        busy(node)
        await node.until(lambda: condition(node) == ("True", "WithinCharge"))
        node.meter.rest = 2_000_000
        await node.until(lambda: sum(node.limits()) <= 8 * 600_000 - 1_000_000, within=40)
        assert min(node.limits()) >= 200_000
        await node.until(lambda: condition(node) == ("False", "AboveCharge"), within=60)
        assert all("the node draws more" in gpu.faults[0] for gpu in node.api.status.gpus)
        assert "tokenfactory_agent_node_power_cuts_total 1.0" in render(node.agent).decode()
        node.meter.rest = 900_000
        assert await node.until(lambda: node.limits() == [600_000] * 8, within=3_000) > 1_000
        await node.until(lambda: condition(node) == ("True", "WithinCharge"))

    story(tell, rest=900_000, charged=1_000_000)


def test_once_it_is_charged_what_it_draws_the_caps_come_back() -> None:
    async def tell(node: Node) -> None:
        busy(node)
        await node.until(lambda: condition(node) == ("False", "AboveCharge"), within=60)
        told = with_margin(2_000_000)
        await node.until(lambda: node.api.status.overhead_milliwatts == told, within=400)
        assert not node.api.status.overhead_proven
        spec = node.api.object.spec
        node.api.grant(path=spec.path, pods=spec.pods, overhead_milliwatts=told)
        await node.until(lambda: node.limits() == [600_000] * 8, within=3_000)
        assert node.agent.state.node_power.cuts == 1

    story(tell, rest=2_000_000, charged=1_000_000)


def test_gpus_that_nobody_may_cap_are_left_alone_and_the_others_give() -> None:
    async def tell(node: Node) -> None:
        busy(node)
        node.use("stranger", 0)
        await node.until(lambda: condition(node)[1] == "WithinCharge")
        await node.until(lambda: node.agent.state.decision.caps["GPU-0"].cap_milliwatts is None)
        left = node.limits()[0]
        await asyncio.sleep(60)
        assert node.agent.state.node_power.cuts == 0, "what it may draw is charged, capped or not"
        node.meter.rest = 2_500_000
        await node.until(lambda: condition(node) == ("False", "AboveCharge"), within=60)
        await node.until(lambda: sum(node.limits()[1:]) < 7 * 450_000)
        assert node.limits()[0] == left

    story(tell, rest=900_000, charged=1_000_000)


@pytest.mark.parametrize("problem", ["silent", "below its GPUs"])
def test_a_meter_that_fails_or_lies_moves_no_cap_and_is_told(problem: str) -> None:
    async def tell(node: Node) -> None:
        await node.until(lambda: condition(node) == ("True", "WithinCharge"))
        sets = len(node.nvml.sets)
        if problem == "silent":
            node.meter.problem = "no answer within 5 s"
        else:
            node.meter.says = 1_000_000
            for number, gpu in enumerate(node.nvml.gpus.values()):
                gpu.draw = lambda it, number=number: 400_000 + (it.limit + node.nvml.reads + number) % 9_000
        await node.until(lambda: condition(node) == ("Unknown", "Unreadable"))
        asked, writes = node.meter.asked, len(node.api.writes)
        await node.until(lambda: node.meter.asked > asked + 60, within=1_000)
        assert len(node.api.writes) - writes <= 30, "a meter's trouble is told once"
        assert len(node.nvml.sets) == sets
        assert node.api.status.overhead_milliwatts == 0
        assert node.agent.state.node_power.failures >= 60
        node.meter.problem, node.meter.says = "", None
        await node.until(lambda: condition(node) == ("True", "WithinCharge"))

    story(tell, rest=900_000, charged=1_000_000)


def test_sheets_that_change_all_the_time_do_not_put_it_off() -> None:
    async def tell(node: Node) -> None:
        busy(node)
        await node.until(lambda: condition(node) == ("True", "WithinCharge"))
        node.meter.rest = 2_000_000

        async def restless() -> None:
            for epoch in range(2, 1_000):
                cap = 600_000 - epoch % 2 * 20_000
                node.api.publish("rack", epoch, {CHAT: (cap, 200_000)}, hold=86_400_000)
                await asyncio.sleep(7)

        changes = asyncio.create_task(restless())
        await node.until(lambda: condition(node) == ("False", "AboveCharge"), within=120)
        await node.until(lambda: sum(node.limits()) <= 8 * 600_000 - 900_000, within=20)
        cuts = node.agent.state.node_power.cuts
        await asyncio.sleep(200)
        assert node.agent.state.node_power.cuts == cuts, "once it draws what it may, nothing more is taken"
        changes.cancel()

    story(tell, rest=900_000, charged=1_000_000)


def test_an_agent_that_is_killed_is_followed_by_one_that_goes_on_withholding() -> None:
    async def tell(node: Node) -> None:
        busy(node)
        await node.until(lambda: sum(node.limits()) <= 8 * 600_000 - 1_000_000, within=60)
        cut = node.limits()
        await node.until(lambda: any(gpu.withheld_milliwatts for gpu in node.api.status.gpus))
        await node.until(lambda: condition(node) == ("False", "AboveCharge"))
        await node.kill()
        sets = len(node.nvml.sets)
        node.start()
        asked = node.meter.asked
        await node.until(lambda: node.meter.asked > asked + 12, within=200)
        assert node.limits() == cut, "as it was found, before the sheets are known to be new"
        node.api.renew()
        await node.until(lambda: node.api.status.mode == "Obeying")
        asked = node.meter.asked
        await node.until(lambda: node.meter.asked > asked + 12, within=200)
        highest = {gpu: milliwatts for _, gpu, milliwatts in node.nvml.sets[sets:]}
        assert all(highest.get(f"GPU-{n}", 0) <= cap for n, cap in enumerate(cut))
        assert node.limits() == cut
        assert condition(node) == ("False", "AboveCharge")
        node.meter.rest = 900_000
        await node.until(lambda: node.limits() == [600_000] * 8, within=3_000)
        await node.until(lambda: condition(node) == ("True", "WithinCharge"))
        assert all(gpu.healthy and not gpu.faults for gpu in node.api.status.gpus)

    story(tell, rest=2_000_000, charged=1_000_000)


def test_nothing_is_given_back_while_nobody_measures_the_node() -> None:
    async def tell(node: Node) -> None:
        busy(node)
        await node.until(lambda: condition(node) == ("False", "AboveCharge"), within=60)
        await node.until(lambda: sum(node.limits()) <= 8 * 600_000 - 1_000_000, within=40)
        cut = node.limits()
        node.meter.problem = "no answer within 5 s"
        await asyncio.sleep(1_000)
        assert node.limits() == cut
        node.meter.problem, node.meter.rest = "", 900_000
        await node.until(lambda: node.limits() == [600_000] * 8, within=3_000)

    story(tell, rest=2_000_000, charged=1_000_000)


def test_alerts_hear_the_reason_that_the_condition_gives() -> None:
    def heard(node: Node) -> list[str]:
        lines = render(node.agent).decode().splitlines()
        said = [line for line in lines if line.startswith("tokenfactory_agent_node_power{")]
        assert len(said) == 3
        assert all(f'node="{node.agent.state.name}"' in line for line in said)
        return [line.split('reason="')[1].split('"')[0] for line in said if line.endswith(" 1.0")]

    async def tell(node: Node) -> None:
        for change, status, reason in (
            (lambda meter: None, "True", "WithinCharge"),
            (lambda meter: setattr(meter, "problem", "no answer within 5 s"), "Unknown", "Unreadable"),
            (lambda meter: meter.__dict__.update(problem="", rest=2_000_000), "False", "AboveCharge"),
        ):
            change(node.meter)
            await node.until(lambda want=(status, reason): condition(node) == want, within=200)
            assert heard(node) == [reason]

    async def busy_story(node: Node) -> None:
        busy(node)
        await tell(node)

    story(busy_story, rest=900_000, charged=1_000_000)


def test_a_gpu_that_nobody_can_read_is_no_overhead() -> None:
    async def tell(node: Node) -> None:
        await node.kill()
        node.nvml.gpus["GPU-3"].hidden = FailureKind.LOST
        node.start()
        node.api.renew()
        asked = node.meter.asked
        await node.until(lambda: node.meter.asked > asked + 3 * SAMPLES, within=2_000)
        assert node.api.status.overhead_milliwatts == 0
        node.nvml.gpus["GPU-3"].hidden = None
        node.meter.rest = 1_500_000
        await node.until(lambda: node.api.status.overhead_milliwatts == with_margin(1_500_000), within=2_000)

    story(tell, rest=900_000, charged=1_200_000)


def test_what_was_learned_outlives_the_agent_and_never_falls() -> None:
    async def tell(node: Node) -> None:
        busy(node)
        told = with_margin(900_000)
        await asyncio.sleep(SAMPLES * SEASONED * 10.0)
        assert node.api.status.overhead_milliwatts == 0
        await node.until(lambda: node.api.status.overhead_milliwatts == told, within=1_000)
        assert node.api.status.overhead_proven
        await node.kill()
        node.meter.rest = 300_000
        node.start()
        for _ in range(3):
            await asyncio.sleep(SAMPLES * 10.0)
            assert node.api.status.overhead_milliwatts == told
            assert node.api.status.overhead_proven
        await node.stop()
        assert node.meter.closed

    story(tell, rest=900_000, charged=4_600_000)


def test_without_a_meter_nothing_is_said_of_the_node() -> None:
    async def tell() -> None:
        node = Node()
        await node.settle(hold=86_400_000)
        await asyncio.sleep(60)
        assert condition(node) == ("", "")
        assert "node_power" not in render(node.agent).decode().replace("node_power_cuts", "")
        await node.stop()

    run(tell())
