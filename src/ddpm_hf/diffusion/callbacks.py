# SPDX-License-Identifier: Apache-2.0
"""What a user runs after each step of sampling. Travels with the weights."""

from collections.abc import Callable, Sequence
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

TENSORS = ("latents", "pred_original_sample")


def after_step(
    pipeline: Any, callback: Callback | None, names: Sequence[str] | None
) -> Callable[[int, Tensor, Any], Tensor]:
    """(i, t, output of the scheduler's step) -> the next x_t, which the callback may replace.

    Args:
        pipeline: passed to the callback.
        callback: called as `(pipeline, i, t, tensors)`, a function or one of diffusers'
            `PipelineCallback`, whose `tensor_inputs` then win over `names`.
        names: of the tensors that it gets; "latents" by default.

    Raises:
        ValueError, TypeError: if a tensor of that name does not exist, or it is no function.
    """
    if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
        names = callback.tensor_inputs
    names = ("latents",) if names is None else names
    if unknown := [name for name in names if name not in TENSORS]:
        raise ValueError(f"callback_on_step_end_tensor_inputs must be of {TENSORS}, got {unknown}")
    if callback is not None and not callable(callback):
        raise TypeError(f"callback_on_step_end must be a function, got {callback!r}")

    def next_x(i: int, t: Tensor, step: Any) -> Tensor:
        x_prev: Tensor = step.prev_sample
        if callback is None:
            return x_prev
        x_0_hat = getattr(step, "pred_original_sample", None)
        if x_0_hat is None and "pred_original_sample" in names:
            raise ValueError(
                'callback_on_step_end_tensor_inputs: "pred_original_sample" is not available from '
                f"{type(pipeline.scheduler).__name__}"
            )
        tensors: dict[str, Any] = {"latents": x_prev, "pred_original_sample": x_0_hat}
        answer = callback(pipeline, i, t, {name: tensors[name] for name in names})
        return _replaced(x_prev, answer)

    return next_x


def _replaced(x_prev: Tensor, answer: Any) -> Tensor:
    """The "latents" in what a callback returned, if any, in the place of `x_prev`."""
    if answer is not None and not isinstance(answer, dict):
        raise TypeError(f"callback_on_step_end must return a dict or None, got {answer!r:.100}")
    latents = (answer or {}).get("latents", x_prev)
    if not isinstance(latents, Tensor) or latents.shape != x_prev.shape:
        got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
        raise ValueError(
            f'"latents" of callback_on_step_end must be a tensor of shape {tuple(x_prev.shape)}, '
            f"got {got}"
        )
    return latents.detach().to(x_prev)  # a guiding callback's gradient ends with its step
