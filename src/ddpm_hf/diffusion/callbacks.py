# SPDX-License-Identifier: Apache-2.0
"""Calls of `callback_on_step_end`, with the interface of diffusers.

"latents" in the dict that a callback returns replace x_t. A callback runs without gradients; use
`torch.enable_grad()` in it to guide by one. `pipeline._interrupt = True` ends sampling with the
current x_t, and `pipeline.guidance_scale` may be changed for the next steps.
"""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from . import sampling_loop

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

TENSOR_INPUTS = ("latents", "pred_original_sample")


def step_end_function(
    pipeline: Any, callback: Callback | None, tensor_inputs: Sequence[str] | None
) -> Callable[[sampling_loop.SamplingStep], None]:
    """Function that passes a step to the callback and applies what the callback returns.

    Args:
        pipeline: first argument of the callback.
        callback: function `(pipeline, i, t, tensors)`, or a `PipelineCallback` of diffusers, whose
            own `tensor_inputs` are used.
        tensor_inputs: names of the tensors to pass; by default "latents".
    Raises:
        ValueError: for an unknown tensor name.
        TypeError: for a callback that is not callable.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        tensor_inputs = callback.tensor_inputs
    names = ("latents",) if tensor_inputs is None else tensor_inputs
    if unknown := [name for name in names if name not in TENSOR_INPUTS]:
        raise ValueError(
            f"`callback_on_step_end_tensor_inputs` must contain only names of {TENSOR_INPUTS}, got"
            f" {unknown}"
        )
    if callback is not None and not callable(callback):
        raise TypeError(f"`callback_on_step_end` must be a function, got {callback!r}")

    def on_step_end(step: sampling_loop.SamplingStep) -> None:
        if callback is None:
            return
        if step.pred_original_sample is None and "pred_original_sample" in names:
            raise ValueError(
                '`callback_on_step_end_tensor_inputs` contains "pred_original_sample", which '
                f"{type(pipeline.scheduler).__name__} does not have; leave it out"
            )
        tensors: Any = {
            "latents": step.prev_sample,
            "pred_original_sample": step.pred_original_sample,
        }
        returned = callback(
            pipeline, step.index, step.timestep, {name: tensors[name] for name in names}
        )
        step.prev_sample = _replaced(step.prev_sample, returned)

    return on_step_end


def _replaced(x_prev: Tensor, returned: Any) -> Tensor:
    """The "latents" that a callback returned, or `x_prev` if it returned none."""
    if returned is not None and not isinstance(returned, dict):
        raise TypeError(f"`callback_on_step_end` must return a dict or None, got {returned!r:.100}")
    latents = (returned or {}).get("latents", x_prev)
    if not isinstance(latents, Tensor) or latents.shape != x_prev.shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f'"latents" returned by `callback_on_step_end` must be a tensor of shape '
            f"{tuple(x_prev.shape)}, got {got}"
        )
    return latents.detach().to(x_prev)  # gradients of the callback end with the step
