"""Who holds which GPU: what the kubelet says, told in the words of this node's own spec.

An agent sees no pods. A holder that the spec does not list is a stranger, known by `?namespace/name` instead of a
uid, so that nothing can mistake it for a granted pod.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from tokenfactory.agent.nim import Target
from tokenfactory.agent.parts import PodDevices
from tokenfactory.api.gpu_node import GPUNodeSpec, PodGrant


@dataclass(frozen=True, slots=True)
class Holder:
    """The pod that a GPU counts for."""

    pod: str = ""
    uid: str = ""


NOBODY = Holder()


@dataclass(frozen=True, slots=True)
class Holdings:
    """One answer of the kubelet against one spec."""

    holders: Mapping[str, Holder] = field(default_factory=dict)
    """By GPU uuid; a GPU that nobody holds is not in it."""
    shares: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """GPU uuid → pod uid → its share of the GPU's energy."""
    targets: tuple[Target, ...] = ()
    """Pods whose models are metered."""

    def of(self, gpu: str) -> Holder:
        return self.holders.get(gpu, NOBODY)

    def gpus_of(self, uid: str) -> tuple[str, ...]:
        return tuple(gpu for gpu, shares in self.shares.items() if uid in shares)


def holdings(gpus: Iterable[str], pods: tuple[PodDevices, ...], spec: GPUNodeSpec) -> Holdings:
    grants = {f"{grant.namespace}/{grant.name}": grant for grant in spec.pods}
    units: dict[str, dict[str, int]] = {gpu: {} for gpu in gpus}
    for pod in pods:
        for gpu in pod.gpus:
            if gpu in units:
                units[gpu][pod.key] = units[gpu].get(pod.key, 0) + 1
    held = {gpu: pods_of for gpu, pods_of in units.items() if pods_of}
    shares = {
        gpu: {_uid(key, grants): count / sum(pods_of.values()) for key, count in pods_of.items()}
        for gpu, pods_of in held.items()
    }
    counts: dict[str, int] = {}
    for row in shares.values():
        for uid in row:
            counts[uid] = counts.get(uid, 0) + 1
    return Holdings(
        holders={gpu: _holder(pods_of, grants) for gpu, pods_of in held.items()},
        shares=shares,
        targets=tuple(
            Target(uid=grant.uid, pod=key, url=grant.metrics, gpus=counts[grant.uid])
            for key, grant in grants.items()
            if grant.metrics and grant.uid in counts
        ),
    )


def _holder(pods: Mapping[str, int], grants: Mapping[str, PodGrant]) -> Holder:
    """The first pod, unless one of several is a stranger or of another class: then the GPU is nobody's we know."""
    first = next(iter(pods))
    known = [grants[key] for key in pods if key in grants]
    if len(known) < len(pods) or len({grant.class_name for grant in known}) > 1:
        return Holder(pod=first, uid=f"?{first}")
    return Holder(pod=first, uid=known[0].uid)


def _uid(key: str, grants: Mapping[str, PodGrant]) -> str:
    grant = grants.get(key)
    return grant.uid if grant is not None else f"?{key}"
