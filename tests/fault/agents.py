"""What the agents do: they run the shipped governor, and what it tells them is checked from outside (P5, P6)."""

from __future__ import annotations

from tests.fault.parts import (
    DEFAULT,
    HIGH,
    LOW,
    PRODUCT,
    Agent,
    Gone,
    Machine,
    Message,
    Parts,
    Violation,
    version_of,
)

from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import AppliedEpoch, GPUNode, GPUNodeStatus, GPUStatus
from tokenfactory.planning.power import governor
from tokenfactory.planning.power.governor import Allowance, GpuView, Sheet, View


class Agents(Parts):
    def start_agent(self, node: str) -> None:
        old = self.agents[node]
        self.agents[node] = Agent(node, drift=old.drift)

    def read_own(self, node: str) -> None:
        agent = self.agents[node]
        agent.own = self.nodes[node]
        agent.node_queue.clear()

    def list_sheets(self, node: str) -> None:
        """A consistent list: at the start, and after a watch broke."""
        agent = self.agents[node]
        agent.listed, agent.broken = True, False
        agent.sheet_queue.clear()
        agent.sheets = dict(self.sheets)
        for renewal in self.renewals.values():
            self.see_renewal(agent, renewal)

    def next_sheet(self, node: str) -> None:
        agent = self.agents[node]
        sheet = agent.sheet_queue.pop(0)
        if isinstance(sheet, Gone):
            agent.sheets.pop(sheet.name, None)
        elif sheet.spec.renewal is None:
            agent.sheets[sheet.metadata.name] = sheet
        else:
            self.see_renewal(agent, sheet)

    def next_own(self, node: str) -> None:
        agent = self.agents[node]
        fold_own(agent, agent.node_queue.pop(0))

    def see_renewal(self, agent: Agent, renewal: CapSheet) -> None:
        agent.sheets[renewal.metadata.name] = renewal
        sequence = renewal.spec.renewal.sequence if renewal.spec.renewal is not None else 0
        if agent.first_sequence is None:
            agent.first_sequence = sequence
        elif sequence > agent.last_sequence:
            agent.news = True
        agent.last_sequence = max(agent.last_sequence, sequence)

    def clock(self, agent: Agent) -> int:
        return self.now + self.now * agent.drift // 1000 + agent.skipped

    def govern(self, node: str) -> None:
        """The agent decides. What it then sets are separate steps."""
        agent, machine = self.agents[node], self.machines[node]
        view = self._view(agent, machine)
        now = self.clock(agent)
        if agent.news:
            agent.news, agent.renewed_at = False, now
        agent.memory, agent.decision = self.kit.govern(agent.memory, view, now)
        agent.to_set = tuple(
            (index, order.cap_milliwatts)
            for index, gpu in enumerate(machine.gpus)
            if (order := agent.decision.caps[f"{node}-{index}"]).cap_milliwatts is not None
            and order.cap_milliwatts != gpu.limit
        )
        self._check_decision(agent, view, now)

    def _view(self, agent: Agent, machine: Machine) -> View:
        sheets = {n: Sheet.of(s.spec) for n, s in agent.sheets.items() if s.spec.renewal is None}
        renewals = {
            s.spec.tree: s.spec.renewal.sequence for s in agent.sheets.values() if s.spec.renewal is not None
        }
        return View(
            boot_id=f"b{machine.boot}",
            spec=agent.own.spec if agent.own is not None else None,
            generation=agent.own.metadata.generation if agent.own is not None else 0,
            status=agent.own.status if agent.own is not None else None,
            sheets=sheets if agent.listed else None,
            renewals=renewals if agent.listed else {},
            gpus=tuple(
                GpuView(f"{machine.name}-{i}", PRODUCT, LOW, HIGH, gpu.limit, gpu.pod)
                for i, gpu in enumerate(machine.gpus)
            ),
        )

    def _check_decision(self, agent: Agent, view: View, now: int) -> None:
        """P5 and P6, from what was delivered rather than from what the governor remembers."""
        decision = agent.decision
        if decision is None or view.spec is None or view.sheets is None:
            return
        path = view.spec.path
        used = [view.sheets[d] for d in path if d in view.sheets]
        hold = min((sheet.hold_milliseconds for sheet in used), default=0)
        since = agent.renewed_at
        late = since is not None and now >= since + hold
        for order in decision.caps.values():
            if order.cap_milliwatts is None:
                continue
            highest = self._allowed(used, order.reason.class_name, low=late, complete=len(used) == len(path))
            if order.cap_milliwatts > highest:
                raise Violation(
                    f"P6: {agent.node} would set {order} above {highest} ({'after' if late else 'within'} hold)"
                )
        for domain in path:
            acked = self.acked.get((agent.node, domain), 0)
            sheet = view.sheets.get(domain)
            stale = sheet is not None and sheet.epoch < acked and domain in _applied(self.nodes[agent.node])
            if stale and any(
                (order.cap_milliwatts or 0) > LOW and order.reason.why == "Sheet"
                for order in decision.caps.values()
            ):
                raise Violation(f"P5: {agent.node} obeys {domain} epoch {sheet} after acknowledging {acked}")

    def _allowed(self, used: list[Sheet], class_name: str, *, low: bool, complete: bool) -> int:
        if not complete or not used:
            return LOW
        caps = []
        for sheet in used:
            allowance = sheet.caps.get(class_name, Allowance(0, 0))
            caps.append(min(allowance.cap, allowance.fallback) if low else allowance.cap)
        return max(LOW, min(caps))

    def set_next(self, node: str, *, fails: bool = False) -> None:
        """One call to the driver. One that fails leaves the limit as it was."""
        agent = self.agents[node]
        (index, cap), *rest = agent.to_set
        agent.to_set = tuple(rest)
        if not fails:
            self.set_gpu(node, index, limit=cap)

    def report(self, node: str) -> bool:
        """The agent reads its limits back and sends its status if that says something new."""
        agent, machine = self.agents[node], self.machines[node]
        if agent.decision is None or agent.own is None or agent.memory.boot_id != f"b{machine.boot}":
            return False
        limits = machine.limits()
        agent.last_read = limits
        agent.memory, reading = self.kit.read_back(agent.memory, agent.decision, limits)
        status = self._status(agent, machine, reading)
        if status == agent.own.status:
            return False
        self.inflight.append(Message(node, "status", node, status, version_of(agent.own)))
        return True

    def _status(self, agent: Agent, machine: Machine, reading: governor.Readback) -> GPUNodeStatus:
        own = agent.own
        assert own is not None
        observed = reading.observed_generation
        return GPUNodeStatus(
            observed_generation=own.status.observed_generation if observed is None else observed,
            boot_id=f"b{machine.boot}",
            capped=reading.capped,
            applied=tuple(AppliedEpoch(domain=d, epoch=e) for d, e in sorted(reading.applied.items())),
            gpus=tuple(
                GPUStatus(
                    index=i,
                    uuid=f"{machine.name}-{i}",
                    product=PRODUCT,
                    min_milliwatts=LOW,
                    max_milliwatts=HIGH,
                    default_milliwatts=DEFAULT,
                    enforced_milliwatts=gpu.limit,
                    pod_uid=gpu.pod,
                )
                for i, gpu in enumerate(machine.gpus)
            ),
        )


def _applied(node: GPUNode) -> set[str]:
    return {entry.domain for entry in node.status.applied}


def fold_own(agent: Agent, node: GPUNode) -> None:
    if version_of(node) >= version_of(agent.own):
        agent.own = node
