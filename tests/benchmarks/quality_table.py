"""Table and plot of the results of bench_quality."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

Row = dict[str, Any]
Results = dict[str, Any]


@dataclass(frozen=True)
class Summary:
    """Runs of one setting.

    Attributes:
        num_updates: of a run.
        curve: Frechet distance at every measured part of the time, mean over the runs.
        standard_error: of the last one: over the runs, or of the drawn images for one run.
        bits_per_dim: at the end, mean over the runs.
    """

    num_updates: int
    curve: tuple[float, ...]
    standard_error: float
    bits_per_dim: float

    @classmethod
    def of(cls, results: Results, name: str) -> Self | None:
        """The summary of a setting; None if it has no runs."""
        runs = [r for key, r in results["runs"].items() if key.rpartition(", seed ")[0] == name]
        if not runs:
            return None
        distances = np.array([[row["fd"] for row in rows] for rows in runs])  # (runs, points)
        last = [rows[-1] for rows in runs]
        errors = [row["fd_standard_error"] for row in last]
        if len(runs) > 1:
            errors = [statistics.stdev(distances[:, -1]) / len(runs) ** 0.5]
        return cls(
            num_updates=last[0]["updates"],
            curve=tuple(distances.mean(0)),
            standard_error=errors[0],
            bits_per_dim=statistics.mean(row["bits_per_dim"] for row in last),
        )


def parts(results: Results) -> list[float]:
    """The measured parts of the time: ..., 1/4, 1/2, 1."""
    return [0.5**shift for shift in reversed(range(results["settings"]["points"]))]


def table(results: Results, names: Sequence[str]) -> str:
    """Markdown: a row per setting, with the Frechet distance (FD) at every part of the time."""
    shares, reference = parts(results), Summary.of(results, "stock")
    heads = ["setting", "updates", "ms", *(f"FD at {share:g}" for share in shares[:-1]), "FD"]
    heads += ["bits/dim", *(["FD of stock at"] if reference else [])]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name in names:
        if (found := Summary.of(results, name)) is None:
            continue
        ms = results["costs"][name] * results["costs"]["reference_s"] * 1e3
        *before, last = (f"{distance:,.0f}" for distance in found.curve)
        cells = [name, f"{found.num_updates:,}", f"{ms:.0f}", *before]
        cells += [f"{last} +- {found.standard_error:,.0f}", f"{found.bits_per_dim:.2f}"]
        if reference:
            is_as_good = np.less_equal(found.curve, reference.curve[-1])
            cells.append(f"{shares[is_as_good.argmax()]:g}" if is_as_good.any() else "")
        lines.append(f"| {' | '.join(cells)} |")
    real = results["held_out"]
    return "\n".join([*lines, f"\n{real['num_images']:,} held-out images have {real['fd']:,.0f}."])


def plot(results: Results, names: Sequence[str], path: Path) -> None:
    """Frechet distance over the time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    times = [share * results["settings"]["seconds"] for share in parts(results)]
    for name in names:
        if found := Summary.of(results, name):
            axes.loglog(times, found.curve, "o-", label=name)
    axes.axhline(results["held_out"]["fd"], color="gray", ls="--", label="held-out images")
    axes.set(xlabel="CPU seconds of training", ylabel="Frechet distance")
    axes.set_xticks(times, [f"{seconds:g}" for seconds in times], minor=False)
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
