"""Random clusters for placement, from a seed alone; the same in tests and benchmarks."""

import random
from dataclasses import replace

from tokenfactory.planning.placement.inputs import (
    NodeCandidate,
    Offer,
    PodRequest,
    Snapshot,
    Taint,
    Toleration,
)

WATT = 1000
PRODUCTS = {"H100": (500, 1.9), "H200": (560, 2.3), "B200": (820, 3.4)}


def random_cluster(
    seed: int, *, nodes: int = 10, models: int = 4, pods: int = 18, scarce: float = 0.6, gangs: bool = True
) -> Snapshot:
    """Racks in halls in a site; watts for about `scarce` of what the pods ask for."""
    rng = random.Random(seed)
    racks = max(2, nodes // 4)
    candidates = tuple(_node(rng, i, racks) for i in range(nodes))
    requests = tuple(_pods(rng, models, pods, gangs=gangs))
    asked = sum(p.gpus * 600 * WATT for p in requests)
    free = sum(n.free_gpus for n in candidates) * 600 * WATT
    site = int(min(asked, free) * rng.uniform(scarce, scarce + 0.5))
    headroom = {"site": site}
    for hall in range(2):
        headroom[f"hall-{hall}"] = int(site * rng.uniform(0.4, 0.7))
    for rack in range(racks):
        headroom[f"rack-{rack}"] = int(site / racks * rng.uniform(0.6, 2.0))
    for factory in range(2):
        headroom[f"budget of team/f{factory}"] = int(site * rng.uniform(0.4, 0.9))
    return Snapshot(candidates, requests, headroom)


def _node(rng: random.Random, number: int, racks: int) -> NodeCandidate:
    rack = number % racks
    product = ("H100", "H200", "B200")[rack % 3]
    fabric = f"nvl-{rack}" if product == "B200" and rng.random() < 0.8 else ""
    return NodeCandidate(
        name=f"node-{number:04d}",
        product=product,
        gpus=8,
        free_gpus=rng.choice((8, 8, 8, 4, 2, 0)),
        path=("site", f"hall-{rack % 2}", f"rack-{rack}"),
        labels={
            "zone": f"z{rack % 2}",
            "kubernetes.io/hostname": f"node-{number:04d}",
            "pool": rng.choice(("a", "b")),
        },
        taints=(Taint("dedicated", "batch"),) if rng.random() < 0.1 else (),
        fabric=fabric,
        failure_domains=(f"z{rack % 2}", f"rack-{rack}"),
        health=rng.choice((1.0, 1.0, 0.9, 0.5)),
        cached=frozenset(m for m in ("m0", "m1", "m2", "m3") if rng.random() < 0.3),
        free={"cpu": rng.choice((64_000, 128_000))},
        wake_milliwatts=rng.choice((0, 0, 400 * WATT)),
        replicas={f"team/f0/m{rng.randrange(4)}": 1},
        closed="cordoned" if rng.random() < 0.05 else "",
    )


def _pods(rng: random.Random, models: int, pods: int, *, gangs: bool) -> list[PodRequest]:
    kinds = [_kind(rng, m) for m in range(models)]
    requests = []
    for number in range(pods):
        kind = rng.choice(kinds)
        gang = f"gang-{number}" if gangs and kind.gpus == 8 and rng.random() < 0.5 else ""
        members = range(2 if gang else 1)
        requests += [replace(kind, name=f"team/pod-{number:04d}-{m}", gang=gang) for m in members]
    return requests


def _kind(rng: random.Random, model: int) -> PodRequest:
    gpus = rng.choice((1, 1, 2, 4, 4, 8))
    products = rng.sample(sorted(PRODUCTS), rng.choice((2, 3, 3)))
    factor = rng.uniform(0.7, 1.2)
    return PodRequest(
        name="",
        model=f"team/f{model % 2}/m{model}",
        gpus=gpus,
        offers={
            p: Offer(int(PRODUCTS[p][0] * factor) * WATT, PRODUCTS[p][1] * rng.uniform(0.6, 1.4))
            for p in products
        },
        band=rng.choice((100, 100, 200)),
        value=round(gpus * rng.uniform(0.5, 2.0), 2),
        weights=f"m{model}",
        selector={"pool": "a"} if rng.random() < 0.2 else {},
        tolerations=(Toleration("dedicated", "Equal", "batch"),) if rng.random() < 0.5 else (),
        resources={"cpu": gpus * rng.choice((4_000, 12_000))},
        accounts=(f"budget of team/f{model % 2}",),
    )
