"""What a pod demands of its node, read from the pod itself: webhooks and people may have added to what we wrote.

Selector, affinity and tolerations are as in its spec. A claim that only some nodes reach, or that one node at a time may
mount, demands as much as an affinity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, cast

from tokenfactory.controller.plan.world import World
from tokenfactory.kube.constraints import Expression, NodeSelectorTerm
from tokenfactory.kube.objects import Pod
from tokenfactory.kube.volumes import PersistentVolumeClaim
from tokenfactory.planning.placement.inputs import Requirement, Terms, Toleration, Volume

NODE_NAME: Final = "node name"
"""A label that only placement sees: a field of the node, which no label of Kubernetes' can be called."""
_FIELDS: Final = {"metadata.name": NODE_NAME}
_OPERATORS: Final = frozenset({"In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"})
_CHOSEN_NODE: Final = "volume.kubernetes.io/selected-node"
_ONE_NODE: Final = ("ReadWriteOnce",)


def affinity_of(pod: Pod) -> Terms:
    affinity = pod.spec.affinity
    return node_terms(affinity.node_affinity.terms) if affinity else ()


def node_terms(terms: tuple[NodeSelectorTerm, ...]) -> Terms:
    return tuple(
        tuple(_requirements(term.match_expressions)) + tuple(_requirements(term.match_fields, fields=True))
        for term in terms
    )


def _requirements(expressions: tuple[Expression, ...], *, fields: bool = False) -> Iterator[Requirement]:
    for each in expressions:
        key = _FIELDS.get(each.key, each.key) if fields else each.key
        if each.operator in _OPERATORS:
            operator = cast('Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"]', each.operator)
            yield Requirement(key, operator, each.values)


def tolerations_of(pod: Pod) -> tuple[Toleration, ...]:
    return tuple(
        Toleration(each.key, "Exists" if each.operator == "Exists" else "Equal", each.value, each.effect)
        for each in pod.spec.tolerations
    )


@dataclass(frozen=True)
class Claims:
    """What a pod's claims demand."""

    missing: tuple[str, ...]
    """Claims that are not there: kube-scheduler would bind it nowhere."""
    volumes: tuple[Volume, ...]
    shared: tuple[str, ...]
    """Claims that one node at a time may mount: all pods of such a claim go to one node."""


def claims_of(world: World, pod: Pod) -> Claims:
    missing: list[str] = []
    volumes: list[Volume] = []
    shared: list[str] = []
    for name in claim_names(pod):
        claim = world.snapshot.claims.get((pod.metadata.namespace or "", name))
        if claim is None:
            missing.append(name)
            continue
        reach = _reach(world, claim)
        if reach:
            volumes.append(Volume(name, reach))
        if claim.spec.access_modes == _ONE_NODE:
            shared.append(name)
    return Claims(tuple(missing), tuple(volumes), tuple(shared))


def claim_names(pod: Pod) -> list[str]:
    return [
        each.persistent_volume_claim.claim_name for each in pod.spec.volumes if each.persistent_volume_claim
    ]


def _reach(world: World, claim: PersistentVolumeClaim) -> Terms:
    """Empty: from everywhere, or not known yet."""
    volume = world.snapshot.volumes.get(("", claim.spec.volume_name)) if claim.spec.volume_name else None
    if volume is not None:
        return node_terms(volume.spec.node_affinity.required.node_selector_terms)
    chosen = claim.metadata.annotations.get(_CHOSEN_NODE)
    return ((Requirement(NODE_NAME, "In", (chosen,)),),) if chosen else ()
