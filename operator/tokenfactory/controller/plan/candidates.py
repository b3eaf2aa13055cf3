"""The GPU nodes as placement sees them: what each has left, who is there, what lies on its disk, and why it is closed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from tokenfactory.api import names
from tokenfactory.controller.plan.at_hand import AtHand
from tokenfactory.controller.plan.demands import NODE_NAME
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.leftovers import Known, know, left_over, offered, placed
from tokenfactory.controller.plan.quarantining import health_of
from tokenfactory.controller.plan.world import GpuHost, Replica, World, gpus_asked
from tokenfactory.planning.placement.inputs import NodeCandidate, Taint

DOMAIN: Final = "power domain "
"""Before a domain's name: a label that only placement sees, so that a factory's domain is one more selector."""
_FAILURE_LABELS: Final = ("topology.kubernetes.io/zone", "topology.tokenfactory.dev/rack")


class Site:
    """Everything that is the same for all pods that wait in a round."""

    def __init__(
        self, world: World, grid: Grid, waiting: Sequence[Replica], asked: Known, mute: frozenset[str]
    ) -> None:
        self._world, self._grid, self._mute = world, grid, mute
        self.standing = list(placed(world))
        pods = [pod for pod, _ in self.standing] + [replica.pod for replica in waiting]
        self.known = know(pods, asked)
        self._left = left_over(world, self.standing, self.known)
        self._wanted = sorted({name for replica in waiting for name in self.known[replica.uid][1]})
        self._grouped = any(replica.group for replica in waiting)
        self._health = health_of(world)
        self._at_hand = AtHand(world, waiting)
        self._coming: Counter[str] = Counter()
        for pod, node in self.standing:
            if not pod.spec.node_name and pod.metadata.uid not in world.granted_on:
                self._coming[node] += gpus_asked(pod)

    def candidates(self) -> tuple[NodeCandidate, ...]:
        return tuple(
            self._candidate(host) for host in self._world.hosts.values() if host.held and host.product
        )

    def _candidate(self, host: GpuHost) -> NodeCandidate:
        labels = host.node.metadata.labels if host.node else {}
        path = self._grid.places[host.name].path if host.name in self._grid.places else ()
        taints = host.node.spec.taints if host.node else ()
        replicas = Counter(grant.class_name.partition("@")[0] for grant in host.grants)
        return NodeCandidate(
            name=host.name,
            product=host.product,
            gpus=host.gpu_count,
            free_gpus=max(0, free_gpus(self._world, host) - self._coming[host.name]),
            path=path,
            labels={**labels, NODE_NAME: host.name, **{DOMAIN + domain: "yes" for domain in path}},
            taints=tuple(Taint(taint.key, taint.value, taint.effect) for taint in taints),
            fabric=_fabric(host, labels, grouped=self._grouped),
            failure_domains=tuple(labels[label] for label in _FAILURE_LABELS if label in labels),
            health=self._health.get(host.name, 1.0),
            cached=self._at_hand.on(host),
            free=offered(self._left.get(host.name, {}), self._wanted),
            replicas=replicas,
            features=frozenset(host.node.status.declared_features if host.node else ()),
            closed=_closed(self._world, self._grid, host)
            or ("whose agent does not answer" if host.name in self._mute else ""),
        )


def _fabric(host: GpuHost, labels: Mapping[str, str], *, grouped: bool) -> str:
    """The NVLink domain that its GPUs report. Where NVLink ends at the node, a group shares the network of a zone."""
    reported = {gpu.fabric for gpu in host.held.status.gpus if gpu.fabric} if host.held else set()
    if len(reported) == 1:
        return reported.pop()
    return f"network of zone {labels.get(_FAILURE_LABELS[0], 'unnamed')}" if grouped and not reported else ""


def free_gpus(world: World, host: GpuHost) -> int:
    """That a new pod could get: sound ones, as many as kube-scheduler may hand out, less everybody's claims.

    A stranger's claim counts from when it is bound, and still when its pod is gone and its GPU is not.
    """
    gpus = host.held.status.gpus if host.held else ()
    sound = host.gpu_count - sum(not gpu.healthy for gpu in gpus)
    offered_gpus = host.node.status.allocatable.get(names.GPU_RESOURCE, "") if host.node else ""
    usable = min(sound, int(offered_gpus)) if offered_gpus.isdigit() else sound
    held = sum(1 for gpu in gpus if gpu.pod and not gpu.pod_uid)
    bound = sum(gpus_asked(pod) for pod in world.foreign.get(host.name, ()))
    return max(0, usable - sum(grant.gpus for grant in host.grants) - max(held, bound))


def _closed(world: World, grid: Grid, host: GpuHost) -> str:
    if host.name not in grid.places:
        return "in no power domain"
    if host.held is not None and (
        host.held.spec.former_paths or host.held.spec.path != grid.places[host.name].path
    ):
        return "moving to another power domain"
    if host.fenced:
        return "fenced"
    if host.held is not None and host.held.spec.quarantine is not None:
        return "quarantined"
    if host.silent_seconds is None or world.lost(host):
        return "silent"
    if host.node is None or not host.node_ready:
        return "not ready"
    if host.node.spec.unschedulable:
        return "cordoned"
    return ""
