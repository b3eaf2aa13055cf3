"""The first choice of a node is one that kube-scheduler takes: resources, affinities, taints, claims, other pods."""

from dataclasses import replace
from typing import Any

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import OPTIONS, SmallWorld
from tests.unit.controller.test_elsewhere import site

from tokenfactory.api import names
from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.actor import narrowed
from tokenfactory.controller.plan.at_hand import AtHand, image_of, loads
from tokenfactory.controller.plan.leftovers import asked
from tokenfactory.controller.plan.world import see
from tokenfactory.kube.objects import Namespace, Node, NodeImage, Pod, PodSpec, Taint


def cached(replicas: int = 1) -> Manifest:
    return factory(model(replicas=(replicas, replicas), checkpoint={"claim": "model-cache"}))


def a_pod(name: str, spec: dict[str, Any], namespace: str = "web", **labels: str) -> Pod:
    meta = {"name": name, "namespace": namespace, "uid": f"uid-{name}", "labels": labels}
    return msgspec.convert({"metadata": meta, "spec": spec, "status": {"phase": "Running"}}, Pod)


def asking(cpu: str = "", memory: str = "", **more: Any) -> dict[str, Any]:
    requests = {name: amount for name, amount in (("cpu", cpu), ("memory", memory)) if amount}
    return {"containers": [{"name": "c", "resources": {"requests": requests}}], **more}


def webhook(world: SmallWorld, **changes: Any) -> None:
    """Somebody's admission adds to the spec of our pods."""

    def admit(pod: Pod) -> Pod:
        spec = msgspec.to_builtins(pod.spec)
        for key, value in changes.items():
            spec[key] = [*spec.get(key, ()), *value] if isinstance(value, list) else value
        return msgspec.structs.replace(pod, spec=msgspec.convert(spec, PodSpec))

    world.webhook = admit


def change_node(world: SmallWorld, name: str, **changes: Any) -> None:
    held = world.objects[Node]["", name]
    world.put(msgspec.structs.replace(held, status=msgspec.structs.replace(held.status, **changes)))


def offer(world: SmallWorld, **amounts: str) -> None:
    for (_, name), held in list(world.objects[Node].items()):
        change_node(world, name, allocatable={**held.status.allocatable, **amounts})


def ours(world: SmallWorld) -> list[Pod]:
    return [pod for pod in world.ready_pods() if pod.metadata.namespace == "inference"]


def where(world: SmallWorld) -> set[str]:
    return {pod.spec.node_name for pod in ours(world)}


def replaced(world: SmallWorld) -> list[act.DeletePod]:
    return [each for each in world.writes if isinstance(each, act.DeletePod)]


def why(world: SmallWorld) -> tuple[str, str]:
    conditions = world.objects[TokenFactory]["inference", "chat"].status.conditions
    ready = next(each for each in conditions if each.type == "Ready")
    return ready.reason, ready.message


# --- what nodes have left


def test_a_replica_goes_where_processors_and_memory_are_left_at_the_first_try():
    world = site()
    offer(world, cpu="16", memory="64Gi", pods="110")
    sidecar = {"name": "proxy", "resources": {"requests": {"cpu": "4", "memory": "8Gi"}}}
    webhook(world, containers=[sidecar])
    world.put(a_pod("busy", asking("13", nodeName="n0")))
    world.put(a_pod("large", asking(memory="60Gi", nodeName="n1")))
    world.settle()
    assert where(world) == {"n2"}
    assert not replaced(world)


def test_pods_that_have_ended_hold_nothing_and_evictions_for_others_hold_a_place():
    world = site(2)
    offer(world, cpu="4")
    webhook(world, containers=[{"name": "proxy", "resources": {"requests": {"cpu": "3"}}}])
    done = a_pod("done", asking("4", nodeName="n0"))
    world.put(msgspec.structs.replace(done, status=msgspec.structs.replace(done.status, phase="Succeeded")))
    coming = a_pod("coming", asking("4"))
    status = msgspec.structs.replace(coming.status, phase="Pending", nominated_node_name="n1")
    world.put(msgspec.structs.replace(coming, status=status))
    world.settle()
    assert where(world) == {"n0"}


def test_granted_replicas_count_before_they_are_bound():
    world = site(1)
    offer(world, cpu="4")
    webhook(world, containers=[{"name": "proxy", "resources": {"requests": {"cpu": "3"}}}])
    world.settle()
    assert len(ours(world)) == 1
    assert why(world)[0] == "InsufficientResources"
    assert "1 without 3 cpu free (n0 has 1)" in why(world)[1]


def test_the_pod_is_told_in_an_event_what_is_missing():
    world = site(2)
    offer(world, **{"rdma/nic": "0"})
    webhook(world, containers=[{"name": "net", "resources": {"requests": {"rdma/nic": "1"}}}])
    world.settle()
    assert ("InsufficientResources", "0/2 nodes: 2 without 1 rdma/nic free (n0 has 0)") in world.events
    assert not replaced(world)


def test_a_node_without_a_resource_has_none_of_it():
    world = site(2)
    change_node(world, "n1", allocatable={names.GPU_RESOURCE: "8", "rdma/nic": "4"})
    webhook(world, containers=[{"name": "net", "resources": {"requests": {"rdma/nic": "1"}}}])
    world.settle()
    assert where(world) == {"n1"}


def container(cpu: str, **more: Any) -> dict[str, Any]:
    return {"name": "c", "resources": {"requests": {"cpu": cpu}}, **more}


@pytest.mark.parametrize(
    ("spec", "cpu"),
    [
        ({"containers": [container("2"), container("500m")]}, 2_500),
        ({"containers": [container("2")], "initContainers": [container("3"), container("1")]}, 3_000),
        ({"containers": [container("2")],
          "initContainers": [container("1", restartPolicy="Always"), container("3")]}, 4_000),
        ({"containers": [container("4")],
          "initContainers": [container("1", restartPolicy="Always"), container("3")]}, 5_000),
        ({"containers": [container("2")],
          "initContainers": [container("3"), container("2", restartPolicy="Always")]}, 4_000),
        ({"containers": [container("2")], "overhead": {"cpu": "250m"}}, 2_250),
        ({"containers": [container("2")], "resources": {"requests": {"cpu": "6"}}}, 6_000),
    ],
    ids=["its containers together", "an init container that asks for more", "one that runs beside a sidecar",
         "its containers beside a sidecar", "a sidecar that starts later", "its overhead", "a pod that says it as a whole"],
)  # fmt: skip
def test_a_pod_asks_for_the_most_that_runs_at_a_time(spec: dict[str, Any], cpu: int):
    assert asked(msgspec.convert(spec, PodSpec)) == {"pods": 1, "cpu": cpu}


# --- what a pod says of its node


def in_json(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))


def test_tolerations_and_node_affinity_count_as_the_pod_has_them():
    world = site(3)
    for name, value in (("n0", "old"), ("n1", "new"), ("n2", "new")):
        world.label_node(name, generation=value)
    terms = [{"matchExpressions": [{"key": "generation", "operator": "In", "values": ["new"]}],
              "matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["n1"]}]}]  # fmt: skip
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}
    webhook(
        world, affinity={"nodeAffinity": required}, tolerations=[{"key": "dedicated", "operator": "Exists"}]
    )
    tainted = world.objects[Node]["", "n2"]
    taints = (Taint(key="dedicated", value="x", effect="NoSchedule"),)
    world.put(msgspec.structs.replace(tainted, spec=msgspec.structs.replace(tainted.spec, taints=taints)))
    world.settle()
    assert where(world) == {"n2"}
    opened = in_json(narrowed(next(iter(world.objects[Pod].values())), "n2"))
    assert opened == [{**terms[0], "matchFields": [
        *terms[0]["matchFields"], {"key": "metadata.name", "operator": "In", "values": ["n2"]}]}]  # fmt: skip


def test_a_pod_without_affinity_is_narrowed_to_its_node():
    assert in_json(narrowed(a_pod("x", asking()), "n1")) == [
        {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}
    ]


# --- other pods


def against(**labels: str) -> dict[str, Any]:
    term = {"topologyKey": "zone", "labelSelector": {"matchLabels": labels}, "namespaceSelector": {}}
    return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}


def in_zones(world: SmallWorld) -> None:
    """n0 and a machine without GPUs in zone a, the others in zone b."""
    for (_, name), _held in list(world.objects[Node].items()):
        world.label_node(name, zone="a" if name == "n0" else "b")
    world.put(Node(metadata=ObjectMeta(name="cpu-1", labels={"zone": "a"})))


def test_a_strangers_pod_that_stands_apart_from_ours_is_left_alone():
    world = site(3)
    in_zones(world)
    shy = asking(nodeName="cpu-1", affinity=against(**{names.MODEL_LABEL: "llama"}))
    world.put(a_pod("shy", shy))
    world.settle()
    assert len(ours(world)) == 2
    assert "n0" not in where(world)
    world.cordon("n1")
    world.cordon("n2")
    world.delete_pod(ours(world)[0])
    world.settle()
    assert why(world)[0] == "PodAntiAffinity"
    assert "pods that stand apart from pods of namespaces with any labels" in why(world)[1]
    assert "(not the same zone)" in why(world)[1]


@pytest.mark.parametrize(
    ("labels", "more"),
    [({"app": "other"}, {"namespaceSelector": {}}), ({names.MODEL_LABEL: "llama"}, {})],
    ids=["other pods", "pods of its own namespace"],
)
def test_a_strangers_pod_that_stands_apart_from_others_is_no_matter(
    labels: dict[str, str], more: dict[str, Any]
):
    world = site(1)
    in_zones(world)
    term = {"topologyKey": "zone", "labelSelector": {"matchLabels": labels}, **more}
    shy = {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    world.put(a_pod("shy", asking(nodeName="cpu-1", affinity=shy)))
    world.settle()
    assert where(world) == {"n0"}


def test_affinity_is_to_pods_of_the_named_namespaces():
    world = site(3)
    in_zones(world)
    world.put(Namespace(metadata=ObjectMeta(name="web", labels={"team": "web"})))
    term = {"topologyKey": "zone", "labelSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]},
            "namespaceSelector": {"matchLabels": {"team": "web"}}}  # fmt: skip
    near = {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}
    webhook(world, affinity=near)
    world.put(a_pod("other", asking(nodeName="n1"), "elsewhere", app="db"))
    world.settle()
    assert not where(world)
    assert why(world)[0] == "PodAffinity"
    world.put(a_pod("db", asking(nodeName="cpu-1"), app="db"))
    world.settle()
    assert where(world) == {"n0"}


def test_a_hard_spread_of_the_pod_is_kept():
    world = site(3)
    in_zones(world)
    for name in ("n1", "n2"):
        world.cordon(name)
    constraint = {"topologyKey": "zone", "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule",
                  "labelSelector": {"matchLabels": {names.MODEL_LABEL: "llama"}}}  # fmt: skip
    webhook(world, topologySpreadConstraints=[constraint])
    world.settle()
    assert len(ours(world)) == 1
    assert why(world)[0] == "SpreadNotPossible"


# --- claims


def with_cache(nodes: int = 3) -> SmallWorld:
    world = site(nodes)
    world.apply(cached())
    return world


def test_a_claim_that_is_missing_is_named_and_nothing_is_charged_for_it():
    world = with_cache()
    world.settle()
    assert not ours(world)
    assert why(world)[0] == "ClaimMissing"
    assert "no PersistentVolumeClaim model-cache in namespace inference" in why(world)[1]
    assert not [each for each in world.writes if isinstance(each, act.OpenGate)]
    world.claim()
    world.settle()
    assert len(ours(world)) == 1


def test_a_volume_on_a_nodes_own_disk_calls_its_pods_there():
    world = with_cache()
    world.claim(node="n2")
    world.settle()
    assert where(world) == {"n2"}
    world.cordon("n2")
    world.delete_pod(ours(world)[0])
    world.settle()
    assert why(world)[0] == "VolumeOutOfReach"
    assert "2 that the volume of claim model-cache cannot be reached from" in why(world)[1]


def test_a_volume_for_one_node_at_a_time_keeps_its_pods_together():
    world = with_cache()
    world.apply(cached(3))
    world.claim(modes=("ReadWriteOnce",))
    world.settle()
    assert len(ours(world)) == 2
    assert len(where(world)) == 1, "four GPUs each, and eight to a node"
    assert why(world)[0] == "PodAffinity"
    assert "not with pods with claim inference/model-cache (same node name)" in why(world)[1]


def test_a_dead_node_keeps_no_volume():
    world = with_cache()
    world.claim(modes=("ReadWriteOnce",))
    world.settle()
    (dead,) = where(world)
    world.agents[dead].alive = False
    for _ in range(30):
        world.others()
        world.operate()
    assert where(world) - {dead}, "its replacement serves elsewhere"


# --- what is at hand


@pytest.mark.parametrize(
    ("text", "image"),
    [
        ("nvcr.io/nim/meta/llama:1.8.0", "nvcr.io/nim/meta/llama:1.8.0"),
        ("nvcr.io/nim/meta/llama:1.8.0@sha256:ab", "nvcr.io/nim/meta/llama@sha256:ab"),
        ("localhost:5000/llama", "localhost:5000/llama:latest"),
        ("localhost/llama:1", "localhost/llama:1"),
        ("nim/llama:1", "docker.io/nim/llama:1"),
        ("llama:1", "docker.io/library/llama:1"),
    ],
)
def test_an_image_is_named_as_kubelets_name_it(text: str, image: str):
    assert image_of(text) == image


def test_the_second_start_of_a_model_prefers_the_node_that_has_its_image():
    image = NodeImage(names=("nvcr.io/nim/meta/llama@sha256:ab", "nvcr.io/nim/meta/llama:1.8.0"))
    for lucky in ("n0", "n1", "n2"):
        world = site()
        world.apply(factory(model()))
        change_node(world, lucky, images=(image,))
        world.settle()
        assert where(world) == {lucky}, "all else is equal"


H100 = "NVIDIA H100 80GB HBM3"


@pytest.mark.parametrize(
    ("product", "claim_name", "phase", "there"),
    [
        (H100, "model-cache", "Ready", True),
        ("", "model-cache", "Verified", True),
        ("NVIDIA B200", "model-cache", "Ready", False),
        (H100, "former-cache", "Ready", False),
        (H100, "model-cache", "Corrupt", False),
    ],
)
def test_a_cache_is_at_hand_where_it_can_be_restored(product: str, claim_name: str, phase: str, there: bool):
    world = with_cache(1)
    world.settle()
    spec = {"factory": "chat", "model": "llama", "strategy": "WarmCache", "digest": f"sha256:{'a' * 64}",
            "sizeBytes": 1, "identity": {"gpuProduct": product}, "location": {"claim": claim_name, "path": "x"}}  # fmt: skip
    saved = {"metadata": {"name": "c", "namespace": "inference"}, "spec": spec, "status": {"phase": phase}}
    checkpoints = {("inference", "c"): msgspec.convert(saved, Checkpoint)}
    seen = see(replace(world.snapshot(), checkpoints=checkpoints), OPTIONS.workloads)
    assert seen.replicas
    found = AtHand(seen, seen.replicas).on(seen.hosts["n0"])
    assert found == (loads(seen.replicas[0]) - {"nvcr.io/nim/meta/llama:1.8.0"} if there else frozenset())


@pytest.mark.parametrize("resource", ["cpu", "memory"])
def test_a_strangers_pod_that_asks_for_more_than_there_can_be_hinders_nobody(resource: str):
    world = SmallWorld.of(3, hall("60kW"), factory(model(gpus=8, replicas=(1, 1))))
    offer(world, cpu="64", memory="512Gi")
    world.settle()
    requests = {resource: "9223372036854775807"}
    for number in range(20):
        spec = {"nodeName": "n2", "containers": [{"name": "c", "resources": {"requests": requests}}]}
        world.put(a_pod(f"greedy-{number}", spec))
    world.apply(factory(model(gpus=8, replicas=(2, 2))))
    world.live(60)
    assert len(ours(world)) == 2
