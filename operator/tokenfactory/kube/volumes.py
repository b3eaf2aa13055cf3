"""Claims and the volumes behind them: which nodes reach what a pod wants to mount."""

from __future__ import annotations

from typing import ClassVar

from tokenfactory.api.meta import Api, Resource
from tokenfactory.kube.constraints import Required


class ClaimSpec(Api, frozen=True, kw_only=True, gc=False):
    volume_name: str = ""
    access_modes: tuple[str, ...] = ()


class PersistentVolumeClaim(Resource, frozen=True, kw_only=True, gc=False):
    KIND: ClassVar[str] = "PersistentVolumeClaim"
    PLURAL: ClassVar[str] = "persistentvolumeclaims"
    SHORT: ClassVar[str] = "pvc"
    NAMESPACED: ClassVar[bool] = True

    api_version: str = "v1"
    spec: ClaimSpec = ClaimSpec()


class VolumeSpec(Api, frozen=True, kw_only=True, gc=False):
    node_affinity: Required = Required()
    """Empty: every node reaches it."""


class PersistentVolume(Resource, frozen=True, kw_only=True, gc=False):
    KIND: ClassVar[str] = "PersistentVolume"
    PLURAL: ClassVar[str] = "persistentvolumes"
    SHORT: ClassVar[str] = "pv"
    NAMESPACED: ClassVar[bool] = False

    api_version: str = "v1"
    spec: VolumeSpec = VolumeSpec()
