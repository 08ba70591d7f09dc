# SPDX-License-Identifier: Apache-2.0
"""What makes a network's calls faster on this device, by measuring. Travels with the weights.

Each candidate takes turns with what is there, on the same input, and has to win clearly. A race
costs calls itself: where few are to come, everything stays as it is.
"""

import copy
import statistics
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from diffusers.models import UNet2DModel
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)

MAX_THREADS = 4096  # more are a slip
ROUNDS = 3
THREADS_TURN_S = 0.25
CLEARLY = 1.05  # times as fast: less is within the noise of so few rounds
FEWEST_CALLS = 200  # to come, for which a race, which costs 2 * (1 + ROUNDS), is worth it
# bf16 keeps 8 bits: outputs are within one or two percent of those in float32.
MAX_DEVIATION = 0.02
# Compiling took 50 to 140 s on one core for a network of 218 weights, and made its calls 1.2 to 1.3
# times as fast.
COMPILE_S_PER_WEIGHT = 0.5
SAVED_BY_COMPILING = 1 / 6


@dataclass(frozen=True)
class Speed:
    """How a network is run from now on.

    Attributes:
        memory_format: of its weights, "contiguous" or "channels_last".
        dtype: of its weights and arithmetic.
        compile: whether `torch.compile` made its kernels.
        tf32: whether float32 products on a CUDA device keep 10 bits only.
        num_threads: threads of the CPU that share an operation.
        speed_up: how many times as fast a call is as before; None where that was not measured.
        deviation: largest difference of its outputs from those before, over their largest value.
        notes: what was left out, and why.
    """

    memory_format: str
    dtype: str
    compile: bool
    tf32: bool
    num_threads: int
    speed_up: float | None
    deviation: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"notes": list(self.notes)}

    def options(self) -> dict[str, Any]:
        """The arguments of `optimize` that choose the same."""
        return options_of(self.to_dict())

    def __str__(self) -> str:
        parts = [
            self.dtype + " with TF32" * self.tf32,
            self.memory_format,
            "compiled" if self.compile else "not compiled",
            f"{self.num_threads} thread" + "s" * (self.num_threads != 1),
            *([f"{self.speed_up:.2f} times as fast"] if self.speed_up else []),
            f"outputs within {self.deviation:.1g} of those before",
        ]
        return "; ".join([", ".join(parts), *self.notes])


def options_of(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `optimize` that choose what `Speed.to_dict` gave."""
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    as_they_are = {name: chosen[name] for name in ("compile", "tf32", "num_threads")}
    memory_format, dtype = formats[chosen["memory_format"]], getattr(torch, chosen["dtype"])
    return {"memory_format": memory_format, "dtype": dtype, **as_they_are}


def optimize(
    unet: UNet2DModel,
    shape: Sequence[int],
    num_calls: int,
    *,
    memory_format: torch.memory_format | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
    tf32: bool | None = None,
    num_threads: int | None = None,
) -> Speed:
    """Run `unet` as suits this device, changing it in place, and say how.

    Args:
        unet: the network, in eval mode.
        shape: of the x_t that it will get, (B, C, H, W).
        num_calls: how often it will be called.
        memory_format, dtype, compile, tf32, num_threads: as for the pipeline's `optimize`.
    """
    trial, notes = Trial(unet, shape), list[str]()
    original, outputs_before = copy.deepcopy(unet), trial.outputs(unet)
    threads_before = torch.get_num_threads()
    measures = num_calls >= FEWEST_CALLS
    if not measures:
        notes.append(f"too few calls to come to measure for ({num_calls})")

    def is_better(other: UNet2DModel) -> bool:
        near = deviation(outputs_before, trial.outputs(other)) <= MAX_DEVIATION
        return near and fastest(race({n: partial(trial.call, n) for n in (unet, other)})) is other

    if tf32 is not None or _has_tf32(unet.device):
        _round_to_tf32(tf32 is not False)
    if num_threads is None and measures and unet.device.type == "cpu":
        num_threads = fastest_num_threads(lambda: trial.call(unet))
    torch.set_num_threads(num_threads or threads_before)
    if memory_format is None and measures:
        other = copy.deepcopy(unet).to(memory_format=torch.channels_last)
        memory_format = torch.channels_last if is_better(other) else None
    if memory_format is not None:
        unet.to(memory_format=memory_format)
    if dtype is None and measures and has_bfloat16(unet.device):
        dtype = torch.bfloat16 if is_better(_cast(copy.deepcopy(unet), torch.bfloat16)) else None
    if dtype is not None:
        _cast(unet, dtype)
    if compile is None and measures:
        cost = COMPILE_S_PER_WEIGHT * len(unet.state_dict())
        saved = SAVED_BY_COMPILING * num_calls * trial.seconds(unet)
        if saved <= cost:
            notes.append(f"compiling would take about {cost:.0f} s and save {saved:.0f} s")
        elif failure := _compile(unet, trial, must_win=True):
            notes.append(failure)
    elif compile and (failure := _compile(unet, trial)):
        notes.append(failure)
    changed = (
        is_channels_last(unet) != is_channels_last(original)
        or unet.dtype != original.dtype
        or torch.get_num_threads() != threads_before
        or unet._compiled_call_impl is not None
    )
    return Speed(
        memory_format="channels_last" if is_channels_last(unet) else "contiguous",
        dtype=str(unet.dtype).removeprefix("torch."),
        compile=unet._compiled_call_impl is not None,
        tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
        num_threads=torch.get_num_threads(),
        speed_up=trial.speed_up(original, threads_before, unet) if measures and changed else None,
        deviation=deviation(outputs_before, trial.outputs(unet)),
        notes=tuple(notes),
    )


class Trial:
    """Calls of a network as a sampler makes them.

    Args:
        unet: decides what it is told of classes.
        shape: of x_t, (B, C, H, W).
    """

    def __init__(self, unet: UNet2DModel, shape: Sequence[int]) -> None:
        generator, device = torch.Generator().manual_seed(0), unet.device
        self.x_t = torch.randn(*shape, generator=generator).to(device)
        self.timesteps = torch.tensor([0, 200, 500, 900], device=device)
        self.labels = None
        if unet.config.class_embed_type == "identity":
            width = unet.time_embedding.linear_2.out_features
            self.labels = torch.zeros(shape[0], width, device=device)
        elif unet.class_embedding is not None:
            self.labels = torch.zeros(shape[0], dtype=torch.long, device=device)

    @torch.no_grad()
    def call(self, unet: UNet2DModel, i: int = 2) -> Tensor:
        """The output at the i-th of `timesteps`, when the device has it."""
        output: Tensor = unet(
            self.x_t.to(unet.dtype), self.timesteps[i], class_labels=self.labels
        ).sample
        if output.device.type != "cpu":
            torch.accelerator.synchronize()
        return output

    def outputs(self, unet: UNet2DModel) -> Tensor:
        """Those at all of `timesteps`, (4, B, C, H, W) float32."""
        return torch.stack([self.call(unet, i).float() for i in range(len(self.timesteps))])

    def seconds(self, unet: UNet2DModel) -> float:
        """Time of a call."""
        return statistics.median(race({"": lambda: self.call(unet)})[""])

    def speed_up(self, before: UNet2DModel, threads_before: int, now: UNet2DModel) -> float:
        """How many times as fast a call of `now` is as was one of `before`."""

        def call_before() -> None:
            with threads(threads_before):
                self.call(before)

        seconds = race({"before": call_before, "now": lambda: self.call(now)})
        return statistics.median(seconds["before"]) / statistics.median(seconds["now"])


def race(calls: Mapping[Name, Callable[[], Any]], turn_s: float = 0.0) -> dict[Name, list[float]]:
    """Seconds of each call, which take turns; a first round, which warms up, does not count.

    Args:
        calls: by name.
        turn_s: a turn lasts at least so long; its calls count by their mean.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(1 + ROUNDS):
        for name, call in calls.items():
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < turn_s:
                call()
                count += 1
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: times[1:] for name, times in seconds.items()}


def fastest(seconds: Mapping[Name, Sequence[float]]) -> Name:
    """The name with the least median, but the first one unless another is clearly faster."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first, best = next(iter(medians)), min(medians, key=lambda name: medians[name])
    return best if medians[first] > CLEARLY * medians[best] else first


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Inside, so many threads of the CPU share an operation."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest_num_threads(call: Callable[[], Any], most: int | None = None) -> int:
    """`most` threads (by default as many as now), or one, if `call` is clearly faster so.

    Threads wait for each other at every operation: where something else keeps a core busy, all of
    them wait for that one. How much a single call loses is chance; turns that last as long as many
    time slices of the system tell: 10 of 10 choices were right beside a busy process, and 10 of 10
    without one.
    """

    def call_with(number: int) -> None:
        with threads(number):
            call()

    choices = dict.fromkeys((most or torch.get_num_threads(), 1))
    if len(choices) == 1:
        return 1
    return fastest(race({n: partial(call_with, n) for n in choices}, turn_s=THREADS_TURN_S))


def deviation(before: Tensor, after: Tensor) -> float:
    """Largest difference over the largest value before."""
    return float((after - before).abs().max() / before.abs().max())


def is_channels_last(unet: UNet2DModel) -> bool:
    """Whether the weights lie so; where there is one channel, or one pixel, they lie both ways."""
    return any(
        p.is_contiguous(memory_format=torch.channels_last) and not p.is_contiguous()
        for p in unet.parameters()
        if p.ndim == 4
    )


def tf32_operations() -> list[str]:
    """Those that a CUDA device computes with 10 bits of each float32 factor."""
    backends: dict[str, Any] = {
        "convolutions": torch.backends.cudnn.conv,  # type: ignore[attr-defined]
        "matrix products": torch.backends.cuda.matmul,
    }
    return [name for name, backend in backends.items() if backend.fp32_precision == "tf32"]


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies bf16; without, a CPU takes 40 times as long as in float32."""
    if device.type == "cpu":  # no public name tells
        names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _compile(unet: UNet2DModel, trial: Trial, must_win: bool = False) -> str | None:
    """Compile the network in place; why it is not compiled, if it is not."""
    plain, call = trial.outputs(unet), partial(trial.call, unet)

    def call_eager() -> None:
        with torch.compiler.set_stance("force_eager"):
            call()

    unet.compile()
    try:
        off = deviation(plain, trial.outputs(unet))
        if not off <= MAX_DEVIATION:  # torch has compiled wrongly before
            failure = f"not compiled: its outputs would be off by {off:.1g}"
        elif not must_win or fastest(race({"eager": call_eager, "compiled": call})) == "compiled":
            return None
        else:
            failure = "not faster when compiled"
    except Exception as error:  # whatever a compiler, or the lack of one, makes torch raise
        reason = str(getattr(error, "inner_exception", error)).strip()
        failure = f"it cannot be compiled here: {reason.splitlines()[0]}"
    unet._compiled_call_impl = None  # Module.compile has no public way back
    return failure


def _cast(unet: UNet2DModel, dtype: torch.dtype) -> UNet2DModel:
    return torch.nn.Module.to(unet, dtype)  # that of diffusers warns, whatever the dtype


def _has_tf32(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _round_to_tf32(on: bool) -> None:
    precision = "tf32" if on else "ieee"
    torch.backends.cuda.matmul.fp32_precision = precision
    torch.backends.cudnn.conv.fp32_precision = precision  # type: ignore[attr-defined]
