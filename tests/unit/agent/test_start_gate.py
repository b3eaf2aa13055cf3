"""Who holds which GPU, and when a model may start on it, in virtual time."""

import asyncio
from dataclasses import replace

from tests.unit.agent.hollow import CHAT, DEFAULT, IDLE, Node
from tests.unit.agent.stories import story

from tokenfactory.agent.nvml import FailureKind
from tokenfactory.agent.startgate import StartGate


def test_a_gpu_held_by_a_stranger_is_left_alone_and_one_held_by_nobody_idles() -> None:
    async def tell(node: Node) -> None:
        node.use("stranger", 0)
        await node.settle()
        await node.until(lambda: node.limits()[1:] == [250_000] * 7)
        assert node.limits()[0] == DEFAULT
        assert node.api.status.gpus[0].class_name.startswith("unmanaged@")
        assert node.api.status.gpus[0].pod_uid == ""

    story(tell)


def test_a_kubelet_that_answers_late_costs_a_gpu_in_use_nothing_and_one_that_never_does_lowers_all() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        node.kubelet.silent = True
        node.api.publish("site", 1, {CHAT: (600_000, 600_000), IDLE: (250_000, 250_000)})
        node.api.publish("rack", 1, {CHAT: (600_000, 600_000), IDLE: (250_000, 250_000)})
        node.api.renew()
        node.start()
        await asyncio.sleep(10)
        assert node.limits() == [DEFAULT] * 8
        assert not node.api.status.capped
        await node.until(lambda: node.limits() == [250_000] * 8)
        node.kubelet.silent = False
        node.api.renew()
        await node.until(lambda: node.limits()[0] == 600_000)

    story(tell)


def test_a_pod_that_holds_more_than_was_charged_may_not_start() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0, 1, granted=1),))
        await node.settle()
        answer = await StartGate(node.agent).ask("uid-a")
        assert (answer.may_start, answer.final, answer.reason) == (False, True, "MoreThanGranted")

    story(tell)


def test_the_gate_opens_only_when_the_pods_caps_were_read_back() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        gate = StartGate(node.agent)
        assert (await gate.ask("uid-a")).reason == "NotGranted"
        node.nvml.gpus["GPU-1"].failure = FailureKind.NO_PERMISSION
        await node.until(lambda: node.api.status.gpu_count == 7)
        node.api.grant(pods=(node.use("a", 0, 1),))
        await asyncio.sleep(1)
        answer = await gate.ask("uid-a")
        assert (answer.may_start, answer.final) == (False, False)
        assert "no permission" in answer.message
        node.nvml.gpus["GPU-1"].failure = None
        await asyncio.sleep(15)
        answer = await gate.ask("uid-a")
        assert answer.may_start, answer
        assert node.limits()[:2] == [600_000] * 2
        assert answer.gpus == ("GPU-0", "GPU-1")

    story(tell)


def test_the_gate_reads_limits_anew_so_that_no_model_starts_on_one_that_was_just_reset() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        await node.settle()
        gate = StartGate(node.agent)
        assert (await gate.ask("uid-a")).may_start
        node.nvml.gpus["GPU-0"].limit = DEFAULT
        assert (await gate.ask("uid-a")).may_start
        assert node.limits()[0] == 600_000

    story(tell)


def test_asking_the_gate_asks_the_kubelet_and_does_not_wait_for_its_turn() -> None:
    async def tell(node: Node) -> None:
        await node.settle()
        await node.until(lambda: not node.agent._wake.is_set())
        node.api.grant(pods=(node.use("a", 0),))
        await asyncio.sleep(0)
        begin = asyncio.get_running_loop().time()
        assert (await StartGate(node.agent).ask("uid-a")).may_start
        assert asyncio.get_running_loop().time() - begin < 0.1

    story(tell)


def test_a_released_pod_may_not_start_again() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0, released=True),))
        await node.settle()
        answer = await StartGate(node.agent).ask("uid-a")
        assert (answer.may_start, answer.final) == (False, True)

    story(tell)


def test_a_silent_kubelet_keeps_what_was_known_and_the_gate_shut() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        await node.settle()
        node.kubelet.silent = True
        answer = await StartGate(node.agent).ask("uid-a")
        assert answer.reason == "KubeletSilent"
        await asyncio.sleep(30)
        assert node.limits()[0] == 600_000
        condition = next(it for it in node.api.status.conditions if it.type == "PodsKnown")
        assert (condition.status, condition.reason) == ("False", "KubeletSilent")

    story(tell)


def test_after_a_reboot_nothing_starts_before_it_is_capped_anew() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0),))
        await node.settle()
        await node.kill()
        node.nvml.reboot("boot-2")
        for gpu in node.nvml.gpus.values():
            gpu.failure = FailureKind.NO_PERMISSION
        node.start()
        await node.until(lambda: node.api.status.boot_id == "boot-2")
        assert not node.api.status.capped
        assert (await StartGate(node.agent).ask("uid-a")).reason == "NodeNotCapped"
        for gpu in node.nvml.gpus.values():
            gpu.failure = None
        node.api.renew()
        await asyncio.sleep(1)
        node.api.renew()
        await node.until(lambda: node.api.status.capped)
        assert node.limits() == [600_000] + [250_000] * 7
        assert (await StartGate(node.agent).ask("uid-a")).may_start

    story(tell)


def test_a_pod_with_a_device_that_nvml_does_not_show_may_not_start() -> None:
    async def tell(node: Node) -> None:
        node.api.grant(pods=(node.use("a", 0, 1, granted=3),))
        await node.settle()
        (pod,) = node.kubelet.pods
        node.kubelet.pods = (replace(pod, unknown=("nvidia.com/gpu GPU-x",)),)
        answer = await StartGate(node.agent).ask("uid-a")
        assert (answer.may_start, answer.reason, answer.final) == (False, "UnknownGPU", False)
        assert "GPU-x" in answer.message
        node.kubelet.pods = (pod,)
        assert (await StartGate(node.agent).ask("uid-a")).may_start

    story(tell)
