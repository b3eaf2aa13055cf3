"""What a kubelet that has just started does not say yet.

It opens its PodResources socket before it has heard from the API server which pods are its own, and until then it
lists none, while their containers run on. Taken at its word it would have every model on the node throttled, and a
stranger's GPUs capped, at each restart of a kubelet.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from tokenfactory.agent.parts import PodDevices

log = logging.getLogger(__name__)

SETTLE_SECONDS: Final = 15.0
"""A kubelet has its pods within a second or two of its start; longer, and it may have none."""


class KubeletMemory:
    """Keeps what the kubelet before this one listed, until this one has had time to list it too."""

    def __init__(
        self,
        socket: Path,
        now: Callable[[], float] = time.monotonic,
        settle_seconds: float = SETTLE_SECONDS,
    ) -> None:
        self._socket = socket
        self._now = now
        self._settle_seconds = settle_seconds
        self._kubelet: tuple[int, int, int] | None = None
        self._settled_at = 0.0
        self._listed: tuple[PodDevices, ...] = ()

    def complete(self, listed: tuple[PodDevices, ...]) -> tuple[PodDevices, ...]:
        """Call it with each answer. A GPU that is now another pod's is not kept for the one before."""
        kubelet = self._identity()  # after the answer: a restart in between then counts as one
        if kubelet != self._kubelet:
            if self._listed:
                self._settled_at = self._now() + self._settle_seconds
                log.info("the kubelet has restarted; pods that it does not list yet keep their GPUs")
            self._kubelet = kubelet
        if self._now() < self._settled_at:
            listed += self._missing(listed)
        self._listed = listed
        return listed

    def _missing(self, listed: tuple[PodDevices, ...]) -> tuple[PodDevices, ...]:
        known = {pod.key for pod in listed}
        given = {gpu for pod in listed for gpu in pod.gpus}
        kept = (
            PodDevices(pod.namespace, pod.name, tuple(gpu for gpu in pod.gpus if gpu not in given))
            for pod in self._listed
            if pod.key not in known
        )
        return tuple(pod for pod in kept if pod.gpus)

    def _identity(self) -> tuple[int, int, int] | None:
        """Every kubelet makes the socket anew."""
        try:
            found = self._socket.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_ctime_ns
