"""Random histories of valid specs, nodes and crashes: the budget holds in every round, and the end is the last spec's."""

from typing import Any

import msgspec
from hypothesis import event, given
from hypothesis import strategies as st
from tests.unit.controller import manifests
from tests.unit.controller.manifests import Manifest, domain, rack
from tests.unit.controller.outcome import outcome
from tests.unit.controller.small_world import SmallWorld
from tests.unit.controller.specs import specs
from tests.unit.controller.test_crash_points import check_budget, follow
from tests.unit.controller.walking import walks

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory

NODES = {"a1": "a", "a2": "a", "b1": "b", "b2": "b"}
AMPLE = "40kW"
Walk = list[tuple[Any, ...]]


def factory(name: str, spec: dict[str, Any]) -> Manifest:
    rest = {field: value for field, value in spec.items() if field != "models"}
    return manifests.factory(*spec["models"], name=name, **rest)


names = st.sampled_from(["chat", "search"])
nodes = st.sampled_from(sorted(NODES))
# The world's clock begins at noon.
windows = st.sampled_from([("11:00", "12:01"), ("12:01", "12:03"), ("12:02", "18:00")]).flatmap(
    lambda hours: st.sampled_from(["30%", "60%", "90%"]).map(
        lambda limit: {"name": "window", "start": hours[0], "end": hours[1], "limit": limit}
    )
)
extras = st.fixed_dictionaries(
    {},
    optional={
        "fixedLoad": st.sampled_from(["500W", "2kW"]),
        "reserve": st.just("10%"),
        "timetable": windows.map(lambda window: [window]),
    },
)
steps = st.one_of(
    st.tuples(st.just("apply"), names, specs()),
    st.tuples(st.just("delete"), names),
    st.tuples(st.just("hall"), st.sampled_from(["6kW", "8kW", "12kW", AMPLE]), extras),
    st.tuples(st.just("rack"), st.sampled_from("ab"), st.sampled_from(["3kW", "6kW", "40%", AMPLE]), extras),
    st.tuples(st.just("move"), nodes, st.sampled_from("ab")),
    st.tuples(st.just("cordon"), nodes, st.booleans()),
    st.tuples(st.just("silent"), nodes, st.booleans()),
    st.tuples(st.just("crash"), st.integers(0, 6)),
    st.tuples(st.just("rounds"), st.integers(1, 12)),
)


def take(world: SmallWorld, step: tuple[Any, ...]) -> None:
    match step:
        case ("apply", name, spec):
            world.apply(factory(name, spec))
        case ("delete", name):
            if ("inference", name) in world.objects[TokenFactory]:
                world.delete_factory("inference", name)
        case ("hall", limit, extra):
            world.apply(domain("hall", limit, nodeOverhead="500W", **extra))
            world.look()  # a fixed load is switched on by people
        case ("rack", name, limit, extra):
            world.apply(rack(name, limit, **extra))
            world.look()
        case ("move", node, where):
            world.label_node(node, rack=where)
            world.look()
        case ("cordon", node, on):
            world.cordon(node, on)
        case ("silent", node, on):
            world.agents[node].alive = not on
        case ("crash", writes):
            world.operate(most_writes=writes)
            world.crash()
        case ("rounds", count):
            for _ in range(count):
                turn(world)


def turn(world: SmallWorld) -> None:
    world.others()
    check_budget(world)
    world.operate()
    check_budget(world)


def site() -> SmallWorld:
    world = SmallWorld()
    for name, where in NODES.items():
        world.add_node(name, gpus=4, rack=where)
    world.claim()
    make_ample(world)
    return world


def make_ample(world: SmallWorld) -> None:
    take(world, ("hall", AMPLE, {}))
    for name in "ab":
        take(world, ("rack", name, AMPLE, {}))
    for name, where in NODES.items():
        take(world, ("move", name, where))
        take(world, ("cordon", name, False))
        take(world, ("silent", name, False))


def end_of(world: SmallWorld) -> dict[str, Any]:
    """What must not depend on how one came here: everything but which replica is in which rack."""
    whole = outcome(world)
    for each in whole["factories"].values():
        del each["incidents"]
    caps: dict[tuple[str, int], int] = {}
    for (_, model, cap), count in whole["caps"].items():
        caps[model, cap] = caps.get((model, cap), 0) + count
    return {
        "factories": whole["factories"],
        "hall": whole["domains"]["hall"],
        "workloads": whole["workloads"],
        "nodes": whole["nodes"],
        "replicas": whole["replicas"],
        "caps": caps,
    }


@walks(8)
@given(st.lists(steps, min_size=3, max_size=14))
def test_any_walk_keeps_the_budget_and_ends_as_a_fresh_deploy(walk: Walk):
    world = site()
    for step in walk:
        take(world, step)
        turn(world)
    make_ample(world)
    follow(world, most_rounds=200)
    event(f"{len(world.writes) // 50 * 50}+ writes")

    fresh = site()
    for (_, name), held in world.objects[TokenFactory].items():
        fresh.apply(factory(name, msgspec.to_builtins(held.spec)))
    follow(fresh)
    assert end_of(world) == end_of(fresh)


def test_the_walk_would_see_a_watt_too_many():
    """A GPU that draws more than its sheets say is found in the very round."""
    world = site()
    follow(world)
    node = next(iter(world.objects[GPUNode].values()))
    meta = msgspec.structs.replace(node.metadata)
    assert meta.name in world.agents
    world.agents[meta.name].enforced[world.agents[meta.name].uuid(0)] = 10**9
    pods = [msgspec.structs.replace(gpu, pod="x/y") for gpu in node.status.gpus]
    world.put(msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, gpus=tuple(pods))))
    assert {each.domain for each in world.new_breaches()} == {
        each for _, each in world.objects[PowerDomain]
    } - {"rack-b"}
