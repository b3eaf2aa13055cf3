"""A factory's watts, from the first apply to the last: what is served inside which limit, and what is said of it."""

import asyncio
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.cluster.scenarios.scene import FULL_WATTS, IDLE_WATTS, Scene, domain, hall, model, watts

from tokenfactory.twin.fleet import AGENT_ACCOUNT, SYSTEM_NAMESPACE

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.asyncio(loop_scope="module"),
]
LACKING = re.compile(r"\b0/4 nodes: .*\bin hall need [0-9.]+k?W more")
"""How a pod is told which limit has no watts for it, and how many are missing."""


async def test_a_first_apply_becomes_ready_and_kubectl_wait_sees_it(scene: Scene):
    await scene.apply(scene.factory())
    said = await scene.mine("wait", "tf/chat", "--for=condition=Ready", "--timeout=120s")
    assert "condition met" in said
    status = await scene.status()
    assert status["ready"] == "3/3"
    await scene.until("full caps", lambda: full(scene, 3))
    status = await scene.status()
    assert all(watts(model["charge"]) >= 2 * 3 * FULL_WATTS for model in status["models"])
    assert {event["reason"] for event in await scene.said("Pod")} >= {"PowerGranted"}


async def test_a_budget_too_small_serves_the_higher_band_and_says_what_is_missing(scene: Scene):
    await scene.apply(hall("8.3kW"))
    await scene.apply(scene.factory(model("vital", replicas=2, band=90), model("bulk", replicas=4, band=10)))
    await scene.serving(2, model="vital")

    async def told() -> dict[str, Any] | None:
        status = await scene.status()
        ready = {each["name"]: each.get("ready", 0) for each in status["models"]}
        reason = (await scene.verdict("Ready"))["reason"]
        settled = ready["vital"] == 2 and reason not in {"Starting", "WaitingForWatts"}
        return status if settled and ready["bulk"] < 4 else None

    status = await scene.until("the factory to say why it is not Ready", told)
    ready = {each["name"]: each.get("ready", 0) for each in status["models"]}
    assert 0 < ready["bulk"] < 4, "service is partial, not all or nothing"
    assert len(status["waiting"]) == 4 - ready["bulk"]
    for entry in status["waiting"]:
        assert entry["what"].startswith("chat-bulk-")
        assert entry["reason"] == "InsufficientPower"
        assert LACKING.search(entry["message"]), entry["message"]
    verdicts = {each["type"]: each for each in status["conditions"]}
    assert (verdicts["Ready"]["status"], verdicts["Ready"]["reason"]) == ("False", "InsufficientPower")
    assert verdicts["Ready"]["message"].startswith(f"{2 + ready['bulk']} of 6 replicas serve; chat-bulk-")
    assert LACKING.search(verdicts["Ready"]["message"])
    assert (verdicts["WithinBudget"]["status"], verdicts["WithinBudget"]["reason"]) == (
        "True",
        "WithinBudget",
    )
    waits = {
        (event["reason"], event["note"])
        for event in await scene.said("Pod", "chat-bulk")
        if event["type"] == "Warning"
    }
    assert {("InsufficientPower", entry["message"]) for entry in status["waiting"]} <= waits
    assert scene.drawing() <= 8300


async def test_a_gpu_that_may_draw_more_than_anybody_allowed_is_seen(scene: Scene):
    """What all scenarios rely on: the simulated GPUs' own limits are looked at, not what anybody says of them."""
    await scene.apply(domain("rack-1", "4kW", parent="hall", rack="r1"))
    node = scene.site.fleet.nodes["gpu-1"]
    node.hollow.held["somebody"] = tuple(node.enforced_watts())

    async def seen() -> bool:
        for gpu in node.hardware.gpus:
            gpu.set(requested_mw=700_000)
        return bool(scene.site.breaches)

    try:
        await scene.until("the breach to be seen", seen)
        assert {breach.domain for breach in scene.site.breaches} == {"rack-1"}
    finally:
        del node.hollow.held["somebody"]
        await scene.until("the agent to have put it right", lambda: put_right(scene))
        scene.site.breaches.clear()


async def test_a_budget_is_halved_and_restored_under_load(scene: Scene):
    await scene.apply(scene.factory(model(replicas=6)))
    await scene.ready()
    await scene.until("full caps", lambda: full(scene, 6))
    await scene.lower("7kW")
    await scene.until("the domain to say so", lambda: compliant(scene, "hall"))
    assert len(await scene.replicas()) == 6
    await scene.limit("14kW")
    await scene.until("full caps again", lambda: full(scene, 6))


async def test_two_factories_in_one_domain_are_served_by_band(scene: Scene):
    await scene.apply(hall("9.2kW"))
    await scene.apply(scene.factory(model(replicas=3, band=10), name="bulk"))
    await scene.ready("bulk")
    await scene.apply(scene.factory(model(replicas=2, band=90), name="vital"))
    await scene.ready("vital")
    low, high = await scene.serving(3, "bulk"), await scene.serving(2, "vital")

    async def by_band() -> bool:
        return min(scene.caps(high)) == FULL_WATTS and max(scene.caps(low)) < FULL_WATTS

    await scene.until("the higher band to have what it can use", by_band)


async def test_a_rack_has_a_limit_of_its_own_inside_the_hall(scene: Scene):
    await scene.apply(domain("rack-1", "3.9kW", parent="hall", rack="r1"))
    await scene.apply(scene.factory(model(replicas=5)))
    await scene.ready()
    serving = await scene.serving(5)
    in_rack = [pod for pod in serving if pod["spec"]["nodeName"] in {"gpu-1", "gpu-3"}]
    assert len(in_rack) == 1
    assert max(scene.caps(in_rack)) < FULL_WATTS
    assert scene.drawing("r1") <= 3900
    status = await scene.site.status("pd", "rack-1")
    assert watts(status["charge"]) <= 3900
    assert "rack-1" in (await scene.status())["models"][0]["boundBy"]
    node, pod = in_rack[0]["spec"]["nodeName"], f"{scene.namespace}/{in_rack[0]['metadata']['name']}"
    done = await explain(scene.site.cluster.kubeconfig, node, "-o", "json")
    held = [gpu for gpu in json.loads(done.stdout)["gpus"] if gpu["pod"] == pod]
    assert [gpu["market"]["boundBy"] for gpu in held] == ["rack-1", "rack-1"]
    assert all([sheet["domain"] for sheet in gpu["sheets"] if sheet["binds"]] == ["rack-1"] for gpu in held)


async def test_who_may_not_read_is_told_which_rules_are_missing(scene: Scene):
    agent = scene.site.cluster.kubeconfig_for_service_account(SYSTEM_NAMESPACE, AGENT_ACCOUNT)
    done = await explain(agent, "gpu-1")
    assert done.returncode == 1
    assert (
        'apiGroups: ["tokenfactory.dev"], resources: [tokenfactories], verbs: [get, list, watch]'
        in done.stderr
    )
    assert "Traceback" not in done.stderr


async def explain(kubeconfig: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenfactory.cli", "explain", *words, f"--kubeconfig={kubeconfig}"]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)


async def test_a_factory_that_may_not_draw_is_told_which_grant_is_missing(scene: Scene):
    await scene.apply(
        hall(more="admits: [{namespaceSelector: {matchLabels: {team: inference}}, maxBand: 50}]")
    )
    await scene.until("the hall to be at rest", lambda: charged(scene, IDLE_WATTS))
    await scene.apply(scene.factory(model(replicas=1)))

    async def refused() -> dict[str, str] | None:
        ready = await scene.verdict("Ready")
        return ready if ready.get("reason") == "NotAdmitted" else None

    told = await scene.until("the refusal", refused)
    assert "admits no namespace like" in told["message"]
    assert "spec.admits" in told["message"]
    nodes = await scene.site.get("gn")
    assert not any(node["spec"].get("pods") for node in nodes["items"])
    assert await scene.charge() == IDLE_WATTS
    await scene.kubectl("label", "namespace", scene.namespace, "team=inference")
    await scene.ready()
    await scene.apply(scene.factory(model(replicas=1, band=60)))
    told = await scene.until("the refusal of the band", refused)
    assert "up to band 50" in told["message"]


async def full(scene: Scene, count: int) -> bool:
    pods = await scene.replicas()
    return len(pods) == count and set(scene.caps(pods)) == {FULL_WATTS}


async def put_right(scene: Scene) -> bool:
    """Every GPU on which nothing runs is at its minimum."""
    return set(scene.site.fleet.nodes["gpu-1"].enforced_watts().values()) == {200.0}


async def compliant(scene: Scene, name: str) -> bool:
    return all([await scene.condition("pd", name, each) == "True" for each in ("Compliant", "Enforced")])


async def charged(scene: Scene, charge_watts: float) -> bool:
    return await scene.charge() == charge_watts
