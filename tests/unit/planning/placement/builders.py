"""Nodes and pods of the tables: only what a case is about needs to be written."""

from typing import Any

from tokenfactory.planning.placement.inputs import (
    NodeCandidate,
    Offer,
    PodRequest,
    PodRule,
    Snapshot,
    SpreadRule,
)

WATT = 1_000
KILOWATT = 1_000_000
H100 = {"H100": Offer(500 * WATT, 2.0)}
ANY = {"H100": Offer(500 * WATT, 2.0), "B200": Offer(800 * WATT, 4.0)}


def node(name: str, **changes: Any) -> NodeCandidate:
    facts: dict[str, Any] = {"product": "H100", "gpus": 8, "free_gpus": 8, "path": ("site",)}
    return NodeCandidate(name=name, **(facts | changes))


def pod(name: str = "team/a", gpus: int = 4, **changes: Any) -> PodRequest:
    facts: dict[str, Any] = {"model": "team/chat/llama", "offers": H100}
    return PodRequest(name=name, gpus=gpus, **(facts | changes))


LLAMAS = "pods of team with model=llama"


def spread(key: str, skew: int = 1) -> dict[str, Any]:
    """A pod that is to be spread among its like."""
    return {"marks": frozenset({LLAMAS}), "spread": (SpreadRule(PodRule(key, LLAMAS), skew),)}


def near(key: str, mark: str) -> dict[str, Any]:
    return {"near": (PodRule(key, mark),)}


def apart(key: str, mark: str) -> dict[str, Any]:
    return {"apart": (PodRule(key, mark),)}


def of(*marks: str) -> dict[str, Any]:
    return {"marks": frozenset(marks)}


def snapshot(nodes: list[NodeCandidate], pods: list[PodRequest], **headroom: int) -> Snapshot:
    limits = {name.replace("_", "-"): watts * WATT for name, watts in headroom.items()}
    return Snapshot(tuple(nodes), tuple(pods), limits)


def beside(
    nodes: list[NodeCandidate],
    pods: list[PodRequest],
    *,
    standing: dict[PodRule, dict[str, int]] | None = None,
    refusing: dict[PodRule, dict[str, int]] | None = None,
    watts: int = 90_000,
) -> Snapshot:
    """With pods that are there already."""
    limits = {"site": watts * WATT}
    return Snapshot(tuple(nodes), tuple(pods), limits, standing=standing or {}, refusing=refusing or {})
