"""What the best plan of a snapshot is worth, by a MILP that shares nothing with the search, and a plain checker.

Stages: the worth placed, band by band from the highest (each with the bands above at least as the plan has them), then
comfort with all bands at least as the plan has them.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass

import highspy

from tokenfactory.planning.placement.filters import allowed
from tokenfactory.planning.placement.fleet import Fleet
from tokenfactory.planning.placement.inputs import PlacementPlan, PodRequest, PodRule, Snapshot, SpreadRule
from tokenfactory.planning.placement.preferences import SPREAD_WEIGHT, WHOLE_NODE_WEIGHT, preference, scores
from tokenfactory.planning.placement.shape import shape_key

INF = highspy.kHighsInf


def violations(  # noqa: PLR0912 - one list of everything that may be wrong
    snapshot: Snapshot, plan: PlacementPlan
) -> list[str]:
    """Every limit that the plan breaks, added up from scratch."""
    nodes = {n.name: n for n in snapshot.nodes}
    pods = {p.name: p for p in snapshot.pods}
    drawn: dict[str, int] = defaultdict(int)
    used: dict[tuple[str, str], int] = defaultdict(int)
    fabrics: dict[str, list[str]] = defaultdict(list)
    wrong = []
    woken = {p.node for p in plan.placed}
    for placed in plan.placed:
        pod, node = pods[placed.pod], nodes[placed.node]
        watts = pod.gpus * pod.offers[node.product].milliwatts_per_gpu
        if watts != placed.milliwatts:
            wrong.append(f"{pod.name} is charged {placed.milliwatts}, needs {watts}")
        for limit in (*node.path, *pod.accounts):
            drawn[limit] += watts
        used[node.name, "gpus"] += pod.gpus
        for name, amount in pod.resources.items():
            used[node.name, name] += amount
        if pod.gang:
            fabrics[pod.gang].append(node.fabric or node.name)
        wrong += _steady_violations(pod, node)
    for name in woken:
        for limit in nodes[name].path:
            drawn[limit] += nodes[name].wake_milliwatts
    if sum(p.wake_milliwatts for p in plan.placed) != sum(nodes[n].wake_milliwatts for n in woken):
        wrong.append("waking is not charged once per woken node")
    for (name, what), amount in used.items():
        left = nodes[name].free_gpus if what == "gpus" else nodes[name].free.get(what)
        if left is not None and amount > left:
            wrong.append(f"{name}: {amount} of {left} {what}")
    for limit, watts in drawn.items():
        if watts > snapshot.headroom_milliwatts.get(limit, watts):
            wrong.append(f"{limit}: {watts} of {snapshot.headroom_milliwatts[limit]}")
    wrong += broken_rules(snapshot, plan)
    for gang, where in fabrics.items():
        if len(set(where)) > 1 or len(where) != sum(p.gang == gang for p in snapshot.pods):
            wrong.append(f"{gang} is split: {where}")
    told = [p.pod for p in plan.placed] + [u.pod for u in plan.unplaced]
    if sorted(told) != sorted(pods):
        wrong.append("not every pod is answered exactly once")
    return wrong


def _steady_violations(pod: PodRequest, node) -> list[str]:
    wrong = []
    if node.closed or node.name in pod.not_on:
        wrong.append(f"{pod.name} on closed or refused {node.name}")
    if not pod.features <= node.features:
        wrong.append(f"{pod.name} on {node.name}, which cannot run it")
    if any(node.labels.get(k) != v for k, v in pod.selector.items()):
        wrong.append(f"{pod.name} against its selector on {node.name}")
    wrong += [
        f"{pod.name} away from the volume of {volume.claim} on {node.name}"
        for volume in pod.volumes
        if not any(all(node.labels.get(r.key) in r.values for r in term) for term in volume.reach)
    ]
    if any(not any(t.tolerates(taint) for t in pod.tolerations) for taint in node.taints):
        wrong.append(f"{pod.name} against a taint on {node.name}")
    return wrong


class Bound:
    """Pods as kube-scheduler would bind them, one after the other, and what it counts by then."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.labels = {node.name: node.labels for node in snapshot.nodes}
        self.here: list[tuple[PodRequest, str]] = []

    def marked(self, rule: PodRule) -> Counter[str | None]:
        """Pods with the mark by domain: those that stood already, and those that were bound since."""
        since = (self.labels[n].get(rule.topology_key) for pod, n in self.here if rule.mark in pod.marks)
        return Counter(self.snapshot.standing.get(rule, {})) + Counter(since)

    def refuses(self, pod: PodRequest, node: str) -> bool:
        def at(rule: PodRule, name: str = node) -> str | None:
            return self.labels[name].get(rule.topology_key)

        shy = [(rule, value) for rule, there in self.snapshot.refusing.items() for value in there]
        shy += [(rule, at(rule, n)) for each, n in self.here for rule in each.apart]
        return (
            any(at(rule) is not None and self.marked(rule)[at(rule)] for rule in pod.apart)
            or any(rule.mark in pod.marks and value is not None and at(rule) == value for rule, value in shy)
            or any(not self.finds(pod, rule, at(rule)) for rule in pod.near)
            or any(self.skews(pod, each, at(each.rule)) for each in pod.spread)
        )

    def finds(self, pod: PodRequest, rule: PodRule, value: str | None) -> bool:
        marked = self.marked(rule)
        first = rule.mark in pod.marks and not marked.total()
        return value is not None and (first or marked[value] > 0)

    def skews(self, pod: PodRequest, each: SpreadRule, value: str | None) -> bool:
        """Of the domains with a node that its selector matches."""
        eligible = {
            labels.get(each.rule.topology_key)
            for labels in self.labels.values()
            if all(labels.get(k) == v for k, v in pod.selector.items())
        }
        marked = self.marked(each.rule)
        least = min(marked[domain] for domain in eligible)
        return value is None or marked[value] + 1 - least > each.max_skew


def broken_rules(snapshot: Snapshot, plan: PlacementPlan) -> list[str]:
    """Is there an order in which kube-scheduler would bind them all?"""
    pods = {p.name: p for p in snapshot.pods}
    bound = Bound(snapshot)
    waiting = [(pods[placed.pod], placed.node) for placed in plan.placed]
    # What is the first of its kind begins.
    waiting.sort(key=lambda pair: not any(rule.mark in pair[0].marks for rule in pair[0].near))
    while waiting:
        ready = next((pair for pair in waiting if not bound.refuses(*pair)), None)
        if ready is None:
            return [f"{pod.name} breaks a rule between pods on {node}" for pod, node in waiting]
        waiting.remove(ready)
        bound.here.append(ready)
    return []


@dataclass(frozen=True)
class Verdict:
    bands: tuple[tuple[float, float], ...]
    """Worth placed by the plan and by the oracle, highest band first."""
    comfort: tuple[float, float]

    @property
    def share(self) -> float:
        """Of the value of the best plan: everything that is placed, and where."""
        mine = sum(m for m, _ in self.bands) + self.comfort[0]
        best = sum(b for _, b in self.bands) + self.comfort[1]
        return mine / best if best > 1e-9 else 1.0

    @property
    def worst_band(self) -> float:
        """Of the worth of the best plan in the band where the plan does worst."""
        return min((mine / best for mine, best in self.bands if best > 1e-9), default=1.0)


class Milp:
    """Pods of one shape are one integer variable per node; a gang is a unit of its own."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.fleet = Fleet(snapshot)
        self.h = highspy.Highs()
        self.h.setOptionValue("output_flag", False)
        self.h.setOptionValue("threads", 1)
        self.h.setOptionValue("mip_rel_gap", 1e-6)
        self.h.setOptionValue("time_limit", 20.0)
        self.worth: dict[int, list] = defaultdict(list)
        self.comfort: list = []
        self.x: dict[tuple[object, int], object] = {}
        self.kinds: dict[object, list[PodRequest]] = defaultdict(list)
        for pod in snapshot.pods:
            self.kinds[shape_key(pod), pod.gang].append(pod)
        self._variables()
        self._capacities()
        self._gangs()
        self._rules()
        self._spread()
        self._whole_nodes()

    def _variables(self) -> None:
        for kind, pods in self.kinds.items():
            pod = pods[0]
            mask, pref = allowed(self.fleet, pod), preference(scores(self.fleet, pod))
            for i in range(self.fleet.count):
                if mask[i]:
                    x = self.h.addIntegral(0, len(pods))
                    self.x[kind, i] = x
                    self.worth[pod.band].append(pod.value * x)
                    self.comfort.append(pod.value * float(pref[i]) * x)
            mine = [x for (k, _), x in self.x.items() if k == kind]
            if mine:
                self.h.addConstr(sum(mine[1:], mine[0] + 0) <= len(pods))

    def _capacities(self) -> None:
        limits: dict[str, list] = defaultdict(list)
        for i, node in enumerate(self.fleet.nodes):
            here = [(self.kinds[k][0], x) for (k, n), x in self.x.items() if n == i]
            if not here:
                continue
            self._at_most([p.gpus * x for p, x in here], node.free_gpus)
            for name, left in node.free.items():
                self._at_most([p.resources.get(name, 0) * x for p, x in here], left)
            awake = self.h.addBinary()
            for (kind, n), x in self.x.items():
                if n == i:
                    self.h.addConstr(x <= len(self.kinds[kind]) * awake)
            for pod, x in here:
                kilowatts = pod.gpus * pod.offers[node.product].milliwatts_per_gpu / 1e6
                for limit in (*node.path, *pod.accounts):
                    limits[limit].append(kilowatts * x)
            for limit in node.path:
                limits[limit].append(node.wake_milliwatts / 1e6 * awake)
        for limit, terms in limits.items():
            self._at_most(terms, self.snapshot.headroom_milliwatts[limit] / 1e6)

    def _at_most(self, terms: list, most: float) -> None:
        self.h.addConstr(sum(terms[1:], terms[0] + 0.0) <= most)

    def _gangs(self) -> None:
        for kind, pods in self.kinds.items():
            if not pods[0].gang:
                continue
            by_fabric: dict[str, list] = defaultdict(list)
            for i, node in enumerate(self.fleet.nodes):
                if (kind, i) in self.x:
                    by_fabric[node.fabric or node.name].append(self.x[kind, i])
            chosen = []
            for terms in by_fabric.values():
                whole = self.h.addBinary()
                chosen.append(whole)
                self.h.addConstr(sum(terms[1:], terms[0] + 0) == len(pods) * whole)
            if chosen:
                self.h.addConstr(sum(chosen[1:], chosen[0] + 0) <= 1)

    def _rules(self) -> None:
        kinds = [pods[0] for pods in self.kinds.values()]
        for rule in {rule for pod in kinds for rule in pod.apart} | set(self.snapshot.refusing):
            self._apart(rule)
        for rule in {rule for pod in kinds for rule in pod.near}:
            self._near(rule)
        for each in {each for pod in kinds for each in pod.spread}:
            self._evenly(each)

    def _domains(self, key: str) -> dict[str | None, list[int]]:
        found: dict[str | None, list[int]] = defaultdict(list)
        for i, node in enumerate(self.fleet.nodes):
            found[node.labels.get(key)].append(i)
        return found

    def _count(self, kinds: list, nodes: list[int]):
        """How many pods of these kinds are placed on these nodes."""
        terms = [self.x[kind, i] for kind in kinds for i in nodes if (kind, i) in self.x]
        return sum(terms[1:], terms[0] + 0) if terms else None

    def _most(self, count, most) -> None:
        if count is not None:
            self.h.addConstr(count <= most)

    def _marked(self, rule: PodRule) -> list:
        return [kind for kind, pods in self.kinds.items() if rule.mark in pods[0].marks]

    def _apart(self, rule: PodRule) -> None:
        holders = [kind for kind, pods in self.kinds.items() if rule in pods[0].apart]
        marked = self._marked(rule)
        for value, nodes in self._domains(rule.topology_key).items():
            if self.snapshot.standing.get(rule, {}).get(value):
                self._most(self._count(holders, nodes), 0)
            if self.snapshot.refusing.get(rule, {}).get(value):
                self._most(self._count(marked, nodes), 0)
            for holder in holders:
                there = self.h.addBinary()
                self._most(self._count([holder], nodes), len(self.kinds[holder]) * there)
                others = [kind for kind in marked if kind != holder]
                self._most(self._count(others, nodes), len(self.snapshot.pods) * (1 - there))
                if holder in marked:
                    self._most(self._count([holder], nodes), 1)

    def _near(self, rule: PodRule) -> None:
        leaning = [kind for kind, pods in self.kinds.items() if rule in pods[0].near]
        marked = self._marked(rule)
        standing = self.snapshot.standing.get(rule, {})
        firsts = []
        for value, nodes in self._domains(rule.topology_key).items():
            if value is None:
                self._most(self._count(leaning, nodes), 0)
                continue
            there, first = self.h.addBinary(), self.h.addBinary()
            self._most(self._count(leaning, nodes), len(self.snapshot.pods) * there)
            support = self._count([kind for kind in marked if kind not in leaning], nodes)
            self._most(there - first - (0 if support is None else support), standing.get(value, 0))
            own = self._count([kind for kind in marked if kind in leaning], nodes)
            self._most(first - (0 if own is None else own), 0)
            firsts.append(first)
        if firsts:
            self._most(sum(firsts[1:], firsts[0] + 0), 0 if sum(standing.values()) else 1)

    def _evenly(self, each: SpreadRule) -> None:
        marked, standing = self._marked(each.rule), self.snapshot.standing.get(each.rule, {})
        holders = [kind for kind, pods in self.kinds.items() if each in pods[0].spread]
        eligible = self.fleet.selected(self.kinds[holders[0]][0])
        domains = self._domains(each.rule.topology_key)
        for value, nodes in domains.items():
            more = self.h.addBinary()
            most = len(self.snapshot.pods) + sum(standing.values())
            self._most(self._count(holders, nodes), most * more)
            for other, others in domains.items():
                if other == value or not any(eligible[i] for i in others):
                    continue
                mine, theirs = self._count(marked, nodes), self._count(marked, others)
                gap = standing.get(value, 0) - standing.get(other, 0)
                difference = (0 if mine is None else mine) - (0 if theirs is None else theirs)
                if mine is not None or theirs is not None:
                    self._most(difference, each.max_skew - gap + 2 * most * (1 - more))

    def _spread(self) -> None:
        models: dict[str, list[PodRequest]] = defaultdict(list)
        for pod in self.snapshot.pods:
            models[pod.model].append(pod)
        for model, pods in models.items():
            unit = SPREAD_WEIGHT * sum(p.value for p in pods) / len(pods)
            levels = [lambda n, d=d: n.failure_domains[: d + 1] for d in range(2)] + [lambda n: n.name]
            for level in levels:
                domains: dict[object, list[int]] = defaultdict(list)
                for i, node in enumerate(self.fleet.nodes):
                    domains[level(node)].append(i)
                for members in domains.values():
                    self._crowd(model, members, unit / len(levels), len(pods))

    def _crowd(self, model: str, members: list[int], unit: float, most: int) -> None:
        """The k-th replica beside others costs k/(k+1): rising, so cheap steps are taken first by themselves."""
        here = [x for (k, n), x in self.x.items() if n in members and self.kinds[k][0].model == model]
        if not here:
            return
        present = sum(self.fleet.nodes[i].replicas.get(model, 0) for i in members)
        steps = [self.h.addVariable(0, 1) for _ in range(most)]
        for k, step in enumerate(steps, start=present):
            self.comfort.append(-unit * k / (k + 1) * step)
        self.h.addConstr(sum(here[1:], here[0] + 0) == sum(steps[1:], steps[0] + 0))

    def _whole_nodes(self) -> None:
        pods = self.snapshot.pods
        unit = WHOLE_NODE_WEIGHT * sum(p.value for p in pods) / max(len(pods), 1)
        size = self.snapshot.whole_gpus
        for i, node in enumerate(self.fleet.nodes):
            before = node.free_gpus // size
            here = [self.kinds[k][0].gpus * x for (k, n), x in self.x.items() if n == i]
            if before and here:
                left = self.h.addIntegral(0, before)
                self.h.addConstr(size * left + sum(here[1:], here[0] + 0) <= node.free_gpus)
                self.comfort.append(unit * left - unit * before)

    def best(self, terms: list) -> float:
        if not terms:
            return 0.0
        self.h.maximize(sum(terms[1:], terms[0] + 0.0))
        assert self.h.getModelStatus() in {
            highspy.HighsModelStatus.kOptimal,
            highspy.HighsModelStatus.kTimeLimit,
        }, self.h.getModelStatus()
        # On a time limit the bound is what counts: the oracle never understates the optimum.
        return float(self.h.getInfo().mip_dual_bound)

    def at_least(self, terms: list, least: float) -> None:
        if terms:
            self.h.addConstr(sum(terms[1:], terms[0] + 0.0) >= least - 1e-6)


def judge(snapshot: Snapshot, plan: PlacementPlan) -> Verdict:
    pods = {p.name: p for p in snapshot.pods}
    milp = Milp(snapshot)
    mine: dict[int, float] = defaultdict(float)
    for placed in plan.placed:
        mine[pods[placed.pod].band] += pods[placed.pod].value
    bands = []
    for band in sorted({p.band for p in pods.values()}, reverse=True):
        best = milp.best(milp.worth[band])
        bands.append((mine[band], best))
        milp.at_least(milp.worth[band], mine[band])
    return Verdict(tuple(bands), (comfort_of(snapshot, plan), milp.best(milp.comfort)))


def comfort_of(snapshot: Snapshot, plan: PlacementPlan) -> float:
    fleet = Fleet(snapshot)
    pods = {p.name: p for p in snapshot.pods}
    total = 0.0
    taken: dict[int, int] = defaultdict(int)
    added: dict[str, list[int]] = defaultdict(list)
    for placed in plan.placed:
        pod, i = pods[placed.pod], fleet.index[placed.node]
        total += pod.value * float(preference(scores(fleet, pod))[i])
        taken[i] += pod.gpus
        added[pod.model].append(i)
    mean = sum(p.value for p in pods.values()) / max(len(pods), 1)
    for i, gpus in taken.items():
        size = snapshot.whole_gpus
        free = fleet.nodes[i].free_gpus
        total -= WHOLE_NODE_WEIGHT * mean * (free // size - (free - gpus) // size)
    for model, where in added.items():
        values = [p.value for p in pods.values() if p.model == model]
        for names in [[n.failure_domains[: d + 1] for n in fleet.nodes] for d in range(2)] + [
            [n.name for n in fleet.nodes]
        ]:
            for domain in {names[i] for i in where}:
                present = sum(
                    n.replicas.get(model, 0)
                    for n, name in zip(fleet.nodes, names, strict=True)
                    if name == domain
                )
                new = sum(names[i] == domain for i in where)
                total -= (
                    SPREAD_WEIGHT
                    * (sum(values) / len(values))
                    / 3
                    * sum(k / (k + 1) for k in range(present, present + new))
                )
    return total
