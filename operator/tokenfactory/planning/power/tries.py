"""Caps that are tried at more than the market gives: with which watts, and in which sheets.

Only with watts that nobody was sold: what is left in every domain and every budget that the try would draw from, once
everything else has all that is meant for it. What other tries leave counts only after it was read back. A domain's sheet
speaks for all below it, so where one above has to rise, its other children are held at what they have.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.lines import Line
from tokenfactory.planning.power.raises import Targets
from tokenfactory.planning.power.spending import Budgets

MOST_PER_HOUR: Final = 20
"""Tries of one model."""
MOST_AT_ONCE: Final = 4
"""In the whole site."""


@dataclass(frozen=True)
class Spare:
    """Watts that nobody was sold, by place: a domain, or a budget that is paid from."""

    left: dict[Hashable, int]

    def each(self, places: Iterable[Hashable], gpus: int) -> int:
        """How much more each of so many GPUs may have; negative where too much is spent already."""
        return min(self.left[place] for place in places) // max(gpus, 1)

    def take(self, places: Iterable[Hashable], gpus: int, milliwatts: int) -> None:
        for place in places:
            self.left[place] -= gpus * milliwatts


def left_over(ledger: Ledger, budgets: Budgets, wishes: Iterable[Targets]) -> Spare:
    """What is left by domain and by budget if every GPU has the most of what it may be drawing now and of all wishes."""
    wanted = tuple(wishes)
    left: dict[Hashable, int] = {name: domain.usable_milliwatts for name, domain in ledger.domains.items()}
    left |= {name: each.milliwatts for name, each in budgets.allotments.items()}
    for line, nodes in ledger.lines.items():
        for place, milliwatts in _taken(ledger, budgets, line, wanted).items():
            if place in left:
                left[place] -= milliwatts * len(nodes)
    return Spare(left)


def _taken(ledger: Ledger, budgets: Budgets, line: Line, wanted: Iterable[Targets]) -> dict[str, int]:
    """What one node of this line takes from each domain and budget."""
    most = {
        name: max(ledger.highest(line, name), *(given(each, line.domains, name) for each in wanted))
        for name in line.class_names
    }
    paid = budgets.added(
        line, (*line.demands, *line.pending), lambda demand: demand.each(most[demand.class_name])
    )
    return {**dict.fromkeys(line.domains, line.charge(most.__getitem__)), **paid}


def given(targets: Targets, domains: Iterable[str], class_name: str) -> int:
    """What a class gets below these domains together; 0 where none of them names it."""
    caps = [targets[name][class_name].cap for name in domains if class_name in targets.get(name, {})]
    return min(caps, default=0)


def gpus_of(ledger: Ledger) -> Mapping[tuple[str, str], int]:
    """How many GPUs may stand in each domain and below, by (domain, class)."""
    found: Counter[tuple[str, str]] = Counter()
    for line, nodes in ledger.lines.items():
        for demand in (*line.demands, *line.pending):
            for domain in line.domains:
                found[domain, demand.class_name] += demand.count * len(nodes)
    return found


def held_beside(ledger: Ledger, targets: Targets, domain: str, class_name: str) -> dict[str, int]:
    """Where a class must be held, and at what, so that it rises nowhere but in this domain: those beside its path whose
    own sheets allow more than they get.
    """
    path = ledger.path(domain)
    beside = [name for name, each in ledger.domains.items() if each.parent in path and name not in path]
    found = {}
    for name in beside:
        allowed = targets.get(name, {}).get(class_name)
        gets = given(targets, ledger.path(name), class_name)
        if allowed is not None and allowed.cap > gets:
            found[name] = gets
    return found


def raised_in(ledger: Ledger, targets: Targets, domain: str, class_name: str, cap: int) -> Targets:
    """Targets with more for one class in one domain alone. Fallbacks do not rise: nobody tries anything unwatched."""
    changed = held_for(ledger, targets, domain, class_name)
    for name in ledger.path(domain):
        before = changed.get(name, {}).get(class_name)
        if before is not None and before.cap < cap:
            changed[name] = {**changed[name], class_name: Allowance(cap, before.fallback)}
    return changed


def held_for(
    ledger: Ledger, targets: Targets, domain: str, class_name: str
) -> dict[str, Mapping[str, Allowance]]:
    """The first step towards that, which takes nothing from anybody."""
    changed = dict(targets)
    for name, most in held_beside(ledger, targets, domain, class_name).items():
        held = Allowance(most, min(changed[name][class_name].fallback, most))
        changed[name] = {**changed[name], class_name: held}
    return changed


def are_held(ledger: Ledger, targets: Targets, domain: str, class_name: str) -> bool:
    """Whether no agent beside the path may yet obey more of its own domain's sheet than what it is to be held at."""
    for name, most in held_beside(ledger, targets, domain, class_name).items():
        caps = ledger.caps_since(name, ledger.least_acked(name))
        if caps is None or caps.get(class_name, 0) > most:
            return False
    return True
