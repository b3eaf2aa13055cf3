"""What is only measured anew makes few rounds; what charges are made from makes one at once."""

import asyncio
import math
from typing import Any

import msgspec
import pytest

from tokenfactory.api.gpu_node import AppliedEpoch, GPUNode, GPUStatus, PodMeter
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.controller.actions import Plan
from tokenfactory.controller.observer import is_report
from tokenfactory.controller.reconciler import Reconciler
from tokenfactory.kube.cache import Change
from tokenfactory.kube.objects import KubeCondition, Node

GPU = GPUStatus(index=0, uuid="gpu-0", product="H100", enforced_milliwatts=700_000)
NODE = msgspec.convert({"metadata": {"name": "n1", "uid": "1", "resourceVersion": "7"}}, GPUNode)
NODE = msgspec.structs.replace(NODE, status=msgspec.structs.replace(NODE.status, gpus=(GPU,)))


def said(**status: Any) -> Change[GPUNode]:
    meta = msgspec.structs.replace(NODE.metadata, resource_version="8")
    new = msgspec.structs.replace(NODE, metadata=meta, status=msgspec.structs.replace(NODE.status, **status))
    return Change(("", "n1"), NODE, new)


@pytest.mark.parametrize(
    "status",
    [
        {},
        {"draw_milliwatts": 4_000_000, "peak_milliwatts": 5_000_000},
        {"reported_at": "2026-11-21T12:00:00Z"},
        {"meters": (PodMeter(pod="a/b", uid="1", generated_tokens=7),)},
    ],
    ids=str,
)
def test_figures_are_a_report(status: dict[str, Any]):
    assert is_report(said(**status))


@pytest.mark.parametrize(
    "status",
    [
        {"observed_generation": 2},
        {"applied": (AppliedEpoch(domain="hall", epoch=3),)},
        {"boot_id": "boot-2"},
        {"capped": True},
        {"mode": "Fallback"},
        {"gpus": ()},
        {"gpus": (msgspec.structs.replace(GPU, enforced_milliwatts=300_000),)},
        {"gpus": (msgspec.structs.replace(GPU, pod_uid="p"),)},
    ],
    ids=str,
)
def test_what_charges_are_made_from_is_news(status: dict[str, Any]):
    assert not is_report(said(**status))


def test_a_spec_a_label_an_addition_and_a_namesake_are_news():
    labelled = msgspec.structs.replace(NODE.metadata, labels={"rack": "a"})
    spec = msgspec.structs.replace(NODE.spec, overhead_milliwatts=1)
    namesake = msgspec.structs.replace(NODE.metadata, uid="2")
    for new in (
        msgspec.structs.replace(NODE, metadata=labelled),
        msgspec.structs.replace(NODE, spec=spec),
        msgspec.structs.replace(NODE, metadata=namesake),
        None,
    ):
        assert not is_report(Change(("", "n1"), NODE, new))
    assert not is_report(Change(("", "n1"), None, NODE))


def test_a_kubelet_that_only_says_that_it_lives_is_no_news():
    node = Node(metadata=ObjectMeta(name="n1", uid="1", resource_version="1"))
    later = msgspec.structs.replace(node, metadata=ObjectMeta(name="n1", uid="1", resource_version="2"))
    assert is_report(Change(("", "n1"), node, later))
    status = msgspec.structs.replace(node.status, conditions=(KubeCondition(type="Ready", status="False"),))
    assert not is_report(Change(("", "n1"), node, msgspec.structs.replace(later, status=status)))


class Rounds:
    """A reconciler that does nothing but count its rounds."""

    seconds_to_status = math.inf

    def begin_round(self) -> None:
        pass

    def __init__(self, report_seconds: float) -> None:
        self.ended = asyncio.Semaphore(0)
        self.reconciler = Reconciler(
            lambda: None,  # type: ignore[arg-type, return-value]
            lambda _: Plan((), again_after_seconds=3600),
            self,  # type: ignore[arg-type]
            gather_seconds=0,
            report_seconds=report_seconds,
        )

    async def execute(self, *_: Any) -> bool:
        self.ended.release()
        return True


async def test_many_reports_make_one_round_and_news_does_not_wait_for_them():
    rounds = Rounds(report_seconds=3600)
    running = asyncio.create_task(rounds.reconciler.run())
    async with asyncio.timeout(10):
        await rounds.ended.acquire()
        for _ in range(1000):
            rounds.reconciler.reported()
        rounds.reconciler.changed()
        await rounds.ended.acquire()
    running.cancel()
    assert rounds.ended.locked(), "nobody waited for the reports"

    rounds = Rounds(report_seconds=0.01)
    running = asyncio.create_task(rounds.reconciler.run())
    async with asyncio.timeout(10):
        await rounds.ended.acquire()
        for _ in range(1000):
            rounds.reconciler.reported()
        await rounds.ended.acquire()
        rounds.reconciler.reported()
        await rounds.ended.acquire()
    running.cancel()
    assert rounds.reconciler.rounds <= 3


async def test_a_status_that_was_held_back_is_told_though_nothing_happens_any_more():
    rounds = Rounds(report_seconds=3600)
    rounds.seconds_to_status = 0.01
    running = asyncio.create_task(rounds.reconciler.run())
    async with asyncio.timeout(10):
        await rounds.ended.acquire()
        rounds.seconds_to_status = math.inf
        await rounds.ended.acquire()
    running.cancel()
    assert rounds.reconciler.rounds == 2
