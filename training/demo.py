"""Train, save, load with diffusers alone, sample and evaluate a model in minutes on a CPU.

`make demo` runs this program; run again, it resumes. The dataset is the 1,797 handwritten digits of
scikit-learn, 8x8 pixels. The samples are evaluated by a classifier fitted to real digits, the model
by the variational bound of held-out digits, and sampling with few steps by a calibration.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import UNet2DModel
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ddpm_hf import (
    GaussianDDPMPipeline,
    TrainingConfig,
    bits_per_dim,
    calibrate,
    evaluate,
    load,
    train,
)
from ddpm_hf.calibration import without_curve
from ddpm_hf.cli import run_command
from ddpm_hf.evaluation.calibration_results import StepsRow
from ddpm_hf.evaluation.checkpoint_calibration import save_calibration
from ddpm_hf.evaluation.figures import MetricResult
from ddpm_hf.hub.card import write_model_card
from ddpm_hf.pictures import image_grid
from ddpm_hf.text import duration
from ddpm_hf.training import TrainingResult
from digits import (
    SURE,
    as_dataset,
    fit_judge,
    judge,
    shortcomings,
    side_by_side,
    to_images,
    to_values,
)

NUM_STEPS = 3000
NUM_TRAIN_TIMESTEPS = 1000
NUM_INFERENCE_STEPS = 100
NUM_SCORED = 500
NUM_BOUND_CALLS = 50  # terms of the bound per held-out digit: an unbiased estimate of all terms
NUM_CALIBRATED = 64  # held-out digits for the calibration
NUM_SHOWN = 64
NUM_COMPARED, FEW_STEPS = 36, (25, 10)  # digits sampled with all steps and with few steps
PICTURES = ("samples.png", "denoising.png", "loss.png", "samples_stock.png", "few_steps.png")

# Samples with diffusers alone, in a process that cannot import this package.
STOCK_PROGRAM = """
import sys

sys.modules["ddpm_hf"] = None  # makes `import ddpm_hf` fail, even if it is installed
try:
    import ddpm_hf
except ImportError as error:
    print(f"in a new process: {error}")
else:
    sys.exit("ddpm_hf can be imported")

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import make_image_grid
from PIL import ImageOps

model, picture, num_images, num_steps = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(model)
print(f"loaded {model} as {type(pipe).__module__}.{type(pipe).__name__}")
generator = torch.Generator().manual_seed(0)
images = pipe(int(num_images), generator, num_inference_steps=int(num_steps)).images
tiles = [ImageOps.expand(image.resize((64, 64), 0), 8) for image in images]
make_image_grid(tiles, rows=len(tiles) // 8, cols=8).save(picture)
ours = sorted(name for name in sys.modules if name.startswith("ddpm_hf."))
sys.exit(f"ddpm_hf was used: {ours}" if ours else 0)
"""


# ----------------------------------------------------------------------------------------------
# Pictures


def picture_samples(drawn: list[Image.Image], real: list[Image.Image], path: Path) -> None:
    """Save enlarged samples next to real digits."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 7), layout="constrained")
    titles = ("samples, not selected", "held-out real digits")
    for axis, title, images in zip(axes, titles, (drawn, real), strict=True):
        # Digits fill their tile: a black margin keeps neighbours apart.
        axis.imshow(image_grid([ImageOps.expand(image, 1) for image in images]))
        axis.set_title(title, fontsize=16)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def picture_denoising(pipeline: GaussianDDPMPipeline, path: Path) -> None:
    """Save x_t and the estimate of x_0 along the trajectories of three samples."""
    count = 3
    x_t = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    chain: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    before = [x_t]

    def keep(_: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        chain.append((int(t), before[-1], tensors["pred_original_sample"]))
        before.append(tensors["latents"])
        return {}

    pipeline.set_progress_bar_config(desc=f"{count} trajectories")
    pipeline(
        batch_size=count,
        latents=x_t,
        generator=torch.Generator().manual_seed(2),
        num_inference_steps=NUM_INFERENCE_STEPS,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents", "pred_original_sample"],
    )
    figure = plt.figure(figsize=(14, 2.6 * count), layout="constrained")
    shown = np.linspace(0, len(chain) - 1, 11).round().astype(int)
    for digit, part in enumerate(figure.subfigures(count, 1)):
        axes = part.subplots(2, len(shown))
        axes[0, 0].set_ylabel("$x_t$", fontsize=13)
        axes[1, 0].set_ylabel("estimate\nof $x_0$", fontsize=13)
        for column, i in zip(axes.T, shown, strict=True):
            t, *tensors = chain[i]
            column[0].set_title(f"t = {t}")
            for axis, tensor in zip(column, tensors, strict=True):
                axis.imshow(tensor[digit, 0].numpy(), cmap="gray", vmin=-1, vmax=1)
                axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)
    plt.close(figure)


def picture_few_steps(pipeline: GaussianDDPMPipeline, path: Path) -> None:
    """Save samples with all steps and with few steps, and the seconds that each took."""
    scheduler = pipeline.scheduler
    numbers = (len(scheduler), *FEW_STEPS)
    # Few steps must start at the noisiest timestep, too.
    pipeline.scheduler = scheduler.from_config(scheduler.config, timestep_spacing="trailing")
    figure, axes = plt.subplots(1, len(numbers), figsize=(13, 4.7), layout="constrained")
    for axis, num_steps in zip(axes, numbers, strict=True):
        pipeline.set_progress_bar_config(desc=f"{num_steps:,} steps")
        generator, began = torch.Generator().manual_seed(0), time.monotonic()
        images = pipeline(NUM_COMPARED, generator, num_inference_steps=num_steps).images
        axis.imshow(image_grid([ImageOps.expand(image, 1) for image in images]))
        axis.set_title(f"{num_steps:,} steps, {time.monotonic() - began:.1f} s", fontsize=16)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def picture_loss(metrics_file: Path, path: Path) -> None:
    """Save a plot of the training loss, logged and smoothed."""
    lines = metrics_file.read_text(encoding="utf-8").splitlines()
    steps, losses = np.array([(m["step"], m["loss"]) for m in map(json.loads, lines)]).T
    window = len(losses) // 20 + 1
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    first = window // 2  # each mean is plotted at the centre of its window
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    axis.semilogy(steps, losses, color="tab:blue", alpha=0.3, label="logged")
    axis.semilogy(steps[first : first + len(smooth)], smooth, color="tab:blue", label="smoothed")
    axis.set(xlabel="update", ylabel="mean squared error", title="training loss")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.grid(which="both", alpha=0.2)
    axis.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ----------------------------------------------------------------------------------------------
# The steps of the demo


def build_unet() -> UNet2DModel:
    """A UNet with 32 channels at 8x8 and 64 channels at 4x4: 0.65M parameters."""
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    )


def train_model(images: list[Image.Image], folder: Path, num_steps: int) -> TrainingResult:
    """Train, or resume the run in `folder`."""
    config = TrainingConfig(
        dataset="scikit-learn digits",  # the name in the model card
        output_dir=str(folder),
        max_train_steps=num_steps,
        batch_size=64,
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        learning_rate=2e-3,
        lr_warmup_steps=min(100, num_steps),
        ema_decay=0.999,
        sample_steps=500,
        checkpointing_steps=500,
    )
    torch.manual_seed(0)  # initial weights
    return train(config, unet=build_unet(), dataset=as_dataset(images))


def draw(pipeline: GaussianDDPMPipeline, num_images: int) -> list[Image.Image]:
    """Samples for seed 0."""
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(desc=f"{num_images} digits")
    return pipeline(num_images, generator, num_inference_steps=NUM_INFERENCE_STEPS).images


def draw_elsewhere(model: Path, picture: Path) -> np.ndarray:
    """Samples of diffusers alone in a new process, for seed 0: (64, 8, 8) uint8."""
    arguments = [str(model), str(picture), str(NUM_SHOWN), str(NUM_INFERENCE_STEPS)]
    subprocess.run([sys.executable, "-I", "-c", STOCK_PROGRAM, *arguments], check=True)
    with Image.open(picture) as grid:
        tiles = np.asarray(grid.convert("L")).reshape(NUM_SHOWN // 8, 80, 8, 80).swapaxes(1, 2)
    return tiles[:, :, 12:72:8, 12:72:8].reshape(-1, 8, 8)  # the centre of each enlarged pixel


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images as x_0: (N, 1, 8, 8) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None]
    return pixels / 127.5 - 1


def bound_of(pipeline: GaussianDDPMPipeline, images: list[Image.Image]) -> dict[str, float]:
    """Bits/dim of held-out images, with the standard error."""
    bound = bits_per_dim(
        pipeline.unet,
        pipeline.scheduler,
        to_tensor(images),
        num_timesteps=NUM_BOUND_CALLS,
        generator=torch.Generator().manual_seed(0),
    )
    return {
        "value": bound.mean,
        "standard_error": bound.standard_error,
        "prior": bound.prior.mean().item(),
        "decoder": bound.terms[:, -1].mean().item(),
        "count": len(images),
    }


def compared(
    drawn: list[Image.Image], known: list[Image.Image], held_out: list[Image.Image]
) -> tuple[MetricResult, ...]:
    """Frechet distance to the training digits and share of memorised samples, on pixels."""
    data = {"train": as_dataset(known), "test": as_dataset(held_out)}
    metrics = ("fd", "memorisation")
    evaluation = evaluate(drawn, data, metrics=metrics, features="pixels", progress=False)
    return evaluation.image_metrics


def floor_rows(results: tuple[MetricResult, ...]) -> list[str]:
    """Each metric for half of the samples, next to its floor for held-out digits, as text."""
    return [f"{r.label:42}{r.floor.drawn:8.3f}{r.floor.real:17.3f}  {r.verdict}" for r in results]


def calibrate_model(
    pipeline: GaussianDDPMPipeline, images: list[Image.Image], model: Path
) -> tuple[StepsRow, ...]:
    """Calibrate the variances for few steps and save the calibration in the model.

    Returns:
        Bits/dim for increasing numbers of steps.
    """
    generator = torch.Generator().manual_seed(0)
    result = calibrate(pipeline.unet, pipeline.scheduler, to_tensor(images), generator=generator)
    pipeline.scheduler = result.scheduler
    return save_calibration(result, model, f"predicted from {len(images)} held-out digits")


def few_steps(rows: tuple[StepsRow, ...]) -> str:
    """Table of the bits/dim of few and of all steps."""
    lines = ["", f"  {'steps':>6}{'bits/dim':>12}{'not calibrated':>17}"]
    for row in rows:
        values = f"{row.bits_per_dim:12.3f}{row.published:17.3f}"
        lines.append(f"  {row.num_inference_steps:6,}{values}")
    return "\n".join(lines)


def start_over(folder: Path) -> None:
    """Delete the files of an earlier demo in `folder`, and no others."""
    for name in ("checkpoints", "logs", "model", "samples"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.yaml", "metrics.jsonl", *PICTURES, "scores.json"):
        (folder / name).unlink(missing_ok=True)


def record(scores: dict[str, Any], model: Path, path: Path) -> None:
    """Add the results to the record of training, `scores.json` and the model card."""
    facts = json.loads((model / "training.json").read_text(encoding="utf-8"))
    drawn, real = scores["drawn"], scores["real"]
    bound = scores["bits_per_dim"]
    judged = f"{drawn['count']} samples, {NUM_INFERENCE_STEPS} steps, SVM fitted to real digits"
    facts["model_name"] = "Handwritten digits, 8x8"
    facts["versions"]["scikit-learn"] = version("scikit-learn")
    facts["metrics"] = [
        {
            "name": "recognised digits",
            "value": drawn["recognised"],
            "how": f"share with p >= {SURE}; {judged}; real digits: {real['recognised']:.3f}",
        },
        {
            "name": "rarest digit",
            "value": min(drawn["share_of_digit"]),
            "how": f"share of the least frequent digit; {judged}",
        },
        {
            "name": "distance to training data",
            "value": drawn["distance_to_training"],
            "how": "median distance of a sample to the nearest training digit, pixels in [0, 1]; "
            f"held-out real digits: {real['distance_to_training']:.3f}",
        },
        {
            "type": "bits-per-dim",
            "name": "bits/dim",
            "value": bound["value"],
            "how": f"variational bound, {bound['count']} held-out digits, {NUM_BOUND_CALLS} of "
            f"{NUM_TRAIN_TIMESTEPS:,} terms each; standard error {bound['standard_error']:.3f}",
        },
    ]
    for file, content in ((model / "training.json", facts), (path, scores | {"training": facts})):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_model_card(model)


def what_next(folder: Path) -> str:
    """The written files and commands to try next."""
    beside_python, beside_this = Path(sys.executable).parent, Path(__file__).parent
    python, command = (os.path.relpath(beside_python / name) for name in ("python", "ddpm-hf"))
    lesson, demo = (os.path.relpath(beside_this / name) for name in ("mlp_digits.py", "demo.py"))
    files = {
        "model/": "the checkpoint; diffusers loads it with or without ddpm_hf",
        "samples.png": "samples next to real digits",
        "denoising.png": "x_t and the estimate of x_0 during sampling",
        "loss.png": "the training loss",
        "samples_stock.png": "samples of diffusers alone",
        "few_steps.png": "samples with all steps and with few steps",
        "scores.json": "all results",
    }
    commands = {
        f"{command} sample {folder}/model --num-images 16 --output grid.png": "sample more digits",
        f"{command} train ./photos": "train on your own images",
        f"{command} push {folder}/model YOU/digits": "publish it, after `hf auth login`",
        f"{python} {lesson}": "run a minimal DDPM, written to be read",
        f"{python} {demo} --fresh": "repeat the demo from the start",
    }
    lines = ["", "Files"]
    lines += [f"  {folder / name!s:{len(str(folder)) + 20}}{text}" for name, text in files.items()]
    lines += ["", "What to try next"]
    return "\n".join(lines + [f"  {text}:\n    {line}" for line, text in commands.items()])


def phase(number: int, text: str) -> None:
    """Print a heading."""
    print(f"\n[{number}/6] {text}", flush=True)


def main(argv: list[str]) -> int:
    """Run the demo and return the exit status: 0 if the samples are recognisable."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of results")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="number of updates")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results first")
    options = parser.parse_args(argv)
    folder: Path = options.output
    if options.fresh:
        start_over(folder)
    began = time.monotonic()

    phase(1, "Load real digits and hold out a fifth of them")
    values, labels = load_digits(return_X_y=True)
    known, held_out, known_labels, _ = train_test_split(
        values, labels, test_size=0.2, stratify=labels, random_state=0
    )
    print(f"{len(known):,} for training, {len(held_out)} held out, 8x8 pixels")

    phase(2, "Train")
    result = train_model(to_images(known), folder, options.steps)
    if result.stopped_by is not None:
        return 128 + result.stopped_by
    picture_loss(result.metrics_file, folder / "loss.png")

    phase(3, f"Sample {NUM_SCORED} digits from {result.model_dir}")
    pipeline = load(str(result.model_dir))
    # Without the calibration of an earlier demo: diffusers alone samples without it.
    pipeline.scheduler = without_curve(pipeline.scheduler)
    drawn = draw(pipeline, NUM_SCORED)
    real = to_images(held_out)
    picture_samples(drawn[:NUM_SHOWN], real[:NUM_SHOWN], folder / "samples.png")
    picture_denoising(pipeline, folder / "denoising.png")

    phase(4, "Sample with diffusers alone, in a new process")
    elsewhere = draw_elsewhere(result.model_dir, folder / "samples_stock.png")
    here = np.stack([np.asarray(image) for image in draw(pipeline, NUM_SHOWN)])
    difference = int(np.abs(elsewhere.astype(int) - here).max())
    print(f"with the same seed, pixels differ from those of ddpm_hf by at most {difference}/255")

    phase(5, "Evaluate the samples with a classifier, and the model with the variational bound")
    classifier = fit_judge(known, known_labels)
    figures = compared(drawn, to_images(known), real)
    scores = {
        "drawn": judge(classifier, to_values(drawn), known),
        "real": judge(classifier, to_values(real), known),
        "bits_per_dim": bound_of(pipeline, real),
        "compared": [figure.to_dict() for figure in figures],
        "largest_difference_to_stock": difference,
    }
    wrong = shortcomings(scores["drawn"], scores["real"])
    print(side_by_side(scores["drawn"], scores["real"]))
    bound = scores["bits_per_dim"]
    print(
        f"\n{bound['value']:.3f} +- {bound['standard_error']:.3f} bits/dim on {bound['count']} "
        f"held-out digits (uniform noise: 8), {bound['decoder']:.3f} of them in the decoder term\n"
    )
    print("\n".join(f"  {line}" for line in floor_rows(figures)))

    phase(6, "Calibrate for fewer steps")
    rows = calibrate_model(pipeline, real[:NUM_CALIBRATED], result.model_dir)
    print(few_steps(rows))
    scores |= {"few_steps": [row.to_dict() for row in rows], "shortcomings": wrong}
    record(scores, result.model_dir, folder / "scores.json")
    picture_few_steps(pipeline, folder / "few_steps.png")
    print(what_next(folder))
    print(f"\nDone in {duration(time.monotonic() - began)}.")
    for problem in wrong:
        print(f"\nNot good enough: {problem}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
