"""Tokens and joules: engines' names, counters that restart or lie, and windows that never overcount."""

import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenfactory.agent.engines import engine_table, parse_table
from tokenfactory.agent.exposition import MOST_SAMPLES, ExpositionError, ExpositionReader, Reading
from tokenfactory.agent.meter import (
    MOST_GENERATED_PER_GPU_SECOND,
    REBASE_AFTER,
    STALE_AFTER_SECONDS,
    EnergyBook,
    PodAccount,
    quantile,
)

EXAMPLES = int(os.environ.get("HYPOTHESIS_EXAMPLES", "60"))


def read(text: str, chunk: int = 65536) -> Reading:
    reader = ExpositionReader(engine_table())
    data = text.encode()
    for start in range(0, len(data), chunk):
        reader.feed(data[start : start + chunk])
    return reader.reading()


VLLM = """# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="meta/llama"} 1000.0
vllm:generation_tokens_total{engine="1",model_name="meta/llama"} 234.0
vllm:generation_tokens_created{engine="0",model_name="meta/llama"} 1.7e9
vllm:prompt_tokens_total{engine="0",model_name="meta/llama"} 5e3
vllm:num_requests_running{engine="0",model_name="meta/llama"} 3
vllm:num_requests_running{engine="1",model_name="meta/llama"} 4
vllm:num_requests_waiting{engine="0",model_name="a } \\" , le=\\"9\\""} 2
vllm:kv_cache_usage_perc{engine="0",model_name="meta/llama"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="meta/llama"} 0.5
vllm:time_to_first_token_seconds_bucket{le="0.1",model_name="m"} 5
vllm:time_to_first_token_seconds_bucket{le="+Inf",model_name="m"} 10
vllm:time_to_first_token_seconds_sum{model_name="m"} 3.2
vllm:time_per_output_token_seconds_bucket{le="0.01",model_name="m"} 7
vllm:time_per_output_token_seconds_bucket{le="+Inf",model_name="m"} 9
process_start_time_seconds 1.7e+09
"""

ENGINES = {
    "vllm": (VLLM, 1234, 7, 2, 0.5),
    "nim": (
        (
            'generation_tokens_total{model_name="m"} 1234\nnum_requests_running 7\nnum_requests_waiting 2\n'
            "gpu_cache_usage_perc 0.5\n"
        ),
        1234,
        7,
        2,
        0.5,
    ),
    "sglang": (
        (
            'sglang:generation_tokens_total{model_name="m",tp_rank="0"} 1.234e+03\nsglang:num_running_reqs{} 7\n'
            "sglang:num_queue_reqs 2\nsglang:token_usage 0.5\n"
        ),
        1234,
        7,
        2,
        0.5,
    ),
    "tensorrt-llm": (
        (
            "trtllm_generation_tokens_total 1234\ntrtllm_num_requests_running 7\ntrtllm_num_requests_waiting 2\n"
            "trtllm_kv_cache_utilization 0.5\n"
        ),
        1234,
        7,
        2,
        0.5,
    ),
    "triton": (
        (
            'nv_llm_output_token_len_sum{model="m",response_metric_type="total_output_tokens",version="1"} 1234\n'
            'nv_trt_llm_request_metrics{model="m",request_type="active",version="1"} 7\n'
            'nv_trt_llm_request_metrics{model="m",request_type="waiting",version="1"} 2\n'
            'nv_trt_llm_request_metrics{model="m",request_type="max",version="1"} 512\n'
            'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="m"} 0.5\n'
            'nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="m"} 4096\n'
        ),
        1234,
        7,
        2,
        0.5,
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_is_read_by_its_own_names(engine: str) -> None:
    text, generated, running, queued, cache = ENGINES[engine]
    reading = read(text)
    assert reading.engine == engine
    assert sum(reading.generated_tokens.values()) == generated
    assert (reading.running, reading.queued, reading.cache) == (running, queued, cache)
    assert reading.refused == 0


def test_an_image_that_exports_two_sets_of_names_is_counted_once() -> None:
    reading = read(VLLM + ENGINES["nim"][0])
    assert reading.engine == "vllm"
    assert sum(reading.generated_tokens.values()) == 1234


def test_histograms_are_read_in_seconds_by_bound() -> None:
    assert read(VLLM).time_to_first_token == {0.1: 5, math.inf: 10}
    triton = (
        ENGINES["triton"][0] + 'nv_inference_first_response_histogram_ms_bucket{model="m",le="100"} 5\n'
        'nv_inference_first_response_histogram_ms_bucket{model="m",le="+Inf"} 10\n'
    )
    assert read(triton).time_to_first_token == {0.1: 5, math.inf: 10}


@settings(max_examples=EXAMPLES, deadline=None)
@given(chunk=st.integers(1, 400), windows_lines=st.booleans())
def test_how_the_bytes_arrive_changes_nothing(chunk: int, windows_lines: bool) -> None:
    text = VLLM.replace("\n", "\r\n") if windows_lines else VLLM
    assert read(text, chunk) == read(VLLM)


@pytest.mark.parametrize("value", ["NaN", "-1", "+Inf", "-Inf", "1e300", "many", "", "9" * 60])
def test_what_is_no_count_is_refused_and_said(value: str) -> None:
    reading = read(
        f'vllm:generation_tokens_total{{a="1"}} {value}\nvllm:generation_tokens_total{{a="2"}} 5\n'
    )
    assert sum(reading.generated_tokens.values()) == 5
    assert reading.refused == 1


@settings(max_examples=EXAMPLES, deadline=None)
@given(noise=st.binary(max_size=600))
def test_no_bytes_break_the_parser(noise: bytes) -> None:
    reader = ExpositionReader(engine_table())
    reader.feed(noise + b'\nvllm:generation_tokens_total{a="b"} 7\nvllm:generation_tokens_total{' + noise)
    reader.feed(b"\n")
    assert reader.reading().generated_tokens[b'{a="b"}'] == 7


def test_a_line_without_end_is_skipped_and_what_follows_is_read() -> None:
    reader = ExpositionReader(engine_table())
    reader.feed(b'vllm:generation_tokens_total{a="')
    for _ in range(100):
        reader.feed(b"x" * 65536)
    reader.feed(b'"} 9\nvllm:generation_tokens_total 7\n')
    assert sum(reader.reading().generated_tokens.values()) == 7


def test_too_many_series_are_an_error_that_says_so() -> None:
    with pytest.raises(ExpositionError, match=str(MOST_SAMPLES)):
        read("".join(f'vllm:generation_tokens_total{{a="{n}"}} 1\n' for n in range(MOST_SAMPLES + 1)))


def test_a_page_without_tokens_says_what_is_missing() -> None:
    with pytest.raises(ExpositionError, match=r"engines\.toml"):
        read("<html>not metrics</html>")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ('[[engine]]\nname = "x"\ntokens = ["a"]\n', "nothing that the agent counts"),
        ('[[engine]]\nname = "x"\nrunning = ["a{b=1}"]\n', "no metric name"),
    ],
)
def test_a_wrong_engine_table_is_refused(table: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        parse_table(table)


def reading(
    generated: float, *, start: float | None = None, ttft: dict[float, float] | None = None, **more: float
) -> Reading:
    return Reading(
        engine="vllm",
        generated_tokens={b"a": generated, **{key.encode(): value for key, value in more.items()}},
        prompt_tokens={b"a": generated * 2},
        running=3.0,
        queued=1.0,
        cache=0.5,
        time_to_first_token=ttft or {},
        inter_token_latency={},
        process_start=start,
    )


class Pod:
    """A pod metered every 15 s that draws 400 W."""

    def __init__(self, first: Reading) -> None:
        self.account = PodAccount(pod="ns/p", uid="u", gpus=1)
        self.at, self.breaks = 0.0, 0
        self.see(first)

    def see(self, value: Reading, seconds: float = 15.0) -> int | None:
        self.at += seconds
        window = self.account.update(
            value, at=self.at, millijoules=self.at * 400_000, breaks=self.breaks, wall=f"t{self.at:g}"
        )
        return None if window is None else window.generated_tokens


def test_tokens_per_joule_is_of_one_window() -> None:
    pod = Pod(reading(1_000_000))
    assert pod.see(reading(1_012_000)) == 12_000
    window = pod.account.last_window
    assert window is not None
    assert window.tokens_per_joule == pytest.approx(12_000 / (15 * 400))
    report = pod.account.report(pod.at)
    assert (report.generated_tokens, report.prompt_tokens, report.millijoules) == (12_000, 24_000, 6_000_000)
    assert report.tokens_per_kilosecond == 800_000
    assert (report.running, report.queued, report.cache_permille) == (3, 1, 500)


def test_a_missed_scrape_stretches_the_window_and_loses_nothing() -> None:
    pod = Pod(reading(0))
    assert pod.see(reading(30_000), seconds=45) == 30_000
    assert pod.account.report(pod.at).millijoules == 45 * 400_000


def test_a_restarted_engine_counts_from_zero_again() -> None:
    pod = Pod(reading(1_000_000))
    assert pod.see(reading(500)) == 500
    assert pod.account.report(pod.at).since == "t15"


def test_one_of_two_series_that_restarts_does_not_count_the_other_again() -> None:
    pod = Pod(reading(1_000_000, b=50_000))
    assert pod.see(reading(1_000_100, b=70)) == 170


def test_a_series_that_vanishes_and_returns_is_not_counted_twice() -> None:
    pod = Pod(reading(1_000, b=50_000))
    assert pod.see(reading(1_100)) == 100
    assert pod.see(reading(1_200, b=50_010)) == 110


def test_a_counter_that_falls_while_its_process_lives_on_is_a_lie_and_gives_nothing() -> None:
    pod = Pod(reading(1_000, start=5.0))
    assert pod.see(reading(10, start=5.0)) is None
    assert pod.see(reading(1_100, start=5.0)) == 100
    assert pod.account.refused_windows == 1
    assert pod.see(reading(40, start=99.0)) == 40  # a new process may


def test_a_wild_jump_is_not_counted_and_honesty_resumes_where_it_was() -> None:
    pod = Pod(reading(1_000))
    assert pod.see(reading(1e12)) is None
    assert pod.see(reading(1_200)) == 200
    assert pod.account.report(pod.at).generated_tokens == 200
    assert pod.account.report(pod.at).millijoules == 30 * 400_000  # its joules are still paid


def test_a_jump_that_stays_becomes_the_new_start_uncounted() -> None:
    pod = Pod(reading(1_000))
    for _ in range(REBASE_AFTER):
        assert pod.see(reading(1e12)) is None
    assert pod.see(reading(1e12 + 50)) == 50


def test_a_reloaded_driver_begins_a_new_account() -> None:
    pod = Pod(reading(1_000))
    pod.see(reading(2_000))
    pod.breaks += 1
    assert pod.see(reading(3_000)) is None
    report = pod.account.report(pod.at)
    assert (report.since, report.generated_tokens, report.millijoules) == ("t45", 0, 0)


def test_what_moves_fast_is_not_reported_when_stale() -> None:
    pod = Pod(reading(0))
    pod.see(reading(3_000))
    late = pod.account.report(pod.at + STALE_AFTER_SECONDS + 1)
    assert (late.running, late.tokens_per_kilosecond) == (0, 0)
    assert late.generated_tokens == 3_000


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    values=st.lists(
        st.one_of(st.floats(0, 1e7), st.floats(0, 2**53), st.sampled_from([0.0, 1e6, 1e6 + 1])), max_size=12
    ),
    starts=st.lists(st.sampled_from([None, 1.0, 2.0]), min_size=12, max_size=12),
)
def test_no_endpoint_can_make_more_tokens_than_a_gpu_could_nor_make_counters_fall(
    values: list[float], starts: list[float | None]
) -> None:
    pod = Pod(reading(0.0))
    seen = pod.account.report(pod.at)
    for value, start in zip(values, starts, strict=False):
        pod.see(reading(value, start=start))
        now = pod.account.report(pod.at)
        assert now.generated_tokens >= seen.generated_tokens
        assert now.millijoules >= seen.millijoules
        assert now.since == seen.since
        seen = now
    assert seen.generated_tokens <= MOST_GENERATED_PER_GPU_SECOND * pod.at


QUANTILES = {
    "uniform in one bucket": ({1.0: 0, 2.0: 100, math.inf: 100}, 1.95),
    "at a bound": ({1.0: 95, 2.0: 100, math.inf: 100}, 1.0),
    "above the last bound": ({1.0: 10, 2.0: 20, math.inf: 100}, 2.0),
    "nothing observed": ({1.0: 0, math.inf: 0}, None),
    "a bucket that falls": ({1.0: 50, 2.0: 40, math.inf: 100}, None),
}


@pytest.mark.parametrize("name", QUANTILES)
def test_quantiles_come_from_what_the_window_added(name: str) -> None:
    after, want = QUANTILES[name]
    base = dict.fromkeys(after, 1000.0)
    assert quantile(base, {bound: 1000 + count for bound, count in after.items()}) == (
        want if want is None else pytest.approx(want)
    )


def test_a_restarted_histogram_gives_no_quantile() -> None:
    assert quantile({1.0: 50, math.inf: 90}, {1.0: 5, math.inf: 6}) is None
    assert quantile({1.0: 5, math.inf: 6}, {2.0: 50, math.inf: 90}) is None


def test_the_energy_of_a_shared_gpu_is_shared_out_and_never_twice() -> None:
    book = EnergyBook()
    holders = {"g0": {"a": 1.0}, "g1": {"a": 0.5, "b": 0.5}}
    book.attribute({"g0": 1_000, "g1": 2_000}, holders)
    book.attribute({"g0": 1_500, "g1": 3_000}, holders)
    assert book.millijoules == {"a": 1_000, "b": 500}


def test_an_unreadable_energy_counter_is_caught_up_with() -> None:
    book = EnergyBook()
    for value in (1_000, None, 4_000):
        book.attribute({"g0": value}, {"g0": {"a": 1.0}})
    assert book.millijoules == {"a": 3_000}
    assert book.breaks == {"a": 1}  # only the very first reading, which began it


def test_an_energy_counter_that_goes_back_breaks_its_holders_window() -> None:
    book = EnergyBook()
    for value in (1_000, 2_000, 10):
        book.attribute({"g0": value}, {"g0": {"a": 1.0}})
    assert book.millijoules == {"a": 1_000}
    assert book.breaks == {"a": 2}
