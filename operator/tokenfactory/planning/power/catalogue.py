"""What is known of GPU products, systems and model sizes before anything was measured.

A figure of the catalogue is a beginning: NVML's limits, a measured overhead and a `PowerProfile` each go
before it. Where the catalogue knows nothing it claims nothing that could cost a watt: an unknown product is
charged at what NVML says, an unknown node at twice its GPUs.
"""

import re
from dataclasses import dataclass

from tokenfactory.planning.power import catalogue_data as data
from tokenfactory.planning.power.profile import Point


@dataclass(frozen=True, slots=True)
class Product:
    """A GPU product. `known` is False where only NVML's word stands."""

    name: str
    minimum_milliwatts: int
    default_milliwatts: int
    maximum_milliwatts: int
    idle_milliwatts: int
    known: bool
    source: str


@dataclass(frozen=True, slots=True)
class Figure:
    """A number of milliwatts and where it is from."""

    milliwatts: int
    source: str


def _row(product: str) -> data.ProductRow | None:
    words = re.split(r"[^A-Z0-9]+", product.upper())
    for row in data.PRODUCTS:
        if all(any(word.startswith(match) for word in words) for match in row.matches):
            return row
    return None


def product_of(
    name: str,
    *,
    minimum_milliwatts: int = 0,
    default_milliwatts: int = 0,
    maximum_milliwatts: int = 0,
) -> Product:
    """A product by NVML's name (or the node label made of it). Limits that NVML reports go first; 0: not known."""
    row = _row(name)
    nvml = "NVML's limits of the GPU"
    if row is None:
        most = max(maximum_milliwatts, default_milliwatts, minimum_milliwatts)
        # An idle GPU of an unknown product may be drawing anything up to its minimum cap.
        return Product(
            name,
            minimum_milliwatts or most,
            default_milliwatts or most,
            most,
            minimum_milliwatts,
            False,
            nvml,
        )
    source = data.SOURCES[row.source]
    if row.estimates:
        source += f"; estimated, rather too high than too low: {' and '.join(row.estimates)}"
    return Product(
        name=row.name,
        minimum_milliwatts=minimum_milliwatts or row.minimum_watts * 1000,
        default_milliwatts=default_milliwatts or row.default_watts * 1000,
        maximum_milliwatts=maximum_milliwatts or row.maximum_watts * 1000,
        idle_milliwatts=row.idle_watts * 1000,
        known=True,
        source=f"{nvml}; {source}" if maximum_milliwatts else source,
    )


def _system(product: str, gpus: int) -> data.SystemRow | None:
    row = _row(product)
    fits = [s for s in data.SYSTEMS if row is not None and s.product == row.name and s.gpus >= gpus]
    return min(fits, key=lambda s: (s.gpus, -s.nameplate_watts), default=None)


def _source_of(system: data.SystemRow) -> str:
    source = data.SOURCES[system.source]
    return f"estimated from {source}" if system.estimated else source


def nameplate(product: str, gpus: int, *, maximum_milliwatts: int = 0) -> Figure:
    """The most that a node of so many GPUs can draw: what a node without an agent is charged."""
    system = _system(product, gpus)
    each = product_of(product, maximum_milliwatts=maximum_milliwatts)
    if system is not None:
        return Figure(system.nameplate_watts * 1000, _source_of(system))
    return Figure(2 * gpus * each.maximum_milliwatts, "unknown system: twice what its GPUs may draw")


def overhead(product: str, gpus: int, *, maximum_milliwatts: int = 0) -> Figure:
    """The worst case of a node besides its GPUs, where nothing measures it."""
    system = _system(product, gpus)
    each = product_of(product, maximum_milliwatts=maximum_milliwatts)
    if system is not None:
        listed = product_of(product)
        # Fewer GPUs than the system holds: the rest of it is all there.
        rest = system.nameplate_watts * 1000 - system.gpus * listed.maximum_milliwatts
        return Figure(max(rest, 0), _source_of(system))
    return Figure(gpus * each.maximum_milliwatts, "unknown system: as much as its GPUs may draw")


def curve_of(product: str, billions: float, *, maximum_milliwatts: int = 0) -> tuple[Point, ...]:
    """Typical points of a model of that size. Empty for a product nobody measured anything comparable on.

    The next larger size in the catalogue stands for it: it promises fewer tokens, not more. A product without
    measurements of its own takes those of the H100 or B200, scaled by memory bandwidth and power limit.
    """
    row = _row(product)
    if row is None or billions <= 0:
        return ()
    kind = row.name if any(s.product == row.name for s in data.SERVING) else _measured_like(row)
    measured = [s for s in data.SERVING if s.product == kind]
    sizes = sorted({s.billions for s in measured})
    size = next((s for s in sizes if s >= billions), sizes[-1])
    reference = next(r for r in data.PRODUCTS if r.name == kind)
    faster = row.terabytes_per_second / reference.terabytes_per_second
    hungrier = row.maximum_watts / reference.maximum_watts
    limit = (maximum_milliwatts or row.maximum_watts * 1000) / 1000
    points: list[Point] = []
    for serving in measured:
        if serving.billions != size:
            continue
        natural = min(serving.watts * hungrier, limit)
        for share, kept in data.CAP_SHAPE:
            tokens = serving.tokens_per_second * faster * kept
            points.append(
                Point(
                    milliwatts=round(natural * share * 1000),
                    tokens_per_second=tokens,
                    concurrency=serving.concurrency,
                    inter_token_milliseconds=serving.inter_token_milliseconds / (faster * kept),
                )
            )
    return tuple(points)


def _measured_like(row: data.ProductRow) -> str:
    """Which measured product is nearer in memory bandwidth."""
    measured = {s.product for s in data.SERVING}
    known = {r.name: r.terabytes_per_second for r in data.PRODUCTS if r.name in measured}
    return min(sorted(known), key=lambda name: abs(known[name] - row.terabytes_per_second))


def billions_in(model: str) -> float:
    """The size that a model's name tells, such as 70 for `llama-3.3-70b-instruct`; 0 where it tells none."""
    found = re.findall(r"(?<![a-z0-9.])(\d+(?:\.\d+)?)b(?![a-z0-9])", model.lower())
    return max((float(f) for f in found), default=0.0)
