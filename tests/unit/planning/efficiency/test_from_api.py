"""What users and agents write, as the decisions take it."""

from tokenfactory.api.gpu_node import PodMeter
from tokenfactory.api.token_factory import ModelSpec, Nim, Replicas, Slo
from tokenfactory.planning.efficiency.from_api import counter_of, goals_of, meter_of
from tokenfactory.planning.efficiency.operating_point import Goals
from tokenfactory.planning.efficiency.verdict import Counter


def test_goals() -> None:
    slo = Slo(time_to_first_token="1s500ms", inter_token_latency="50ms")
    model = ModelSpec(name="m", nim=Nim(image="i"), replicas=Replicas(min=0, max=7), slo=slo)
    assert goals_of(model) == Goals(0, 7, 1_500.0, 50.0)
    assert goals_of(ModelSpec(name="m", nim=Nim(image="i"))) == Goals(1, 1, None, None)


def test_meters() -> None:
    before = PodMeter(pod="n/p", uid="u", since="t0", prompt_tokens=1_000)
    meter = PodMeter(
        pod="n/p",
        uid="u",
        since="t0",
        generated_tokens=7,
        millijoules=9,
        prompt_tokens=4_000,
        running=3,
        queued=2,
        cache_permille=500,
        time_to_first_token_ms=120,
        inter_token_latency_us=20_500,
        tokens_per_kilosecond=1_500_000,
    )
    read = meter_of(meter, before, 30.0)
    assert (read.running, read.waiting, read.cache_permille) == (3, 2, 500)
    assert (read.first_token_milliseconds, read.inter_token_milliseconds) == (120.0, 20.5)
    assert (read.tokens_per_second, read.prompt_tokens_per_second) == (1_500.0, 100.0)
    assert meter_of(meter).prompt_tokens_per_second == 0.0
    assert counter_of(meter) == Counter("t0", 7, 9)


def test_nothing_measured_is_not_a_latency_of_zero() -> None:
    idle = meter_of(PodMeter(pod="n/p", uid="u"))
    assert idle.first_token_milliseconds is None
    assert idle.inter_token_milliseconds is None
