"""What a model's pods are allowed to be and how they are probed, spread and kept from surging."""

import msgspec
import pytest

from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.workloads import WorkloadOptions, deployment, leader_worker_set

OPTIONS = WorkloadOptions(image="tokenfactory:test")


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
