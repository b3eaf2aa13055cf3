"""A site in which everything can go wrong: an API server, machines with GPUs, agents, leaders, and the network.

Agents run the shipped governor and leaders the shipped ledger; `Kit` names the functions they use, so that a test can
put a wrong one in. Nothing here decides about power. What is watched for are the *true* limits of GPUs that may be
working: see `draw` and `violations`.
"""

from __future__ import annotations

from collections.abc import Mapping

from tests.fault.agents import Agents
from tests.fault.leaders import Leaders
from tests.fault.machines import Machines
from tests.fault.parts import Agent, Kit, Machine, Site, Violation, W, copy_of
from tests.fault.server import Server

from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import ObjectMeta


class World(Server, Machines, Agents, Leaders):
    """All of it. Methods are the atomic things that can happen; the searches choose which happens next."""

    def __init__(self, site: Site, machines: Mapping[str, Machine], kit: Kit) -> None:
        self.kit = kit
        self.now = 1_000_000
        self.site = site
        self.machines = dict(machines)
        self.pods = {}
        self.sheets = {}
        self.renewals = {}
        self.nodes = {
            name: GPUNode(metadata=ObjectMeta(name=name, resource_version="1", generation=1))
            for name in machines
        }
        self.agents = {name: Agent(name) for name in machines}
        self.leaders = []
        self.inflight = []
        self.term = 0
        self.claim_from = 0
        self.next_pid = 1
        self.deleted = {}
        self.revision = 0
        self.peaks = {}
        self.acked = {}
        self.steps = 0

    def clone(self) -> World:
        twin = copy_of(self)
        twin.machines = {name: machine.clone() for name, machine in self.machines.items()}
        twin.pods = dict(self.pods)
        twin.sheets = dict(self.sheets)
        twin.renewals = dict(self.renewals)
        twin.nodes = dict(self.nodes)
        twin.agents = {name: agent.clone() for name, agent in self.agents.items()}
        twin.leaders = [leader.clone() for leader in self.leaders]
        twin.inflight = list(self.inflight)
        twin.deleted = dict(self.deleted)
        twin.peaks = dict(self.peaks)
        twin.acked = dict(self.acked)
        return twin

    def change_site(self, site: Site) -> None:
        for name, domain in self.site.domains.items():
            if site.domains[name].usable_milliwatts < domain.usable_milliwatts:
                self.peaks[name] = max(self.peaks.get(name, 0), domain.usable_milliwatts)
        self.site = site
        for leader in self.leaders:
            leader.site_queue.append(site)

    # -- what must hold -------------------------------------------------------------------------------------------

    def draws(self) -> dict[str, int]:
        """What every domain truly draws at most: by the limits that GPUs with work on them have now."""
        total = dict.fromkeys(self.site.domains, 0)
        for name, machine in self.machines.items():
            draw = machine.draw()
            spec = self.nodes[name].spec
            if spec.fence is not None:
                # Somebody switched it on unasked: its idle draw cannot be known before it is heard of.
                draw -= machine.floor()
            for domain in {d for path in (spec.path, *spec.former_paths) for d in path}:
                total[domain] += draw
        return total

    def check(self) -> None:
        """P1 (and with it P2 and P4), after every step."""
        self.steps += 1
        if self.peaks and self.steps % 16 == 0:
            for domain in tuple(self.peaks):
                self.bound(domain)
        for domain, draw in self.draws().items():
            limit = self.site.domains[domain].usable_milliwatts
            if draw <= limit:
                continue
            if draw > self.bound(domain):
                raise Violation(f"P1: {domain} draws {draw // W} W of {limit // W} W")

    def bound(self, domain: str) -> int:
        """The limit, or after a cut the old one, until the cut is known and everything was given back."""
        limit = self.site.domains[domain].usable_milliwatts
        peak = self.peaks.get(domain, 0)
        if peak <= limit:
            self.peaks.pop(domain, None)
            return limit
        known = [leader.site.domains[domain].usable_milliwatts for leader in self.leaders]
        known += [message.limits[domain] for message in self.inflight if domain in message.limits]
        if max(known, default=0) > limit or self.charge(domain) > limit:
            return peak
        del self.peaks[domain]
        return limit
