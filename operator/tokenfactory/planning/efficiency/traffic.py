"""What the replicas of one model report, as one picture of the load."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ReplicaMeter:
    """One ready replica over its last window, as its node's agent counted it."""

    running: int = 0
    waiting: int = 0
    cache_permille: int = 0
    first_token_milliseconds: float | None = None
    """95th percentile; None while nothing was measured."""
    inter_token_milliseconds: float | None = None
    tokens_per_second: float = 0.0
    """Generated."""
    prompt_tokens_per_second: float = 0.0


@dataclass(frozen=True, slots=True)
class Traffic:
    meters: tuple[ReplicaMeter, ...] = ()
    """Of ready replicas whose agents report."""
    ready: int = 0
    """Ready replicas, also those that nobody reports of."""
    pending: int = 0
    """Replicas that were asked for and do not serve yet."""
    at_the_door: int = 0
    """Requests that arrived while no replica was ready."""

    @property
    def known(self) -> bool:
        """Whether enough replicas report to judge the rest by them."""
        return 2 * len(self.meters) >= self.ready

    @property
    def in_flight(self) -> float:
        return sum(m.running + m.waiting for m in self.meters) * self._scale + self.at_the_door

    @property
    def waiting(self) -> float:
        return sum(m.waiting for m in self.meters) * self._scale + self.at_the_door

    @property
    def tokens_per_second(self) -> float:
        return sum(m.tokens_per_second for m in self.meters) * self._scale

    @property
    def prompt_tokens_per_second(self) -> float:
        return sum(m.prompt_tokens_per_second for m in self.meters) * self._scale

    @property
    def concurrency(self) -> float:
        return sum(m.running for m in self.meters) / len(self.meters) if self.meters else 0.0

    @property
    def cache_permille(self) -> int:
        return max((m.cache_permille for m in self.meters), default=0)

    @property
    def inter_token_milliseconds(self) -> float | None:
        return _typical([m.inter_token_milliseconds for m in self.meters])

    @property
    def first_token_milliseconds(self) -> float | None:
        return _typical([m.first_token_milliseconds for m in self.meters])

    @property
    def idle(self) -> bool:
        return self.in_flight == 0 and self.tokens_per_second == 0

    @property
    def _scale(self) -> float:
        """Replicas that nobody reports of are taken for like the others."""
        return self.ready / len(self.meters) if self.meters and self.ready > len(self.meters) else 1.0


def _typical(values: list[float | None]) -> float | None:
    """The median: one slow replica is a fault of that replica, not a lack of replicas."""
    known = sorted(v for v in values if v is not None)
    return known[len(known) // 2] if known else None
