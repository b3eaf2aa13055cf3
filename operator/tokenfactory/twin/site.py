"""A whole small site on this machine: control plane, chart, operator, GPU nodes. What the demo and the tests stand on.

The operator and the agents run as processes of this product under the service accounts and the RBAC that the chart
grants; everything else of the chart is applied as it is.
"""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self, TypeVar
from urllib.parse import quote

import msgspec
import yaml

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import Resource
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.twin.cluster import Cluster
from tokenfactory.twin.fleet import OPERATOR_ACCOUNT, SYSTEM_NAMESPACE, Fleet, NodePlan
from tokenfactory.twin.invariants import Breach, BudgetWatch, NodeTruth, gpu_truth
from tokenfactory.twin.nvml import product_named
from tokenfactory.twin.processes import end_process, start_operator
from tokenfactory.twin.toolchain import ensure_helm

T = TypeVar("T", bound=Resource)
CHART = Path(__file__).resolve().parents[3] / "charts" / "tokenfactory"
_RUN_AS_PROCESSES = frozenset({"Deployment", "DaemonSet"})
SAMPLE_SECONDS = 0.05
SEARCH_LASTS = "12h"
"""Nobody renews the operator's token here, and a search may take hours."""
_OURS = "/apis/tokenfactory.dev/v1alpha1"
_COLLECTIONS = {
    "tf": (_OURS, "tokenfactories"),
    "pd": (_OURS, "powerdomains"),
    "gn": (_OURS, "gpunodes"),
    "sheet": (_OURS, "capsheets"),
    "ckpt": (_OURS, "checkpoints"),
    "pods": ("/api/v1", "pods"),
    "svc": ("/api/v1", "services"),
    "deploy": ("/apis/apps/v1", "deployments"),
    "events": ("/apis/events.k8s.io/v1", "events"),
}
"""By the name that kubectl knows them by."""


class SiteError(RuntimeError):
    """The site did not come to where it should; the message says what is missing and where to look."""


class Site:
    """`async with Site(cluster, folder, plans) as site:` then apply manifests and wait for what they do."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        plans: list[NodePlan],
        *,
        cold_seconds: float = 3.0,
        values: tuple[str, ...] = (),
    ) -> None:
        self.cluster = cluster
        self._values = values
        self.folder = folder
        self.fleet = Fleet(cluster, folder, plans, cold_seconds=cold_seconds)
        self.breaches: list[Breach] = []
        self.samples = 0
        self._domains: list[PowerDomain] = []
        self._overheads: dict[str, int] = {}
        self._operator: subprocess.Popen[bytes] | None = None
        self._sampler: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(install_chart, self.cluster, self._values)
        await self.fleet.__aenter__()
        self.start_operator()
        self._sampler = asyncio.create_task(self._sample())
        return self

    async def __aexit__(self, *exc: object) -> None:
        if self._sampler is not None:
            self._sampler.cancel()
            await asyncio.gather(self._sampler, return_exceptions=True)
        await asyncio.to_thread(self.stop_operator)
        await self.fleet.__aexit__(*exc)

    # --- the operator

    def operator_kubeconfig(self) -> Path:
        """Who the operator is: the chart's own service account."""
        return self.cluster.kubeconfig_for_service_account(
            SYSTEM_NAMESPACE, OPERATOR_ACCOUNT, duration=SEARCH_LASTS
        )

    def start_operator(self, kubeconfig: Path | None = None) -> None:
        """As the chart's service account, unless `kubeconfig` says otherwise."""
        who = kubeconfig or self.operator_kubeconfig()
        self._operator = start_operator(who, SYSTEM_NAMESPACE, self.folder / "operator.log")

    @property
    def operator_lives(self) -> bool:
        return self._operator is not None and self._operator.poll() is None

    def kill_operator(self) -> None:
        """From one instruction to the next; `stop_operator` then takes what is left of it."""
        if self._operator is not None:
            self._operator.kill()

    def stop_operator(self, *, kill: bool = False) -> None:
        if self._operator is not None:
            end_process(self._operator, kill=kill)
            self._operator = None

    # --- looking and waiting

    async def apply(self, text: str) -> None:
        """As a person who means it: what another tool has changed meanwhile is ours again."""
        command = ("apply", "--server-side", "--force-conflicts", "-f", "-")
        await asyncio.to_thread(self.cluster.kubectl, *command, input=text)

    async def get(self, kind: str, name: str = "", *, namespace: str = "", labels: str = "") -> Any:
        """One object, or the list of all of them. By a request of our own: a kubectl each time is most of a core."""
        path = _collection(kind, namespace) + (f"/{name}" if name else "")
        query = f"?labelSelector={quote(labels)}" if labels else ""
        for _ in range(20):
            code, answer = await asyncio.to_thread(self.cluster.request, "GET", path + query)
            if code == HTTPStatus.OK:
                return answer
            if code != HTTPStatus.TOO_MANY_REQUESTS:  # as while a new kind's storage is still made
                break
            await asyncio.sleep(0.5)
        raise SiteError(f"GET {path}{query}: {code} {answer}")

    async def wait(self, what: str, ready: Callable[[], Any], seconds: float) -> Any:
        """Until `ready()` (awaited) is truthy; its value. Says what was missing when it takes too long."""
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            found = await ready()
            if found:
                return found
            if self._operator is not None and self._operator.poll() is not None:
                raise SiteError(f"the operator ended with {self._operator.returncode}:\n{self._log_tail()}")
            if asyncio.get_running_loop().time() > deadline:
                raise SiteError(f"after {seconds:.0f} s still waiting for {what}: logs are in {self.folder}")
            await asyncio.sleep(0.25)

    def _log_tail(self, lines: int = 20) -> str:
        path = self.folder / "operator.log"
        text = path.read_text(errors="replace") if path.exists() else ""
        return "\n".join([*text.splitlines()[-lines:], f"(all of it: {path})"])

    async def status(self, kind: str, name: str, namespace: str = "") -> dict[str, Any]:
        found = await self.get(kind, name, namespace=namespace)
        status: dict[str, Any] = found.get("status", {})
        return status

    async def condition(self, kind: str, name: str, condition: str, namespace: str = "") -> str:
        status = await self.status(kind, name, namespace)
        found = [entry for entry in status.get("conditions", []) if entry["type"] == condition]
        return found[0]["status"] if found else ""

    # --- the truth

    async def _sample(self) -> None:
        """Many times a second: may the hardware draw more than a person allowed?"""
        watch = BudgetWatch()
        while True:
            read_anew = self.samples % 20 == 0
            if read_anew:
                self._domains = await self._list(PowerDomain)
                nodes = await self._list(GPUNode)
                self._overheads = {node.metadata.name: node.spec.overhead_milliwatts for node in nodes}
            found = watch.look(self._domains, self.truth(), datetime.now(UTC), read_anew=read_anew)
            self.breaches += found[: 100 - len(self.breaches)]
            self.samples += 1
            await asyncio.sleep(SAMPLE_SECONDS)

    def check_sampler(self) -> None:
        """Without it no breach would ever be found: raise whatever ended it."""
        if self._sampler is None:
            raise SiteError("nobody looks at what the hardware may draw: the site is not up")
        if self._sampler.done():
            self._sampler.result()
            raise SiteError("nobody looks any more at what the hardware may draw")

    def truth(self) -> list[NodeTruth]:
        truths = []
        for name, node in self.fleet.nodes.items():
            idle = product_named(node.plan.product).idle_watts
            drawing = gpu_truth(node.enforced_watts(), self.fleet.running_on(name), idle)
            truths.append(NodeTruth(name, node.plan.labels, drawing, self._overheads.get(name, 0)))
        return truths

    async def _list(self, kind: type[T]) -> list[T]:
        _, answer = await asyncio.to_thread(
            self.cluster.request, "GET", f"/apis/tokenfactory.dev/v1alpha1/{kind.PLURAL}"
        )
        return [msgspec.convert(item, kind) for item in answer.get("items", [])]


def _collection(kind: str, namespace: str) -> str:
    prefix, plural = _COLLECTIONS[kind]
    where = f"/namespaces/{namespace}" if namespace else ""
    return f"{prefix}{where}/{plural}"


def install_chart(cluster: Cluster, values: tuple[str, ...] = ()) -> None:
    """CRDs, RBAC, admission policy and rules of the chart; its two workloads run as processes here."""
    crds, rest = render_chart(values)
    cluster.kubectl("create", "namespace", SYSTEM_NAMESPACE, check=False)
    cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(crds))
    cluster.kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=90s")
    cluster.kubectl("apply", "--server-side", "-f", "-", input=yaml.safe_dump_all(rest))
    # Its garbage collector looks for new kinds every 30 s, and asks again for an owner of a kind that it did not
    # know after up to a minute: what belongs to a factory deleted soon would stay so long. Started anew, it knows.
    cluster.stop_component("kube-controller-manager", kill=True)
    cluster.start_component("kube-controller-manager")


def uninstall_chart(cluster: Cluster, values: tuple[str, ...] = ()) -> None:
    """As `helm uninstall` would: the kinds stay, and with them every factory."""
    _, rest = render_chart(values)
    cluster.kubectl("delete", "--timeout=30s", "-f", "-", input=yaml.safe_dump_all(rest))


def render_chart(values: tuple[str, ...] = ()) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Its CRDs, and all else but the workloads. `values` are as for helm's --set."""
    helm = ensure_helm()
    rendered = subprocess.run(
        [
            str(helm),
            "template",
            "tokenfactory",
            str(CHART),
            "--namespace",
            SYSTEM_NAMESPACE,
            "--include-crds",
            *(f"--set={value}" for value in values),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    if rendered.returncode != 0:
        raise SiteError(f"the chart cannot be rendered:\n{rendered.stderr}")
    objects = [obj for obj in yaml.safe_load_all(rendered.stdout) if obj]
    crds = [obj for obj in objects if obj["kind"] == "CustomResourceDefinition"]
    return crds, [
        obj for obj in objects if obj["kind"] not in {"CustomResourceDefinition", *_RUN_AS_PROCESSES}
    ]
