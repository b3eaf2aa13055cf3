"""Does a pod wait for its cap? P3 rests on its first steps, so labels alone make no replica of it.

Compared with what we would write today. Of the image only the repository counts: pods of another release wait as well,
and some clusters pin tags to digests. A gated pod of a release that waits differently is replaced by its Deployment's
rollout, which the same new operator begins.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Final

import msgspec

from tokenfactory.api import names
from tokenfactory.controller.workloads import MODEL_CONTAINER, WorkloadOptions, wait_cap
from tokenfactory.kube.objects import Container, InitContainer, Pod

_CHANGES_WHAT_RUNS: Final = ("LD_", "PYTHON")
"""How the names of environment variables begin that make another program of ours."""


def unwaiting(pod: Pod, options: WorkloadOptions) -> str:
    """Why the model in this pod could start before its cap is read back; empty: it could not."""
    wanted = _wanted(options)
    waits = next((each for each in pod.spec.init_containers if each.name == wanted.name), None)
    if waits is None:
        return f"it has no init container {wanted.name}; leave making pods to its factory"
    if why := _differs(waits, wanted):
        return f"its init container {wanted.name} {why}"
    early = next((each.name for each in pod.spec.init_containers if gpus_of(each)), "")
    other = next((c.name for c in pod.spec.containers if c.name != MODEL_CONTAINER and gpus_of(c)), "")
    if early or other:
        return (
            f"its container {early or other} asks for GPUs, and only {MODEL_CONTAINER} may, which starts last"
        )
    return ""


def gpus_of(container: Container | InitContainer) -> int:
    count = container.resources.limits.get(names.GPU_RESOURCE, "0")
    return int(count) if count.isdigit() else 1


@lru_cache(maxsize=4)
def _wanted(options: WorkloadOptions) -> InitContainer:
    manifest: dict[str, Any] = wait_cap(options)
    return msgspec.convert(manifest, InitContainer)


def _differs(waits: InitContainer, wanted: InitContainer) -> str:
    """Others' webhooks may add to it, such as a proxy's address; they may not change what it asks, nor whom."""
    if repository(waits.image) != repository(wanted.image):
        return f"runs {waits.image}, and not {wanted.image} or another release of it"
    if waits.command or waits.args != wanted.args:
        said = " ".join((*waits.command, *waits.args))
        return f"runs {said!r}, and not {' '.join(wanted.args)!r}"
    if waits.restart_policy:
        return f"has restartPolicy {waits.restart_policy}, so nothing waits for it"
    ours = {variable.name for variable in wanted.env}
    if tuple(variable for variable in waits.env if variable.name in ours) != wanted.env:
        return f"has other {' and '.join(sorted(ours))} than ours"
    odd = [variable.name for variable in waits.env if variable.name.startswith(_CHANGES_WHAT_RUNS)]
    return f"has {odd[0]} set" if odd else ""


def repository(image: str) -> str:
    """`registry:5000/team/name` of `registry:5000/team/name:tag@digest`."""
    named = image.partition("@")[0]
    folder, slash, last = named.rpartition("/")
    return folder + slash + last.partition(":")[0]
