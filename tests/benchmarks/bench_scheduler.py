"""Speed and accuracy of the scheduler, compared with stock diffusers.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_scheduler.py [--speed-only] [--json FILE]

Times are CPU times of one thread, which exclude other processes; each ratio is the median over
alternating runs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

sys.path.insert(0, str(Path(__file__).parents[1]))

SYNCS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Operations(TorchDispatchMode):
    """Count the operations of torch."""

    def __enter__(self) -> "Operations":
        self.count: Counter[str] = Counter()
        return super().__enter__()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def seconds(call: Callable[[], Any], num_calls: int) -> float:
    start = time.process_time()
    for _ in range(num_calls):
        call()
    return (time.process_time() - start) / num_calls


def race(ours: Callable[[], Any], other: Callable[[], Any], num_calls: int, num_turns: int = 21):
    """Median seconds of both and the median ratio other/ours."""
    turns = [(seconds(ours, num_calls), seconds(other, num_calls)) for _ in range(num_turns)]
    a, b = (statistics.median(column) for column in zip(*turns, strict=True))
    return a, b, statistics.median(other / ours for ours, other in turns)


def inputs(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(shape), torch.randn(shape)


def small_steps() -> dict[str, Any]:
    """A step at (1, 1, 8, 8), where overhead dominates."""
    ours, stock = GaussianDDPMScheduler(), DDPMScheduler()
    stock.set_timesteps(1000)
    output, x = inputs((1, 1, 8, 8))
    results = {}
    for form, t in (("int t", 500), ("tensor t", stock.timesteps[499])):
        for as_dict in (True, False):
            a, b, ratio = race(
                lambda t=t, d=as_dict: ours.step(output, t, x, return_dict=d),
                lambda t=t, d=as_dict: stock.step(output, t, x, return_dict=d),
                num_calls=200,
            )
            name = f"step (1,1,8,8) {form}, {'output' if as_dict else 'tuple'}: stock/ours"
            results[name] = f"{ratio:.1f}x ({a * 1e6:.1f} us; stock {b * 1e6:.0f} us)"
    return results


def large_steps() -> dict[str, Any]:
    """A step relative to its lower bound: noise of its shape and three elementwise passes."""
    results, scheduler = {}, GaussianDDPMScheduler()
    factor = torch.tensor(0.5)
    for shape in ((16, 3, 32, 32), (128, 3, 32, 32), (16, 3, 64, 64), (4, 3, 256, 256)):
        output, x = inputs(shape)

        def floor(shape=shape, x=x):
            y = torch.randn(shape) * factor
            y = y + x
            return y * factor

        a, _, ratio = race(lambda o=output, x=x: scheduler.step(o, 500, x), floor, num_calls=5)
        results[f"step {shape}: ours/floor"] = f"{1 / ratio:.2f}x ({a * 1e3:.2f} ms)"
    return results


def operations() -> dict[str, Any]:
    results = {}
    for variance_type in ("fixed_small", "learned_range"):
        channels = 2 if variance_type == "learned_range" else 1
        output, x = torch.randn(2, channels, 8, 8), torch.randn(2, 1, 8, 8)
        schedulers = [GaussianDDPMScheduler(variance_type=variance_type)]
        schedulers.append(DDPMScheduler(variance_type=variance_type))
        for scheduler in schedulers:
            scheduler.set_timesteps(1000)
        forms = {"int t": 500, "host tensor t": torch.tensor(500)}
        for form, t in forms.items():
            counts = []
            for scheduler in schedulers:
                scheduler.step(output, t, x)
                with Operations() as ops:
                    scheduler.step(output, t, x)
                counts.append(ops.count)
            syncs = [sum(count[name] for name in SYNCS) for count in counts]
            results[f"ops of step, {variance_type}, {form}"] = (
                f"{counts[0].total()} with {syncs[0]} reads of a value"
                f" (stock {counts[1].total()} with {syncs[1]})"
            )
        ours = schedulers[0]
        ours.set_timesteps(1000, device="meta")  # no values: a sync would raise
        ours.step(output.to("meta"), ours.timesteps[0], x.to("meta"))
        for form, t in (("device t", ours.timesteps[500]), ("device t (B,)", ours.timesteps[:2])):
            with Operations() as ops:
                ours.step(output.to("meta"), t, x.to("meta"))
            moves = ops.count.pop("_to_copy")
            results[f"ops of step, {variance_type}, {form}"] = (
                f"{ops.count.total()} with 0 syncs (without the {moves} copies of the benchmark)"
            )
    return results


def noising() -> dict[str, Any]:
    """Adding noise: two passes and one new tensor; stock needs three of each.

    The arithmetic explains a ratio of 1.5. If glibc returns the temporaries of stock to the system
    after each call, which depends on earlier allocations, the ratio is 4, or 14 on a machine with
    slow page faults: repeat the benchmark.
    MALLOC_MMAP_THRESHOLD_=1000000000 MALLOC_TRIM_THRESHOLD_=1000000000 keeps the memory (1.5x);
    only the first, with 131072, returns all memory, also that of this package (3x).
    """
    ours, stock = GaussianDDPMScheduler(), DDPMScheduler()
    x, noise = inputs((128, 3, 32, 32))
    t = torch.randint(0, 1000, (128,))
    results = {}
    for name in ("add_noise", "get_velocity"):
        a, b, ratio = race(
            lambda n=name: getattr(ours, n)(x, noise, t),
            lambda n=name: getattr(stock, n)(x, noise, t),
            num_calls=20,
        )
        results[f"{name} (128,3,32,32): stock/ours"] = (
            f"{ratio:.1f}x ({a * 1e6:.0f} us; stock {b * 1e6:.0f} us)"
        )
    return results


def set_up() -> dict[str, Any]:
    results = {}
    for schedule in ("linear", "squaredcos_cap_v2", "chen_sigmoid"):
        took = [
            seconds(lambda s=schedule: GaussianDDPMScheduler(beta_schedule=s), 3) for _ in "1234567"
        ]
        results[f"set-up, T=1000, {schedule}"] = f"{statistics.median(took) * 1e3:.2f} ms"
    scheduler = GaussianDDPMScheduler()
    took = [seconds(lambda: scheduler.set_timesteps(1000), 5) for _ in range(7)]
    results["set_timesteps(1000)"] = f"{statistics.median(took) * 1e3:.2f} ms"
    return results


def exactness() -> dict[str, Any]:
    """The errors that are bounded by tests."""
    import test_parity_diffusers as parity
    import test_scheduler as exact
    from oracles import alpha_bars, relative_error, to_float64

    results = {}
    for case in exact.REFERENCES:
        scheduler, _, bars = exact.scheduler_and_reference(case)
        t, ones = torch.arange(len(scheduler)), torch.ones(len(scheduler), 1, dtype=torch.float64)
        variance = scheduler.q_mean_variance(ones, t).variance
        want = [1 - bar for bar in bars]
        beta = scheduler.diffuse_one_step(0 * ones, t, ones) ** 2
        _, betas, _ = exact.scheduler_and_reference(case)
        stock = 1 - DDPMScheduler(trained_betas=to_float64(betas)).alphas_cumprod
        results[f"table error, {case}"] = (
            f"1-alpha_bar {relative_error(exact.column(variance), want):.0e} as float64,"
            f" {relative_error(exact.column(variance.float()), want):.0e} as float32"
            f" (stock {relative_error(stock.numpy(), want):.0e});"
            f" beta {relative_error(exact.column(beta), betas):.0e}"
        )
        chains = [
            f"{str(dtype).removeprefix('torch.')} {exact.error_of_whole_chain(case, dtype):.1e}"
            for dtype in (torch.float32, torch.bfloat16, torch.float16)
        ]
        results[f"whole chain against float64, {case}"] = ", ".join(chains)
    for K in (50, 100, 1000):
        results[f"DDIM inversion and back, K={K}"] = f"{exact.inversion_psnr('epsilon', K):.1f} dB"
    for schedule in parity.SCHEDULES:
        table = torch.from_numpy(to_float64(alpha_bars(parity.EXACT_BETAS[schedule](1000))))
        as_is = on_exact = 0.0
        for values in parity.MATRIX:
            config = parity.config_of(schedule, *values)
            ours, stock = GaussianDDPMScheduler(**config), DDPMScheduler(**config)
            as_is = max(as_is, parity.worst_step(ours, stock))
            stock.alphas_cumprod = table
            on_exact = max(on_exact, parity.worst_step(ours, stock))
        results[f"parity, {schedule}, {len(parity.MATRIX)} configurations"] = (
            f"{on_exact:.1e} from stock with exact tables, {as_is:.1e} from unmodified stock"
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--speed-only", action="store_true", help="do not measure the accuracy")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    machine = f"{platform.processor() or platform.machine()}, torch {torch.__version__}"
    figures: dict[str, Any] = {"machine": f"{machine}, diffusers {diffusers.__version__}, 1 thread"}
    sections = (noising, small_steps, large_steps, operations, set_up)
    for section in sections if options.speed_only else (*sections, exactness):
        figures |= section()
    for name, value in figures.items():
        print(f"{name:58} {value}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
