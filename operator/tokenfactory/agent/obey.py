"""The short path of obeying, without a wait in it: look, govern, set what must be set, read back.

A call that hangs holds up only its own GPU: a step never waits for NVML, it is run again when calls come back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from tokenfactory.agent.enforce import Enforcer
from tokenfactory.agent.guard import guarded
from tokenfactory.agent.guarding import cap_before, remember
from tokenfactory.agent.holders import holdings
from tokenfactory.agent.nvml import Failure, Gpu, Nvml
from tokenfactory.agent.parts import Clock, NodeSource, PodDevices, SheetSource
from tokenfactory.agent.state import AgentState
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.planning.power.governor import Decision, GpuView, View, govern, read_back

KUBELET_PATIENCE_SECONDS: Final = 15.0


class ShortPath:
    """One node's obeying; `called_back` is told how each call that set a limit ended."""

    def __init__(
        self,
        state: AgentState,
        *,
        nvml: Nvml,
        nodes: NodeSource,
        sheets: SheetSource,
        clock: Clock,
        called_back: Callable[[Failure | None], None],
    ) -> None:
        self.state = state
        self.enforcer = Enforcer(nvml, clock)
        self.clock = clock
        self._nvml = nvml
        self._nodes = nodes
        self._sheets = sheets
        self._called_back = called_back
        self._began = clock.monotonic()
        self._setting: dict[str, asyncio.Task[None]] = {}

    def is_setting(self, gpu: str | None = None) -> bool:
        """A limit of this GPU, or of any, is being set."""
        return bool(self._setting) if gpu is None else gpu in self._setting

    @property
    def is_busy(self) -> bool:
        """Limits are being set, or one did not hold and is to be tried again."""
        return bool(self._setting) or any(held.failure for held in self.enforcer.held.values())

    def abandon(self) -> None:
        """The agent ends: a limit that was not set yet stays as it is."""
        for task in self._setting.values():
            task.cancel()

    def step(self) -> None:
        """One round of the short path; it waits for nothing."""
        state = self.state
        state.steps += 1
        self._take_node()
        if not state.gpus or not self._holders_known():
            return
        self._take_holdings()
        state.memory, decision = govern(state.memory, self._view(), int(self.clock.monotonic() * 1000))
        state.decision = decision
        self._set(decision)
        state.readback = None
        if not self._setting:
            self._read_back(decision)

    def _take_node(self) -> None:
        """A new spec is obeyed once all its paths have been heard of; until then the one before."""
        node = self._nodes.node()
        if node is None:
            return
        paths = frozenset(path for path in (node.spec.path, *node.spec.former_paths) if path)
        self._sheets.follow(paths)
        if self._sheets.ready(paths):
            if self.state.node is None:
                self.state.observed_generation = node.status.observed_generation
                self.state.node = node
                remember(self.state, self._nvml.identity.boot_id, self.clock.monotonic())
            self.state.node = node

    def _take_holdings(self) -> None:
        state = self.state
        if state.node is not None:
            pods = state.pods if state.pods is not None else self._pods_before(state.node)
            state.holdings = holdings((gpu.uuid for gpu in state.gpus), pods, state.node.spec)

    def _holders_known(self) -> bool:
        """Before anything is lowered or acknowledged the first time: a GPU in use must not be taken for an idle one.

        A kubelet that stays silent does not put it off for ever: what is not known to be used gets the lower power.
        """
        state = self.state
        before = state.node.status if state.node is not None else None
        return (
            state.pods is not None
            or (before is not None and before.boot_id == self._nvml.identity.boot_id and before.capped)
            or self.clock.monotonic() - self._began >= KUBELET_PATIENCE_SECONDS
        )

    def _pods_before(self, node: GPUNode) -> tuple[PodDevices, ...]:
        """Until the kubelet has answered: who held what when an earlier agent of this boot last reported."""
        if node.status.boot_id != self._nvml.identity.boot_id:
            return ()
        held = [(gpu.pod.partition("/"), gpu.uuid) for gpu in node.status.gpus if gpu.pod]
        return tuple(PodDevices(namespace, name, (uuid,)) for (namespace, _, name), uuid in held)

    def _view(self) -> View:
        state = self.state
        node = state.node
        return View(
            boot_id=self._life(),
            spec=node.spec if node else None,
            generation=node.metadata.generation if node else 0,
            status=node.status if node else None,
            sheets=self._sheets.sheets,
            renewals=self._sheets.renewals,
            gpus=tuple(self._gpu_view(gpu) for gpu in state.gpus),
        )

    def _life(self) -> str:
        """The boot, and a later life of the driver in it: limits survive neither."""
        identity = self._nvml.identity
        later = identity.driver_generation > 1
        return f"{identity.boot_id}/{identity.driver_generation}" if later else identity.boot_id

    def _gpu_view(self, gpu: Gpu) -> GpuView:
        limits = self.enforcer.limits(gpu)
        return GpuView(
            uuid=gpu.uuid,
            product=gpu.product,
            min_milliwatts=limits.min_milliwatts if limits else 0,
            max_milliwatts=limits.max_milliwatts if limits else 0,
            enforced_milliwatts=self.enforcer.enforced(gpu.uuid),
            pod_uid=self.state.holdings.of(gpu.uuid).uid,
        )

    def _set(self, decision: Decision) -> None:
        caps = {}
        for gpu, order in decision.caps.items():
            if order.reason.why != "Kept":
                self.state.inherited.pop(gpu, None)  # from now on the cap is the sheets'
            before = cap_before(self.state, order)
            if before is None or order.cap_milliwatts is None:
                continue
            cap = min(order.cap_milliwatts, guarded(self.state.guard, gpu, before))
            if order.reason.why != "Kept" or not self.enforcer.obeys(gpu, cap):
                caps[gpu] = cap
        for gpu, milliwatts in self.enforcer.wanted(caps).items():
            if gpu not in self._setting:
                name = f"{self.state.name} set {gpu}"
                self._setting[gpu] = asyncio.create_task(self._set_one(gpu, milliwatts), name=name)

    async def _set_one(self, gpu: str, milliwatts: int) -> None:
        try:
            failure = await self.enforcer.set(gpu, milliwatts)
            self.state.faults.take_limit(gpu, failure)
        finally:
            del self._setting[gpu]
        self._called_back(failure)

    def _read_back(self, decision: Decision) -> None:
        state = self.state
        if state.unknown:
            decision = replace(decision, complete=False)  # what NVML does not hand out now was not read back
        enforced = {gpu: self.enforcer.enforced(gpu) for gpu in decision.caps}
        state.memory, state.readback = read_back(state.memory, decision, enforced)
        if state.readback.observed_generation is not None:
            state.observed_generation = state.readback.observed_generation
