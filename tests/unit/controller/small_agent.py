"""A node's agent in memory: the shipped governor over GPUs that obey at once, and what it reports of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime

import msgspec
from tests.unit.controller.small_api import START

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import AppliedEpoch, GPUNode, GPUNodeStatus, GPUStatus, PodMeter
from tokenfactory.kube.objects import Pod
from tokenfactory.planning.power.governor import GpuView, Memory, Sheet, View, govern, read_back

H100 = "NVIDIA H100 80GB HBM3"
MIN_MILLIWATTS, MAX_MILLIWATTS = 200_000, 700_000


@dataclass
class Agent:
    name: str
    gpus: int
    alive: bool = True
    boot_id: str = "boot-1"
    memory: Memory = field(default_factory=Memory)
    enforced: dict[str, int] = field(default_factory=dict)
    heard_at: datetime = START
    overhead_milliwatts: int = 0
    """What its meter has taught it."""
    overhead_proven: bool = False
    load_permille: int = 0
    """What its GPUs draw of their limits."""
    reported_at: datetime | None = None
    reports: bool = True
    """Whether its reports arrive; its heartbeat does anyway."""

    def uuid(self, index: int) -> str:
        return f"{self.name}-gpu-{index}"

    def limits(self) -> dict[str, int]:
        """Milliwatts by GPU; one that nobody has capped yet has its default."""
        uuids = map(self.uuid, range(self.gpus))
        return {uuid: self.enforced.get(uuid, MAX_MILLIWATTS) for uuid in uuids}

    def holding(self, pods: Iterable[Pod]) -> dict[str, Pod]:
        """Which GPU is whose, as a kubelet deals them out."""
        found: dict[str, Pod] = {}
        free = [self.uuid(index) for index in range(self.gpus)]
        for pod in sorted(pods, key=lambda pod: pod.metadata.name):
            if pod.spec.node_name == self.name:
                for _ in range(int(pod.spec.containers[0].resources.limits.get(names.GPU_RESOURCE, 0))):
                    found[free.pop(0)] = pod
        return found

    def obey(
        self,
        node: GPUNode,
        sheets: Mapping[tuple[str, str], CapSheet],
        renewals: int,
        holding: Mapping[str, Pod],
        milliseconds: int,
    ) -> GPUNodeStatus:
        """One pass: what the governor orders is set and read back. Returns what there is to report of it."""
        uids = _uids(node, holding)
        view = View(
            boot_id=self.boot_id,
            spec=node.spec,
            generation=node.metadata.generation,
            status=node.status,
            sheets={name: Sheet.of(sheet.spec) for (_, name), sheet in sheets.items()},
            renewals=dict.fromkeys((sheet.spec.tree for sheet in sheets.values()), renewals),
            gpus=tuple(
                GpuView(
                    uuid=uuid,
                    product=H100,
                    min_milliwatts=MIN_MILLIWATTS,
                    max_milliwatts=MAX_MILLIWATTS,
                    enforced_milliwatts=limit,
                    pod_uid=uids.get(uuid, ""),
                )
                for uuid, limit in self.limits().items()
            ),
        )
        self.memory, decision = govern(self.memory, view, milliseconds)
        for uuid, order in decision.caps.items():
            if order.cap_milliwatts is not None:
                self.enforced[uuid] = order.cap_milliwatts
        enforced = self.limits()
        self.memory, said = read_back(self.memory, decision, enforced)
        return GPUNodeStatus(
            observed_generation=said.observed_generation or node.status.observed_generation,
            boot_id=self.boot_id,
            capped=said.capped,
            mode=decision.mode,
            draw_milliwatts=sum(enforced.values()) * self.load_permille // 1000,
            applied=tuple(
                AppliedEpoch(domain=name, epoch=epoch) for name, epoch in sorted(said.applied.items())
            ),
            gpus=tuple(
                _gpu_status(
                    index,
                    uuid,
                    limit,
                    holding.get(uuid),
                    uids.get(uuid, ""),
                    decision.caps[uuid].reason.class_name if uuid in decision.caps else "",
                )
                for index, (uuid, limit) in enumerate(enforced.items())
            ),
            overhead_milliwatts=self.overhead_milliwatts,
            overhead_proven=self.overhead_proven,
            reported_at=node.status.reported_at,
        )

    def report(
        self, status: GPUNodeStatus, node: GPUNode, meters: tuple[PodMeter, ...], now: datetime
    ) -> GPUNode | None:
        """The node with what is new of it, or every 30 s anyway; None where there is nothing to write."""
        if not self.reports:
            return None
        status = msgspec.structs.replace(status, meters=meters)
        since = (now - self.reported_at).total_seconds() if self.reported_at else 30.0
        if status == node.status and since < 30:
            return None
        self.reported_at = now
        status = msgspec.structs.replace(status, reported_at=now.strftime("%Y-%m-%dT%H:%M:%SZ"))
        return msgspec.structs.replace(node, status=status)


def _uids(node: GPUNode, holding: Mapping[str, Pod]) -> dict[str, str]:
    """By GPU. An agent sees no pods: one that its node's spec does not list is a stranger to it, whoever made it."""
    listed = {grant.uid for grant in node.spec.pods}
    return {
        uuid: uid
        if (uid := pod.metadata.uid or "") in listed
        else f"?{pod.metadata.namespace}/{pod.metadata.name}"
        for uuid, pod in holding.items()
    }


def _gpu_status(index: int, uuid: str, limit: int, pod: Pod | None, uid: str, class_name: str) -> GPUStatus:
    return GPUStatus(
        index=index,
        uuid=uuid,
        product=H100,
        min_milliwatts=MIN_MILLIWATTS,
        max_milliwatts=MAX_MILLIWATTS,
        default_milliwatts=MAX_MILLIWATTS,
        enforced_milliwatts=limit,
        class_name=class_name,
        pod=f"{pod.metadata.namespace}/{pod.metadata.name}" if pod else "",
        pod_uid="" if uid.startswith("?") else uid,
    )
