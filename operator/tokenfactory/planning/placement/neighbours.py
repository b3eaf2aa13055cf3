"""Who stands with whom: rules between pods within a topology domain, such as a node, a rack or a zone.

A spread constraint, a required affinity and a required anti-affinity all look at how many pods with some mark there are
in each domain; an anti-affinity also binds the pods that it speaks of, from the moment that its own pod stands. Where no
pod has such a rule nothing is counted. `move` keeps the counts in step with the room.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from tokenfactory.planning.placement.fleet import BoolArray, Fleet, IntArray
from tokenfactory.planning.placement.inputs import PodRequest, PodRule
from tokenfactory.planning.placement.shape import Shape


class _Tally:
    """How many pods of a kind there are in each domain; nodes without the label are in none."""

    def __init__(self, fleet: Fleet, rule: PodRule, before: Mapping[str, int]) -> None:
        topology = fleet.topology(rule.topology_key)
        self.at = topology.at
        self.counts = np.array([*(before.get(value, 0) for value in topology.values), 0], dtype=np.int64)
        self.labelled = self.at < len(topology.values)
        self.total = sum(before.values())
        """Also those in domains without a node of ours."""

    def here(self) -> IntArray:
        """By node: how many there are in its domain."""
        counts: IntArray = self.counts[self.at]
        return counts

    def move(self, node: int, sign: int) -> None:
        if self.labelled[node]:
            self.counts[self.at[node]] += sign
            self.total += sign


class Neighbours:
    def __init__(self, fleet: Fleet, pods: tuple[PodRequest, ...]) -> None:
        self._fleet = fleet
        kinds = {(pod.marks, pod.spread, pod.near, pod.apart) for pod in pods}
        marks = frozenset[str]().union(*(each for each, _, _, _ in kinds))
        near = {rule for _, _, rules, _ in kinds for rule in rules}
        apart = {rule for _, _, _, rules in kinds for rule in rules}
        spread = {each.rule for _, rules, _, _ in kinds for each in rules}
        none: Mapping[str, int] = {}
        self._with = {
            rule: _Tally(fleet, rule, fleet.standing.get(rule, none)) for rule in near | apart | spread
        }
        refusing = {rule for rule in (*fleet.refusing, *apart) if rule.mark in marks}
        self._against = {rule: _Tally(fleet, rule, fleet.refusing.get(rule, none)) for rule in refusing}
        # Of the pods that this plan places near others: all, and those that are such pods themselves.
        self._leaning = {rule: (_Tally(fleet, rule, none), _Tally(fleet, rule, none)) for rule in near}
        self._unfounded = {rule for rule in near if not self._with[rule].total}
        self._eligible: dict[tuple[Shape, str], BoolArray] = {}
        self._moved: dict[Shape, tuple[_Tally, ...]] = {}
        self._refused_by: dict[Shape, tuple[PodRule, ...]] = {}

    def move(self, shape: Shape, node: int, sign: int) -> None:
        if shape not in self._moved:
            self._moved[shape] = tuple(self._concerned(shape.pod))
        for tally in self._moved[shape]:
            tally.move(node, sign)

    def _concerned(self, pod: PodRequest) -> Iterator[_Tally]:
        yield from (tally for rule, tally in self._with.items() if rule.mark in pod.marks)
        yield from (self._against[rule] for rule in pod.apart if rule in self._against)
        for rule in pod.near:
            everybody, own = self._leaning[rule]
            yield from (everybody, own) if rule.mark in pod.marks else (everybody,)

    # --- spread

    def spread_allows(self, shape: Shape) -> BoolArray:
        mask = np.ones(self._fleet.count, dtype=np.bool_)
        for each in shape.pod.spread:
            tally, eligible = self._with[each.rule], self._in_reach(shape, each.rule.topology_key)
            least = int(tally.counts[eligible].min()) if eligible.any() else 0
            mask &= tally.labelled & (tally.here() + 1 - least <= each.max_skew)
        return mask

    def skew(self, shape: Shape) -> int:
        """By how much the worst of its spread rules is exceeded now; 0: none is."""
        worst = 0
        for each in shape.pod.spread:
            counts = self._with[each.rule].counts[self._in_reach(shape, each.rule.topology_key)]
            if counts.size:
                worst = max(worst, int(counts.max() - counts.min()) - each.max_skew)
        return worst

    def _in_reach(self, shape: Shape, key: str) -> BoolArray:
        """Only domains with a node that the pod may select count for the smallest, as in kube-scheduler."""
        if (shape, key) not in self._eligible:
            topology = self._fleet.topology(key)
            eligible = np.zeros(len(topology.values) + 1, dtype=np.bool_)
            eligible[topology.at[self._fleet.selected(shape.pod)]] = True
            eligible[-1] = False
            self._eligible[shape, key] = eligible
        return self._eligible[shape, key]

    # --- affinity

    def near_allows(self, shape: Shape) -> BoolArray:
        mask = np.ones(self._fleet.count, dtype=np.bool_)
        for rule in shape.pod.near:
            mask &= self._allows_near(shape, rule)
        return mask

    def _allows_near(self, shape: Shape, rule: PodRule) -> BoolArray:
        tally = self._with[rule]
        if not tally.total and rule.mark in shape.pod.marks:
            return tally.labelled  # the first of its kind: the others come to it
        allowed: BoolArray = tally.here() > 0
        return allowed

    def unsupported(self) -> int:
        """Domains where pods stand that must be near others, and the others are gone; the first of a kind is none."""
        found = 0
        for rule, (everybody, own) in self._leaning.items():
            alone = (everybody.counts > 0) & (self._with[rule].counts <= own.counts)
            by_themselves = int((alone & (own.counts == everybody.counts)).sum())
            first = rule in self._unfounded and by_themselves > 0
            found += int(alone.sum()) - first
        return found

    def why_not_near(self, shape: Shape) -> Iterator[tuple[BoolArray, str]]:
        for rule in shape.pod.near:
            yield ~self._allows_near(shape, rule), f"not with {rule.mark} (same {rule.topology_key})"

    # --- anti-affinity

    def may_refuse(self, shape: Shape) -> bool:
        return bool(shape.pod.apart or self._refusing(shape))

    def apart_allows(self, shape: Shape) -> BoolArray:
        mask = np.ones(self._fleet.count, dtype=np.bool_)
        for rule in shape.pod.apart:
            mask &= self._with[rule].here() == 0
        for rule in self._refusing(shape):
            mask &= self._against[rule].here() == 0
        return mask

    def _refusing(self, shape: Shape) -> tuple[PodRule, ...]:
        if shape not in self._refused_by:
            self._refused_by[shape] = tuple(rule for rule in self._against if rule.mark in shape.pod.marks)
        return self._refused_by[shape]

    def why_not_apart(self, shape: Shape) -> Iterator[tuple[BoolArray, str]]:
        for rule in shape.pod.apart:
            yield self._with[rule].here() > 0, f"with {rule.mark} (not the same {rule.topology_key})"
        for rule in self._refusing(shape):
            there = self._against[rule].here() > 0
            yield there, f"with pods that stand apart from {rule.mark} (not the same {rule.topology_key})"
