"""bench-report's main table, of `scripts/bench paced`."""

from bench_table import SEVERAL, guest_of, medians, table

MODES = ("journal", "nojournal")
SHORT = {"raw": "disk itself", "ours": "ours", "journal": "journal", "nojournal": "no journal", "rublk": "rublk loop"}
# Disk and workload: at least so many times the speed of dm-integrity's journal mode.
SYNCED = {("drive", "4k fsync mix x4"): 1.05, ("cached", "4k fsync mix x4"): 1.3, ("cached", "sqlite commit"): 1.2}


def paced_bars(bars, disk, workload, at):
    """What is asked for of a row of the main table."""
    what = f"paced, {disk}: {workload}"
    ratio = {t: at["ours"]["iops"] / at[t]["iops"] for t in at if t != "ours"}
    if (disk, workload) in SYNCED and "journal" in ratio:
        bars.add(f"{what}, to dm-integrity's journal mode", ratio["journal"], least=SYNCED[disk, workload])
    if workload == "4k cold read d32" and any(t in ratio for t in MODES):
        bars.add(f"{what}, to dm-integrity", min(ratio[t] for t in MODES if t in ratio), least=0.8)
    if workload == "4k read d1" and "rublk" in ratio:
        bars.add(f"{what}, to rublk's loop target", ratio["rublk"], least=0.9)
    for of in ("read", "write"):
        theirs = max((at[t][f"p99_{of}_us"] for t in (*MODES, "rublk") if t in at), default=0)
        if theirs > 0:
            bars.add(f"{what}, 99th percentile of {of}s, to the slowest of the others", at["ours"][f"p99_{of}_us"] / theirs, most=1.5)


def report_paced(folder, bars):
    """The main table: speeds by the clock of the paced guest, and the 99th percentile."""
    p99 = ["p99_read_us", "p99_write_us", "p99_sync_us"]
    cells = medians(folder / "paced.csv", ["disk", "workload", "target"], ["iops", *p99])
    times = medians(folder / "paced-disks.csv", ["disk"], ["read_us", "write_us", "flush_us"])
    text = "\n## By the clock of a paced guest\n\nMeasured " + SEVERAL.format(**guest_of(folder)) + ".\n"
    for disk in dict.fromkeys(k[0] for k in cells):
        at = {w: {t: cells[disk, w, t] for t in SHORT if (disk, w, t) in cells} for d, w, _ in cells if d == disk}
        targets = [t for t in SHORT if any(t in row for row in at.values())]
        modes = [t for t in MODES if t in targets]
        took = ", ".join(f"a {of} {times[disk,][f'{of}_us']:.0f} µs" for of in ("read", "write", "flush"))
        text += f"\n### {disk}\n\nThe disk itself, one access of 4 KiB after the other: {took}.\n\n"
        rows, tails = [], []
        for w, row in at.items():
            speeds = [f"{row[t]['iops']:.0f}" if t in row else "" for t in targets]
            ratio = [f"{row['ours']['iops'] / row[t]['iops']:.2f}" if {"ours", t} <= row.keys() else "" for t in modes]
            rows.append([w, *speeds, *ratio, f"{max(cell['spread'] for cell in row.values()):.2f}"])
            for column, of in zip(p99, ("reads", "writes", "fsyncs")):
                if any(cell[column] > 0 for cell in row.values()):
                    tails.append([f"{w}, {of}", *(f"{row[t][column] / 1e3:.2f}" if t in row else "" for t in targets)])
            if "ours" in row:
                paced_bars(bars, disk, w, row)
        names = [SHORT[t] for t in targets]
        text += "A second: requests, or transactions. The spread is the largest of a row (largest / smallest repetition).\n\n"
        text += table(["", *names, *(f"ours to {SHORT[t]}" for t in modes), "spread"], rows)
        text += "\nMilliseconds at the 99th percentile.\n\n" + table(["", *names], tails)
    return text
