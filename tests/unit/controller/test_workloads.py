"""What a model's pods are allowed to be and how they are probed, spread and kept from surging."""

from typing import Any

import msgspec
import pytest
from tests.unit.controller import manifests
from tests.unit.controller.manifests import LLAMA_8B, Manifest
from tests.unit.controller.small_world import OPTIONS as PLAN_OPTIONS
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.actions import ApplyWorkload
from tokenfactory.controller.compose import Composed, compose
from tokenfactory.controller.objects import Deployment
from tokenfactory.controller.plan.memory import Memory
from tokenfactory.controller.snapshot import Snapshot
from tokenfactory.controller.workloads import (
    RESTART_FEATURE,
    WorkloadOptions,
    deployment,
    group_name,
    leader_worker_set,
)
from tokenfactory.kube.objects import KubeCondition, Node

OPTIONS = WorkloadOptions(image="tokenfactory:test")
HALL = manifests.hall("40kW", nodeOverhead=None)


def chat(**model: Any) -> Manifest:
    small = {"image": LLAMA_8B, "gpus": 1, "replicas": None, **model}
    return manifests.factory(manifests.model("small", **small))


def factory(**nim: object) -> TokenFactory:
    image = {"image": "nvcr.io/nim/meta/llama-3.1-8b-instruct:1.8.0"}
    model = {"name": "small", "nim": image | nim, "nodesPerReplica": 2}
    spec = {"power": {"domain": "hall"}, "models": [model]}
    raw = {"metadata": {"name": "chat", "namespace": "inference", "uid": "u"}, "spec": spec}
    return msgspec.convert(raw, TokenFactory)


def pods_of(made: TokenFactory) -> list[dict]:
    model = made.spec.models[0]
    groups = leader_worker_set(made, model, 1, OPTIONS)["spec"]["leaderWorkerTemplate"]
    single = deployment(made, model, 1, OPTIONS)["spec"]["template"]
    return [single["spec"], groups["leaderTemplate"]["spec"], groups["workerTemplate"]["spec"]]


def test_nothing_runs_as_root_unless_its_image_must():
    for pod in pods_of(factory()):
        for container in (*pod["initContainers"], *pod["containers"]):
            assert container["securityContext"]["runAsNonRoot"] is True
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
    for pod in pods_of(factory(runAsRoot=True)):
        assert "runAsNonRoot" not in pod["containers"][0]["securityContext"]
        assert all(init["securityContext"]["runAsNonRoot"] for init in pod["initContainers"])


def test_replicas_are_spread_by_wish_and_never_held_back_by_it():
    for pod in pods_of(factory()):
        spread = {rule["topologyKey"]: rule["whenUnsatisfiable"] for rule in pod["topologySpreadConstraints"]}
        assert spread == {
            "topology.kubernetes.io/zone": "ScheduleAnyway",
            "kubernetes.io/hostname": "ScheduleAnyway",
        }


def test_only_what_answers_requests_is_probed():
    single, leader, worker = (pod["containers"][0] for pod in pods_of(factory()))
    for answering in (single, leader):
        assert (
            answering["startupProbe"]["failureThreshold"] * answering["startupProbe"]["periodSeconds"] >= 1200
        )
        assert answering["readinessProbe"]["httpGet"]["path"] == "/v1/health/ready"
    assert not {"startupProbe", "readinessProbe", "livenessProbe"} & worker.keys()


@pytest.mark.parametrize("make", [deployment, leader_worker_set])
def test_a_rollout_never_needs_watts_for_an_old_and_a_new_replica_at_once(make):
    made = factory()
    spec = make(made, made.spec.models[0], 4, OPTIONS)["spec"]
    rolling = (
        spec.get("strategy", {}).get("rollingUpdate") or spec["rolloutStrategy"]["rollingUpdateConfiguration"]
    )
    assert rolling["maxSurge"] == 0


def test_a_container_that_restarts_goes_through_the_gate_where_the_cluster_can_do_that():
    made = factory()
    model = made.spec.models[0]
    able = msgspec.structs.replace(OPTIONS, restart_through_gate=True)
    container = deployment(made, model, 1, able)["spec"]["template"]["spec"]["containers"][0]
    assert container["restartPolicy"] == "Always"
    (rule,) = container["restartPolicyRules"]
    assert rule == {"action": "RestartAllContainers", "exitCodes": {"operator": "NotIn", "values": []}}
    groups = leader_worker_set(made, model, 1, able)["spec"]["leaderWorkerTemplate"]
    pods = [groups["leaderTemplate"]["spec"], groups["workerTemplate"]["spec"], *pods_of(made)]
    assert not [pod for pod in pods if "restartPolicyRules" in pod["containers"][0]]
    assert groups["restartPolicy"] == "RecreateGroupOnPodRestart"


def env_of(pod: dict) -> dict[str, str]:
    return {each["name"]: each.get("value", "from the pod") for each in pod["containers"][0]["env"]}


def test_the_pods_of_a_group_are_told_of_it_and_what_a_person_says_stands():
    _, leader, worker = map(env_of, pods_of(factory()))
    assert leader["NIM_MULTI_NODE"] == worker["NIM_MULTI_NODE"] == "1"
    assert (leader["NIM_LEADER_ROLE"], worker["NIM_LEADER_ROLE"]) == ("1", "0")
    assert (leader["NIM_TENSOR_PARALLEL_SIZE"], leader["NIM_PIPELINE_PARALLEL_SIZE"]) == ("1", "2")
    assert worker["NIM_NODE_RANK"] == "from the pod"
    split = {"env": [{"name": "NIM_PIPELINE_PARALLEL_SIZE", "value": "1"}]}
    for pod in pods_of(factory(**split))[1:]:
        names = [each["name"] for each in pod["containers"][0]["env"]]
        assert len(names) == len(set(names))
        assert env_of(pod)["NIM_PIPELINE_PARALLEL_SIZE"] == "1"
    assert "NIM_PIPELINE_PARALLEL_SIZE" not in env_of(pods_of(factory(profile="sglang-h100-bf16-tp8-pp2"))[1])


def test_a_group_has_a_name_of_its_own_that_leaves_room_for_what_is_appended():
    made = factory()
    model = made.spec.models[0]
    assert group_name(made, model) == "chat-small-group"
    long = [msgspec.structs.replace(model, name="m" * 20 + last) for last in "ab"]
    wide = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, name="f" * 30))
    both = {group_name(wide, each) for each in long}
    assert len(both) == 2
    assert {len(name) for name in both} == {48}


def test_the_rule_waits_until_every_kubelet_can_follow_it():
    world = SmallWorld()
    world.apply(HALL, chat())
    for name in ("new", "old"):
        world.add_node(name)
    options = msgspec.structs.replace(
        PLAN_OPTIONS, workloads=msgspec.structs.replace(OPTIONS, restart_through_gate=True)
    )

    def rules() -> set[bool]:
        plan = compose(world.snapshot(), options, Memory()).plan
        made = [
            each.manifest["spec"]
            for each in plan.actions
            if isinstance(each, ApplyWorkload) and each.kind is Deployment
        ]
        assert made
        return {"restartPolicyRules" in each["template"]["spec"]["containers"][0] for each in made}

    declare(world, "new")
    assert rules() == {False}
    declare(world, "old")
    assert rules() == {True}


class Ruling(SmallWorld):
    """Its API server knows the rule for restarts."""

    def plan_of(self, snapshot: Snapshot) -> Composed:
        options = msgspec.structs.replace(OPTIONS, restart_through_gate=self.knows)
        return compose(snapshot, msgspec.structs.replace(PLAN_OPTIONS, workloads=options), self.memory)

    knows = True

    def ruled(self) -> bool:
        (made,) = self.objects[Deployment].values()
        return "restartPolicyRules" in made.spec["template"]["spec"]["containers"][0]


def not_ready(world: SmallWorld, name: str) -> None:
    node = world.objects[Node]["", name]
    down = KubeCondition(type="Ready", status="False")
    world.put(msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, conditions=(down,))))


@pytest.mark.parametrize("ruled", [True, False])
def test_nodes_that_come_and_go_start_no_model_anew(ruled: bool):
    world = Ruling()
    world.apply(HALL, chat())
    for name in ("new", "old"):
        world.add_node(name)
        declare(world, name, able=ruled or name == "new")
    world.settle()
    pods = {pod.metadata.uid for pod in world.ready_pods()}
    assert pods
    assert world.ruled() is ruled
    if ruled:
        world.add_node("older")
        declare(world, "older", able=False)
    else:
        not_ready(world, "old")
    world.settle()
    world.knows = not ruled
    world.settle()
    assert {pod.metadata.uid for pod in world.ready_pods()} == pods
    world.knows = True
    world.apply(chat(tag="1.9.0"))
    declare(world, "old")
    world.objects[Node].pop(("", "older"), None)
    world.agents.pop("older", None)
    world.settle()
    assert world.ruled(), "with its next change it is as it would be made now"


def test_the_rule_goes_where_no_kubelet_can_follow_it():
    world = Ruling()
    world.apply(HALL, chat())
    world.others()
    world.operate()
    assert world.ruled(), "nothing speaks against it yet"
    world.add_node("old")
    declare(world, "old", able=False)
    world.settle()
    assert not world.ruled()
    assert world.ready_pods()


def test_a_pod_with_the_rule_is_offered_no_node_whose_kubelet_lacks_it():
    """kube-scheduler would refuse it there, and each refusal costs a pod, a charge and ten seconds."""
    world = Ruling()
    world.apply(HALL, chat())
    world.add_node("new", gpus=1)
    declare(world, "new")
    world.settle()
    assert world.ruled()
    world.add_node("old")
    declare(world, "old", able=False)
    world.apply(chat(replicas=(2, 2)))
    world.settle()
    assert {pod.spec.node_name for pod in world.ready_pods()} == {"new"}
    (factory,) = world.objects[TokenFactory].values()
    (wait,) = factory.status.waiting
    assert f"1 whose kubelet does not declare {RESTART_FEATURE}" in wait.message
    declare(world, "old")
    world.settle()
    assert {pod.spec.node_name for pod in world.ready_pods()} == {"new", "old"}


def declare(world: SmallWorld, name: str, *, able: bool = True) -> None:
    node = world.objects[Node]["", name]
    status = msgspec.structs.replace(node.status, declared_features=(RESTART_FEATURE,) if able else ())
    world.put(msgspec.structs.replace(node, status=status))
