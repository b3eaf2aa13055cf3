"""The nodes of a snapshot as columns, so that one pod is weighed against all nodes at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from tokenfactory.planning.placement.inputs import (
    NodeCandidate,
    PodRequest,
    Requirement,
    Snapshot,
    Terms,
)

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

UNLIMITED = np.int64(1) << 60


@dataclass(frozen=True)
class Topology:
    """What a label makes of the nodes: one domain for each of its values."""

    values: tuple[str, ...]
    at: IntArray
    """The domain of each node, numbered as in `values`; one number further: the node has no such label."""


class Fleet:
    """Immutable columns over nodes sorted by name: the order of the input never decides anything."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.nodes = tuple(sorted(snapshot.nodes, key=lambda n: n.name))
        self.count = len(self.nodes)
        self.index = {n.name: i for i, n in enumerate(self.nodes)}
        self.whole_gpus = snapshot.whole_gpus
        self.standing = snapshot.standing
        self.refusing = snapshot.refusing
        self.free_gpus = _ints(n.free_gpus for n in self.nodes)
        self.wake = _ints(n.wake_milliwatts for n in self.nodes)
        self.health = np.array([n.health for n in self.nodes], dtype=np.float64)
        self.linked_gpus = _ints(
            int(UNLIMITED) if n.linked_gpus is None else n.linked_gpus for n in self.nodes
        )
        self.none = np.zeros(0, dtype=np.int64)
        # The last slot stands for "no limit": it pads short paths.
        self.limits = sorted(snapshot.headroom_milliwatts)
        self.limit_index = {name: i for i, name in enumerate(self.limits)}
        self.headroom = _ints([*(snapshot.headroom_milliwatts[d] for d in self.limits), int(UNLIMITED)])
        self.path = self._paths()
        self.columns = tuple(np.ascontiguousarray(column) for column in self.path.T)
        self._by_value: dict[str, dict[str, IntArray]] = {}
        self._topologies: dict[str, Topology] = {}
        self._caching: dict[str, FloatArray] = {}
        self._terms: dict[Requirement, BoolArray] = {}

    def _paths(self) -> IntArray:
        paths = [[self.limit_index[d] for d in n.path if d in self.limit_index] for n in self.nodes]
        depth = max((len(p) for p in paths), default=0) or 1
        none = len(self.limits)
        return np.array([p + [none] * (depth - len(p)) for p in paths], dtype=np.int64).reshape(-1, depth)

    @cached_property
    def fabrics(self) -> Mapping[str, IntArray]:
        """Nodes by NVLink domain; a node without one is a domain of its own."""
        groups: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            groups.setdefault(node.fabric or node.name, []).append(i)
        return {name: _ints(members) for name, members in sorted(groups.items())}

    @cached_property
    def products(self) -> Mapping[str, IntArray]:
        """Nodes by GPU product."""
        groups: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            groups.setdefault(node.product, []).append(i)
        return {product: _ints(members) for product, members in sorted(groups.items())}

    @cached_property
    def fabric_of(self) -> IntArray:
        """Each node's NVLink domain, numbered in the order of `fabrics`."""
        number = np.zeros(self.count, dtype=np.int64)
        for i, members in enumerate(self.fabrics.values()):
            number[members] = i
        return number

    def caching(self, what: str) -> FloatArray:
        """1 on nodes where it need not be loaded anew."""
        if what not in self._caching:
            self._caching[what] = np.array([what in n.cached for n in self.nodes], dtype=np.float64)
        return self._caching[what]

    @cached_property
    def in_shared_fabric(self) -> BoolArray:
        shared = np.zeros(self.count, dtype=np.bool_)
        for members in self.fabrics.values():
            shared[members] = members.size > 1
        return shared

    @cached_property
    def failure_levels(self) -> tuple[IntArray, ...]:
        """For each level of failure domain, largest first and the node itself last, the domain of each node."""
        depth = max((len(n.failure_domains) for n in self.nodes), default=0)
        levels = []
        for level in range(depth):
            # A node that names fewer levels fails with nobody at the others.
            names = [
                "/".join(n.failure_domains[: level + 1]) if level < len(n.failure_domains) else f"\0{n.name}"
                for n in self.nodes
            ]
            levels.append(np.unique(names, return_inverse=True)[1].astype(np.int64))
        return (*levels, np.arange(self.count, dtype=np.int64))

    @cached_property
    def open(self) -> BoolArray:
        return np.array([not n.closed for n in self.nodes], dtype=np.bool_)

    @cached_property
    def taint_groups(self) -> tuple[tuple[NodeCandidate, IntArray], ...]:
        """Nodes with the same taints, each with one of them."""
        groups: dict[object, list[int]] = {}
        for i, node in enumerate(self.nodes):
            groups.setdefault(node.taints, []).append(i)
        return tuple((self.nodes[members[0]], _ints(members)) for members in groups.values())

    def labelled(self, key: str) -> Mapping[str, IntArray]:
        """Nodes by their value of a label."""
        if key not in self._by_value:
            groups: dict[str, list[int]] = {}
            for i, node in enumerate(self.nodes):
                value = node.labels.get(key)
                if value is not None:
                    groups.setdefault(value, []).append(i)
            self._by_value[key] = {v: _ints(members) for v, members in sorted(groups.items())}
        return self._by_value[key]

    def topology(self, key: str) -> "Topology":
        """The domains that a label makes of the nodes."""
        if key not in self._topologies:
            members = self.labelled(key)
            at = np.full(self.count, len(members), dtype=np.int64)
            for number, nodes in enumerate(members.values()):
                at[nodes] = number
            self._topologies[key] = Topology(tuple(members), at)
        return self._topologies[key]

    def meets(self, requirement: Requirement) -> BoolArray:
        if requirement not in self._terms:
            self._terms[requirement] = self._evaluate(requirement)
        return self._terms[requirement]

    def _evaluate(self, requirement: Requirement) -> BoolArray:
        accepts, when_absent = _OPERATORS[requirement.operator]
        mask = np.full(self.count, when_absent, dtype=np.bool_)
        for value, members in self.labelled(requirement.key).items():
            mask[members] = accepts(value, requirement.values)
        return mask

    def selected(self, pod: PodRequest) -> BoolArray:
        """Nodes that the pod's selector and required affinity allow."""
        mask = np.ones(self.count, dtype=np.bool_)
        for key, value in pod.selector.items():
            mask &= self.meets(Requirement(key, "In", (value,)))
        if pod.affinity:
            mask &= self.meets_one(pod.affinity)
        return mask

    def meets_one(self, terms: Terms) -> BoolArray:
        any_term = np.zeros(self.count, dtype=np.bool_)
        for term in terms:
            # An empty term matches nothing, as in Kubernetes.
            all_of = np.full(self.count, bool(term), dtype=np.bool_)
            for requirement in term:
                all_of &= self.meets(requirement)
            any_term |= all_of
        return any_term


def _compare(value: str, bounds: tuple[str, ...], sign: int) -> bool:
    """Gt and Lt compare whole numbers; anything else matches nothing, as in Kubernetes."""
    try:
        return sign * int(value) > sign * int(bounds[0])
    except (ValueError, IndexError):
        return False


_OPERATORS: Mapping[str, tuple[Callable[[str, tuple[str, ...]], bool], bool]] = {
    "In": (lambda value, values: value in values, False),
    "NotIn": (lambda value, values: value not in values, True),
    "Exists": (lambda _value, _values: True, False),
    "DoesNotExist": (lambda _value, _values: False, True),
    "Gt": (lambda value, values: _compare(value, values, 1), False),
    "Lt": (lambda value, values: _compare(value, values, -1), False),
}


def _ints(values: object) -> IntArray:
    return np.fromiter(values, dtype=np.int64)  # type: ignore[call-overload, no-any-return]
