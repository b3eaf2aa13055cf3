"""What saves work between rounds and within one changes nothing of what is planned."""

import msgspec
import pytest
from tests.unit.controller.manifests import hall
from tests.unit.controller.small_world import OPTIONS, SmallWorld
from tests.unit.controller.test_compose import SITE

from tokenfactory.api.gpu_node import GPUNode, PodGrant
from tokenfactory.controller.compose import compose
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.planning.power.ledger import observe


@pytest.fixture
def world() -> SmallWorld:
    return SmallWorld.of(3, *SITE)


def test_each_round_plans_the_same_with_and_without_the_ledger_of_the_last(world: SmallWorld):
    for number in range(30):
        world.others()
        if number == 12:
            world.agents["n1"].alive = False
        if number == 20:
            world.apply(hall("15kW"))
        kept = world.plan()
        afresh = compose(
            world.snapshot(),
            OPTIONS,
            Memory(world.memory.replicas, world.memory.energy, world.memory.caps),
        )
        assert kept.plan == afresh.plan
        assert kept.books.ledger.charges == afresh.books.ledger.charges
        world.operate()
    assert world.memory.ledger is not None


def test_a_ledger_with_one_more_grant_is_the_one_that_would_be_observed(world: SmallWorld):
    world.settle()
    first = ledger = world.plan().books.ledger
    for number in range(3):
        held = world.objects[GPUNode]["", f"n{number}"]
        label = "inference/chat/llama@" + held.status.gpus[0].product
        pod = PodGrant(namespace="inference", name="more", uid=f"more-{number}", class_name=label, gpus=2)
        spec = msgspec.structs.replace(held.spec, pods=(*held.spec.pods, pod), term=number)
        node = msgspec.structs.replace(held, spec=spec)
        ledger = ledger.with_node(node)
        nodes = [entry.node for entry in ledger.entries.values()]
        facts = {name: entry.facts for name, entry in ledger.entries.items()}
        fresh = observe(ledger.domains, ledger.sheets, nodes, facts, ledger.leadership)
        assert ledger.charges == fresh.charges
        assert {line: set(names) for line, names in ledger.lines.items()} == {
            line: set(names) for line, names in fresh.lines.items()
        }
        assert ledger.unclaimed("hall") == fresh.unclaimed("hall")
    assert ledger.charges != first.charges
