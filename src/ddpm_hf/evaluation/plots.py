"""Plots: what the bits of the bound buy (2006.11239, section 4.3), few steps, comparisons."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator


def plot_terms(result: dict[str, Any], path: Path) -> None:
    """Bits/dim of every timestep: of the bound's terms, the decoder's marked.

    Args:
        result: of `measure_bits_per_dim`.
        path: of the picture.
    """
    timesteps, terms, is_measured = terms_where_measured(result)
    is_kl = is_measured & (np.arange(len(terms)) < len(terms) - 1)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(timesteps[is_kl], terms[is_kl], _style(result), markersize=3, label="KL")
    label = f"decoder, {terms[-1]:.3g}"
    axes.semilogy(timesteps[-1:], terms[-1:], "D", color="tab:orange", label=label)
    axes.set(xlabel="timestep t", ylabel="bits/dim")
    axes.set_title(f"Terms of the bound: {result['value']:.3f} bits/dim in all", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def terms_where_measured(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Timesteps, the mean of each term over the images that it was measured on, and whether any.

    Where timesteps were drawn this is less noisy than "terms", whose sum is unbiased.

    Args:
        result: of `measure_bits_per_dim`.
    """
    num_measured = np.array(result["num_measured"])
    expected = result["num_images"] * np.array(result["num_expected"])
    terms = np.array(result["terms"]) * expected / num_measured.clip(1)
    return np.array(result["timesteps"]), terms, num_measured > 0


def _style(result: dict[str, Any]) -> str:
    """A line through whole bounds; dots where each timestep has images of its own."""
    return "." if result["num_timesteps"] < result["num_inference_steps"] else ".-"


def rate_distortion(result: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Rate and distortion of progressive lossy compression, before each timestep (figure 5).

    Args:
        result: of `measure_bits_per_dim`.
    Returns:
        rate, bits/dim sent until x_t is known; distortion, the root mean squared error of the
        estimate of x_0 from it, in levels of the image; timesteps that were not measured left out.
    """
    mse = np.array(result["x_0_mse"], dtype=float)
    terms = np.array(result["terms"])
    rate = result["parts"]["prior"]["value"] + np.concatenate([[0], terms[:-1].cumsum()])
    distortion = np.sqrt(mse) * (2 ** result["bit_depth"] - 1) / 2
    is_measured = np.isfinite(distortion)
    return rate[is_measured], distortion[is_measured]


def plot_rate_distortion(result: dict[str, Any], path: Path) -> None:
    """The distortion that is left after so many bits; the decoder's bits would bring it to 0.

    Args:
        result: of `measure_bits_per_dim`.
        path: of the picture.
    """
    rate, distortion = rate_distortion(result)
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(rate, distortion, _style(result), markersize=3)
    top = 2 ** result["bit_depth"] - 1
    axes.set(xlabel="rate (bits/dim)", ylabel=f"distortion (RMSE, levels of 0..{top:,})")
    axes.set_ylim(0, 1.05 * distortion.max())
    axes.set_title(
        f"Rate {rate[-1]:.3f} bits/dim, distortion {distortion[-1]:.2f} at the last step",
        fontsize=11,
    )
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


def plot_calibration(result: dict[str, Any], path: Path) -> None:
    """Bits/dim against the number of steps, and the error at every t that they follow from.

    Args:
        result: of `calibration.described`.
        path: of the picture.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [row["num_inference_steps"] for row in result["rows"]]
    for key, label in (
        ("published", "as published"),
        ("bits_per_dim", "calibrated variances"),
        ("at_best_timesteps", "calibrated, timesteps best for the bound"),
    ):
        if key in result["rows"][0]:
            left.semilogx(steps, [row[key] for row in result["rows"]], ".-", label=label)
    ceiling = max(row["bits_per_dim"] for row in result["rows"])
    floor = min(row["bits_per_dim"] for row in result["rows"])
    left.set_ylim(floor - 0.1 * (ceiling - floor) - 0.01, ceiling + (ceiling - floor) + 0.01)
    left.set(xlabel="steps K", ylabel="bits/dim", xticks=steps, xticklabels=steps)
    left.minorticks_off()
    left.set_title("What few steps lose", fontsize=11)
    left.legend(fontsize=9)
    mse = np.array(result["x_0_mse"])
    error = np.array(result["standard_error"], dtype=float)
    t = np.arange(len(mse))
    right.semilogy(t, mse, linewidth=1)
    right.fill_between(t, (mse - 2 * error).clip(mse / 10), mse + 2 * error, alpha=0.3)
    right.set(xlabel="timestep t", ylabel="mean squared error of x_0")
    right.set_title("The network's error, +- 2 standard errors", fontsize=11)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


_AXES = {"num_inference_steps": "steps K", "seconds_per_image": "seconds an image"}


def plot_comparison(result: dict[str, Any], path: Path) -> None:
    """Every figure against steps and against seconds, with intervals; or, without steps, by name.

    The band is the interval of the best.

    Args:
        result: of `compare`.
        path: of the picture.
    """
    rows = result["settings"]
    names = list(dict.fromkeys(name for row in rows for name in row["figures"]))
    keys = [key for key in _AXES if len({row[key] for row in rows} - {None}) > 1] or ["setting"]
    lines: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        of = ", ".join(part for part in (row["name"], row["scheduler"]) if part)
        lines.setdefault(of if keys != ["setting"] else "", []).append(row)
    size = (6.5 * len(keys), 3.4 * len(names) + 0.2 * len(lines))
    figure = Figure(figsize=size, layout="constrained")
    for axes, name in zip(
        figure.subplots(len(names), len(keys), squeeze=False), names, strict=True
    ):
        of_name = [row["figures"][name] for row in rows if name in row["figures"]]
        best = next(one for one in of_name if one["rank"] == "best")
        for axis, key in zip(axes, keys, strict=True):
            for of, points in lines.items():
                _errorbars(axis, points, name, key, of)
            axis.axhspan(
                *best["interval"], color="tab:green", alpha=0.15, label="interval of the best"
            )
            axis.set(ylabel=best["label"], xlabel=_AXES.get(key, ""))
            axis.grid(alpha=0.3)
    if any(lines):
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=9)
    figure.savefig(path, dpi=110)


def _errorbars(axis: Any, rows: list[dict[str, Any]], name: str, key: str, label: str) -> None:
    """The values of a figure with their intervals, at `key` of each row."""
    rows = [row for row in rows if row[key] is not None and name in row["figures"]]
    if not rows:
        return
    values = np.array([row["figures"][name]["value"] for row in rows])
    ends = np.array([row["figures"][name]["interval"] for row in rows]).T
    is_curve = key != "setting"
    style = ".-" if is_curve else "o"
    errors = np.abs(ends - values)
    axis.errorbar([row[key] for row in rows], values, errors, fmt=style, capsize=2, label=label)
    if is_curve:
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.minorticks_off()
    else:
        axis.tick_params(axis="x", rotation=30)
