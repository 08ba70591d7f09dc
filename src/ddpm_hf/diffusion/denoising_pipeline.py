# SPDX-License-Identifier: Apache-2.0
"""Base of the pipeline: images to x_0 and back, denoisers with guidance, and the sampling loop."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
from diffusers.models import UNet2DModel
from diffusers.schedulers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput
from torch import Tensor

from . import (
    checks,
    conditioning,
    eval_mode,
    image_format,
    image_processor,
    likelihood_guidance,
    portable_pipeline,
    sampling_loop,
    scheduler_interface,
    scheduling,
    tensor_ops,
)

Array = np.ndarray[Any, Any]
ClassLabels = conditioning.ClassLabels
Denoiser = tensor_ops.Denoiser
Guidance = likelihood_guidance.Guidance
Guide = conditioning.Guide
SamplingStep = sampling_loop.SamplingStep
image_facts = image_format.image_facts


class Conditioning(TypedDict, total=False):
    """Arguments of `GaussianDDPMPipeline.__call__` that the editing methods share with it."""

    class_labels: conditioning.ClassLabels
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    guide: conditioning.Guide
    guidance: likelihood_guidance.Guidance | None
    guidance_weight: float


def check_conditioning(method: str, given: Conditioning) -> None:
    """Check that these are arguments of `Conditioning`.

    Raises:
        TypeError: for another one; names it and the method of the pipeline.
    """
    for name in given.keys() - Conditioning.__annotations__.keys():
        raise TypeError(f"{method}() got an unexpected keyword argument {name!r}")


@dataclass
class EditingOutput(BaseOutput):  # type: ignore[misc]
    """Result of an editing method.

    Attributes:
        images: list of PIL images, or an array or tensor; the draws of one image are neighbours.
        std: standard deviation over the draws of each image, float32 in units of [0, 1],
            (B, H, W, C); None unless `return_std`.
        expected_gain: share of the contrast of the image that is kept, for Gaussian data with a
            standard deviation of 0.5; None but for `image_to_image`.
    """

    images: Any
    std: Array | None = None
    expected_gain: float | None = None


def check_unet(unet: Any) -> None:
    """Check that this is a `UNet2DModel`, or one that torch.compile wraps.

    Raises:
        TypeError: for another network, or a wrapper for several processes.
    """
    if isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):  # _orig_mod: torch.compile
        return
    kind, inner = type(unet).__name__, getattr(unet, "module", None)
    hint = ""
    if isinstance(getattr(inner, "_orig_mod", inner), UNet2DModel):
        hint = f"; take it out of the {kind} (accelerator.unwrap_model)"
    raise TypeError(f"`unet` must be a diffusers UNet2DModel, got {kind}{hint}")


class DenoisingPipeline(portable_pipeline.PortablePipeline):
    """Network and scheduler, as for `GaussianDDPMPipeline`, and what all ways of sampling need."""

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        check_unet(unet)
        scheduler_interface.check_scheduler(scheduler)
        if type(scheduler) is DDPMScheduler:
            scheduler = scheduling.as_gaussian_scheduler(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False
        self._guidance_scale = 1.0
        self._num_timesteps = 0

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes by number, for `class_labels`; None if the model has none."""
        facts = image_facts(self.unet)
        return tuple(facts.class_names) if facts and facts.class_names else None

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current sampling loop; a callback may change it between steps."""
        return self._guidance_scale

    @guidance_scale.setter
    def guidance_scale(self, scale: float) -> None:
        """Set the guidance scale of the next steps."""
        self._guidance_scale = scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the current sampling loop, which callbacks of diffusers read."""
        return self._num_timesteps

    def encode_images(self, images: Any) -> Tensor:
        """Images as x_0 of this model, the inverse of `decode_images`.

        Args:
            images: a PIL image, an array (H, W), (H, W, C) or (B, H, W, C), a tensor (C, H, W) or
                (B, C, H, W), or a list of these. Arrays and tensors are uint8, uint16 or floating
                point in [0, 1].
        Returns:
            x_0 in [-1, 1], float32, (B, C, H, W), padded as in training, on the pipeline's device.
        Raises:
            TypeError: for another kind of image.
            ValueError: if size, mode, bit depth or range do not fit the model.
        """
        return image_processor.encode_images(images, self.unet).to(self._execution_device)

    def decode_images(self, x_0: Tensor, output_type: str = "pil") -> Any:
        """Images of x_0 in [-1, 1], (B, C, H, W), without the padding from training.

        Args:
            x_0: last x_t of sampling, or an estimate of x_0.
            output_type: as for `__call__`; "latent" returns a copy.
        """
        facts = image_facts(self.unet)
        form = image_processor.mode_and_bit_depth(output_type, self.unet.config.in_channels, facts)
        if output_type == "latent":
            return x_0.clone()  # callbacks may hold the tensor itself
        _, window = image_format.size_and_window(self.unet, facts)
        return image_processor.to_images(x_0[..., *window], output_type, *form)

    def _shape_of_x_t(self, batch_size: int) -> tuple[int, ...]:
        """(B, C, H, W), with the padding from training."""
        size, _ = image_format.size_and_window(self.unet, image_facts(self.unet))
        return batch_size, self.unet.config.in_channels, *size

    def _edited(self, x_0: Tensor, output_type: str, num_draws: int | None = None) -> EditingOutput:
        std = None
        if num_draws is not None:
            draws = self.decode_images(x_0, "np")
            draws = draws.reshape(-1, num_draws, *draws.shape[1:])
            std = draws.std(axis=1, ddof=1)
        return EditingOutput(images=self.decode_images(x_0, output_type), std=std)

    def _denoisers(
        self,
        batch_size: int,
        scheduler: Any,
        *,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        guide: Guide = None,
        guidance: Guidance | None = None,
        guidance_weight: float = 1.0,
    ) -> tuple[list[Denoiser], list[UNet2DModel]]:
        """A denoiser `(x_t, t)` for each timestep of `scheduler`, and the networks they call."""
        labels: Tensor | None
        facts = image_facts(self.unet)
        class_names = facts.class_names if facts else None
        is_conditional = self.unet.class_embedding is not None
        if is_conditional and class_labels is None and guidance_scale == 0 and guide is None:
            labels = conditioning.null_labels(self.unet, batch_size, class_names)
        else:
            labels = conditioning.label_tensor(self.unet, class_labels, batch_size, class_names)
        labels = None if labels is None else labels.to(self._execution_device)
        weak = self._guide_network(guide, guidance_scale)
        num_outputs = scheduler_interface.num_outputs(self.unet.config, scheduler)

        def with_scale(scale: float) -> Denoiser:
            checks.check_finite_float("guidance_scale", scale)
            if scale == 1:
                return plain
            if weak is not None:
                return conditioning.autoguided(self.unet, weak, labels, scale, num_outputs)
            return conditioning.classifier_free(self.unet, labels, scale, class_names, num_outputs)

        self._guidance_scale = guidance_scale
        plain = conditioning.denoiser_of(self.unet, labels, num_outputs)
        guided = conditioning.with_current_scale(with_scale, lambda: self._guidance_scale)
        if guidance is not None:
            plain, guided = (
                likelihood_guidance.guided_denoiser(d, scheduler, guidance, guidance_weight)
                for d in (plain, guided)
            )
        is_guided = conditioning.is_guided_at(
            scheduler.timesteps, scheduler.alphas_cumprod, guidance_interval
        )
        return [guided if here else plain for here in is_guided], [self.unet, weak or self.unet]

    def _guide_network(self, guide: Guide, guidance_scale: float) -> UNet2DModel | None:
        if guide is None:
            return None
        if guidance_scale == 1:
            raise ValueError(
                "`guide` has no effect at `guidance_scale` 1; pass a larger scale, such as 2"
            )
        return conditioning.guide_network(guide, self.unet, self.scheduler, self._execution_device)

    def _steps(
        self,
        denoisers: Sequence[Denoiser],
        networks: Iterable[UNet2DModel],
        scheduler: Any,
        x_T: Tensor,
        *,
        begin_index: int = 0,
        **step_options: Any,
    ) -> Generator[SamplingStep]:
        """Steps of `sampling_loop.sampling_steps`, with the networks in eval mode."""
        self._num_timesteps = len(scheduler.timesteps) - begin_index
        steps = sampling_loop.sampling_steps(
            denoisers, scheduler, x_T, begin_index=begin_index, **step_options
        )
        return self._in_eval_mode(steps, networks)

    def _in_eval_mode(
        self, steps: Iterable[SamplingStep], networks: Iterable[UNet2DModel]
    ) -> Generator[SamplingStep]:
        with ExitStack() as stack:
            for network in networks:
                stack.enter_context(eval_mode.evaluating(network))
            yield from steps
        self.maybe_free_model_hooks()

    def _last_sample(
        self,
        steps: Generator[SamplingStep],
        on_step_end: Callable[[SamplingStep], None] = lambda step: None,
    ) -> Tensor:
        """Run the loop to its end, or until a callback sets `_interrupt`."""
        self._interrupt = False
        with closing(steps), self.progress_bar(total=self._num_timesteps) as progress:
            for step in steps:
                on_step_end(step)
                step.is_last |= self._interrupt
                progress.update()
        x_0: Tensor = step.prev_sample
        return x_0
