"""Pictures of a run: its loss, and how the model denoises."""

import copy
import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.pictures import image_grid
from ddpm_hf.randomness import seed_of
from ddpm_hf.training.run import Run

_NUM_IMAGES, _NUM_COLUMNS = 3, 9


def save_loss_picture(metrics_file: Path, path: Path) -> None:
    """Plot the logged training loss and its running mean; nothing without matplotlib."""
    lines = metrics_file.read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry.get("loss") is not None]
    if not entries or find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    steps, losses = np.array([(entry["step"], entry["loss"]) for entry in entries]).T
    window = len(losses) // 20 + 1
    mean = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    first = window // 2  # a mean stands at the middle of its window
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(steps, losses, ".-", color="tab:blue", alpha=0.3, markersize=3, label="as logged")
    label = f"mean of {window} entries"
    axes.semilogy(steps[first : first + len(mean)], mean, color="tab:blue", label=label)
    axes.set(xlabel="update", ylabel="loss", title="Training loss")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=100)


def draw_denoising(run: Run) -> Image.Image:
    """x_t and the estimate of x_0 along the trajectory of a few samples, by the EMA weights."""
    config, scheduler = run.config, copy.deepcopy(run.components.scheduler)
    labels = run.components.facts.trained_classes or None
    device = run.accelerator.device
    generators = [
        torch.Generator(device).manual_seed(seed_of(config.seed, "denoising", i))
        for i in range(_NUM_IMAGES)
    ]
    with run.state.ema_weights() as unet:
        pipeline = GaussianDDPMPipeline(unet=unet, scheduler=scheduler)
        steps = list(
            pipeline.sample_steps(
                _NUM_IMAGES,
                generators,
                min(config.sample_inference_steps, len(scheduler)),
                class_labels=labels and [labels[i % len(labels)] for i in range(_NUM_IMAGES)],
                eta=0.0,
            )
        )
        shown = [
            steps[i]
            for i in np.unique(np.linspace(0, len(steps) - 1, _NUM_COLUMNS).round().astype(int))
        ]
        noisy = [pipeline.decode_images(step.sample, "np") for step in shown]
        clean = [pipeline.decode_images(step.pred_original_sample, "np") for step in shown]
    rows = [row for i in range(_NUM_IMAGES) for row in (noisy, clean)]
    cells = [images[i // 2] for i, row in enumerate(rows) for images in row]
    names = ["x_t", "estimate of x_0"] * _NUM_IMAGES
    titles = [f"t = {int(step.timestep)}" for step in shown]
    return image_grid(cells, len(shown), names, column_names=titles)
