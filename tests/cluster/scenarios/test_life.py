"""An installation from its first factory to its last: models that span nodes, and everything that may be deleted.

It has a site of its own, because nothing is left of that in the end.
"""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from tests.cluster.scenarios.groups import leader_worker_sets
from tests.cluster.scenarios.scene import FULL_WATTS, NAMESPACE, RACK, Scene, domain, model, plan
from tests.cluster.scenarios.story import spanning
from tests.cluster.scenarios.verbs import tried_in_vain, unused

from tokenfactory.api import names
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.demo import storage
from tokenfactory.twin.fleet import SYSTEM_NAMESPACE
from tokenfactory.twin.site import Site, uninstall_chart

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
]
VALUES = ("leaderWorkerSets.enabled=true",)
OURS = "tf,pd,pp,sheet,gn,ckpt"
SITE = "---".join(
    [
        domain("hall", "14kW"),
        domain("rack-1", "10kW", parent="hall", rack="r1", more="nodeDeletedMeansOff: true"),
        domain("rack-2", "10kW", parent="hall", rack="r2"),
    ]
)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def life(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    """Three nodes of four GPUs: gpu-1 and gpu-3 in rack-1, gpu-2 in rack-2."""
    folder = tmp_path_factory.mktemp("life")
    with Cluster.up(folder / "cluster") as cluster:
        plans = [plan(number, "r1" if number % 2 else "r2") for number in (1, 2, 3)]
        async with Site(cluster, folder, plans, cold_seconds=0.5, values=VALUES) as site:
            scene = Scene(site)
            await scene.apply(NAMESPACE % scene.namespace)
            await scene.apply(SITE)
            await scene.until("every node to obey the hall's sheet", lambda: scene.obeyed("hall", 1))
            yield scene


async def test_a_model_that_spans_nodes_runs_as_a_group_once_groups_can_be_had(life: Scene):
    await life.apply(life.factory(spanning(1)))

    async def told() -> dict[str, str] | None:
        ready = await life.verdict("Ready")
        return ready if ready.get("reason") == "LeaderWorkerSetMissing" else None

    said = await life.until("the factory to say what is missing", told)
    assert "install them" in said["message"]
    assert not (await life.site.get("deploy", namespace=life.namespace))["items"]

    with leader_worker_sets(life.site.cluster):
        await life.ready()
        group = await life.serving(2, model="huge")
        on = {pod["spec"]["nodeName"] for pod in group}
        assert len(on) == 2, "each of its pods takes a whole node"
        assert set(life.caps(group)) == {FULL_WATTS}
        assert await charged(life) == {pod["metadata"]["name"] for pod in group}
        env = {each["name"] for pod in group for each in pod["spec"]["containers"][0]["env"]}
        assert {"LWS_LEADER_ADDRESS", "NIM_LEADER_ROLE", "NIM_NODE_RANK"} <= env
        await has_a_door_and_a_meeting_point(life)
        assert (await life.verdict("Updated"))["status"] == "True", "both kinds of its pods say of which spec"

        # There are nodes for half of another group. None of it may be charged, and it says why it waits.
        await life.apply(life.factory(spanning(2)))
        await life.until("the second group's pods", lambda: pods(life, 4))
        for entry in await life.until("it to say what it waits for", lambda: waiting(life)):
            assert entry["what"].startswith("chat-huge-group-1")
            assert "chat-huge-group-0" not in entry["message"]
        assert await charged(life) == {pod["metadata"]["name"] for pod in group}
        await life.apply(life.factory(spanning(1)))

        # One pod of a group is lost: all of it starts anew.
        before = {pod["metadata"]["uid"] for pod in group}
        worker = next(pod for pod in group if pod["metadata"]["labels"][names.LWS_WORKER_LABEL] == "1")
        await life.mine("delete", "pod", worker["metadata"]["name"], "--wait=false")
        await life.until("another group", lambda: another(life, before))
        await life.ready()
        await life.apply(life.factory(model("huge", replicas=1)))
        await life.until("no group to be left", lambda: lone(life))
        await life.mine("delete", "tf", "chat", "--timeout=60s")
        await life.until("it to be gone", life.empty)
    assert life.site.breaches == []


async def test_whatever_is_deleted_goes_and_nothing_waits_for_the_dead(life: Scene):
    cluster = life.site.cluster
    one = model("one", replicas=2) + "\n    checkpoint: {claim: model-cache}"
    await life.apply(storage(life.site.fleet.claims, life.namespace))
    await life.apply(life.factory(one, model("two", replicas=1)))
    await life.ready()
    await life.until("its cache to be saved", lambda: saved(life))
    await life.apply(life.factory(one))
    await life.until("the other model's Service to be gone", lambda: services(life, {"chat-one"}))

    for name in ("hall", "rack-2"):
        refused = await life.kubectl("delete", "pd", name, check=False)
        assert f"power domain {name} still has" in refused
        assert "first make its nodeSelector" in refused
    await life.kubectl("label", "node", "gpu-2", f"{RACK}=r1", "--overwrite")
    life.site.fleet.nodes["gpu-2"].plan.labels[RACK] = "r1"
    await life.until("its rack to be empty", lambda: no_nodes(life, "rack-2"))
    await life.kubectl("delete", "pd", "rack-2", "--timeout=30s")
    await life.until("its sheet to be gone", lambda: gone(life, "sheet", "rack-2"))

    # Where a deleted Node means that its machine is off, that is its fence.
    await life.site.fleet.kill_node("gpu-3")
    await life.kubectl("delete", "node", "gpu-3")
    await life.until("its GPUNode to be retired", lambda: gone(life, "gn", "gpu-3"))
    await life.site.fleet.remove("gpu-3")
    await life.ready()

    # A node dies, and then the operator. What people delete goes all the same.
    dead, left = [pod["spec"]["nodeName"] for pod in await life.serving(2, model="one")]
    await life.site.fleet.kill_node(dead)
    await life.until("what was there to run elsewhere", lambda: all_on(life, left))
    await life.mine("delete", "tf", "chat", "--timeout=30s")
    await life.until("it to be counted as lost", lambda: lost(life, 1))
    assert (await life.site.get("gn", dead))["spec"].get("pods"), "a dead node stays charged"
    await held_back_by_nothing(life)
    assert tried_in_vain(cluster) == set()
    assert unused(cluster) == set()

    life.site.stop_operator()
    await life.apply(life.factory(name="late"))
    await life.mine("delete", "tf", "late", "--timeout=30s")
    assert "still has" in await life.kubectl("delete", "pd", "rack-1", check=False)
    await life.kubectl("annotate", "pd", "rack-1", "tokenfactory.dev/abandon=true")
    await life.kubectl("delete", "pd", "rack-1", "--timeout=30s")
    assert life.site.breaches == []

    uninstall_chart(cluster, VALUES)
    await held_back_by_nothing(life)
    await life.kubectl("delete", OURS, "--all", "-A", "--timeout=30s")
    await life.kubectl("delete", "crd", "-l", "app.kubernetes.io/part-of=tokenfactory", "--timeout=30s")
    await life.mine("delete", "pods", "--all", "--force", "--grace-period=0")  # of the dead node's kubelet
    await life.kubectl("delete", "namespace", life.namespace, SYSTEM_NAMESPACE, "--timeout=60s")


async def has_a_door_and_a_meeting_point(scene: Scene) -> None:
    """Only the leader answers requests, and the pods of a group find each other by their names."""
    found = (await scene.site.get("svc", namespace=scene.namespace))["items"]
    by_name = {each["metadata"]["name"]: each["spec"] for each in found}
    assert by_name["chat-huge"]["selector"][names.LWS_WORKER_LABEL] == "0"
    assert by_name["chat-huge"]["clusterIP"] != "None"
    assert by_name["chat-huge-group"]["clusterIP"] == "None"
    leader = await scene.site.get("pods", "chat-huge-group-0", namespace=scene.namespace)
    assert (leader["spec"]["hostname"], leader["spec"]["subdomain"]) == (
        "chat-huge-group-0",
        "chat-huge-group",
    )


async def held_back_by_nothing(scene: Scene) -> None:
    """No object of ours, nor of a model, has a finalizer."""
    found = json.loads(await scene.kubectl("get", f"{OURS},deploy,svc,pods", "-A", "-o", "json"))["items"]
    assert [each["metadata"]["name"] for each in found if each["metadata"].get("finalizers")] == []


async def charged(scene: Scene) -> set[str]:
    nodes = (await scene.site.get("gn"))["items"]
    return {grant["name"] for node in nodes for grant in node["spec"].get("pods", [])}


async def pods(scene: Scene, count: int) -> bool:
    return len((await scene.site.get("pods", namespace=scene.namespace))["items"]) == count


async def waiting(scene: Scene) -> list[dict[str, Any]]:
    """What waits, once it is known what for."""
    found = (await scene.status()).get("waiting", [])
    return [entry for entry in found if entry["reason"] != "WaitingForWatts"]


async def another(scene: Scene, before: set[str]) -> bool:
    now = {pod["metadata"]["uid"] for pod in await scene.replicas(model="huge")}
    return len(now) == 2 and not now & before


async def lone(scene: Scene) -> bool:
    return not await scene.mine("get", "lws", "-o", "name") and len(await scene.replicas(model="huge")) == 1


async def services(scene: Scene, wanted: set[str]) -> bool:
    found = (await scene.site.get("svc", namespace=scene.namespace))["items"]
    return {each["metadata"]["name"] for each in found} == wanted


async def all_on(scene: Scene, node: str) -> bool:
    return [pod["spec"]["nodeName"] for pod in await scene.replicas(model="one")] == [node] * 2


async def no_nodes(scene: Scene, name: str) -> bool:
    return not (await scene.site.status("pd", name)).get("nodes", 0)


async def gone(scene: Scene, kind: str, name: str) -> bool:
    return not await scene.kubectl("get", kind, name, "--ignore-not-found", "-o", "name")


async def saved(scene: Scene) -> bool:
    return bool((await scene.site.get("ckpt", namespace=scene.namespace))["items"])


async def lost(scene: Scene, count: int) -> bool:
    return (await scene.site.status("pd", "hall")).get("lostNodes", 0) == count
