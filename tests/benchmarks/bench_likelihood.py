"""Cost of the bound and the losses relative to their network calls.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_likelihood.py [--json FILE]

A UNet with 0.65 million parameters on 16 images of 32x32. Times are CPU times of one thread; each
ratio is the median over alternating runs.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DModel

from ddpm_hf import GaussianDDPMScheduler, bits_per_dim
from ddpm_hf.losses import hybrid_loss, simple_loss, vlb_loss

NUM_IMAGES = 16


def make_unet() -> UNet2DModel:
    """A network with a learned variance."""
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=2,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def seconds(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


def ratio(ours: Callable[[], Any], floor: Callable[[], Any], num_turns: int) -> str:
    """Median ratio of the times of `ours` and `floor`, and the median time of `floor`."""
    ours(), floor()
    turns = [(seconds(ours), seconds(floor)) for _ in range(num_turns)]
    median = statistics.median(a / b for a, b in turns)
    return f"{median:.3f}x (floor {statistics.median(b for _, b in turns):.2f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    unet, scheduler = make_unet(), GaussianDDPMScheduler(variance_type="learned_range")
    images = torch.randint(256, (NUM_IMAGES, 1, 32, 32)).float() / 127.5 - 1
    noise = torch.randn_like(images)
    optimizer = torch.optim.AdamW(unet.parameters())

    @torch.no_grad()
    def calls(num: int) -> None:
        for step in range(num):
            unet(images, torch.full((NUM_IMAGES,), step))

    def bound(num: int) -> None:
        bits_per_dim(unet, scheduler, images, timesteps=range(num - 1, -1, -1), progress=False)

    def update(loss: Callable[..., torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            for step in range(4):
                t = (torch.arange(NUM_IMAGES) * 62 + step) % 1000  # includes the last step
                loss(unet, scheduler, images, t, noise).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

        return run

    races = {
        "bound, 50 terms: over its network calls": (lambda: bound(50), lambda: calls(50), 5),
        "hybrid_loss update: over simple_loss": (update(hybrid_loss), update(simple_loss), 7),
        "vlb_loss update: over simple_loss": (update(vlb_loss), update(simple_loss), 7),
    }
    results = {"torch": torch.__version__, "diffusers": diffusers.__version__}
    results["machine"] = platform.processor() or platform.machine()
    for name, (ours, floor, num_turns) in races.items():
        results[name] = ratio(ours, floor, num_turns)
        print(f"{name}: {results[name]}", flush=True)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
