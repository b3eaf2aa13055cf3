"""P3 on the node: a pod's model starts only after its GPUs' caps were read back in this boot.

The pod's init container asks (`tokenfactory wait-cap`), and is told yes or what it waits for. The answer is asked of
the kubelet and of NVML now, not remembered.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final

import msgspec

from tokenfactory.agent.loop import Agent
from tokenfactory.agent.waiting import GateAnswer
from tokenfactory.agent.web import Answer
from tokenfactory.api.gpu_node import PodGrant

FRESH_SECONDS: Final = 5.0
CAPPED: Final = "its GPUs' limits were read back in this boot"


class StartGate:
    """Answers for one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def route(self, uid: str) -> Answer:
        answer = await self.ask(uid)
        status = (
            HTTPStatus.OK
            if answer.may_start
            else HTTPStatus.FORBIDDEN
            if answer.final
            else HTTPStatus.SERVICE_UNAVAILABLE
        )
        return Answer(status, msgspec.json.encode(answer) + b"\n", "application/json")

    async def ask(self, uid: str) -> GateAnswer:
        grant = self._grant(uid)
        if grant is None:
            return _wait("NotGranted", "this node's GPUNode does not list the pod yet")
        if grant.released:
            return GateAnswer(
                False, "Released", "the grant is being taken back; this pod will be replaced", final=True
            )
        await self._agent.fresh_pods(FRESH_SECONDS)
        if not await self._agent.fresh_limits(self._agent.state.holdings.gpus_of(uid), FRESH_SECONDS):
            return _wait("NotReadBack", "its GPUs' limits could not be read anew in time")
        return self._judge(uid, grant)

    def _grant(self, uid: str) -> PodGrant | None:
        node = self._agent.state.node
        return next((grant for grant in node.spec.pods if grant.uid == uid), None) if node and uid else None

    def _judge(self, uid: str, grant: PodGrant) -> GateAnswer:
        state = self._agent.state
        if state.pods is None or state.pods_problem:
            return _wait(
                "KubeletSilent", f"the kubelet does not say which GPUs it gave: {state.pods_problem}"
            )
        key = f"{grant.namespace}/{grant.name}"
        unknown = [device for pod in state.pods if pod.key == key for device in pod.unknown]
        if unknown:
            return _wait("UnknownGPU", f"NVML does not show what the kubelet gave it: {', '.join(unknown)}")
        gpus = state.holdings.gpus_of(uid)
        if not gpus:
            return _wait("NoGPUs", "the kubelet has not given this pod a GPU yet")
        if len(gpus) > grant.gpus:
            message = f"the pod holds {len(gpus)} GPUs, but power was charged for {grant.gpus}"
            return GateAnswer(False, "MoreThanGranted", message, gpus, final=True)
        problem = self._problem(gpus)
        return _wait(*problem, gpus) if problem else GateAnswer(True, "Capped", CAPPED, gpus)

    def _problem(self, gpus: tuple[str, ...]) -> tuple[str, str] | None:
        state = self._agent.state
        readback = state.readback
        if readback is None:
            return "Setting", "limits are being set"
        if not readback.capped:
            return "NodeNotCapped", "not every GPU's limit was read back in this boot"
        # A GPU shared by pods of one class counts for the first of them.
        if {state.holdings.of(gpu).uid for gpu in gpus} <= readback.may_start:
            return None
        held = [self._agent.enforcer.held.get(gpu) for gpu in gpus]
        failures = [str(it.failure) for it in held if it is not None and it.failure is not None]
        return "NotCapped", "; ".join(failures) or "its GPUs' limits were not read back yet"


def _wait(reason: str, message: str, gpus: tuple[str, ...] = ()) -> GateAnswer:
    return GateAnswer(False, reason, message, gpus)
