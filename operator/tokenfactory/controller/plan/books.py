"""Everything that one round has worked out, for those who act on it and those who tell of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenfactory.controller.plan.bidding import Cleared
from tokenfactory.controller.plan.domains import Grid
from tokenfactory.controller.plan.memory import EnergyWindow
from tokenfactory.controller.plan.naming import Model
from tokenfactory.controller.plan.placing import Unplaced
from tokenfactory.controller.plan.replicating import Staffing
from tokenfactory.controller.plan.shedding import Shed
from tokenfactory.controller.plan.trying import Tries
from tokenfactory.controller.plan.world import World
from tokenfactory.kube.resources import Key
from tokenfactory.planning.power.ledger import Ledger
from tokenfactory.planning.power.raises import Wait
from tokenfactory.planning.power.spending import Spending


@dataclass(frozen=True)
class Books:
    world: World
    grid: Grid
    ledger: Ledger
    cleared: Cleared | None
    waits: Sequence[Wait]
    staffing: Staffing
    energy: Mapping[Key, EnergyWindow]
    unplaced: Sequence[Unplaced]
    shed: Shed
    spending: Spending
    nameless: Mapping[Model, str]
    """Models that lack a name which somebody else has, and who."""
    templates: Mapping[Model, str]
    """Of which template each model's pods are to be."""
    loose: Mapping[tuple[str, str, str], int]
    """(namespace, factory, model) → what its replicas may draw that no grant accounts for, in milliwatts."""
    tries: Tries

    def owner_charge(self, owner: tuple[str, str, str]) -> int:
        """What the GPUs of one model are charged, with a grant or without."""
        return self.ledger.owner_charge(owner) + self.loose.get(owner, 0)
