"""Fluent builders of what the ledger reads. All powers in watts."""

from __future__ import annotations

import msgspec

from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec, ClassCap, EarlierCaps
from tokenfactory.api.gpu_node import (
    AppliedEpoch,
    Fence,
    GPUNode,
    GPUNodeSpec,
    GPUNodeStatus,
    GPUStatus,
    PodGrant,
)
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Leadership
from tokenfactory.planning.power.lines import Domain

W = 1000
PRODUCT = "H100"


def a_domain(name: str, *, parent: str | None = None, limit: int = 10_000) -> Domain:
    return Domain(name, parent, limit * W)


def a_leadership(term: int = 1, claim_from: int = 1) -> Leadership:
    return Leadership(term, claim_from)


def a_target(caps: dict[str, dict[str, int]]) -> dict[str, dict[str, Allowance]]:
    return {d: {c: Allowance(w * W, 200 * W) for c, w in of.items()} for d, of in caps.items()}


def _caps(caps: dict[str, int], fallback: int = 0) -> tuple[ClassCap, ...]:
    return tuple(
        ClassCap(class_name=name, cap=watts * W, fallback=min(fallback, watts) * W)
        for name, watts in caps.items()
    )


class SheetBuilder:
    def __init__(self, spec: CapSheetSpec) -> None:
        self.spec = spec

    def _with(self, **fields) -> SheetBuilder:
        return SheetBuilder(msgspec.structs.replace(self.spec, **fields))

    def caps(self, caps: dict[str, int]) -> SheetBuilder:
        return self._with(caps=_caps(caps, 200))

    def earlier(self, through: int, caps: dict[str, int]) -> SheetBuilder:
        return self._with(earlier=(*self.spec.earlier, EarlierCaps(through=through, caps=_caps(caps))))

    def obj(self) -> CapSheet:
        return CapSheet(metadata=ObjectMeta(name=self.spec.domain, resource_version="1"), spec=self.spec)


def a_sheet(domain: str, *, tree: str = "", epoch: int = 1, complete_from: int = 1) -> SheetBuilder:
    return SheetBuilder(
        CapSheetSpec(
            domain=domain,
            tree=tree or domain,
            term=1,
            epoch=epoch,
            hold_milliseconds=300_000,
            complete_from=complete_from,
        )
    )


class NodeBuilder:
    def __init__(self, node: GPUNode) -> None:
        self.node = node

    def spec(self, **fields) -> NodeBuilder:
        return NodeBuilder(
            msgspec.structs.replace(self.node, spec=msgspec.structs.replace(self.node.spec, **fields))
        )

    def status(self, **fields) -> NodeBuilder:
        status = msgspec.structs.replace(self.node.status, **fields)
        return NodeBuilder(msgspec.structs.replace(self.node, status=status))

    def _gpu(self, index: int, **fields) -> NodeBuilder:
        gpus = list(self.node.status.gpus)
        gpus[index] = msgspec.structs.replace(gpus[index], **fields)
        return self.status(gpus=tuple(gpus))

    def grant(self, uid: str, class_name: str, gpus: int, *, released: bool = False) -> NodeBuilder:
        pod = PodGrant(namespace="ns", name=uid, uid=uid, class_name=class_name, gpus=gpus, released=released)
        return self.spec(pods=(*self.node.spec.pods, pod))

    def holds(self, uid: str, *indices: int) -> NodeBuilder:
        builder = self
        for index in indices:
            builder = builder._gpu(index, pod_uid=uid)
        return builder

    def enforced(self, index: int, watts: int) -> NodeBuilder:
        return self._gpu(index, enforced_milliwatts=watts * W)

    def acked(self, **epochs: int) -> NodeBuilder:
        return self.status(applied=tuple(AppliedEpoch(domain=d, epoch=e) for d, e in epochs.items()))

    def fenced(self, boot: str) -> NodeBuilder:
        return self.spec(fence=Fence(method="PowerOff", by="bmc", at="2026-01-01T00:00:00Z", boot_id=boot))

    def uncapped(self) -> NodeBuilder:
        return self.status(capped=False)

    def observed(self, generation: int) -> NodeBuilder:
        return self.status(observed_generation=generation)

    def obj(self) -> GPUNode:
        return self.node


def a_node(name: str, *, path: list[str], gpus: int, boot: str = "b1", generation: int = 1) -> NodeBuilder:
    return NodeBuilder(
        GPUNode(
            metadata=ObjectMeta(name=name, resource_version="1", generation=generation),
            spec=GPUNodeSpec(path=tuple(path), term=1, overhead_milliwatts=300 * W),
            status=GPUNodeStatus(
                boot_id=boot,
                capped=True,
                gpus=tuple(
                    GPUStatus(
                        index=i,
                        uuid=f"{name}-{i}",
                        product=PRODUCT,
                        min_milliwatts=200 * W,
                        max_milliwatts=700 * W,
                        default_milliwatts=700 * W,
                        enforced_milliwatts=200 * W,
                    )
                    for i in range(gpus)
                ),
            ),
        )
    )
