"""Kopf: the shell around the controller, not its brain.

It watches what people write, owns start and stop, and answers liveness. Its handlers do nothing but hand each event
to a store in the controller's own event loop. Kopf runs in a thread with a loop of its own, because at its exit it
cancels every other task of the loop it runs in. It keeps nothing in the objects: no finalizer, no annotation.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, TypeVar

import kopf
import msgspec

from tokenfactory.api.checkpoint import Checkpoint
from tokenfactory.api.meta import GROUP, VERSION, Resource
from tokenfactory.api.power_domain import PowerDomain
from tokenfactory.api.power_profile import PowerProfile
from tokenfactory.api.token_factory import TokenFactory
from tokenfactory.controller.store import Store

log = logging.getLogger(__name__)

T = TypeVar("T", bound=Resource)
WATCHED: Final[tuple[type[Resource], ...]] = (TokenFactory, PowerDomain, PowerProfile, Checkpoint)


class KopfShell:
    """Kopf's operator in its own thread, feeding stores that live in `loop`."""

    def __init__(
        self,
        stores: dict[type[Resource], Store[Any]],
        loop: asyncio.AbstractEventLoop,
        *,
        liveness: Callable[[], str],
        liveness_endpoint: str | None,
        on_end: Callable[[], None],
    ) -> None:
        self._stores = stores
        self._loop = loop
        self._liveness = liveness
        self._endpoint = liveness_endpoint
        self._on_end = on_end
        self.ended = False
        self._stop = threading.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kopf", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        self._stop.set()
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            kopf.run(
                registry=self._registry(),
                settings=self._settings(),
                clusterwide=True,
                standalone=True,
                liveness_endpoint=self._endpoint,
                ready_flag=self._ready,
                stop_flag=self._stop,
            )
        except Exception:
            log.exception("kopf ended")
        finally:
            # Crash-only: without its shell the controller is deaf to people, so the process ends and starts anew.
            self.ended = True
            self._loop.call_soon_threadsafe(self._on_end)

    def _settings(self) -> kopf.OperatorSettings:
        settings = kopf.OperatorSettings()
        settings.posting.enabled = False
        settings.queueing.batch_window = 0.0  # a lowered limit must not wait to be joined by other events
        settings.persistence.finalizer = f"{GROUP}/unused"
        settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=GROUP)
        settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=GROUP)
        settings.watching.server_timeout = 300
        settings.watching.client_timeout = 330
        settings.networking.request_timeout = 30
        return settings

    def _registry(self) -> kopf.OperatorRegistry:
        registry = kopf.OperatorRegistry()
        for kind in WATCHED:
            kopf.on.event(GROUP, VERSION, kind.PLURAL, registry=registry)(self._handler(kind))
        kopf.on.probe(id="progress", registry=registry)(self._probe)
        kopf.on.login(registry=registry)(_login)
        return registry

    def _probe(self, **_: Any) -> str:
        """Raises when nothing has moved for too long: the probe then fails, and the pod is started anew."""
        return self._liveness()

    def _handler(self, kind: type[T]) -> Callable[..., Any]:
        store: Store[T] = self._stores[kind]

        async def feed(type: str | None, body: kopf.Body, **_: Any) -> None:  # noqa: A002 - Kopf's name
            raw = dict(body)
            meta = raw.get("metadata", {})
            key = (meta.get("namespace") or "", meta.get("name", ""))
            if type == "DELETED":
                version = int(meta.get("resourceVersion") or 0)
                self._loop.call_soon_threadsafe(store.delete, key, meta.get("uid", ""), version)
                return
            self._loop.call_soon_threadsafe(_take_in, store, kind, key, raw)

        return feed


def _take_in(store: Store[T], kind: type[T], key: tuple[str, str], raw: dict[str, Any]) -> None:
    """In the controller's own thread: msgspec learns a type when it first meets it, and two threads at once crash it."""
    try:
        obj = msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        store.broken(key, str(error), raw.get("metadata", {}).get("uid", ""))
        return
    store.put(obj)


def _login(**kwargs: Any) -> kopf.ConnectionInfo | None:
    """As the pod that we run in, else from the user's kubeconfig."""
    in_pod = kopf.login_with_service_account(**kwargs)
    host, port = (
        os.environ.get("KUBERNETES_SERVICE_HOST", ""),
        os.environ.get("KUBERNETES_SERVICE_PORT", "443"),
    )
    if in_pod and host:
        # Kopf would ask the cluster's DNS for the API server. What hands out watts must start before anything
        # that needs some: the kubelet has told the address.
        return replace(in_pod, server=f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}")
    return in_pod or kopf.login_with_kubeconfig(**kwargs)
