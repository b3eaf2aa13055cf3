"""The controller of LeaderWorkerSets, as its project ships it, beside a control plane of the twin.

Its webhooks are reached by address instead of through a Service, under certificates of the twin's own authority, so it
needs no certificate manager.
"""

import base64
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml
from tests.waiting import wait_for

from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.pki import Authority
from tokenfactory.twin.toolchain import ensure_lws

HOST = "127.0.0.1"
NAME = "leaderworkerset.sigs.k8s.io/name"


@contextmanager
def leader_worker_sets(cluster: Cluster) -> Iterator[None]:
    """The kind and its controller, until the end of the block. The kind stays."""
    installed = ensure_lws()
    port = _free_port()
    folder = cluster.folder / "lws"
    folder.mkdir(exist_ok=True)
    pair = Authority(cluster.folder / "pki").server("lws", ("localhost",), (HOST,))
    for name, path in (("tls.crt", pair.certificate), ("tls.key", pair.key)):
        (folder / name).write_bytes(path.read_bytes())
    for file in (installed / "crd").glob("*.yaml"):
        cluster.kubectl("apply", "--server-side", "-f", str(file))
    wait_for(lambda: _served(cluster), "LeaderWorkerSets to be served")
    config = {
        "apiVersion": "config.lws.x-k8s.io/v1alpha1",
        "kind": "Configuration",
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "webhook": {"host": HOST, "port": port, "certDir": str(folder)},
        "metrics": {"bindAddress": "0"},
        "health": {"healthProbeBindAddress": "0"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv = [str(installed / "lws"), f"--config={folder / 'config.yaml'}", "--zap-log-level=info"]
    cluster.run_component("lws", argv, env={"KUBECONFIG": str(cluster.kubeconfig)})
    authority = base64.b64encode(Authority(cluster.folder / "pki").ca.certificate.read_bytes()).decode()
    hooks = yaml.safe_dump_all(_hooks(installed / "webhook", port, authority))
    cluster.kubectl("apply", "-f", "-", input=hooks)
    try:
        yield
    finally:
        cluster.kubectl("delete", "-f", "-", input=hooks, check=False)
        cluster.stop_component("lws", kill=True)


def _served(cluster: Cluster) -> bool:
    return cluster.request("GET", "/apis/leaderworkerset.x-k8s.io/v1/leaderworkersets")[0] == HTTPStatus.OK


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _hooks(folder: Path, port: int, authority: str) -> list[dict[str, Any]]:
    found = [each for each in yaml.safe_load_all((folder / "manifests.yaml").read_text()) if each]
    for each in found:
        each["metadata"]["name"] = f"lws-{each['kind'].lower()}"
        for hook in each["webhooks"]:
            path = hook["clientConfig"]["service"]["path"]
            hook["clientConfig"] = {"url": f"https://{HOST}:{port}{path}", "caBundle": authority}
            if hook["rules"][0]["resources"] == ["pods"]:  # of nobody else, as in the project's own patches
                hook["objectSelector"] = {"matchExpressions": [{"key": NAME, "operator": "Exists"}]}
    return found
