"""What people, nodes and other programs do to a running factory."""

import asyncio
import itertools
import json
import subprocess
from collections import Counter
from typing import Any

import pytest
from tests.cluster.scenarios.scene import FULL_WATTS, IDLE_WATTS, OPERATOR, Scene, hall, model, plan

from tokenfactory.api.cap_sheet import renewal_name

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
]
GPUS = 2
LEASE = "tokenfactory-operator"


async def test_a_rollout_replaces_every_replica_within_the_budget(scene: Scene):
    """The limit has room for three replicas at full caps, and for nothing of a fourth."""
    await scene.apply(hall("9.7kW"))
    await scene.apply(scene.factory(model(replicas=3, env="{name: NIM_LOG_LEVEL, value: DEBUG}")))
    await scene.ready()
    await scene.until("full caps", lambda: full(scene, "llama", 3))
    before = {pod["metadata"]["uid"] for pod in await scene.serving(3)}
    await scene.apply(scene.factory(model(replicas=3, image="1.9.0")))

    async def rolled() -> bool:
        pods = await scene.replicas()
        images = {pod["spec"]["containers"][0]["image"].rsplit(":")[-1] for pod in pods}
        assert len(pods) <= 3, "no surge"
        variables = {each["name"] for pod in pods for each in pod["spec"]["containers"][0]["env"]}
        return len(pods) == 3 and images == {"1.9.0"} and "NIM_LOG_LEVEL" not in variables

    await scene.until("all replicas to run the new image, without the variable that went", rolled)
    await scene.ready()
    await scene.until("full caps again", lambda: full(scene, "llama", 3))
    assert not before & {pod["metadata"]["uid"] for pod in await scene.serving(3)}


async def test_a_model_is_added_and_removed(scene: Scene):
    await scene.apply(scene.factory(model("one", replicas=2)))
    await scene.ready()
    await scene.until("full caps", lambda: full(scene, "one", 2))
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
    await scene.until("its watts to be back", lambda: charged_at_most(scene, alone))
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
    lost = await scene.until("the node to be counted as lost", lambda: lost_nodes(scene, 1))
    assert lost, "that its Node object is gone proves nothing"
    boot = (await scene.site.get("gn", "gpu-5"))["status"]["bootID"]
    word = {"method": "Person", "by": "test", "at": "2026-11-21T12:00:00Z", "bootID": boot}
    await scene.patch("gn", "gpu-5", {"spec": {"fence": word}}, namespaced=False)
    await scene.until("its watts to be back", lambda: lost_nodes(scene, 0))
    await scene.until("its GPUNode to be retired", lambda: no_such_node(scene, "gpu-5"))
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


async def test_what_is_not_the_factorys_is_never_touched_and_what_it_left_is_taken_up_again(scene: Scene):
    await scene.mine("create", "deployment", "chat-llama", "--image=example.org/theirs:1", "--replicas=0")
    theirs = await deployment(scene, "chat-llama")
    await scene.apply(scene.factory(model(), model("mine", replicas=2)))

    async def told() -> bool:
        return (await scene.verdict("Ready")).get("reason") == "NameTaken"

    await scene.until("the factory to say that the name is taken", told)
    assert "Deployment chat-llama is there" in (await scene.verdict("Ready"))["message"]
    await scene.apply(scene.factory(model("mine", replicas=2)))
    await scene.ready()
    before = {pod["metadata"]["uid"] for pod in await scene.serving(2, model="mine")}

    await scene.mine("delete", "tf", "chat", "--cascade=orphan", "--timeout=60s")
    left = await deployment(scene, "chat-mine")
    assert "ownerReferences" not in left["metadata"]
    await scene.apply(scene.factory(model("mine", replicas=2)))
    await scene.ready()
    uid = (await scene.site.get("tf", "chat", namespace=scene.namespace))["metadata"]["uid"]
    owners = (await deployment(scene, "chat-mine"))["metadata"]["ownerReferences"]
    assert [owner["uid"] for owner in owners] == [uid]
    assert {pod["metadata"]["uid"] for pod in await scene.serving(2, model="mine")} == before
    await scene.mine("delete", "tf", "chat", "--timeout=60s")
    still = await deployment(scene, "chat-llama")
    assert still["spec"] == theirs["spec"]
    assert (still["metadata"]["uid"], still["metadata"].get("labels")) == (
        theirs["metadata"]["uid"],
        theirs["metadata"].get("labels"),
    )


async def deployment(scene: Scene, name: str) -> dict[str, Any]:
    found: dict[str, Any] = await scene.site.get("deploy", name, namespace=scene.namespace)
    return found


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


async def test_what_others_write_stays_and_what_is_ours_is_put_right(scene: Scene):
    await scene.apply(scene.factory(model(replicas=2)))
    await scene.ready()
    await scene.mine("label", "deploy", "chat-llama", "cost-center=42")
    await scene.mine("annotate", "deploy", "chat-llama", "example.org/note=theirs")
    await scene.mine("label", "tf", "chat", "cost-center=42")
    await scene.mine("scale", "deploy", "chat-llama", "--replicas=5")
    await scene.patch("svc", "chat-llama", {"spec": {"selector": {"tokenfactory.dev/model": "other"}}})
    await scene.mine("set", "image", "deploy/chat-llama", "nim=example.org/other:1")

    async def right() -> bool:
        held = await scene.site.get("deploy", "chat-llama", namespace=scene.namespace)
        front = await scene.site.get("svc", "chat-llama", namespace=scene.namespace)
        image = held["spec"]["template"]["spec"]["containers"][0]["image"]
        return (
            held["spec"]["replicas"] == 2
            and image.endswith("llama-3.1-8b-instruct:1.8.0")
            and front["spec"]["selector"]["tokenfactory.dev/model"] == "llama"
        )

    await scene.until("what is ours to be as the factory says", right)
    await scene.ready()
    held = await scene.site.get("deploy", "chat-llama", namespace=scene.namespace)
    assert held["metadata"]["labels"]["cost-center"] == "42"
    assert held["metadata"]["annotations"]["example.org/note"] == "theirs"
    assert (await scene.site.get("tf", "chat", namespace=scene.namespace))["metadata"]["labels"][
        "cost-center"
    ] == "42"


async def test_whoever_writes_between_every_look_and_write_of_ours_delays_it_and_no_more(scene: Scene):
    """Somebody changes every GPUNode, pod and factory all the time, so that writes over what was seen are refused."""
    log = scene.site.folder / "operator.log"
    refused = log.read_text().count("write refused")
    stop = asyncio.Event()
    busybody = asyncio.create_task(annotate(scene, stop))
    try:
        await scene.apply(scene.factory(model(replicas=3)))
        await scene.ready()
        await scene.apply(scene.factory(model(replicas=1, image="1.9.0")))
        await scene.ready()
    finally:
        stop.set()
        await busybody
    assert log.read_text().count("write refused") > refused, "nobody was in the way of anybody"
    pods = await scene.serving(1)
    assert pods[0]["spec"]["containers"][0]["image"].endswith(":1.9.0")
    factory = await scene.site.get("tf", "chat", namespace=scene.namespace)
    assert int(factory["metadata"]["annotations"]["example.org/count"]) > 3


async def annotate(scene: Scene, stop: asyncio.Event) -> None:
    """One after the other, without a pause."""
    request, ours = scene.site.cluster.request, "/apis/tokenfactory.dev/v1alpha1"
    for count in itertools.count(1):
        pods = await scene.site.get("pods", namespace=scene.namespace)
        paths = [f"{ours}/gpunodes/gpu-{number}" for number in range(1, 5)]
        paths.append(f"{ours}/namespaces/{scene.namespace}/tokenfactories/chat")
        paths += [
            f"/api/v1/namespaces/{scene.namespace}/pods/{pod['metadata']['name']}" for pod in pods["items"]
        ]
        for path in paths:
            if stop.is_set():
                return
            change = {"metadata": {"annotations": {"example.org/count": str(count)}}}
            await asyncio.to_thread(request, "PATCH", path, change)


async def test_a_settled_factory_costs_no_write_but_leases_and_renewals(scene: Scene):
    await scene.apply(scene.factory(model(replicas=2)))
    await scene.ready()
    await scene.until("everything to be at rest", lambda: at_rest(scene, 12))
    before, sheets = writes(scene), await versions(scene)
    renewed = (await scene.site.get("sheet", renewal_name("hall")))["metadata"]["generation"]

    async def two_renewals() -> bool:
        return (await scene.site.get("sheet", renewal_name("hall")))["metadata"]["generation"] >= renewed + 2

    await scene.until("two renewals", two_renewals)
    done = writes(scene) - before
    assert set(done) <= {("update", "leases"), ("update", "capsheets"), ("patch", "leases")}, done
    assert await versions(scene) == sheets


async def test_edits_all_along_end_as_the_last_one_says(scene: Scene):
    for number in range(8):
        band, image = 10 * number, f"1.{number}.0"
        await scene.apply(scene.factory(model(replicas=1 + number % 4, band=band, image=image)))
        await scene.limit(f"{9 + number % 3}kW")
    await scene.limit("14kW")
    await scene.apply(scene.factory(model(replicas=2, image="2.0.0")))
    await scene.ready()
    pods = await scene.serving(2)
    assert {pod["spec"]["containers"][0]["image"].rsplit(":")[-1] for pod in pods} == {"2.0.0"}


async def test_a_deleted_factory_drains_and_gives_its_watts_back(scene: Scene):
    await scene.apply(scene.factory(model(replicas=4)))
    await scene.until("full caps", lambda: full(scene, "llama", 4))
    await scene.until("its charge to be told", lambda: charged_at_least(scene, IDLE_WATTS + 3000))
    await scene.mine("delete", "tf", "chat", "--timeout=120s")
    await scene.until("its watts to be back", lambda: charged_at_most(scene, IDLE_WATTS))
    await scene.mine("delete", "pvc,svc,deploy", "--all")
    await scene.kubectl("delete", "namespace", scene.namespace, "--timeout=120s")


async def test_a_second_operator_takes_over_from_one_that_dies_and_from_one_that_leaves(scene: Scene):
    await scene.apply(scene.factory(model(replicas=2)))
    await scene.ready()
    log = scene.site.folder / "operator.log"
    begun = log.read_text().count("everything is listed")
    leader, before = await holder(scene), await terms(scene)
    first = another(scene)
    turns = log.read_text().count("waiting for the leadership")

    async def waits() -> bool:
        return log.read_text().count("waiting for the leadership") > turns

    await scene.until("the second operator to wait for its turn", waits)
    await scene.apply(scene.factory(model(replicas=3)))
    await scene.serving(3)
    assert await holder(scene) == leader
    assert log.read_text().count("everything is listed") == begun, "it looks at nothing before it leads"

    first.kill()
    await asyncio.to_thread(first.wait, 20)
    await scene.apply(scene.factory(model(replicas=4)))
    await scene.serving(4)
    await scene.ready()
    assert await holder(scene) != leader
    crashed = await terms(scene)
    assert all(crashed[name] > term for name, term in before.items()), (
        "nobody knows what the dead one still wrote"
    )

    leader, turns = await holder(scene), log.read_text().count("waiting for the leadership")
    second = another(scene)
    await scene.until("the third operator to wait for its turn", waits)
    second.terminate()
    await asyncio.to_thread(second.wait, 20)
    assert second.returncode == 0

    async def led() -> bool:
        return await holder(scene) not in {"", leader}

    await scene.until("the third operator to lead", led, 4.0)
    assert await terms(scene) == crashed, "the one that left said that all of its writes had ended"
    await scene.apply(scene.factory(model(replicas=1)))
    await scene.serving(1)
    await scene.ready()


async def holder(scene: Scene) -> str:
    found = await scene.kubectl("-n", "tokenfactory-system", "get", "lease", LEASE, "-o", "json")
    lease = json.loads(found)
    return str(lease["spec"].get("holderIdentity", ""))


async def terms(scene: Scene) -> dict[str, int]:
    """Under which leadership each node's charge was written last."""
    nodes = await scene.site.get("gn")
    return {node["metadata"]["name"]: node["spec"].get("term", 0) for node in nodes["items"]}


def another(scene: Scene) -> subprocess.Popen[bytes]:
    """The operator that runs steps aside in the site's books, and another one is started beside it."""
    first: Any = scene.site._operator
    scene.site._operator = None
    scene.site.start_operator()
    return first


async def full(scene: Scene, model: str, count: int) -> bool:
    pods = await scene.replicas(model=model)
    return len(pods) == count and set(scene.caps(pods)) == {FULL_WATTS}


async def charged_at_least(scene: Scene, least_watts: float) -> bool:
    return await scene.charge() >= least_watts


async def charged_at_most(scene: Scene, limit_watts: float) -> bool:
    return await scene.charge() <= limit_watts


async def lost_nodes(scene: Scene, count: int) -> bool:
    return (await scene.site.status("pd", "hall")).get("lostNodes", 0) == count


async def no_such_node(scene: Scene, name: str) -> bool:
    return not await scene.kubectl("get", "gn", name, "--ignore-not-found", "-o", "name")


def writes(scene: Scene) -> Counter[tuple[str, str]]:
    """What the operator wrote so far, by verb and resource. Looking is free."""
    found: Counter[tuple[str, str]] = Counter()
    for user, verb, _, resource, subresource in scene.site.cluster.audit_verbs():
        if user == OPERATOR and verb not in {"get", "list", "watch"}:
            found[verb, f"{resource}/{subresource}" if subresource else resource] += 1
    return found


def other_writes(scene: Scene) -> int:
    return sum(count for (_, what), count in writes(scene).items() if what not in {"leases", "capsheets"})


async def at_rest(scene: Scene, seconds: float) -> bool:
    """Nothing but renewals was written for so long."""
    before = other_writes(scene), await versions(scene)
    until = asyncio.get_running_loop().time() + seconds
    while asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.5)
        if (other_writes(scene), await versions(scene)) != before:
            return False
    return True


async def versions(scene: Scene) -> dict[str, str]:
    """Of the sheets that say what may be drawn: renewals are none of them."""
    found = await scene.site.get("sheet")
    return {
        each["metadata"]["name"]: each["metadata"]["resourceVersion"]
        for each in found["items"]
        if "renewal" not in each["spec"]
    }


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
