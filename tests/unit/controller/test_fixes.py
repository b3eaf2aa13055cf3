"""When a target is missed, the condition names what would help most, from what was measured here."""

from datetime import timedelta

import msgspec
import pytest
from tests.unit.controller.manifests import domain, factory, hall, model, rack
from tests.unit.controller.small_world import H100, SmallWorld

from tokenfactory.api.gpu_node import GPUNode, PodMeter
from tokenfactory.api.meta import Condition
from tokenfactory.api.token_factory import TokenFactory

H200 = "NVIDIA H200"


class Site:
    """Two replicas on two nodes, one of another product; agents say what a test wants them to have counted."""

    def __init__(self, target: str, *, scope: str = "GPU", least: int = 2, nested: bool = False) -> None:
        unmeasured = model(nim={"image": "nvcr.io/nim/example/unmeasured:1.8.0"}, gpus=8, replicas=(least, 2))
        wanted = {"tokensPerJoule": target, "scope": scope}
        chat = factory(unmeasured, efficiency=wanted)
        self.world = SmallWorld.of(2, hall("60kW", fixedLoad="6kW"), chat)
        if nested:
            self.world = SmallWorld.of(2)
            self.world.add_node("n9", rack="a")
            site = domain("site", "200kW", fixedLoad="12kW")
            row = rack("a", "45kW", fixedLoad="20kW")
            self.world.apply(site, hall("60kW", parent="site", fixedLoad="6kW"), row, chat)
        self.world.settle()
        node = self.world.objects[GPUNode]["", "n1"]
        gpus = tuple(
            msgspec.structs.replace(gpu, product=H200, class_name=gpu.class_name.replace(H100, H200))
            for gpu in node.status.gpus
        )
        self.world.put(msgspec.structs.replace(node, status=msgspec.structs.replace(node.status, gpus=gpus)))

    def count(self, minute: int, joules: dict[str, int], tokens: int = 10_000, running: int = 64) -> None:
        """One minute more of the counters: `tokens` per replica, and joules by node."""
        for pod in self.world.ready_pods():
            node = self.world.objects[GPUNode]["", pod.spec.node_name]
            meter = PodMeter(
                pod=pod.metadata.name,
                uid=pod.metadata.uid or "",
                since="a",
                generated_tokens=minute * tokens,
                millijoules=minute * joules[pod.spec.node_name] * 1000,
                running=running,
                tokens_per_kilosecond=tokens * 1000 // 60,
            )
            status = msgspec.structs.replace(node.status, meters=(meter,))
            self.world.put(msgspec.structs.replace(node, status=status))

    def verdict(self, joules: dict[str, int], **counted: int) -> Condition:
        for minute in range(1, 4):
            self.world.now += timedelta(seconds=61)
            for agent in self.world.agents.values():
                agent.heard_at = self.world.now
            self.count(minute, joules, **counted)
            self.world.operate()
        factory = self.world.objects[TokenFactory]["inference", "chat"]
        return next(each for each in factory.status.conditions if each.type == "EfficiencyMet")


def test_met_when_measured_at_its_scope():
    verdict = Site("0.3").verdict({"n0": 30_000, "n1": 30_000})
    assert (verdict.status, verdict.reason) == ("True", "TargetMet")
    assert "(GPU)" in verdict.message


@pytest.mark.parametrize(("scope", "measured"), [("GPU", "0.33"), ("Node", "0.28"), ("Facility", "0.18")])
def test_a_wider_scope_counts_more_joules(scope: str, measured: str):
    """Two nodes of 1 kW beside their GPUs, and 6 kW of the hall's fixed load."""
    verdict = Site("0.9", scope=scope).verdict({"n0": 300_000, "n1": 300_000}, tokens=100_000)
    assert verdict.status == "False"
    assert verdict.message.startswith(f"{measured} tokens/J of 0.9 ({scope})"), verdict.message


def test_tokens_made_on_a_worse_product_are_named():
    verdict = Site("0.9").verdict({"n0": 60_000, "n1": 15_000})
    assert verdict.reason == "WorseProduct"
    assert f"{H200} makes 0.67" in verdict.message


def test_more_replicas_than_the_traffic_needs_are_named():
    verdict = Site("0.9").verdict({"n0": 30_000, "n1": 30_000}, tokens=0)
    assert verdict.reason in {"NoTraffic", "NotMeasured"}, verdict.message


def test_the_other_load_of_every_domain_above_a_node_counts_and_that_of_no_other():
    """Three nodes share the site's 12 kW and the hall's 6 kW; the 20 kW of the third one's row are not theirs."""
    site = Site("0.9", scope="Facility", nested=True)
    verdict = site.verdict({"n0": 300_000, "n1": 300_000}, tokens=100_000)
    # 600 kJ of GPUs, and in 61 s 2 kW of nodes, 4 kW of the hall and 8 kW of the site: 854 kJ.
    assert verdict.message.startswith("0.14 tokens/J of 0.9 (Facility)"), verdict.message
