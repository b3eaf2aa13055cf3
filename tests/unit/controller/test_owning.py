"""Whose a Deployment or Service is: what is written, taken up again, deleted, and never touched."""

from typing import Any

import msgspec
import pytest
from tests.unit.controller.manifests import Manifest, factory, hall, model
from tests.unit.controller.small_world import SmallWorld

from tokenfactory.api.meta import ObjectMeta, OwnerReference
from tokenfactory.api.names import FACTORY_LABEL, MODEL_LABEL
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller import actions as act
from tokenfactory.controller.actor import Actor
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.controller.owning import whose
from tokenfactory.controller.workloads import SPEC_LABEL, WorkloadOptions, deployment
from tokenfactory.kube.apply import Written
from tokenfactory.kube.errors import NotFoundError, Status

KEY = ("inference", "chat-llama")


def site(*factories: Manifest) -> SmallWorld:
    return SmallWorld.of(4, hall("60kW"), *(factories or (factory(model()),)))


def change(world: SmallWorld, kind: type, **meta: Any) -> None:
    held = world.objects[kind][KEY]
    world.put(msgspec.structs.replace(held, metadata=msgspec.structs.replace(held.metadata, **meta)))


def ready_of(world: SmallWorld, name: str = "chat") -> tuple[str, str, str]:
    status = world.objects[TokenFactory]["inference", name].status
    one = {each.type: each for each in status.conditions}["Ready"]
    return one.status, one.reason, one.message


def test_of_two_models_that_would_be_called_alike_the_older_factorys_runs_and_the_other_says_so():
    older, younger = factory(model("v2-llama")), factory(model(), name="chat-v2")
    world = site(older)
    world.others()
    world.apply(younger)
    world.settle()
    assert ready_of(world)[:2] == ("True", "AllReady")
    status, reason, message = ready_of(world, "chat-v2")
    assert (status, reason) == ("False", "NameTaken")
    assert "chat-v2-llama" in message
    assert "TokenFactory chat " in message
    assert "another name" in message
    (waits,) = world.objects[TokenFactory]["inference", "chat-v2"].status.waiting
    assert (waits.what, waits.reason) == ("llama", "NameTaken")
    assert len(world.ready_pods()) == 1
    world.delete_factory("inference", "chat")
    world.settle()
    assert ready_of(world, "chat-v2")[:2] == ("True", "AllReady")


def test_a_model_that_runs_keeps_its_name_when_an_older_factory_comes_to_want_it():
    world = site(factory(model("small")), factory(model(), name="chat-v2"))
    world.settle()
    before = world.objects[Deployment]["inference", "chat-v2-llama"]
    world.apply(factory(model("small"), model("v2-llama")))
    world.settle()
    assert world.objects[Deployment]["inference", "chat-v2-llama"] == before
    assert ready_of(world)[1] == "NameTaken"
    assert ready_of(world, "chat-v2")[1] == "AllReady"


def test_a_service_is_given_up_by_the_model_that_does_not_run_under_its_name():
    """As two that fought left it: the Deployment is one's, the Service the other's."""
    world = site(factory(model("v2-llama")))
    world.settle()
    world.apply(factory(model(), name="chat-v2"))
    held = world.objects[Service]["inference", "chat-v2-llama"]
    other = OwnerReference(
        kind="TokenFactory",
        name="chat-v2",
        uid=world.objects[TokenFactory]["inference", "chat-v2"].metadata.uid or "",
        controller=True,
    )
    labels = {**held.metadata.labels, FACTORY_LABEL: "chat-v2", MODEL_LABEL: "llama"}
    meta = msgspec.structs.replace(held.metadata, owner_references=(other,), labels=labels)
    world.put(msgspec.structs.replace(held, metadata=meta))
    world.settle()
    mine = world.objects[Service]["inference", "chat-v2-llama"].metadata
    assert [owner.name for owner in mine.owner_references] == ["chat"]
    assert ready_of(world)[1] == "AllReady"


def test_the_service_of_a_groups_pods_is_no_models_name():
    """The controller of LeaderWorkerSets makes one, called like the group."""
    world = SmallWorld.of(4, hall("60kW"))
    world.has_groups = True
    world.apply(factory(model(nodesPerReplica=2)), factory(model("llama-group"), name="chat"))
    world.apply(factory(model(nodesPerReplica=2), model("llama-group")))
    world.rounds(10)
    assert set(world.objects[LeaderWorkerSet]) == {("inference", "chat-llama-group")}
    assert ("inference", "chat-llama-group") not in world.objects[Service]
    assert ready_of(world)[1] == "NameTaken"


@pytest.mark.parametrize("kind", [Deployment, Service])
@pytest.mark.parametrize("labels", [{}, {FACTORY_LABEL: "chat", MODEL_LABEL: "llama"}])
def test_somebodys_own_object_of_that_name_is_never_touched(kind: type, labels: dict[str, str]):
    world = SmallWorld.of(4, hall("60kW"))
    theirs = world.put(
        kind(metadata=ObjectMeta(namespace=KEY[0], name=KEY[1], uid="theirs", labels=labels))
        if kind is Service
        else kind(
            metadata=ObjectMeta(namespace=KEY[0], name=KEY[1], uid="theirs", labels=labels),
            spec={"replicas": 0, "template": {"metadata": {"labels": {"app": "theirs"}}}},
        )
    )
    world.apply(factory(model()))
    world.rounds(20)
    assert world.objects[kind][KEY] == theirs
    status, reason, message = ready_of(world)
    assert (status, reason) == ("False", "NameTaken")
    assert f"{kind.KIND} chat-llama" in message
    assert "rename or delete it" in message
    assert any(each == ("NameTaken", f"Ready is False: {message}") for each in world.events)
    world.apply(factory(model("other")))
    world.rounds(20)
    world.delete_factory("inference", "chat")
    world.rounds(20)
    assert world.objects[kind][KEY] == theirs

    world.apply(factory(model()))
    world.rounds(20)
    del world.objects[kind][KEY]
    world.rounds(20)
    assert ready_of(world)[1] == "AllReady", "it is tried again"


def test_a_taken_name_costs_a_look_every_half_minute_and_no_more():
    world = SmallWorld.of(1, hall("60kW"))
    world.put(Service(metadata=ObjectMeta(namespace=KEY[0], name=KEY[1], uid="theirs")))
    world.apply(factory(model()))
    world.rounds(20)
    before = len(world.writes)
    world.rounds(60)
    assert len(world.writes) - before <= 5, "in two minutes"


@pytest.mark.parametrize("how", ["the reference is taken off", "the factory is deleted without its objects"])
def test_an_object_that_was_left_is_taken_up_again_and_goes_with_its_model(how: str):
    world = site()
    world.settle()
    before = {pod.metadata.uid for pod in world.ready_pods()}
    for kind in (Deployment, Service):
        change(world, kind, owner_references=())
    if how != "the reference is taken off":
        world.delete_factory("inference", "chat")
        assert KEY in world.objects[Deployment]
        world.apply(factory(model()))
    world.settle()
    uid = world.objects[TokenFactory]["inference", "chat"].metadata.uid
    for kind in (Deployment, Service):
        assert [owner.uid for owner in world.objects[kind][KEY].metadata.owner_references] == [uid]
    assert {pod.metadata.uid for pod in world.ready_pods()} == before, "what runs goes on"
    world.apply(factory(model("other")))
    world.settle()
    assert {key[1] for key in world.objects[Deployment]} == {"chat-other"}
    assert {pod.metadata.labels[MODEL_LABEL] for pod in world.ready_pods()} == {"other"}


def test_what_was_left_of_a_model_that_is_not_asked_for_any_more_goes():
    world = site()
    world.settle()
    change(world, Deployment, owner_references=())
    world.delete_factory("inference", "chat")
    world.apply(factory(model("other")))
    world.settle()
    assert {key[1] for key in world.objects[Deployment]} == {"chat-other"}


def test_nothing_is_deleted_of_a_factory_that_is_being_deleted():
    """The garbage collector takes it, or leaves it, as the person has said."""
    world = site()
    world.settle()
    held = world.objects[TokenFactory]["inference", "chat"]
    going = msgspec.structs.replace(held.metadata, deletion_timestamp=world.stamp())
    world.put(msgspec.structs.replace(held, metadata=going))
    world.rounds(5)
    assert not [each for each in world.writes if isinstance(each, act.DeleteWorkload)]


OURS = {FACTORY_LABEL: "chat", MODEL_LABEL: "llama", SPEC_LABEL: "abc"}
CONTROLLED = OwnerReference(kind="Other", name="x", uid="x", controller=True)


@pytest.mark.parametrize(
    ("name", "labels", "owners", "verdict"),
    [
        ("chat-llama", OURS, (OwnerReference(uid="me", controller=True),), "Ours"),
        ("anything", {}, (OwnerReference(uid="me", controller=True),), "Ours"),
        (
            "anything",
            {},
            (OwnerReference(uid="me"),),
            "Others",
        ),  # so that a person's own is collected with ours
        ("chat-llama", OURS, (), "Left"),
        ("chat-llama", OURS, (OwnerReference(kind="Other", uid="x"),), "Left"),
        ("chat-llama-group", OURS, (), "Left"),
        ("chat-llama", OURS, (CONTROLLED,), "Others"),
        ("chat-llama-copy", OURS, (), "Others"),
        ("chat-llama", {**OURS, FACTORY_LABEL: "x"}, (), "Others"),
        ("chat-llama", {FACTORY_LABEL: "chat", MODEL_LABEL: "llama"}, (), "Others"),
        ("chat-llama", {}, (), "Others"),
    ],
)
def test_an_object_is_ours_by_its_owner_or_by_marks_that_only_we_set(name, labels, owners, verdict):
    meta = ObjectMeta(name=name, labels=labels, owner_references=owners)
    assert whose(meta, "chat", "me") == verdict


class Server:
    """An API server with one object, or none, and the last apply that came to it."""

    def __init__(self, there: dict[str, Any] | None) -> None:
        self.there = there
        self.applied: dict[str, Any] | None = None

    async def request(self, method: str, path: str, **_: Any) -> bytes:
        assert (method, path) == ("GET", "/apis/apps/v1/namespaces/inference/deployments/chat-llama")
        if self.there is None:
            raise NotFoundError("GET", Status(code=404))
        return msgspec.json.encode(self.there)

    async def apply(self, *_: Any, **how: Any) -> Written[Any]:
        self.applied = how
        return Written(None)


def deployed(held: Deployment | None = None) -> act.ApplyWorkload:
    made = msgspec.convert(
        {**factory(model()), "metadata": {"name": "chat", "namespace": "inference"}}, TokenFactory
    )
    made = msgspec.structs.replace(made, metadata=msgspec.structs.replace(made.metadata, uid="me"))
    manifest = deployment(made, made.spec.models[0], 1, WorkloadOptions(image="x"))
    return act.ApplyWorkload(Deployment, KEY, manifest, "", held)


def by(uid: str) -> list[dict[str, Any]]:
    return [{"kind": "TokenFactory", "name": "chat", "uid": uid, "controller": True}]


@pytest.mark.parametrize(
    ("there", "how"),
    [
        (None, ("", False)),
        ({"metadata": {"name": "chat-llama", "uid": "7", "ownerReferences": by("me")}}, ("7", True)),
        ({"metadata": {"name": "chat-llama", "uid": "7", "labels": OURS}}, ("7", True)),
        ({"metadata": {"name": "chat-llama", "uid": "7"}, "status": "odd"}, None),
        (
            {"metadata": {"name": "chat-llama", "uid": "7", "ownerReferences": by("old"), "labels": OURS}},
            None,
        ),
    ],
    ids=["nothing", "ours without its label", "left behind", "somebody's", "a deleted factory's"],
)
async def test_what_no_cache_holds_is_looked_at_before_it_is_written(there, how):
    """By (uid of what is written over, forced); None: not written."""
    server = Server(there)
    actor = Actor(server, None, lambda: None)  # type: ignore[arg-type]
    actor.writer = server  # type: ignore[assignment]
    assert await actor.execute([deployed()]) == (how is not None)
    taken = actor.taken.at(0)
    if how is None:
        assert server.applied is None
        assert "Deployment chat-llama is" in taken["Deployment", KEY].words
    else:
        assert server.applied is not None
        assert (server.applied["only_if"].uid, server.applied["force"]) == how
        assert not taken


async def test_what_is_held_is_written_as_that_very_object():
    server = Server(None)
    actor = Actor(server, None, lambda: None)  # type: ignore[arg-type]
    actor.writer = server  # type: ignore[assignment]
    held = Deployment(metadata=ObjectMeta(name="chat-llama", namespace="inference", uid="7"))
    assert await actor.execute([deployed(held)])
    assert server.applied is not None
    assert (server.applied["only_if"].uid, server.applied["force"]) == ("7", True)
