"""Why a GPU's limit is what it is: the limit in force first, and only then what the market would give it.

A limit that was read back may differ from what the market wants now: an agent is behind, a raise waits for watts, a
class is being tried at less. Then that is the reason. `tokenfactory explain` and a model's `boundBy` say the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tokenfactory.api import names
from tokenfactory.api.gpu_node import GPUStatus
from tokenfactory.controller.plan.books import Books
from tokenfactory.controller.plan.status import watts
from tokenfactory.controller.plan.world import GpuHost
from tokenfactory.planning.power.explain import Explanation, explain

_SAME_MILLIWATTS: Final = 1_000
"""A driver may keep whole watts only."""
IDLE: Final = names.idle_class("")


@dataclass(frozen=True, slots=True)
class SheetSays:
    """What one domain on the path allows the GPU's class."""

    domain: str
    epoch: int
    acknowledged: int
    """The epoch that the node's agent has read back."""
    cap_milliwatts: int | None
    """None: the sheet does not name the class, or there is no sheet yet."""
    binds: bool
    """It is the lowest on the path."""


@dataclass(frozen=True, slots=True)
class GpuExplained:
    """One GPU: its limit, every sheet above it, and why."""

    node: str
    index: int
    uuid: str
    class_name: str
    pod: str
    enforced_milliwatts: int
    """Read back by its agent."""
    sheets: tuple[SheetSays, ...]
    """Root first."""
    market: Explanation | None
    """What the plan wants for it now; None: it is for sale nowhere."""
    waits: tuple[str, ...]
    """For which acknowledgements of whom its class waits."""
    message: str


def explain_gpu(books: Books, host: GpuHost, gpu: GPUStatus) -> GpuExplained:
    path = host.held.spec.path if host.held else ()
    sheets = _sheets(books, host, path, gpu.class_name)
    market = _market(books, path, gpu.class_name)
    waits = tuple(
        str(wait) for wait in books.waits if wait.class_name == gpu.class_name and wait.domain in path
    )
    return GpuExplained(
        node=host.name,
        index=gpu.index,
        uuid=gpu.uuid,
        class_name=gpu.class_name,
        pod=gpu.pod,
        enforced_milliwatts=gpu.enforced_milliwatts,
        sheets=sheets,
        market=market,
        waits=waits,
        message=_of_nobody(gpu.class_name) or _why(books, host, gpu, sheets, market, waits),
    )


def _of_nobody(label: str) -> str:
    product = names.class_product(label)
    if label == names.unmanaged_class(product):
        return (
            "a pod that is not charged here holds it: nobody caps it, and it is charged at its default limit"
        )
    return ""


def _sheets(books: Books, host: GpuHost, path: tuple[str, ...], label: str) -> tuple[SheetSays, ...]:
    caps = {}
    for domain in path:
        sheet = books.ledger.sheets.get(domain)
        listed = books.ledger.caps_since(domain, sheet.spec.epoch) if sheet else None
        caps[domain] = listed.get(label) if listed else None
    lowest = min((cap for cap in caps.values() if cap is not None), default=None)
    return tuple(
        SheetSays(
            domain,
            sheet.spec.epoch if (sheet := books.ledger.sheets.get(domain)) else 0,
            host.applied.get(domain, 0),
            cap,
            binds=cap is not None and cap == lowest,
        )
        for domain, cap in caps.items()
    )


def _market(books: Books, path: tuple[str, ...], label: str) -> Explanation | None:
    if books.cleared is None or not path:
        return None
    name = books.cleared.supply.class_name(path[-1], label)
    settled = books.cleared.settled
    return explain(settled.clearing, path[-1], name, settled.adders) if name is not None else None


def _why(
    books: Books,
    host: GpuHost,
    gpu: GPUStatus,
    sheets: tuple[SheetSays, ...],
    market: Explanation | None,
    waits: tuple[str, ...],
) -> str:
    now = gpu.enforced_milliwatts
    if books.world.lost(host):
        return f"the agent of {host.name} is silent: {watts(now)} is what it last read back, and no sheet moves it"
    if not sheets:
        return f"{host.name} is in no power domain: put it in one by its labels, and it gets a cap"
    held = host.held
    if held is not None and held.status.mode == "Fallback":
        return f"its agent has heard nothing for longer than hold, and fell back to {watts(now)}"
    if gpu.withheld_milliwatts:
        return (
            f"its agent takes {watts(gpu.withheld_milliwatts)} off it, because the node draws more than it is charged "
            "(condition NodePower)"
        )
    lowest = next((each for each in sheets if each.binds), None)
    if lowest is None or any(each.cap_milliwatts is None for each in sheets):
        unnamed = ", ".join(each.domain for each in sheets if each.cap_milliwatts is None)
        return f"the sheet of {unnamed} does not name its class yet, so it gets no more than its minimum" + (
            f"; {waits[0]}" if waits else ""
        )
    tried = books.tries.at(sheets[-1].domain, gpu.class_name)
    if tried is not None and lowest.cap_milliwatts == tried.cap_milliwatts:
        given = f"; the market gives {watts(market.cap_milliwatts)}" if market else ""
        return f"tried at {watts(now)} in {tried.domain} for some minutes, to learn its curve{given}"
    return _between(now, lowest, market, waits)


def _between(now: int, lowest: SheetSays, market: Explanation | None, waits: tuple[str, ...]) -> str:
    """The limit in force against the lowest sheet, and that against what the plan wants."""
    cap = lowest.cap_milliwatts or 0
    if abs(now - cap) > _SAME_MILLIWATTS:
        return (
            f"its agent has read back {watts(now)}, and the sheet of {lowest.domain} says {watts(cap)} in epoch "
            f"{lowest.epoch}: it has acknowledged epoch {lowest.acknowledged}"
        )
    if market is None:
        return f"the sheet of {lowest.domain} allows {watts(cap)}: no GPU of its class is for sale here"
    if market.bound == "Nothing" and market.class_name.startswith(IDLE):
        return f"nothing runs on it, so it stays at its minimum of {watts(now)}"
    wanted = market.cap_milliwatts
    if waits and wanted > cap + _SAME_MILLIWATTS:
        return f"{watts(wanted)} are meant for it; {waits[0]}"
    if wanted > cap + _SAME_MILLIWATTS:
        return f"the sheet of {lowest.domain} allows {watts(cap)}; {watts(wanted)} are meant for it once that has lasted"
    if wanted < cap - _SAME_MILLIWATTS:
        return f"the sheet of {lowest.domain} is on its way down from {watts(cap)}: {market.message}"
    return market.message


def model_bound_by(books: Books, owner: tuple[str, str, str]) -> str:
    """What binds a model's GPUs where their limit is lowest; empty while none runs."""
    world = books.world
    standing = (world.lowest[label] for label in world.labels_of.get(owner, ()))
    lowest = min(
        ((gpu.enforced_milliwatts, host.name, gpu.index, host, gpu) for host, gpu in standing),
        key=lambda each: each[:3],
        default=None,
    )
    return explain_gpu(books, *lowest[3:]).message if lowest else ""
