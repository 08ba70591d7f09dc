"""Speed and memory of sampling and training, compared with other packages and hardware limits.

    python tests/benchmarks/bench_speed.py [--full] [--device cuda] [--threads N] [--json FILE]

Compares with the pipeline and training loop of stock diffusers, and with the same network in
denoising-diffusion-pytorch if it is installed. Runs alternate in one process; times and ratios are
medians. Takes minutes; `--full` takes an hour on two cores and adds larger batches of the 35.7M
network of DDPM (2006.11239, appendix B) and compiled training. Memory is the growth of the peak of
a new process.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import denoising_diffusion
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

from ddpm_hf import GaussianDDPMPipeline, optimize, simple_loss
from ddpm_hf.utils.backend_settings import supports_bfloat16

NUM_STEPS = 4  # each step costs the same
BATCHES = {"small": (1, 16), "cifar": (1,)}
FULL_BATCHES = {"small": (1, 16, 64), "cifar": (1, 16, 64)}


def gflop(unet: UNet2DModel, batch_size: int) -> float:
    """GFLOP of one call."""
    with torch.no_grad():
        return sum(flops(lambda: unet(random_images(unet, batch_size), 0)).values())


def variants(device: str, compiled: bool) -> dict[str, dict[str, Any]]:
    """Arguments of `optimize` for each variant."""
    factors: dict[str, dict[str, Any]] = {"channels_last": {"memory_format": torch.channels_last}}
    if supports_bfloat16(torch.device(device)):  # without support, a CPU takes 40 times as long
        factors["bf16"] = {"dtype": torch.bfloat16}
    if device == "cuda":
        factors["TF32"] = {"tf32": True}
    if compiled:
        factors["compiled"] = {"compile": True}
    together = {key: value for options in factors.values() for key, value in options.items()}
    return factors | ({"together": together} if len(factors) > 1 else {})


def sampling(name: str, batch_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per variant: milliseconds of a step, and the largest deviation of the images."""
    unet, scheduler = make_unet(name, options.device).eval(), DDPMScheduler()

    def build(kind: type, **chosen: Any) -> Any:
        # Unchanged networks share memory: its address changes times by 5%.
        network = copy.deepcopy(unet) if chosen else unet
        pipeline = kind(network, DDPMScheduler.from_config(scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        if chosen:
            optimize(pipeline, batch_size, num_calls=1, **chosen)
        return pipeline

    def draw(pipeline: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        return pipeline(batch_size, generator, NUM_STEPS, output_type="np").images

    pipelines = {"stock": build(DDPMPipeline), "ours": build(GaussianDDPMPipeline)}
    for what, chosen in variants(options.device, name == "small" and batch_size == 16).items():
        pipelines[f"ours, {what}"] = build(GaussianDDPMPipeline, **chosen)
    calls: dict[str, Callable[[], Any]] = {
        what: lambda p=pipeline: draw(p) for what, pipeline in pipelines.items()
    }
    if not denoising_diffusion.missing:
        sampler = denoising_diffusion.Sampler(unet, NUM_STEPS)
        calls[denoising_diffusion.NAME] = lambda: sampler(batch_size)
    times, images = race(calls, options.turns), {what: call() for what, call in calls.items()}
    work = gflop(unet, batch_size) * NUM_STEPS
    rows = {
        w: row(f"sampling {name}, batch {batch_size}", w, times, work, NUM_STEPS) for w in times
    }
    for what in pipelines:  # denoising-diffusion-pytorch uses other noise
        rows[what]["deviation"] = float(abs(images[what] - images["ours"]).max())
    return list(rows.values())


def row(
    where: str, what: str, times: dict[str, list[float]], work: float, steps: int = 1
) -> dict[str, Any]:
    median = statistics.median(times[what])
    return {
        "where": where, "what": what, "ms": median / steps * 1e3,
        "times_stock": ratio(times, "stock", what), "gflop_per_s": work / median,
    }  # fmt: skip


def training(name: str, batch_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per variant: milliseconds of an update, and the relative deviation of the losses.

    The trainer calls its loss once in each update; the other loops run their updates in this call.
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
        others: dict[str, Any] = {"stock": StockLoop(copy.deepcopy(unet))}
        if not denoising_diffusion.missing and not rows:
            others[denoising_diffusion.NAME] = denoising_diffusion.Loop(copy.deepcopy(unet))
        marks: list[list[float]] = []
        seen = losses.setdefault(what, [])

        def loss(
            *inputs: Any, others: Any = others, marks: list[Any] = marks, seen: list[Any] = seen
        ) -> torch.Tensor:
            mark = [now()]
            for other in others.values():
                other.update(images)
                mark.append(now())
            marks.append(mark)
            values = simple_loss(*inputs)
            seen.append(values.detach().mean())
            return values

        num_updates = options.turns + 3
        train_ours(copy.deepcopy(unet), images, num_updates, loss, **chosen)
        # The check of compiled gradients comes before the updates; the first update is a warm-up.
        pairs = list(pairwise(marks[-num_updates + 1 :]))
        times = {
            other: [mark[index + 1] - mark[index] for mark, _ in pairs]
            for index, other in enumerate(others)
        }
        times[what] = [later[0] - earlier[-1] for earlier, later in pairs]
        where = f"training {name}, batch {batch_size}"
        rows += [row(where, each, times, work) for each in times if each != "stock" or not rows]
        ours, these = (torch.stack(each[-num_updates:]) for each in (losses["ours"], seen))
        rows[-1]["deviation"] = float(((these - ours) / ours).abs().max())
    return rows


def memories(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, float]:
    """Peak MiB by case; must run first in the process: threads do not survive a fork."""

    def draw(kind: type) -> None:
        pipeline = kind(make_unet(name, options.device), DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        pipeline(batch_size, num_inference_steps=2, output_type="np")

    def update(kind: type | None) -> None:
        unet = make_unet(name, options.device)
        images = random_images(unet, batch_size)
        if kind is None:
            train_ours(unet, images, 2, simple_loss)
            return
        loop = kind(unet)
        loop.update(images)
        loop.update(images)

    works: dict[str, Callable[[], Any]] = {
        "sampling: stock": lambda: draw(DDPMPipeline),
        "sampling: ours": lambda: draw(GaussianDDPMPipeline),
        "training: stock": lambda: update(StockLoop),
        "training: ours": lambda: update(None),
    }
    if not denoising_diffusion.missing:
        works |= {
            f"sampling: {denoising_diffusion.NAME}": lambda: denoising_diffusion.Sampler(
                make_unet(name, options.device), 2
            )(batch_size),
            f"training: {denoising_diffusion.NAME}": lambda: update(denoising_diffusion.Loop),
        }
    # Pages kept by the allocator change the result by 10% between processes.
    return {
        f"{name}, batch {batch_size}, {what}": statistics.median(
            memory(work, options.device) for _ in range(3)
        )
        for what, work in works.items()
    }


HEAD = f"{'':26} {'':22} {'ms':>9} {'x stock':>8} {'GFLOP/s':>8} {'of matmul':>9} deviation"


def show(rows: list[dict[str, Any]], peak: dict[str, float]) -> list[dict[str, Any]]:
    for each in rows:
        deviation = f"{each['deviation']:.1g}" if "deviation" in each else ""
        print(
            f"{each['where']:26} {each['what']:22} {each['ms']:9.1f} {each['times_stock']:8.2f} "
            f"{each['gflop_per_s']:8.1f} {each['gflop_per_s'] / peak['matmul']:9.0%} {deviation}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument(
        "--full", action="store_true", help="also larger batches and compiled training"
    )
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if denoising_diffusion.missing:
        print(f"Skipped denoising-diffusion-pytorch: {denoising_diffusion.missing}")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    batches = FULL_BATCHES if options.full else BATCHES
    grown = memories("small", 16, options) | memories("cifar", 1, options)
    peak, about = limits(options.device), machine(options)
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(", ".join(f"{key} {value:.0f} GFLOP/s" for key, value in peak.items()))
    print(f"\n{HEAD}", flush=True)
    rows: list[dict[str, Any]] = []
    for name in batches:
        for size in batches[name]:
            rows += show(sampling(name, size, options), peak)
    for name in batches if options.full else ("small",):
        rows += show(training(name, 16, options), peak)
    print("\npeak memory, MiB:", *(f"{k} {v:.0f}" for k, v in grown.items()), sep="\n  ")
    keep({"machine": about, "gflop_per_s": peak, "rows": rows, "memory_mib": grown}, options)


if __name__ == "__main__":
    main()
