"""Small sites at random: domains with limits, nodes, and what is wanted there (standing for the market)."""

from __future__ import annotations

import random
from dataclasses import replace

from tests.fault.parts import DEFAULT, HIGH, HOLD, LOW, OVERHEAD, Gpu, Machine, Site, W

from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.lines import Domain

CLASSES = ("ns/f/x@H100", "ns/f/y@H100")


def make_site(rng: random.Random) -> tuple[Site, dict[str, Machine]]:
    racks = rng.choice((("r1",), ("r1", "r2"), ("r1", "r2")))
    parents: dict[str, str | None] = {"site": None}
    parents.update(dict.fromkeys(racks, "site"))
    machines, paths = {}, {}
    for i in range(rng.randint(2, 4)):
        name = f"n{i}"
        guarded = rng.random() < 0.85
        machines[name] = Machine(name, guarded, gpus=tuple(Gpu() for _ in range(rng.randint(1, 2))))
        rack = rng.choice(racks)
        paths[name] = ("site",) if rng.random() < 0.2 else ("site", rack)
    site = Site(1, {d: Domain(d, p, 0, HOLD) for d, p in parents.items()}, paths, {})
    return change(site, machines, rng, limits=True), machines


def change(
    site: Site, machines: dict[str, Machine], rng: random.Random, *, limits: bool = False, move: bool = False
) -> Site:
    """Other wishes within the limits, at times other limits. What is wanted always fits, and mostly just so."""
    paths = dict(site.paths)
    racks = [name for name, domain in site.domains.items() if domain.parent]
    if move:
        paths[rng.choice(list(paths))] = rng.choice([("site",), *(("site", rack) for rack in racks)])
    room = {name: domain.usable_milliwatts for name, domain in site.domains.items()}
    for name in site.domains:
        inside = [machine for n, machine in machines.items() if name in paths[n]]
        gpus = sum(len(machine.gpus) for machine in inside)
        foreign = sum(len(machine.gpus) for machine in inside if not machine.guarded)
        floor = OVERHEAD * len(inside) + LOW * gpus + (DEFAULT - LOW) * foreign
        if limits or room[name] < floor:
            room[name] = floor + rng.choice((0, 100 * W, 250 * W, 250 * W, 500 * W, 1000 * W))
    domains = {n: replace(domain, usable_milliwatts=room[n]) for n, domain in site.domains.items()}
    caps = _fill(room, paths, machines, racks, rng)
    targets = {
        name: {c: Allowance(caps[name, c], rng.choice((LOW, caps[name, c]))) for c in CLASSES}
        for name in site.domains
    }
    return Site(site.version + 1, domains, paths, targets)


def class_of(node: str) -> str:
    """Every pod of a node is of the same class, so that what is wanted can be made to fit exactly."""
    return CLASSES[int(node[1:]) % len(CLASSES)]


def _fill(room, paths, machines, racks, rng: random.Random) -> dict[tuple[str, str], int]:
    """Caps that fill the limits in a random order."""
    caps = {(name, c): LOW for name in racks for c in CLASSES} | {("site", c): HIGH for c in CLASSES}
    direct = {class_of(n) for n, path in paths.items() if path == ("site",)}
    for c in CLASSES:
        if c in direct or rng.random() < 0.3:
            caps["site", c] = LOW

    def fits() -> bool:
        load = dict.fromkeys(room, 0)
        for name, path in paths.items():
            machine = machines[name]
            cap = max(LOW, min(caps[d, class_of(name)] for d in path), 0 if machine.guarded else DEFAULT)
            for domain in path:
                load[domain] += OVERHEAD + cap * len(machine.gpus)
        return all(load[name] <= room[name] for name in room)

    order = list(caps)
    rng.shuffle(order)
    for key in order:
        wanted = rng.choice((HIGH, HIGH, rng.randrange(LOW, HIGH, 10 * W)))
        while wanted > caps[key]:
            before, caps[key] = caps[key], wanted
            if fits():
                break
            caps[key] = before
            wanted -= 50 * W
    return caps
