"""One object that the plan fails on must not end the power safety of all others."""

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import barring, main
from tokenfactory.controller.barring import Barring
from tokenfactory.controller.compose import compose
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.kube.objects import Pod

BAD = ("red", "bad")


def chat(name: str, namespace: str, least: int = 1) -> Manifest:
    return factory(model(replicas=(least, 2)), name=name, namespace=namespace)


class Failing(SmallWorld):
    """Plans as the operator does, with a mistake that the factories in `bad` bring out."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: set[tuple[str, str]] = set()
        self.plans = 0
        self.barring = Barring(self._compose)

    def _compose(self, snapshot: Snapshot):
        self.plans += 1
        for key in snapshot.factories:
            if key in self.bad:
                raise ZeroDivisionError(f"no plan for {key}")
        return compose(snapshot, OPTIONS, self.memory)

    def plan_of(self, snapshot: Snapshot):
        return self.barring(snapshot)


@pytest.fixture
def world() -> Failing:
    made = Failing.of(3, hall("30kW"), chat("bad", "red"), chat("good", "blue"))
    made.settle()
    assert len(made.ready_pods()) == 2
    return made


def test_the_others_are_planned_for_and_limits_are_cut(world: Failing):
    before = {pod.metadata.uid for pod in world.ready_pods()}
    world.bad = {BAD}
    world.apply(hall("9kW"))
    world.apply(chat("good", "blue", least=2))
    world.rounds(20)
    assert world.drawing()["hall"] <= 9_000_000
    assert before <= {pod.metadata.uid for pod in world.ready_pods()}, "pods of the bad one stay"
    status = world.objects[PowerDomain]["", "hall"].status
    conditions = {each.type: each for each in status.conditions}
    assert conditions["Compliant"].status == "True"
    assert status.limit == "9kW"
    assert "no plan for ('red', 'bad')" in conditions["Feasible"].message
    assert [message for reason, message in world.events if reason == "Unreadable"]
    booked = {pod.namespace for node in world.objects[GPUNode].values() for pod in node.spec.pods}
    assert booked == {"red", "blue"}
    assert sum(pod.metadata.namespace == "blue" for pod in world.objects[Pod].values()) == 2


def test_it_is_tried_again_once_it_changes_and_after_a_while(world: Failing):
    world.bad = {BAD}
    world.rounds(3)
    world.plans = 0
    world.rounds(5)
    assert world.plans == 5, "it is not looked for again while it is as it was"
    world.bad = set()
    held = world.objects[TokenFactory][BAD]
    world.put(msgspec.structs.replace(held, spec=held.spec), new_generation=True)
    assert BAD in world.plan().books.world.snapshot.factories
    world.bad = {BAD}
    world.rounds(1)
    assert BAD not in world.plan().books.world.snapshot.factories
    world.bad = set()
    world.rounds(barring.AGAIN_MILLISECONDS // 2000 + 1)
    assert BAD in world.plan().books.world.snapshot.factories


def test_many_bad_ones_end_up_left_out_and_the_good_one_stays(world: Failing):
    for number in range(barring.MOST_IN_A_ROUND + 2):
        world.apply(chat(f"bad{number}", "red"))
    world.bad = {key for key in world.objects[TokenFactory] if key[0] == "red"}
    world.operate()
    seen = world.plan().books.world.snapshot.factories
    assert set(seen) == {("blue", "good")}


def test_what_is_nobodys_fault_ends_the_process(world: Failing):
    def fail(snapshot: Snapshot) -> None:
        raise ZeroDivisionError("always")

    with pytest.raises(ZeroDivisionError):
        Barring(fail)(world.snapshot())


def test_the_operator_plans_in_this_way(world: Failing, monkeypatch: pytest.MonkeyPatch):
    class Deaf:
        def planned(self, _composed: object) -> None: ...

        def show(self, _composed: object) -> None: ...

    world.bad = {BAD}
    monkeypatch.setattr(main, "compose", lambda snapshot, _options, _memory: world._compose(snapshot))
    plan = main._Planner(OPTIONS, Deaf(), Deaf())(world.snapshot())
    assert plan.actions
