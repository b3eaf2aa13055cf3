"""What falls back without the operator fits every limit that a timetable may set, or `Feasible` says that it does not."""

from datetime import timedelta

import pytest
from tests.unit.controller.manifests import LLAMA_70B, Manifest, domain, factory, hall, model, profile, rack
from tests.unit.controller.small_world import H100, SmallWorld

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain

SLO = {"interTokenLatency": "50ms"}


def window(limit: str) -> Manifest:
    return {"name": "peak", "start": "13:30", "end": "18:00", "limit": limit}


def feasible(world: SmallWorld, name: str = "hall") -> tuple[str, str, str]:
    found = world.objects[PowerDomain]["", name].status.conditions
    return next((c.status, c.reason, c.message) for c in found if c.type == "Feasible")


def a_site(*domains: Manifest, replicas: int = 4) -> SmallWorld:
    points = ((64, "300W", "300"), (64, "500W", "900"), (64, "700W", "1000"))
    world = SmallWorld()
    for name in ("n0", "n1"):
        world.add_node(name, rack="a")
    world.apply(profile("llama", H100, *points), *domains)
    world.apply(factory(model(image=LLAMA_70B, slo=SLO, replicas=(replicas, replicas))))
    world.settle(200)
    assert len(world.ready_pods()) == replicas
    return world


def without_an_operator(world: SmallWorld) -> None:
    """Until the window has been open for longer than any hold."""
    until = world.now.replace(hour=13, minute=40)
    while world.now < until:
        world.renewals -= 1
        world.others()
        world.now += timedelta(seconds=20)
    assert {node.status.mode for node in world.objects[GPUNode].values()} == {"Fallback"}


@pytest.mark.parametrize(
    ("site", "narrowest"),
    [
        pytest.param([hall("20kW", timetable=[window("60%")])], "hall", id="the limit itself"),
        pytest.param(
            [hall("20kW", reserve="0%", fixedLoad="8kW", nodeOverhead="500W", timetable=[window("70%")])],
            "hall",
            id="a fixed load does not shrink",
        ),
        pytest.param(
            [domain("hall", "40kW", timetable=[window("45%")]), rack("a", "50%", nodeOverhead="500W")],
            "rack-a",
            id="a share of what has shrunk",
        ),
        pytest.param(
            [
                domain("hall", "40kW", nodeOverhead="1kW", timetable=[window("50%")]),
                rack("a", "50%", timetable=[window("90%")]),
            ],
            "rack-a",
            id="two windows at once",
        ),
    ],
)
def test_fallbacks_fit_the_lowest_limit_that_a_window_can_set(site: list[Manifest], narrowest: str):
    world = a_site(*site)
    assert not world.new_breaches()
    assert feasible(world, narrowest)[:2] == ("True", "FallbacksFit")
    without_an_operator(world)
    world._drew = {}
    assert world.new_breaches() == []


def test_a_window_below_the_minimum_is_told_long_before_it_opens():
    world = a_site(hall("20kW", reserve="0%", fixedLoad="8kW", timetable=[window("60%")]))
    status, reason, message = feasible(world)
    assert (status, reason) == ("False", "FallbacksTooHigh")
    assert message.startswith("with every window of a timetable open, its nodes need")


def test_floors_that_do_not_fit_are_told_once_nothing_more_can_be_parked():
    world = a_site(hall("20kW", nodeOverhead="500W"))
    world.apply(hall("7kW", nodeOverhead="500W"))
    world.live(200)
    assert len(world.ready_pods()) == 4
    status, reason, message = feasible(world)
    assert (status, reason) == ("False", "FloorsDoNotFit")
    assert "spec.models[].slo" in message
    world.apply(hall("20kW", nodeOverhead="500W"))
    world.live(400)
    assert feasible(world)[:2] == ("True", "FallbacksFit")
