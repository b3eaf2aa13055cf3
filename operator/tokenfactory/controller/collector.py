"""What the pods have saved becomes Checkpoint objects.

The sidecar of a serving pod has no access to the API; it answers over HTTP what it saved last. Only what stands in a
Checkpoint object is ever restored, so a pod cannot offer another pod anything without the operator's record.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime

import aiohttp
import msgspec

from tokenfactory.api import names
from tokenfactory.api.checkpoint import Checkpoint, CheckpointSpec, CheckpointStatus, Identity, Location
from tokenfactory.api.meta import OwnerReference
from tokenfactory.api.token_factory import ModelSpec, TokenFactory
from tokenfactory.checkpoints.keeper import Saved
from tokenfactory.controller.observer import Observer
from tokenfactory.kube.apply import Writer, Written
from tokenfactory.kube.errors import ApiError, UnreachableError
from tokenfactory.kube.objects import Pod
from tokenfactory.kube.times import rfc3339

log = logging.getLogger(__name__)
_LARGEST_ANSWER = 65_536
_FIRST_SECONDS = 2.0
_AGAIN_SECONDS = 60.0


class CheckpointCollector:
    """Asks each serving pod: soon until it has saved something, then once a minute."""

    def __init__(self, observer: Observer, writer: Writer) -> None:
        self._observer = observer
        self._writer = writer
        self._due: dict[str, float] = {}

    async def run(self) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3)) as session:
            while True:
                factories = self._observer.stores[TokenFactory].snapshot()
                now = time.monotonic()
                alive = set()
                for pod in self._observer.pods:
                    factory = factories.get(
                        (pod.metadata.namespace or "", pod.metadata.labels.get(names.FACTORY_LABEL, ""))
                    )
                    model = _model(factory, pod)
                    if factory is None or model is None or model.checkpoint.claim is None or not _serves(pod):
                        continue
                    uid = pod.metadata.uid or ""
                    alive.add(uid)
                    if self._due.get(uid, 0.0) <= now:
                        done = await self._ask(session, pod, factory, model)
                        self._due[uid] = now + (_AGAIN_SECONDS if done else _FIRST_SECONDS)
                self._due = {uid: due for uid, due in self._due.items() if uid in alive}
                await asyncio.sleep(1)

    async def _ask(
        self, session: aiohttp.ClientSession, pod: Pod, factory: TokenFactory, model: ModelSpec
    ) -> bool:
        url = f"http://{pod.status.pod_ip}:{names.CHECKPOINT_PORT}/checkpoint"
        try:
            async with session.get(url, allow_redirects=False) as answer:
                if answer.status != 200:
                    return False
                saved = msgspec.json.decode(await answer.content.read(_LARGEST_ANSWER), type=Saved)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError, OSError):
            return False
        try:
            return await self._record(saved, pod, factory, model)
        except (ApiError, UnreachableError) as error:
            log.warning("checkpoint not recorded", extra={"pod": pod.metadata.name, "error": str(error)})
            return False

    async def _record(self, saved: Saved, pod: Pod, factory: TokenFactory, model: ModelSpec) -> bool:
        short = saved.digest.removeprefix("sha256:")[:16]
        key = (factory.metadata.namespace or "", f"{factory.metadata.name}-{model.name}-{short}")
        held = self._observer.stores[Checkpoint].snapshot().get(key)
        if held is None:
            answer = await self._writer.apply(
                Checkpoint, key, {"spec": self._spec(saved, pod, factory, model)}, owners=(_owner(factory),)
            )
            if not isinstance(answer, Written):
                return False
            held = answer.object
        elif held.status.phase:
            return True
        # Also of one that an operator recorded that died before it said so: nothing is restored from it until then.
        now = rfc3339(datetime.now(UTC))
        await self._writer.status(held, CheckpointStatus(phase="Ready", captured_at=now))
        log.info("checkpoint recorded", extra={"checkpoint": key[1], "bytes": saved.size_bytes})
        return True

    def _spec(self, saved: Saved, pod: Pod, factory: TokenFactory, model: ModelSpec) -> CheckpointSpec:
        host = self._observer.gpu_nodes.get(pod.spec.node_name)
        gpus = host.status.gpus if host else ()
        return CheckpointSpec(
            factory=factory.metadata.name,
            model=model.name,
            strategy="WarmCache",  # How it was saved, whatever was asked for.
            identity=Identity(
                model=saved.identity.get("image", ""),
                gpu_product=gpus[0].product if gpus else "",
                gpu_count=model.gpus_per_replica,
            ),
            location=Location(claim=model.checkpoint.claim or "", path=saved.path),
            digest=saved.digest,
            size_bytes=saved.size_bytes,
        )


def _owner(factory: TokenFactory) -> OwnerReference:
    return OwnerReference(
        api_version=factory.api_version,
        kind=TokenFactory.KIND,
        name=factory.metadata.name,
        uid=factory.metadata.uid or "",
    )


def _model(factory: TokenFactory | None, pod: Pod) -> ModelSpec | None:
    if factory is None:
        return None
    wanted = pod.metadata.labels.get(names.MODEL_LABEL)
    return next((model for model in factory.spec.models if model.name == wanted), None)


def _serves(pod: Pod) -> bool:
    ready = any(
        condition.type == "Ready" and condition.status == "True" for condition in pod.status.conditions
    )
    return ready and bool(pod.status.pod_ip) and pod.metadata.deletion_timestamp is None
