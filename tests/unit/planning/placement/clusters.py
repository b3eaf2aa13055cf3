"""Random clusters for placement, from a seed alone; the same in tests and benchmarks."""

import random
from dataclasses import replace

from tokenfactory.planning.placement.inputs import (
    NodeCandidate,
    Offer,
    PodRequest,
    PodRule,
    Requirement,
    Snapshot,
    SpreadRule,
    Taint,
    Toleration,
    Volume,
)

WATT = 1000
HOST = "kubernetes.io/hostname"
STRANGERS = "pods of web with app=front"
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
    standing, refusing = _strangers(rng, candidates, models)
    return Snapshot(candidates, requests, headroom, standing=standing, refusing=refusing)


def _strangers(
    rng: random.Random, nodes: tuple[NodeCandidate, ...], models: int
) -> tuple[dict[PodRule, dict[str, int]], dict[PodRule, dict[str, int]]]:
    """Pods of others that stand already: some that models must stand near or apart from, some that refuse a model."""
    hosts = [node.name for node in nodes if rng.random() < 0.2]
    standing = {PodRule(HOST, STRANGERS): dict.fromkeys(hosts, 1)}
    if rng.random() < 0.5:
        standing[PodRule("zone", STRANGERS)] = {"z0": 1}
    shy = rng.sample(hosts, min(len(hosts), 2))
    return standing, {PodRule(HOST, _like(rng.randrange(models))): dict.fromkeys(shy, 1)}


def _like(model: int) -> str:
    return f"pods of team with model=m{model}"


def _rules(rng: random.Random, model: int) -> dict[str, object]:
    """What it wants of other pods: mostly nothing."""
    mine, strangers = PodRule(HOST, _like(model)), PodRule(HOST, STRANGERS)
    claim = PodRule(HOST, f"pods with claim m{model}")
    found: dict[str, object] = {"marks": frozenset({mine.mark})}
    drawn = rng.random()
    if drawn < 0.15:
        found["apart"] = (mine,)
    elif drawn < 0.25:
        found["apart"] = (strangers,)
    elif drawn < 0.35:
        found |= {"near": (claim,), "marks": frozenset({mine.mark, claim.mark})}
    elif drawn < 0.4:
        found["near"] = (replace(strangers, topology_key="zone"),)
    elif drawn < 0.5:
        found["spread"] = (SpreadRule(replace(mine, topology_key="zone"), rng.choice((1, 2))),)
    return found


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
        cached=frozenset(what for m in range(4) for what in (f"m{m}", f"image-{m}") if rng.random() < 0.3),
        free={"cpu": rng.choice((64_000, 128_000)), "memory": rng.choice((512, 1024)) << 30},
        wake_milliwatts=rng.choice((0, 0, 400 * WATT)),
        replicas={f"team/f0/m{rng.randrange(4)}": 1},
        closed="cordoned" if rng.random() < 0.05 else "",
    )


def _pods(rng: random.Random, models: int, pods: int, *, gangs: bool) -> list[PodRequest]:
    kinds = [_kind(rng, m) for m in range(models)]
    if gangs and all(kind.gpus < 8 for kind in kinds):
        kinds[0] = replace(kinds[0], gpus=8)
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
        loads=frozenset({f"m{model}", f"image-{model}"}),
        selector={"pool": "a"} if rng.random() < 0.2 else {},
        volumes=(Volume("cache", ((Requirement("zone", "In", ("z1",)),),)),) if rng.random() < 0.1 else (),
        tolerations=(Toleration("dedicated", "Equal", "batch"),) if rng.random() < 0.5 else (),
        resources={"cpu": gpus * rng.choice((4_000, 12_000)), "memory": gpus * rng.choice((32, 96)) << 30},
        accounts=(f"budget of team/f{model % 2}",),
        **_rules(rng, model),
    )
