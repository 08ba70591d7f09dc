# SPDX-License-Identifier: Apache-2.0
"""The reverse process as a loop over steps, for any denoiser and scheduler."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import tensor_ops

Denoiser = tensor_ops.Denoiser


@dataclass(slots=True)
class SamplingStep:
    """One step of sampling, from x_t to x_prev.

    Assign to `prev_sample` to change the x_t of the next step, and to `is_last` to end sampling.

    Attributes:
        index: number of the step, from 0.
        timestep: t, a 0-d tensor on the CPU.
        sample: x_t before the step, (B, C, ...).
        model_output: output of the denoiser.
        prev_sample: x_prev, same shape as `sample`.
        pred_original_sample: estimate of x_0, same shape: the scheduler's, or for a scheduler that
            returns none, such as DPM-Solver, that of the network, without clipping. None for a
            scheduler without a beta schedule.
        is_last: whether sampling ends with this step.
    """

    index: int
    timestep: Tensor
    sample: Tensor
    model_output: Tensor
    prev_sample: Tensor
    pred_original_sample: Tensor | None
    is_last: bool


@torch.no_grad()
def sampling_steps(
    denoiser: Denoiser | Sequence[Denoiser],
    scheduler: Any,
    x_T: Tensor,
    *,
    begin_index: int = 0,
    **step_options: Any,
) -> Generator[SamplingStep]:
    """Steps of the reverse process from x_T, each computed when it is asked for.

    The loop never waits for the device, except after the last step to check for non-finite values.

        scheduler.set_timesteps(50)
        for step in sampling_steps(denoiser, scheduler, torch.randn(16, 1, 28, 28)):
            previews.append(step.pred_original_sample)
        x_0 = step.prev_sample

    Args:
        denoiser: callable `(x_t, t)`, t (B,), that returns the model output as a tensor or as the
            `.sample` of an object; or a sequence of such callables, one per step. It runs without
            gradients.
        scheduler: any diffusers scheduler after `set_timesteps` on the CPU. It keeps the state of
            the loop: run one loop at a time.
        x_T: initial noise times `scheduler.init_noise_sigma`, (B, C, ...); x_t at the first of the
            remaining timesteps where `begin_index` is given.
        begin_index: number of timesteps to skip, as in image to image.
        **step_options: keyword arguments of `scheduler.step`, such as `generator` and `eta`.
    Raises:
        ValueError: after the last step, if a value is not finite; names the step.
    Source: DDPM (2006.11239), algorithm 2.
    """
    if begin_index and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin_index)
    timesteps, x_t = scheduler.timesteps[begin_index:], x_T
    on_device = timesteps.to(x_T.device)
    denoisers = [denoiser] * len(timesteps) if callable(denoiser) else denoiser[begin_index:]
    is_finite = torch.ones(len(timesteps), dtype=torch.bool, device=x_T.device)
    for i, t in enumerate(timesteps):
        model_input = scheduler.scale_model_input(x_t, t)
        output = denoisers[i](model_input, on_device[i].expand(len(x_t)))
        model_output = tensor_ops.prediction_of(output)
        result = scheduler.step(model_output, t, x_t, **step_options)
        x_0_hat = getattr(result, "pred_original_sample", None)
        if x_0_hat is None:
            x_0_hat = predicted_x_0(scheduler, model_output, t, model_input)
        is_last = i == len(timesteps) - 1
        step = SamplingStep(i, t, x_t, model_output, result.prev_sample, x_0_hat, is_last)
        yield step
        x_t = step.prev_sample
        is_finite[i] = model_output.isfinite().all() & x_t.isfinite().all()
        if step.is_last:
            break
    _check_finite(is_finite, timesteps)


def predicted_x_0(
    scheduler: Any, model_output: Tensor, t: Tensor, model_input: Tensor
) -> Tensor | None:
    """Estimate of x_0 by the network; None if the scheduler has no alpha_bar at t.

    Args:
        scheduler: gives alpha_bar and the prediction type.
        model_output: output of the network, (B, C, ...).
        t: timestep, a 0-d tensor on the CPU.
        model_input: x_t as the network gets it, sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise.
    """
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    if alphas_cumprod is None or t.is_floating_point():
        return None
    alpha_bar = float(alphas_cumprod[t])
    signal, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    kind = scheduler.config.get("prediction_type", "epsilon")
    return tensor_ops.x_0_of_prediction(kind, model_output, model_input, signal, sigma)


def _check_finite(is_finite: Tensor, timesteps: Tensor) -> None:
    flags = is_finite.tolist()  # the only read from the device
    if not all(flags):
        i = flags.index(False)
        raise ValueError(
            f"sampling gave a non-finite value at step {i} of {len(flags)} (timestep "
            f"{timesteps[i].item()}): the weights are damaged or too large for the dtype of the "
            "model (try torch.bfloat16 or torch.float32), or the scheduler does not support this "
            "number of steps"
        )
