"""Copies of training images over a run, for few images: the table and figure of few_images.md.

python docs/make_few_images.py       # measures; runs that are complete are not repeated
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from diffusers import UNet2DModel

from ddpm_hf import TrainingConfig, train

FOLDER = Path(__file__).parent
FACES = FOLDER.parent / "training" / "faces16"
SIZE = 8  # pixels per side, so that a run takes a minute or two of CPU time
EVERY = 200  # updates between two measurements
# Name of the run: number of training images, dropout of the network, and options.
RUNS: dict[str, tuple[int, float, dict[str, Any]]] = {
    "50 images": (50, 0.0, {}),
    "200 images": (200, 0.0, {}),
    "1,000 images": (1000, 0.0, {}),
    "50 images, dropout 0.3": (50, 0.3, {}),
    "50 images, flips": (50, 0.0, {"random_flip": True}),
}


def measure(name: str, num_updates: int, folder: Path) -> list[dict[str, float]]:
    """Train on some faces; the entries of the log with measurements.

    Args:
        name: key of `RUNS`.
        num_updates: length of the run, of 16 images each.
        folder: of all runs.
    """
    num_images, dropout, options = RUNS[name]
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        dropout=dropout,
    )
    config = TrainingConfig(
        dataset=str(FACES),
        split=f"train[:{num_images}]",
        resolution=SIZE,
        output_dir=str(folder / name.replace(" ", "_").replace(",", "")),
        max_train_steps=num_updates,
        batch_size=16,
        prediction_type="sample",
        learning_rate=1e-3,
        lr_scheduler="constant",  # a longer run then continues a shorter one
        num_threads=1,
        validation_split="test",
        validation_steps=EVERY,
        validation_images=8,
        validation_timesteps=2,
        evaluate_steps=EVERY,
        evaluate_num_images=64,
        evaluate_features="pixels",
        sample_inference_steps=10,
        logging_steps=EVERY,
        checkpointing_steps=EVERY,
        checkpoints_total_limit=1,
        num_samples=0,
        best_metric="fd",
        report_to=["none"],
        **options,
    )
    start = time.process_time()
    result = train(config, unet=unet)
    if result.stopped_by is not None:
        raise SystemExit("stopped; the same command continues")
    print(f"{name}: {time.process_time() - start:.0f} s of CPU time", flush=True)
    lines = result.metrics_file.read_text(encoding="utf-8").splitlines()
    return [entry for entry in map(json.loads, lines) if "evaluation_copies" in entry]


def table(measured: dict[str, list[dict[str, float]]]) -> str:
    """Markdown table: share of copies with the floor, Frechet distance; at every measurement."""
    lines = ["| updates | " + " | ".join(measured) + " |", "|---" * (len(measured) + 1) + "|"]
    for entries in zip(*measured.values(), strict=True):
        cells = [
            f"{entry['evaluation_copies']:.0%} ({entry['evaluation_copies_half_real']:.1%}),"
            f" {entry['evaluation_fd']:.2f}"
            for entry in entries
        ]
        lines.append(f"| {entries[0]['step']:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw_figure(measured: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Share of copies and Frechet distance over the updates."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    panels = {
        "evaluation_copies": "share of copies among samples",
        "evaluation_fd": "Frechet distance to the training images",
    }
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for name, entries in measured.items():
            axis.plot([e["step"] for e in entries], [e[key] for e in entries], ".-", label=name)
        axis.set(xlabel="update", title=title)
        axis.grid(alpha=0.2)
    floors = [e["evaluation_copies_half_real"] for entries in measured.values() for e in entries]
    axes[0].axhline(max(floors), color="gray", linestyle=":", label="largest floor")
    axes[0].set_ylim(-0.02, 1.02)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main(folder: Path, num_updates: int, names: list[str]) -> None:
    measured = {}
    for name in names or RUNS:
        measured[name] = measure(name, num_updates, folder)
        print(table(measured), flush=True)
    draw_figure(measured, FOLDER / "few_images.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *RUNS], help="runs; by default all")
    parser.add_argument("--updates", type=int, default=1200, help="updates of each run")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "few_images"))
    options = parser.parse_args()
    main(options.folder, options.updates, options.names)
