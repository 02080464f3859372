"""Figures of benches/versus as Markdown and as a picture."""
import html
import statistics

from harness import stats
from harness.report import table

MIB, GIB = 1 << 20, 1 << 30
FIO = "fio"
TOUCHES = {"views": "to all views", "pages": "each page touched", "bytes": "every byte read"}


def median(values, digits):
    values = list(values)
    return f"{statistics.median(values):.{digits}f}" if values else "–"


def runs(rounds, name):
    return [results[name] for results in rounds if name in results]


def ratios(rounds, name):
    """Rates over that of fio in the same round."""
    rates = [{key: result["bytes"] / result["seconds"] for key, result in results.items()} for results in rounds]
    return stats.paired_ratios(rates, name, FIO)


def names(rounds):
    return sorted({name for results in rounds for name in results})


def cold_rows(rounds):
    ordered = sorted((name for name in names(rounds) if name != FIO), key=lambda name: -statistics.median(ratios(rounds, name)))
    for name in [FIO, *ordered]:
        found = runs(rounds, name)
        peak = [run["peak_rss_bytes"] / MIB for run in found if "peak_rss_bytes" in run]
        yield (name, "1" if name == FIO else str(stats.summary(ratios(rounds, name))),
               median((run["seconds"] for run in found), 2),
               median((run["bytes"] / run["seconds"] / 1e9 for run in found), 2),
               median((run["cpu_seconds"] / (run["bytes"] / GIB) for run in found), 3), median(peak, 0))


def warm_rows(rounds):
    for name in sorted(names(rounds), key=lambda name: statistics.median(run["seconds"] for run in runs(rounds, name))):
        found = runs(rounds, name)
        yield (name, median((run["seconds"] * 1e3 for run in found), 1),
               median((run["cpu_seconds"] / (run["bytes"] / GIB) for run in found), 3),
               median((run["peak_rss_bytes"] / MIB for run in found), 0))


def second_rows(rounds):
    def milliseconds(name, touch):
        return [run[touch]["seconds"] * 1e3 for run in runs(rounds, name)]

    for name in sorted(names(rounds), key=lambda name: statistics.median(milliseconds(name, "pages"))):
        yield (name, *(median(milliseconds(name, touch), 1) for touch in TOUCHES))


def plot(figures):
    """Bars: ratio to fio of cold loads whose tensors are kept."""
    rounds = figures["rounds"]["cold, kept"]
    bars = sorted(((statistics.median(ratios(rounds, name)), name) for name in names(rounds) if name != FIO), reverse=True)
    left, width, step = 230, 420, 24
    height = step * len(bars) + 40
    scale = width / max([1.0, *(value for value, _ in bars)])
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 60} {height}" '
             'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="#fff"/>']
    for place, (value, name) in enumerate(bars):
        y = 10 + place * step
        colour = "#0b7285" if name.startswith("Lodestream") else "#adb5bd"
        lines.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{html.escape(name)}</text>'
                     f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="{step - 8}" fill="{colour}"/>'
                     f'<text x="{left + value * scale + 5:.1f}" y="{y + 13}">{value:.2f}</text>')
    lines.append(f'<line x1="{left + scale:.1f}" x2="{left + scale:.1f}" y1="4" y2="{height - 26}" stroke="#495057" '
                 f'stroke-dasharray="4 3"/><text x="{left}" y="{height - 8}">cold load, tensors kept: rate over that of fio '
                 "in the same round (dashed: fio)</text></svg>")
    return "\n".join(lines) + "\n"


def markdown(figures, picture):
    rounds = figures["rounds"]
    parts = [
        f"# Lodestream and other loaders, {figures['date']}",
        f"Written by `{figures['command']}`. {len(rounds['cold, kept'])} shuffled rounds; a fresh random model of "
        f"{figures['model_bytes'] / GIB:.1f} GiB in 4 shards, 300 tensors; PyTorch tensors on the CPU. A holder keeps "
        f"{figures['holder_bytes'] / GIB:.0f} GiB touched and frees it just before each timed run. Medians (least–most).",
        "“Huge pages”: with `GLIBC_TUNABLES=glibc.malloc.hugetlb=1 THP_MEM_ALLOC_ENABLE=1`. "
        f"Lodestream's regions: {figures['pages']} pages; it checksums every byte, the others do not.",
        table(("machine", ""), list(figures["machine"].items())
              + [("changed for the run", "; ".join(figures["machine_changes"]) or "nothing"), ("fio", figures["fio"])]),
        f"![cold loads]({picture})",
    ]
    header = ("loader", "ratio to fio", "s", "GB/s", "CPU-s/GiB", "peak RSS MiB")
    for question, text in (("cold, kept", "Cold, tensors kept"), ("cold, thrown", "Cold, tensors thrown away")):
        if any(rounds[question]):
            parts += [f"## {text}", "Each page of each tensor is touched.", table(header, cold_rows(rounds[question]))]
    if any(rounds["warm"]):
        parts += ["## Warm", "The files are in the page cache; for Lodestream the model is resident. A fresh process, each page "
                  "touched.", table(("loader", "ms", "CPU-s/GiB", "peak RSS MiB"), warm_rows(rounds["warm"]))]
    if any(rounds["second"]):
        parts += ["## Second consumer", "Another process holds the model. Milliseconds.",
                  table(("loader", *TOUCHES.values()), second_rows(rounds["second"]))]
    if figures["skipped"]:
        parts += ["## Not run", table(("loader", "why"), [(name, f"`{why}`") for name, why in figures["skipped"].items()])]
    parts += ["Versions: " + ", ".join(f"`{line}`" for line in figures["versions"] if "==" in line) + "."]
    return "\n\n".join(parts) + "\n"
