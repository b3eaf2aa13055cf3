"""What a replica need not load anew on a node: its image, and a cache of its model that can be restored there.

Told from what is in the API alone: the images that each kubelet names, and the Checkpoints of the model. The cache of a
model without a claim is gone with its pod, so of such a model only the image can be there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.controller.plan.world import GpuHost, Replica, World

_ANY_PRODUCT = ""


def image_of(text: str) -> str:
    """An image as kubelets name it: with its registry, by digest where there is one, else with its tag."""
    name, _, digest = text.partition("@")
    folder, slash, last = name.rpartition("/")
    path, _, tag = last.partition(":")
    path = folder + slash + path
    first, slash, _ = path.partition("/")
    if not slash:
        path = f"docker.io/library/{path}"
    elif not {".", ":"} & set(first) and first != "localhost":
        path = f"docker.io/{path}"
    return f"{path}@{digest}" if digest else f"{path}:{tag or 'latest'}"


def weights_of(replica: Replica) -> str:
    return f"cache of {replica.pod.metadata.namespace}/{replica.factory.metadata.name}/{replica.model.name}"


def loads(replica: Replica) -> frozenset[str]:
    """What it loads before it serves."""
    image = frozenset({image_of(replica.model.nim.image)})
    return image | {weights_of(replica)} if replica.model.checkpoint.claim else image


class AtHand:
    """What of all that these replicas load is where."""

    def __init__(self, world: World, replicas: Iterable[Replica]) -> None:
        models = {weights_of(replica): replica for replica in replicas}
        self._images = frozenset(image_of(replica.model.nim.image) for replica in models.values())
        self._restorable: dict[str, set[str]] = {}
        """By GPU product: the caches that can be restored on it."""
        for name, replica in models.items():
            for checkpoint in checkpoints_of(world, replica):
                product = checkpoint.spec.identity.gpu_product or _ANY_PRODUCT
                self._restorable.setdefault(product, set()).add(name)

    def on(self, host: GpuHost) -> frozenset[str]:
        images = host.node.status.images if host.node else ()
        there = {name for image in images for name in image.names or () if name in self._images}
        caches = self._restorable.get(host.product, set()) | self._restorable.get(_ANY_PRODUCT, set())
        return frozenset(there | caches)


def checkpoints_of(world: World, replica: Replica) -> Iterator[Checkpoint]:
    """The good ones that lie where its pods can read them: in the claim that it mounts now."""
    for checkpoint in world.snapshot.checkpoints.values():
        spec = checkpoint.spec
        if checkpoint.metadata.namespace != replica.pod.metadata.namespace:
            continue
        if (spec.factory, spec.model) != (replica.factory.metadata.name, replica.model.name):
            continue
        if checkpoint.status.phase in {"Corrupt", "Failed"} or not spec.location.claim:
            continue
        if spec.location.claim == replica.model.checkpoint.claim:
            yield checkpoint
