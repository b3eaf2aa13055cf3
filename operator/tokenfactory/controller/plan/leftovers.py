"""What nodes have left besides GPUs: what they offer, less what the pods ask that have a place there.

As kube-scheduler counts it, and for all pods alike: also strangers', also of other schedulers. What a stranger of a lower
priority holds is not taken for ours, although kube-scheduler could evict it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Final

from tokenfactory.api import names
from tokenfactory.controller.plan.world import World, has_finished
from tokenfactory.kube.objects import Container, InitContainer, Pod, PodSpec
from tokenfactory.planning.placement.amounts import at_most, parse_amount

Amounts = Mapping[str, int]
Known = Mapping[str, tuple[PodSpec, Amounts]]
"""By pod UID: what it asks, and the spec that says so."""
NOTHING_KNOWN: Final[Known] = MappingProxyType({})
PODS: Final = "pods"
_OPTIONAL: Final = frozenset({"cpu", "memory", "ephemeral-storage", PODS})
"""A node that names none of these limits none of them; of anything else it has none."""


def placed(world: World) -> Iterator[tuple[Pod, str]]:
    """Every pod that has a node: it is bound there, or granted there, or others were evicted for it there."""
    granted = world.granted_on
    for pod in world.snapshot.pods.values():
        if has_finished(pod):
            continue
        node = pod.spec.node_name or granted.get(pod.metadata.uid or "") or pod.status.nominated_node_name
        if node:
            yield pod, node


def know(pods: Iterable[Pod], before: Known) -> Known:
    """What each of these asks. Most are as they were in the round before."""
    found: dict[str, tuple[PodSpec, Amounts]] = {}
    for pod in pods:
        uid = pod.metadata.uid or ""
        known = before.get(uid)
        found[uid] = known if known and known[0] is pod.spec else (pod.spec, asked(pod.spec))
    return found


def left_over(world: World, standing: Iterable[tuple[Pod, str]], known: Known) -> dict[str, dict[str, int]]:
    """By node; only of what it names."""
    left = {
        name: {
            resource: parse_amount(resource, amount)
            for resource, amount in host.node.status.allocatable.items()
            if resource != names.GPU_RESOURCE
        }
        for name, host in world.hosts.items()
        if host.node
    }
    for pod, node in standing:
        here = left.get(node)
        if here is None:
            continue
        for resource, amount in known[pod.metadata.uid or ""][1].items():
            if resource in here:
                here[resource] = at_most(here[resource] - amount)
    return left


def offered(left: Mapping[str, int], wanted: Iterable[str]) -> dict[str, int]:
    """What a node has of each wanted resource; what it need not name and does not is not limited."""
    return {name: left.get(name, 0) for name in wanted if name in left or name not in _OPTIONAL}


def asked(spec: PodSpec) -> Amounts:
    """The most that its containers ask at a time: init containers run alone, those that are restarted stay."""
    together: dict[str, int] = {}
    peak: dict[str, int] = {}
    for container in spec.init_containers:
        if container.restart_policy == "Always":
            _add(together, container)
        else:
            alone = dict(together)
            _add(alone, container)
            _raise_to(peak, alone)
    for each in spec.containers:
        _add(together, each)
    _raise_to(together, peak)
    for resource, amount in spec.resources.requests.items():
        together[resource] = parse_amount(resource, amount)
    for resource, amount in spec.overhead.items():
        together[resource] = together.get(resource, 0) + parse_amount(resource, amount)
    together.pop(names.GPU_RESOURCE, None)
    return {PODS: 1, **{resource: at_most(amount) for resource, amount in together.items() if amount > 0}}


def _add(total: dict[str, int], container: Container | InitContainer) -> None:
    for resource, amount in container.resources.requests.items():
        total[resource] = total.get(resource, 0) + parse_amount(resource, amount)


def _raise_to(total: dict[str, int], least: Mapping[str, int]) -> None:
    for resource, amount in least.items():
        total[resource] = max(total.get(resource, 0), amount)
