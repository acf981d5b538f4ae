"""What the parts of bench-report share."""

import csv
import re
import statistics
from collections import defaultdict

SEVERAL = "on {processors} processors side by side, each an instruction a nanosecond{but}"


def medians(path, keys, columns):
    """The median of each column over the lines that agree on the keys, in order of appearance."""
    lines = defaultdict(list)
    with open(path, newline="") as file:
        for line in csv.DictReader(file):
            lines[tuple(line[k] for k in keys)].append([float(line[c]) for c in columns])
    return {
        key: {c: statistics.median(values) for c, values in zip(columns, zip(*many))}
        | {"spread": max(v[0] for v in many) / max(min(v[0] for v in many), 1e-9)}
        for key, many in lines.items()
    }


def table(head, rows):
    lines = [head, ["---"] + ["--:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def amount(workload, cell):
    """Megabytes a second for large requests, requests a second for small ones and transactions."""
    if not workload.startswith(("128k", "1M")):
        return f"{cell['iops']:.0f}"
    return f"{cell['bytes_per_second'] / 1e6:.0f} MB/s"


class Bars:
    """What was promised, and what was measured."""

    def __init__(self):
        self.rows, self.missed = [], 0

    def add(self, what, value, least=None, most=None, unit="×"):
        if value is None:
            self.rows.append([what, "not measured", "", ""])
            return
        if least is None and most is None:
            self.rows.append([what, f"{value:.2f}{unit}", "", ""])
            return
        met = value >= least if least is not None else value <= most
        self.missed += not met
        bar = f"≥ {least}{unit}" if least is not None else f"≤ {most}{unit}"
        self.rows.append([what, f"{value:.2f}{unit}", bar, "met" if met else "**missed**"])


def guest_of(folder):
    """What machine.txt says of the guest: its processors, in words, and the pace of its hash where that has one of its own."""
    machine = (folder / "machine.txt").read_text() if (folder / "machine.txt").exists() else ""
    several = re.search(r"^guest: .* (\d+) processors", machine, re.MULTILINE)
    processors = several[1] if several else "2"
    processors = {"1": "one", "2": "two", "4": "four", "8": "eight"}.get(processors, processors)
    pace = re.search(r"^paced: (.*)$", machine, re.MULTILINE)
    return {"processors": processors, "Processors": processors.capitalize(), "but": f", but {pace[1]}" if pace else ""}
