"""What Prometheus reads: computed when asked, from what the agent knows then. Nothing is counted twice."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenfactory.agent.loop import Agent
from tokenfactory.agent.state import VERDICTS
from tokenfactory.planning.power.governor import Mode

if TYPE_CHECKING:
    from prometheus_client.core import Metric

MODES: tuple[Mode, ...] = ("Starting", "Obeying", "Fallback", "Degraded")


def render(agent: Agent) -> bytes:
    """The exposition text of one agent."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(AgentCollector(agent))
    return generate_latest(registry)


class AgentCollector:
    """A Prometheus collector over one agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield from self._gpus()
        yield from self._pods()
        yield from self._self()

    def _gpus(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        state, enforcer = self._agent.state, self._agent.enforcer
        labels = ["gpu", "index", "product"]

        def gauge(name: str, text: str, *more: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(f"tokenfactory_gpu_{name}", text, labels=[*labels, *more])

        limit = gauge("power_limit_watts", "What the agent asked for.")
        enforced = gauge("enforced_power_limit_watts", "What NVML enforces, read back.")
        draw = gauge("power_draw_watts", "Measured, averaged over a second.")
        withheld = gauge("power_withheld_watts", "What the local guard takes off the cap.")
        celsius = gauge("temperature_celsius", "GPU temperature.")
        busy = gauge("utilisation_ratio", "Share of time that a kernel ran.")
        reasons = gauge("throttle_reasons", "NVML's bits for why clocks are lowered.")
        healthy = gauge("healthy", "1 while no fatal fault stands.")
        info = gauge(
            "class_info",
            "The GPU's class, what bound its cap, and the pod that holds it.",
            "class",
            "bound_by",
            "pod",
        )
        energy = CounterMetricFamily(
            "tokenfactory_gpu_energy_joules", "Since the driver was loaded.", labels=labels
        )
        for gpu in state.gpus:
            key = [gpu.uuid, str(gpu.index), gpu.product]
            held, reading = enforcer.held.get(gpu.uuid), state.readings.get(gpu.uuid)
            if held is not None and held.asked_milliwatts is not None:
                limit.add_metric(key, held.asked_milliwatts / 1000)
            now = enforcer.enforced(gpu.uuid)
            if now is not None:
                enforced.add_metric(key, now / 1000)
            watched = state.guard.get(gpu.uuid)
            withheld.add_metric(key, watched.withheld_milliwatts / 1000 if watched else 0)
            healthy.add_metric(key, float(state.faults.verdict(gpu.uuid).healthy))
            if state.decision is not None and gpu.uuid in state.decision.caps:
                reason = state.decision.caps[gpu.uuid].reason
                pod = state.holdings.of(gpu.uuid).pod
                info.add_metric([*key, reason.class_name, f"{reason.why} {reason.domain}".strip(), pod], 1)
            if reading is None:
                continue
            for family, value, scale in (
                (draw, reading.power_milliwatts, 0.001),
                (celsius, reading.celsius, 1.0),
                (busy, reading.gpu_percent, 0.01),
                (reasons, reading.reasons, 1.0),
            ):
                if value is not None:
                    family.add_metric(key, value * scale)
            if reading.energy_millijoules is not None:
                energy.add_metric(key, reading.energy_millijoules / 1000)
        yield from (limit, enforced, draw, withheld, celsius, busy, reasons, healthy, info, energy)

    def _pods(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        meter = self._agent.meter
        if meter is None:
            return
        labels = ["pod", "uid"]
        now = self._agent.clock.monotonic()
        generated = CounterMetricFamily(
            "tokenfactory_agent_generated_tokens", "Counted in closed windows.", labels=labels
        )
        prompt = CounterMetricFamily(
            "tokenfactory_agent_prompt_tokens", "Counted in closed windows.", labels=labels
        )
        joules = CounterMetricFamily(
            "tokenfactory_agent_joules",
            "Drawn by the pod's GPUs in the same windows: divide the rates.",
            labels=labels,
        )
        ratio = GaugeMetricFamily(
            "tokenfactory_agent_tokens_per_joule", "Generated in the last window.", labels=labels
        )
        running = GaugeMetricFamily("tokenfactory_agent_requests_running", "Now.", labels=labels)
        queued = GaugeMetricFamily("tokenfactory_agent_requests_queued", "Now.", labels=labels)
        cache = GaugeMetricFamily("tokenfactory_agent_cache_ratio", "KV cache in use.", labels=labels)
        latency = GaugeMetricFamily(
            "tokenfactory_agent_latency_seconds",
            "95th percentile of the last window.",
            labels=[*labels, "of"],
        )
        for account in meter.accounts.values():
            key, report = [account.pod, account.uid], account.report(now)
            generated.add_metric(key, account.generated_tokens)
            prompt.add_metric(key, account.prompt_tokens)
            joules.add_metric(key, account.millijoules / 1000)
            window = account.last_window
            if window is not None and window.tokens_per_joule is not None:
                ratio.add_metric(key, window.tokens_per_joule)
            running.add_metric(key, report.running)
            queued.add_metric(key, report.queued)
            cache.add_metric(key, report.cache_permille / 1000)
            latency.add_metric([*key, "time_to_first_token"], report.time_to_first_token_ms / 1e3)
            latency.add_metric([*key, "inter_token_latency"], report.inter_token_latency_us / 1e6)
        failures = CounterMetricFamily("tokenfactory_agent_scrape_failures", "Readings that failed.")
        failures.add_metric([], meter.failures)
        unreadable = GaugeMetricFamily("tokenfactory_agent_unreadable_pods", "In the last round.")
        unreadable.add_metric([], len(meter.problems))
        yield from (generated, prompt, joules, ratio, running, queued, cache, latency, failures, unreadable)

    def _self(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        agent = self._agent
        state = agent.state
        mode = GaugeMetricFamily("tokenfactory_agent_mode", "1 for the present mode.", labels=["mode"])
        for each in MODES:
            mode.add_metric([each], float(state.decision is not None and state.decision.mode == each))
        epoch = GaugeMetricFamily(
            "tokenfactory_agent_applied_epoch", "The sheet's epoch that is read back.", labels=["domain"]
        )
        for domain, number in state.memory.acked.items():
            epoch.add_metric([domain], number)
        yield from (mode, epoch)
        deadline = state.decision.next_deadline_ms if state.decision is not None else None
        if deadline is not None:
            left = GaugeMetricFamily(
                "tokenfactory_agent_hold_left_seconds", "Until the fallback, if nothing is heard."
            )
            left.add_metric([], max(0.0, deadline / 1000 - agent.clock.monotonic()))
            yield left
        gauges = {
            "capped": ("1 once every limit was read back in this boot.", float(state.memory.capped)),
            "lemon_score": (
                "How much trouble this node has been; halves every fortnight.",
                state.faults.lemon_score(agent.clock.monotonic()),
            ),
            "hung_gpus": ("GPUs with an NVML call that has not come back.", float(len(agent.stuck))),
            "kubelet_silent": (
                "1 while the kubelet does not say who holds which GPU.",
                float(bool(state.pods_problem)),
            ),
            "late_parts": ("Parts of the agent that make no progress.", float(len(agent.progress.late()))),
        }
        gauges["untuned_gpus"] = (
            "GPUs whose clocks or workload profile are not as asked.",
            float(len(state.untuned)),
        )
        power = state.node_power
        if power.draw_milliwatts is not None:
            gauges["node_power_watts"] = ("What the node's own meter says.", power.draw_milliwatts / 1000)
        if state.metered:
            gauges["node_overhead_watts"] = (
                "Learned: what the node draws besides its GPUs at most; 0 until enough was seen.",
                power.overhead_milliwatts / 1000,
            )
            verdict = GaugeMetricFamily(
                "tokenfactory_agent_node_power",
                "1 for what the condition NodePower says.",
                labels=["node", "reason"],
            )
            for reason in VERDICTS:
                verdict.add_metric([state.name, reason], float(power.verdict == reason))
            yield verdict
        for name, (text, value) in gauges.items():
            family = GaugeMetricFamily(f"tokenfactory_agent_{name}", text)
            family.add_metric([], value)
            yield family
        counters = {
            "steps": ("Rounds of the obeying loop.", state.steps),
            "limit_sets": ("Limits set.", agent.enforcer.sets),
            "limit_resets_found": (
                "Limits found above what was set, and set again.",
                agent.enforcer.resets_found,
            ),
            "node_power_cuts": ("Times that the node drew too much and its caps were lowered.", power.cuts),
            "node_meter_failures": ("Readings of the node's meter that failed.", power.failures),
            "reports": ("Statuses written.", agent.reporter.writes),
            "failed_reports": ("Statuses that could not be written.", agent.reporter.failures),
        }
        for name, (text, count) in counters.items():
            counter = CounterMetricFamily(f"tokenfactory_agent_{name}", text)
            counter.add_metric([], count)
            yield counter
        xids = CounterMetricFamily("tokenfactory_agent_xids", "XID errors seen.", labels=["xid"])
        for code, count in state.faults.xids.items():
            xids.add_metric([str(code)], count)
        yield xids
