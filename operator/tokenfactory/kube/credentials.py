"""Where the API server is, and how we show who we are.

Tokens of service accounts live an hour and are replaced in their file; certificates are renewed in a kubeconfig.
So the source is kept, not only what it once said: it is read again every minute, and at once when the API server
says 401.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from kubernetes.aio import config as kube_config
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import ConfigException

log = logging.getLogger(__name__)

REREAD_SECONDS = 60.0
Loader = Callable[[], Awaitable[Configuration]]


def from_kubeconfig(path: Path | None = None, context: str | None = None) -> Loader:
    """A kubeconfig file: `path`, else what KUBECONFIG names, else ~/.kube/config."""

    async def load() -> Configuration:
        configuration = Configuration()
        await kube_config.load_kube_config(
            config_file=None if path is None else str(path),
            context=context,
            client_configuration=configuration,
            persist_config=False,
        )
        return configuration

    return load


def in_cluster() -> Loader:
    """The service account that Kubernetes mounts into a pod."""

    async def load() -> Configuration:
        configuration = Configuration()
        kube_config.load_incluster_config(configuration, try_refresh_token=False)
        return configuration

    return load


def default_loader(kubeconfig: Path | None = None, context: str | None = None) -> Loader:
    """What was named, else the pod's service account, else the user's kubeconfig."""
    if kubeconfig is None and context is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        return in_cluster()
    return from_kubeconfig(kubeconfig, context)


class Credentials:
    """The present answer of a loader, read again when it may have changed."""

    def __init__(
        self, load: Loader, configuration: Configuration, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._load = load
        self._clock = clock
        self._lock = asyncio.Lock()
        self._read_at = clock()
        self._take(configuration)

    def _take(self, configuration: Configuration) -> None:
        self.configuration = configuration
        self.authorization = _authorization(configuration)
        files = (configuration.ssl_ca_cert, configuration.cert_file, configuration.key_file)
        self.identity = (configuration.host, *files, *(_changed_at(file) for file in files))
        """What a TLS session is built from: when it changes, a new one is needed."""

    @classmethod
    async def read(cls, load: Loader) -> Credentials:
        return cls(load, await load())

    async def current(self) -> str | None:
        """The Authorization header to send, or None where a client certificate says who we are."""
        if self.authorization is not None and self._clock() - self._read_at >= REREAD_SECONDS:
            await self.refresh(self.authorization)
        return self.authorization

    async def refresh(self, refused: str | None) -> None:
        """Read the source again, once for all requests that were refused with the same credentials."""
        async with self._lock:
            if self.authorization != refused:
                return
            self._read_at = self._clock()
            try:
                self._take(await self._load())
            except (ConfigException, OSError) as fault:
                # The old ones may still be good, and the source may be in the middle of being replaced.
                log.warning("credentials could not be read anew: %s", fault)


def _changed_at(file: str | None) -> float:
    try:
        return Path(file).stat().st_mtime if file else 0.0
    except OSError:
        return 0.0


def _authorization(configuration: Configuration) -> str | None:
    token: str | None = configuration.api_key.get("BearerToken")
    return " ".join(token.split()) if token else None
