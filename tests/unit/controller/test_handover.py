"""What a change of leaders costs: claims after a crash, nothing after a clean hand-over."""

import asyncio

import msgspec
import pytest
from tests.unit.controller.small_world import SmallWorld
from tests.unit.controller.test_compose import SITE

from tokenfactory.api.cap_sheet import CapSheet, labels_of
from tokenfactory.controller import actions as act
from tokenfactory.controller.actor import Actor
from tokenfactory.controller.handover import keep_labelled, label_sheets, settled
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.kube.errors import UnreachableError


@pytest.fixture
def world() -> SmallWorld:
    world = SmallWorld.of(4, *SITE)
    world.settle()
    return world


def succeeded(world: SmallWorld, *, claim_from: int) -> list[act.Action]:
    world.term, world.claim_from, world.memory = world.term + 1, claim_from, Memory()
    world.others()
    return [a for a in world.plan().plan.actions if isinstance(a, act.ChargeNode | act.PublishSheet)]


def test_a_crash_makes_the_next_leader_claim_every_node_and_sheet(world: SmallWorld):
    claims = succeeded(world, claim_from=2)
    assert len([a for a in claims if isinstance(a, act.ChargeNode)]) == 4
    assert len([a for a in claims if isinstance(a, act.PublishSheet)]) == 1
    world.settle()
    assert succeeded(world, claim_from=2) == []


def test_clean_hand_overs_cost_no_write_however_many(world: SmallWorld):
    for _ in range(3):
        assert succeeded(world, claim_from=1) == []


class _Actor(Actor):
    """Its writes end when the test says so, and as it says."""

    def __init__(self) -> None:
        super().__init__(None, None, lambda: None)  # type: ignore[arg-type]
        self.began = asyncio.Event()
        self.answer: asyncio.Future[object] = asyncio.get_running_loop().create_future()

    async def _take(self, action: act.Action) -> object:  # type: ignore[override]
        self.began.set()
        return await self.answer


def charge(world: SmallWorld) -> act.ChargeNode:
    held = next(
        node for kind, nodes in world.objects.items() if kind.__name__ == "GPUNode" for node in nodes.values()
    )
    return act.ChargeNode(held, held.metadata.name, held.spec, "")


async def test_a_hand_over_waits_for_the_write_under_way_and_begins_no_other(world: SmallWorld):
    actor = _Actor()
    acting = asyncio.create_task(actor.execute([charge(world)] * 5))
    await actor.began.wait()
    leaving = asyncio.create_task(settled(actor, lambda _: 0))
    await asyncio.sleep(0)
    assert not leaving.done()
    actor.answer.set_result(act)
    assert await leaving
    assert not await acting
    assert actor.writes == 1


async def test_a_write_that_was_cancelled_or_lost_its_answer_makes_the_hand_over_unclean(world: SmallWorld):
    actor = _Actor()
    acting = asyncio.create_task(actor.execute([charge(world)]))
    await actor.began.wait()
    acting.cancel()
    assert not await settled(actor, lambda _: 0, within_seconds=0.01)
    actor = _Actor()
    actor.answer.set_exception(UnreachableError("PUT", OSError("gone"), sent=True))
    assert not await actor.execute([charge(world)])
    assert not await settled(actor, lambda _: 0)
    assert await settled(actor, lambda _: 10**9), (
        "seen in a newer version, the write has landed or never will"
    )


def bare_sheet(world: SmallWorld) -> CapSheet:
    sheet = next(iter(world.objects[CapSheet].values()))
    return msgspec.structs.replace(sheet, metadata=msgspec.structs.replace(sheet.metadata, labels={}))


async def test_sheets_of_a_release_before_the_label_get_it_once(world: SmallWorld):
    """Agents follow the sheets of their path by it."""
    bare, writer = bare_sheet(world), _Writer()
    await label_sheets(writer, [bare])
    assert [each.metadata.labels for each in writer.replaced] == [labels_of(bare.spec)]
    await label_sheets(writer, writer.replaced)
    assert len(writer.replaced) == 1


async def test_a_label_that_somebody_takes_off_is_put_back_without_an_epoch_even_if_the_first_write_fails(
    world: SmallWorld,
):
    bare, writer = bare_sheet(world), _Writer()
    await label_sheets(writer, [bare])
    held, writer = writer.replaced, _Writer(failures=1)
    keeping = asyncio.create_task(keep_labelled(writer, held, every_seconds=0.0))
    try:
        for _ in range(10):
            await asyncio.sleep(0)
        assert writer.replaced == []
        held[:] = [bare]
        await asyncio.wait_for(writer.wrote.wait(), 10)
    finally:
        keeping.cancel()
    assert (writer.replaced[0].metadata.labels, writer.replaced[0].spec) == (labels_of(bare.spec), bare.spec)


class _Writer:
    def __init__(self, failures: int = 0) -> None:
        self.replaced: list[CapSheet] = []
        self.failures = failures
        self.wrote = asyncio.Event()

    async def replace(self, sheet: CapSheet, *, urgent: bool) -> None:
        if self.failures:
            self.failures -= 1
            raise UnreachableError("PUT", OSError("gone"), sent=True)
        self.replaced.append(sheet)
        self.wrote.set()
