"""`optimize`: the fastest way to run a pipeline's network on its device, found by measuring.

Each candidate is timed in turns with the current network on the same input and must be clearly
faster. Timing costs network calls itself, so nothing changes when only few calls are planned.
"""

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Tensor

from ddpm_hf.diffusion import checks
from ddpm_hf.diffusion.conditioning import guide_network
from ddpm_hf.diffusion.eval_mode import evaluating
from ddpm_hf.diffusion.image_format import image_facts, size_and_window
from ddpm_hf.diffusion.pipeline import MAX_BATCH_SIZE, GaussianDDPMPipeline
from ddpm_hf.diffusion.timestep_spacings import usual_num_steps
from ddpm_hf.inference_settings import OptimizedInference
from ddpm_hf.utils.backend_settings import (
    MAX_NUM_THREADS,
    is_channels_last,
    set_tf32,
    supports_bfloat16,
    supports_tf32,
    use_num_threads,
)
from ddpm_hf.utils.timing import fastest, fastest_num_threads, time_in_turns

MIN_CALLS_TO_MEASURE = 200  # a comparison of two candidates takes 2 * (1 + NUM_ROUNDS) calls
# bf16 has 8 bits: outputs are within one or two percent of those in float32.
MAX_DEVIATION = 0.02
# Compilation took 50 to 140 s on one core for a network of 218 weight tensors, and made calls 1.2
# to 1.3 times as fast.
COMPILE_S_PER_WEIGHT = 0.5
COMPILE_SAVING = 1 / 6


def optimize(
    pipeline: GaussianDDPMPipeline,
    batch_size: int = 16,
    num_calls: int | None = None,
    *,
    guide: UNet2DModel | DiffusionPipeline | None = None,
    memory_format: torch.memory_format | None = None,
    dtype: torch.dtype | None = None,
    compile: bool | None = None,
    tf32: bool | None = None,
    num_threads: int | None = None,
) -> OptimizedInference:
    """Make the network of a pipeline as fast as its device allows, in place.

    A setting that is None is chosen by measuring, if enough calls are planned to make up for the
    measurement; any other value is applied. Afterwards samples differ by rounding errors:
    `deviation` of the result is below 1e-4 in float32. Pipelines that are not optimized compute in
    the dtype of their weights, with the same bits each time.

    Args:
        pipeline: pipeline with the network to change.
        batch_size: images per call, B.
        num_calls: planned network calls, over all batches; by default one sampling run in the
            scheduler's usual number of steps.
        guide: guide of the planned calls; its network gets the same settings.
        memory_format: format of the weights, such as `torch.channels_last`.
        dtype: dtype of the network. bf16 is chosen if the hardware supports it and outputs stay
            within 2 %. The weights are rounded for good: save the pipeline first.
        compile: whether to compile by `torch.compile` for this batch size. Compilation takes a
            minute or two and is chosen if it saves more time. If it fails, the network is kept.
        tf32: whether float32 products on a CUDA device round to TF32, in the whole process; chosen
            if the device supports it.
        num_threads: number of CPU threads, for the whole process; chosen among 1 and the current
            number.
    Returns:
        the applied settings, with speed-up and deviation.
    Raises:
        ValueError, TypeError: for an invalid argument.
    """
    unet, scheduler = pipeline.unet, pipeline.scheduler
    weak = None if guide is None else guide_network(guide, unet, scheduler, pipeline.device)
    batch_size = checks.to_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
    if num_threads is not None:
        checks.to_int("num_threads", num_threads, 1, MAX_NUM_THREADS)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch.dtype, got {dtype!r}")
    if num_calls is None:
        kind, T = type(scheduler).__name__, scheduler.config.num_train_timesteps
        num_calls = usual_num_steps(kind, T)
    size, _ = size_and_window(unet, image_facts(unet))
    shape = (batch_size, unet.config.in_channels, *size)
    with evaluating(unet), evaluating(weak or unet):
        network = _NetworkOptimizer(unet, shape, num_calls)
        network.apply(memory_format, dtype, compile, tf32, num_threads)
        result = network.result()
        if weak is None:
            return result
        weak_network = _NetworkOptimizer(weak, shape, num_calls)
        weak_network.apply(**result.arguments())
        return replace(result, guide=weak_network.result())


class _NetworkOptimizer:
    """Settings of one network, chosen or applied one after the other.

    Args:
        unet: network in eval mode, changed in place.
        shape: shape of x_t, (B, C, H, W).
        num_calls: planned number of calls.
    """

    def __init__(self, unet: UNet2DModel, shape: Sequence[int], num_calls: int) -> None:
        self.unet, self.num_calls = unet, num_calls
        self.trial = Trial(unet, shape)
        self.original, self.outputs_before = copy.deepcopy(unet), self.trial.outputs(unet)
        self.num_threads_before = torch.get_num_threads()
        self.measures = num_calls >= MIN_CALLS_TO_MEASURE
        self.notes: list[str] = []
        if not self.measures:
            self.notes.append(f"benchmark skipped: too few calls planned ({num_calls})")

    def apply(
        self,
        memory_format: torch.memory_format | None,
        dtype: torch.dtype | None,
        compile: bool | None,
        tf32: bool | None,
        num_threads: int | None,
    ) -> None:
        """Apply the given settings and choose those that are None."""
        device = self.unet.device
        if tf32 is not None or supports_tf32(device):
            set_tf32(tf32 is not False)
        if num_threads is None and self.measures and device.type == "cpu":
            num_threads = fastest_num_threads(lambda: self.trial.call(self.unet))
        torch.set_num_threads(num_threads or self.num_threads_before)
        if memory_format is None and self.measures:
            other = copy.deepcopy(self.unet).to(memory_format=torch.channels_last)
            memory_format = torch.channels_last if self._is_better(other) else None
        if memory_format is not None:
            self.unet.to(memory_format=memory_format)
        if dtype is None and self.measures and self._supports_bfloat16():
            other = _cast(copy.deepcopy(self.unet), torch.bfloat16)
            dtype = torch.bfloat16 if self._is_better(other) else None
        if dtype is not None:
            _cast(self.unet, dtype)
        if compile is None and self.measures:
            self._compile_if_faster()
        elif compile:
            self._compile(must_be_faster=False)

    def result(self) -> OptimizedInference:
        """Settings that the network has now, with their measured effect."""
        unet, original = self.unet, self.original
        is_changed = (
            is_channels_last(unet) != is_channels_last(original)
            or unet.dtype != original.dtype
            or torch.get_num_threads() != self.num_threads_before
            or unet._compiled_call_impl is not None
        )
        return OptimizedInference(
            memory_format="channels_last" if is_channels_last(unet) else "contiguous",
            dtype=str(unet.dtype).removeprefix("torch."),
            compile=unet._compiled_call_impl is not None,
            tf32=torch.backends.cuda.matmul.fp32_precision == "tf32",
            num_threads=torch.get_num_threads(),
            speed_up=self._speed_up() if self.measures and is_changed else None,
            deviation=deviation(self.outputs_before, self.trial.outputs(unet)),
            notes=tuple(self.notes),
        )

    def _supports_bfloat16(self) -> bool:
        # diffusers 0.42.1 does not cast the input of this class embedding to the network's dtype.
        has_cast = self.unet.config.class_embed_type != "timestep"
        return has_cast and supports_bfloat16(self.unet.device)

    def _is_better(self, other: UNet2DModel) -> bool:
        """Whether another network has close outputs and is clearly faster than the current one."""
        if not deviation(self.outputs_before, self.trial.outputs(other)) <= MAX_DEVIATION:
            return False
        calls = {unet: partial(self.trial.call, unet) for unet in (self.unet, other)}
        return fastest(time_in_turns(calls)) is other

    def _compile_if_faster(self) -> None:
        cost_s = COMPILE_S_PER_WEIGHT * len(self.unet.state_dict())
        saving_s = COMPILE_SAVING * self.num_calls * self.trial.seconds(self.unet)
        if saving_s > cost_s:
            self._compile(must_be_faster=True)
        else:
            self.notes.append(
                f"compilation would take about {cost_s:.0f} s and save {saving_s:.0f} s"
            )

    def _compile(self, must_be_faster: bool) -> None:
        """Compile the network, or note why it is not compiled."""
        unet, call = self.unet, partial(self.trial.call, self.unet)
        outputs_before = self.trial.outputs(unet)

        def call_eager() -> None:
            with torch.compiler.set_stance("force_eager"):
                call()

        calls: dict[str, Callable[[], object]] = {"eager": call_eager, "compiled": call}
        unet.compile()
        try:
            off = deviation(outputs_before, self.trial.outputs(unet))
            if not off <= MAX_DEVIATION:  # torch has miscompiled networks before
                reason = f"not compiled: its outputs would be off by {off:.1g}"
            elif must_be_faster and fastest(time_in_turns(calls)) == "eager":
                reason = "not compiled: not faster"
            else:
                return
        except Exception as error:  # compilers, and missing ones, raise all kinds of errors
            message = str(getattr(error, "inner_exception", error)).strip()
            reason = f"not compiled: compilation failed ({message.splitlines()[0]})"
        unet._compiled_call_impl = None  # Module.compile cannot be undone by a public method
        self.notes.append(reason)

    def _speed_up(self) -> float:
        def call_original() -> None:
            with use_num_threads(self.num_threads_before):
                self.trial.call(self.original)

        calls = {"before": call_original, "now": lambda: self.trial.call(self.unet)}
        seconds = time_in_turns(calls)
        return statistics.median(seconds["before"]) / statistics.median(seconds["now"])


class Trial:
    """Network calls like those of sampling, on one random x_t.

    Args:
        unet: network that determines the device and the kind of class labels.
        shape: shape of x_t, (B, C, H, W).
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
        """Output at timestep `timesteps[i]`; returns when the device has computed it."""
        t = self.timesteps[i].expand(len(self.x_t))  # (B,)
        output: Tensor = unet(self.x_t.to(unet.dtype), t, class_labels=self.labels).sample
        if output.device.type != "cpu":
            torch.accelerator.synchronize()
        return output

    def outputs(self, unet: UNet2DModel) -> Tensor:
        """Outputs at all of `timesteps`, (4, B, C, H, W) float32."""
        return torch.stack([self.call(unet, i).float() for i in range(len(self.timesteps))])

    def seconds(self, unet: UNet2DModel) -> float:
        """Median duration of a call."""
        return statistics.median(time_in_turns({"call": lambda: self.call(unet)})["call"])


def deviation(before: Tensor, after: Tensor) -> float:
    """Largest absolute difference over the largest absolute value of `before`."""
    return float((after - before).abs().max() / before.abs().max())


def _cast(unet: UNet2DModel, dtype: torch.dtype) -> UNet2DModel:
    return torch.nn.Module.to(unet, dtype)  # the method of diffusers warns at every dtype
