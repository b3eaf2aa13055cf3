"""Who may draw: the grants of the domains above a node, and what a factory that lacks one is told."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tokenfactory.api.power_domain import Admit
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.controller.plan.world import World
from tokenfactory.planning.power.tree import Tree, selects

DEFAULT_BAND = 100
"""Where no domain on the path says who may draw, everybody may, up to this band."""


def refusals(
    world: World, tree: Tree, factory: TokenFactory, model: ModelSpec, of: Iterable[str] | None = None
) -> dict[str, str]:
    """Domain → the grant that is missing there; domains that admit the model are left out. `of` some, or of all."""
    namespace = world.snapshot.namespaces.get(("", factory.metadata.namespace or ""))
    labels = namespace.metadata.labels if namespace else {}
    asked = list(tree.domains if of is None else of)
    above = tree.domains if of is None else {at for name in asked for at in tree.domains[name].path}
    admits = {at: some for at in above if (some := _admits(world, at)) is not None}
    lacking = {at: _missing(some, labels, factory, model, at) for at, some in admits.items()}
    found: dict[str, str] = {}
    for name in asked:
        domain = tree.domains[name]
        granting = [at for at in domain.path if at in admits]
        if not granting:
            if model.band > DEFAULT_BAND:
                found[name] = (
                    f"band {model.band} is above {DEFAULT_BAND}, which {domain.path[0]} grants to all: "
                    f"add an entry to its spec.admits with maxBand {model.band}"
                )
            continue
        missing = next((lacking[at] for at in granting if lacking[at]), "")
        if missing:
            found[name] = missing
    return found


def _admits(world: World, domain: str) -> tuple[Admit, ...] | None:
    held = world.snapshot.domains.get(("", domain))
    return held.spec.admits if held else None


def _missing(
    admits: tuple[Admit, ...], labels: Mapping[str, str], factory: TokenFactory, model: ModelSpec, domain: str
) -> str:
    namespace = factory.metadata.namespace
    mine = [admit for admit in admits if selects(admit.namespace_selector, labels)]
    if not mine:
        return (
            f"{domain} admits no namespace like {namespace}: add an entry to its spec.admits whose "
            f"namespaceSelector matches {dict(labels) or 'its labels'}"
        )
    highest = max(admit.max_band for admit in mine)
    if model.band > highest:
        return f"{domain} admits {namespace} up to band {highest}, and {model.name} asks for {model.band}"
    return ""
