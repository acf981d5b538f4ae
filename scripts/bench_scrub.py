"""bench-report's table of `scripts/bench scrub`."""

import csv
import statistics
from collections import defaultdict

from bench_table import SEVERAL, guest_of, table

# What a pass may take of the requests of a load beside it, and by how much it may lengthen the 99th percentile. One that was
# given a rate shall not be noticed: that much is noise.
BARS = {"full": (0.8, 1.3)}
UNNOTICED = (0.95, 1.1)


def report_scrub(folder, bars):
    """What passes cost who reads meanwhile: each pair by itself, and of the pairs the median."""
    pairs = defaultdict(dict)
    with open(folder / "scrub.csv", newline="") as file:
        for line in csv.DictReader(file):
            pairs[line["rate"], line["workload"], line["turn"]][line["with"]] = line
    ratios = defaultdict(list)
    for (rate, workload, _), pair in pairs.items():
        if {"alone", "beside"} <= pair.keys():
            alone, beside = ({c: float(pair[w][c]) for c in ("iops", "p99_us", "passed_bytes_per_second")} for w in ("alone", "beside"))
            ratios[rate, workload].append(
                (beside["iops"] / alone["iops"], beside["p99_us"] / alone["p99_us"], beside["passed_bytes_per_second"] / 1e6, alone["iops"])
            )
    rows = []
    for (rate, workload), each in ratios.items():
        speed, tail, passed, alone = (statistics.median(column) for column in zip(*each))
        spread = max(e[0] for e in each) / min(e[0] for e in each)
        rows.append([f"{workload}, {rate}", f"{alone:.0f}", f"{speed:.2f}", f"{tail:.2f}", f"{passed:.1f} MB/s", f"{spread:.2f}"])
        least, most = BARS.get(rate, UNNOTICED)
        at = "at full rate" if rate == "full" else f"at {rate} a second"
        bars.add(f"beside passes {at}, {workload}: requests", speed, least=least)
        bars.add(f"beside passes {at}, {workload}: 99th percentile", tail, most=most)
    text = "\n## Beside passes over the volume\n\nMeasured " + SEVERAL.format(**guest_of(folder))
    text += ". Ratios of a load beside passes to the same alone, medians of pairs.\n\n"
    return text + table(["", "alone, a second", "requests", "99th percentile", "passed", "spread of pairs"], rows)
