"""Speed and memory of sampling and training, beside stock diffusers and the machine's limit.

    python tests/benchmarks/bench_speed.py [--full] [--device cuda] [--threads N] [--json FILE]

Prints, and asserts nothing. All sides take turns in one process; each time is the median over the
turns, each ratio the median of the turns' ratios. Minutes; `--full`, an hour on two cores, adds the
larger batches of the 35.7M network of DDPM (2006.11239, appendix B). Memory is the growth of the
peak of a process that did nothing before.
"""

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import GaussianDDPMPipeline, TrainingConfig, simple_loss, train
from ddpm_hf.diffusion.speed import has_bfloat16

NUM_STEPS = 4  # of a chain: each costs the same
NETWORKS = {
    "small": {
        "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3,
        "attention_head_dim": 64,
    },
    "cifar": {
        "block_out_channels": (128, 256, 256, 256), "attention_head_dim": None,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    },
}  # fmt: skip
BATCHES = {"small": (1, 16), "cifar": (1,)}
FULL_BATCHES = {"small": (1, 16, 64), "cifar": (1, 16, 64)}


def make_unet(name: str, device: str = "cpu") -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(sample_size=32, **NETWORKS[name]).to(device)


def now() -> float:
    """CPU time where one thread does all, so that waiting for other processes does not count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(call: Callable[[], Any]) -> float:
    start = now()
    call()
    return now() - start


def race(calls: dict[str, Callable[[], Any]], num_turns: int) -> dict[str, list[float]]:
    """Seconds of each, turn by turn, after one that warms up."""
    for call in calls.values():
        call()
    turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(num_turns)]
    return {name: [turn[name] for turn in turns] for name in calls}


def gflop(unet: UNet2DModel, batch_size: int) -> float:
    """Of one call: 2 for each multiplication with its addition."""
    size = unet.config.sample_size
    x = torch.zeros(batch_size, unet.config.in_channels, size, size, device=unet.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(x, 0)
    return counter.get_total_flops() / 1e9


def limits(device: str) -> dict[str, float]:
    """GFLOP/s of a matrix product, and of a convolution as these networks have most."""
    a, images = torch.randn(1024, 1024, device=device), torch.randn(16, 64, 16, 16, device=device)
    kernel = torch.randn(64, 64, 3, 3, device=device)
    calls = {"matmul": lambda: a @ a, "conv": lambda: F.conv2d(images, kernel, padding=1)}
    work = {"matmul": 2 * 1024**3, "conv": 2 * 16 * 16 * 16 * 64 * 64 * 9}
    return {n: work[n] / statistics.median(t) / 1e9 for n, t in race(calls, 25).items()}


def variants(device: str, compiled: bool) -> dict[str, dict[str, Any]]:
    """Arguments of `optimize`, by what they change."""
    factors: dict[str, dict[str, Any]] = {"channels_last": {"memory_format": torch.channels_last}}
    if has_bfloat16(torch.device(device)):  # without it a CPU takes 40 times as long
        factors["bf16"] = {"dtype": torch.bfloat16}
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
    ratios = [stock / other for stock, other in zip(times["stock"], times[what], strict=True)]
    return {
        "where": where, "what": what, "ms": median / steps * 1e3,
        "times_stock": statistics.median(ratios), "gflop_per_s": work / median,
    }  # fmt: skip


class StockLoop:
    """An update as diffusers' train_unconditional.py makes it."""

    def __init__(self, unet: UNet2DModel) -> None:
        self.unet, self.scheduler = unet.train(), DDPMScheduler()
        self.optimizer = torch.optim.AdamW(
            unet.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rates = get_scheduler(
            "cosine", self.optimizer, num_warmup_steps=500, num_training_steps=10_000
        )
        self.ema = EMAModel(unet.parameters(), 0.9999, use_ema_warmup=True, model_cls=UNet2DModel)

    def update(self, images: torch.Tensor) -> None:
        noise = torch.randn(images.shape, device=images.device)
        t = torch.randint(0, 1000, (len(images),), device=images.device)
        noisy = self.scheduler.add_noise(images, noise, t)
        loss = F.mse_loss(self.unet(noisy, t).sample, noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.unet.parameters(), 1.0)
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        self.ema.step(self.unet.parameters())
        loss.item()  # it logs each step


def train_ours(unet: UNet2DModel, images: torch.Tensor, num_updates: int, loss: Any, **chosen: Any):
    """The trainer as users call it, without its last outputs."""
    silent = StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(silent), redirect_stderr(silent):
        config = TrainingConfig(
            output_dir=folder, batch_size=len(images), max_train_steps=num_updates, num_samples=0,
            lr_warmup_steps=0, prediction_type="epsilon", beta_schedule="linear",
            num_threads=torch.get_num_threads(), **chosen,
        )  # fmt: skip
        train(config, unet=unet, dataset=list(images.cpu()), loss=loss)


def training(name: str, batch_size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per way to train: milliseconds of an update.

    Between two updates of the trainer, which asks for its loss once in each, stock makes its own.
    """
    unet = make_unet(name, options.device)
    images = torch.rand(batch_size, unet.config.in_channels, 32, 32, device=options.device) * 2 - 1
    kinds: dict[str, dict[str, Any]] = {"ours": {}}
    if "bf16" in variants(options.device, compiled=False):
        kinds["ours, bf16"] = {"mixed_precision": "bf16"}
    if options.full:
        kinds["ours, compiled"] = {"compile": True}
    rows, work = [], 3 * gflop(unet, batch_size)  # the backward pass is twice the forward pass
    for what, chosen in kinds.items():
        stock, marks = StockLoop(copy.deepcopy(unet)), []

        def loss(*inputs: Any, stock: Any = stock, marks: list[Any] = marks) -> torch.Tensor:
            end = now()
            stock.update(images)
            marks.append((end, now()))
            return simple_loss(*inputs)

        train_ours(copy.deepcopy(unet), images, options.turns + 3, loss, **chosen)
        pairs = list(pairwise(marks[1:]))  # the first one warms up
        times = {
            "stock": [end - start for (start, end), _ in pairs],
            what: [later[0] - earlier[1] for earlier, later in pairs],
        }
        where = f"training {name}, batch {batch_size}"
        rows += [row(where, each, times, work) for each in times if each != "stock" or not rows]
    return rows


def memory(work: Callable[[], Any], device: str) -> float:
    """MiB by which the peak of a new process grows."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader) as pipe:
            found = pipe.read()
        os.waitpid(child, 0)
        return float(found or "nan")
    try:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        work()
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
        if device == "cuda":
            grown = torch.cuda.max_memory_allocated() / 2**20
        os.write(writer, str(grown).encode())
    finally:
        os._exit(0)


def memories(name: str, batch_size: int, options: argparse.Namespace) -> dict[str, float]:
    """Before anything else runs in this process: threads do not survive a fork."""

    def draw(kind: type) -> None:
        pipeline = kind(make_unet(name, options.device), DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        pipeline(batch_size, num_inference_steps=2, output_type="np")

    def update(ours: bool) -> None:
        unet = make_unet(name, options.device)
        shape = (batch_size, unet.config.in_channels, 32, 32)
        images = torch.zeros(shape, device=options.device)
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--full", action="store_true", help="all batch sizes, and compiled training"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="of the CPU (default: its cores)")
    parser.add_argument("--turns", type=int, default=5, help="of each race (default: 5)")
    parser.add_argument("--json", type=Path, help="write the results there, too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    batches = FULL_BATCHES if options.full else BATCHES
    grown = memories("small", 16, options) | memories("cifar", 1, options)
    machine = {
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(), "turns": options.turns,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }  # fmt: skip
    peak = limits(options.device)
    rows = [r for name in batches for size in batches[name] for r in sampling(name, size, options)]
    rows += training("small", 16, options) + (training("cifar", 16, options) * options.full)
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(", ".join(f"{key} {value:.0f} GFLOP/s" for key, value in peak.items()))
    show(rows, peak)
    print("\npeak memory, MiB:", *(f"{k} {v:.0f}" for k, v in grown.items()), sep="\n  ")
    if options.json:
        results = {"machine": machine, "gflop_per_s": peak, "rows": rows, "memory_mib": grown}
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
