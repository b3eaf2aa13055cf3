"""The containers of this product in a hollow pod, run as real processes with the pod's arguments and volumes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tokenfactory.kube.times import rfc3339
from tokenfactory.twin.processes import PROGRAM, environment

Object = dict[str, Any]
_RESTARTS_BEFORE_FAILURE: Final = 50


class ContainerFailedError(Exception):
    """A pod of a hollow node cannot run."""


class Containers:
    """Init containers one after the other; those that restart always go on beside the model server."""

    def __init__(self, spec: Object, values: dict[str, str], folder: Path, claims: Path) -> None:
        self._spec = spec
        self._values = values
        self._folder = folder
        self._claims = claims
        self._sidecars: list[asyncio.subprocess.Process] = []
        self.statuses: list[Object] = []

    def volume(self, name: str) -> Path:
        """The folder that stands for a volume of the pod."""
        for volume in self._spec.get("volumes", []):
            if volume["name"] == name:
                claim = volume.get("persistentVolumeClaim", {}).get("claimName")
                path = self._claims / claim if claim else self._folder / "volumes" / name
                path.mkdir(parents=True, exist_ok=True)
                return path
        raise ContainerFailedError(f"the pod has no volume {name!r}")

    async def run_init(self) -> AsyncIterator[list[Object]]:
        """Yields the statuses each time they change."""
        for container in self._spec.get("initContainers", []):
            if container.get("restartPolicy") == "Always":
                self._sidecars.append(await self._spawn(container))
                self._note(container, {"running": {"startedAt": _now()}}, ready=True)
                yield self.statuses
                continue
            restarts = 0
            while code := await self._run(container):
                restarts += 1
                message = (
                    self._termination(container).read_text() if self._termination(container).exists() else ""
                )
                if restarts > _RESTARTS_BEFORE_FAILURE:
                    raise ContainerFailedError(
                        f"init container {container['name']} exits with {code}: {message}"
                    )
                waiting = {"waiting": {"reason": "CrashLoopBackOff", "message": message[-512:]}}
                self._note(container, waiting, ready=False, restarts=restarts)
                yield self.statuses
                await asyncio.sleep(min(0.25 * 2**restarts, 5))
            message = (
                self._termination(container).read_text() if self._termination(container).exists() else ""
            )
            done = {"exitCode": 0, "reason": "Completed", "finishedAt": _now(), "message": message[-2048:]}
            self._note(container, {"terminated": done}, ready=True, restarts=restarts)
            yield self.statuses

    async def stop(self) -> None:
        for process in self._sidecars:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        for process in self._sidecars:
            try:
                await asyncio.wait_for(process.wait(), 5)
            except TimeoutError:
                process.kill()
                await process.wait()
        self._sidecars.clear()

    async def _run(self, container: Object) -> int:
        process = await self._spawn(container)
        try:
            return await process.wait()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise

    async def _spawn(self, container: Object) -> asyncio.subprocess.Process:
        self._folder.mkdir(parents=True, exist_ok=True)
        arguments = [self._inside(container, argument) for argument in container.get("args", [])]
        with (self._folder / f"{container['name']}.log").open("ab") as output:
            return await asyncio.create_subprocess_exec(
                *PROGRAM,
                *arguments,
                env=self._env(container),
                stdout=output,
                stderr=output,
            )

    def _inside(self, container: Object, argument: str) -> str:
        """A path in the container as the folder that it stands for."""
        flag, equals, value = argument.partition("=")
        for mount in container.get("volumeMounts", []):
            if equals and (value == mount["mountPath"] or value.startswith(mount["mountPath"] + "/")):
                return f"{flag}={self.volume(mount['name'])}{value.removeprefix(mount['mountPath'])}"
        return argument

    def _env(self, container: Object) -> dict[str, str]:
        env = environment(TERMINATION_LOG=str(self._termination(container)))
        for variable in container.get("env", []):
            field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath")
            env[variable["name"]] = self._values.get(field, "") if field else variable.get("value", "")
        return env

    def _termination(self, container: Object) -> Path:
        return self._folder / f"{container['name']}.termination"

    def _note(self, container: Object, state: Object, *, ready: bool, restarts: int = 0) -> None:
        status = {
            "name": container["name"],
            "image": container.get("image", ""),
            "imageID": container.get("image", ""),
            "ready": ready,
            "restartCount": restarts,
            "state": state,
        }
        self.statuses = [old for old in self.statuses if old["name"] != container["name"]] + [status]


def _now() -> str:
    return rfc3339(datetime.now(UTC))
