"""bench-report's table of `scripts/bench anchor`."""

import csv
import re
import statistics
from collections import defaultdict

from bench_table import SEVERAL, guest_of, medians, table

# Told each second it shall not be noticed. Told before each flush is answered, where what a flush waits for anyway takes nine times as
# long as the record and the anchor's write.
INTERVAL, FLUSH, TIMES = 0.98, 0.9, 9


def work_us(workload, cell):
    """What lies between two flushes of a job, its flush included; None where there are none. Each second request of a mix is a write,
    and each write has a flush."""
    if each := re.search(r"fsync each (\d+)", workload):
        return int(each[1]) * 1e6 / cell
    if mix := re.search(r"fsync mix x(\d+)", workload):
        return int(mix[1]) * 2e6 / cell
    return None


def report_anchor(folder, bars):
    """What an anchor costs: each turn by itself, and of the turns the median."""
    turns = defaultdict(dict)
    with open(folder / "anchor.csv", newline="") as file:
        for line in csv.DictReader(file):
            turns[line["workload"], line["turn"]][line["with"]] = line
    disk = medians(folder / "anchor-disks.csv", ["disk"], ["write_us", "flush_us"])["anchor",]
    added = 2 * disk["write_us"]  # a record, then the anchor: each is one durable write
    ratios = defaultdict(list)
    for (workload, _), cells in turns.items():
        for of in ("interval", "flush"):
            if {"without", of} <= cells.keys():
                speeds = [float(cells[w]["iops"]) for w in ("without", of)]
                tails = [float(cells[w]["p99_sync_us"]) or float(cells[w]["p99_us"]) for w in ("without", of)]
                ratios[workload, of].append((speeds[1] / speeds[0], tails[1] / max(tails[0], 1), float(cells[of]["told"]), speeds[0]))
    rows = []
    for (workload, of), each in ratios.items():
        speed, tail, told, alone = (statistics.median(column) for column in zip(*each))
        spread = max(e[0] for e in each) / min(e[0] for e in each)
        rows.append([f"{workload}, {of}", f"{alone:.0f}", f"{speed:.2f}", f"{tail:.2f}", f"{told:.0f}", f"{spread:.2f}"])
        work = work_us(workload, alone)
        what = f"with an anchor, {of}, {workload}"
        if of == "interval":
            bars.add(what, speed, least=INTERVAL)
        elif work is None or work >= TIMES * added:
            bars.add(what, speed, least=FLUSH)
        else:
            bars.add(f"{what}: {work:.0f} µs to a flush, {added:.0f} µs for record and anchor", speed)
    text = "\n## With an anchor\n\nMeasured " + SEVERAL.format(**guest_of(folder))
    text += f". An access of the anchor's drive: a write {disk['write_us']:.0f} µs. Ratios of a load on a volume with an anchor to the same"
    text += " on one without, medians of turns. The tail is that of the flushes, where there are any.\n\n"
    return text + table(["", "without, a second", "with", "99th percentile", "told", "spread of turns"], rows)
