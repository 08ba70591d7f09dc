# SPDX-License-Identifier: Apache-2.0
"""GaussianDDPMPipeline: from noise to images by a `UNet2DModel`.

This file travels with the weights, and with it the siblings that it imports. It does so by
`from . import`: on the Hub, diffusers follows a `from .name import` and would look for name.py at
the root of the repository.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, overload

import torch
from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import (
    callbacks,
    checks,
    conditioning,
    image_processor,
    portable_pipeline,
    scheduler_interface,
    schedules,
    scheduling,
    speed,
    tensor_ops,
)

Callback = callbacks.Callback
ClassLabels = conditioning.ClassLabels
Denoiser = tensor_ops.Denoiser
Generators = tensor_ops.Generators
image_facts = image_processor.image_facts

MAX_BATCH_SIZE = 2**20  # more in one call is a slip


def _check_unet(unet: Any) -> None:
    if isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):  # _orig_mod: torch.compile
        return
    kind, inner = type(unet).__name__, getattr(unet, "module", None)
    hint = ""
    if isinstance(getattr(inner, "_orig_mod", inner), UNet2DModel):
        hint = f"; take it out of the {kind} (accelerator.unwrap_model)"
    raise TypeError(f"unet must be a diffusers UNet2DModel, got {kind}{hint}")


class GaussianDDPMPipeline(portable_pipeline.PortablePipeline):
    """Unconditional or class-conditional image generation with a `UNet2DModel`.

    Drop-in for diffusers' `DDPMPipeline`. `save_pretrained` and `push_to_hub` write a checkpoint
    that opens in three ways: in plain diffusers as `DDPMPipeline`, with the code that travels with
    it (`custom_pipeline=`, `trust_remote_code=True`), and with this package.

    Args:
        unet: a `UNet2DModel`.
        scheduler: any diffusers scheduler over a beta schedule. A stock `DDPMScheduler` becomes a
            `GaussianDDPMScheduler` of the same configuration.
    Attributes:
        speed: what `optimize` chose, if it was called.
    Raises:
        TypeError: if `unet` is no `UNet2DModel`, or the scheduler is not for such a network.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        _check_unet(unet)
        scheduler_interface.check_scheduler(scheduler)
        if type(scheduler) is DDPMScheduler:
            scheduler = scheduling.as_gaussian_scheduler(scheduler)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False
        self.speed: speed.Speed | None = None

    @overload
    def __call__(
        self,
        batch_size: int = ...,
        generator: Generators = ...,
        num_inference_steps: int | None = ...,
        output_type: str = ...,
        return_dict: Literal[True] = ...,
        class_labels: ClassLabels = ...,
        guidance_scale: float = ...,
        latents: Tensor | None = ...,
        timesteps: Sequence[int] | None = ...,
        callback_on_step_end: Callback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ...,
        eta: float | None = ...,
        guidance_interval: tuple[float, float] | None = ...,
        guide: "UNet2DModel | DiffusionPipeline | None" = ...,
    ) -> ImagePipelineOutput: ...

    @overload
    def __call__(
        self,
        batch_size: int = ...,
        generator: Generators = ...,
        num_inference_steps: int | None = ...,
        output_type: str = ...,
        *,
        return_dict: Literal[False],
        class_labels: ClassLabels = ...,
        guidance_scale: float = ...,
        latents: Tensor | None = ...,
        timesteps: Sequence[int] | None = ...,
        callback_on_step_end: Callback | None = ...,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = ...,
        eta: float | None = ...,
        guidance_interval: tuple[float, float] | None = ...,
        guide: "UNet2DModel | DiffusionPipeline | None" = ...,
    ) -> tuple[Any]: ...

    def __call__(
        self,
        batch_size: int = 1,
        generator: Generators = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        class_labels: ClassLabels = None,
        guidance_scale: float = 1.0,
        latents: Tensor | None = None,
        timesteps: Sequence[int] | None = None,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        eta: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guide: "UNet2DModel | DiffusionPipeline | None" = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images sampled from noise by the reverse process.

        The network runs in its own dtype, the chain in at least float32, without gradients and with
        the UNet in eval mode (its training mode is put back afterwards). Padding that training
        added is cropped off.

        Args:
            batch_size: number of images, B.
            generator: one generator, or a list of B: image i then gets the same noise in any batch.
            num_inference_steps: K; by default the `num_train_timesteps` of a DDPM scheduler, and
                the usual 50 (or 25, for solvers of higher order) of others.
            output_type: "pil" (of 16-bit images only grey ones keep their depth, others get 8
                bits, all that PIL has), "np" (B, H, W, C) float32 in [0, 1], "pt" (B, C, H, W)
                float32 in [0, 1], or "latent": the last x_t itself, uncropped.
            return_dict: return an `ImagePipelineOutput`, else a tuple of the images.
            class_labels: for class-conditional networks: one class or one per image, as numbers in
                [0, num_class_embeds) or as names where the model knows them. Networks with another
                `class_embed_type` get the tensor as it is.
            guidance_scale: s of classifier-free guidance, null + s (class - null): 1 is none. The
                null class is the last embedding, which training must have used as such. With a
                `guide`, s of guide + s (network - guide).
            latents: standard normal noise to start from, (B, C, H, W), H and W as the UNet works.
            timesteps: the timesteps to visit, descending, instead of `num_inference_steps`.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)` after each step, a
                function or a `PipelineCallback` of diffusers; "latents" in the dict that it returns
                replace x_t. A gradient, to guide by, needs `torch.enable_grad()` in it. Setting
                `pipeline._interrupt = True` ends the chain with x_t as it then is.
            callback_on_step_end_tensor_inputs: what `tensors` holds, of "latents" (x_t, the
                default) and "pred_original_sample" (the estimate of x_0).
            eta: noise of the step, in [0, 1]: 1 is DDPM, 0 is DDIM. The scheduler's own default
                (1 for `GaussianDDPMScheduler`, 0 for `DDIMScheduler`) unless given.
            guidance_interval: lowest and highest log-SNR at which to guide (2404.07724); all by
                default. The network is called once where it is not guided.
            guide: a weaker model of the same data and diffusion, such as an early checkpoint, to be
                guided away from (2406.02507), in the place of the null class; needs no classes.
        Returns:
            `ImagePipelineOutput` with `.images`, or `(images,)`.
        Raises:
            ValueError: for a bad argument, and for a non-finite value in the chain (the message
                names the step).
            TypeError: for a generator, network or scheduler of the wrong kind.
        Source: DDPM (2006.11239), algorithm 2; guidance 2207.12598, eq. 6 with s = 1 + w.
        """
        _check_unet(self.unet)
        scheduler_interface.check_scheduler(self.scheduler)
        batch_size = checks.to_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        checks.check_generators(generator, batch_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        facts = image_facts(self.unet)
        size, window = image_processor.size_and_window(self.unet, facts)
        form = image_processor.mode_and_bit_depth(output_type, self.unet.config.in_channels, facts)
        names = facts.class_names if facts else None
        plain, guided = self._denoisers(batch_size, class_labels, guidance_scale, guide, names)
        step_options = scheduler_interface.step_options(self.scheduler, generator, eta)
        after_step = callbacks.after_step(
            self, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        scheduler_interface.set_timesteps(self.scheduler, num_inference_steps, timesteps)
        is_guided = conditioning.is_guided_at(
            self.scheduler.timesteps, self.scheduler.alphas_cumprod, guidance_interval
        )
        denoisers = [guided if here else plain for here in is_guided]
        shape = (batch_size, self.unet.config.in_channels, *size)
        weak = getattr(guide, "unet", guide)
        with evaluating(self.unet), evaluating(weak or self.unet), torch.no_grad():
            x_T = self._initial_noise(shape, generator, latents)
            x_0 = self._reverse_chain(x_T, denoisers, step_options, after_step)
        self.maybe_free_model_hooks()
        if output_type == "latent":
            x_0 = x_0.clone()  # what a callback has seen stays as it was
        else:
            x_0 = image_processor.to_images(x_0[..., *window], output_type, *form)
        return ImagePipelineOutput(images=x_0) if return_dict else (x_0,)

    @property
    def num_timesteps(self) -> int:
        """How many steps the current chain has; callbacks of diffusers ask for it."""
        return len(self.scheduler.timesteps)

    def _denoisers(
        self,
        batch_size: int,
        class_labels: ClassLabels,
        guidance_scale: float,
        guide: Any,
        names: Sequence[str] | None,
    ) -> tuple[Denoiser, Denoiser]:
        """(x_t, t) -> what the scheduler reads of the output: as it is, and guided if asked."""
        checks.check_float(
            "guidance_scale",
            guidance_scale,
            "that is finite",
            -checks.FINITE,
            checks.FINITE,
        )
        labels = conditioning.label_tensor(self.unet, class_labels, batch_size, names)
        labels = None if labels is None else labels.to(self._execution_device)
        num_outputs = scheduler_interface.num_outputs(self.unet.config, self.scheduler)
        plain = conditioning.denoiser_of(self.unet, labels, num_outputs)
        if guide is not None and guidance_scale == 1:
            raise ValueError(
                "guide has no effect at guidance_scale=1: pass a larger one, such as 2"
            )
        if guide is not None:
            weak = self._network_of_guide(guide)
            return plain, conditioning.autoguided(
                self.unet, weak, labels, guidance_scale, num_outputs
            )
        if guidance_scale == 1:
            return plain, plain
        return plain, conditioning.classifier_free(
            self.unet, labels, guidance_scale, names, num_outputs
        )

    def _network_of_guide(self, guide: Any) -> UNet2DModel:
        """The network of a weaker model, in eval mode and on this pipeline's device."""
        if isinstance(guide, DiffusionPipeline):
            ours, theirs = self.scheduler.config, guide.scheduler.config
            for key in ("prediction_type", "num_train_timesteps"):
                if ours.get(key, "epsilon") != theirs.get(key, "epsilon"):
                    raise ValueError(
                        f"guide must be of the same diffusion, but its {key} is {theirs.get(key)!r}"
                        f" and this model's {ours.get(key)!r}"
                    )
            guide = guide.unet
        if not isinstance(guide, UNet2DModel):
            raise TypeError(
                f"guide must be a pipeline or a UNet2DModel, got {type(guide).__name__}"
            )
        conditioning.check_guide(self.unet, guide)
        return guide.to(self._execution_device)

    def _initial_noise(
        self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None
    ) -> Tensor:
        """x_T, (B, C, H, W), in at least float32."""
        device = self._execution_device
        dtype = torch.promote_types(self.unet.dtype, torch.float32)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
        elif not isinstance(latents, Tensor) or tuple(latents.shape) != shape:
            got = tuple(latents.shape) if isinstance(latents, Tensor) else type(latents).__name__
            raise ValueError(f"latents must be a tensor of shape {shape}, got {got}")
        noise: Tensor = latents.to(device, dtype) * self.scheduler.init_noise_sigma
        return noise

    def _reverse_chain(
        self,
        x_t: Tensor,
        denoisers: Sequence[Denoiser],
        step_options: dict[str, Any],
        after_step: Callable[[int, Tensor, Any], Tensor],
    ) -> Tensor:
        """Algorithm 2 of 2006.11239; no step waits for the device."""
        timesteps = self.scheduler.timesteps
        on_device = timesteps.to(x_t.device)
        finite = torch.ones(len(timesteps), dtype=torch.bool, device=x_t.device)
        self._interrupt = False
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                model_input = self.scheduler.scale_model_input(x_t, t)
                model_output: Tensor = denoisers[i](model_input, on_device[i])
                step = self.scheduler.step(model_output, t, x_t, **step_options)
                x_t = after_step(i, t, step)
                finite[i] = model_output.isfinite().all() & x_t.isfinite().all()
                progress.update()
                if self._interrupt:
                    break
        _check_finite(finite, timesteps)
        return x_t

    def optimize(
        self,
        batch_size: int = 16,
        num_calls: int | None = None,
        *,
        guide: "UNet2DModel | DiffusionPipeline | None" = None,
        memory_format: torch.memory_format | None = None,
        dtype: torch.dtype | None = None,
        compile: bool | None = None,
        tf32: bool | None = None,
        num_threads: int | None = None,
    ) -> speed.Speed:
        """Make the network's calls as fast as this device can, and print what was chosen.

        What is None is chosen by measuring, where a chain of the model's length is worth that; what
        is given is done. Without this call a pipeline computes in its weights' dtype, the same bits
        each time. Afterwards samples differ by rounding: `deviation` of the result says how far
        the network's outputs are from those before, and is below 1e-4 in float32.

        Args:
            batch_size: images at once, B.
            num_calls: of the network to come, all batches together; by default one chain of the
                scheduler's usual length.
            guide: that of the calls to come, which is then run as the network is.
            memory_format: of the weights, such as `torch.channels_last`.
            dtype: of the network. bf16 is chosen where the hardware has it and the outputs stay
                within 2 %; the weights are rounded to it for good, so save the pipeline before.
            compile: by `torch.compile`, for this batch size. That takes a minute or two, and is
                chosen where it saves more. Where it fails, the network stays as it was.
            tf32: round float32 products on a CUDA device, of this whole process; chosen where the
                device has it.
            num_threads: of the CPU, for this whole process; chosen from one and as many as now.
        Returns:
            what was chosen, and what it brings.
        Raises:
            ValueError, TypeError: for a bad argument.
        """
        weak = None if guide is None else self._network_of_guide(guide)
        batch_size = checks.to_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        if num_threads is not None:
            checks.to_int("num_threads", num_threads, 1, speed.MAX_THREADS)
        if dtype is not None and not isinstance(dtype, torch.dtype):
            raise TypeError(f"dtype must be a torch.dtype, got {dtype!r}")
        if num_calls is None:
            kind, T = type(self.scheduler).__name__, self.scheduler.config.num_train_timesteps
            num_calls = schedules.usual_num_steps(kind, T)
        size, _ = image_processor.size_and_window(self.unet, image_facts(self.unet))
        shape = (batch_size, self.unet.config.in_channels, *size)
        with evaluating(self.unet), evaluating(weak or self.unet):
            chosen = speed.optimize(
                self.unet,
                shape,
                num_calls,
                memory_format=memory_format,
                dtype=dtype,
                compile=compile,
                tf32=tf32,
                num_threads=num_threads,
            )
            print(f"optimized: {chosen}")
            if weak is not None:
                of_guide = speed.optimize(weak, shape, num_calls, **chosen.options())
                print(f"optimized guide: {of_guide}")
        self.speed = chosen
        return chosen


# ----------------------------------------------------------------------------------------------
# Parts of a call


@contextmanager
def evaluating(unet: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode that it had."""
    # A loaded network trains nothing: setting all of its modules would take as long as a step.
    in_training = [module for module in unet.modules() if module.training]
    for module in in_training:
        module.training = False
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


def _check_finite(finite: Tensor, timesteps: Tensor) -> None:
    flags = finite.tolist()  # the one read of the device
    if not all(flags):
        i = flags.index(False)
        raise ValueError(
            f"sampling gave a non-finite value at step {i} of {len(flags)} (timestep "
            f"{timesteps[i].item()}): the weights are damaged or too large for the model's dtype "
            "(try torch.bfloat16 or torch.float32), or the scheduler cannot make so many steps"
        )
