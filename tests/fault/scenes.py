"""The small sites that are explored exhaustively, and what may happen in each.

Each scene begins at rest, with models running at their caps; then people move watts from one class to another, or
change a limit: one cut and one raise. After that everything may happen in every order. The number of faults in one
history is bounded, nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tests.fault.parts import HIGH, HOLD, LOW, OVERHEAD, Agent, Gpu, Kit, Leader, Machine, Pod, Site, W
from tests.fault.rest import Score, rest
from tests.fault.sites import CLASSES
from tests.fault.trust import LONG_AGO, plain_renewals, plain_trust
from tests.fault.world import World

from tokenfactory.planning.power.governor import Allowance
from tokenfactory.planning.power.lines import Domain

X, Y = CLASSES
ROOT = "hall"
Caps = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class Wish:
    """What people want: caps in watts by domain and class, and the hall's limit."""

    caps: Caps
    limit: int

    def on(self, site: Site) -> Site:
        domains = dict(site.domains)
        domains["hall"] = replace(domains["hall"], usable_milliwatts=self.limit)
        targets = {d: {c: Allowance(w * W, LOW) for c, w in of.items()} for d, of in self.caps.items()}
        return replace(site, version=site.version + 1, domains=domains, targets=targets)


@dataclass(frozen=True)
class Scene:
    """A site, what people want there one after the other, and which faults may befall it."""

    name: str
    wishes: tuple[Wish, ...]
    """At rest under the first; the second has just been uttered; the others come at any moment."""
    faults: frozenset[str]
    paths: Mapping[str, tuple[str, ...]]
    most_faults: int = 1
    gpus: int = 1
    renews: bool = False
    """Leaders renew, as often as they like. Else agents that start anew never trust a sheet again."""
    whole: bool = True
    """Explored to its end. Else it is too large for that, and only there for a bug that needs it."""

    def next_wish(self, site: Site) -> Site | None:
        """`site.version` counts the wishes so far."""
        return self.wishes[site.version].on(site) if site.version < len(self.wishes) else None


TWO = {"n0": ("hall",), "n1": ("hall", "rack")}
THREE = {"n0": ("hall",), "n1": ("hall", "rack"), "n2": ("hall", "rack")}
ONE = {"n0": ("hall",)}
WATTS = 2 * OVERHEAD + 800 * W
BEFORE = Wish({"hall": {X: 500, Y: 700}, "rack": {Y: 300}}, WATTS)
AFTER = Wish({"hall": {X: 300, Y: 700}, "rack": {Y: 500}}, WATTS)
LESS = Wish({"hall": {X: 300, Y: 700}, "rack": {Y: 300}}, WATTS - 200 * W)
ALIKE = tuple(Wish({"hall": {X: x, Y: 800 - x}}, OVERHEAD + 800 * W) for x in (500, 300))
CROWD = tuple(
    Wish({"hall": {X: x, Y: 700}, "rack": {Y: y}}, 3 * OVERHEAD + 1100 * W)
    for x, y in ((500, 300), (300, 400))
)
NODES = frozenset({"agent dies", "driver fails", "reboot", "hold runs out", "silence"})
TRUST = frozenset({"hold runs out", "agent dies", "leader dies", "deposed", "lose", "watch breaks"})
SCENES = {
    scene.name: scene
    for scene in (
        Scene("network", (BEFORE, AFTER), frozenset({"lose", "twice", "unanswered", "watch breaks"}), TWO, 3),
        Scene("nodes", (BEFORE, AFTER), NODES, TWO),
        Scene("crashes", (BEFORE, AFTER), NODES - {"reboot"}, TWO, 2),
        Scene("reboots", ALIKE, frozenset({"reboot", "driver fails"}), ONE, 2, gpus=2),
        Scene("there and back", (BEFORE, AFTER, BEFORE), NODES, TWO),
        Scene("a limit cut and raised", (BEFORE, LESS, BEFORE), NODES, TWO),
        Scene("succession", (BEFORE, AFTER), frozenset({"leader dies", "lose", "unanswered"}), TWO),
        Scene("two leaders", ALIKE, frozenset({"deposed", "lose", "unanswered"}), ONE, 2, gpus=2),
        Scene("a late write", (BEFORE, AFTER, BEFORE), frozenset({"leader dies"}), TWO, whole=False),
        Scene("a sheet deleted", (BEFORE, AFTER), frozenset({"sheet deleted", "agent dies", "lose"}), TWO),
        Scene("renewals", (BEFORE, AFTER), frozenset({"hold runs out", "agent dies"}), TWO, renews=True),
        Scene("renewals and leaders", ALIKE, TRUST, ONE, gpus=2, renews=True),
        Scene("three nodes", CROWD, frozenset({"lose", "unanswered", "hold runs out"}), THREE, 2),
    )
}
"""Each that is `whole` ends because nothing is left to explore."""


def begin(scene: Scene, kit: Kit) -> World:
    """At rest under the first wish, and the second has just been uttered."""
    domains = {ROOT: Domain(ROOT, None, 0, HOLD)}
    if any("rack" in path for path in scene.paths.values()):
        domains["rack"] = Domain("rack", ROOT, 2 * (OVERHEAD + HIGH), HOLD)
    site = scene.wishes[0].on(Site(0, domains, scene.paths, {}))
    world = World(site, {n: Machine(n, guarded=True, gpus=(Gpu(),) * scene.gpus) for n in scene.paths}, Kit())
    classes = (X, Y, Y)
    for name in scene.paths:
        for gpu in range(scene.gpus):
            uid = f"p-{name}" + (f"-{gpu}" if gpu else "")
            world.pods[uid] = Pod(uid, name, classes[len(world.pods)], 1)
    world.elect(clean=False)
    rest(world, Score(), root=ROOT)
    newest = world.renewals[f"{ROOT}.renewal"].spec.renewal.sequence
    plain_renewals(world)
    for agent in world.agents.values():
        plain_trust(agent, world.now, newest)
    world.kit = kit
    world.leaders[-1].claim_from = world.claim_from if kit.claims else 0
    world.change_site(scene.wishes[1].on(site))
    return world


Step = tuple[str, int, Callable[[World], Any]]
"""What happens, how many faults it costs, and how."""


def agent_steps(world: World, name: str, scene: Scene) -> Iterator[Step]:
    """What an agent, its machine and its pods can do.

    That news is heard is no step of its own: nothing but the agent's own next step depends on it, so it is heard just
    before, in every possible amount. A report counts only over the newest version of its object, so then all is heard.
    """
    agent, faults = world.agents[name], scene.faults
    for uid, pod in world.pods.items():
        if pod.node == name:
            yield f"{uid} starts", 0, lambda w, uid=uid: w.start(uid)
    if "reboot" in faults:
        yield f"{name} reboots", 1, lambda w: (w.power_off(name), w.power_on(name))
    if not agent.alive:
        yield f"agent {name} starts", 0, lambda w: w.start_agent(name)
        return
    if agent.own is None:
        yield f"agent {name} reads its node", 0, lambda w: w.read_own(name)
    if not agent.listed or agent.broken:
        yield f"agent {name} lists sheets", 0, lambda w: w.list_sheets(name)
    if agent.decision is not None and agent.own is not None:
        yield f"agent {name} reports", 0, lambda w: (hear(w, name, len(agent.node_queue), 0), w.report(name))
    if "agent dies" in faults:
        yield f"agent {name} dies", 1, lambda w: w.kill_agent(name)
    if "hold runs out" in faults:
        yield f"hold runs out at {name}", 1, lambda w: setattr(w.agents[name], "skipped", LONG_AGO)
    yield from _acts(agent, name, faults)


def _acts(agent: Agent, name: str, faults: frozenset[str]) -> Iterator[Step]:
    watching = agent.listed and not agent.broken
    for sheets in range(len(agent.sheet_queue) + 1 if watching else 1):
        for specs in range(len(agent.node_queue) + 1):
            news = f" hears of {specs} specs and {sheets} sheets and" if specs or sheets else ""
            yield f"agent {name}{news} acts", 0, lambda w, i=specs, j=sheets: act(w, name, i, j)
            if "driver fails" in faults:
                yield (
                    f"agent {name}{news} acts, its driver fails",
                    1,
                    lambda w, i=specs, j=sheets: act(w, name, i, j, fails=True),
                )
        if "watch breaks" in faults and watching:
            yield (
                f"agent {name} hears of {sheets} sheets, its watch breaks",
                1,
                lambda w, j=sheets: (hear(w, name, 0, j), setattr(w.agents[name], "broken", True)),
            )


def hear(world: World, name: str, specs: int, sheets: int) -> None:
    for _ in range(specs):
        world.next_own(name)
    for _ in range(sheets):
        world.next_sheet(name)


def act(world: World, name: str, specs: int = 0, sheets: int = 0, *, fails: bool = False) -> None:
    hear(world, name, specs, sheets)
    world.govern(name)
    while world.agents[name].to_set:
        world.set_next(name, fails=fails)


def leader_steps(leader: Leader, scene: Scene) -> Iterator[tuple[str, int, Callable[[World, Leader], Any]]]:
    """What a leader can do, apart from planning, giving up and being replaced."""
    who = f"leader {leader.pid}"
    if leader.site_queue:
        yield f"{who} hears what people want", 0, World.next_site_event
    if leader.sheet_queue:
        yield f"{who} hears of a deleted sheet", 0, World.next_sheet_event
    if "silence" in scene.faults:
        for name in sorted(leader.heard):
            yield f"{who} misses {name}", 1, lambda w, each, n=name: _miss(each, n)


def leader_plans(leader: Leader) -> Iterator[tuple[str, int, Callable[[World, Leader], Any]]]:
    """What it can plan, after hearing so many news of nodes: these it hears just before."""
    for news in range(len(leader.node_queue) + 1):
        heard = f" hears of {news} nodes and" if news else ""
        yield f"leader {leader.pid}{heard} plans sheets", news, World.lead_sheets
        yield f"leader {leader.pid}{heard} plans nodes", news, World.lead_nodes


def _miss(leader: Leader, name: str) -> None:
    leader.heard -= {name}
