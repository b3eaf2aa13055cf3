"""From measured points to what a class can sell: the upper hull of tokens over watts.

Real profiles are flat and then fall off a cliff. Below the knee they are not concave: the hull bridges that
stretch, and a bridge (a *chord*) is no place for a GPU to be: a share of the replicas is parked instead.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from tokenfactory.planning.power.goods import PowerClass

# Points this close below the hull count as on it: they are as good, and measurements are not exact.
_ON_HULL = 0.995
LIFT_TO = 0.9
"""Of the highest limit: prefill, which draws the most, hardly gains from the last tenth."""
LEAST_GAIN = 1e-3
"""What the watts of a lifted cap are taken to bring, as a share of the tokens."""


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement, per GPU."""

    milliwatts: int
    """The cap."""
    tokens_per_second: float
    concurrency: int = 1
    """Requests that one replica serves at once."""
    inter_token_milliseconds: float | None = None
    first_token_milliseconds: float | None = None


@dataclass(frozen=True, slots=True)
class Requirement:
    """What is asked of a model: latencies, and how many requests a replica has to serve at once."""

    inter_token_milliseconds: float | None = None
    first_token_milliseconds: float | None = None
    concurrency: int | None = None
    """The load per replica, at which latencies have to hold; None: as much as it can take, or as little."""


@dataclass(frozen=True, slots=True)
class Hull:
    """What a GPU makes of its watts, for one requirement."""

    milliwatts: tuple[int, ...]
    """Rising; the first is NVML's minimum."""
    tokens: tuple[float, ...]
    floor: int
    """Index of the SLO floor: the lowest cap that still keeps the latency; 0 when none is asked."""
    chords: tuple[bool, ...]
    knee: int
    """Index of the point with the most tokens per joule."""
    meets_slo: bool
    """False when no measured point keeps the latency, at whatever watts."""
    curve: tuple[tuple[int, float], ...] = ()
    """What was measured, where the hull bridges it."""

    def to_class(
        self,
        name: str,
        *,
        band: int,
        value_per_token: float = 1.0,
        factory: str = "",
        gpus_per_replica: int = 1,
        min_replicas: int = 0,
        idle_milliwatts: int = 0,
    ) -> PowerClass:
        return PowerClass(
            name=name,
            band=band,
            milliwatts=self.milliwatts,
            tokens=self.tokens,
            value_per_token=value_per_token,
            floor=self.floor,
            factory=factory,
            chords=self.chords,
            curve=self.curve,
            gpus_per_replica=gpus_per_replica,
            min_replicas=min_replicas,
            idle_milliwatts=idle_milliwatts,
        )


def parked(minimum_milliwatts: int) -> Hull:
    """The alternative to running: NVML's minimum and no tokens."""
    return Hull((minimum_milliwatts,), (0.0,), 0, (), 0, meets_slo=True)


def unknown(minimum_milliwatts: int, maximum_milliwatts: int) -> Hull:
    """What is assumed of a model nobody measured: tokens in proportion to watts, all the way.

    That claims no knee: such a class is neither parked nor throttled for an efficiency that may not exist.
    """
    if maximum_milliwatts <= minimum_milliwatts:
        return parked(minimum_milliwatts)
    tokens = (float(minimum_milliwatts) / 1000, float(maximum_milliwatts) / 1000)
    return Hull((minimum_milliwatts, maximum_milliwatts), tokens, 0, (False,), 1, meets_slo=True)


def lifted(hull: Hull, maximum_milliwatts: int) -> Hull:
    """With watts that bring next to nothing, up to `LIFT_TO` of the most: for a moment in which a latency is in danger.

    What prefill makes of watts is in no profile of generated tokens. The market buys them only when nobody else can
    make anything of them.
    """
    useful = max((i for i in range(1, len(hull.tokens)) if hull.tokens[i] > hull.tokens[i - 1]), default=0)
    top, watts, tokens = int(maximum_milliwatts * LIFT_TO), hull.milliwatts[useful], hull.tokens[useful]
    if useful == 0 or watts >= top:
        return hull
    before = (tokens - hull.tokens[useful - 1]) / (watts - hull.milliwatts[useful - 1])
    little = min(LEAST_GAIN * tokens, before * (top - watts) / 2)
    return replace(
        hull,
        milliwatts=(*hull.milliwatts[: useful + 1], top),
        tokens=(*hull.tokens[: useful + 1], tokens + little),
        chords=(*hull.chords[:useful], False),
    )


def hull_of(
    points: Iterable[Point],
    requirement: Requirement,
    *,
    minimum_milliwatts: int,
    maximum_milliwatts: int,
    gpus_per_replica: int = 1,
) -> Hull:
    """The hull for one requirement, between the limits that NVML reports."""
    sound = [p for p in points if p.milliwatts > 0 and p.tokens_per_second >= 0]
    loaded = _at_load(sound, requirement.concurrency)
    if not loaded or maximum_milliwatts <= minimum_milliwatts:
        return unknown(minimum_milliwatts, maximum_milliwatts)
    keeping = [p for p in loaded if _keeps(p, requirement, gpus_per_replica)]
    asked = (
        requirement.inter_token_milliseconds is not None or requirement.first_token_milliseconds is not None
    )
    meets = bool(keeping)
    curve = _curve(keeping or loaded, minimum_milliwatts, maximum_milliwatts)
    if not asked or not meets:
        return _finish(curve, None, meets_slo=meets)
    at_load = [p for p in keeping if p.concurrency == requirement.concurrency]
    floor = max(min(p.milliwatts for p in at_load or keeping), minimum_milliwatts)
    floor = min(maximum_milliwatts, floor)
    below = _curve(loaded, minimum_milliwatts, maximum_milliwatts)
    kept = [(w, t) for w, t in curve if w >= floor] or [(floor, curve[-1][1])]
    start = (minimum_milliwatts, min(below[0][1], kept[0][1]))
    if kept[0][0] == minimum_milliwatts:
        return _finish(kept, None, meets_slo=True)
    return _finish([start, *kept], 1, meets_slo=True)


def hull_of_curve(curve: list[tuple[int, float]], floor: int | None) -> Hull:
    """The hull of one curve from NVML's minimum up; `floor` is the SLO floor's cap, if there is one."""
    if len(curve) < 2:
        return parked(curve[0][0])
    if floor is None or floor <= curve[0][0]:
        return _finish(curve, None, meets_slo=True)
    kept = [(w, t) for w, t in curve if w >= floor] or [curve[-1]]
    return _finish([curve[0], *kept], 1, meets_slo=True)


def _at_load(points: list[Point], concurrency: int | None) -> list[Point]:
    """Points a replica with that load can be at, one at the load itself for each cap at which that is known.

    A replica never serves more at once than it is sent. Beyond what was measured at a cap tokens and latencies follow the
    load in proportion: of both the worse that they can be.
    """
    if concurrency is None or not points:
        return points
    densest = max(p.concurrency for p in points)
    rows: dict[int, list[Point]] = {}
    for point in sorted(points, key=lambda p: (p.milliwatts, p.concurrency)):
        rows.setdefault(point.milliwatts, []).append(point)
    loaded = [p for p in points if p.concurrency < concurrency]
    for row in rows.values():
        least, most = row[0], row[-1]
        if concurrency <= least.concurrency:
            tokens = least.tokens_per_second * concurrency / least.concurrency
            loaded.append(replace(least, concurrency=concurrency, tokens_per_second=tokens))
        elif concurrency <= most.concurrency:
            a, b = next((a, b) for a, b in pairwise(row) if concurrency <= b.concurrency)
            loaded.append(between(a, b, concurrency))
        elif most.concurrency == densest:
            inter = most.inter_token_milliseconds
            slower = None if inter is None else inter * concurrency / most.concurrency
            loaded.append(replace(most, concurrency=concurrency, inter_token_milliseconds=slower))
    return loaded


def between(a: Point, b: Point, concurrency: int) -> Point:
    """What lies between two measurements at one cap."""
    part = (concurrency - a.concurrency) / (b.concurrency - a.concurrency)

    def mix(x: float | None, y: float | None) -> float | None:
        return None if x is None or y is None else x + (y - x) * part

    return Point(
        milliwatts=a.milliwatts,
        tokens_per_second=a.tokens_per_second + (b.tokens_per_second - a.tokens_per_second) * part,
        concurrency=concurrency,
        inter_token_milliseconds=mix(a.inter_token_milliseconds, b.inter_token_milliseconds),
        first_token_milliseconds=mix(a.first_token_milliseconds, b.first_token_milliseconds),
    )


def _keeps(point: Point, requirement: Requirement, gpus_per_replica: int) -> bool:
    inter = point.inter_token_milliseconds
    if inter is None and point.tokens_per_second > 0:
        # Each of the requests in flight gets its share of the replica's tokens.
        inter = 1000 * point.concurrency / (point.tokens_per_second * gpus_per_replica)
    wanted = requirement.inter_token_milliseconds
    if wanted is not None and (inter is None or inter > wanted):
        return False
    first = requirement.first_token_milliseconds
    return first is None or point.first_token_milliseconds is None or point.first_token_milliseconds <= first


def _curve(points: list[Point], minimum: int, maximum: int) -> list[tuple[int, float]]:
    """Best tokens at each cap, never falling with more watts, cut to NVML's limits."""
    best: dict[int, float] = {}
    for point in points:
        best[point.milliwatts] = max(best.get(point.milliwatts, 0.0), point.tokens_per_second)
    rising: list[tuple[int, float]] = []
    for watts in sorted(best):
        rising.append((watts, max(best[watts], rising[-1][1] if rising else 0.0)))
    inside = [(w, t) for w, t in rising if minimum < w < maximum]
    # Nothing is known below the lowest point: it is taken for the foot of the cliff.
    start = (minimum, _interpolate(rising, minimum) if rising[0][0] <= minimum else 0.0)
    return [start, *inside, (maximum, _interpolate(rising, maximum))]


def _interpolate(curve: list[tuple[int, float]], watts: int) -> float:
    if watts <= curve[0][0]:
        return curve[0][1]
    for (w0, t0), (w1, t1) in pairwise(curve):
        if watts <= w1:
            return t0 + (t1 - t0) * (watts - w0) / (w1 - w0)
    return curve[-1][1]


def _finish(curve: list[tuple[int, float]], floor: int | None, *, meets_slo: bool) -> Hull:
    """The hull above the floor; the stretch below it, if there is one, stays a single piece."""
    first = floor or 0
    kept = _upper_hull(curve[first:])
    hull = curve[:first] + kept
    chords = [True] * first + [_is_chord(curve[first:], a, b) for a, b in pairwise(kept)]
    # A driver may name no lowest limit; one such GPU must not end every plan.
    per_joule = [t / max(w, 1) for w, t in hull]
    return Hull(
        milliwatts=tuple(w for w, _ in hull),
        tokens=tuple(t for _, t in hull),
        floor=first,
        chords=tuple(chords),
        knee=max(range(len(hull)), key=lambda i: (per_joule[i], -i)),
        meets_slo=meets_slo,
        curve=tuple(curve) if any(chords) else (),
    )


def _upper_hull(curve: list[tuple[int, float]]) -> list[tuple[int, float]]:
    top = max(t for _, t in curve)
    hull: list[tuple[int, float]] = []
    for point in curve:
        while len(hull) >= 2 and _turns_up(hull[-2], hull[-1], point):
            hull.pop()
        hull.append(point)
        if point[1] >= top:
            break  # more watts bring no more tokens
    return hull


def _turns_up(a: tuple[int, float], b: tuple[int, float], c: tuple[int, float]) -> bool:
    return (b[1] - a[1]) * (c[0] - b[0]) <= (c[1] - b[1]) * (b[0] - a[0])


def _is_chord(curve: list[tuple[int, float]], a: tuple[int, float], b: tuple[int, float]) -> bool:
    """Whether the measured curve runs clearly below the straight line between two points of the hull."""
    for watts, tokens in curve:
        if a[0] < watts < b[0]:
            line = a[1] + (b[1] - a[1]) * (watts - a[0]) / (b[0] - a[0])
            if tokens < _ON_HULL * line:
                return True
    # From no tokens at all up to the first measured point there is a cliff somewhere.
    return a[1] == 0 and b[1] > 0
