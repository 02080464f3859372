"""Statistics of interleaved rounds: every figure is a ratio to the reference of its own round, never an absolute rate."""
import dataclasses
import statistics


@dataclasses.dataclass(frozen=True)
class Summary:
    """Median and range of `count` values."""
    median: float
    least: float
    most: float
    count: int

    def __str__(self):
        return f"{self.median:.3f} ({self.least:.3f}–{self.most:.3f})"


def summary(values):
    """The summary of at least one value."""
    values = list(values)
    if not values:
        raise ValueError("a summary needs at least one value")
    return Summary(statistics.median(values), min(values), max(values), len(values))


def paired_ratios(rounds, contestant, reference):
    """`contestant` over `reference`, for each round in which both ran.

    `rounds` is a list of {name: rate}. Rates of different rounds are never compared: the drive drifts by a factor
    of two within minutes, and only what ran side by side can be set against each other.
    """
    return [r[contestant] / r[reference] for r in rounds if contestant in r and reference in r]
