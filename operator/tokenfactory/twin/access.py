"""Talking to a cluster of the twin, as its admin or as anyone else, and reading what was asked of it."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import re
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenfactory.twin import cluster_folder, components, toolchain
from tokenfactory.twin.components import ClusterError, Plan


def token_pod(namespace: str, name: str, service_account: str, node: str) -> dict[str, Any]:
    """A pod on a node that runs nothing: a token bound to it carries the node's name, which admission policies read."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "serviceAccountName": service_account,
            "nodeName": node,
            "tolerations": [{"operator": "Exists"}],
            "containers": [{"name": "main", "image": "tokenfactory.dev/none"}],
        },
    }


class Access:
    """What a cluster answers, whoever asks. Running or not is none of its business."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._tls_context: ssl.SSLContext | None = None
        self.folder = plan.folder
        self.server = plan.server
        self.kubeconfig = plan.kubeconfig("admin")

    def program(self, name: str) -> Path:
        """One of our programs: kubelet, kubectl, …"""
        path = self._plan.bin / name
        return path if path.exists() else toolchain.ensure_control_plane(needed=(name,)) / name

    def kubectl(
        self,
        *args: str,
        input: str | None = None,  # noqa: A002  as subprocess.run has it
        check: bool = True,
        kubeconfig: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Our own kubectl, as cluster-admin or whoever `kubeconfig` says; `check` raises with what it printed."""
        done = subprocess.run(
            [str(self.program("kubectl")), *args],
            input=input,
            env={
                **os.environ,
                "KUBECONFIG": str(kubeconfig or self.kubeconfig),
                "KUBERC": "off",
                # Kubectl's cache goes by host and port, which another cluster may have had before.
                "KUBECACHEDIR": str(self.folder / "kubectl-cache"),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if check and done.returncode != 0:
            raise ClusterError(
                f"kubectl {' '.join(args)} failed:\n{done.stderr.strip() or done.stdout.strip()}"
            )
        return done

    def request(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One HTTPS request as cluster-admin: the status and the decoded answer."""
        connection = http.client.HTTPSConnection(
            self._plan.host, self._plan.ports.apiserver, context=self._tls(), timeout=30
        )
        try:
            content = "application/merge-patch+json" if method == "PATCH" else "application/json"
            headers = {"Content-Type": content, "Accept": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        with contextlib.suppress(ValueError):
            return answer.status, json.loads(text)
        return answer.status, text.decode(errors="replace")

    def _tls(self) -> ssl.SSLContext:
        if self._tls_context is None:
            authority = self._plan.authority
            admin = authority.client("admin", *components.IDENTITIES["admin"])
            self._tls_context = ssl.create_default_context(cafile=str(authority.ca.certificate))
            self._tls_context.load_cert_chain(admin.certificate, admin.key)
        return self._tls_context

    def _found(self, path: str) -> bool:
        try:
            return self.request("GET", path)[0] == http.HTTPStatus.OK
        except OSError:
            return False

    # --- who one is -------------------------------------------------------------------------

    def kubeconfig_for(self, user: str, groups: tuple[str, ...] | list[str] = ()) -> Path:
        """A kubeconfig with a client certificate for this user. RBAC decides what it may do."""
        identity = json.dumps([user, *groups])
        name = f"{_slug(user)}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        pair = self._plan.authority.client(name, user, tuple(groups))
        return self._write_kubeconfig(name, components.certificate_user(pair))

    def kubeconfig_for_service_account(
        self,
        namespace: str,
        name: str,
        node_name: str | None = None,
        duration: str = "1h",
        *,
        pod: str | None = None,
    ) -> Path:
        """A kubeconfig with a real token of a service account, from the TokenRequest API.

        With `node_name` the token is bound to a pod on that node, made here unless `pod` names one there:
        it carries the node's name, as the token of a DaemonSet's pod does, and dies with the pod.
        """
        request: dict[str, Any] = {"audiences": [components.ISSUER], "expirationSeconds": _seconds(duration)}
        if node_name is not None and pod is None:
            pod = self._make_pod(namespace, name, node_name)
        if pod is not None:
            request["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": pod}
        token = self._must(
            "POST",
            f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token",
            {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": request},
        )["status"]["token"]
        file = "_".join(_slug(part) for part in ("sa", namespace, name, node_name or "", pod or "") if part)
        return self._write_kubeconfig(file, {"token": token}, namespace)

    def _make_pod(self, namespace: str, service_account: str, node_name: str) -> str:
        name = f"{service_account}-{node_name}"
        pod = token_pod(namespace, name, service_account, node_name)
        status, answer = self.request("POST", f"/api/v1/namespaces/{namespace}/pods", pod)
        if status not in {http.HTTPStatus.CREATED, http.HTTPStatus.CONFLICT}:
            raise ClusterError(
                f"cannot make a pod for a token of {namespace}/{service_account}: {_message(answer)}"
            )
        return name

    def _must(self, method: str, path: str, body: Any = None) -> Any:
        status, answer = self.request(method, path, body)
        if status >= http.HTTPStatus.BAD_REQUEST:
            raise ClusterError(f"{method} {path}: {status} {_message(answer)}")
        return answer

    def _write_kubeconfig(self, name: str, user: dict[str, object], namespace: str = "default") -> Path:
        path = self.folder / "users" / f"{name}.kubeconfig"
        cluster_folder.write_private(
            path, components.kubeconfig(self.server, self._plan.authority, user, namespace)
        )
        return path

    # --- the audit log ----------------------------------------------------------------------

    def audit_verbs(self) -> Iterator[tuple[str, str, str, str, str]]:
        """(user, verb, API group, resource, subresource) of every request in the log, oldest first.

        A server-side apply that made its object is a patch and a create: it takes the right to both. The control
        plane's own requests are not logged, and the oldest go when the log is full.
        """
        folder = self.folder / "audit"
        current = folder / "audit.log"
        older = sorted(folder.glob("audit-*.log"))
        for path in (*older, current):
            if not path.exists():
                continue
            with path.open(encoding="utf-8") as log:
                for line in log:
                    if not line.endswith("\n"):  # still being written
                        break
                    event = json.loads(line)
                    what = event.get("objectRef") or {}
                    made = (event.get("responseStatus") or {}).get("code") == http.HTTPStatus.CREATED
                    for verb in (
                        ("patch", "create") if made and event["verb"] == "patch" else (event["verb"],)
                    ):
                        yield (
                            event["user"].get("username", ""),
                            verb,
                            what.get("apiGroup", ""),
                            what.get("resource", ""),
                            what.get("subresource", ""),
                        )


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def _seconds(duration: str) -> int:
    from tokenfactory.api import quantities

    return int(quantities.parse_duration(duration)) // 1000


def _message(answer: Any) -> str:
    return str(answer.get("message", answer)) if isinstance(answer, dict) else str(answer)
