"""Whether a factory reaches its token-per-watt target, measured, and what would bring it nearest if not.

Tokens per joule is always Δtokens over Δjoules of one window. Everything the factory made draw power counts as joules:
serving, standing by, recovering, parked, and the nodes and the facility as far as the target's scope goes; only tokens
that were generated for somebody count as tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import floor, log10
from typing import Final, Literal

Scope = Literal["GPU", "Node", "Facility"]
LEAST_WINDOW_SECONDS: Final = 30.0
LARGE_SHARE: Final = 0.10


@dataclass(frozen=True, slots=True)
class Counter:
    """What was counted for one pod since `since`; it only grows while `since` stays the same."""

    since: str
    generated_tokens: int
    millijoules: int


def delta(before: Counter | None, after: Counter) -> tuple[int, int]:
    """Tokens and millijoules between two readings of one pod.

    A counter that began anew counts from its new beginning, tokens and joules alike; one that nobody read before counts
    nothing yet: it is not known how much of it belongs to this window.
    """
    if before is None:
        return 0, 0
    fell = after.generated_tokens < before.generated_tokens or after.millijoules < before.millijoules
    if before.since != after.since or fell:
        return after.generated_tokens, after.millijoules
    return after.generated_tokens - before.generated_tokens, after.millijoules - before.millijoules


@dataclass(frozen=True, slots=True)
class Energy:
    """One window of a factory."""

    seconds: float
    generated_tokens: int
    serving_millijoules: int
    """GPUs of replicas that serve."""
    recovery_millijoules: int = 0
    """Replicas that are starting or being restored."""
    overhead_millijoules: int = 0
    """Its share of what its nodes draw besides GPUs."""
    facility_millijoules: int = 0
    """Its share of the domain's other load."""

    def millijoules(self, scope: Scope) -> int:
        gpus = self.serving_millijoules + self.recovery_millijoules
        if scope == "GPU":
            return gpus
        node = gpus + self.overhead_millijoules
        return node if scope == "Node" else node + self.facility_millijoules

    def tokens_per_joule(self, scope: Scope) -> float:
        joules = self.millijoules(scope) / 1000
        return self.generated_tokens / joules if joules > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known about why a factory draws what it draws: the levers, in the order of their effect."""

    concurrency: float = 0.0
    best_concurrency: int = 0
    """Requests per replica at which it would be most efficient within its SLO; 0: not known."""
    replicas: int = 0
    min_replicas: int = 0
    held_by_latency: bool = False
    """By what is measured, fewer replicas would come too near an SLO."""
    best_tokens_per_joule: float | None = None
    """At the best operating point of its profile within the SLO, in the target's scope."""
    tokens_by_product: Mapping[str, float] = field(default_factory=dict)
    tokens_per_joule_by_product: Mapping[str, float] = field(default_factory=dict)
    cap_milliwatts: int = 0
    knee_milliwatts: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    status: Literal["True", "False", "Unknown"]
    reason: str
    message: str
    tokens_per_joule: float | None


def judge_efficiency(target: float | None, scope: Scope, energy: Energy, situation: Situation) -> Verdict:
    """The condition `EfficiencyMet`."""
    measured = energy.tokens_per_joule(scope)
    if target is None:
        return Verdict("True", "NoTarget", "no target is set", measured)
    if energy.seconds < LEAST_WINDOW_SECONDS or energy.millijoules(scope) <= 0:
        return Verdict("Unknown", "NotMeasured", f"measured for {energy.seconds:.0f}s so far", None)
    if measured >= target:
        return Verdict("True", "TargetMet", f"{measured:.2f} tokens/J of {target:g} ({scope})", measured)
    reason, fix = _nearest_fix(_Case(target, scope, energy, situation))
    return Verdict("False", reason, f"{measured:.2f} tokens/J of {target:g} ({scope}): {fix}", measured)


@dataclass(frozen=True, slots=True)
class _Case:
    target: float
    scope: Scope
    energy: Energy
    now: Situation

    @property
    def whole(self) -> int:
        return self.energy.millijoules(self.scope)


Lever = Callable[[_Case], tuple[str, str] | None]


def _recovering(case: _Case) -> tuple[str, str] | None:
    share = case.energy.recovery_millijoules / case.whole
    if share <= LARGE_SHARE:
        return None
    return "Recovering", f"{share:.0%} of the joules went to replicas that are starting; it passes"


def _beyond_profile(case: _Case) -> tuple[str, str] | None:
    best = case.now.best_tokens_per_joule
    if best is None or best >= case.target:
        return None
    return "TargetBeyondProfile", (
        f"its best point within the SLO gives {_rounded_down(best)}: "
        f"ask for at most {_rounded_down(best)}, or allow more latency and so more concurrency"
    )


def _rounded_down(value: float) -> str:
    """To three figures. Whoever asks for what was named must not hear that it is too much."""
    decimals = max(2 - floor(log10(value)), 0) if value > 0 else 0
    return f"{floor(value * 10**decimals) / 10**decimals:.{decimals}f}"


def _no_traffic(case: _Case) -> tuple[str, str] | None:
    if case.energy.generated_tokens:
        return None
    return "NoTraffic", "no tokens were asked for; replicas.min: 0 lets it sleep"


def _thin(case: _Case) -> tuple[str, str] | None:
    now = case.now
    if not now.best_concurrency or now.concurrency >= 0.7 * now.best_concurrency:
        return None
    dense = f"{now.concurrency:.0f} requests per replica, best is {now.best_concurrency}"
    if now.replicas > max(now.min_replicas, 1):
        if now.held_by_latency:
            return (
                "LatencyBound",
                f"{dense}, but fewer replicas would come too near an SLO: allow more latency",
            )
        return "LowConcurrency", f"{dense}: replicas are being taken away, down to {max(now.min_replicas, 1)}"
    if now.min_replicas > 1:
        return "TooManyAtMinimum", f"{dense}: lower replicas.min from {now.min_replicas}"
    return "TooLittleTraffic", f"{dense}, and one replica is the least that serves: share it or send more"


def _worse_product(case: _Case) -> tuple[str, str] | None:
    """A tenth of the tokens made on a product that is clearly worse for this model than another one it uses."""
    now = case.now
    total = sum(now.tokens_by_product.values())
    known = now.tokens_per_joule_by_product
    if total <= 0 or len(known) < 2:
        return None
    best = max(sorted(known), key=lambda p: known[p])
    for product, tokens in sorted(now.tokens_by_product.items(), key=lambda e: (-e[1], e[0])):
        if tokens > LARGE_SHARE * total and known.get(product, known[best]) < 0.9 * known[best]:
            return "WorseProduct", (
                f"{tokens / total:.0%} of its tokens are made on {product} at {known[product]:.2f} tokens/J: "
                f"{best} makes {known[best]:.2f}"
            )
    return None


def _above_knee(case: _Case) -> tuple[str, str] | None:
    cap, knee = case.now.cap_milliwatts, case.now.knee_milliwatts
    if not knee or cap <= 1.05 * knee:
        return None
    return "CapsAboveKnee", (
        f"its GPUs may draw {cap / 1000:.0f}W, the most tokens per joule are at {knee / 1000:.0f}W: "
        f"a lower spec.power.budget, or a higher target, keeps them there"
    )


def _besides(case: _Case) -> tuple[str, str] | None:
    beside = case.energy.overhead_millijoules if case.scope != "GPU" else 0
    beside += case.energy.facility_millijoules if case.scope == "Facility" else 0
    if beside <= 0.5 * case.whole:
        return None
    return "OverheadDraw", f"{beside / case.whole:.0%} of the joules are drawn besides GPUs: fill the nodes"


# What passes by itself and what cannot be helped come first, then the levers in the order of their effect.
LEVERS: Final[tuple[Lever, ...]] = (
    _recovering,
    _beyond_profile,
    _no_traffic,
    _thin,
    _worse_product,
    _above_knee,
    _besides,
)


def _nearest_fix(case: _Case) -> tuple[str, str]:
    for lever in LEVERS:
        if found := lever(case):
            return found
    return "BelowTarget", "every lever is at its end; a lower target or a better product is needed"
