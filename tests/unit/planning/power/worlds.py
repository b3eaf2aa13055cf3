"""Random trees, classes and fleets for the market's properties."""

import numpy as np

from tokenfactory.planning.power.forest import muster, plant
from tokenfactory.planning.power.goods import PowerClass, gather_goods, put_in_order
from tokenfactory.planning.power.market import Market


def random_classes(rng, count, bands=(100,), factories=("",), floors=True, round_prices=False):
    found = []
    for number in range(count):
        points = int(rng.integers(0, 6))
        low = int(rng.integers(60, 300)) * 1000
        caps = low + np.cumsum(rng.integers(1, 200_000, size=points)) if points else np.zeros(0, dtype=int)
        slopes = np.sort(rng.uniform(0.05, 20.0, size=points))[::-1]
        if round_prices:
            slopes = np.ceil(slopes / 5) * 5
        floor = int(rng.integers(0, points + 1)) if floors and rng.random() < 0.5 else 0
        if floor:
            # What lies below an SLO floor is one stretch.
            caps, slopes = caps[floor - 1 :], np.append([rng.uniform(0.05, 5.0)], slopes[floor:])
            floor = 1
        milliwatts = (low, *(int(c) for c in caps))
        tokens = np.concatenate(([0.0], np.cumsum(slopes * np.diff(milliwatts) / 1000)))
        found.append(
            PowerClass(
                name=f"class-{number:03d}",
                band=int(rng.choice(bands)),
                milliwatts=milliwatts,
                tokens=tuple(float(t) for t in tokens),
                floor=floor,
                factory=str(rng.choice(factories)),
            )
        )
    return tuple(found)


def random_parents(rng, count):
    parents = np.full(count, -1, dtype=np.int64)
    for child in range(1, count):
        parents[child] = rng.integers(-1 if rng.random() < 0.05 else 0, child)
    return parents


def random_world(seed, domains=12, classes=6, gpus=500, tightness=(0.3, 1.2), **kwargs):
    """A market and limits under which every GPU's minimum fits."""
    rng = np.random.default_rng(seed)
    goods = gather_goods(random_classes(rng, classes, **kwargs))
    forest = plant(random_parents(rng, domains))
    fleet = muster(forest, rng.integers(0, domains, size=gpus), rng.integers(0, classes, size=gpus), classes)
    committed = rng.integers(0, 20_000, size=domains).astype(np.int64)
    market = Market(forest, put_in_order(goods), fleet, committed)
    spread = np.zeros(domains, dtype=np.int64)
    np.add.at(spread, fleet.domain, fleet.gpus * (goods.maximum - goods.minimum)[fleet.class_index])
    spread = forest.subtree_sums(spread)
    limits = market.base + (spread * rng.uniform(*tightness, size=domains)).astype(np.int64)
    return market, limits
