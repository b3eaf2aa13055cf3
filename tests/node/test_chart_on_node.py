"""The chart on a real node, as a person installs it: operator, agent, a factory, a model that makes tokens."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from tests.node.image import IMAGE, MODEL, REPOSITORY
from tests.node.world import NAMESPACE
from tests.waiting import wait_for

from tokenfactory.twin import toolchain

pytestmark = pytest.mark.node

RELEASE = "tokenfactory"
DOMAIN = """
apiVersion: tokenfactory.dev/v1alpha1
kind: PowerDomain
metadata: {name: room}
spec:
  limit: 3kW
  nodeOverhead: 800W
  nodeSelector: {matchLabels: {nvidia.com/gpu.present: "true"}}
"""
FACTORY = """
apiVersion: v1
kind: Namespace
metadata: {name: tokens}
---
apiVersion: tokenfactory.dev/v1alpha1
kind: TokenFactory
metadata: {name: chat, namespace: tokens}
spec:
  power: {domain: room}
  models:
  - name: llama-8b
    nim: {image: MODEL}
    gpusPerReplica: 2
    replicas: {min: 1, max: 1}
""".replace("MODEL", MODEL)
PAUSED = "tokenfactory.dev/agent=paused"
OVERHEAD_WATTS, LIMIT_WATTS = 800, 3000


class Installed:
    """The release on the node."""

    def __init__(self, node, hardware) -> None:
        self.node, self.hardware, self.kubectl = node, hardware, node.cluster.kubectl
        self._helm = toolchain.ensure_helm()

    def helm(self, *arguments: str) -> str:
        environment = {**os.environ, "KUBECONFIG": str(self.node.cluster.kubeconfig)}
        done = subprocess.run(
            [str(self._helm), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr + done.stdout + self.pods()
        return done.stdout

    def install(self) -> None:
        repository, _, tag = IMAGE.rpartition(":")
        sets = (f"image.repository={repository}", f"image.tag={tag}", "image.pullPolicy=Never")
        self.helm(
            *("install", RELEASE, str(REPOSITORY / "charts" / "tokenfactory"), "--namespace", NAMESPACE),
            *("--take-ownership", *(f"--set={it}" for it in sets)),
        )

    def pods(self) -> str:
        return self.kubectl("get", "pods", "-A", "-o", "yaml").stdout[-6000:] + self.node.logs()

    def get(self, *what: str) -> dict:
        found = self.kubectl("get", *what, "-o", "json", check=False)
        return json.loads(found.stdout) if found.returncode == 0 else {}

    def conditions(self, *what: str) -> dict[str, str]:
        return {it["type"]: it["status"] for it in self.get(*what).get("status", {}).get("conditions", ())}

    def models(self) -> list[dict]:
        return self.get("pods", "-n", "tokens").get("items", [])

    def restarts(self) -> dict[str, int]:
        pods = self.get("pods", "-n", NAMESPACE)["items"]
        containers = [it for pod in pods for it in pod["status"].get("containerStatuses", ())]
        return {it["name"]: it["restartCount"] for it in containers}

    def uninstall(self) -> None:
        self.helm(
            *("uninstall", RELEASE, "--namespace", NAMESPACE, "--wait", "--timeout=60s", "--ignore-not-found")
        )


@pytest.fixture
def installed(real_node, hardware, plugin) -> Iterator[Installed]:
    hardware.reboot()
    kubectl = real_node.cluster.kubectl
    kubectl("label", "node", real_node.name, "nvidia.com/gpu.present=true")
    release = Installed(real_node, hardware)
    try:
        release.install()
        yield release
    finally:
        told = kubectl("get", "tokenfactories,powerdomains,gpunodes,pods", "-A", "-o", "wide", check=False)
        sys.stderr.write(told.stdout)
        # The models first, and waited for: the next test's agent would find strangers on its GPUs.
        kubectl("delete", "-f", "-", "--ignore-not-found", "--timeout=60s", input=FACTORY)
        kubectl("label", "node", real_node.name, "nvidia.com/gpu.present-", f"{PAUSED.partition('=')[0]}-")
        release.uninstall()
        kubectl("taint", "node", real_node.name, "tokenfactory.dev/managed-", check=False)
        kubectl("delete", "gpunodes,capsheets", "--all")
        kubectl("delete", "-f", "-", "--ignore-not-found", "--timeout=60s", input=DOMAIN)


def test_from_helm_install_to_tokens_within_the_limit(installed, real_node, hardware):
    installed.kubectl("apply", "-f", "-", input=f"{DOMAIN}---{FACTORY}")
    wait_for(
        lambda: installed.models() and installed.models()[0]["status"]["phase"] == "Running", "a model", 120
    )
    pod = installed.models()[0]["metadata"]
    (nim,) = installed.models()[0]["spec"]["containers"]
    assert nim["restartPolicyRules"], "this kubelet can send a container that restarts through the gate"
    log = wait_for(
        lambda: installed.kubectl(  # noqa: PLW0108  a new question each time
            "logs", pod["name"], "-n", "tokens", "-c", "nim", check=False
        ).stdout.strip(),
        "the model to say its limits",
    )
    status = installed.get("gpunode", real_node.name)["status"]
    caps = {gpu["uuid"]: gpu["capMilliwatts"] for gpu in status["gpus"] if gpu.get("podUID") == pod["uid"]}
    assert set(json.loads(log)) == set(caps)
    assert len(caps) == 2
    users = {
        line.split()[0] for line in real_node.run("ps", "-eo", "uid,args").splitlines() if "/model.py" in line
    }
    assert users, "the model runs as a process of the node"
    assert "0" not in users, "a model is no root unless its factory says so"
    assert OVERHEAD_WATTS + sum(gpu.get("default_mw") for gpu in hardware.gpus) / 1000 > LIMIT_WATTS
    assert OVERHEAD_WATTS + sum(gpu.enforced_watts for gpu in hardware.gpus) <= LIMIT_WATTS

    wait_for(
        lambda: installed.conditions("tf", "chat", "-n", "tokens").get("Ready") == "True", "the factory", 120
    )

    def tokens() -> int:
        meters = installed.get("gpunode", real_node.name)["status"].get("meters", ())
        return sum(meter.get("generatedTokens", 0) for meter in meters)

    wait_for(tokens, "the agent to have counted tokens")

    before = [gpu.enforced_watts for gpu in hardware.gpus]
    assert installed.restarts() == {"operator": 0, "agent": 0}
    installed.kubectl("label", "node", real_node.name, PAUSED)
    wait_for(
        lambda: set(installed.restarts()) == {"operator"}, "the agent to make way for another driver", 60
    )
    assert [gpu.enforced_watts for gpu in hardware.gpus] == before
    installed.uninstall()
    assert [gpu.enforced_watts for gpu in hardware.gpus] == before, "who ends leaves the caps in place"
    assert installed.models()[0]["metadata"]["uid"] == pod["uid"]
