"""The whole job on real data, in minutes on a CPU: train, save, load elsewhere, draw, score.

`make demo` runs this; run again, it goes on where it was. The data are the 1,797 handwritten digits
that scikit-learn ships, 8x8 pixels. At the end a classifier fitted to real digits says how many of
the drawn ones it recognises, the variational bound how well the model explains digits that it has
not seen, and a calibration what it loses in few steps.
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
NUM_INFERENCE_STEPS = 100
NUM_SCORED = 500
NUM_BOUND_CALLS = 50  # of the network per held-out digit: an unbiased estimate of 1,000
NUM_CALIBRATED = 64  # held-out digits, of which the error at every timestep is measured
NUM_SHOWN = 64
NUM_COMPARED, FEW_STEPS = 36, (25, 10)  # digits drawn in all steps, and in these
PICTURES = ("samples.png", "denoising.png", "loss.png", "samples_stock.png", "few_steps.png")

# Run by a Python that cannot import this package: what anyone with diffusers alone can do.
STOCK_PROGRAM = """
import sys

sys.modules["ddpm_hf"] = None  # from here on `import ddpm_hf` fails, installed or not
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
    """Drawn digits beside real ones, enlarged."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 7), layout="constrained")
    titles = ("drawn by the model, not selected", "real, held out of training")
    for axis, title, images in zip(axes, titles, (drawn, real), strict=True):
        # Digits fill their tile: a black margin keeps neighbours apart.
        axis.imshow(image_grid([ImageOps.expand(image, 1) for image in images]))
        axis.set_title(title, fontsize=16)
        axis.axis("off")
    figure.savefig(path, dpi=100)
    plt.close(figure)


def picture_denoising(pipeline: GaussianDDPMPipeline, path: Path) -> None:
    """x_t and the estimate of x_0 made from it, along the chain, for a few digits."""
    count = 3
    x_t = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    chain: list[tuple[int, torch.Tensor, torch.Tensor]] = []
    before = [x_t]

    def keep(_: Any, i: int, t: torch.Tensor, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        chain.append((int(t), before[-1], tensors["pred_original_sample"]))
        before.append(tensors["latents"])
        return {}

    pipeline.set_progress_bar_config(desc=f"{count} digits, watched")
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
    """As many digits in all steps as in few, with the seconds that each took."""
    scheduler = pipeline.scheduler
    numbers = (len(scheduler), *FEW_STEPS)
    # From the noisiest step on, however few they are.
    pipeline.scheduler = scheduler.from_config(scheduler.config, timestep_spacing="trailing")
    figure, axes = plt.subplots(1, len(numbers), figsize=(13, 5), layout="constrained")
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
    """The training loss as logged, and smoothed."""
    lines = metrics_file.read_text(encoding="utf-8").splitlines()
    steps, losses = np.array([(m["step"], m["loss"]) for m in map(json.loads, lines)]).T
    window = len(losses) // 20 + 1
    smooth = np.convolve(losses, np.full(window, 1 / window), mode="valid")
    first = window // 2  # a mean stands at the middle of its window
    figure, axis = plt.subplots(figsize=(9, 5), layout="constrained")
    axis.semilogy(steps, losses, color="tab:blue", alpha=0.3, label="as logged")
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
    """Two levels, 8x8 and 4x4, of 32 and 64 channels: 0.65M parameters."""
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
    """Train, or go on with the training that `folder` holds."""
    config = TrainingConfig(
        dataset="scikit-learn digits",  # what the model card calls them
        output_dir=str(folder),
        max_train_steps=num_steps,
        batch_size=64,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        learning_rate=2e-3,
        lr_warmup_steps=min(100, num_steps),
        ema_decay=0.999,
        sample_steps=500,
        checkpointing_steps=500,
    )
    torch.manual_seed(0)  # the first weights
    return train(config, unet=build_unet(), dataset=as_dataset(images))


def draw(pipeline: GaussianDDPMPipeline, num_images: int) -> list[Image.Image]:
    """Digits from the seed 0."""
    generator = torch.Generator().manual_seed(0)
    pipeline.set_progress_bar_config(desc=f"{num_images} digits")
    return pipeline(num_images, generator, num_inference_steps=NUM_INFERENCE_STEPS).images


def draw_elsewhere(model: Path, picture: Path) -> np.ndarray:
    """Digits from the seed 0, drawn in a new process by diffusers alone: (64, 8, 8) uint8."""
    arguments = [str(model), str(picture), str(NUM_SHOWN), str(NUM_INFERENCE_STEPS)]
    subprocess.run([sys.executable, "-I", "-c", STOCK_PROGRAM, *arguments], check=True)
    with Image.open(picture) as grid:
        tiles = np.asarray(grid.convert("L")).reshape(NUM_SHOWN // 8, 80, 8, 80).swapaxes(1, 2)
    return tiles[:, :, 12:72:8, 12:72:8].reshape(-1, 8, 8)  # the middle of each enlarged pixel


def to_tensor(images: list[Image.Image]) -> torch.Tensor:
    """Images as the network is trained on them: (N, 1, 8, 8) in [-1, 1]."""
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))[:, None]
    return pixels / 127.5 - 1


def bound_of(pipeline: GaussianDDPMPipeline, images: list[Image.Image]) -> dict[str, float]:
    """Bits/dim of images that the model has not seen, with the standard error."""
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
    """By their pixels: distance of drawn digits to those trained on, and the share of copies."""
    data = {"train": as_dataset(known), "test": as_dataset(held_out)}
    metrics = ("fd", "memorisation")
    evaluation = evaluate(drawn, data, metrics=metrics, features="pixels", progress=False)
    return evaluation.image_metrics


def told(results: tuple[MetricResult, ...]) -> list[str]:
    """Each figure at half the number of digits, beside that of real ones that were held out."""
    return [f"{r.label:42}{r.floor.drawn:8.3f}{r.floor.real:17.3f}  {r.verdict}" for r in results]


def calibrate_model(
    pipeline: GaussianDDPMPipeline, images: list[Image.Image], model: Path
) -> tuple[StepsRow, ...]:
    """Measure what few steps lose, and keep the best variances for them in the model.

    Returns:
        bits/dim of K steps, the fewest first.
    """
    generator = torch.Generator().manual_seed(0)
    result = calibrate(pipeline.unet, pipeline.scheduler, to_tensor(images), generator=generator)
    pipeline.scheduler = result.scheduler
    return save_calibration(result, model, f"predicted from {len(images)} held-out digits")


def few_steps(rows: tuple[StepsRow, ...]) -> str:
    """Bits/dim of few steps and of all as a table."""
    lines = ["", f"  {'steps':>6}{'bits/dim':>12}{'not calibrated':>17}"]
    for row in rows:
        values = f"{row.bits_per_dim:12.3f}{row.published:17.3f}"
        lines.append(f"  {row.num_inference_steps:6,}{values}")
    return "\n".join(lines)


def start_over(folder: Path) -> None:
    """Delete what an earlier demo left in `folder`, and nothing else."""
    for name in ("checkpoints", "logs", "model", "samples"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("config.yaml", "metrics.jsonl", *PICTURES, "scores.json"):
        (folder / name).unlink(missing_ok=True)


def record(scores: dict[str, Any], model: Path, path: Path) -> None:
    """What was measured, beside the run's own record, in a file and in the model's card."""
    facts = json.loads((model / "training.json").read_text(encoding="utf-8"))
    drawn, real = scores["drawn"], scores["real"]
    bound = scores["bits_per_dim"]
    judged = (
        f"{drawn['count']} drawn digits, {NUM_INFERENCE_STEPS} steps, SVM fitted to real digits"
    )
    facts["model_name"] = "Handwritten digits, 8x8"
    facts["versions"]["scikit-learn"] = version("scikit-learn")
    facts["metrics"] = [
        {
            "name": "recognised digits",
            "value": drawn["recognised"],
            "how": f"share named with p >= {SURE}; {judged}; real digits: {real['recognised']:.3f}",
        },
        {
            "name": "rarest digit",
            "value": min(drawn["share_of_digit"]),
            "how": f"share of the digit named least often; {judged}",
        },
        {
            "name": "distance to training data",
            "value": drawn["distance_to_training"],
            "how": "median over drawn digits, to the nearest training digit, pixels in [0, 1]; "
            f"real digits held out: {real['distance_to_training']:.3f}",
        },
        {
            "type": "bits-per-dim",
            "name": "bits/dim",
            "value": bound["value"],
            "how": f"variational bound, {bound['count']} held-out digits, {NUM_BOUND_CALLS} of "
            f"1,000 terms each; standard error {bound['standard_error']:.3f}",
        },
    ]
    for file, content in ((model / "training.json", facts), (path, scores | {"training": facts})):
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    write_model_card(model)


def what_next(folder: Path) -> str:
    """Where everything lies, and commands to go on with."""
    beside_python, beside_this = Path(sys.executable).parent, Path(__file__).parent
    python, command = (os.path.relpath(beside_python / name) for name in ("python", "ddpm-hf"))
    lesson, demo = (os.path.relpath(beside_this / name) for name in ("mlp_digits.py", "demo.py"))
    files = {
        "model/": "the checkpoint: loads in diffusers, with or without ddpm_hf",
        "samples.png": "drawn digits beside real ones",
        "denoising.png": "how digits come out of noise",
        "loss.png": "the training loss",
        "samples_stock.png": "drawn by diffusers alone",
        "few_steps.png": "drawn in 1,000 steps, and in few",
        "scores.json": "everything that was measured",
    }
    commands = {
        f"{command} sample {folder}/model --num-images 16 --output grid.png": "draw more",
        f"{command} train ./photos": "train on your own folder of images",
        f"{command} push {folder}/model YOU/digits": "share it, after `hf auth login`",
        f"{python} {lesson}": "the simplest DDPM there is, as a lesson",
        f"{python} {demo} --fresh": "this again, from the start",
    }
    lines = ["", "Where everything lies"]
    lines += [f"  {folder / name!s:{len(str(folder)) + 20}}{text}" for name, text in files.items()]
    lines += ["", "What to try next"]
    return "\n".join(lines + [f"  {text}:\n    {line}" for line, text in commands.items()])


def phase(number: int, text: str) -> None:
    """A heading in the output."""
    print(f"\n[{number}/6] {text}", flush=True)


def main(argv: list[str]) -> int:
    """Run the demo; 0 if the digits are recognisable."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of results")
    parser.add_argument("--steps", type=int, default=NUM_STEPS, help="training updates")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results, start over")
    options = parser.parse_args(argv)
    folder: Path = options.output
    if options.fresh:
        start_over(folder)
    began = time.monotonic()

    phase(1, "Real digits, a fifth of them held out")
    values, labels = load_digits(return_X_y=True)
    known, held_out, known_labels, _ = train_test_split(
        values, labels, test_size=0.2, stratify=labels, random_state=0
    )
    print(f"{len(known):,} to train on, {len(held_out)} held out, 8x8 pixels")

    phase(2, "Training")
    result = train_model(to_images(known), folder, options.steps)
    if result.stopped_by is not None:
        return 128 + result.stopped_by
    picture_loss(result.metrics_file, folder / "loss.png")

    phase(3, f"Drawing {NUM_SCORED} digits from {result.model_dir}")
    pipeline = load(str(result.model_dir))
    # Without what an earlier demo measured: as diffusers alone draws.
    pipeline.scheduler = without_curve(pipeline.scheduler)
    drawn = draw(pipeline, NUM_SCORED)
    real = to_images(held_out)
    picture_samples(drawn[:NUM_SHOWN], real[:NUM_SHOWN], folder / "samples.png")
    picture_denoising(pipeline, folder / "denoising.png")

    phase(4, "The same model in a new process, by diffusers alone")
    elsewhere = draw_elsewhere(result.model_dir, folder / "samples_stock.png")
    here = np.stack([np.asarray(image) for image in draw(pipeline, NUM_SHOWN)])
    difference = int(np.abs(elsewhere.astype(int) - here).max())
    print(f"from the same seed as ddpm_hf, pixels differ by at most {difference} of 255")

    phase(5, "Are these digits? Asking a classifier fitted to real ones, and the bound")
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
        f"held-out digits (8 would be no model), {bound['decoder']:.3f} of them in the last step\n"
    )
    print("\n".join(f"  {line}" for line in told(figures)))

    phase(6, "Why so many steps? What the model loses in fewer")
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
