"""The numbers of a comparison: measures of each run, their differences seed by seed, and what these tell.

The runs of a seed share data, noise and initial weights, so that a *difference* is that of one seed: with LPL minus
without. If LPL made no difference, each sign would be a coin's throw; *chance* is the probability that so many signs,
or more, are alike (the sign test, two-sided, ties left out).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb
from statistics import mean, stdev
from typing import Any

from lpl.comparison.runs import WITH, Run
from lpl.config.choices import SET_METRICS
from lpl.evaluation.metrics import SMALLER_IS_BETTER
from lpl.evaluation.report import ENERGY, short_names, title
from lpl.tools import layout
from lpl.tools.files import number_entries


UNLIKELY = 0.05  # 6 seeds that agree, or 8 of 9
HELD_OUT = {"validation_loss": "diffusion loss on held-out images", "validation_lpl": "LPL on held-out images"}
CHANCE = "If LPL made no difference, seeds would agree at least this much with a probability of {:g}%."


@dataclass(frozen=True)
class Measure:
    """
    Args:
        better: ``lower``, ``higher``, or None: a number without a good direction, or one that LPL is trained on.
        values: kind of run -> one value per seed.
    """

    title: str
    better: str | None
    values: Mapping[str, Sequence[float]]

    @property
    def name(self) -> str:
        """The title with an arrow in the good direction."""
        return self.title + {None: "", "lower": " ↓", "higher": " ↑"}[self.better]

    def differences(self, base: str) -> list[float]:
        """With LPL minus the base, by seed."""
        return [value - other for value, other in zip(self.values[WITH], self.values[base], strict=True)]

    def changes(self, base: str) -> list[float] | None:
        """The differences as shares of the base's value, by seed; None if a value is not above 0, as a kernel distance
        may be."""
        others = self.values[base]
        if min(*others, *self.values[WITH]) <= 0:
            return None
        return [difference / other for difference, other in zip(self.differences(base), others)]

    def better_in(self, base: str) -> int:
        """In how many seeds LPL is better; without a good direction, in how many its value is lower."""
        return self._signs(base).count(1)

    def worse_in(self, base: str) -> int:
        return self._signs(base).count(-1)

    def _signs(self, base: str) -> list[int]:
        """By seed: 1 where LPL is better, -1 where it is worse, 0 where both are the same to the digits shown."""
        sign, pairs = 1 if self.better == "higher" else -1, zip(self.values[WITH], self.values[base], strict=True)
        return [0 if shown([value]) == shown([other]) else sign if value > other else -sign for value, other in pairs]

    def chance(self, base: str) -> float:
        """Of so many seeds alike, if LPL made no difference."""
        better, worse = self.better_in(base), self.worse_in(base)
        count = better + worse
        return min(1.0, sum(comb(count, many) for many in range(max(better, worse), count + 1)) * 2 / 2**count)


def measures_of(evaluation: Mapping[str, Any], runs: Sequence[Run], first: str | None = None) -> list[Measure]:
    """All measures of the runs, whose labels are those of the evaluation's results.

    Args:
        first: the metric that comes first, through the first network.
    """
    results = {result["label"]: result for result in evaluation["results"]}
    names, kinds = short_names(evaluation), dict.fromkeys(run.kind for run in runs)
    of_kind = {kind: [run for run in runs if run.kind == kind] for kind in kinds}
    found, place = list[Measure](), None
    for network, metrics in results[runs[0].label]["metrics"].items():
        for metric in metrics:
            values = {
                kind: [results[run.label]["metrics"][network][metric]["value"] for run in those]
                for kind, those in of_kind.items()
            }
            several = f", {names[network]}" if len(names) > 1 and metric in SET_METRICS else ""
            better = "lower" if metric in SMALLER_IS_BETTER else "higher"
            place = len(found) if metric == first and place is None else place
            found.append(Measure(title(metric, network) + several, better, values))
    found.insert(0, found.pop(place or 0))
    energy = {kind: [results[run.label]["high_frequency_energy"] for run in those] for kind, those in of_kind.items()}
    real = evaluation["reference"]["high_frequency_energy"]
    found.append(Measure(f"{ENERGY} (real images: {real:.4f})", None, energy))
    logs = {run.label: number_entries(run.folder / layout.LOG) for run in runs}
    for key, words in HELD_OUT.items():
        if all(any(key in entry for entry in log) for log in logs.values()):
            last = {label: [entry[key] for entry in log if key in entry][-1] for label, log in logs.items()}
            found.append(Measure(words, None, {kind: [last[run.label] for run in of_kind[kind]] for kind in kinds}))
    return found


# Words ---------------------------------------------------------------------------------------------------------------


def shown(values: Sequence[float], sign: str = "") -> str:
    """Mean and, of several, the standard deviation.

    >>> shown([12.3456]), shown([1.0, 2.0], "+"), shown([0.5, 0.5])
    ('12.35', '+1.5 ± 0.71', '0.5 ± 0')
    """
    spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):{sign}.4g}{spread}"


def percent(shares: Sequence[float]) -> str:
    """The same of shares, as a percentage.

    >>> percent([-0.123]), percent([0.1, 0.2])
    ('-12.3%', '+15.0 ± 7.1%')
    """
    spread = f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else ""
    return f"{100 * mean(shares):+.1f}{spread}%"


def agreement(measure: Measure, base: str) -> str:
    """In how many seeds LPL is better, or its value lower."""
    seeds, better, worse = len(measure.values[WITH]), measure.better_in(base), measure.worse_in(base)
    good, bad = ("better", "worse") if measure.better else ("lower", "higher")
    if not better and not worse:
        return "equal"
    if seeds == 1:
        return good if better else bad
    return f"{good} in {better} of {seeds}"


def verdict(measures: Sequence[Measure], base: str) -> str:
    """What the differences to the base tell: the first measure, what chance would do, then the others."""
    judged = [measure for measure in measures if measure.better]
    first, seeds = judged[0], len(judged[0].values[WITH])
    better = [measure.title for measure in judged if measure.better_in(base) == seeds]
    worse = [measure.title for measure in judged if measure.worse_in(base) == seeds]
    lists = f"better with LPL: {', '.join(better) or 'nothing'}; worse: {', '.join(worse) or 'nothing'}"
    if seeds == 1:
        return (
            "Not distinguishable with one seed: another seed changes these numbers too, and one pair of runs does not "
            f"show by how much. In this seed {lists}. Give three or more --seeds."
        )
    counted, chance = first.better_in(base), first.chance(base)
    shares = first.changes(base)
    by = shown(first.differences(base), "+") if shares is None else percent(shares)
    way = "better" if counted > first.worse_in(base) else "worse"
    count = counted if way == "better" else first.worse_in(base)
    if count == seeds or chance <= UNLIKELY:
        how = f"all {seeds}" if count == seeds else f"{count} of {seeds}"
        head = f"The {first.title} is {way} with LPL in {how} seeds ({by})."
        if chance > UNLIKELY:
            head += " This is a hint: it takes 6 seeds that agree to make chance unlikely."
    else:
        head = f"Not distinguishable by the {first.title}: with LPL it is better in {counted} of {seeds} seeds."
    return f"{head} {CHANCE.format(round(100 * chance, 1))} In all seeds {lists}."


def as_json(measure: Measure, base: str) -> dict[str, Any]:
    """A row of the table, in types of JSON."""
    differences = measure.differences(base)
    return {
        "better": measure.better,
        "without": list(measure.values[base]),
        "with": list(measure.values[WITH]),
        "differences": differences,
        "mean_difference": mean(differences),
        "spread": stdev(differences) if len(differences) > 1 else None,
        "better_in" if measure.better else "lower_in": measure.better_in(base),
        "seeds": len(differences),
    }
