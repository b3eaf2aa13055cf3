"""The next round is planned on a view that shows what this operator has written itself."""

import asyncio
from typing import Any

import msgspec

from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.token_factory import (
    FactoryPower,
    TokenFactory,
    TokenFactorySpec,
    TokenFactoryStatus,
)
from tokenfactory.controller import actions as act
from tokenfactory.controller.actions import Plan
from tokenfactory.controller.actor import Actor
from tokenfactory.controller.reconciler import Reconciler
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.kube.apply import Written

SPEC = CapSheetSpec(domain="hall", tree="hall", term=1, epoch=2)
SHEET = CapSheet(metadata=ObjectMeta(name="hall", resource_version="7"), spec=SPEC)
PUBLISH = act.PublishSheet(SHEET, SPEC, "raise")
CHARGE = act.ChargeNode(
    GPUNode(metadata=ObjectMeta(name="n1", resource_version="8")), "n1", GPUNodeSpec(), "x"
)


class Server:
    """Answers writes with the next version, or as it is told to."""

    def __init__(self) -> None:
        self.version = 10
        self.asked = asyncio.Event()

    async def replace(self, obj: Any, *, urgent: bool = False) -> Written[Any]:
        self.asked.set()
        self.version += 1
        meta = ObjectMeta(name="x", resource_version=str(self.version))
        return Written(msgspec.structs.replace(obj, metadata=meta))


def actor_of(server: Server) -> Actor:
    actor = Actor(None, None, lambda: None)  # type: ignore[arg-type]
    actor.writer = server  # type: ignore[assignment]
    return actor


async def test_an_actor_knows_how_far_each_cache_must_have_come():
    actor = actor_of(Server())
    await actor.execute([PUBLISH, CHARGE, PUBLISH])
    assert actor.written == {CapSheet: 13, GPUNode: 12}


async def test_no_round_is_observed_before_our_own_writes_are_seen():
    seen, observed = asyncio.Event(), asyncio.Event()

    async def caught_up() -> bool:
        return await seen.wait()

    def observe() -> Snapshot:
        observed.set()
        return None  # type: ignore[return-value]

    reconciler = Reconciler(
        observe, lambda _: Plan(()), actor_of(Server()), caught_up=caught_up, gather_seconds=0
    )
    running = asyncio.create_task(reconciler.run())
    for _ in range(20):
        await asyncio.sleep(0)
    assert not observed.is_set()
    seen.set()
    async with asyncio.timeout(10):
        await observed.wait()
    running.cancel()


async def test_while_our_own_writes_are_not_seen_nothing_rises():
    """A cache may lag for long, and cuts wait for nothing."""
    server = Server()
    lower = act.PublishSheet(SHEET, SPEC, "cut", lowers=True)

    again = asyncio.Event()

    async def never() -> bool:
        if server.asked.is_set():
            again.set()
            await asyncio.Event().wait()
        return False

    def plan(_: Snapshot) -> Plan:
        return Plan((PUBLISH, lower, CHARGE))

    actor = actor_of(server)
    reconciler = Reconciler(lambda: None, plan, actor, caught_up=never, gather_seconds=0, retry_seconds=0.01)  # type: ignore[arg-type, return-value]
    running = asyncio.create_task(reconciler.run())
    async with asyncio.timeout(10):
        await again.wait()
    running.cancel()
    assert actor.writes == 1, "the cut alone"
    assert actor.refused == 0


class NewerServer:
    """Its objects have become newer than our types."""

    async def request(self, *_: object, **__: object) -> bytes:
        return b'{"metadata": {"name": "chat", "resourceVersion": "9"}, "spec": "of another kind"}'


async def test_an_answer_that_cannot_be_read_ends_nothing():
    actor = Actor(NewerServer(), None, lambda: None)  # type: ignore[arg-type]
    spec = TokenFactorySpec(power=FactoryPower(domain="hall"), models=())
    meta = ObjectMeta(name="chat", namespace="a", uid="u", resource_version="7")
    factory = TokenFactory(metadata=meta, spec=spec)
    assert not await actor.execute([act.WriteStatus(factory, TokenFactoryStatus(budget="1W"))])
    assert not actor.unsettled.still(lambda _: 0)
    assert not await actor.execute([CHARGE])
    assert actor.unsettled.still(lambda _: 8) == {("GPUNode", "n1")}, (
        "until it is seen, it may have been done"
    )
