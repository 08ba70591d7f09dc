"""Section 7 of walkthrough.md with more time and several seeds: its table and figure.

python docs/make_gan_comparison.py
"""

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from make import FOLDER, run_page
from torch import Tensor, nn

COLUMNS = ("modes of 25", "samples near a mode", "precision", "recall")


def draw_figure(drawn: dict[str, Tensor], path: Path) -> None:
    """Scatter plots of real and drawn points."""
    figure, axes = plt.subplots(
        1, len(drawn), figsize=(9, 2.5), layout="constrained", sharex=True, sharey=True
    )
    for axis, (name, points) in zip(axes, drawn.items(), strict=True):
        axis.scatter(*points.T, s=1)
        axis.set(title=name, xlim=(-1.4, 1.4), ylim=(-1.4, 1.4), aspect="equal")
    figure.savefig(path, dpi=80)


def table(results: dict[str, list[tuple[float, ...]]]) -> str:
    """Markdown table: the values of each seed."""
    lines = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, seeds in results.items():
        modes, *shares = zip(*seeds, strict=True)
        cells = [", ".join(map(str, modes))]
        cells += [", ".join(f"{value:.2f}" for value in values) for values in shares]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(seconds: float, num_seeds: int) -> None:
    torch.set_num_threads(1)
    page = run_page(FOLDER / "walkthrough.md", 7, math=math, torch=torch, nn=nn)
    results: dict[str, list[Any]] = {}
    for seed in range(num_seeds):
        drawn = page["compare"](seconds, seed)
        for name, points in drawn.items():
            results.setdefault(name, []).append(page["quality"](points))
        if seed == 0:
            draw_figure({"data": page["draw_data"](1000)} | drawn, FOLDER / "walkthrough_gan.png")
        print(table(results), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="CPU time of each training")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    options = parser.parse_args()
    main(options.seconds, options.seeds)
