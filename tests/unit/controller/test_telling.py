"""What people are told, and when it is worth a write."""

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api import names
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.plan.status import steady
from tokenfactory.kube.objects import Pod


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("8001", "7998", "8001"),
        ("6.255kW", "6.1kW", "6.255kW"),
        ("6.255kW", "5.2kW", "5.2kW"),
        ("999W", "1.001kW", "1.001kW"),
        ("", "12", "12"),
        ("12", "", ""),
        ("0", "0", "0"),
        ("0", "3", "3"),
        ("1.29 tokens/J of 3.5", "1.31 tokens/J of 3.5", "1.29 tokens/J of 3.5"),
        ("1.29 tokens/J of 3.5", "1.29 tokens/J of 4.5", "1.29 tokens/J of 4.5"),
        ("slow: 90ms", "fast: 90ms", "fast: 90ms"),
    ],
)
def test_a_measured_figure_is_told_again_only_when_it_has_moved(before: str, after: str, told: str):
    assert steady(before, after) == told


def test_what_is_told_of_a_model_looks_at_its_own_classes_only(monkeypatch: pytest.MonkeyPatch):
    """Twice the models take about twice as long to tell of, not four times."""

    def parsed(count: int) -> int:
        """How often the owner of a class is asked for, in a plan of a site with so many models at work."""
        models = [model(f"m{number}", gpusPerReplica=1, replicas=(1, 1)) for number in range(count)]
        world = SmallWorld.of(2, hall("40kW"), factory(*models))
        world.settle()
        assert len(world.ready_pods()) == count
        asked: list[str] = []
        owner_of = names.class_owner

        def counted(name: str) -> tuple[str, str, str] | None:
            asked.append(name)
            return owner_of(name)

        with monkeypatch.context() as patched:
            patched.setattr(names, "class_owner", counted)
            world.plan()
        return len(asked)

    assert parsed(16) < 2.5 * parsed(8)


def updated(world: SmallWorld) -> tuple[str, str]:
    """What the factory says of its rollout."""
    status = world.objects[TokenFactory]["inference", "chat"].status
    found = next(each for each in status.conditions if each.type == "Updated")
    return found.status, found.message


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_rollout_is_over_once_no_pod_of_an_earlier_spec_serves(nodes: int):
    """Whoever waits for the condition must not be told so by what was true before the new spec was seen."""

    def wanted(tag: str, replicas: int) -> Manifest:
        spans = nodes if nodes > 1 else None
        return factory(model("m", tag=tag, gpus=8, nodesPerReplica=spans, replicas=(replicas, replicas)))

    world = SmallWorld.of(4, hall("40kW"), wanted("1.8.0", 2))
    world.has_groups = True
    world.settle()
    assert updated(world) == ("True", "every pod is of the spec as it is")
    world.apply(wanted("1.8.0", 1))
    world.operate()
    assert updated(world)[0] == "True", "another number of replicas is no rollout"
    world.settle()
    world.apply(wanted("1.9.0", 1))
    world.operate()
    assert updated(world) == ("False", f"m: {nodes} of {nodes} pods are of an earlier spec")
    world.settle()
    assert updated(world) == ("True", "every pod is of the spec as it is")


def test_a_model_under_another_name_is_a_rollout_too():
    world = SmallWorld.of(2, hall("40kW"), factory(model("m", replicas=(2, 2)), model("kept")))
    world.settle()
    world.apply(factory(model("n", replicas=(2, 2)), model("kept")))
    world.operate()
    assert updated(world) == ("False", "m: 2 pods are of a model that is no longer asked for")
    world.settle()
    assert updated(world)[0] == "True"


def test_where_groups_cannot_be_had_the_pods_of_the_earlier_spec_are_still_there():
    world = SmallWorld.of(2, hall("40kW"), factory(model("m", gpus=8)))
    world.settle()
    world.apply(factory(model("m", gpus=8, nodesPerReplica=2)))
    world.operate()
    assert updated(world) == ("False", "m: 1 of 1 pods are of an earlier spec")


def test_pods_that_were_made_before_there_was_a_mark_are_of_an_earlier_spec():
    world = SmallWorld.of(1, hall("40kW"), factory(model("m")))
    world.settle()
    (pod,) = world.objects[Pod].values()
    world.put(msgspec.structs.replace(pod, metadata=msgspec.structs.replace(pod.metadata, annotations={})))
    world.operate()
    assert updated(world) == ("False", "m: 1 of 1 pods are of an earlier spec")
