"""The governor: which cap each GPU of one node gets. The node's half of the power contract, as a pure function.

An agent shows the governor what it sees (`View`) and what the governor remembered (`Memory`), sets the caps that it
is told, reads the enforced limits back, and shows those to `read_back`, which says what may be reported. What the
ledger relies on, and what must stay true here:

* A sheet older than one obeyed before, in this process or (as its own status says) in an earlier one, counts as
  absent; an absent sheet or class gives NVML's minimum.
* Every epoch in `Readback.applied` is one below which this node never goes again, and whatever runs here runs under
  limits that were read back at or below those epochs' caps.
* A limit is never raised before all sheets of the path and a renewal newer than the first one seen have arrived.
* A pod may start only when its GPUs' caps were read back in this boot, and the API server has heard of this boot.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

from tokenfactory.api.cap_sheet import CapSheetSpec
from tokenfactory.api.gpu_node import GPUNodeSpec, GPUNodeStatus
from tokenfactory.api.names import idle_class, unmanaged_class

Mode = Literal["Starting", "Obeying", "Fallback", "Degraded"]
Why = Literal["Sheet", "Fallback", "NoClass", "NoSheet", "NoPath", "Fenced", "Unmanaged", "Kept"]

PATIENCE_MILLISECONDS: Final = 300_000
"""How long an agent that knows no hold yet keeps what it found: the default hold of a domain."""


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a sheet gives each GPU of one class."""

    cap: int
    fallback: int = 0


@dataclass(frozen=True, slots=True)
class Sheet:
    """A cap sheet as agents need it."""

    domain: str
    epoch: int
    hold_milliseconds: int
    caps: Mapping[str, Allowance]

    @classmethod
    def of(cls, spec: CapSheetSpec) -> Sheet:
        caps = {entry.class_name: Allowance(entry.cap, entry.fallback) for entry in spec.caps}
        return cls(spec.domain, spec.epoch, spec.hold_milliseconds, caps)


@dataclass(frozen=True, slots=True)
class GpuView:
    """One GPU now. `enforced_milliwatts` is None when it cannot be read."""

    uuid: str
    product: str
    min_milliwatts: int
    max_milliwatts: int
    enforced_milliwatts: int | None
    pod_uid: str = ""


@dataclass(frozen=True, slots=True)
class View:
    """What the agent sees at one moment.

    `spec` and `status` are its own GPUNode's, from a consistent read at the agent's start at the latest (None: not
    read yet). `sheets` and `renewals` are as of the ordered watch, begun with a consistent list: by domain, and by the
    root's name. `sheets` is None until that list is complete.
    """

    boot_id: str
    spec: GPUNodeSpec | None
    generation: int
    status: GPUNodeStatus | None
    sheets: Mapping[str, Sheet] | None
    renewals: Mapping[str, int]
    gpus: tuple[GpuView, ...]


@dataclass(frozen=True, slots=True)
class Heard:
    """The last renewal of one tree. `at` is None for the first one seen: it may be of any age."""

    sequence: int
    at: int | None


@dataclass(frozen=True, slots=True)
class Memory:
    """What the governor keeps in one process; Memory() is a fresh start."""

    boot_id: str = ""
    started_at: int | None = None
    found_own_caps: bool = False
    capped: bool = False
    floors: Mapping[str, int] = field(default_factory=dict)
    acked: Mapping[str, int] = field(default_factory=dict)
    heard: Mapping[str, Heard] = field(default_factory=dict)
    settled: bool = False


@dataclass(frozen=True, slots=True)
class Reason:
    """Which sheet bound a GPU's cap: `domain` is empty where none did."""

    domain: str
    class_name: str
    why: Why

    def __str__(self) -> str:
        return f"{self.why} {self.class_name}" + (f" in {self.domain}" if self.domain else "")


@dataclass(frozen=True, slots=True)
class CapOrder:
    """The cap of one GPU. `cap_milliwatts` None: leave it alone."""

    uuid: str
    cap_milliwatts: int | None
    reason: Reason


@dataclass(frozen=True, slots=True)
class Decision:
    mode: Mode
    caps: Mapping[str, CapOrder]
    epochs: Mapping[str, int]
    """What `applied` may say once these caps are read back."""
    generation: int
    complete: bool
    """Spec and sheets were known: only then do read-back limits prove anything."""
    startable: Mapping[str, tuple[str, ...]]
    """Pod uid → its GPUs, for each granted pod: it may start once they are read back and the node is capped."""
    next_deadline_ms: int | None
    """When hold runs out, on the agent's clock: govern again then at the latest."""


@dataclass(frozen=True, slots=True)
class Readback:
    """What the agent may report, and which pods may start."""

    capped: bool
    applied: Mapping[str, int]
    observed_generation: int | None
    """None: not all caps are in place yet, so the spec cannot be said to be obeyed."""
    may_start: frozenset[str]


def govern(memory: Memory, view: View, now_ms: int) -> tuple[Memory, Decision]:
    """Caps for every GPU. `now_ms` is the agent's own monotonic clock, which must count suspended time too."""
    memory = _remember(memory, view, now_ms)
    spec, listed = view.spec, view.sheets or {}
    complete = spec is not None and view.sheets is not None
    domains = _domains(spec)
    sheets = {
        domain: sheet
        for domain in domains
        # P5: an older sheet than one obeyed before is no sheet.
        if (sheet := listed.get(domain)) is not None and sheet.epoch >= memory.floors.get(domain, 0)
    }
    expires = _expires(memory, spec, sheets)
    fallback = expires is not None and now_ms >= expires
    obedience = _Obedience(
        domains=domains,
        sheets=sheets,
        fallback=fallback,
        keep=not memory.settled,
        keep_found=memory.found_own_caps,
        fenced=spec is not None and spec.fence is not None,
    )
    classes, startable = _classes(view, spec)
    caps = {
        gpu.uuid: _leave(gpu, "Unmanaged")
        if (name := classes[gpu.uuid]) is None
        else (obedience.order(gpu, name) if complete or fallback else _leave(gpu, "Kept", name))
        for gpu in view.gpus
    }
    decision = Decision(
        mode=_mode(memory, view, fallback=fallback),
        caps=caps,
        epochs={domain: memory.floors[domain] for domain in domains if memory.floors.get(domain)},
        generation=view.generation,
        complete=complete,
        startable=startable if complete and not obedience.fenced and _reported(view) else {},
        next_deadline_ms=None if fallback else expires,
    )
    return memory, decision


def read_back(
    memory: Memory, decision: Decision, enforced: Mapping[str, int | None]
) -> tuple[Memory, Readback]:
    """What may be reported after the limits that are in force now (`enforced`, by uuid) were read.

    No call that sets a limit may be under way: it could land after the reading.
    """
    within = {
        uuid
        for uuid, order in decision.caps.items()
        if order.cap_milliwatts is None
        or ((limit := enforced.get(uuid)) is not None and limit <= order.cap_milliwatts)
    }
    all_within = decision.complete and len(within) == len(decision.caps)
    if all_within:
        memory = replace(memory, capped=True, acked=decision.epochs)
    return memory, Readback(
        capped=memory.capped,
        applied=memory.acked,
        observed_generation=decision.generation if all_within else None,
        may_start=frozenset(
            uid for uid, gpus in decision.startable.items() if memory.capped and within.issuperset(gpus)
        ),
    )


@dataclass(frozen=True, slots=True)
class _Obedience:
    """How one class's cap follows from the sheets."""

    domains: tuple[str, ...]
    sheets: Mapping[str, Sheet]
    fallback: bool
    keep: bool
    keep_found: bool
    fenced: bool

    def order(self, gpu: GpuView, class_name: str) -> CapOrder:
        cap, reason = self._lowest(class_name)
        cap = min(max(cap, gpu.min_milliwatts), gpu.max_milliwatts)
        found = gpu.enforced_milliwatts or gpu.min_milliwatts
        if self.keep and found < cap:
            # P6: before everything is heard, a limit may fall but not rise.
            return CapOrder(gpu.uuid, max(found, gpu.min_milliwatts), Reason("", class_name, "Kept"))
        return CapOrder(gpu.uuid, cap, reason)

    def _lowest(self, class_name: str) -> tuple[int, Reason]:
        if self.fenced:
            return 0, Reason("", class_name, "Fenced")
        if not self.domains:
            return 0, Reason("", class_name, "NoPath")
        # Limits found in a boot that nobody capped yet are not worth keeping, so then the fallback rules.
        low = self.fallback or (self.keep and not self.keep_found)
        best, reason = -1, Reason("", class_name, "NoPath")
        for domain in self.domains:
            cap, why = self._in(domain, class_name, low=low)
            if best < 0 or cap < best:
                best, reason = cap, Reason(domain, class_name, why)
        return best, reason

    def _in(self, domain: str, class_name: str, *, low: bool) -> tuple[int, Why]:
        sheet = self.sheets.get(domain)
        if sheet is None:
            return 0, "NoSheet"
        allowance = sheet.caps.get(class_name)
        if allowance is None:
            return 0, "NoClass"
        if low:
            return min(allowance.cap, allowance.fallback), "Fallback"
        return allowance.cap, "Sheet"


def _remember(memory: Memory, view: View, now_ms: int) -> Memory:
    """Folds what is seen into what is known: floors only rise, renewals only count when they move."""
    if memory.boot_id != view.boot_id:
        # P3: nothing that was read back in another boot says anything about this one.
        memory = replace(memory, boot_id=view.boot_id, capped=False, found_own_caps=False)
    status = view.status
    if memory.started_at is None:
        memory = replace(memory, started_at=now_ms)
    if not memory.settled and status is not None:
        # The own status, as an earlier process of this node left it, is read before anything is obeyed.
        before = {entry.domain: entry.epoch for entry in status.applied}
        ours = status.boot_id == view.boot_id and status.capped
        memory = replace(
            memory,
            capped=memory.capped or ours,
            found_own_caps=memory.found_own_caps or ours,
            floors=_highest(memory.floors, before),
            acked=memory.acked or before,
        )
    domains = _domains(view.spec)
    listed = view.sheets or {}
    seen = {domain: listed[domain].epoch for domain in domains if domain in listed}
    heard = _hear(memory.heard, view, now_ms)
    # Floors of domains that the node has left are forgotten: the ledger credits no domain that is not acked anew.
    floors = {d: e for d, e in _highest(memory.floors, seen).items() if view.spec is None or d in domains}
    settled = memory.settled or (
        view.spec is not None
        and status is not None
        and all(domain in seen and seen[domain] >= floors[domain] for domain in domains)
        and all((it := heard.get(tree)) is not None and it.at is not None for tree in _trees(view.spec))
    )
    return replace(memory, floors=floors, heard=heard, settled=settled)


def _hear(heard: Mapping[str, Heard], view: View, now_ms: int) -> dict[str, Heard]:
    result = dict(heard)
    for tree, sequence in view.renewals.items():
        before = heard.get(tree)
        if before is None:
            result[tree] = Heard(sequence, None)
        elif sequence > before.sequence:
            result[tree] = Heard(sequence, now_ms)
    return result


def _expires(memory: Memory, spec: GPUNodeSpec | None, sheets: Mapping[str, Sheet]) -> int | None:
    """When the shortest hold on the path has run since the oldest of the trees' last renewals."""
    start = memory.started_at or 0
    hold = min((sheet.hold_milliseconds for sheet in sheets.values()), default=PATIENCE_MILLISECONDS)
    last = start
    if memory.settled:
        times = [it.at for tree in _trees(spec) if (it := memory.heard.get(tree)) is not None]
        last = min((start if at is None else at for at in times), default=start)
    return last + hold


def _classes(
    view: View, spec: GPUNodeSpec | None
) -> tuple[dict[str, str | None], dict[str, tuple[str, ...]]]:
    """Each GPU's class (None: unmanaged), and the GPUs of each pod that may start."""
    held: dict[str, list[str]] = {}
    for gpu in view.gpus:
        if gpu.pod_uid:
            held.setdefault(gpu.pod_uid, []).append(gpu.uuid)
    grants = {pod.uid: pod for pod in spec.pods} if spec is not None else {}
    classes: dict[str, str | None] = {}
    for gpu in view.gpus:
        if not gpu.pod_uid:
            classes[gpu.uuid] = idle_class(gpu.product)
            continue
        grant = grants.get(gpu.pod_uid)
        # A pod that holds more than it was granted was not charged for: it is nobody's we know.
        known = grant is not None and len(held[gpu.pod_uid]) <= grant.gpus
        classes[gpu.uuid] = grant.class_name if grant is not None and known else None
    startable = {
        uid: tuple(gpus)
        for uid, gpus in held.items()
        if uid in grants and not grants[uid].released and len(gpus) <= grants[uid].gpus
    }
    return classes, startable


def _reported(view: View) -> bool:
    """P4: the API server holds a status of this boot, in the same version of the object that bears no fence.

    Else a fence for the boot before could land after a model was started in this one.
    """
    return view.status is not None and view.status.boot_id == view.boot_id


def _leave(gpu: GpuView, why: Why, class_name: str = "") -> CapOrder:
    return CapOrder(gpu.uuid, None, Reason("", class_name or unmanaged_class(gpu.product), why))


def _mode(memory: Memory, view: View, *, fallback: bool) -> Mode:
    if any(gpu.enforced_milliwatts is None for gpu in view.gpus):
        return "Degraded"
    if fallback:
        return "Fallback"
    return "Obeying" if memory.settled else "Starting"


def _domains(spec: GPUNodeSpec | None) -> tuple[str, ...]:
    """Every domain to be obeyed: the path's, and those of former paths while they are listed."""
    if spec is None:
        return ()
    return tuple(dict.fromkeys(domain for path in (spec.path, *spec.former_paths) for domain in path))


def _trees(spec: GPUNodeSpec | None) -> tuple[str, ...]:
    if spec is None:
        return ()
    return tuple(dict.fromkeys(path[0] for path in (spec.path, *spec.former_paths) if path))


def _highest(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {domain: max(one.get(domain, 0), other.get(domain, 0)) for domain in {**one, **other}}
