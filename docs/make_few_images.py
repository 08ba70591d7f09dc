"""Copies of training images over a run, for few images: the tables and figures of few_images.md.

python docs/make_few_images.py       # measures; runs that are complete are not repeated
python docs/make_few_images.py "200 images" "200 images, flips" --updates 4000 --every 500

Named runs are measured without drawing the figures.
"""

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import UNet2DModel

from ddpm_hf import TrainingConfig, image_grid, load, train
from ddpm_hf.data import load_images, prepare_images
from ddpm_hf.sampling import draw_images

FOLDER = Path(__file__).parent
FACES = FOLDER.parent / "training" / "faces16"
SIZE = 8  # pixels per side, so that a run takes a minute or two of CPU time


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What differs between the runs; `dropout` is that of the network."""

    num_images: int
    dropout: float = 0.0
    random_flip: bool = False


RUNS = {
    "50 images": Setting(num_images=50),
    "200 images": Setting(num_images=200),
    "1,000 images": Setting(num_images=1000),
    "50 images, dropout 0.3": Setting(num_images=50, dropout=0.3),
}
LONGER_RUNS = {"200 images, flips": Setting(num_images=200, random_flip=True)}


def run_folder(folder: Path, name: str) -> Path:
    """The folder of a run."""
    return folder / name.replace(" ", "_").replace(",", "")


def measure(name: str, num_updates: int, every: int, folder: Path) -> list[dict[str, float]]:
    """Train on some faces; the entries of the log with measurements.

    Args:
        name: of the run.
        num_updates: length of the run, of 16 images each.
        every: updates between two measurements.
        folder: of all runs.
    """
    setting = (RUNS | LONGER_RUNS)[name]
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        dropout=setting.dropout,
    )
    config = TrainingConfig(
        dataset=str(FACES),
        split=f"train[:{setting.num_images}]",
        resolution=SIZE,
        random_flip=setting.random_flip,
        output_dir=str(run_folder(folder, name)),
        max_train_steps=num_updates,
        batch_size=16,
        prediction_type="sample",
        learning_rate=1e-3,
        timestep_sampling="uniform",
        lr_scheduler="constant",  # a longer run then continues a shorter one
        num_threads=1,
        validation_split="test",
        validation_steps=every,
        validation_images=8,
        validation_timesteps=2,
        evaluate_steps=every,
        evaluate_num_images=64,
        evaluate_features="pixels",
        sample_inference_steps=10,
        logging_steps=every,
        checkpointing_steps=every,
        checkpoints_total_limit=1,
        num_samples=0,
        best_metric="fd",
        report_to=["none"],
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
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=80)


def draw_pairs(folder: Path, names: list[str], path: Path) -> None:
    """Samples of runs above their nearest training images, by pixels."""
    cells: list[Any] = []
    for name in names:
        faces = load_images(FACES, split=f"train[:{RUNS[name].num_images}]")
        training = prepare_images(faces, resolution=SIZE, progress=False)
        real = torch.stack([*training]).permute(0, 2, 3, 1).numpy() / 255  # (N, H, W, 3)
        pipe = load(run_folder(folder, name) / "model")
        samples = draw_images(pipe, 10, batch_size=10, num_inference_steps=10, eta=0.0)
        distances = [np.square(real - sample).sum((1, 2, 3)) for sample in samples]
        cells += [*samples, *(real[distance.argmin()] for distance in distances)]
    rows = [row for name in names for row in (f"samples, {name}", "nearest")]
    image_grid(cells, len(cells) // len(rows), rows).save(path)


def main(options: argparse.Namespace) -> None:
    measured = {}
    for name in options.names or RUNS:
        measured[name] = measure(name, options.updates, options.every, options.folder)
        print(table(measured), flush=True)
    if not options.names:
        draw_figure(measured, FOLDER / "few_images.png")
        draw_pairs(options.folder, ["50 images", "1,000 images"], FOLDER / "few_images_pairs.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *RUNS, *LONGER_RUNS], help="runs to make")
    parser.add_argument("--updates", type=int, default=1200, help="updates of each run")
    parser.add_argument("--every", type=int, default=200, help="updates between two measurements")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "few_images"))
    main(parser.parse_args())
