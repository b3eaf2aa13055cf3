"""An incident ends also when nothing replaces what was lost, because a person wants less than before."""

import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.token_factory import TokenFactory


def small(replicas: tuple[int, int], name: str = "llama") -> Manifest:
    return model(name, gpus=4, replicas=replicas)


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param([small((1, 1)), small((1, 1), "other")], id="fewer"),
        pytest.param([small((1, 1), "other")], id="none"),
    ],
)
def test_what_is_not_wanted_any_more_is_not_waited_for(wanted: list[Manifest]):
    world = SmallWorld.of(3, hall("60kW"), factory(small((4, 4)), small((1, 1), "other")))
    world.settle()
    world.agents["n1"].alive = False
    world.live(18)
    phases = {incident.phase for incident in _status(world).incidents}
    assert phases, "the loss was seen"
    assert "Closed" not in phases
    world.apply(factory(*wanted))
    world.settle()
    status = _status(world)
    assert {incident.phase for incident in status.incidents} == {"Closed"}
    assert {each.type: each.status for each in status.conditions}["Recovered"] == "True"


def _status(world: SmallWorld):
    return next(iter(world.objects[TokenFactory].values())).status
