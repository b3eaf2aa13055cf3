"""Hundreds of agents in one process on one shared watch: what the hollow fleet is made of."""

import asyncio

import msgspec
from tests.unit.agent.hollow import CHAT, IDLE, HollowKubelet, HollowNvml
from tests.unit.agent.virtual import VirtualClock, run

from tokenfactory.agent.loop import Agent
from tokenfactory.agent.parts import PodDevices
from tokenfactory.agent.sources import SharedNodes, SharedSheets, SheetBook
from tokenfactory.api.cap_sheet import CapSheet, CapSheetSpec, ClassCap, Renewal
from tokenfactory.api.gpu_node import GPUNode, GPUNodeSpec, GPUNodeStatus, PodGrant
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.planning.power import governor

COUNT = 200


class Fleet:
    def __init__(self) -> None:
        self.book, self.nodes = SheetBook(), SharedNodes()
        self.hardware = {f"n{i}": HollowNvml(2) for i in range(COUNT)}
        self.acknowledged: dict[str, int] = {}
        self._sheet: CapSheet | None = None
        self._renewals = 0

    async def write(self, held: GPUNode, status: GPUNodeStatus) -> bool:
        await asyncio.sleep(0.001)
        self.acknowledged[held.metadata.name] = max((it.epoch for it in status.applied), default=0)
        self.nodes.take(held, msgspec.structs.replace(held, status=status))
        return True

    def agent(self, name: str) -> Agent:
        kubelet = HollowKubelet()
        kubelet.pods = (PodDevices("ns", f"p-{name}", ("GPU-0",)),)
        pod = PodGrant(namespace="ns", name=f"p-{name}", uid=f"u-{name}", class_name=CHAT, gpus=1)
        node = GPUNode(
            metadata=ObjectMeta(name=name, uid=name, generation=1),
            spec=GPUNodeSpec(path=("site",), pods=(pod,)),
        )
        self.nodes.take(None, node)
        return Agent(
            name,
            nvml=self.hardware[name],
            pods=kubelet,
            nodes=self.nodes.of(name),
            sheets=SharedSheets(self.book, lambda: True),
            writer=self,
            clock=VirtualClock(),
        )

    def publish(self, epoch: int, cap: int) -> None:
        caps = (
            ClassCap(class_name=CHAT, cap=cap, fallback=cap),
            ClassCap(class_name=IDLE, cap=200_000, fallback=200_000),
        )
        spec = CapSheetSpec(
            domain="site", tree="site", term=1, epoch=epoch, hold_milliseconds=60_000, caps=caps
        )
        sheet = CapSheet(metadata=ObjectMeta(name="site"), spec=spec)
        self.book.take(self._sheet, sheet)
        self._sheet = sheet

    def renew(self) -> None:
        self._renewals += 1
        spec = CapSheetSpec(
            domain="site", tree="site", term=1, epoch=1, renewal=Renewal(sequence=self._renewals)
        )
        self.book.take(None, CapSheet(metadata=ObjectMeta(name="site.renewal"), spec=spec))


def test_one_sheet_reaches_all_agents_is_converted_once_and_each_reports_once(monkeypatch) -> None:
    conversions = []
    of = governor.Sheet.of
    monkeypatch.setattr(governor.Sheet, "of", lambda spec: conversions.append(1) or of(spec))

    async def tell() -> None:
        fleet = Fleet()
        agents = [fleet.agent(name) for name in fleet.hardware]
        fleet.publish(1, 600_000)
        fleet.renew()
        running = [asyncio.create_task(agent.run()) for agent in agents]
        await asyncio.sleep(1)
        fleet.renew()
        await asyncio.sleep(1)
        assert {tuple(g.limit for g in it.gpus.values()) for it in fleet.hardware.values()} == {
            (600_000, 200_000)
        }
        conversions.clear()
        writes = [agent.reporter.writes for agent in agents]
        fleet.publish(2, 300_000)
        await asyncio.sleep(0.05)
        assert {tuple(g.limit for g in it.gpus.values()) for it in fleet.hardware.values()} == {
            (300_000, 200_000)
        }
        assert set(fleet.acknowledged.values()) == {2}
        assert len(conversions) == 1
        assert [agent.reporter.writes for agent in agents] == [count + 1 for count in writes]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    run(tell())
