"""Rules between pods: required affinity and anti-affinity, spread, and claims that one node at a time may mount.

A rule speaks of some pods: those of some namespaces whose labels match. Such a set is a mark, named in words for people,
and placement only counts marks. Rules come from the pods that wait, and anti-affinities also from every pod that stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tokenfactory.controller.plan.demands import NODE_NAME, claim_names, claims_of
from tokenfactory.controller.plan.world import World
from tokenfactory.kube.constraints import PodTerm, Selector, SpreadConstraint
from tokenfactory.kube.objects import Pod
from tokenfactory.planning.placement.inputs import PodRule, SpreadRule

Matches = Callable[[Pod], bool]
Counts = dict[PodRule, dict[str, int]]
Claim = tuple[str, str]
"""Namespace and name."""


@dataclass(frozen=True)
class Rules:
    """Of one pod."""

    marks: frozenset[str]
    spread: tuple[SpreadRule, ...]
    near: tuple[PodRule, ...]
    apart: tuple[PodRule, ...]


@dataclass
class Beside:
    """All rules that a waiting pod keeps or must be kept from, and who is where."""

    rules: dict[str, Rules] = field(default_factory=dict)
    """By UID of the waiting pod."""
    standing: Counts = field(default_factory=dict)
    refusing: Counts = field(default_factory=dict)


def beside(world: World, waiting: Sequence[Pod], standing: Sequence[tuple[Pod, str]]) -> Beside:
    marks: dict[str, Matches] = {}
    found = Beside()
    asked: dict[str, tuple[tuple[SpreadRule, ...], tuple[PodRule, ...], tuple[PodRule, ...]]] = {}
    shared: dict[PodRule, Claim] = {}
    for pod in waiting:
        spread, near, apart = _spread(world, pod, marks), _near(world, pod, marks), _apart(world, pod, marks)
        claims = {_same_node(claim, marks): claim for claim in _shared(world, pod)}
        shared |= claims
        asked[pod.metadata.uid or ""] = (spread, (*near, *claims), apart)
    wanted = {rule for _, near, apart in asked.values() for rule in (*near, *apart)}
    wanted |= {each.rule for spread, _, _ in asked.values() for each in spread}
    refusing = _refusing(world, waiting, standing, marks)
    if not wanted and not refusing:
        return found
    mounted = _by_claim(standing) if shared else {}
    for rule in wanted:
        there: Iterable[str]
        if rule in shared:
            there = mounted.get(shared[rule], ())
        else:
            there = (node for pod, node in standing if marks[rule.mark](pod))
        if rule.topology_key == NODE_NAME:
            # A dead node may keep its pods for ever, and their successors must not wait for it.
            there = (node for node in there if _can_mount(world, node))
        found.standing[rule] = _by_value(world, rule.topology_key, there)
    for rule, nodes in refusing.items():
        found.refusing[rule] = _by_value(world, rule.topology_key, nodes)
    for pod in waiting:
        mine = frozenset(mark for mark, matches in marks.items() if matches(pod))
        found.rules[pod.metadata.uid or ""] = Rules(mine, *asked[pod.metadata.uid or ""])
    return found


def _can_mount(world: World, node: str) -> bool:
    host = world.hosts.get(node)
    return host is None or not world.cut_off(host)


def _by_value(world: World, key: str, nodes: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in nodes:
        node = world.snapshot.nodes.get(("", name))
        value = name if key == NODE_NAME else node.metadata.labels.get(key) if node else None
        if value is not None:
            counts[value] = counts.get(value, 0) + 1
    return counts


def _refusing(
    world: World, waiting: Sequence[Pod], standing: Iterable[tuple[Pod, str]], marks: dict[str, Matches]
) -> Mapping[PodRule, list[str]]:
    """Anti-affinities of pods that stand against pods that wait: the nodes where the former are."""
    found: dict[PodRule, list[str]] = {}
    concerned: dict[str, bool] = {}
    for pod, node in standing:
        for term in pod.spec.affinity.apart if pod.spec.affinity else ():
            text, matches = _mark(world, pod, term)
            if text not in concerned:
                concerned[text] = any(matches(each) for each in waiting)
            if concerned[text]:
                marks[text] = matches
                found.setdefault(PodRule(term.topology_key, text), []).append(node)
    return found


def _near(world: World, pod: Pod, marks: dict[str, Matches]) -> list[PodRule]:
    """Of several terms, only pods count that match all."""
    terms = pod.spec.affinity.near if pod.spec.affinity else ()
    if not terms:
        return []
    parts = [_mark(world, pod, term) for term in terms]
    text = " and ".join(dict.fromkeys(part for part, _ in parts))
    marks[text] = lambda other: all(matches(other) for _, matches in parts)
    return [PodRule(term.topology_key, text) for term in terms]


def _apart(world: World, pod: Pod, marks: dict[str, Matches]) -> tuple[PodRule, ...]:
    rules = []
    for term in pod.spec.affinity.apart if pod.spec.affinity else ():
        text, matches = _mark(world, pod, term)
        marks[text] = matches
        rules.append(PodRule(term.topology_key, text))
    return tuple(rules)


def _spread(world: World, pod: Pod, marks: dict[str, Matches]) -> tuple[SpreadRule, ...]:
    rules = []
    for each in pod.spec.topology_spread_constraints:
        if each.when_unsatisfiable != "DoNotSchedule":
            continue
        text, matches = _mark(world, pod, PodTerm(label_selector=_selector(pod, each)))
        if matches(pod):
            marks[text] = matches
            rules.append(SpreadRule(PodRule(each.topology_key, text), each.max_skew))
    return tuple(rules)


def _selector(pod: Pod, each: SpreadConstraint) -> Selector | None:
    """With the values that the pod itself has under `matchLabelKeys`."""
    if each.label_selector is None:
        return None
    labels = pod.metadata.labels
    own = {key: labels[key] for key in each.match_label_keys if key in labels}
    expressions = each.label_selector.match_expressions
    return Selector(match_labels={**each.label_selector.match_labels, **own}, match_expressions=expressions)


def _shared(world: World, pod: Pod) -> list[Claim]:
    """Its claims that one node at a time may mount."""
    return [(pod.metadata.namespace or "", name) for name in claims_of(world, pod).shared]


def _same_node(claim: Claim, marks: dict[str, Matches]) -> PodRule:
    namespace, name = claim
    text = f"pods with claim {namespace}/{name}"
    marks[text] = lambda other: (other.metadata.namespace or "") == namespace and name in claim_names(other)
    return PodRule(NODE_NAME, text)


def _by_claim(standing: Iterable[tuple[Pod, str]]) -> dict[Claim, list[str]]:
    """Where the pods are that mount each claim: many claims may wait, and each would be tried against every pod."""
    found: dict[Claim, list[str]] = {}
    for pod, node in standing:
        for name in dict.fromkeys(claim_names(pod)):
            found.setdefault((pod.metadata.namespace or "", name), []).append(node)
    return found


def _mark(world: World, owner: Pod, term: PodTerm) -> tuple[str, Matches]:
    """The pods that a term of this pod speaks of."""
    labels, named = term.label_selector, frozenset(term.namespaces)
    if not named and term.namespace_selector is None:
        named = frozenset({owner.metadata.namespace or ""})
    chosen = term.namespace_selector

    def matches(pod: Pod) -> bool:
        if labels is None or not selects(labels, pod.metadata.labels):
            return False
        namespace = pod.metadata.namespace or ""
        if namespace in named or chosen is None:
            return namespace in named
        held = world.snapshot.namespaces.get(("", namespace))
        return selects(chosen, held.metadata.labels if held else {})

    where = [",".join(sorted(named))] if named else []
    where += [f"namespaces with {_text(chosen)}"] if chosen is not None else []
    return f"pods of {' and '.join(where)} with {_text(labels)}", matches


def selects(selector: Selector, labels: Mapping[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.match_labels.items()):
        return False
    for each in selector.match_expressions:
        value = labels.get(each.key)
        holds = {
            "In": value in each.values,
            "NotIn": value not in each.values,
            "Exists": value is not None,
            "DoesNotExist": value is None,
        }
        if not holds.get(each.operator, False):
            return False
    return True


def _text(selector: Selector | None) -> str:
    if selector is None:
        return "no labels"
    parts = [f"{key}={value}" for key, value in sorted(selector.match_labels.items())]
    parts += [
        f"{each.key} {each.operator} {'|'.join(each.values)}".strip() for each in selector.match_expressions
    ]
    return ",".join(parts) or "any labels"
