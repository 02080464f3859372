"""Whether something leaks, from samples over time; and the page of benches/soak."""
import dataclasses
import statistics

from harness.report import MIB, table

# Of the time that is judged, this much at its begin is not: allocators and caches grow into their size.
WARM_UP_SHARE = 0.1
# Samples that a quarter needs at least for its median to say something.
QUARTER_SAMPLES_MIN = 3
# Gauges that say what is configured or running, not what is in use. All others are zero when nobody is there.
CONSTANT_GAUGES = ("lodestream_budget_bytes", "lodestream_build_info", "lodestream_direct_", "lodestream_gpu_",
                   "lodestream_pages_info", "lodestream_pool_bytes", "lodestream_reader_info",
                   "lodestream_start_time_seconds")


@dataclasses.dataclass(frozen=True)
class Watched:
    """A figure of the samples. `limit`: how much higher its median may be in the last quarter than in the first."""
    name: str
    words: str
    limit: int
    unit: int = 1


DAEMON = (
    Watched("daemon_own_bytes", "memory without regions, MiB", 4 * MIB, MIB),
    Watched("daemon_fds", "descriptors", 8),
    # Threads for blocking file work come with the requests and go when they are idle.
    Watched("daemon_threads", "threads", 4),
    Watched("connections", "connections", 4),
    Watched("leases", "leases", 4),
)
RESIDENT = (
    Watched("resident_own_bytes", "memory without regions, MiB", 4 * MIB, MIB),
    Watched("resident_fds", "descriptors", 2),
    # What the allocator maps for threads that come and go is among them.
    Watched("resident_mappings", "mappings", 16),
    Watched("resident_threads", "threads", 1),
)


@dataclasses.dataclass(frozen=True)
class Judged:
    """The medians of the four quarters of a figure."""
    watched: Watched
    quarters: tuple

    @property
    def growth(self):
        return self.quarters[3] - self.quarters[0]

    @property
    def leaks(self):
        return self.growth > self.watched.limit


def judge(samples, watched):
    """The verdict on one figure of `samples`, dicts in the order of their time. ValueError if there are too few."""
    values = [sample[watched.name] for sample in samples if sample.get(watched.name) is not None]
    values = values[int(len(values) * WARM_UP_SHARE):]
    count = len(values)
    cuts = [count * quarter // 4 for quarter in range(5)]
    quarters = [values[begin:end] for begin, end in zip(cuts, cuts[1:])]
    if min(map(len, quarters)) < QUARTER_SAMPLES_MIN:
        raise ValueError(f"{count} samples of {watched.name} are too few for a verdict")
    return Judged(watched, tuple(statistics.median(quarter) for quarter in quarters))


def gauges(page):
    """{series: value} of the gauges of a metrics page that are zero when nobody is there."""
    names = {line.split()[2] for line in page.splitlines() if line.startswith("# TYPE ") and line.endswith(" gauge")}
    values = {}
    for line in page.splitlines():
        series, _, value = line.rpartition(" ")
        name = series.partition("{")[0]
        if name in names and not name.startswith(CONSTANT_GAUGES):
            values[series] = float(value)
    return values


def counters(page, families):
    """{series: value} of the counters of these families that are not zero."""
    series = (line.rpartition(" ") for line in page.splitlines() if line.startswith(tuple(f"{name}{{" for name in families)))
    return {name: float(value) for name, _, value in series if float(value)}


def judged_rows(judged):
    for one in judged:
        unit = one.watched.unit
        shown = [f"{quarter / unit:.1f}" for quarter in one.quarters]
        yield (one.watched.words, *shown, f"{one.growth / unit:+.1f}", f"{one.watched.limit / unit:+.0f}",
               "**grows**" if one.leaks else "ok")


def defects(figures, judged):
    """All that must not be, one line each; none: the run has passed."""
    lines = list(figures["defects"])
    lines += [f"{one.watched.name} grew by {one.growth}" for ones in judged.values() for one in ones if one.leaks]
    lines += [f"{series} was {value:g} when nobody was there any more"
              for series, value in figures["end"]["gauges"].items() if value]
    return lines


def markdown(figures, judged):
    wrong = defects(figures, judged)
    header = ("figure", "1st quarter", "2nd", "3rd", "last", "growth", "limit", "")
    end = figures["end"]
    parts = [
        f"# Python processes against one daemon, {figures['date']}",
        f"Written by `{figures['command']}`; {figures['version']}, through the wheel. "
        + ("**Passed**: no leak, no wrong byte, no error without a code." if not wrong
           else f"**{len(wrong)} defects**, listed below."),
        f"For {figures['minutes']:g} minutes, processes attached to {figures['models']} models of "
        f"{figures['model_bytes'] / MIB:.0f} MiB in a host tier of {figures['budget_bytes'] / MIB:.0f} MiB, which do not all "
        "fit: they were read and compared byte by byte with what the writing that their metadata names has, evicted, and "
        "replaced by other bytes meanwhile. The daemon was restarted "
        f"{len(figures['restarts'])} times in the first third ({', '.join(figures['restarts'])}), with processes attached that read on; "
        "then one daemon ran to the end, and is judged. One Python process ran all the time, attaching and letting go. All "
        f"together took {figures['cpu_share']:.2f} of a core; nothing here is about speed.",
        table(("machine", ""), list(figures["machine"].items())),
        "## What was done",
        table(("process", "how it ended", "number"), [
            (act, ending, str(count)) for act, endings in sorted(figures["acts"].items())
            for ending, count in sorted(endings.items())]),
        f"Models replaced: {figures['replaced']}. Bytes compared: {figures['verified_bytes'] / (1 << 30):.1f} GiB, in "
        f"{figures['resident_rounds']} rounds of the long-lived process and in the others.",
        "Refusals that clients saw and went on from, by code:",
        table(("code", "number"), [(code, str(count)) for code, count in sorted(figures["codes"].items())]),
        "## Leaks",
        f"Medians of the quarters of the time, without its first {WARM_UP_SHARE:.0%}, sampled every {figures['every']:g} s. A leak: "
        "the last is above the first by more than the limit. Memory is RssAnon + RssFile: without regions, which are shared.",
        f"The daemon, for {figures['judged_minutes']:.1f} minutes, in which it counted:",
        table(("counter", "value"), [(f"`{series}`", f"{value:.0f}") for series, value in sorted(end["counters"].items())]),
        table(header, judged_rows(judged["daemon"])),
        f"The long-lived Python process, for {figures['minutes']:g} minutes:",
        table(header, judged_rows(judged["resident"])),
        "## When nobody was there any more",
        f"{len(end['gauges'])} gauges, of which {sum(map(bool, end['gauges'].values()))} not zero. The daemon: "
        f"{end['fds']} descriptors ({end['fds_before']} before its first client), {end['threads']} threads "
        f"({end['threads_before']}). The long-lived process: {end['regions_mapped']} regions mapped.",
    ]
    if wrong:
        parts += ["## Defects", "\n".join(f"- {line}" for line in wrong)]
    return "\n\n".join(parts) + "\n"
