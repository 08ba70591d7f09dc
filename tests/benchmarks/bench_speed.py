"""Speed and memory of sampling and training, beside stock diffusers and the machine's limit.

    python tests/benchmarks/bench_speed.py [--full] [--device cuda] [--threads N] [--json FILE]

Prints, and asserts nothing. All sides take turns in one process; each time is the median over the
turns, each ratio the median of the turns' ratios. Minutes; `--full`, an hour on two cores, adds the
larger batches of the 35.7M network of DDPM (2006.11239, appendix B), and compiled training. Memory
is the growth of the peak of a process that did nothing before.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from itertools import pairwise
from typing import Any

import torch
from common import (
    StockLoop,
    flops,
    keep,
    limits,
    machine,
    make_unet,
    memory,
    now,
    parser_of,
    race,
    random_images,
    ratio,
    train_ours,
)
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from ddpm_hf import GaussianDDPMPipeline, simple_loss
from ddpm_hf.diffusion.speed import has_bfloat16

NUM_STEPS = 4  # of a chain: each costs the same
BATCHES = {"small": (1, 16), "cifar": (1,)}
FULL_BATCHES = {"small": (1, 16, 64), "cifar": (1, 16, 64)}


def gflop(unet: UNet2DModel, batch_size: int) -> float:
    """Of one call."""
    with torch.no_grad():
        return sum(flops(lambda: unet(random_images(unet, batch_size), 0)).values())


def variants(device: str, compiled: bool) -> dict[str, dict[str, Any]]:
    """Arguments of `optimize`, by what they change."""
    factors: dict[str, dict[str, Any]] = {"channels_last": {"memory_format": torch.channels_last}}
    if has_bfloat16(torch.device(device)):  # without it a CPU takes 40 times as long
        factors["bf16"] = {"dtype": torch.bfloat16}
    if device == "cuda":
        factors["TF32"] = {"tf32": True}
    if compiled:
        factors["compiled"] = {"compile": True}
    together = {key: value for options in factors.values() for key, value in options.items()}
    return factors | ({"together": together} if len(factors) > 1 else {})


def sampling(name: str, batch_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per way to sample: milliseconds of a step, and how far the images are from stock's."""
    unet, scheduler = make_unet(name, options.device), DDPMScheduler()

    def build(kind: type, **chosen: Any) -> Any:
        pipeline = kind(copy.deepcopy(unet), DDPMScheduler.from_config(scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        if chosen:
            with redirect_stdout(StringIO()):
                pipeline.optimize(batch_size, num_calls=1, **chosen)
        return pipeline

    def draw(pipeline: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(batch_size, generator, NUM_STEPS, output_type="np").images

    pipelines = {"stock": build(DDPMPipeline), "ours": build(GaussianDDPMPipeline)}
    for what, chosen in variants(options.device, name == "small" and batch_size == 16).items():
        pipelines[f"ours, {what}"] = build(GaussianDDPMPipeline, **chosen)
    calls = {what: lambda p=pipeline: draw(p) for what, pipeline in pipelines.items()}
    times, images = race(calls, options.turns), {what: call() for what, call in calls.items()}
    work = gflop(unet, batch_size) * NUM_STEPS
    return [
        row(f"sampling {name}, batch {batch_size}", what, times, work, NUM_STEPS)
        | {"deviation": float(abs(images[what] - images["ours"]).max())}
        for what in times
    ]


def row(
    where: str, what: str, times: dict[str, list[float]], work: float, steps: int = 1
) -> dict[str, Any]:
    median = statistics.median(times[what])
    return {
        "where": where, "what": what, "ms": median / steps * 1e3,
        "times_stock": ratio(times, "stock", what), "gflop_per_s": work / median,
    }  # fmt: skip


def training(name: str, batch_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per way to train: milliseconds of an update, and how far the losses are from ours.

    Between two updates of the trainer, which asks for its loss once in each, stock makes its own.
    """
    unet = make_unet(name, options.device)
    images = random_images(unet, batch_size)
    kinds: dict[str, dict[str, Any]] = {"ours": {}}
    if "bf16" in variants(options.device, compiled=False):
        kinds["ours, bf16"] = {"mixed_precision": "bf16"}
    if options.full:
        kinds["ours, compiled"] = {"compile": True}
    rows, work = [], 3 * gflop(unet, batch_size)  # the backward pass is twice the forward pass
    losses: dict[str, list[torch.Tensor]] = {}
    for what, chosen in kinds.items():
        stock, marks, seen = StockLoop(copy.deepcopy(unet)), [], losses.setdefault(what, [])

        def loss(
            *inputs: Any, stock: Any = stock, marks: list[Any] = marks, seen: list[Any] = seen
        ) -> torch.Tensor:
            end = now()
            stock.update(images)
            marks.append((end, now()))
            values = simple_loss(*inputs)
            seen.append(values.detach().mean())
            return values

        num_updates = options.turns + 3
        train_ours(copy.deepcopy(unet), images, num_updates, loss, **chosen)
        # Before the updates compiled gradients are checked; the first update warms up.
        pairs = list(pairwise(marks[-num_updates + 1 :]))
        times = {
            "stock": [end - start for (start, end), _ in pairs],
            what: [later[0] - earlier[1] for earlier, later in pairs],
        }
        where = f"training {name}, batch {batch_size}"
        rows += [row(where, each, times, work) for each in times if each != "stock" or not rows]
        ours, these = (torch.stack(each[-num_updates:]) for each in (losses["ours"], seen))
        rows[-1]["deviation"] = float(((these - ours) / ours).abs().max())
    return rows


def memories(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, float]:
    """Before anything else runs in this process: threads do not survive a fork."""

    def draw(kind: type) -> None:
        pipeline = kind(make_unet(name, options.device), DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        pipeline(batch_size, num_inference_steps=2, output_type="np")

    def update(ours: bool) -> None:
        unet = make_unet(name, options.device)
        images = random_images(unet, batch_size)
        if ours:
            train_ours(unet, images, 2, simple_loss)
            return
        stock = StockLoop(unet)
        stock.update(images)
        stock.update(images)

    works: dict[str, Callable[[], Any]] = {
        f"sampling {name}, batch {batch_size}: stock": lambda: draw(DDPMPipeline),
        f"sampling {name}, batch {batch_size}: ours": lambda: draw(GaussianDDPMPipeline),
        f"training {name}, batch {batch_size}: stock": lambda: update(False),
        f"training {name}, batch {batch_size}: ours": lambda: update(True),
    }
    # Pages that the allocator keeps make a tenth of difference from process to process.
    return {
        what: statistics.median(memory(work, options.device) for _ in range(3))
        for what, work in works.items()
    }


def show(rows: list[dict[str, Any]], peak: dict[str, float]) -> None:
    print(f"\n{'':26} {'':22} {'ms':>9} {'x stock':>8} {'GFLOP/s':>8} {'of matmul':>9} differs by")
    for each in rows:
        deviation = f"{each['deviation']:.1g}" if "deviation" in each else ""
        print(
            f"{each['where']:26} {each['what']:22} {each['ms']:9.1f} {each['times_stock']:8.2f} "
            f"{each['gflop_per_s']:8.1f} {each['gflop_per_s'] / peak['matmul']:9.0%} {deviation}"
        )


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--full", action="store_true", help="all batch sizes, and compiled training"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    batches = FULL_BATCHES if options.full else BATCHES
    grown = memories("small", 16, options) | memories("cifar", 1, options)
    peak, about = limits(options.device), machine(options)
    rows = [r for name in batches for size in batches[name] for r in sampling(name, size, options)]
    rows += training("small", 16, options) + (training("cifar", 16, options) * options.full)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(", ".join(f"{key} {value:.0f} GFLOP/s" for key, value in peak.items()))
    show(rows, peak)
    print("\npeak memory, MiB:", *(f"{k} {v:.0f}" for k, v in grown.items()), sep="\n  ")
    keep({"machine": about, "gflop_per_s": peak, "rows": rows, "memory_mib": grown}, options)


if __name__ == "__main__":
    main()
