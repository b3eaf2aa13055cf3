"""What is left while a plan is being made: GPUs, other resources, watts of every limit, and who stands where.

The only mutable thing in placement. `place` and `remove` undo each other exactly, so that the search can try and go back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tokenfactory.planning.placement.fleet import UNLIMITED, BoolArray, Fleet, FloatArray, IntArray
from tokenfactory.planning.placement.inputs import PodRequest
from tokenfactory.planning.placement.neighbours import Neighbours
from tokenfactory.planning.placement.preferences import SPREAD_WEIGHT, WHOLE_NODE_WEIGHT
from tokenfactory.planning.placement.shape import Shape


class Room:
    def __init__(self, fleet: Fleet, pods: tuple[PodRequest, ...]) -> None:
        self.fleet = fleet
        self.free_gpus = fleet.free_gpus.copy()
        self.headroom = fleet.headroom.copy()
        self.pods_on = [0] * fleet.count
        self.comfort = 0.0
        """Sum of all preferences so far; what the search maximises once nobody else can be placed."""
        self.watts_taken = 0
        """Milliwatts of all that is placed; of two plans of the same worth the thriftier lets more in later."""
        self.concerning: dict[Shape, tuple[Callable[[Room, Shape], BoolArray], ...]] = {}
        """The filters that can stop a pod of each shape, as far as they were asked."""
        self._free: dict[str, IntArray] = {}
        self.neighbours = Neighbours(fleet, pods)
        by_model: dict[str, list[float]] = {}
        for pod in pods:
            by_model.setdefault(pod.model, []).append(pod.value)
        self._model_worth = {m: sum(v) / len(v) for m, v in by_model.items()}
        self._slot_worth = WHOLE_NODE_WEIGHT * sum(p.value for p in pods) / max(len(pods), 1)
        # To weigh all nodes anew for every pod is most of a plan: what follows is kept in step, or looked up.
        self._levels = fleet.failure_levels
        self._domains_of = list(zip(*(level.tolist() for level in self._levels), strict=True))
        self._level_counts = {m: self._counts(m) for m in by_model}
        self._crowds = {m: self._crowd(m) for m in by_model}
        self._free_before = max(int(self.free_gpus.max(initial=0)), 0)
        self._broken: dict[int, FloatArray] = {}
        self._liked: dict[Shape, FloatArray] = {}
        self._waking = fleet.wake.copy() if fleet.wake.any() else None
        # One at a time, plain numbers are read many times faster than those of an array.
        self._wake: list[int] = fleet.wake.tolist()
        self._path = list(fleet.path)
        self._tightest: IntArray | None = None

    def _counts(self, model: str) -> tuple[list[int], ...]:
        """Replicas of the model by failure domain, for each level."""
        present = np.array([n.replicas.get(model, 0) for n in self.fleet.nodes], dtype=np.int64)
        return tuple(np.bincount(level, weights=present).astype(np.int64).tolist() for level in self._levels)

    def _crowd(self, model: str) -> tuple[FloatArray, ...]:
        """How much one more replica in each failure domain would be against the wish to spread, for each level."""
        return tuple(
            np.array([self._crowded(model, count) for count in counts], dtype=np.float64)
            for counts in self._level_counts[model]
        )

    def _crowded(self, model: str, count: int) -> float:
        return SPREAD_WEIGHT * self._model_worth[model] / len(self._levels) * count / (count + 1)

    def _breaking(self, gpus: int) -> FloatArray:
        """By free GPUs: what the whole-node replicas are worth that no longer fit once so many are taken."""
        if gpus not in self._broken:
            size = max(self.fleet.whole_gpus, 1)
            free = np.arange(self._free_before + 1, dtype=np.int64)
            lost = free // size - np.maximum(free - gpus, 0) // size
            self._broken[gpus] = self._slot_worth * lost.astype(np.float64)
        return self._broken[gpus]

    def free(self, resource: str) -> IntArray:
        if resource not in self._free:
            self._free[resource] = np.array(
                [n.free.get(resource, int(UNLIMITED)) for n in self.fleet.nodes], dtype=np.int64
            )
        return self._free[resource]

    def watts_needed(self, shape: Shape) -> IntArray:
        """On the path of each node: the pod's GPUs, and waking the node if it would be the first."""
        return shape.need if self._waking is None else shape.need + self._waking

    def shortfall(self, shape: Shape) -> IntArray:
        """Milliwatts missing at the shortest limit of each node's whole path, or of the pod's budgets."""
        missing: IntArray = self.watts_needed(shape) - self.tightest()
        if shape.accounts.size:
            missing = np.maximum(missing, shape.need - self.headroom[shape.accounts].min())
        return missing

    def tightest(self) -> IntArray:
        """The least headroom on each node's path. Column by column: minima along short rows are slow."""
        if self._tightest is None:
            least: IntArray = self.headroom.take(self.fleet.columns[0])
            for column in self.fleet.columns[1:]:
                np.minimum(least, self.headroom.take(column), out=least)
            self._tightest = least
        return self._tightest

    def shortest_limit(self, shape: Shape, node: int) -> tuple[str, int]:
        """The limit that misses most for this pod on this node, and how much."""
        on_path = int(self.watts_needed(shape)[node])
        candidates = [(on_path - int(self.headroom[d]), int(d)) for d in self.fleet.path[node]]
        candidates += [(int(shape.need[node]) - int(self.headroom[a]), int(a)) for a in shape.accounts]
        missing, limit = max((m, -d) for m, d in candidates if d < len(self.fleet.limits))
        return self.fleet.limits[-limit], missing

    def place(self, shape: Shape, node: int) -> None:
        self.comfort += self._gain(shape, node)
        self._move(shape, node, 1)
        self._count(shape, node, 1)

    def remove(self, shape: Shape, node: int) -> None:
        self._move(shape, node, -1)
        self._count(shape, node, -1)
        self.comfort -= self._gain(shape, node)

    def _move(self, shape: Shape, node: int, sign: int) -> None:
        pod = shape.pod
        alone = self.pods_on[node] == (0 if sign > 0 else 1)
        need = shape.needs[node]
        watts = need + (self._wake[node] if alone else 0)
        self.watts_taken += sign * watts
        self.pods_on[node] += sign
        self.free_gpus[node] -= sign * pod.gpus
        self.headroom[self._path[node]] -= sign * watts
        self._tightest = None
        if self._waking is not None:
            self._waking[node] = 0 if self.pods_on[node] else self._wake[node]
        if shape.accounts.size:
            self.headroom[shape.accounts] -= sign * need
        for name, amount in pod.resources.items():
            self.free(name)[node] -= sign * amount

    def _count(self, shape: Shape, node: int, sign: int) -> None:
        model = shape.pod.model
        for at, counts, crowd in zip(
            self._domains_of[node], self._level_counts[model], self._crowds[model], strict=True
        ):
            counts[at] += sign
            crowd[at] = self._crowded(model, counts[at])
        self.neighbours.move(shape, node, sign)

    def _gain(self, shape: Shape, node: int) -> float:
        """What placing it there adds to the comfort; `remove` takes the same away."""
        gain = shape.pod.value * float(shape.preference[node])
        gain -= float(self._breaking(shape.pod.gpus)[self.free_gpus[node]])
        for at, crowd in zip(self._domains_of[node], self._crowds[shape.pod.model], strict=True):
            gain -= float(crowd[at])
        return gain

    def gains(self, shape: Shape) -> FloatArray:
        """`_gain` for all nodes at once; of no meaning where the pod does not fit."""
        if shape not in self._liked:
            self._liked[shape] = shape.pod.value * shape.preference
        gain: FloatArray = self._liked[shape] - self._breaking(shape.pod.gpus)[self.free_gpus]
        crowds = self._crowds[shape.pod.model]
        for level, crowd in zip(self._levels[:-1], crowds[:-1], strict=True):
            gain -= crowd[level]
        gain -= crowds[-1]  # the last level is the node itself
        return gain
