"""Rules between pods, where there are many pods: a claim that waits is not tried against each of them."""

from collections import Counter

import msgspec
import pytest
from tests.unit.controller.small_world import OPTIONS, SmallWorld

from tokenfactory.controller.plan import beside as module
from tokenfactory.controller.plan.beside import beside
from tokenfactory.controller.plan.world import see
from tokenfactory.kube.objects import Pod


def mounting(name: str, *claims: str) -> Pod:
    volumes = [
        {"name": f"v{n}", "persistentVolumeClaim": {"claimName": claim}} for n, claim in enumerate(claims)
    ]
    meta = {"name": name, "namespace": "inference", "uid": f"uid-{name}"}
    return msgspec.convert({"metadata": meta, "spec": {"volumes": volumes}}, Pod)


def test_each_pod_that_stands_is_looked_at_once_however_many_claims_wait(monkeypatch: pytest.MonkeyPatch):
    world = SmallWorld.of(3)
    for number in range(8):
        world.claim(f"c{number}", ("ReadWriteOnce",))
    waiting = [mounting(f"w{number}", f"c{number}") for number in range(8)]
    standing = [
        (mounting("a", "c0", "c0"), "n0"),
        (mounting("b", "c1"), "n1"),
        (mounting("c", "c1", "c2"), "n2"),
        *((mounting(f"other-{number}", f"x{number}"), "n0") for number in range(50)),
    ]
    asked: Counter[str] = Counter()
    names_of = module.claim_names

    def counted(pod: Pod) -> list[str]:
        asked[pod.metadata.name] += 1
        return names_of(pod)

    monkeypatch.setattr(module, "claim_names", counted)
    found = beside(see(world.snapshot(), OPTIONS.workloads), waiting, standing)
    assert {rule.mark.rpartition("/")[2]: nodes for rule, nodes in found.standing.items() if nodes} == {
        "c0": {"n0": 1},
        "c1": {"n1": 1, "n2": 1},
        "c2": {"n2": 1},
    }
    assert {asked[pod.metadata.name] for pod, _ in standing} == {1}
