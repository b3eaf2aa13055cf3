"""How fast many pods are placed on many nodes, and how near to the true optimum.

Random clusters from a seed; the optimum is a MILP solved by HiGHS in the same run.
"""

import os
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.unit.planning.placement.clusters import random_cluster
from tests.unit.planning.placement.oracle import judge, violations

from _report import Figure, report
from tokenfactory.planning.placement.plan import plan_placement

QUICK = os.environ.get("QUICK") == "1"
SEED = int(os.environ.get("SEED", "0"))
CLUSTERS = 25 if QUICK else 200
ROUNDS = 5 if QUICK else 15


def seconds(*, gangs: bool, scarce: float) -> tuple[float, float, int]:
    """Of some rounds the median by the clock and the least of the CPU, and how many limits the plan breaks."""
    snapshot = random_cluster(SEED, nodes=1_000, pods=500, models=12, gangs=gangs, scarce=scarce)
    broken = len(violations(snapshot, plan_placement(snapshot)))
    cpu, clock = [], []
    for _ in range(ROUNDS):
        begin, begin_cpu = time.perf_counter(), time.process_time()
        plan_placement(snapshot)
        cpu.append(time.process_time() - begin_cpu)
        clock.append(time.perf_counter() - begin)
    return median(clock), min(cpu), broken


def main() -> None:
    print(f"seed {SEED}; {CLUSTERS} clusters against HiGHS; 1,000 nodes and 500 pods, median of {ROUNDS}")
    shares, worst_bands, broken = [], [], 0
    for seed in range(SEED, SEED + CLUSTERS):
        snapshot = random_cluster(
            seed, nodes=6 + seed % 7, pods=10 + seed % 13, scarce=0.4 + 0.1 * (seed % 4)
        )
        plan = plan_placement(snapshot)
        broken += len(violations(snapshot, plan))
        verdict = judge(snapshot, plan)
        shares.append(verdict.share)
        worst_bands.append(verdict.worst_band)
    figures = []
    figures.append(Figure("value_of_optimum_worst_cluster", min(shares), "ratio", ">= 0.98"))
    figures.append(Figure("value_of_optimum_mean", sum(shares) / len(shares), "ratio", ">= 0.98"))
    within = sum(b >= 0.98 for b in worst_bands) / CLUSTERS
    figures.append(Figure("every_band_within_2_percent", within, "ratio", ">= 0.97"))
    for name, gangs, scarce in (
        ("ample_watts", False, 1.5),
        ("scarce_watts", False, 0.5),
        ("replicas_that_span_nodes", True, 1.5),
    ):
        clock, cpu, over = seconds(gangs=gangs, scarce=scarce)
        broken += over
        figures.append(Figure(f"seconds_1000_nodes_500_pods_{name}", clock, "s", "<= 0.2"))
        figures.append(Figure(f"cpu_seconds_{name}", cpu, "s"))
    figures.append(Figure("limits_broken", broken, "count", "<= 0"))
    report("placement", figures)


if __name__ == "__main__":
    main()
