"""Others who write beside the operator, and operators after it: what is theirs stays, what is ours is put right, one leads."""

import asyncio
import itertools
import json
import subprocess
from functools import partial
from typing import Any

import pytest
from tests.cluster.scenarios.scene import IDLE_WATTS, Scene, model

from tokenfactory.api.cap_sheet import DOMAIN_LABEL, TREE_LABEL, renewal_name

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
]
LEASE = "tokenfactory-operator"


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
        for replicas in (1, 2, 1, 2, 1, 2, 1):  # until somebody was in the way, and then down to one
            await scene.apply(scene.factory(model(replicas=replicas, image="1.9.0")))
            await scene.until("the new image alone", partial(runs, scene, replicas, ":1.9.0"))
            if replicas == 1 and log.read_text().count("write refused") > refused:
                break
    finally:
        stop.set()
        await busybody
    assert log.read_text().count("write refused") > refused, "nobody was in the way of anybody"
    factory = await scene.site.get("tf", "chat", namespace=scene.namespace)
    assert int(factory["metadata"]["annotations"]["example.org/count"]) > 3


async def runs(scene: Scene, count: int, image: str) -> bool:
    found = [pod["spec"]["containers"][0]["image"] for pod in await scene.replicas()]
    return len(found) == count and all(each.endswith(image) for each in found)


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
    await scene.until("everything to be at rest", lambda: scene.at_rest(12))
    before, sheets = scene.writes(), await scene.versions()
    renewed = (await scene.site.get("sheet", renewal_name("hall")))["metadata"]["generation"]

    async def two_renewals() -> bool:
        return (await scene.site.get("sheet", renewal_name("hall")))["metadata"]["generation"] >= renewed + 2

    await scene.until("two renewals", two_renewals)
    done = scene.writes() - before
    assert set(done) <= {("update", "leases"), ("update", "capsheets"), ("patch", "leases")}, done
    assert await scene.versions() == sheets

    # Agents find a sheet by its labels: whoever takes them off changes nothing that an epoch would say.
    named = ("hall", renewal_name("hall"))
    epoch = (await scene.site.get("sheet", "hall"))["spec"]["epoch"]
    for name in named:
        await scene.kubectl("label", "sheet", name, f"{TREE_LABEL}-", f"{DOMAIN_LABEL}-")

    async def labelled() -> bool:
        held = [(await scene.site.get("sheet", name))["metadata"].get("labels", {}) for name in named]
        return all({TREE_LABEL, DOMAIN_LABEL} <= labels.keys() for labels in held)

    await scene.until("the labels to be back", labelled)
    assert (await scene.site.get("sheet", "hall"))["spec"]["epoch"] == epoch


async def test_edits_all_along_end_as_the_last_one_says(scene: Scene):
    for number in range(8):
        band, image = 10 * number, f"1.{number}.0"
        await scene.apply(scene.factory(model(replicas=1 + number % 4, band=band, image=image)))
        await scene.limit(f"{9 + number % 3}kW")
    await scene.limit("14kW")
    await scene.apply(scene.factory(model(replicas=2, image="2.0.0")))
    await scene.ready()

    async def as_the_last_one_says() -> bool:
        pods = await scene.replicas()
        return [pod["spec"]["containers"][0]["image"].rsplit(":")[-1] for pod in pods] == ["2.0.0"] * 2

    await scene.until("two replicas of the last image, and no other", as_the_last_one_says)
    await scene.ready()


async def test_a_deleted_factory_drains_and_gives_its_watts_back(scene: Scene):
    await scene.apply(scene.factory(model(replicas=4)))
    await scene.until("full caps", lambda: scene.full("llama", 4))
    await scene.until("its charge to be told", lambda: scene.charged_at_least(IDLE_WATTS + 3000))
    await scene.mine("delete", "tf", "chat", "--timeout=120s")
    await scene.until("its watts to be back", lambda: scene.charged_at_most(IDLE_WATTS))
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
