"""What cannot be read is not gone: nothing rises, and nothing of it is let go, until it can be read."""

import dataclasses

import pytest
from tests.unit.controller.manifests import factory, hall, model
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import Resource
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.compose import compose
from tokenfactory.controller.objects import Deployment
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.kube.objects import Node, ObjectRef, Pod
from tokenfactory.planning.power.sheets import caps_of

CHAT = factory(model(replicas=(3, 3)))
FIELDS = {CapSheet: "sheets", GPUNode: "gpu_nodes", Node: "nodes"}


@pytest.mark.parametrize(("kind", "name"), [(CapSheet, "hall"), (GPUNode, "n1"), (Node, "n1")])
def test_nothing_rises_while_something_cannot_be_read(kind: type[Resource], name: str):
    world = SmallWorld.of(3, hall("9kW"), CHAT)
    world.rounds(12)
    world.apply(hall("30kW"))
    world.others()
    whole = world.snapshot()
    rest = {key: held for key, held in getattr(whole, FIELDS[kind]).items() if key != ("", name)}
    blind = dataclasses.replace(
        whole, **{FIELDS[kind]: rest}, undecodable={(kind.KIND, ("", name)): "spec: unknown field"}
    )
    actions = compose(blind, OPTIONS, Memory()).plan.actions
    raising = (act.ChargeNode, act.OpenGate, act.Retire)
    assert not [each for each in actions if isinstance(each, raising)]
    assert all(each.lowers for each in actions if isinstance(each, act.PublishSheet))
    assert [
        each for each in compose(whole, OPTIONS, Memory()).plan.actions if isinstance(each, act.ChargeNode)
    ]


class NewerFactory(SmallWorld):
    """A world whose only factory does not fit the operator's type."""

    newer = False

    def snapshot(self) -> Snapshot:
        whole = super().snapshot()
        if not self.newer:
            return whole
        key = ("inference", "chat")
        rest = {each: held for each, held in whole.factories.items() if each != key}
        undecodable = {
            (TokenFactory.KIND, key): "Expected `int`, got `str` - at `$.spec.models[0].gpusPerReplica`"
        }
        uids = dict.fromkeys(undecodable, "uid-chat")
        return dataclasses.replace(whole, factories=rest, undecodable=undecodable, uids=uids)


def test_a_factory_that_a_restarted_operator_cannot_read_keeps_its_pods_and_charges():
    world = NewerFactory.of(3, hall("30kW"), CHAT)
    world.settle()
    pods = {pod.metadata.uid for pod in world.ready_pods()}
    grants = {key: node.spec.pods for key, node in world.objects[GPUNode].items()}
    caps = caps_of(world.objects[CapSheet]["", "hall"].spec)
    world.newer = True
    world.crash()
    world.settle()
    assert {key: node.spec.pods for key, node in world.objects[GPUNode].items()} == grants
    assert {pod.metadata.uid for pod in world.ready_pods()} == pods
    assert caps_of(world.objects[CapSheet]["", "hall"].spec) == caps
    feasible = next(
        c for c in world.objects[PowerDomain]["", "hall"].status.conditions if c.type == "Feasible"
    )
    assert (feasible.status, feasible.reason) == ("False", "FactoryUnreadable")
    assert "gpusPerReplica" in feasible.message
    told = [each for each in world.writes if isinstance(each, act.Tell) and isinstance(each.about, ObjectRef)]
    assert [(each.about.name, each.about.uid, each.reason) for each in told] == [
        ("chat", "uid-chat", "Unreadable")
    ], "kubectl describe looks for the object's own uid"
    world.newer = False
    world.settle()
    assert {pod.metadata.uid for pod in world.ready_pods()} == pods
    feasible = next(
        c for c in world.objects[PowerDomain]["", "hall"].status.conditions if c.type == "Feasible"
    )
    assert feasible.status == "True"


def test_nothing_is_said_in_the_status_of_what_cannot_be_read():
    world = SmallWorld.of(1, hall("30kW"), CHAT)
    for key in ((TokenFactory.KIND, ("inference", "chat")), (PowerDomain.KIND, ("", "hall"))):
        seen = dataclasses.replace(world.snapshot(), undecodable={key: "of a newer version"})
        told = [
            each.held.KIND
            for each in compose(seen, OPTIONS, Memory()).plan.actions
            if isinstance(each, act.WriteStatus)
        ]
        assert told == [kind for kind in (PowerDomain.KIND, TokenFactory.KIND) if kind != key[0]]


def test_a_pod_of_an_unreadable_factory_that_ends_gives_its_watts_back():
    world = NewerFactory.of(3, hall("30kW"), CHAT)
    world.settle()
    world.newer = True
    gone = world.ready_pods()[0]
    del world.objects[Pod]["inference", gone.metadata.name]
    world.objects[Deployment].clear()
    world.deploy = lambda: None  # nobody replaces it
    world.settle()
    assert gone.metadata.uid not in {
        grant.uid for node in world.objects[GPUNode].values() for grant in node.spec.pods
    }
