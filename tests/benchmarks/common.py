"""Networks, training loops and timing of the benchmarks."""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils.flop_counter import FlopCounterMode

from ddpm_hf import TrainingConfig, train

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


def make_unet(name: str, device: str = "cpu", size: int = 32) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(sample_size=size, **NETWORKS[name]).to(device)


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Argument parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--threads", type=int, help="CPU threads (default: its cores)")
    parser.add_argument(
        "--turns", type=int, default=5, help="repetitions of each measurement (default: 5)"
    )
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser


def machine(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "torch": torch.__version__, "diffusers": diffusers.__version__,
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "simd": torch.backends.cpu.get_cpu_capability(), "turns": options.turns,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
    }  # fmt: skip


def keep(results: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def now() -> float:
    """CPU time with one thread, which excludes other processes; else the wall clock; seconds."""
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
    """Seconds of each call in alternating order, after a warm-up call."""
    for call in calls.values():
        call()
    turns = [{name: seconds(call) for name, call in calls.items()} for _ in range(num_turns)]
    return {name: [turn[name] for turn in turns] for name in calls}


def ratio(times: dict[str, list[float]], slow: str, fast: str) -> float:
    """Median ratio of the times of `slow` and `fast`."""
    return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))


def flops(call: Callable[[], Any]) -> dict[str, float]:
    """GFLOP of one call by operation; a multiply-add counts as 2."""
    with FlopCounterMode(display=False) as counter:
        call()
    total = counter.get_flop_counts()["Global"]
    return {str(operation): count / 1e9 for operation, count in total.items()}


def limits(device: str, num_turns: int = 15) -> dict[str, float]:
    """GFLOP/s of a matrix product and of the fastest convolution of typical sizes."""
    a = torch.randn(1024, 1024, device=device)
    calls: dict[str, Callable[[], Any]] = {"matmul": lambda: a @ a}
    work = {"matmul": 2.0 * 1024**3}
    for channels, side in ((32, 32), (64, 16), (128, 16), (256, 8)):
        x = torch.randn(16, channels, side, side, device=device)
        kernel, name = torch.randn(channels, channels, 3, 3, device=device), f"conv {channels}"
        calls[name] = lambda x=x, kernel=kernel: F.conv2d(x, kernel, padding=1)
        work[name] = 2.0 * 16 * side**2 * channels**2 * 9
    speeds = {n: work[n] / statistics.median(t) / 1e9 for n, t in race(calls, num_turns).items()}
    return {
        "matmul": speeds["matmul"],
        "conv": max(speed for name, speed in speeds.items() if name.startswith("conv")),
    }


class StockLoop:
    """The training update of train_unconditional.py in diffusers."""

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
        loss.item()  # logged at each step


def train_ours(unet: UNet2DModel, images: torch.Tensor, num_updates: int, loss: Any, **chosen: Any):
    """Run the trainer silently, without samples."""
    silent = StringIO()
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(silent), redirect_stderr(silent):
        config = TrainingConfig(
            **{
                "output_dir": folder, "batch_size": len(images), "max_train_steps": num_updates,
                "num_samples": 0, "lr_warmup_steps": 0, "prediction_type": "epsilon",
                "beta_schedule": "linear", "num_threads": torch.get_num_threads(), **chosen,
            }
        )  # fmt: skip
        train(config, unet=unet, dataset=list(images.cpu()), loss=loss)


def random_images(unet: UNet2DModel, batch_size: int) -> torch.Tensor:
    """Uniform noise in [-1, 1], (B, C, H, W)."""
    side = unet.config.sample_size
    shape = (batch_size, unet.config.in_channels, side, side)
    return torch.rand(shape, device=unet.device) * 2 - 1


def memory(work: Callable[[], Any], device: str) -> float:
    """Growth of the peak memory of a forked process in MiB; threads do not survive the fork."""
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
