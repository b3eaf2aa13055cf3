"""What an unplaced pod is told: one reason, and each node counted once under what stops it."""

import pytest
from tests.unit.planning.placement.builders import node, pod, snapshot

from tokenfactory.planning.placement.inputs import Requirement, Taint, Volume
from tokenfactory.planning.placement.plan import plan_placement

TOLD = {
    "GPUs and a rack": (
        [node(f"a{i}", free_gpus=3) for i in range(8)]
        + [node(f"b{i}", path=("site", "rack-a07")) for i in range(4)],
        pod(),
        "InsufficientPower",
        "0/12 nodes: 8 without 4 free GPUs, 4 in rack-a07 need 1.2kW more",
    ),
    "closed nodes": (
        [node("a", closed="cordoned"), node("b", closed="cordoned"), node("c", closed="silent")],
        pod(),
        "NodesClosed",
        "0/3 nodes: 2 cordoned, 1 silent",
    ),
    "selector and taint": (
        [node("a"), node("b", labels={"pool": "x"}, taints=(Taint("gpu", "batch"),))],
        pod(selector={"pool": "x"}),
        "UntoleratedTaint",
        "0/2 nodes: 1 not matched by its node selector or affinity, 1 with taint gpu=batch that it does not tolerate",
    ),
    "grants": (
        [node("a")],
        pod(refused={"site": "no grant for namespace team above band 50"}),
        "NotAdmitted",
        "0/1 nodes: 1 in site, which does not admit it: no grant for namespace team above band 50",
    ),
    "product": (
        [node("a", product="L4")],
        pod(),
        "ProductCannotServe",
        "0/1 nodes: 1 with L4, which cannot serve team/chat/llama",
    ),
    "refusal and CPU": (
        [node("a"), node("b", free={"cpu": 10})],
        pod(not_on={"a": "no free ports", "gone": ""}, resources={"cpu": 4_000}),
        "InsufficientResources",
        "0/2 nodes: 1 refused before by kube-scheduler (no free ports), 1 without 4 cpu free (b has 10m)",
    ),
    "several resources": (
        [
            node("a", free={"cpu": 2_000, "memory": 64 << 30}),
            node("b", free={"cpu": 500, "memory": 64 << 30}),
            node("c", free={"cpu": 9_000, "memory": 3 << 29, "example.com/nic": 0}),
            node("d", free={"cpu": 9_000, "memory": 64 << 30, "example.com/nic": 0}),
        ],
        pod(resources={"cpu": 8_000, "memory": 32 << 30, "example.com/nic": 1}),
        "InsufficientResources",
        "0/4 nodes: 2 without 8 cpu free (a has 2), 2 without 1 example.com/nic free (c has 0)",
    ),
    "bytes": (
        [node("a", free={"memory": 3 << 29})],
        pod(resources={"memory": 32 << 30}),
        "InsufficientResources",
        "0/1 nodes: 1 without 32Gi memory free (a has 1.5Gi)",
    ),
    "a volume on a node's own disk": (
        [node("a", labels={"name": "a"}), node("b", labels={"name": "b"}, free_gpus=0)],
        pod(volumes=(Volume("cache", ((Requirement("name", "In", ("b",)),),)),)),
        "InsufficientGPUs",
        "0/2 nodes: 1 that the volume of claim cache cannot be reached from, 1 without 4 free GPUs",
    ),
    "old kubelets": (
        [node("a", features=frozenset({"x"})), node("b"), node("c", closed="fenced")],
        pod(features=frozenset({"x", "y"})),
        "KubeletTooOld",
        "0/3 nodes: 1 fenced, 1 whose kubelet does not declare x, y, 1 whose kubelet does not declare y",
    ),
    "many short limits": (
        [node(f"n{i}", path=(f"rack-{i}",)) for i in range(6)],
        pod(),
        "InsufficientPower",
        (
            "0/6 nodes: 1 in rack-0 need 1.5kW more, 1 in rack-1 need 1.5kW more, 1 in rack-2 need 1.5kW more, "
            "1 in rack-3 need 1.5kW more, 2 in 2 other limits need 1.5kW or more"
        ),
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_told(case: str) -> None:
    nodes, asked, reason, message = TOLD[case]
    racks = {f"rack_{i}": 500 for i in range(6)}
    plan = plan_placement(snapshot(nodes, [asked], site=9_000, rack_a07=800, **racks))
    assert [(u.reason, u.message) for u in plan.unplaced] == [(reason, message)]


def test_the_watts_told_are_enough() -> None:
    """Whoever adds what the message asks for gets the pod placed."""
    short = plan_placement(snapshot([node("a")], [pod()], site=1_234))
    assert short.unplaced[0].message.endswith("need 766W more")
    assert plan_placement(snapshot([node("a")], [pod()], site=1_234 + 766)).placed
