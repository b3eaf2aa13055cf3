"""One agent process on one simulated node, on a tree of its own, and whoever writes its sheets."""

import asyncio
import urllib.request
from pathlib import Path

from tests.waiting import until

from tokenfactory.api.gpu_node import PodGrant
from tokenfactory.twin.agent_node import AgentNode, SheetDesk
from tokenfactory.twin.faultproxy import FaultProxy

REPOSITORY = Path(__file__).parents[2]
PRODUCT = "NVIDIA H100 80GB HBM3"
IDLE = f"idle@{PRODUCT}"
CHAT = f"inference/chat/llama@{PRODUCT}"
NAMESPACE = "tokenfactory-system"
DEFAULT = 700_000
SETTING = "nvmlDeviceSetPowerManagementLimit"
INSUFFICIENT_PERMISSIONS = 4


class World:
    """One node, its own tree of two domains, and whoever writes the sheets."""

    def __init__(self, desk: SheetDesk, node: AgentNode, proxy: FaultProxy, kubeconfig: Path) -> None:
        self.desk, self.node, self.proxy, self.kubeconfig = desk, node, proxy, kubeconfig
        self.site, self.rack = desk.tree, f"{desk.tree}-rack"
        self.epoch = 1
        self.hold = 300_000

    async def begin(self, *pods: PodGrant, **start: str) -> None:
        await self.desk.grant(self.node.name, (self.site, self.rack), *pods)
        await self.sheets(600_000)
        await self.desk.renew()
        self.start()
        await self.obeying()

    def start(self, *arguments: str) -> None:
        quick = (
            "observe=0.5",
            "pods=0.5",
            "wear=1",
            "meter=1",
            "report=5",
            "reopen=0.2",
            "tick=1",
            "kubelet_settle=2",
        )
        self.node.start(self.kubeconfig, *(f"--pace={pace}" for pace in quick), *arguments)

    async def obeying(self) -> None:
        async def settled() -> bool:
            await self.desk.renew()
            return (await self.status()).mode == "Obeying" and (await self.status()).capped

        await until(settled)

    async def sheets(self, cap: int, fallback: int = 300_000) -> None:
        self.epoch += 1
        caps = {CHAT: (cap, min(cap, fallback)), IDLE: (250_000, 250_000)}
        for domain in (self.site, self.rack):
            await self.desk.publish(domain, self.epoch, caps, hold_milliseconds=self.hold)

    async def status(self):
        return (await self.desk.node(self.node.name)).status

    async def applied(self) -> int:
        return min((entry.epoch for entry in (await self.status()).applied), default=0)

    async def enforced(self, *want: int) -> None:
        await until(lambda: self.node.enforced_milliwatts() == list(want))

    async def renewed_until(self, milliwatts: int) -> None:
        async def so() -> bool:
            await self.desk.renew()
            return self.node.enforced_milliwatts() == [milliwatts] * 8

        await until(so)

    async def get(self, path: str) -> str:
        def fetch() -> str:
            url = f"http://127.0.0.1:{self.node.ports()['metrics']}{path}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                return answer.read().decode()

        return await asyncio.to_thread(fetch)

    async def rounds(self, count: int) -> None:
        """The agent's loop has got round so many times."""

        async def so() -> bool:
            line = next(
                it
                for it in (await self.get("/metrics")).splitlines()
                if "agent_steps_total " in it and it[0] != "#"
            )
            return float(line.split()[1]) >= count

        await until(so)

    async def acknowledged(self) -> None:
        async def is_so() -> bool:
            return await self.applied() == self.epoch

        await until(is_so)


def grant(name="chat-0", gpus=8, **more) -> PodGrant:
    return PodGrant(namespace="inference", name=name, uid=f"uid-{name}", class_name=CHAT, gpus=gpus, **more)
