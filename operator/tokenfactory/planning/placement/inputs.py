"""What placement is told: frozen values that a controller fills from its caches.

Everything that is somebody else's claim is already taken off here (`free_gpus`, `free`, headroom): pods that run, pods
of other schedulers, grants that are written but not yet bound. Placement only adds to that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

NOTHING: Mapping[str, int] = MappingProxyType({})
NO_TEXT: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Taint:
    key: str
    value: str = ""
    effect: str = "NoSchedule"


@dataclass(frozen=True, slots=True)
class Toleration:
    """As in a pod: an empty key with `Exists` tolerates everything, an empty effect every effect."""

    key: str = ""
    operator: Literal["Exists", "Equal"] = "Equal"
    value: str = ""
    effect: str = ""

    def tolerates(self, taint: Taint) -> bool:
        if self.effect and self.effect != taint.effect:
            return False
        if self.key and self.key != taint.key:
            return False
        if self.operator == "Exists":
            return True
        return bool(self.key) and self.value == taint.value


@dataclass(frozen=True, slots=True)
class Requirement:
    """One expression of a node selector term."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]
    values: tuple[str, ...] = ()


Terms = tuple[tuple[Requirement, ...], ...]
"""One of these terms, all of its requirements."""


@dataclass(frozen=True, slots=True)
class PodRule:
    """Some pods, within the same topology domain: what an affinity term or a spread constraint speaks of."""

    topology_key: str
    mark: str
    """What those pods have in common, in words for people, such as `pods of team with app=web`."""


NO_PODS: Mapping[PodRule, Mapping[str, int]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SpreadRule:
    """A topology spread constraint with `DoNotSchedule`."""

    rule: PodRule
    max_skew: int = 1


@dataclass(frozen=True, slots=True)
class Volume:
    """A volume that only some nodes reach, such as one on a node's own disk."""

    claim: str
    reach: Terms


@dataclass(frozen=True, slots=True)
class Offer:
    """What one GPU product is for one model: what a GPU is charged there, and what it makes of a joule."""

    milliwatts_per_gpu: int
    """What the ledger will charge in addition to what the GPU is charged while idle."""
    tokens_per_joule: float


@dataclass(frozen=True, slots=True)
class NodeCandidate:
    """A GPU node as placement sees it."""

    name: str
    product: str
    gpus: int
    free_gpus: int
    path: tuple[str, ...] = ()
    """Its power domains, root first."""
    labels: Mapping[str, str] = field(default_factory=lambda: NO_TEXT)
    taints: tuple[Taint, ...] = ()
    fabric: str = ""
    """The NVLink domain it shares with other nodes; empty when NVLink ends at the node."""
    linked_gpus: int | None = None
    """Free GPUs in its largest NVLink island; absent: all of them are linked."""
    failure_domains: tuple[str, ...] = ()
    """What fails as one, largest first, such as zone and rack; the node itself always counts as the last."""
    health: float = 1.0
    """1: no failures in its history; towards 0 for a node that keeps failing."""
    cached: frozenset[str] = frozenset()
    """Identities of what a replica need not load anew here: images, checkpoints that it can restore."""
    free: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    """What is left of other resources, such as cpu in millicores; a resource not named here is not limited."""
    wake_milliwatts: int = 0
    """What its first pod costs besides its own GPUs: overhead of a sleeping node, limits not yet set in this boot."""
    replicas: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    """How many pods of each model it runs already."""
    features: frozenset[str] = frozenset()
    """What its kubelet declares that it can do."""
    closed: str = ""
    """Why nothing new may come here (not ready, cordoned, silent, quarantined), or empty."""


@dataclass(frozen=True, slots=True)
class PodRequest:
    """A gated pod that wants a node."""

    name: str
    """`<namespace>/<name>`."""
    model: str
    """`<namespace>/<factory>/<model>`: what is spread, and what `replicas` of a node counts."""
    gpus: int
    offers: Mapping[str, Offer]
    """By GPU product; a product that is missing cannot serve the model."""
    band: int = 100
    value: float = 1.0
    """What the replica is worth per second, against other pods of its band."""
    loads: frozenset[str] = frozenset()
    """Identities of what it loads before it serves, as nodes' `cached` names them."""
    selector: Mapping[str, str] = field(default_factory=lambda: NO_TEXT)
    affinity: Terms = ()
    """Required node affinity."""
    volumes: tuple[Volume, ...] = ()
    tolerations: tuple[Toleration, ...] = ()
    marks: frozenset[str] = frozenset()
    """Which of the marks that any rule names are its own."""
    spread: tuple[SpreadRule, ...] = ()
    near: tuple[PodRule, ...] = ()
    """Required pod affinity: where such pods are; anywhere, if there are none yet and it is one of them itself."""
    apart: tuple[PodRule, ...] = ()
    """Required pod anti-affinity: where no such pod is."""
    not_on: Mapping[str, str] = field(default_factory=lambda: NO_TEXT)
    """Nodes that kube-scheduler refused, each with what it said."""
    features: frozenset[str] = frozenset()
    """What the kubelet of its node must have declared: kube-scheduler binds it nowhere else."""
    resources: Mapping[str, int] = field(default_factory=lambda: NOTHING)
    accounts: tuple[str, ...] = ()
    """Budgets charged besides the node's path, such as the factory's own."""
    refused: Mapping[str, str] = field(default_factory=lambda: NO_TEXT)
    """Power domains that do not admit it, each with the grant that is missing."""
    has_place: bool = False
    """It follows one that ran: no limit need have watts for it, but those that refuse it."""
    gang: str = ""
    """Pods of one replica that spans nodes: all of them in one NVLink domain, or none."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    nodes: tuple[NodeCandidate, ...]
    pods: tuple[PodRequest, ...]
    headroom_milliwatts: Mapping[str, int]
    """What each power domain and each budget has left. What is not named here has no limit."""
    standing: Mapping[PodRule, Mapping[str, int]] = field(default_factory=lambda: NO_PODS)
    """How many such pods there are already, by value of the rule's topology key, over all nodes of the cluster."""
    refusing: Mapping[PodRule, Mapping[str, int]] = field(default_factory=lambda: NO_PODS)
    """How many pods are there already that must stand apart from such pods."""
    whole_gpus: int = 8
    """The size of replica that should still fit later."""


@dataclass(frozen=True, slots=True)
class Placed:
    pod: str
    node: str
    milliwatts: int
    """Of its GPUs: to be charged on every domain of the node's path and on the pod's budgets."""
    wake_milliwatts: int
    """Of waking the node: to be charged on the node's path."""
    message: str


@dataclass(frozen=True, slots=True)
class Unplaced:
    pod: str
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class PlacementPlan:
    placed: tuple[Placed, ...]
    unplaced: tuple[Unplaced, ...]
    evaluations: int
    """How often all nodes were weighed for one pod: the work done, the same for the same snapshot."""
