"""Figures of benches/load as Markdown."""
import statistics

from harness import stats

MIB, GIB = 1 << 20, 1 << 30


def attach_timings(document):
    """The milliseconds by phase that `lodestream --json attach` prints."""
    return {phase: float(value) for phase, value in document["timings_ms"].items()}


def per_gib(run, seconds):
    return seconds / (run["bytes"] / GIB)


def table(header, rows):
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def load_rows(figures):
    for name, runs in figures["loads"].items():
        if not runs or not figures["ratios"][name]:
            continue
        cpu = stats.summary(per_gib(run, run["cpu_seconds"]) for run in runs)
        fills = [per_gib(run, run["pool_fill_cpu_seconds"]) for run in runs if run["pool_fill_cpu_seconds"]]
        yield (name, str(stats.summary(figures["ratios"][name])), str(cpu),
               f"{statistics.median(fills):.3f}" if fills else "–", split(runs), runs[0]["reader"])


def split(runs):
    """Shares of the bytes by the path they took, over all runs."""
    totals = {}
    for run in runs:
        for path, size in run["path"].items():
            totals[path] = totals.get(path, 0) + size
    whole = sum(totals.values()) or 1
    return ", ".join(f"{path} {100 * size / whole:.1f} %" for path, size in sorted(totals.items()) if size)


def phase_rows(figures):
    for name, runs in figures["loads"].items():
        if runs:
            phases = sorted({phase for run in runs for phase in run["phases"]})
            yield (name, ", ".join(
                f"{phase} {statistics.median(per_gib(run, run['phases'].get(phase, 0.0)) for run in runs):.3f}"
                for phase in phases))


def memory_rows(figures):
    runs = [run for runs in figures["loads"].values() for run in runs]
    for label, key in (("idle, budget set", "own_idle_bytes"), ("after a load", "own_after_bytes")):
        if runs:
            values = [run[key] / MIB for run in runs]
            yield (label, f"{statistics.median(values):.1f}", f"{max(values):.1f}")


def attach_rows(figures):
    for name, phases in figures["attach_ms"].items():
        for phase, values in phases.items():
            yield (name, phase, f"{statistics.median(values):.2f}", f"{max(values):.2f}")


def markdown(figures):
    parts = [
        f"# Cold loads into the host tier, {figures['date']}",
        f"Written by `{figures['command']}`; {figures['version']}. {len(figures['rounds'])} shuffled rounds, a fresh "
        f"random model of {figures['model_bytes'] / GIB:.1f} GiB in 4 shards, 300 tensors. Every byte is checksummed "
        f"and the model is kept. Cold by `{figures['cold_by']}`; a holder keeps {figures['holder_bytes'] / GIB:.0f} GiB "
        "touched and frees it just before each timed run.",
        table(("machine", ""), list(figures["machine"].items())
              + [("changed for the run", "; ".join(figures["machine_changes"]) or "nothing")]),
        f"Reference: `fio` O_DIRECT sequential read at its best setting, {figures['fio']['setting']}; its median here "
        f"was {figures['fio']['median_gb_per_s']:.2f} GB/s. Figures are medians (least–most).",
        "## Ratio to fio of the same round",
        table(("memory", "ratio", "CPU-s/GiB of the daemon", "CPU-s/GiB to fill the pool beforehand", "path", "reader"),
              load_rows(figures)),
        "CPU is utime + stime of the whole process from before to after the load: reading, checksums, page faults.",
        "## Seconds per GiB of the data-plane threads",
        table(("memory", "by phase, median"), phase_rows(figures)),
        "## The daemon's own memory, MiB",
        "RssAnon + RssFile: without regions and ready pool, with staging"
        + staging(figures) + ".",
        table(("when", "median", "most"), memory_rows(figures)),
    ]
    if figures["attach_ms"]:
        parts += ["## Attach of a resident model of 300 tensors, Rust client, ms",
                  table(("model", "phase", "median", "most"), attach_rows(figures))]
    if figures["skipped"]:
        parts += ["## Not measured", table(("what", "why"), list(figures["skipped"].items()))]
    return "\n\n".join(parts) + "\n"


def staging(figures):
    sizes = {run["staging_bytes"] for runs in figures["loads"].values() for run in runs}
    return f" ({max(sizes) / MIB:.0f} MiB configured)" if sizes else ""
