"""An operator killed after each single write, in each part of a factory's life, ends where an undisturbed one does.

Each story is followed once. Before every write that the operator makes in its last chapter the world is copied, the
operator of the copy is killed there, another one takes over, and the copy is followed to its end. What the hardware
may draw is checked in every round of every copy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from tests.unit.controller import manifests
from tests.unit.controller.manifests import LLAMA_8B, Manifest, domain, rack
from tests.unit.controller.outcome import outcome
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.controller import actions as act
from tokenfactory.controller import compose
from tokenfactory.controller.plan.domains import lay_out
from tokenfactory.controller.plan.world import see

Step = Callable[[SmallWorld], None]


def site(limit: str = "6kW") -> Step:
    parts = (domain("hall", limit, nodeOverhead="500W"), rack("a", "4kW"), rack("b", "4kW"))
    return lambda world: world.apply(*parts)


def model(name: str = "small", *, tag: str = "1.8.0", replicas: int = 3, band: int = 10) -> Manifest:
    return manifests.model(name, image=LLAMA_8B, tag=tag, gpus=1, replicas=(replicas, 8), band=band)


def factory(*models: Manifest, name: str = "chat") -> Step:
    return lambda world: world.apply(manifests.factory(*(models or (model(),)), name=name))


def node(name: str, rack: str) -> Step:
    return lambda world: world.add_node(name, gpus=2, rack=rack)


def groups(world: SmallWorld) -> None:
    world.has_groups = True


def spanning(replicas: int = 1) -> Manifest:
    """Two nodes each, and a GPU on each of them."""
    return {**model("huge", replicas=replicas), "nodesPerReplica": 2}


def dies(world: SmallWorld) -> None:
    world.agents[min(pod.spec.node_name for pod in world.ready_pods())].alive = False


def leaves_a(world: SmallWorld) -> None:
    world.label_node("a1", rack="b")


def deleted(world: SmallWorld) -> None:
    world.delete_factory("inference", "chat")


THREE = (node("a1", "a"), node("a2", "a"), node("b1", "b"))


@dataclass(frozen=True)
class Story:
    before: tuple[Step, ...]
    """Each of these comes to rest before the next."""
    then: tuple[Step, ...]
    """All at once: the chapter in which the operator is killed."""
    fresh: tuple[Step, ...] = field(default=())
    """What somebody would deploy who wants what the story ends with; empty where nobody can (a node is lost)."""


STORIES = {
    "apply": Story((), (*THREE, site(), factory()), (*THREE, site(), factory())),
    "cut": Story((*THREE, site(), factory()), (site("3.9kW"),), (*THREE, site("3.9kW"), factory())),
    # What runs already is throttled further than what nobody would have started.
    "deep cut": Story((*THREE, site(), factory()), (site("3.2kW"),)),
    # Not even the minimum fits: its pods are evicted.
    "starved": Story((*THREE, site(), factory()), (site("2kW"),)),
    "raise": Story((*THREE, site("3.2kW"), factory()), (site(),), (*THREE, site(), factory())),
    "node loss": Story((*THREE, site(), factory()), (dies,)),
    "rollout": Story(
        (*THREE, site(), factory()),
        (factory(model(tag="1.9.0")),),
        (*THREE, site(), factory(model(tag="1.9.0"))),
    ),
    "deletion": Story((*THREE, site(), factory()), (deleted,), (*THREE, site())),
    "move": Story(
        (*THREE, site(), factory(model(replicas=2))),
        (leaves_a,),
        (node("a1", "b"), node("a2", "a"), node("b1", "b"), site(), factory(model(replicas=2))),
    ),
    "model added": Story(
        (*THREE, site(), factory()),
        (factory(model(), model("big", replicas=1, band=50)),),
        (*THREE, site(), factory(model(), model("big", replicas=1, band=50))),
    ),
    "model removed": Story(
        (*THREE, site(), factory(model(), model("big", replicas=1, band=50))),
        (factory(),),
        (*THREE, site(), factory()),
    ),
    "group": Story(
        (*THREE, site(), groups), (factory(spanning(2)),), (*THREE, site(), groups, factory(spanning(2)))
    ),
    "group removed": Story(
        (*THREE, site(), groups, factory(spanning(), model())),
        (factory(),),
        (*THREE, site(), groups, factory()),
    ),
    "second factory": Story(
        (*THREE, site(), factory()),
        (factory(model(band=90, replicas=2), name="search"),),
        (*THREE, site(), factory(), factory(model(band=90, replicas=2), name="search")),
    ),
}


def follow(world: SmallWorld, most_rounds: int = 80) -> SmallWorld:
    """To rest, with the budget checked before and after everybody else acts."""
    world.settle(most_rounds, each_round=check_budget)
    return world


def check_budget(world: SmallWorld) -> None:
    assert world.new_breaches() == []
    seen = see(world.snapshot(), OPTIONS.workloads)
    ledger = compose._ledger(seen, lay_out(seen))
    drawing = world.drawing()
    for _, name in world.objects[PowerDomain]:
        assert ledger.charge(name) >= drawing[name], f"{name} draws what nobody charged"


def play(steps: tuple[Step, ...]) -> SmallWorld:
    """All at once."""
    world = SmallWorld()
    for step in steps:
        step(world)
    return world


def begun(story: Story) -> SmallWorld:
    world = SmallWorld()
    for step in story.before:
        step(world)
    follow(world)
    for step in story.then:
        step(world)
    return world


def crash_points(world: SmallWorld) -> list[tuple[str, SmallWorld]]:
    """Copies of the world, each with an operator that was killed right before a write. Follows `world` to rest."""
    killed: list[tuple[str, SmallWorld]] = []

    def before(action: act.Action) -> None:
        if isinstance(action, act.Tell):
            return
        copy = world.fork()
        copy.crash()
        killed.append((f"before write {len(world.writes)}: {type(action).__name__}", copy))

    world.before_write = before
    try:
        follow(world)
    finally:
        world.before_write = lambda _: None
    for _, copy in killed:
        copy.before_write = lambda _: None
    return killed


class Killed(Exception):  # noqa: N818 - it is what happens
    """The operator is gone."""


def half_a_group() -> SmallWorld:
    """Its operator was killed between the two writes that charge it."""
    world = play((*THREE, site(), groups))
    follow(world)
    factory(spanning())(world)

    def before(action: act.Action) -> None:
        if isinstance(action, act.ChargeNode) and action.spec.pods and charged_pods(world):
            raise Killed

    world.before_write = before
    with pytest.raises(Killed):
        follow(world)
    world.before_write = lambda _: None
    world.crash()
    assert len(charged_pods(world)) == 1
    return world


def charged_pods(world: SmallWorld) -> list[str]:
    return [grant.name for node in world.objects[GPUNode].values() for grant in node.spec.pods]


def test_the_other_half_of_a_group_is_charged_by_the_next_operator():
    world = half_a_group()
    follow(world)
    assert len(charged_pods(world)) == 2
    assert len(world.ready_pods()) == 2


def test_half_a_group_whose_rest_finds_no_place_gives_up_its_own():
    """Else it would hold watts for ever, and two halves would wait for each other."""
    world = half_a_group()
    site("3.2kW")(world)
    follow(world)
    assert charged_pods(world) == []
    hall = world.objects[PowerDomain]["", "hall"].status
    assert hall.charge == "2.7kW", "six GPUs at their minimum, and three nodes"
    said = [each.reason for each in world.writes if isinstance(each, act.DeletePod)]
    assert said
    assert all(reason.startswith("only 1 of the pods of its group have a place") for reason in said)
    site()(world)
    follow(world)
    assert len(world.ready_pods()) == 2


@pytest.mark.parametrize("name", STORIES)
def test_killed_before_any_write_the_end_is_the_same(name: str):
    story = STORIES[name]
    world = begun(story)
    killed = crash_points(world)
    assert len(killed) >= 3
    expected = outcome(world)
    if story.fresh:
        assert expected == outcome(follow(play(story.fresh)))
    for where, copy in killed:
        assert outcome(follow(copy)) == expected, where
