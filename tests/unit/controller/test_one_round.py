"""What a round writes fits together, not only each write by itself."""

from dataclasses import replace

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, domain, factory, model, rack
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.controller import actions as act
from tokenfactory.controller.plan.nodes import with_charges
from tokenfactory.planning.power.grants import granted
from tokenfactory.planning.power.sheets import caps_of


def rack_of(letter: str, limit: str) -> Manifest:
    return rack(letter, limit, nodeOverhead="1kW")


@pytest.fixture
def world() -> SmallWorld:
    world = SmallWorld()
    for letter in "ab":
        world.add_node(f"{letter}0", rack=letter)
    world.apply(domain("hall", "40kW", nodeOverhead="1kW"), rack_of("a", "10kW"), rack_of("b", "4kW"))
    world.apply(factory(model(band=100, replicas=(4, 4))))
    world.settle()
    return world


def raised(world: SmallWorld, domain: str) -> bool:
    before = caps_of(world.objects[CapSheet]["", domain].spec)
    world.operate()
    after = caps_of(world.objects[CapSheet]["", domain].spec)
    return any(cap > before.get(name, 0) for name, cap in after.items())


def test_nothing_rises_in_the_round_in_which_a_node_arrives(world: SmallWorld):
    world.apply(rack_of("b", "6500W"))
    alone = world.fork()
    rounds = next(number for number in range(20) if round_raises(alone, "rack-b"))
    for _ in range(rounds):
        assert not round_raises(world, "rack-b")
    world.label_node("a0", rack="b")
    assert not round_raises(world, "rack-b"), "the node that moved draws there already"


def round_raises(world: SmallWorld, domain: str) -> bool:
    world.others()
    return raised(world, domain)


def test_a_grant_and_a_raise_do_not_take_the_same_watts(world: SmallWorld):
    """Each fits by itself; the second must know of the first."""
    world.apply(rack_of("a", "40kW"))
    composed = world.plan()
    ledger, facts = composed.books.ledger, composed.books.grid.facts
    held = world.objects[GPUNode]["", "a0"]
    held = msgspec.structs.replace(held, spec=msgspec.structs.replace(held.spec, pods=held.spec.pods[:1]))
    mine = held.spec.pods[0].uid
    gpus = tuple(
        gpu
        if gpu.pod_uid == mine
        else msgspec.structs.replace(gpu, pod="", pod_uid="", enforced_milliwatts=gpu.min_milliwatts)
        for gpu in held.status.gpus
    )
    held = msgspec.structs.replace(held, status=msgspec.structs.replace(held.status, gpus=gpus))
    ledger = ledger.with_node(held)
    pod = msgspec.structs.replace(held.spec.pods[0], uid="another", name="another")
    action = act.ChargeNode(held, "a0", granted(held, pod), "one more")
    after = with_charges(ledger, [action], facts)
    more_watts = after.charge("rack-a") - ledger.charge("rack-a")
    assert more_watts > 0
    assert after.charge("hall") - ledger.charge("hall") == more_watts
    gone = act.ChargeNode(held, "a0", msgspec.structs.replace(held.spec, pods=()), "released")
    assert with_charges(ledger, [gone], facts).charges == ledger.charges, "it may fail: it frees nothing yet"
    claimed = act.ChargeNode(held, "a0", msgspec.structs.replace(granted(held, pod), term=9), "claim")
    later = replace(ledger, leadership=replace(ledger.leadership, term=9, claim_from=9))
    assert ("GPUNode", "a0") in with_charges(later, [claimed], facts).unclaimed("hall"), (
        "not before it is written"
    )


def test_charges_are_written_before_the_sheets_that_every_agent_answers():
    """An answer changes the GPUNode, and a charge is only ever written over the version that the plan has seen."""
    world = SmallWorld()
    world.add_node("a0", rack="a")
    world.apply(domain("hall", "40kW", nodeOverhead="1kW"), rack_of("a", "10kW"))
    world.settle()
    world.add_node("a1", rack="a")
    world.apply(factory(model(band=100, replicas=(4, 4))))
    both = 0
    for _ in range(30):
        world.others()
        kinds = [
            "charge" if isinstance(action, act.ChargeNode) else "cut" if action.lowers else "rise"
            for action in world.plan().plan.actions
            if isinstance(action, act.ChargeNode | act.PublishSheet)
        ]
        assert kinds == sorted(kinds, key=["cut", "charge", "rise"].index)
        both += {"charge", "rise"} <= set(kinds)
        world.operate()
    assert both, "no round had both: this test shows nothing"
