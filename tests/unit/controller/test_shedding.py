"""A shortage beyond what caps should bear: who is drained, who is evicted, and how it comes back."""

import pytest
from tests.unit.controller.manifests import LLAMA_70B, Manifest, factory, hall, model, profile
from tests.unit.controller.small_world import H100, SmallWorld

from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act

SLO = {"interTokenLatency": "50ms"}


def gold_and_tin(tin: tuple[int, int]) -> Manifest:
    """Two replicas of a high band, and these of a low one."""
    return factory(
        model("gold", image=LLAMA_70B, band=100, slo=SLO, replicas=(2, 2)),
        model("tin", image=LLAMA_70B, band=10, slo=SLO, replicas=tin),
    )


@pytest.fixture
def world() -> SmallWorld:
    """Seven replicas at work: five of tin are there because traffic once asked for them."""
    world = SmallWorld.of(4, hall("30kW"), gold_and_tin((5, 5)))
    world.settle()
    world.apply(gold_and_tin((1, 5)))
    world.settle()
    assert serving(world) == {"gold": 2, "tin": 5}
    return world


def serving(world: SmallWorld) -> dict[str, int]:
    found: dict[str, int] = {}
    for pod in world.ready_pods():
        model = pod.metadata.labels["tokenfactory.dev/model"]
        found[model] = found.get(model, 0) + 1
    return found


def status(world: SmallWorld):
    return next(iter(world.objects[TokenFactory].values())).status


def test_a_lasting_shortage_drains_the_lowest_band_and_says_so(world: SmallWorld):
    world.apply(hall("15kW"))
    world.live(20)
    assert serving(world) == {"gold": 2, "tin": 5}, "caps bear it at first"
    world.live(60)
    left = serving(world)
    assert left["gold"] == 2
    assert 1 <= left["tin"] < 5
    parked = [entry for entry in status(world).waiting if entry.reason == "Parked"]
    assert [entry.what for entry in parked] == ["tin"]
    assert "hall" in parked[0].message
    assert {model.name: model.desired for model in status(world).models}["tin"] == left["tin"]


def test_a_drain_does_not_end_its_own_reason(world: SmallWorld):
    world.apply(hall("15kW"))
    world.live(90)
    left = serving(world)
    before = len([write for write in world.writes if isinstance(write, act.ApplyWorkload)])
    world.live(900)
    assert serving(world) == left
    assert len([write for write in world.writes if isinstance(write, act.ApplyWorkload)]) == before


def test_what_was_drained_comes_back_late_and_completely(world: SmallWorld):
    world.apply(hall("15kW"))
    world.live(90)
    left = serving(world)
    world.apply(hall("30kW"))
    world.live(200)
    assert serving(world) == left, "not before the shortage has been over for long"
    world.live(200)
    assert serving(world) == {"gold": 2, "tin": 5}
    world.settle()
    assert status(world).waiting == ()


def test_a_short_dip_drains_nobody(world: SmallWorld):
    for _ in range(10):
        world.apply(hall("15kW"))
        world.live(16)
        world.apply(hall("30kW"))
        world.live(16)
    assert serving(world) == {"gold": 2, "tin": 5}


def test_the_pods_that_go_are_marked_before_there_are_to_be_fewer(world: SmallWorld):
    world.apply(hall("15kW"))
    seen: list[act.Action] = []
    for _ in range(45):
        world.others()
        planned = world.plan().plan.actions
        seen += [action for action in planned if isinstance(action, act.MarkPod | act.ApplyWorkload)]
        world.operate()
    assert isinstance(seen[0], act.MarkPod)
    assert any(isinstance(action, act.ApplyWorkload) for action in seen)


def test_where_not_even_the_minimum_fits_the_lowest_band_is_evicted_first(world: SmallWorld):
    # 4 kW of overhead and 32 GPUs at 200 W are 10.4 kW: nothing that caps can do.
    world.apply(hall("8.8kW"))
    world.live(20)
    assert not [write for write in world.writes if isinstance(write, act.DeletePod)]
    world.live(60)
    gone = [write for write in world.writes if isinstance(write, act.DeletePod)]
    assert gone
    assert all("evicted from hall" in write.reason for write in gone)
    assert gone[0].pod.metadata.labels["tokenfactory.dev/model"] == "tin"
    assert serving(world).get("gold", 0) >= 1
    domain = next(iter(world.objects[PowerDomain].values()))
    compliant = {c.type: c for c in domain.status.conditions}["Compliant"]
    assert compliant.status == "False"
    count = len(gone)
    world.live(120)
    assert len([write for write in world.writes if isinstance(write, act.DeletePod)]) == count


def test_under_a_budget_as_many_run_as_it_carries_and_nobody_is_woken_to_be_parked_again():
    """Sixteen GPUs at 437 W are below the floor of 500 W; twelve have 583 W, as those of the parked one pay nothing."""
    points = ((64, "300W", "300"), (64, "500W", "900"), (64, "700W", "1000"))

    def chat(budget: str, least: int = 1) -> Manifest:
        asked = model(image=LLAMA_70B, slo=SLO, replicas=(least, 4))
        return factory(asked, power={"domain": "hall", "budget": budget})

    world = SmallWorld.of(2, hall("40kW"), profile("llama", H100, *points), chat("20kW", 4))
    world.settle()
    world.apply(chat("7kW"))
    world.live(60)
    for _ in range(12):
        world.live(60)
        assert serving(world) == {"llama": 3}
    assert status(world).models[0].cap == "583W"
    assert "the budgets of inference/chat" in status(world).waiting[0].message
    world.apply(chat("20kW", 4))
    world.live(900)
    assert serving(world) == {"llama": 4}
