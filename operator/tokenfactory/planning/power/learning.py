"""Learning a class's curve from what its GPUs make at the caps they are given.

The catalogue is the beginning: its curve, scaled to what is observed, holds where nothing was observed yet.
Observations count by how much they saw, fade with age (knees move), and are looked at against the *cap*, not
against measured watts: a board's sensor may be off by 5 %, but it is the cap that is charged.

The SLO floor is learned from above. Down from a cap that was seen to keep the latency with room to spare,
the next is tried on one group; how far a step may go follows from the steepest cliff that is thought
possible. So learning itself never crosses a floor, and a floor that moves up is followed at once.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from tokenfactory.planning.power.goods import FloatArray
from tokenfactory.planning.power.profile import Hull, Point, hull_of_curve

# Watts between the caps at which the curve is kept.
GRID_MILLIWATTS = 5_000
# What is left of an observation's weight after one control period.
KEEP = 0.93
# How far an observation speaks for its neighbours, as a share of the cap.
REACH = 0.02
# The catalogue weighs as much as this many GPU periods.
PRIOR_WEIGHT = 0.5
# Share of all tokens lost per share of cap, on the steepest cliff that is thought possible.
STEEPEST = 3.0
# What must be left of the latency's room: noise and a knee that moves between two looks.
ROOM = 0.06
# And besides, before a step further down: what is thought of the present floor may be this much too good.
DOUBTED = 0.04
# One step down, as a share of the cap: at least so much is worth a try, and at most so much leaves no gap unseen.
STEP = 0.02
LONGEST_STEP = 0.06
# One observation moves what is known by no more than if it were this far off.
FAR_OFF = 0.3
# No GPU makes as many tokens a second, and no token takes as many milliseconds.
ABSURD = 1e8
# A group this much slower than thought halves the weight of what was seen there before.
SLOWER = 0.08
DOUBT = 0.5
KNOWN_WEIGHT = 2.0
# What was looked at once is worth another look from above when it weighs less: knees move.
FORGOTTEN_WEIGHT = KNOWN_WEIGHT / 8
# As a share of the tokens: less than this is not what more watts were tried for.
MORE = 0.01
# Below this confidence nothing that was learned is planned with.
SURE_ENOUGH = 0.5
RECALLED_WEIGHT = 2 * KNOWN_WEIGHT


@dataclass(frozen=True, slots=True)
class Observation:
    """What a group of GPUs with one cap made over one control period."""

    cap_milliwatts: int
    tokens_per_second: float
    """Per GPU."""
    gpus: int = 1
    inter_token_milliseconds: float | None = None


@dataclass(frozen=True)
class Learned:
    """What is known of one class. Arrays are by cap, `GRID_MILLIWATTS` apart from `minimum_milliwatts` on."""

    minimum_milliwatts: int
    maximum_milliwatts: int
    prior: FloatArray
    """Tokens per second by the catalogue."""
    weight: FloatArray
    total: FloatArray
    """Weighted sum of observed tokens per second."""
    latency_weight: float
    latency_total: float
    """Weighted sum of tokens per second times latency, which hardly depends on the cap."""
    allowed_milliseconds: float | None
    """The inter-token latency to keep; None: no SLO floor."""
    start_floor: int
    """The lowest cap that the catalogue vouches for."""

    @property
    def caps(self) -> FloatArray:
        return self.minimum_milliwatts + GRID_MILLIWATTS * np.arange(self.prior.size, dtype=np.float64)

    def estimate(self) -> FloatArray:
        """Tokens per second at each cap: the catalogue's shape, bent to what was seen, never falling with watts."""
        caps = self.caps
        prior = np.maximum(self.prior, 1e-9)
        seen = np.flatnonzero(self.weight > 1e-6)
        if not seen.size:
            return self.prior
        ratio = self.total[seen] / self.weight[seen] / prior[seen]
        overall = float(np.average(ratio, weights=self.weight[seen]))
        near = np.exp(-0.5 * ((caps[:, None] - caps[seen][None, :]) / (REACH * caps[seen][None, :])) ** 2)
        pull = near * self.weight[seen][None, :]
        bent = (pull @ ratio + PRIOR_WEIGHT * overall) / (pull.sum(axis=1) + PRIOR_WEIGHT)
        return _rising(prior * bent, pull.sum(axis=1) + PRIOR_WEIGHT)

    def confidence(self) -> float:
        """0 to 1: how much of the range in use was seen well enough."""
        floor, caps = self.minimum_milliwatts, self.caps
        if self.allowed_milliseconds is not None:
            floor = min(self.safe_floor(), self.start_floor)
        # What brings nobody any tokens is given to nobody, so nobody will see it.
        seen = caps[self.weight >= KNOWN_WEIGHT]
        useful = caps[int(np.argmax(self.prior >= self.prior.max()))]
        use = (caps >= floor) & (caps <= max(useful, seen.max(initial=0)))
        known = self._known()
        return float((known & use).sum() / max(int(use.sum()), 1))

    def _known(self) -> np.typing.NDArray[np.bool_]:
        """Caps that were seen well enough, or are near one that was."""
        seen = np.flatnonzero(self.weight >= KNOWN_WEIGHT)
        known = np.zeros(self.prior.size, dtype=np.bool_)
        for at in seen:
            reach = 2 * REACH * self.caps[at]
            known |= np.abs(self.caps - self.caps[at]) <= reach
        return known

    def _needed_tokens(self) -> float:
        """Below this rate the latency is not kept; 0 while no latency was seen or asked for."""
        if self.allowed_milliseconds is None or self.latency_weight <= 0:
            return 0.0
        return self.latency_total / self.latency_weight / self.allowed_milliseconds

    def safe_floor(self) -> int:
        """The lowest cap that is known, or vouched for, to keep the latency."""
        if self.allowed_milliseconds is None:
            return self.minimum_milliwatts
        needed = self._needed_tokens() * (1 + ROOM)
        if needed <= 0:
            return self.start_floor
        seen = np.flatnonzero(self.weight >= KNOWN_WEIGHT / 2)
        lowest = int(min(self.caps[seen].min(initial=self.start_floor), self.start_floor))
        keeps = (self.estimate() >= needed) & (self.caps >= lowest)
        return int(self.caps[np.flatnonzero(keeps)[0]]) if keeps.any() else self.maximum_milliwatts

    def next_step_down(self) -> int | None:
        """A lower cap to try on one group; None when the next step might cross the SLO floor."""
        floor, step = self.safe_floor(), STEP
        at = round((floor - self.minimum_milliwatts) / GRID_MILLIWATTS)
        at = min(at, self.prior.size - 1)
        needed = self._needed_tokens()
        if self.allowed_milliseconds is not None:
            near = np.abs(self.caps - floor) <= REACH * floor
            if needed <= 0 or self.weight[near].sum() < KNOWN_WEIGHT / 2:
                return None  # the present floor itself was not looked at yet
            # However steep the cliff: what is thought to be left after a step must be enough.
            tokens = self.estimate()
            step = (tokens[at] - needed * (1 + ROOM + DOUBTED)) / tokens[-1] / STEEPEST
        lower = int(floor * (1 - min(step, LONGEST_STEP))) // 1000 * 1000
        return lower if step >= STEP and lower >= self.minimum_milliwatts else None

    def least_known(self, below_milliwatts: int | None = None) -> int | None:
        """The cap above the floor that was seen least; None when all (below some cap) were seen well enough."""
        known = self._known()
        # Near the floor only steps from above are safe: there the curve may have moved unseen.
        lowest = self.safe_floor() * (1 + 2 * STEP) if self.allowed_milliseconds is not None else 0
        highest = self.maximum_milliwatts + 1 if below_milliwatts is None else below_milliwatts
        open_caps = np.flatnonzero(~known & (self.caps >= lowest) & (self.caps < highest))
        if not open_caps.size:
            return None
        # The farthest from anything known first: it tells the most.
        seen = np.flatnonzero(known)
        if not seen.size:
            return int(self.caps[open_caps[-1]])
        distance = np.abs(open_caps[:, None] - seen[None, :]).min(axis=1)
        return int(self.caps[open_caps[int(np.argmax(distance))]])

    def next_try(self, present_milliwatts: int, *, again: bool) -> int | None:
        """A cap below the present one that is worth a look, on one group and for one control period; None: there is none.

        One step below the floor where that is safe; `again` also where enough is known already, and where least is.
        Only ever lower than what the market gave: nothing about a budget depends on it.
        """
        if not again and self.confidence() >= SURE_ENOUGH:
            return None  # what is tried makes fewer tokens
        cap = self.next_step_down()
        if (cap is None or self.knows(cap)) and again:
            cap = self.least_known(present_milliwatts)
        return cap if cap is not None and cap < present_milliwatts and not self.knows(cap) else None

    def next_try_up(self, present_milliwatts: int, highest_milliwatts: int) -> int | None:
        """A cap above the present one that is worth a look, at most the highest that there are watts for; None: none is.

        One step above all that was looked at. Where two steps in a row brought no more tokens it is flat, as the
        catalogue says, until that was forgotten. No latency is in danger, so how steep it is does not matter.
        """
        seen = self.caps[self.weight >= FORGOTTEN_WEIGHT]
        top = int(max(seen.max(initial=present_milliwatts), present_milliwatts))
        tokens = self.estimate()
        at = min(max(round((top - self.minimum_milliwatts) / GRID_MILLIWATTS), 0), tokens.size - 1)
        useful = self.caps[int(np.argmax(tokens >= (1 - MORE) * tokens[at]))]
        cap = min(int(top * (1 + LONGEST_STEP)) // 1000 * 1000, self.maximum_milliwatts)
        flat = top >= useful * (1 + LONGEST_STEP) ** 2 - GRID_MILLIWATTS
        return cap if not flat and top < cap <= highest_milliwatts else None

    def knows(self, cap_milliwatts: int) -> bool:
        """Whether just this cap was seen well enough."""
        at = round((cap_milliwatts - self.minimum_milliwatts) / GRID_MILLIWATTS)
        return 0 <= at < self.weight.size and bool(self.weight[at] >= KNOWN_WEIGHT)

    def hull(self) -> Hull:
        """What the market may sell: from the safe floor up."""
        caps, tokens = self.caps.astype(np.int64), self.estimate()
        curve = [(int(c), float(t)) for c, t in zip(caps, tokens, strict=True)]
        floor = self.safe_floor() if self.allowed_milliseconds is not None else None
        return hull_of_curve(curve, floor)

    def points(self) -> tuple[Point, ...]:
        """The same for a `PowerProfile`'s status: where something was seen."""
        tokens = self.estimate()
        latency = self.latency_total / self.latency_weight if self.latency_weight > 0 else None
        return tuple(
            Point(
                milliwatts=int(self.caps[at]),
                tokens_per_second=float(tokens[at]),
                inter_token_milliseconds=None if latency is None else latency / max(float(tokens[at]), 1e-9),
            )
            for at in np.flatnonzero(self.weight >= KNOWN_WEIGHT)
        )


def begin(
    prior: Iterable[tuple[int, float]],
    *,
    minimum_milliwatts: int,
    maximum_milliwatts: int,
    allowed_milliseconds: float | None = None,
    start_floor: int | None = None,
) -> Learned:
    """Knows only the catalogue. `prior` are (cap, tokens per second); `start_floor` the cap it vouches for."""
    count = max((maximum_milliwatts - minimum_milliwatts) // GRID_MILLIWATTS, 0) + 1
    caps = minimum_milliwatts + GRID_MILLIWATTS * np.arange(count)
    known = sorted(prior) or [(minimum_milliwatts, 1.0), (maximum_milliwatts, 2.0)]
    tokens = np.interp(caps, [c for c, _ in known], [t for _, t in known])
    zero = np.zeros(count)
    return Learned(
        minimum_milliwatts=minimum_milliwatts,
        maximum_milliwatts=maximum_milliwatts,
        prior=_rising(tokens, np.ones(count)),
        weight=zero,
        total=zero,
        latency_weight=0.0,
        latency_total=0.0,
        allowed_milliseconds=allowed_milliseconds,
        start_floor=maximum_milliwatts if start_floor is None else start_floor,
    )


def recall(state: Learned, known: Iterable[Point]) -> Learned:
    """What was known once and written down: each point as if it had just been seen well enough."""
    weight, total = state.weight.copy(), state.total.copy()
    latency_weight, latency_total = state.latency_weight, state.latency_total
    for point in known:
        at = round((point.milliwatts - state.minimum_milliwatts) / GRID_MILLIWATTS)
        if not 0 <= at < state.prior.size or not 0 < point.tokens_per_second < ABSURD:
            continue
        weight[at] += RECALLED_WEIGHT
        total[at] += RECALLED_WEIGHT * point.tokens_per_second
        if point.inter_token_milliseconds is not None:
            latency_weight += RECALLED_WEIGHT
            latency_total += RECALLED_WEIGHT * point.tokens_per_second * point.inter_token_milliseconds
    return replace(
        state, weight=weight, total=total, latency_weight=latency_weight, latency_total=latency_total
    )


def best_by_cap(points: Iterable[Point]) -> list[tuple[int, float]]:
    """(cap, tokens per second) at whatever load is best there: what a saturated GPU makes."""
    best: dict[int, float] = {}
    for point in points:
        best[point.milliwatts] = max(best.get(point.milliwatts, 0.0), point.tokens_per_second)
    return sorted(best.items())


def bend(points: Iterable[Point], known: Iterable[Point]) -> tuple[Point, ...]:
    """Points of a catalogue or a person, at every load, bent to what the factory has seen; and what it has seen.

    Between two caps that were seen the correction goes evenly from one to the other, beyond them it stays. Below the
    lowest that was seen a GPU is not believed to be faster than the points say: an SLO floor may be there.
    """
    given, seen = tuple(points), sorted(known, key=lambda point: point.milliwatts)
    curve = best_by_cap(given)
    if not curve or not seen:
        return (*given, *seen)
    caps = [point.milliwatts for point in seen]
    thought = np.interp(caps, [cap for cap, _ in curve], [tokens for _, tokens in curve])
    shares = [point.tokens_per_second / max(float(t), 1e-9) for point, t in zip(seen, thought, strict=True)]
    bent = []
    for point in given:
        share = float(np.interp(point.milliwatts, caps, shares))
        share = max(min(share, 1.0) if point.milliwatts < caps[0] else share, 1e-9)
        late = point.inter_token_milliseconds
        bent.append(
            replace(
                point,
                tokens_per_second=point.tokens_per_second * share,
                inter_token_milliseconds=None if late is None else late / share,
            )
        )
    return (*bent, *seen)


def learn(state: Learned, observations: Iterable[Observation], keep: float = KEEP) -> Learned:
    """One control period later. Old observations fade first; `keep` is what is left of their weight."""
    weight, total = state.weight * keep, state.total * keep
    latency_weight, latency_total = state.latency_weight * keep, state.latency_total * keep
    expected = state.estimate()
    trusted = state.confidence() > 0
    for seen in observations:
        if not 0 < seen.tokens_per_second < ABSURD or seen.gpus <= 0:
            continue
        at = round((seen.cap_milliwatts - state.minimum_milliwatts) / GRID_MILLIWATTS)
        at = min(max(at, 0), state.prior.size - 1)
        # Noise shrinks with the number of GPUs, but what a group has in common does not.
        counts = seen.gpus / (1 + 0.25 * seen.gpus)
        tokens = seen.tokens_per_second
        if trusted and weight[at] >= KNOWN_WEIGHT:
            tokens = min(max(tokens, (1 - FAR_OFF) * expected[at]), (1 + FAR_OFF) * expected[at])
            if tokens < (1 - SLOWER) * expected[at]:
                # Slower than thought: the knee may have moved up, and down is safe. What is old is doubted.
                near = np.abs(state.caps - state.caps[at]) <= REACH * state.caps[at]
                weight[near] *= DOUBT
                total[near] *= DOUBT
        weight[at] += counts
        total[at] += counts * tokens
        if seen.inter_token_milliseconds is not None and 0 < seen.inter_token_milliseconds < ABSURD:
            latency_weight += counts
            latency_total += counts * seen.tokens_per_second * seen.inter_token_milliseconds
    return replace(
        state, weight=weight, total=total, latency_weight=latency_weight, latency_total=latency_total
    )


def _rising(values: FloatArray, weights: FloatArray) -> FloatArray:
    """The nearest curve that never falls (pool adjacent violators)."""
    means: list[float] = []
    masses: list[float] = []
    sizes: list[int] = []
    for value, mass in zip(values.tolist(), weights.tolist(), strict=True):
        means.append(value)
        masses.append(mass)
        sizes.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            both = masses[-2] + masses[-1]
            mean = (means[-2] * masses[-2] + means[-1] * masses[-1]) / both
            means[-2:], masses[-2:], sizes[-2:] = [mean], [both], [sizes[-2] + sizes[-1]]
    return np.repeat(np.array(means, dtype=np.float64), sizes)
