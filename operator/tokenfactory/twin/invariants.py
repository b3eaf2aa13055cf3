"""The budget, checked from the outside: what the simulated GPUs really may draw against what each domain allows.

Nothing here looks at the ledger, the sheets or any status: only limits that people wrote, and the hardware's truth.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from zoneinfo import ZoneInfo

from tokenfactory.api.power_domain import PowerDomain, TimetableEntry
from tokenfactory.api.quantities import is_percent, parse_percent, parse_power


@dataclass(frozen=True)
class NodeTruth:
    """What one node may draw at this moment."""

    name: str
    labels: Mapping[str, str]
    gpu_milliwatts: int
    overhead_milliwatts: int


@dataclass(frozen=True)
class Breach:
    domain: str
    drawing_milliwatts: int
    limit_milliwatts: int

    def __str__(self) -> str:
        return (
            f"the nodes of {self.domain} may draw {self.drawing_milliwatts / 1e6:.3f} kW, and its limit for them is "
            f"{self.limit_milliwatts / 1e6:.3f} kW"
        )


def gpu_truth(enforced_watts: Mapping[str, float], running: Iterable[str], idle_watts: float) -> int:
    """A GPU on which nothing runs draws no more than idle, whatever its limit."""
    busy = set(running)
    return sum(
        round(1000 * (watts if uuid in busy else min(watts, idle_watts)))
        for uuid, watts in enforced_watts.items()
    )


@dataclass(frozen=True)
class _Feeding:
    """One domain at one moment: what its nodes may together draw, and what each of them adds to that."""

    limit_milliwatts: int
    """For its nodes: less the fixed loads, which people state as they do the limit."""
    drawing_milliwatts: int
    fixed_milliwatts: int
    nodes: Mapping[str, NodeTruth]

    @property
    def over(self) -> bool:
        return self.drawing_milliwatts > self.limit_milliwatts


def _feeding(
    domains: Iterable[PowerDomain], nodes: Iterable[NodeTruth], now: datetime
) -> dict[str, _Feeding]:
    by_name = {domain.metadata.name: domain for domain in domains}
    lines = {name: _line(domain, by_name) for name, domain in by_name.items()}
    fleet = [(node, _fed_by(node, by_name, lines)) for node in nodes]
    found = {}
    for name in by_name:
        limit = _limit(name, by_name, lines, now)
        if limit is None:
            continue
        mine = {node.name: node for node, feeding in fleet if name in feeding}
        total = sum(node.gpu_milliwatts + node.overhead_milliwatts for node in mine.values())
        fixed = sum(parse_power(by_name[below].spec.fixed_load) for below in by_name if name in lines[below])
        found[name] = _Feeding(limit - fixed, total, fixed, mine)
    return found


def breaches(domains: Iterable[PowerDomain], nodes: Iterable[NodeTruth], now: datetime) -> list[Breach]:
    """Every domain whose nodes may together draw more than its limit at this time."""
    return [
        Breach(name, feeding.drawing_milliwatts, feeding.limit_milliwatts)
        for name, feeding in _feeding(domains, nodes, now).items()
        if feeding.over
    ]


def drawn(domains: Iterable[PowerDomain], nodes: Iterable[NodeTruth], now: datetime) -> dict[str, int]:
    """By domain, what its nodes may together draw, with its fixed loads, in milliwatts."""
    return {
        name: feeding.drawing_milliwatts + feeding.fixed_milliwatts
        for name, feeding in _feeding(domains, nodes, now).items()
    }


@dataclass
class BudgetWatch:
    """P1 from one look to the next. Only people bring a domain over its limit, and then it may only be left.

    They do so by lowering the limit or stating more fixed load, and by racking a node, which draws there before anybody
    can know. From then on what is drawn may fall and nothing else, until the limit holds again; and from then on it holds.
    """

    _last: dict[str, _Feeding] = field(default_factory=dict)
    _ceilings: dict[str, int] = field(default_factory=dict)
    """By domain that people brought over its limit: the most that it may still draw, in milliwatts."""
    _lowered: set[str] = field(default_factory=set)

    def look(
        self,
        domains: Iterable[PowerDomain],
        nodes: Iterable[NodeTruth],
        wall: datetime,
        *,
        read_anew: bool = True,
    ) -> list[Breach]:
        """`read_anew`: the domains are not those of the last look.

        A limit that is read to be lower was written a while ago, and what had been allowed just before that may still
        be on its way to the GPUs: until the domains are read once more, the draw is held against the old limit.
        """
        found = []
        now = _feeding(domains, nodes, wall)
        if read_anew:
            self._lowered = {
                name for name, each in now.items() if each.limit_milliwatts < self._limit_before(name, each)
            }
        for name, each in now.items():
            if not each.over:
                self._ceilings.pop(name, None)
                continue
            ceiling = self._ceiling(name, each)
            if ceiling is None or each.drawing_milliwatts > ceiling:
                found.append(Breach(name, each.drawing_milliwatts, each.limit_milliwatts))
            if ceiling is not None:
                held = name in self._lowered
                self._ceilings[name] = ceiling if held else min(ceiling, each.drawing_milliwatts)
        self._last = now
        return found

    def _limit_before(self, name: str, now: _Feeding) -> int:
        return self._last.get(name, now).limit_milliwatts

    def _ceiling(self, name: str, now: _Feeding) -> int | None:
        """What a domain over its limit may draw; None where no person explains that it is over."""
        before = self._last.get(name)
        if before is None:  # of a domain that was just made, over nodes that had been drawing already
            return now.drawing_milliwatts
        allowed = self._ceilings.get(name)
        if now.limit_milliwatts < before.limit_milliwatts and allowed is None:
            allowed = before.limit_milliwatts
        racked = _racked(before.nodes, now.nodes)
        if racked:
            allowed = (before.drawing_milliwatts if allowed is None else allowed) + racked
        return allowed


def _racked(before: Mapping[str, NodeTruth], now: Mapping[str, NodeTruth]) -> int:
    """What nodes draw that were not there, in milliwatts; a node's other draw is known a little after it."""
    more = 0
    for name, node in now.items():
        known = before.get(name)
        if known is None:
            more += node.gpu_milliwatts + node.overhead_milliwatts
        else:
            more += max(0, node.overhead_milliwatts - known.overhead_milliwatts)
    return more


def _line(domain: PowerDomain, by_name: Mapping[str, PowerDomain]) -> tuple[str, ...]:
    """The domain, and those that feed it; a cycle is gone round once."""
    line: list[str] = []
    at: PowerDomain | None = domain
    while at is not None and at.metadata.name not in line:
        line.append(at.metadata.name)
        at = by_name.get(at.spec.parent or "")
    return tuple(line)


def _limit(
    name: str, by_name: Mapping[str, PowerDomain], lines: Mapping[str, tuple[str, ...]], now: datetime
) -> int | None:
    """What people wrote, with the windows that are open; None for a share of nothing."""
    whole: int | None = None
    for each in reversed(lines[name]):
        spec = by_name[each].spec
        if is_percent(spec.limit):
            own = None if whole is None else int(parse_percent(spec.limit) * whole)
        else:
            own = parse_power(spec.limit)
        if own is None:
            return None
        opened = [_of(entry.limit, own) for entry in spec.timetable if _open(entry, now)]
        whole = min([own, *opened, *([] if whole is None else [whole])])
    return whole


def _of(limit: str, whole: int) -> int:
    return int(parse_percent(limit) * whole) if is_percent(limit) else parse_power(limit)


def _open(entry: TimetableEntry, now: datetime) -> bool:
    """By the clock on the wall alone: what it shows now lies between what it shows at start and at end."""
    clock = now.astimezone(ZoneInfo(entry.time_zone))
    start, end = time.fromisoformat(entry.start), time.fromisoformat(entry.end)
    shown = clock.time()
    today = not entry.days or clock.strftime("%a") in entry.days
    yesterday = not entry.days or (clock - timedelta(days=1)).strftime("%a") in entry.days
    if start < end:
        return today and start <= shown < end
    return (today and shown >= start) or (yesterday and shown < end)


def _fed_by(
    node: NodeTruth, by_name: Mapping[str, PowerDomain], lines: Mapping[str, tuple[str, ...]]
) -> frozenset[str]:
    """Whatever selects it, and all above. Only matchLabels: the sites here use no more."""
    feeding: set[str] = set()
    for name, domain in by_name.items():
        selector = domain.spec.node_selector
        if selector is None or not selector.match_labels:
            continue
        if selector.match_labels.items() <= dict(node.labels).items():
            feeding.update(lines[name])
    return frozenset(feeding)
