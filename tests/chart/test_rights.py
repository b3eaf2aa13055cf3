"""The chart on a real API server: it is taken as rendered, and each agent may write for its own node only."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from tests.chart.helm import NAMESPACE
from tests.waiting import wait_for

from tokenfactory.twin.cluster import Cluster

pytestmark = pytest.mark.cluster

NODES = ("rights-node-a", "rights-node-b")
AGENT = "tokenfactory-agent"
OPERATOR = "tokenfactory-operator"


@pytest.fixture(scope="module")
def installed(cluster: Cluster, helm) -> Cluster:
    """The chart, and two nodes with their GPUNodes."""
    rendered = helm.template("agent.runtimeClassName=")
    cluster.kubectl("create", "namespace", NAMESPACE, check=False)
    cluster.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", input=rendered)
    cluster.kubectl(
        "wait", "--for=condition=Established", "crd", "-l", "app.kubernetes.io/part-of=tokenfactory"
    )
    for name in NODES:
        cluster.kubectl(
            "apply",
            "-f",
            "-",
            input=yaml.safe_dump({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}),
        )
        node = {
            "apiVersion": "tokenfactory.dev/v1alpha1",
            "kind": "GPUNode",
            "metadata": {"name": name},
            "spec": {"term": 1},
        }
        cluster.kubectl("apply", "-f", "-", input=yaml.safe_dump(node))
    return cluster


Try = Callable[..., str]
"""Empty when it was allowed, else what was said."""


def as_account(cluster: Cluster, account: str, node: str | None) -> Try:
    kubeconfig = cluster.kubeconfig_for_service_account(NAMESPACE, account, node_name=node)

    def attempt(*arguments: str, stdin: dict[str, Any] | None = None) -> str:
        text = None if stdin is None else json.dumps(stdin)
        done = cluster.kubectl(*arguments, input=text, check=False, kubeconfig=kubeconfig)
        return "" if done.returncode == 0 else done.stderr

    return attempt


@pytest.fixture(scope="module")
def agent_a(installed: Cluster) -> Try:
    attempt = as_account(installed, AGENT, NODES[0])
    # The policy takes a moment to be in force after it was made.
    wait_for(lambda: status_of(attempt, NODES[1]), "the admission policy is in force")
    return attempt


def status_of(attempt: Try, node: str, **content: Any) -> str:
    """As agents do: server-side apply of the status."""
    body = {
        "apiVersion": "tokenfactory.dev/v1alpha1",
        "kind": "GPUNode",
        "metadata": {"name": node},
        "status": {"mode": "Obeying", "capped": True},
    }
    arguments = (
        "apply",
        "--server-side",
        "--subresource=status",
        "--field-manager=tokenfactory",
        "--dry-run=server",
    )
    return attempt(*arguments, "-f", "-", stdin=body | content)


def heartbeat(attempt: Try, verb: str, name: str) -> str:
    lease = {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"holderIdentity": "x", "leaseDurationSeconds": 15},
    }
    return attempt(verb, "-f", "-", stdin=lease)


def test_the_whole_chart_is_taken_with_strict_validation(installed: Cluster, helm):
    rendered = helm.template("agent.runtimeClassName=", "leaderWorkerSets.enabled=true")

    installed.kubectl(
        "apply",
        "--dry-run=server",
        "--validate=strict",
        "--server-side",
        "--force-conflicts",
        "-f",
        "-",
        input=rendered,
    )


def test_the_policy_has_no_type_errors(installed: Cluster):
    policy = json.loads(installed.kubectl("get", "validatingadmissionpolicy", AGENT, "-o", "json").stdout)

    assert "expressionWarnings" not in policy.get("status", {}).get("typeChecking", {}), policy["status"]


def test_an_agent_writes_its_own_status(agent_a: Try):
    assert status_of(agent_a, NODES[0]) == ""


def test_an_agent_cannot_write_another_nodes_status(agent_a: Try):
    said = status_of(agent_a, NODES[1])

    assert f"the agent on {NODES[0]} may not write the status of {NODES[1]}" in said


def test_the_other_agent_may_what_this_one_may_not(installed: Cluster, agent_a: Try):
    agent_b = as_account(installed, AGENT, NODES[1])

    assert status_of(agent_b, NODES[1]) == ""
    assert f"the agent on {NODES[1]} may not" in status_of(agent_b, NODES[0])


def test_an_agent_cannot_change_a_spec_through_the_status(installed: Cluster, agent_a: Try):
    said = status_of(agent_a, NODES[0], spec={"term": 9, "path": ["elsewhere"]})

    stored = json.loads(installed.kubectl("get", "gpunode", NODES[0], "-o", "json").stdout)
    assert stored["spec"] == {"term": 1}
    assert said == "" or "spec" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ("patch", "gpunode", NODES[0], "--type=merge", '--patch={"spec":{"term":9}}'),
        ("delete", "gpunode", NODES[0]),
        ("delete", "capsheet", "site"),
        ("get", "pods", "-A"),
        ("get", "secrets", "-n", NAMESPACE),
        ("get", "nodes"),
        ("get", "tokenfactories", "-A"),
        ("get", "leases", "-n", NAMESPACE),
        ("delete", "lease", "tokenfactory-agent-rights-node-a", "-n", NAMESPACE),
        ("create", "token", AGENT, "-n", NAMESPACE),
    ],
    ids=lambda arguments: "-".join(arguments[:3]),
)
def test_an_agent_may_do_nothing_else(agent_a: Try, arguments: tuple[str, ...]):
    assert "cannot" in agent_a(*arguments)


def test_an_agent_follows_the_sheets_and_its_node(agent_a: Try):
    assert agent_a("get", "capsheets", "-l", "tokenfactory.dev/tree=site") == ""
    assert agent_a("get", "gpunodes", f"--field-selector=metadata.name={NODES[0]}") == ""


def test_an_agent_renews_its_own_heartbeat_only(agent_a: Try):
    assert heartbeat(agent_a, "create", f"tokenfactory-agent-{NODES[0]}") == ""
    assert heartbeat(agent_a, "replace", f"tokenfactory-agent-{NODES[0]}") == ""
    for other in (f"tokenfactory-agent-{NODES[1]}", "tokenfactory-operator"):
        said = heartbeat(agent_a, "create", other)
        assert f"the agent on {NODES[0]} may not write the Lease {other}" in said


def test_a_token_that_names_no_node_writes_nothing(installed: Cluster, agent_a: Try):
    nowhere = as_account(installed, AGENT, None)

    assert "an agent writes with the token of its own pod" in status_of(nowhere, NODES[0])
    assert "an agent writes with the token of its own pod" in heartbeat(
        nowhere, "create", "tokenfactory-agent-x"
    )


def test_the_policy_is_about_agents_only(installed: Cluster, agent_a: Try):
    operator = as_account(installed, OPERATOR, NODES[0])

    assert heartbeat(operator, "create", "tokenfactory-operator") == ""


@pytest.mark.parametrize(
    ("verb", "what", "allowed"),
    [
        ("patch", "nodes", True),
        ("delete", "nodes", False),
        ("patch", "pods", True),
        ("create", "pods", False),
        ("create", "deployments.apps", True),
        ("create", "capsheets.tokenfactory.dev", True),
        ("delete", "capsheets.tokenfactory.dev", True),
        ("delete", "gpunodes.tokenfactory.dev", True),
        ("delete", "powerdomains.tokenfactory.dev", False),
        ("patch", "tokenfactories.tokenfactory.dev/status", True),
        ("patch", "tokenfactories.tokenfactory.dev", False),
        ("patch", "gpunodes.tokenfactory.dev/status", False),
        ("get", "secrets", False),
        ("create", "clusterroles.rbac.authorization.k8s.io", False),
    ],
)
def test_what_the_operator_may_do(installed: Cluster, verb: str, what: str, allowed: bool):
    name, _, subresource = what.partition("/")
    user = f"--as=system:serviceaccount:{NAMESPACE}:{OPERATOR}"
    sub = (f"--subresource={subresource}",) if subresource else ()

    said = installed.kubectl(
        "auth", "can-i", verb, name, *sub, "-n", "default", user, check=False
    ).stdout.strip()

    assert said == ("yes" if allowed else "no")


def test_a_domain_with_nodes_is_not_deleted_and_one_without_is(installed: Cluster, agent_a: Try):
    for name in ("rights-full", "rights-empty"):
        domain = {
            "apiVersion": "tokenfactory.dev/v1alpha1",
            "kind": "PowerDomain",
            "metadata": {"name": name},
            "spec": {"limit": "10kW"},
        }
        installed.kubectl("apply", "-f", "-", input=json.dumps(domain))
    patch = ("--subresource=status", "--type=merge", '--patch={"status":{"nodes":3}}')
    installed.kubectl("patch", "pd", "rights-full", *patch)

    def refused() -> str:
        done = installed.kubectl("delete", "pd", "rights-full", "--dry-run=server", check=False)
        return done.stderr if done.returncode else ""

    wait_for(refused, "the policy about domains is in force")
    assert (
        "power domain rights-full still has 3 nodes in it or below: first make its nodeSelector" in refused()
    )
    installed.kubectl("delete", "pd", "rights-empty", "--wait=true", "--timeout=20s")
    installed.kubectl("annotate", "pd", "rights-full", "tokenfactory.dev/abandon=true")
    installed.kubectl("delete", "pd", "rights-full", "--wait=true", "--timeout=20s")


def test_a_gpunode_that_charges_pods_is_not_deleted_and_one_that_charges_none_is(installed: Cluster):
    pod = {"namespace": "a", "name": "chat-0", "uid": "u", "class": "a/chat/llama@NVIDIA H100", "gpus": 1}
    for name, pods in {"rights-busy": [pod], "rights-idle": []}.items():
        node = {
            "apiVersion": "tokenfactory.dev/v1alpha1",
            "kind": "GPUNode",
            "metadata": {"name": name},
            "spec": {"path": ["hall"], "pods": pods},
        }
        installed.kubectl("apply", "-f", "-", input=json.dumps(node))

    def refused() -> str:
        done = installed.kubectl("delete", "gn", "rights-busy", "--dry-run=server", check=False)
        return done.stderr if done.returncode else ""

    wait_for(refused, "the policy about nodes is in force")
    assert "GPUNode rights-busy charges 1 pods: first kubectl drain rights-busy" in refused()
    installed.kubectl("delete", "gn", "rights-idle", "--wait=true", "--timeout=20s")
    installed.kubectl("annotate", "gn", "rights-busy", "tokenfactory.dev/abandon=true")
    installed.kubectl("delete", "gn", "rights-busy", "--wait=true", "--timeout=20s")
