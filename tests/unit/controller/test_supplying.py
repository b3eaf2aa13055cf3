"""What is remembered of earlier settlements: a site that stands still asks the same at every look."""

from dataclasses import replace

import numpy as np
import pytest
from tests.unit.controller.manifests import LLAMA_70B, factory, hall, model
from tests.unit.controller.small_world import SmallWorld
from tests.unit.planning.power.worlds import muster, plant

from tokenfactory.controller.plan import supplying
from tokenfactory.controller.plan.supplying import Supply
from tokenfactory.planning.power import budgets
from tokenfactory.planning.power.goods import PowerClass
from tokenfactory.planning.power.zones import Allotment, put_on_sale

PARENTS = (-1, 0, 0)
CLASSES = {
    name: PowerClass(name, 1, (100_000, 300_000, 500_000), tokens, factory=owner)
    for name, tokens, owner in (
        ("chat", (0.0, 9.0, 12.0), "ours"),
        ("code", (0.0, 8.0, 15.0), "ours"),
        ("tin", (0.0, 4.0, 5.0), "theirs"),
    )
}


def site(
    parents: tuple[int, ...] = PARENTS,
    names: tuple[str, ...] = ("hall", "row-1", "row-2"),
    classes: dict[str, PowerClass] = CLASSES,
    budget: int = 9_000_000,
    payers: tuple[str, ...] = ("ours",),
    gpus: tuple[int, ...] = (8, 8, 8, 8, 8),
    where: tuple[int, ...] = (1, 1, 1, 2, 2),
    which: tuple[int, ...] = (0, 1, 2, 1, 2),
) -> Supply:
    """A hall with two rows, and a budget that binds."""
    forest = plant(np.array(parents, dtype=np.int64), names)
    sale = put_on_sale(forest, classes, [Allotment("budget", frozenset(payers), budget)])
    fleet = muster(forest, np.array(where), np.array(which), 3, np.array(gpus))
    limits = np.array([13_000_000, 7_000_000, 6_400_000], dtype=np.int64)
    return Supply(forest, sale, fleet, np.zeros(3, dtype=np.int64), limits, ())


def dearer() -> dict[str, PowerClass]:
    return {**CLASSES, "chat": replace(CLASSES["chat"], value_per_token=3.0)}


OTHERS = {
    "the limits": replace(site(), limits=np.array([13_000_000, 6_000_000, 6_400_000], dtype=np.int64)),
    "what is owed besides": replace(site(), committed=np.array([0, 900_000, 0], dtype=np.int64)),
    "how many GPUs there are": site(gpus=(8, 8, 8, 12, 8)),
    "where they are": site(where=(0, 1, 1, 2, 2)),
    "what they are": site(which=(0, 1, 2, 0, 2)),
    "what they are worth": site(classes=dearer()),
    "a budget": site(budget=8_000_000),
    "who pays from it": site(payers=("ours", "theirs")),
    "which domain is below which": site(parents=(-1, 0, 1)),
}


@pytest.fixture(autouse=True)
def nothing_remembered() -> None:
    supplying._settled.cache_clear()
    supplying._parked.cache_clear()


@pytest.fixture
def settlements(monkeypatch: pytest.MonkeyPatch) -> list[budgets.Settled]:
    """Every time that budgets are really settled."""
    found: list[budgets.Settled] = []
    settle = budgets.settle

    def counted(*args, **kwargs) -> budgets.Settled:
        found.append(settle(*args, **kwargs))
        return found[-1]

    monkeypatch.setattr(budgets, "settle", counted)
    return found


def caps(settled: budgets.Settled) -> list[int]:
    return settled.clearing.caps.tolist()


def test_the_same_question_is_answered_once(settlements: list[budgets.Settled]):
    first = site().settle({0: 1.0})
    asked = len(settlements)
    assert site().settle({0: 1.0}) is first
    parking = site().park(first.clearing, {0: 1.0})
    assert len(settlements) == asked
    assert site().park(first.clearing, {0: 1.0}) is parking


@pytest.mark.parametrize("what", OTHERS)
def test_whatever_changes_is_settled_anew(what: str):
    other = OTHERS[what]
    alone = other.settle()
    supplying._settled.cache_clear()
    before = site().settle()
    assert caps(other.settle()) == caps(alone)
    assert other.settle().clearing.market.fleet is other.fleet
    assert (caps(before), before.clearing.drawn.tolist()) != (caps(alone), alone.clearing.drawn.tolist())


def test_other_limits_and_price_floors_are_other_questions():
    supply = site()
    free = caps(supply.settle())
    assert caps(supply.settle(None, supply.limits * 9 // 10)) != free
    assert caps(supply.settle({supply.goods.factories.index("ours"): 30.0})) != free
    assert caps(supply.settle()) == free


def test_a_domain_made_anew_under_another_name_is_told_by_its_name():
    site().settle()
    forest = site(names=("hall", "row-1", "row-3")).settle().clearing.market.forest
    assert forest.names == ("hall", "row-1", "row-3")


def test_a_parking_belongs_to_its_clearing():
    supply = site()
    settled, dear = supply.settle(), supply.settle({supply.goods.factories.index("ours"): 30.0})
    for each in (settled, dear, settled):
        assert supply.park(each.clearing, {}).clearing is each.clearing


def test_a_site_that_stands_still_settles_nothing_anew(settlements: list[budgets.Settled]):
    def chat(budget: str):
        llama = model(image=LLAMA_70B, slo={"interTokenLatency": "50ms"}, replicas=(4, 4))
        return factory(llama, power={"domain": "hall", "budget": budget})

    world = SmallWorld.of(2, hall("40kW"), chat("7kW"))
    world.settle()
    settlements.clear()
    world.rounds(3)
    assert settlements == []
    world.apply(chat("6kW"))
    world.rounds(3)
    assert settlements != []
