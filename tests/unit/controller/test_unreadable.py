"""What cannot be read is not gone: nothing rises, and nothing of it is let go, until it can be read."""

import dataclasses

import pytest
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import Resource
from tokenfactory.controller import actions as act
from tokenfactory.controller.compose import compose
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.kube.objects import Node

HALL = """
apiVersion: tokenfactory.dev/v1alpha1
kind: PowerDomain
metadata: {name: hall}
spec: {limit: %s, nodeOverhead: 1kW, nodeSelector: {matchLabels: {nvidia.com/gpu.present: "true"}}}
---
apiVersion: tokenfactory.dev/v1alpha1
kind: TokenFactory
metadata: {name: chat, namespace: inference}
spec:
  power: {domain: hall}
  models:
  - name: llama
    nim: {image: "nvcr.io/nim/meta/llama:1.8.0"}
    gpusPerReplica: 4
    replicas: {min: 3, max: 3}
"""
FIELDS = {CapSheet: "sheets", GPUNode: "gpu_nodes", Node: "nodes"}


@pytest.mark.parametrize(("kind", "name"), [(CapSheet, "hall"), (GPUNode, "n1"), (Node, "n1")])
def test_nothing_rises_while_something_cannot_be_read(kind: type[Resource], name: str):
    world = SmallWorld()
    for number in range(3):
        world.add_node(f"n{number}")
    world.apply(HALL % "9kW")
    for _ in range(12):
        world.others()
        world.operate()
    world.apply(HALL % "30kW")
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
