"""Machines and the pods on them."""

from __future__ import annotations

from dataclasses import replace

from tests.fault.parts import DEFAULT, Agent, Gpu, Parts, Violation


class Machines(Parts):
    def power_off(self, node: str) -> None:
        machine = self.machines[node]
        machine.on = False
        machine.gpus = tuple(replace(gpu, running=False) for gpu in machine.gpus)
        self.kill_agent(node)

    def kill_agent(self, node: str) -> None:
        old = self.agents[node]
        self.agents[node] = Agent(node, alive=False, drift=old.drift)

    def power_on(self, node: str) -> None:
        machine = self.machines[node]
        machine.on = True
        machine.boot += 1
        machine.gpus = tuple(
            replace(gpu, limit=DEFAULT, running=False, pod=self._kept(gpu)) for gpu in machine.gpus
        )

    def _kept(self, gpu: Gpu) -> str:
        pod = self.pods.get(gpu.pod)
        return gpu.pod if gpu.pod.startswith("foreign") or (pod is not None and not pod.deleted) else ""

    def reload_driver(self, node: str) -> None:
        """Needs every process off the GPUs; the agent lives on."""
        machine = self.machines[node]
        machine.boot += 1
        machine.gpus = tuple(replace(gpu, limit=DEFAULT, running=False) for gpu in machine.gpus)

    def bind(self, uid: str) -> bool:
        """The kubelet gives an ungated pod its GPUs."""
        pod = self.pods[uid]
        machine = self.machines[pod.node]
        free = [i for i, gpu in enumerate(machine.gpus) if not gpu.pod]
        if not pod.ungated or pod.deleted or not machine.on or len(free) < pod.gpus:
            return False
        if any(gpu.pod == uid for gpu in machine.gpus):
            return False
        for index in free[-pod.gpus :]:
            self.set_gpu(pod.node, index, pod=uid)
        return True

    def start(self, uid: str) -> bool:
        """The pod's init container asks the node's agent whether its model may start."""
        pod = self.pods[uid]
        machine, agent = self.machines[pod.node], self.agents[pod.node]
        held = [i for i, gpu in enumerate(machine.gpus) if gpu.pod == uid]
        if not held or not machine.on or machine.gpus[held[0]].running or not agent.alive:
            return False
        if agent.decision is None:
            return False
        if self.kit.gate_reads_now:
            if agent.memory.boot_id != f"b{machine.boot}":
                return False
            limits = machine.limits()
        else:
            limits = agent.last_read
        if uid not in self.kit.read_back(agent.memory, agent.decision, limits)[1].may_start:
            return False
        for index in held:
            cap = agent.decision.caps[f"{pod.node}-{index}"].cap_milliwatts
            if cap is None or machine.gpus[index].limit > cap:
                raise Violation(
                    f"P3: {uid} starts on GPU {index} of {pod.node}, which is not at its cap {cap}"
                )
            self.set_gpu(pod.node, index, running=True)
        if uid not in {grant.uid for grant in self.nodes[pod.node].spec.pods}:
            raise Violation(f"P3: {uid} starts on {pod.node} without being charged there")
        return True

    def stop(self, uid: str) -> None:
        """A deleted pod's processes end and its GPUs come free."""
        pod = self.pods[uid]
        for index, gpu in enumerate(self.machines[pod.node].gpus):
            if gpu.pod == uid:
                self.set_gpu(pod.node, index, pod="", running=False)
