"""The shape of the tree of power domains and what stands in it, as arrays.

Domains are numbered by *position*: level by level from the roots, siblings side by side. So a level
of the tree is one slice, and so are the children of any domain.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tokenfactory.planning.power.goods import IntArray


@dataclass(frozen=True)
class Forest:
    """Domains of one or more trees. `parents` must be free of cycles; `tree.build` sees to that."""

    names: tuple[str, ...]
    """By position."""
    parent: IntArray
    """Position of each domain's parent, -1 for a root."""
    layer_start: tuple[int, ...]
    """Where each level of the tree begins, and the count of all domains."""
    position: IntArray
    """From the caller's numbering to positions."""

    @property
    def count(self) -> int:
        return len(self.names)

    @cached_property
    def children(self) -> IntArray:
        """Children of position p are positions children[p] .. children[p + 1] - 1."""
        roots = self.layer_start[1] if len(self.layer_start) > 1 else 0
        found = np.searchsorted(self.parent[roots:], np.arange(self.count + 1)) + roots
        return found.astype(np.int64)

    @cached_property
    def index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def depth(self) -> IntArray:
        starts = np.array(self.layer_start, dtype=np.int64)
        return np.repeat(np.arange(starts.size - 1), starts[1:] - starts[:-1])

    def path(self, position: int) -> list[int]:
        """From the domain up to its root."""
        found = [position]
        while (position := int(self.parent[position])) >= 0:
            found.append(position)
        return found

    def subtree_sums(self, own: IntArray) -> IntArray:
        total = own.copy()
        for layer in range(len(self.layer_start) - 2, 0, -1):
            a, b = self.layer_start[layer], self.layer_start[layer + 1]
            np.add.at(total, self.parent[a:b], total[a:b])
        return total


def plant(parents: IntArray, names: tuple[str, ...] | None = None) -> Forest:
    """Numbers the domains level by level. `parents` by the caller's numbering, -1 for a root."""
    count = parents.size
    depth = np.zeros(count, dtype=np.int64)
    above = parents.copy()
    while (above >= 0).any():
        depth += above >= 0
        above = np.where(above >= 0, parents[above], -1)
    position = np.full(count, -1, dtype=np.int64)
    order: list[IntArray] = []
    starts = [0]
    for level in range(int(depth.max()) + 1 if count else 0):
        members = np.flatnonzero(depth == level)
        if level:
            members = members[np.argsort(position[parents[members]], kind="stable")]
        position[members] = np.arange(starts[-1], starts[-1] + members.size)
        order.append(members)
        starts.append(starts[-1] + members.size)
    by_position = np.concatenate(order) if order else np.zeros(0, dtype=np.int64)
    old_parent = parents[by_position]
    parent = np.where(old_parent >= 0, position[old_parent], -1)
    labels = tuple(names[i] for i in by_position.tolist()) if names else tuple(map(str, by_position.tolist()))
    return Forest(labels, parent, tuple(starts), position)


@dataclass(frozen=True)
class Fleet:
    """How many GPUs of which class stand in which domain; sorted by domain, then class, no pair twice."""

    domain: IntArray
    class_index: IntArray
    gpus: IntArray


def muster(
    forest: Forest, domain: IntArray, class_index: IntArray, classes: int, gpus: IntArray | None = None
) -> Fleet:
    """Counts GPUs. `domain` in the caller's numbering; one entry per GPU, or with a count in `gpus`."""
    key = forest.position[domain] * classes + class_index
    cells = forest.count * classes
    if gpus is None:
        # Sorting small numbers beats counting into a table that does not fit a cache.
        ordered = np.sort(key.astype(np.int32) if cells < 1 << 31 else key)
        first = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1]))[: ordered.size])
        pairs = ordered[first].astype(np.int64)
        return Fleet(pairs // classes, pairs % classes, np.diff(np.append(first, ordered.size)))
    if cells <= 4 * key.size + (1 << 22):
        counts = np.bincount(key, weights=gpus, minlength=cells)
        where = np.flatnonzero(counts)
        found = counts[where].astype(np.int64)
    else:
        where, inverse = np.unique(key, return_inverse=True)
        found = np.bincount(inverse, weights=gpus).astype(np.int64)
    where = where[found > 0]
    return Fleet(where // classes, where % classes, found[found > 0])
