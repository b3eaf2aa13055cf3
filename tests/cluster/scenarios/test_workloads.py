"""What becomes of models and their replicas as specs, nodes and rooms change: rollouts, places, drained and lost nodes."""

import json
from collections import Counter

import pytest
from tests.cluster.scenarios.scene import FULL_WATTS, GPUS, IDLE_WATTS, Scene, hall, model, plan

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
]


async def test_a_rollout_replaces_every_replica_within_the_budget(scene: Scene):
    """The limit has room for three replicas at full caps, and for nothing of a fourth."""
    await scene.apply(hall("9.7kW"))
    await scene.apply(scene.factory(model(replicas=3, env="{name: NIM_LOG_LEVEL, value: DEBUG}")))
    await scene.ready()
    await scene.until("full caps", lambda: scene.full("llama", 3))
    before = {pod["metadata"]["uid"] for pod in await scene.serving(3)}
    await scene.apply(scene.factory(model(replicas=3, image="1.9.0")))
    # As somebody waits who rolls out: not before the operator has seen the new spec, and until no old pod serves.
    await scene.mine("wait", "tf/chat", "--for=condition=Updated", "--timeout=120s")
    assert not before & {pod["metadata"]["uid"] for pod in await scene.replicas()}

    async def rolled() -> bool:
        pods = await scene.replicas()
        images = {pod["spec"]["containers"][0]["image"].rsplit(":")[-1] for pod in pods}
        assert len(pods) <= 3, "no surge"
        variables = {each["name"] for pod in pods for each in pod["spec"]["containers"][0]["env"]}
        return len(pods) == 3 and images == {"1.9.0"} and "NIM_LOG_LEVEL" not in variables

    await scene.until("all replicas to run the new image, without the variable that went", rolled)
    await scene.ready()
    await scene.until("full caps again", lambda: scene.full("llama", 3))
    assert not before & {pod["metadata"]["uid"] for pod in await scene.serving(3)}


async def test_a_rollout_in_a_shortage_ends_with_as_many_as_ran_before(scene: Scene):
    """The limit falls so low that two of three replicas would not begin; and another two are asked for in vain."""
    await scene.apply(scene.factory(model(replicas=3)))
    await scene.ready()
    await scene.lower("7.2kW")
    await scene.apply(scene.factory(model(replicas=5)))

    async def waiting() -> bool:
        return len((await scene.status()).get("waiting", [])) == 2

    await scene.until("two to wait", waiting)
    before = {pod["metadata"]["uid"] for pod in await scene.serving(3)}
    await scene.apply(scene.factory(model(replicas=5, image="1.9.0")))
    await scene.mine("wait", "tf/chat", "--for=condition=Updated", "--timeout=120s")
    assert not before & {pod["metadata"]["uid"] for pod in await scene.serving(3)}
    await scene.until("the rollout to be over", waiting)


async def test_a_model_is_added_and_removed(scene: Scene):
    await scene.apply(scene.factory(model("one", replicas=2)))
    await scene.ready()
    await scene.until("full caps", lambda: scene.full("one", 2))
    alone = IDLE_WATTS + 2 * GPUS * (FULL_WATTS - 200)
    kept = {pod["metadata"]["uid"] for pod in await scene.serving(2, model="one")}
    await scene.apply(scene.factory(model("one", replicas=2), model("two", replicas=1)))
    await scene.serving(1, model="two")
    await scene.ready()
    await scene.apply(scene.factory(model("one", replicas=2)))

    async def gone() -> bool:
        there = [
            each["metadata"]["name"]
            for kind in ("deploy", "svc", "pods")
            for each in (await scene.site.get(kind, namespace=scene.namespace))["items"]
        ]
        return not any(name.startswith("chat-two") for name in there)

    await scene.until("everything of the model to be gone", gone)
    await scene.until("its watts to be back", lambda: scene.charged_at_most(alone))
    assert {pod["metadata"]["uid"] for pod in await scene.serving(2, model="one")} == kept


async def test_a_node_joins_is_drained_and_leaves(scene: Scene):
    await scene.apply(scene.factory(model(replicas=8)))
    await scene.ready()
    await scene.site.fleet.add(plan(5, "r1"))
    await scene.apply(scene.factory(model(replicas=9)))
    await scene.serving(9)
    assert scene.drawing() <= 14_000, "the others made room for it"
    there = [pod for pod in await scene.replicas() if pod["spec"]["nodeName"] == "gpu-5"]
    assert len(there) == 1

    await scene.apply(scene.factory(model(replicas=8)))
    await scene.kubectl("cordon", "gpu-5")
    await scene.serving(8)
    await scene.kubectl("drain", "gpu-5", "--ignore-daemonsets", "--force", "--delete-emptydir-data")
    await scene.ready()
    assert "gpu-5" not in {pod["spec"]["nodeName"] for pod in await scene.serving(8)}

    await scene.site.fleet.kill_node("gpu-5")
    await scene.kubectl("delete", "node", "gpu-5")
    lost = await scene.until("the node to be counted as lost", lambda: scene.lost_nodes(1))
    assert lost, "that its Node object is gone proves nothing"
    boot = (await scene.site.get("gn", "gpu-5"))["status"]["bootID"]
    word = {"method": "Person", "by": "test", "at": "2026-11-21T12:00:00Z", "bootID": boot}
    await scene.patch("gn", "gpu-5", {"spec": {"fence": word}}, namespaced=False)
    await scene.until("its watts to be back", lambda: scene.lost_nodes(0))
    await scene.until("its GPUNode to be retired", lambda: scene.no_such_node("gpu-5"))
    await scene.site.fleet.remove("gpu-5")
    assert await scene.condition("tf", "chat", "Ready") == "True"


async def test_somebody_elses_pods_on_gpus_are_charged_and_kept_clear_of(scene: Scene):
    await scene.apply(scene.factory(model(replicas=2)))
    await scene.ready()
    before = await scene.charge("rack-2")
    await scene.mine("run", "stranger", "--image=example.org/train:1", "--overrides", stranger("gpu-4"))

    async def charged() -> bool:
        node = await scene.site.get("gn", "gpu-4")
        classes = Counter(gpu.get("class", "").partition("@")[0] for gpu in node["status"]["gpus"])
        return classes["unmanaged"] == GPUS and await scene.charge("rack-2") >= before + GPUS * 500

    await scene.until("its GPUs to be charged at their default limit", charged)
    await scene.apply(scene.factory(model(replicas=7)))
    await scene.ready()
    everywhere = Counter(pod["spec"]["nodeName"] for pod in await scene.serving(7))
    assert everywhere["gpu-4"] == 1
    await scene.mine("delete", "pod", "stranger")
    await scene.apply(scene.factory(model(replicas=8)))
    await scene.ready()


async def test_a_replica_goes_where_processors_are_left_at_the_first_try(scene: Scene):
    await cores(scene, "1m")
    try:
        await scene.apply(scene.factory(model(replicas=2)))
        await scene.ready()
        assert {pod["spec"]["nodeName"] for pod in await scene.serving(2)} <= {"gpu-3", "gpu-4"}
        await scene.apply(scene.factory(model(replicas=5)))

        async def told() -> bool:
            return "2 without 10m cpu free (gpu-1 has 1m)" in (await scene.verdict("Ready")).get(
                "message", ""
            )

        await scene.until("people to be told which node lacks what", told)
        assert "Replaced" not in {event["reason"] for event in await scene.said("Pod")}
    finally:
        await cores(scene, "64")


async def test_a_node_whose_agent_dies_before_it_obeys_a_charge_keeps_no_pod_waiting(scene: Scene):
    """Its gate will never open there, and nothing has run yet."""
    scene.site.fleet.nodes["gpu-4"].stop_agent(kill=True)
    try:
        await scene.apply(scene.factory(model(replicas=6)))

        async def charged() -> bool:
            return bool((await scene.site.get("gn", "gpu-4"))["spec"].get("pods"))

        await scene.until("pods to be charged there, before its silence is noticed", charged)
        await scene.ready()
        assert "gpu-4" not in {pod["spec"]["nodeName"] for pod in await scene.serving(6)}
        told = [event["note"] for event in await scene.said("Pod") if event["reason"] == "Replaced"]
        assert any("cannot start on gpu-4: its agent fell silent" in note for note in told)
        assert await charged(), "silence earns no credit"
    finally:
        scene.site.fleet.nodes["gpu-4"].start_agent()

    async def free() -> bool:
        return not await charged()

    await scene.until("its charges to end with its agent's word", free)


LOCAL_DISK = """
apiVersion: storage.k8s.io/v1
kind: StorageClass
metadata: {name: local-%(namespace)s}
provisioner: kubernetes.io/no-provisioner
volumeBindingMode: WaitForFirstConsumer
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: disk-%(namespace)s}
spec:
  storageClassName: local-%(namespace)s
  capacity: {storage: 100Gi}
  accessModes: [ReadWriteOnce]
  local: {path: /disk}
  nodeAffinity:
    required: {nodeSelectorTerms: [{matchExpressions: [{key: kubernetes.io/hostname, operator: In, values: [gpu-3]}]}]}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: model-cache, namespace: %(namespace)s}
spec:
  storageClassName: local-%(namespace)s
  accessModes: [ReadWriteOnce]
  resources: {requests: {storage: 100Gi}}
"""


async def test_what_kube_scheduler_does_not_bind_is_placed_elsewhere(scene: Scene):
    """It knows which unbound volume would fit, and we do not; an opened pod cannot be given another node."""
    nodes = ("gpu-2", "gpu-4")
    await scene.apply(LOCAL_DISK % {"namespace": scene.namespace})
    await scene.kubectl("cordon", *nodes)
    try:
        await scene.apply(scene.factory(model(replicas=1) + "\n    checkpoint: {claim: model-cache}"))
        await scene.ready()
        assert [pod["spec"]["nodeName"] for pod in await scene.serving(1)] == ["gpu-3"]
        told = await refusals_told(scene)
        assert any(
            "kube-scheduler does not bind it to gpu-1" in note and "persistent volume" in note
            for note in told
        )
        charged = await scene.site.get("gn")
        pods = {node["metadata"]["name"]: node["spec"].get("pods", []) for node in charged["items"]}
        assert not pods["gpu-1"], "its watts are given back"
        # Now the volume is bound, and we know where it is.
        await scene.kubectl("uncordon", *nodes)
        before = {pod["metadata"]["uid"] for pod in await scene.replicas()}
        await scene.mine("delete", "pod", "--all")

        async def again() -> bool:
            now = await scene.replicas()
            return len(now) == 1 and now[0]["metadata"]["uid"] not in before

        await scene.until("its successor to serve", again)
        assert [pod["spec"]["nodeName"] for pod in await scene.replicas()] == ["gpu-3"]
        assert len(await refusals_told(scene)) == len(told)
    finally:
        await scene.kubectl("uncordon", *nodes)


async def refusals_told(scene: Scene) -> list[str]:
    return [event["note"] for event in await scene.said("Pod") if event["reason"] == "Replaced"]


async def test_the_second_start_of_a_model_prefers_the_node_that_has_its_image(scene: Scene):
    """All else is equal: without it, the first node of the four would get both."""
    rest = ("gpu-1", "gpu-2", "gpu-4")
    once = scene.factory(model(replicas=1, image="2.0.0"))
    await scene.kubectl("cordon", *rest)
    try:
        await scene.apply(once)
        await scene.ready()
    finally:
        await scene.kubectl("uncordon", *rest)
    await scene.mine("delete", "tf", "chat", "--timeout=60s")
    await scene.until("it to be gone", scene.empty)
    await scene.apply(once)
    await scene.ready()
    assert [pod["spec"]["nodeName"] for pod in await scene.serving(1)] == ["gpu-3"]


async def cores(scene: Scene, count: str) -> None:
    """Of the nodes of the first rack."""
    status = json.dumps({"status": {"allocatable": {"cpu": count}}})
    for name in ("gpu-1", "gpu-2"):
        await scene.kubectl("patch", "node", name, "--subresource=status", "--type=merge", "-p", status)


def stranger(node: str) -> str:
    """A pod that tolerates everything and asks for GPUs of that node."""
    resources = {"limits": {"nvidia.com/gpu": str(GPUS)}}
    # The simulated model server, which stands for any program here, keeps its files in `cache`.
    volumes = [{"name": "cache", "emptyDir": {}}]
    return json.dumps(
        {
            "spec": {
                "nodeSelector": {"kubernetes.io/hostname": node},
                "tolerations": [{"operator": "Exists"}],
                "volumes": volumes,
                "containers": [{"name": "train", "image": "example.org/train:1", "resources": resources}],
            }
        }
    )
