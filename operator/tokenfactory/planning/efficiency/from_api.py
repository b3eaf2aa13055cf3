"""From the typed resources to what the decisions take: a model's spec, and what agents report of its pods."""

from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.quantities import parse_duration
from tokenfactory.api.token_factory import ModelSpec
from tokenfactory.planning.efficiency.operating_point import Goals
from tokenfactory.planning.efficiency.traffic import ReplicaMeter
from tokenfactory.planning.efficiency.verdict import Counter


def goals_of(model: ModelSpec) -> Goals:
    first, inter = model.slo.time_to_first_token, model.slo.inter_token_latency
    return Goals(
        min_replicas=model.replicas.min,
        max_replicas=model.replicas.max,
        first_token_milliseconds=parse_duration(first) if first is not None else None,
        inter_token_milliseconds=parse_duration(inter) if inter is not None else None,
    )


def meter_of(meter: PodMeter, before: PodMeter | None = None, seconds: float = 0.0) -> ReplicaMeter:
    """`before` is the same pod's meter `seconds` earlier: prompts are reported as a counter only."""
    prompts = 0.0
    if before is not None and before.since == meter.since and seconds > 0:
        prompts = max(meter.prompt_tokens - before.prompt_tokens, 0) / seconds
    return ReplicaMeter(
        running=meter.running,
        waiting=meter.queued,
        cache_permille=meter.cache_permille,
        # An agent writes 0 where it measured nothing.
        first_token_milliseconds=float(meter.time_to_first_token_ms) or None,
        inter_token_milliseconds=meter.inter_token_latency_us / 1000 or None,
        tokens_per_second=meter.tokens_per_kilosecond / 1000,
        prompt_tokens_per_second=prompts,
    )


def counter_of(meter: PodMeter) -> Counter:
    return Counter(meter.since, meter.generated_tokens, meter.millijoules)
