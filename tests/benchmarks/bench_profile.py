"""Profile of a sampling step and a training update, with the number of device synchronizations.

    python tests/benchmarks/bench_profile.py [--network cifar] [--device cuda] [--json FILE]

Prints the most expensive operations, the speed of convolutions relative to the fastest one measured
on this machine, and the number of synchronizations of the host with the device, compared with stock
diffusers. On a CPU, values read by Python are counted instead: two in an update of this package,
which checks the images before they are sent to the device, and one for every weight in AdamW of
stock, which reads its step count there on a CPU only.
"""

import argparse
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import (
    StockLoop,
    flops,
    keep,
    limits,
    machine,
    make_unet,
    parser_of,
    random_images,
    train_ours,
)
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf import GaussianDDPMPipeline, simple_loss

NUM_STEPS = 4
SHOWN = 8
GPU_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
READS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Reads(TorchDispatchMode):
    """Count operations whose result the host must wait for."""

    def __enter__(self) -> "Reads":
        self.count = 0
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count += function.overloadpacket.__name__ in READS
        return function(*args, **(kwargs or {}))


class Section:
    """Profile operations, or count reads, between `begin` and `end`."""

    def __init__(self, device: str, counting: bool) -> None:
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        self.reads, self.profile = Reads(), profile(activities=activities)
        self._manager = self.reads if counting else self.profile

    def begin(self) -> None:
        self._manager.__enter__()

    def end(self) -> None:
        self._manager.__exit__(None, None, None)


Work = Callable[[Section, int], None]  # runs the given number of steps in the section


def of_sampling(kind: type, unet: UNet2DModel, batch_size: int) -> Work:
    """Sampling steps, delimited by calls of the network."""

    def work(section: Section, num_steps: int) -> None:
        pipeline = kind(unet, DDPMScheduler())
        pipeline.set_progress_bar_config(disable=True)
        calls = 0

        def before_call(*_: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 2:
                section.begin()
            elif calls == 2 + num_steps:
                section.end()

        hook = unet.register_forward_pre_hook(before_call)
        try:
            pipeline(batch_size, num_inference_steps=3 + num_steps, output_type="np")
        finally:
            hook.remove()

    return work


def of_stock_training(unet: UNet2DModel, batch_size: int) -> Work:
    def work(section: Section, num_steps: int) -> None:
        stock, images = StockLoop(unet), random_images(unet, batch_size)
        stock.update(images)
        section.begin()
        for _ in range(num_steps):
            stock.update(images)
        section.end()

    return work


def of_training(unet: UNet2DModel, batch_size: int) -> Work:
    """Training updates, delimited by calls of the loss."""

    def work(section: Section, num_steps: int) -> None:
        calls = 0

        def loss(*inputs: Any) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == 3:
                section.begin()
            elif calls == 3 + num_steps:
                section.end()
            return simple_loss(*inputs)

        train_ours(unet, random_images(unet, batch_size), 4 + num_steps, loss)

    return work


def shares(section: Section, device: str) -> dict[str, float]:
    """Shares of the total time by operation, in decreasing order."""
    times = Counter(
        {
            event.key: event.self_device_time_total
            if device == "cuda"
            else event.self_cpu_time_total
            for event in section.profile.key_averages()
        }
    )
    total = sum(times.values())
    return {name: time / total for name, time in times.most_common(SHOWN)}


def conv_speed(section: Section, gflop: float) -> float:
    """GFLOP/s of the convolutions in NUM_STEPS steps."""
    kinds = ("aten::mkldnn_convolution", "aten::cudnn_convolution", "aten::convolution_backward")
    events = {event.key: event for event in section.profile.key_averages()}
    times = [
        max(events[kind].cpu_time_total, events[kind].device_time_total)
        for kind in kinds
        if kind in events
    ]
    return gflop * NUM_STEPS / (sum(times) / 1e6)


def waits(work: Work, device: str) -> float:
    """Synchronizations per step, as the difference between 2n and n steps divided by n."""
    counts = []
    for num_steps in (NUM_STEPS, 2 * NUM_STEPS):
        section = Section(device, counting=device != "cuda")
        work(section, num_steps)
        if device == "cuda":
            events = section.profile.key_averages()
            counts.append(sum(event.count for event in events if event.key in GPU_WAITS))
        else:
            counts.append(section.reads.count)
    return (counts[1] - counts[0]) / NUM_STEPS


def report(options: argparse.Namespace) -> dict[str, Any]:
    name, size, device = options.network, options.batch_size, options.device
    unet = make_unet(name, device)
    images = random_images(unet, size)
    peak = limits(device, 3 * options.turns)["conv"]
    works = {
        "sampling step": (
            of_sampling(DDPMPipeline, unet, size),
            of_sampling(GaussianDDPMPipeline, unet, size),
            flops(lambda: torch.no_grad()(unet)(images, 0)),
        ),
        "training update": (
            of_stock_training(unet, size),
            of_training(unet, size),
            flops(lambda: unet(images, 0).sample.mean().backward()),
        ),
    }
    results: dict[str, Any] = {"machine": machine(options), "conv_gflop_per_s": peak}
    for what, (stock, ours, work) in works.items():
        section = Section(device, counting=False)
        ours(section, NUM_STEPS)
        of_convs = sum(gflop for operation, gflop in work.items() if "convolution" in operation)
        speed = conv_speed(section, of_convs)
        results[f"{what}, {name}, batch {size}"] = {
            "operations": shares(section, device),
            "flops_of_convolutions": of_convs / sum(work.values()),
            "convolutions_of_peak": speed / peak,
            "waits": waits(ours, device),
            "waits_of_stock": waits(stock, device),
        }
    return results


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--network", choices=("small", "cifar"), default="small")
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads or torch.get_num_threads())
    results = report(options)
    for what, found in results.items():
        if not isinstance(found, dict) or "operations" not in found:
            continue
        print(f"\n{what}")
        for operation, share in found["operations"].items():
            print(f"  {share:6.1%} {operation}")
        print(
            f"  convolutions: {found['flops_of_convolutions']:.0%} of the operations, at "
            f"{found['convolutions_of_peak']:.0%} of {results['conv_gflop_per_s']:.0f} GFLOP/s\n"
            f"  synchronizations per step: {found['waits']:g}; "
            f"stock {found['waits_of_stock']:g}"
        )
    keep(results, options)


if __name__ == "__main__":
    main()
