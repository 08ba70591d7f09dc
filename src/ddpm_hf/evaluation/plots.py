"""Plots of the bound (2006.11239, section 4.3), of a calibration, and of a comparison."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ddpm_hf.evaluation.calibration_results import CalibrationCurve
from ddpm_hf.evaluation.comparison_results import (
    Comparison,
    ComparisonRow,
    RankedFigure,
    Sweep,
    sampler_labels,
    setting_labels,
)
from ddpm_hf.evaluation.figures import BoundResult
from ddpm_hf.evaluation.metrics import LOWER_IS_BETTER


def plot_terms(bound: BoundResult, path: Path) -> None:
    """Bits/dim of each timestep, with the decoder marked."""
    timesteps, terms, is_measured = terms_where_measured(bound)
    is_kl = is_measured & (np.arange(len(terms)) < len(terms) - 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(timesteps[is_kl], terms[is_kl], _style(bound), markersize=3, label="KL")
    label = f"decoder, {terms[-1]:.3g}"
    axes.semilogy(timesteps[-1:], terms[-1:], "D", color="tab:orange", label=label)
    axes.set(xlabel="timestep t", ylabel="bits/dim")
    axes.set_title(f"Terms of the bound: {bound.value:.3f} bits/dim in total", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def terms_where_measured(bound: BoundResult) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps, mean of the measurements of each term, and whether there are any.

    With importance-sampled timesteps these means are less noisy than `terms`, whose sum is
    unbiased.
    """
    num_measured = np.array(bound.num_measured)
    expected = bound.num_images * np.array(bound.num_expected)
    terms = np.array(bound.terms) * expected / num_measured.clip(1)
    return np.array(bound.timesteps), terms, num_measured > 0


def _style(bound: BoundResult) -> str:
    """A line if each image measures all terms; dots if each timestep has its own images."""
    return "." if bound.num_timesteps < bound.num_inference_steps else ".-"


def rate_distortion(bound: BoundResult) -> tuple[np.ndarray, np.ndarray]:
    """Rate and distortion of progressive lossy compression, before each timestep (figure 5).

    Returns:
        rate, the bits/dim that transmit x_t; distortion, the root mean squared error of the
        estimate of x_0 from x_t, in levels of the image; unmeasured timesteps are omitted.
    """
    mse = np.array(bound.x_0_mse, dtype=float)
    terms = np.array(bound.terms)
    rate = bound.parts.prior.value + np.concatenate([[0], terms[:-1].cumsum()])
    distortion = np.sqrt(mse) * (2**bound.bit_depth - 1) / 2
    is_measured = np.isfinite(distortion)
    return rate[is_measured], distortion[is_measured]


def plot_rate_distortion(bound: BoundResult, path: Path) -> None:
    """Distortion against rate; the bits of the decoder would bring the distortion to 0."""
    rate, distortion = rate_distortion(bound)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rate, distortion, _style(bound), markersize=3)
    top = 2**bound.bit_depth - 1
    axes.set(xlabel="rate (bits/dim)", ylabel=f"distortion (RMSE, levels of 0..{top:,})")
    axes.set_ylim(0, 1.05 * distortion.max())
    axes.set_title(
        f"Rate {rate[-1]:.3f} bits/dim, distortion {distortion[-1]:.2f} at the last step",
        fontsize=11,
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def plot_calibration(curve: CalibrationCurve, path: Path) -> None:
    """Bits/dim against the number of steps, and the error curve that they follow from."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _plot_steps(left, curve)
    mse = np.array(curve.x_0_mse)
    error = np.array(curve.standard_error, dtype=float)
    t = np.arange(len(mse))
    right.semilogy(t, mse, linewidth=1)
    right.fill_between(t, (mse - 2 * error).clip(mse / 10), mse + 2 * error, alpha=0.3)
    right.set(xlabel="timestep t", ylabel="mean squared error of x_0")
    right.set_title("Error of the network, +- 2 standard errors", fontsize=11)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower left", fontsize=9, ncols=3)
    figure.savefig(path, dpi=130)


def _plot_steps(axes: Any, curve: CalibrationCurve) -> None:
    """Bits/dim against K; the axes show the calibrated curves completely."""
    rows = [row.to_dict() for row in curve.steps]
    steps = [row["num_inference_steps"] for row in rows]
    labels = {
        "published": "as published",
        "bits_per_dim": "calibrated variances",
        "at_best_timesteps": "calibrated, timesteps best for the bound",
    }
    curves = {key: [row[key] for row in rows] for key in labels if key in rows[0]}
    calibrated = [value for key in curves if key != "published" for value in curves[key]]
    highest, lowest = max(calibrated), min(calibrated)
    top = 2 * highest - lowest + 0.01
    for key, values in curves.items():
        above = f" ({min(values):.3g} and more, above the axes)" if min(values) > top else ""
        axes.semilogx(steps, values, ".-", label=labels[key] + above)
    axes.set_ylim(lowest - 0.1 * (highest - lowest) - 0.01, top)
    axes.set(xlabel="steps K", ylabel="bits/dim", xticks=steps, xticklabels=steps)
    axes.minorticks_off()
    axes.set_title("Loss with few steps", fontsize=11)


_AXES = {"num_inference_steps": "steps K", "seconds_per_image": "seconds per image"}
# Times of equal work differ by about as much on a busy machine.
_NOISE_OF_TIMES = 1.5
_DODGE = 1.03  # factor between the positions of two curves at one K, which separates their bars


def plot_comparison(comparison: Comparison | Sweep, path: Path) -> None:
    """Each figure against steps and seconds, with intervals; without steps, against settings.

    The band is the interval of the best setting, the dashed line the figure of real images.
    """
    rows = comparison.settings
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    keys = [key for key in _AXES if _spread(rows, key) > (_NOISE_OF_TIMES if key[0] == "s" else 1)]
    if "num_inference_steps" not in keys:
        keys = ["setting"]
    curves = _curves(rows) if keys != ["setting"] else {"": list(rows)}
    size = (6.5 * len(keys), 3.6 * len(names) + 0.2 * len(curves))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(names), len(keys), squeeze=False)
    for axes, name in zip(grid, names, strict=True):
        figures = [row.figures[name] for row in rows if name in row.figures]
        best = next(ranked for ranked in figures if ranked.rank == "best")
        for axis, key in zip(axes, keys, strict=True):
            for i, (label, points) in enumerate(curves.items()):
                dodge = _DODGE ** (i - (len(curves) - 1) / 2) if key == keys[0] else 1.0
                _plot_curve(axis, points, name, key, label, dodge)
            axis.axhspan(
                *best.interval, color="tab:green", alpha=0.15, label="interval of the best"
            )
            _plot_floor(axis, best)
            if key == "num_inference_steps":
                numbers = sorted({row.num_inference_steps or 0 for row in rows} - {0})
                axis.set_xticks(numbers, [f"{K:,}" for K in numbers])
            axis.set(ylabel=_label(best), xlabel=_AXES.get(key, ""))
            axis.grid(alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", fontsize=9, ncols=len(keys))
    figure.savefig(path, dpi=110)


def plot_ema_sweep(rows: Sequence[ComparisonRow], lengths: Mapping[str, float], path: Path) -> None:
    """Each figure over the relative length of the weight average, with intervals.

    Args:
        rows: measured averages; those without a length, the run's own model, are a band.
        lengths: sigma_rel by name of the row.
        path: of the picture.
    """
    averages = [(lengths[row.name], row) for row in rows if row.name and row.name in lengths]
    averages.sort(key=lambda average: average[0])
    x = [sigma_rel for sigma_rel, _ in averages]
    names = list(dict.fromkeys(name for row in rows for name in row.figures))
    figure = Figure(figsize=(6.5, 3.6 * len(names) + 0.4), layout="constrained")
    for axis, name in zip(figure.subplots(len(names), squeeze=False)[:, 0], names, strict=True):
        figures = [row.figures[name] for _, row in averages]
        _errorbars(axis, x, figures, fmt=".-", elinewidth=0.8, label="post-hoc EMA")
        for own in (row.figures[name] for row in rows if row.name not in lengths):
            axis.axhspan(*own.interval, color="tab:orange", alpha=0.15)
            axis.axhline(own.value, color="tab:orange", label="traditional EMA")
        _plot_floor(axis, figures[0])
        axis.set(xlabel="length of the average, sigma_rel", xscale="log", xticks=x)
        axis.set_ylabel(_label(figures[0]))
        axis.legend(fontsize=9)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def _label(figure: RankedFigure) -> str:
    direction = "lower" if LOWER_IS_BETTER.get(figure.name, True) else "higher"
    return f"{figure.label} ({direction} is better)"


def _spread(rows: Sequence[ComparisonRow], key: str) -> float:
    """The largest value of `key` over the smallest."""
    values = [getattr(row, key) for row in rows if getattr(row, key)]
    return max(values) / min(values) if values else 1.0


def _curves(rows: Sequence[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    """The rows of each model and scheduler, by a readable label."""
    labels, curves = sampler_labels(rows), dict[str, list[ComparisonRow]]()
    for row in rows:
        curves.setdefault(labels[row.setting] or "this model", []).append(row)
    return curves


def _plot_floor(axis: Any, figure: RankedFigure) -> None:
    if figure.floor is not None:
        sizes = figure.floor_num_images
        label = f"real images, {sizes[1]:,} against {sizes[0]:,}" if sizes else "real images"
        axis.axhline(figure.floor.real, label=label, color="black", linestyle="--", linewidth=1)


def _plot_curve(
    axis: Any, rows: Sequence[ComparisonRow], name: str, key: str, label: str, dodge: float
) -> None:
    """Values of a figure with their intervals, at `key` of each row."""
    rows = [row for row in rows if getattr(row, key) is not None and name in row.figures]
    if not rows:
        return
    figures = [row.figures[name] for row in rows]
    if key == "setting":
        labels = setting_labels(rows)
        _errorbars(axis, [labels[row.setting] for row in rows], figures, fmt="o")
        axis.tick_params(axis="x", rotation=30)
        return
    positions = [dodge * getattr(row, key) for row in rows]
    _errorbars(axis, positions, figures, fmt=".-", elinewidth=0.8, label=label)
    axis.set_xscale("log")
    if key != "num_inference_steps":
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
    axis.minorticks_off()


def _errorbars(axis: Any, x: Sequence[Any], figures: Sequence[RankedFigure], **style: Any) -> None:
    """Values and intervals of figures at the positions `x`."""
    values = np.array([figure.value for figure in figures])
    ends = np.array([figure.interval for figure in figures]).T
    axis.errorbar(x, values, np.abs(ends - values), capsize=2, **style)
