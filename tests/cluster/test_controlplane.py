"""The control plane is a real one: what it promises to the tests that stand on it."""

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.waiting import wait_for

from tokenfactory.twin import supervisor, toolchain
from tokenfactory.twin.cluster import Cluster, ClusterError, ClusterOptions

pytestmark = pytest.mark.cluster

NODE_TOKEN = "authentication.kubernetes.io/node-name"


def apply(cluster: Cluster, *manifests: dict[str, Any], **options: Any) -> None:
    text = yaml.safe_dump_all(manifests)
    cluster.kubectl("apply", "--server-side", "-f", "-", input=text, **options)


def get(cluster: Cluster, *what: str) -> Any:
    return json.loads(cluster.kubectl("get", *what, "-o", "json").stdout)


def node(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}}


def config_map(namespace: str, name: str, **data: str) -> dict[str, Any]:
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


# --- what runs ------------------------------------------------------------------------------------


def test_it_is_the_pinned_version_throughout(cluster: Cluster):
    version = json.loads(cluster.kubectl("version", "-o", "json").stdout)
    pinned = toolchain.kubernetes_version()
    assert version["serverVersion"]["gitVersion"] == pinned
    assert version["clientVersion"]["gitVersion"] == pinned
    kubelet = subprocess.run(
        [cluster.program("kubelet"), "--version"], capture_output=True, text=True, check=True
    )
    assert kubelet.stdout.strip() == f"Kubernetes {pinned}"


def test_it_listens_on_loopback_only(cluster: Cluster):
    inodes = set()
    for pid in cluster.running().values():
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                inodes.add(str(descriptor.readlink()).removeprefix("socket:[").removesuffix("]"))
    lines = [
        line.split() for name in ("tcp", "tcp6") for line in Path("/proc/net", name).read_text().splitlines()
    ]
    listening = [line[1] for line in lines if line[3] == "0A" and line[9] in inodes]
    assert len(listening) >= 3
    assert {address.split(":")[0] for address in listening} == {"0100007F"}


# --- who may do what ------------------------------------------------------------------------------


def test_a_client_certificate_is_that_user_and_rbac_decides(cluster: Cluster, namespace: str):
    alice = cluster.kubeconfig_for("alice", ["team a", "ops"])

    me = json.loads(cluster.kubectl("auth", "whoami", "-o", "json", kubeconfig=alice).stdout)
    assert me["status"]["userInfo"]["username"] == "alice"
    assert set(me["status"]["userInfo"]["groups"]) == {"team a", "ops", "system:authenticated"}

    with pytest.raises(ClusterError, match='User "alice" cannot list resource "pods"'):
        cluster.kubectl("get", "pods", "-n", namespace, kubeconfig=alice)
    cluster.kubectl("create", "rolebinding", "ops", "--clusterrole=view", "--group=ops", "-n", namespace)
    wait_for(
        lambda: (
            cluster.kubectl("get", "pods", "-n", namespace, kubeconfig=alice, check=False).returncode == 0
        ),
        "the binding counts",
    )


def test_a_node_may_write_itself_and_no_other(cluster: Cluster):
    apply(cluster, node("restricted-a"), node("restricted-b"))
    kubelet = cluster.kubeconfig_for("system:node:restricted-a", ["system:nodes"])

    cluster.kubectl("annotate", "node", "restricted-a", "own=yes", kubeconfig=kubelet)
    # The node authorizer: no other node, and no secret that no pod of it uses.
    with pytest.raises(ClusterError, match="only its own Node object"):
        cluster.kubectl("annotate", "node", "restricted-b", "own=no", kubeconfig=kubelet)
    with pytest.raises(
        ClusterError, match="no relationship found between node 'restricted-a' and this object"
    ):
        cluster.kubectl("get", "secret", "any", "-n", "default", kubeconfig=kubelet)
    # NodeRestriction: of itself not everything.
    label = "node-restriction.kubernetes.io/pool=big"
    with pytest.raises(ClusterError, match="is not allowed to modify labels"):
        cluster.kubectl("label", "node", "restricted-a", label, kubeconfig=kubelet)


def test_a_service_accounts_token_carries_its_node_and_dies_with_its_pod(cluster: Cluster, namespace: str):
    cluster.kubectl("create", "serviceaccount", "agent", "-n", namespace)
    agent = cluster.kubeconfig_for_service_account(namespace, "agent", node_name="node-7")

    me = json.loads(cluster.kubectl("auth", "whoami", "-o", "json", kubeconfig=agent).stdout)
    assert me["status"]["userInfo"]["username"] == f"system:serviceaccount:{namespace}:agent"
    assert me["status"]["userInfo"]["extra"][NODE_TOKEN] == ["node-7"]

    plain = cluster.kubeconfig_for_service_account(namespace, "agent")
    assert plain != agent
    me = json.loads(cluster.kubectl("auth", "whoami", "-o", "json", kubeconfig=plain).stdout)
    assert NODE_TOKEN not in me["status"]["userInfo"]["extra"]

    cluster.kubectl("delete", "pod", "agent-node-7", "-n", namespace, "--force", "--grace-period=0")
    wait_for(
        lambda: "Unauthorized" in cluster.kubectl("auth", "whoami", kubeconfig=agent, check=False).stderr,
        "the token of a deleted pod is refused",
    )


def test_a_service_account_that_is_not_there_is_named(cluster: Cluster, namespace: str):
    with pytest.raises(ClusterError, match='serviceaccounts "nobody" not found'):
        cluster.kubeconfig_for_service_account(namespace, "nobody")


def test_an_admission_policy_keeps_an_agent_to_the_object_of_its_node(cluster: Cluster, namespace: str):
    name = f"own-{namespace}"
    match = {
        "apiGroups": [""],
        "apiVersions": ["v1"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["configmaps"],
    }
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [match]},
            "matchConditions": [{"name": "pods", "expression": f"'{NODE_TOKEN}' in request.userInfo.extra"}],
            "validations": [
                {
                    "expression": f"request.userInfo.extra['{NODE_TOKEN}'][0] == object.metadata.name",
                    "message": "an agent writes the object of its own node only",
                }
            ],
        },
    }
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {"policyName": name, "validationActions": ["Deny"]},
    }
    apply(cluster, policy, binding)
    cluster.kubectl("create", "serviceaccount", "writer", "-n", namespace)
    subject = f"--serviceaccount={namespace}:writer"
    cluster.kubectl("create", "rolebinding", "writer", "--clusterrole=edit", subject, "-n", namespace)
    agent = cluster.kubeconfig_for_service_account(namespace, "writer", node_name="node-8")
    numbers = iter(range(10_000))

    def refused() -> bool:
        other = config_map(namespace, "node-9", tried=str(next(numbers)))
        try:
            apply(cluster, other, kubeconfig=agent)
        except ClusterError as error:
            return "an agent writes the object of its own node only" in str(error)
        return False

    wait_for(refused, "the policy is in force")
    apply(cluster, config_map(namespace, "node-8", mine="yes"), kubeconfig=agent)
    cluster.kubectl("delete", "validatingadmissionpolicybinding,validatingadmissionpolicy", name)


# --- what the API server does ---------------------------------------------------------------------


def meters(namespace: str) -> dict[str, Any]:
    group = f"{namespace}.example.com"
    watts = {
        "type": "string",
        "maxLength": 20,
        "description": "The most that it may draw.",
        "x-kubernetes-validations": [
            {
                "rule": "isQuantity(self) && quantity(self).isGreaterThan(quantity('0'))",
                "message": "write 700 or 1200k",
            }
        ],
    }
    spec = {"type": "object", "properties": {"watts": watts}}
    schema = {"openAPIV3Schema": {"type": "object", "properties": {"spec": spec}}}
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"meters.{group}"},
        "spec": {
            "group": group,
            "scope": "Namespaced",
            "names": {"kind": "Meter", "plural": "meters", "singular": "meter"},
            "versions": [{"name": "v1", "served": True, "storage": True, "schema": schema}],
        },
    }


def test_a_kind_of_ours_is_explained_and_its_rules_are_kept(cluster: Cluster, namespace: str):
    crd = meters(namespace)
    resource = crd["metadata"]["name"]
    apply(cluster, crd)
    cluster.kubectl("wait", "--for=condition=Established", f"crd/{resource}", "--timeout=90s")

    def meter(watts: str) -> dict[str, Any]:
        metadata = {"name": "m", "namespace": namespace}
        return {
            "apiVersion": f"{crd['spec']['group']}/v1",
            "kind": "Meter",
            "metadata": metadata,
            "spec": {"watts": watts},
        }

    apply(cluster, meter("700"))
    with pytest.raises(ClusterError, match="write 700 or 1200k"):
        apply(cluster, meter("-5"))

    def explanation() -> str:
        return cluster.kubectl("explain", f"{resource}.spec.watts", check=False).stdout

    wait_for(lambda: "The most that it may draw." in explanation(), "the OpenAPI document has the new kind")
    cluster.kubectl("delete", "crd", resource)


def test_server_side_apply_tells_who_owns_a_field(cluster: Cluster, namespace: str):
    apply(cluster, config_map(namespace, "shared", colour="red"))
    other = yaml.safe_dump(config_map(namespace, "shared", colour="blue"))
    with pytest.raises(ClusterError, match=r'conflict with "kubectl".*\.data\.colour'):
        cluster.kubectl("apply", "--server-side", "--field-manager=other", "-f", "-", input=other)


def test_a_deployment_becomes_gated_pods_that_the_scheduler_binds_once_released(
    cluster: Cluster, namespace: str
):
    apply(cluster, {**node("bindable"), "metadata": {"name": "bindable", "labels": {"for": namespace}}})
    status = {"status": {"capacity": {"cpu": "8", "memory": "8Gi", "pods": "10"}}}
    cluster.kubectl("patch", "node", "bindable", "--subresource=status", "-p", json.dumps(status))
    labels = {"app": "gated"}
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "schedulingGates": [{"name": "tokenfactory.dev/power"}],
            "nodeSelector": {"for": namespace},
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "main", "image": "none"}],
        },
    }
    spec = {"replicas": 2, "selector": {"matchLabels": labels}, "template": template}
    metadata = {"name": "gated", "namespace": namespace}
    apply(cluster, {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec})

    def pods() -> list[Any]:
        return get(cluster, "pods", "-n", namespace, "-l", "app=gated")["items"]

    def gated() -> list[str]:
        wanted = [("PodScheduled", "SchedulingGated")]
        return [
            pod["metadata"]["name"]
            for pod in pods()
            if [(c["type"], c.get("reason")) for c in pod["status"].get("conditions", [])] == wanted
        ]

    wait_for(lambda: len(gated()) == 2, "both pods wait at the gate")
    released, kept = gated()
    gate = [{"op": "remove", "path": "/spec/schedulingGates"}]
    cluster.kubectl("patch", "pod", released, "-n", namespace, "--type=json", "-p", json.dumps(gate))

    def bound() -> dict[str, Any]:
        return {pod["metadata"]["name"]: pod["spec"].get("nodeName") for pod in pods()}

    wait_for(lambda: bound()[released] == "bindable", "the released pod is bound")
    assert bound()[kept] is None

    cluster.kubectl("delete", "deployment", "gated", "-n", namespace, "--cascade=background", "--wait=false")
    wait_for(
        lambda: all(pod["metadata"].get("deletionTimestamp") for pod in pods()),
        "the collector takes the pods",
    )


# --- the audit log --------------------------------------------------------------------------------


def test_the_audit_log_says_who_did_what(cluster: Cluster, namespace: str):
    cluster.kubectl("create", "serviceaccount", "seen", "-n", namespace)
    account = cluster.kubeconfig_for_service_account(namespace, "seen")
    cluster.kubectl("get", "deployments", "-n", namespace, kubeconfig=account, check=False)
    cluster.kubectl(
        "create", "secret", "generic", "hidden", "-n", namespace, "--from-literal=key=open-sesame"
    )

    verbs = set(cluster.audit_verbs())
    assert (f"system:serviceaccount:{namespace}:seen", "list", "apps", "deployments", "") in verbs
    assert ("tokenfactory-admin", "create", "", "serviceaccounts", "token") in verbs
    assert ("tokenfactory-admin", "create", "", "secrets", "") in verbs
    assert not {user for user, *_ in verbs} & {"system:apiserver", "system:kube-scheduler"}
    log = (cluster.folder / "audit" / "audit.log").read_text()
    assert '"secrets"' in log
    assert base64.b64encode(b"open-sesame").decode() not in log


@pytest.mark.slow
def test_the_audit_log_is_bounded_and_keeps_the_latest(start_cluster: Callable[..., Cluster]):
    cluster = start_cluster(audit_megabytes=4, scheduler=False, controller_manager=False)
    padding = "x" * 7000  # the request's address is logged, so long ones fill the log soon
    requests = 1200
    for number in range(requests):
        status, _ = cluster.request("GET", f"/api/v1/namespaces/default/configmaps/c-{number}?x={padding}")
        assert status == 404
    assert cluster.request("DELETE", "/api/v1/namespaces/default/secrets/last")[0] == 404

    def size() -> int:
        return sum(path.stat().st_size for path in (cluster.folder / "audit").iterdir())

    assert requests * len(padding) > 8_000_000
    wait_for(lambda: size() <= 4_500_000, "old entries are gone")
    assert list(cluster.audit_verbs())[-1][1:4] == ("delete", "", "secrets")


# --- life and death -------------------------------------------------------------------------------


def test_clusters_run_side_by_side_and_one_folder_takes_one(
    cluster: Cluster, start_cluster: Callable[..., Cluster]
):
    other = start_cluster(controller_manager=False, scheduler=False)
    apply(other, config_map("default", "only-here"))
    assert cluster.server != other.server
    assert set(other.running()) == {"etcd", "kube-apiserver"}
    with pytest.raises(ClusterError, match='configmaps "only-here" not found'):
        cluster.kubectl("get", "configmap", "only-here")
    with pytest.raises(ClusterError, match="certificate signed by unknown authority"):
        cluster.kubectl("--server", other.server, "get", "namespaces")
    with pytest.raises(ClusterError, match=r"runs in .* already"):
        Cluster.up(other.folder)
    assert set(other.running()) == {"etcd", "kube-apiserver"}, "the refused start took nothing down"


def test_a_restarted_api_server_is_found_where_it_was(start_cluster: Callable[..., Cluster]):
    cluster = start_cluster(controller_manager=False, scheduler=False)
    apply(cluster, config_map("default", "kept"))
    for kill in (False, True):
        before = cluster.running()
        cluster.stop_component("kube-apiserver", kill=kill)
        assert set(cluster.running()) == {"etcd"}
        with pytest.raises(ClusterError, match="refused"):
            cluster.kubectl("get", "configmap", "kept")

        cluster.start_component("kube-apiserver")
        cluster.kubectl("get", "configmap", "kept")
        after = cluster.running()
        assert after["etcd"] == before["etcd"]
        assert after["kube-apiserver"] != before["kube-apiserver"]


def test_what_was_stored_is_there_again_in_the_same_folder_at_the_same_address(tmp_path: Path):
    with Cluster.up(tmp_path) as first:
        apply(first, config_map("default", "kept"))
        started = first.running()
    assert first.running() == {}
    with Cluster.up(tmp_path) as second:
        assert second.server == first.server
        second.kubectl("get", "configmap", "kept")
        assert not set(second.running().values()) & set(started.values())


def test_a_component_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path):
    options = ClusterOptions(extra_args={"kube-apiserver": ("--no-such-flag",)})
    with pytest.raises(
        ClusterError, match=r"(?s)kube-apiserver ended before it could be ready.*no-such-flag"
    ):
        Cluster.up(tmp_path, options)
    assert Cluster.attach(tmp_path).running() == {}


OWNER = """
from pathlib import Path
from tokenfactory.twin.cluster import Cluster
Cluster.up(Path({folder!r}))
print("ready", flush=True)
input()
"""


@pytest.mark.parametrize("when", ["starting", "ready"])
def test_a_killed_owner_takes_its_cluster_along(when: str, tmp_path: Path):
    folder = tmp_path / "c"
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER.format(folder=str(folder))],
        env={**os.environ, "PYTHONPATH": "operator"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for((folder / "cluster.json").exists, "its folder is written")
    cluster = Cluster.attach(folder)
    if when == "ready":
        assert owner.stdout is not None
        assert owner.stdout.readline() == "ready\n"
    wait_for(lambda: "kube-apiserver" in cluster.running(), "it has started something")
    state = cluster.state()
    started = [(p["pid"], p["started"]) for p in (state["supervisor"], *state["components"].values())]

    owner.send_signal(signal.SIGKILL)
    owner.wait()

    wait_for(lambda: all(supervisor.start_time(pid) != begun for pid, begun in started), "all of it is gone")


def test_from_the_command_line_it_outlives_the_command_until_down(tmp_path: Path):
    folder = str(tmp_path / "c")

    def tokenfactory(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tokenfactory.cli", "cluster", *arguments, "--folder", folder],
            env={**os.environ, "PYTHONPATH": "operator"},
            capture_output=True,
            text=True,
            check=False,
        )

    nothing = tokenfactory("status")
    assert (nothing.returncode, "there is no cluster in" in nothing.stderr) == (1, True)

    manifest = tmp_path / "kept.yaml"
    manifest.write_text(yaml.safe_dump(config_map("default", "kept")))
    started = tokenfactory("up", "--apply", str(manifest))
    try:
        assert started.returncode == 0, started.stderr
        assert f"export KUBECONFIG={folder}/admin.kubeconfig" in started.stdout
        status = tokenfactory("status")
        assert status.returncode == 0
        assert status.stdout.count("runs, pid") == 4
        assert "runs already" in tokenfactory("up").stdout
        Cluster.attach(Path(folder)).kubectl("get", "configmap", "kept")
    finally:
        ended = tokenfactory("down")
    assert "has ended" in ended.stdout
    assert Cluster.attach(Path(folder)).running() == {}
    assert tokenfactory("status").returncode == 1
    assert "did not run" in tokenfactory("down", "--remove").stdout
    assert not Path(folder).exists()


def test_two_starts_of_one_folder_at_once_give_one_cluster(tmp_path: Path):
    folder = tmp_path / "c"
    manifest = tmp_path / "needs-a-ready-cluster.yaml"
    manifest.write_text(yaml.safe_dump(config_map("default", "kept")))
    command = [sys.executable, "-m", "tokenfactory.cli", "cluster", "up", "--folder", str(folder)]
    command += ["--apply", str(manifest)]
    options: dict[str, Any] = {"env": {**os.environ, "PYTHONPATH": "operator"}, "text": True}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, **options) for _ in range(2)]
    try:
        said = [process.communicate()[0] for process in both]
        assert [process.returncode for process in both] == [0, 0]
        assert sorted("runs already" in text for text in said) == [False, True]
        assert all(f"{Cluster.attach(folder).server} is ready" in text for text in said)
        assert len(Cluster.attach(folder).running()) == 4
    finally:
        Cluster.attach(folder).down()
