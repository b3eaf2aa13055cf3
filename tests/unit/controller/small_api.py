"""The API server of a cluster in memory: the objects, their versions, and what people apply and delete."""

from datetime import UTC, datetime
from typing import Any

import msgspec
import yaml
from tests.unit.controller.manifests import Manifest

from tokenfactory.api import names
from tokenfactory.api.cap_sheet import CapSheet
from tokenfactory.api.gpu_node import GPUNode
from tokenfactory.api.meta import ObjectMeta
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.objects import Deployment, LeaderWorkerSet, Service
from tokenfactory.kube.objects import Namespace, Node, Pod
from tokenfactory.kube.volumes import PersistentVolume, PersistentVolumeClaim

START = datetime(2026, 11, 21, 12, 0, tzinfo=UTC)
KINDS = (
    PowerDomain,
    PowerProfile,
    TokenFactory,
    CapSheet,
    GPUNode,
    Node,
    Pod,
    Deployment,
    LeaderWorkerSet,
    Service,
    Namespace,
    PersistentVolumeClaim,
    PersistentVolume,
)
APPLIED = {kind.KIND: kind for kind in (PowerDomain, PowerProfile, TokenFactory)}


class SmallApi:
    def __init__(self) -> None:
        self.now = START
        self.version = 0
        self.objects: dict[type, dict[tuple[str, str], Any]] = {kind: {} for kind in KINDS}

    def apply(self, *manifests: Manifest | str) -> None:
        """Objects as `manifests` builds them, or YAML as a person writes it."""
        texts = [each for each in manifests if isinstance(each, str)]
        built = [each for each in manifests if not isinstance(each, str)]
        for raw in (*built, *(each for text in texts for each in yaml.safe_load_all(text))):
            kind = APPLIED[raw["kind"]]
            obj = msgspec.convert(raw, kind)
            held = self.objects[kind].get(key_of(obj))
            uid = held.metadata.uid if held else f"uid-{obj.metadata.name}-{self.version + 1}"
            obj = msgspec.structs.replace(obj, metadata=msgspec.structs.replace(obj.metadata, uid=uid))
            if held is not None:
                obj = msgspec.structs.replace(obj, status=held.status)
            self.put(obj, new_generation=True)

    def label_namespace(self, name: str, **labels: str) -> None:
        self.put(Namespace(metadata=ObjectMeta(name=name, labels=labels)))

    def claim(
        self, name: str = "model-cache", modes: tuple[str, ...] = ("ReadWriteMany",), node: str = ""
    ) -> None:
        """A claim, bound to a volume that every node reaches, or only this one."""
        said = {"volumeName": f"pv-{name}", "accessModes": modes}
        held = {"metadata": {"name": name, "namespace": "inference"}, "spec": said}
        terms = [{"matchExpressions": [{"key": names.HOSTNAME_LABEL, "operator": "In", "values": [node]}]}]
        reach = {"nodeAffinity": {"required": {"nodeSelectorTerms": terms}}} if node else {}
        self.put(msgspec.convert(held, PersistentVolumeClaim))
        self.put(msgspec.convert({"metadata": {"name": f"pv-{name}"}, "spec": reach}, PersistentVolume))

    def delete_factory(self, namespace: str, name: str) -> None:
        """And what the garbage collector takes with it."""
        gone = self.objects[TokenFactory].pop((namespace, name))
        for kind in (Deployment, LeaderWorkerSet, Service):
            for key, held in list(self.objects[kind].items()):
                if any(owner.uid == gone.metadata.uid for owner in held.metadata.owner_references):
                    del self.objects[kind][key]

    def put(self, obj: Any, *, new_generation: bool = False) -> Any:
        self.version += 1
        meta = msgspec.structs.replace(
            obj.metadata,
            resource_version=str(self.version),
            generation=obj.metadata.generation + 1 if new_generation else obj.metadata.generation,
            creation_timestamp=obj.metadata.creation_timestamp or self.stamp(),
        )
        obj = msgspec.structs.replace(obj, metadata=meta)
        self.objects[type(obj)][key_of(obj)] = obj
        return obj

    def stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")

    @property
    def milliseconds(self) -> int:
        """What has passed since the beginning."""
        return int((self.now - START).total_seconds() * 1000)


def key_of(obj: Any) -> tuple[str, str]:
    return (obj.metadata.namespace or "", obj.metadata.name)
