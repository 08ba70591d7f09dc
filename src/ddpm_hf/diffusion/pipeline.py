# SPDX-License-Identifier: Apache-2.0
"""GaussianDDPMPipeline: from noise to images by a `UNet2DModel`.

This file travels with the weights, and with it the siblings that it imports. It does so by
`from . import`: on the Hub, diffusers follows a `from .name import` and would look for name.py at
the root of the repository.
"""

import inspect
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers.models import UNet2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers import DDPMScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from . import arithmetic, bounds, checks, extension, images, portable, scheduling

Generators = arithmetic.Generators
Denoiser = arithmetic.Denoiser
ClassLabels = int | str | Sequence[int] | Sequence[str] | Tensor | None
Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], dict[str, Tensor] | None]

MAX_BATCH_SIZE = 2**20  # more in one call is a slip
CALLBACK_TENSORS = ("latents", "pred_original_sample")

image_facts = images.image_facts


# ----------------------------------------------------------------------------------------------
# Checks of what the caller gave


def _check_components(unet: Any, scheduler: Any) -> None:
    if not isinstance(getattr(unet, "_orig_mod", unet), UNet2DModel):  # _orig_mod: torch.compile
        raise TypeError(
            f"unet must be a diffusers UNet2DModel, got {type(unet).__name__}; take it out of a "
            "DistributedDataParallel wrapper first (accelerator.unwrap_model)"
        )
    # Without alphas_cumprod it takes other noise levels (EDM's, say) and would draw garbage.
    needs = ("set_timesteps", "step", "scale_model_input", "init_noise_sigma", "alphas_cumprod")
    if not isinstance(scheduler, SchedulerMixin) or not all(hasattr(scheduler, n) for n in needs):
        raise TypeError(
            "scheduler must be a diffusers scheduler over the betas that the network was trained "
            f"on, got {type(scheduler).__name__}; use GaussianDDPMScheduler, DDIMScheduler, "
            "DPMSolverMultistepScheduler or another with alphas_cumprod"
        )


# ----------------------------------------------------------------------------------------------


class GaussianDDPMPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Unconditional or class-conditional image generation with a `UNet2DModel`.

    Drop-in for diffusers' `DDPMPipeline`. `save_pretrained` and `push_to_hub` write a checkpoint
    that opens in three ways: in plain diffusers as `DDPMPipeline`, with the code that travels with
    it (`custom_pipeline=`, `trust_remote_code=True`), and with this package.

    Args:
        unet: a `UNet2DModel`.
        scheduler: any diffusers scheduler over a beta schedule. A stock `DDPMScheduler` becomes a
            `GaussianDDPMScheduler` of the same configuration.
    Raises:
        TypeError: if `unet` is no `UNet2DModel`, or the scheduler is not for such a network.
    """

    model_cpu_offload_seq = "unet"

    def __init__(self, unet: UNet2DModel, scheduler: SchedulerMixin) -> None:
        super().__init__()
        _check_components(unet, scheduler)
        if type(scheduler) is DDPMScheduler:
            scheduler = scheduling.GaussianDDPMScheduler.from_config(scheduler.config)
        self.register_modules(unet=unet, scheduler=scheduler)
        self._interrupt = False

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
    ) -> ImagePipelineOutput | tuple[Any]:
        """Images sampled from noise by the reverse process.

        The network runs in its own dtype, the chain in at least float32, in inference mode and with
        the UNet in eval mode (its training mode is put back afterwards). Padding that training
        added is cropped off.

        Args:
            batch_size: number of images, B.
            generator: one generator, or a list of B: image i then gets the same noise in any batch.
            num_inference_steps: K; the scheduler's `num_train_timesteps` by default.
            output_type: "pil" (of 16-bit images only grey ones keep their depth, others get 8
                bits, all that PIL has), "np" (B, H, W, C) float32 in [0, 1], "pt" (B, C, H, W)
                float32 in [0, 1], or "latent": the last x_t itself, uncropped.
            return_dict: return an `ImagePipelineOutput`, else a tuple of the images.
            class_labels: for class-conditional networks: one class or one per image, as numbers in
                [0, num_class_embeds) or as names where the model knows them. Networks with another
                `class_embed_type` get the tensor as it is.
            guidance_scale: s of classifier-free guidance, null + s (class - null): 1 is none. The
                null class is the last embedding, which training must have used as such.
            latents: standard normal noise to start from, (B, C, H, W), H and W as the UNet works.
            timesteps: the timesteps to visit, descending, instead of `num_inference_steps`.
            callback_on_step_end: called as `(pipeline, step, timestep, tensors)` after each step;
                "latents" in the dict that it returns replace x_t. Setting
                `pipeline._interrupt = True` in it ends the chain with x_t as it then is.
            callback_on_step_end_tensor_inputs: what `tensors` holds, of "latents" (x_t, the
                default) and "pred_original_sample" (the estimate of x_0).
            eta: noise of the step, in [0, 1]: 1 is DDPM, 0 is DDIM. The scheduler's own default
                (1 for `GaussianDDPMScheduler`, 0 for `DDIMScheduler`) unless given.
        Returns:
            `ImagePipelineOutput` with `.images`, or `(images,)`.
        Raises:
            ValueError: for a bad argument, and for a non-finite value in the chain (the message
                names the step).
            TypeError: for a generator, network or scheduler of the wrong kind.
        Source: DDPM (2006.11239), algorithm 2; guidance 2207.12598, eq. 6 with s = 1 + w.
        """
        _check_components(self.unet, self.scheduler)
        batch_size = checks.given_int("batch_size", batch_size, 1, MAX_BATCH_SIZE)
        checks.check_generators(generator, batch_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        facts = image_facts(self.unet)
        size, window = images.size_and_window(self.unet, facts)
        form = images.mode_and_bit_depth(output_type, self.unet.config.in_channels, facts)
        denoise = self._denoiser(batch_size, class_labels, guidance_scale, facts)
        step_options = self._step_options(generator, eta)
        call_back = self._caller(callback_on_step_end, callback_on_step_end_tensor_inputs)
        self._set_timesteps(num_inference_steps, timesteps)
        shape = (batch_size, self.unet.config.in_channels, *size)
        with _evaluating(self.unet), torch.inference_mode():
            x_T = self._initial_noise(shape, generator, latents)
            x_0 = self._reverse_chain(x_T, denoise, step_options, call_back)
        self.maybe_free_model_hooks()
        x_0 = x_0.clone()  # no longer an inference tensor: the caller may train on it
        if output_type != "latent":
            x_0 = images.to_images(x_0[..., *window], output_type, *form)
        return ImagePipelineOutput(images=x_0) if return_dict else (x_0,)

    def _denoiser(
        self,
        batch_size: int,
        class_labels: ClassLabels,
        guidance_scale: float,
        facts: images.ImageFacts | None,
    ) -> Denoiser:
        """(x_t, t) -> what the scheduler reads of the network's output, guided if asked."""
        checks.check_float(
            "guidance_scale", guidance_scale, "that is finite", -checks.FINITE, checks.FINITE
        )
        names = facts.class_names if facts else None
        labels = _class_tensor(self.unet, class_labels, batch_size, names)
        is_guided = guidance_scale != 1
        if is_guided:
            labels = _with_null_class(labels, self.unet.config, names)
        labels = None if labels is None else labels.to(self._execution_device)
        num_channels, keep = self.unet.config.in_channels, self._output_channels()

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            x = x_t.to(self.unet.dtype)
            x = torch.cat([x, x]) if is_guided else x
            output: Tensor = self.unet(x, t, class_labels=labels).sample[:, :keep].to(x_t.dtype)
            if not is_guided:
                return output
            conditional, unconditional = output.chunk(2)
            guided = torch.lerp(unconditional, conditional, guidance_scale)
            # Guidance moves the mean alone: a learned variance is the conditional network's.
            guided[:, num_channels:] = conditional[:, num_channels:]
            return guided

        return denoise

    def _output_channels(self) -> int:
        """How many of the network's output channels this scheduler reads."""
        channels: int = self.unet.config.in_channels
        given = self.unet.config.out_channels
        ours = type(self.scheduler).__name__ == extension.OUR_SCHEDULER
        variance_type = self.scheduler.config.get("variance_type") or ""
        needed = 2 * channels if ours and variance_type.startswith("learned") else channels
        # Other schedulers have no use for a learned variance: they get the mean's channels.
        allowed = (needed,) if ours else (channels, 2 * channels)
        if given not in allowed:
            raise ValueError(
                f"unet.config.out_channels is {given}, but {channels} image channels with "
                f"variance_type={variance_type!r} need {' or '.join(map(str, allowed))}"
            )
        return needed

    def _step_options(self, generator: Generators, eta: float | None) -> dict[str, Any]:
        """What this scheduler's `step` understands of our arguments."""
        accepted = inspect.signature(self.scheduler.step).parameters
        if eta is not None:
            checks.check_float("eta", eta, "in [0, 1]", 0, 1)
            if "eta" not in accepted:
                raise ValueError(f"eta={eta}: {type(self.scheduler).__name__} has no eta")
        options = {"generator": generator, "eta": eta}
        return {k: v for k, v in options.items() if v is not None and k in accepted}

    def _set_timesteps(self, num_steps: int | None, timesteps: Any) -> None:
        """Choose the trajectory, on the host: the loop reads it without asking the device."""
        scheduler, kind = self.scheduler, type(self.scheduler).__name__
        if timesteps is not None:
            if num_steps is not None:
                raise ValueError("pass num_inference_steps or timesteps, not both")
            if "timesteps" not in inspect.signature(scheduler.set_timesteps).parameters:
                raise ValueError(f"timesteps={timesteps}: {kind} takes no list of timesteps")
            scheduler.set_timesteps(timesteps=timesteps)
            return
        num_train_timesteps = scheduler.config.num_train_timesteps
        num_steps = num_train_timesteps if num_steps is None else num_steps
        num_steps = checks.given_int("num_inference_steps", num_steps, 1, num_train_timesteps)
        scheduler.set_timesteps(num_steps)
        visited = scheduler.timesteps
        if len(visited) > 1 and visited[0] <= visited[-1]:  # the multistep solvers, near T steps
            raise ValueError(
                f"num_inference_steps={num_steps} is too many for {kind}, which would stay at "
                f"timestep {visited[0]}; pass a smaller number"
            )

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
        denoise: Denoiser,
        step_options: dict[str, Any],
        call_back: Callable[[int, Tensor, Any], Tensor],
    ) -> Tensor:
        """Algorithm 2 of 2006.11239; no step waits for the device."""
        timesteps = self.scheduler.timesteps
        on_device = timesteps.to(x_t.device)
        finite = torch.ones(len(timesteps), dtype=torch.bool, device=x_t.device)
        self._interrupt = False
        with self.progress_bar(total=len(timesteps)) as progress:
            for i, t in enumerate(timesteps):
                model_input = self.scheduler.scale_model_input(x_t, t)
                model_output: Tensor = denoise(model_input, on_device[i])
                step = self.scheduler.step(model_output, t, x_t, **step_options)
                x_t = call_back(i, t, step)
                finite[i] = model_output.isfinite().all() & x_t.isfinite().all()
                progress.update()
                if self._interrupt:
                    break
        _check_finite(finite, timesteps)
        return x_t

    def _caller(
        self, callback: Callback | None, names: Sequence[str] | None
    ) -> Callable[[int, Tensor, Any], Tensor]:
        """(i, t, step output) -> the next x_t, which the callback may replace."""
        names = ("latents",) if names is None else names
        unknown = [name for name in names if name not in CALLBACK_TENSORS]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be of {CALLBACK_TENSORS}, got {unknown}"
            )
        if callback is not None and not callable(callback):
            raise TypeError(f"callback_on_step_end must be a function, got {callback!r}")

        def call_back(i: int, t: Tensor, step: Any) -> Tensor:
            x_prev: Tensor = step.prev_sample
            if callback is None:
                return x_prev
            x_0_hat = getattr(step, "pred_original_sample", None)
            if x_0_hat is None and "pred_original_sample" in names:
                raise ValueError(
                    'callback_on_step_end_tensor_inputs: "pred_original_sample" is not to be had '
                    f"from {type(self.scheduler).__name__}"
                )
            tensors: dict[str, Any] = {"latents": x_prev, "pred_original_sample": x_0_hat}
            answer = callback(self, i, t, {name: tensors[name] for name in names})
            return _replaced(x_prev, answer)

        return call_back

    # ------------------------------------------------------------------------------------------
    # Loading and saving

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> Self:
        """The pipeline from a folder or a repository of the Hub: ours, or any `DDPMPipeline`'s.

        Args:
            pretrained_model_name_or_path: a local folder or "user/name".
            **kwargs: as in `DiffusionPipeline.from_pretrained`. `use_safetensors` is True unless
                given: pickled weights (`.bin`) are opened only with `use_safetensors=False`.
        Raises:
            OSError: if there is no such checkpoint, it holds only pickled weights, or lacks some.
            ValueError: if a configuration is of nothing that can be loaded here.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
        if os.path.isdir(pretrained_model_name_or_path):
            bounds.check_checkpoint(Path(pretrained_model_name_or_path))
        try:
            pipeline: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except OSError as error:
            if not portable.holds_only_pickles(pretrained_model_name_or_path, error):
                raise
            raise OSError(
                f"{pretrained_model_name_or_path} holds its weights only as pickled .bin files, "
                "a format that can carry code and is therefore not opened by itself; if you trust "
                "the author, pass use_safetensors=False, then save_pretrained() writes safetensors"
            ) from error
        absent = [name for name, p in pipeline.unet.named_parameters() if p.is_meta]
        if absent and kwargs.get("device_map") is None:  # a device map may leave weights on disk
            raise OSError(f"{pretrained_model_name_or_path} lacks weights: {', '.join(absent)}")
        return pipeline

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str | os.PathLike[str]:
        """As in diffusers; refuses configurations of nothing that can be loaded here."""
        try:
            folder: str | os.PathLike[str] = super().download(pretrained_model_name, **kwargs)
        except RecursionError as error:
            raise ValueError(f"model_index.json of {pretrained_model_name}: {error}") from None
        bounds.check_checkpoint(Path(folder))
        return folder

    def to_json_string(self) -> str:
        """`model_index.json` as stock diffusers reads it, whatever way this pipeline was loaded."""
        index = json.loads(super().to_json_string())
        index.pop("_name_or_path", None)  # a path of this machine, as a rule
        index["_class_name"] = "DDPMPipeline"
        if index["scheduler"][1] == extension.OUR_SCHEDULER:
            index["scheduler"] = ["diffusers", "DDPMScheduler"]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the portable checkpoint: stock index, safetensors, configurations and source files.

        All of it is on disk before the first file takes its place: a new folder appears at once, in
        an existing one file after file is replaced, the index last. So a full disk or a crash while
        writing leaves the folder as it was. Other files there stay, and links are not followed.

        Args:
            save_directory: the folder to write; made where it is missing.
            safe_serialization: must be True: pickled weights are not written.
            variant: as in diffusers, a suffix of the weight file, such as "fp16".
            max_shard_size: as in diffusers, the size above which weights are split.
            push_to_hub: push it afterwards, see `push_to_hub`.
            **kwargs: for the push: `repo_id` (the folder's name by default), `private`, `token`,
                `commit_message`, `create_pr`.
        Raises:
            ValueError: for an unusable `save_directory`, and if a weight is not finite.
        """
        if not safe_serialization:
            raise ValueError("safe_serialization must be True: only safetensors are written")
        unknown = set(kwargs) - {"repo_id", "private", "token", "commit_message", "create_pr"}
        if unknown:
            raise TypeError(f"save_pretrained() knows no {', '.join(sorted(unknown))}")
        folder = portable.checked_folder(save_directory)
        portable.check_finite(self.unet.state_dict(), "unet (nothing was written)")
        with portable.saving(folder, variant) as staging:
            super().save_pretrained(staging, variant=variant, max_shard_size=max_shard_size)
            portable.forget_origin(staging / "unet" / "config.json")
            portable.write_source(staging)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", folder.name), variant=variant, **kwargs)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        token: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> Any:
        """What `push_to_hub` uploads by, in one commit."""
        return portable.upload(
            Path(working_dir),
            repo_id,
            f"{subfolder}/" if subfolder else "",
            token=token,
            commit_message=commit_message or f"Upload {type(self).__name__}",
            create_pr=create_pr,
        )


# ----------------------------------------------------------------------------------------------
# Parts of a call


@contextmanager
def _evaluating(unet: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is in the mode that it had."""
    modes = [(module, module.training) for module in unet.modules()]
    unet.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _class_tensor(
    unet: UNet2DModel, class_labels: Any, batch_size: int, names: Sequence[str] | None
) -> Tensor | None:
    """Labels as the network takes them, one per image; None for an unconditional network."""
    if unet.class_embedding is None and class_labels is not None:
        raise ValueError(f"class_labels={class_labels!r}: this model knows no classes")
    if unet.class_embedding is None:
        return None
    if class_labels is None:
        raise ValueError("class_labels must be given: this model is class-conditional")
    if unet.config.class_embed_type is None:
        numbers = _class_numbers(class_labels, unet.config.num_class_embeds, names)
        class_labels = numbers * batch_size if len(numbers) == 1 else numbers
    labels = torch.as_tensor(class_labels)
    if labels.shape[:1] != (batch_size,):
        raise ValueError(
            f"class_labels has shape {tuple(labels.shape)} for batch_size={batch_size}; pass one "
            "class, or one per image"
        )
    return labels


def _class_numbers(labels: Any, num_classes: int, names: Sequence[str] | None) -> list[int]:
    labels = labels.tolist() if hasattr(labels, "tolist") else labels
    labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
    by_name = {name: number for number, name in enumerate(names or ())}
    numbers: list[Any] = [by_name.get(n, n) if isinstance(n, str) else n for n in labels]
    numbers = [n.item() if isinstance(n, np.integer) else n for n in numbers]
    for number in numbers:
        if not images.is_int(number) or not 0 <= number < num_classes:
            known = f" or of {list(by_name)}" if by_name else ""
            raise ValueError(f"class_labels must be in 0..{num_classes - 1}{known}, got {number!r}")
    return numbers


def _with_null_class(labels: Tensor | None, config: Any, names: Sequence[str] | None) -> Tensor:
    """The labels, then as many of the null class: the last embedding of the network."""
    if labels is None or config.class_embed_type is not None:
        raise ValueError("guidance_scale must be 1: this model has no numbered classes")
    if names is not None and len(names) >= config.num_class_embeds:
        raise ValueError(
            "guidance_scale must be 1: this model was trained without a null class, all of its "
            f"{config.num_class_embeds} embeddings are classes"
        )
    return torch.cat([labels, torch.full_like(labels, config.num_class_embeds - 1)])


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
    return latents.to(x_prev)


def _check_finite(finite: Tensor, timesteps: Tensor) -> None:
    flags = finite.tolist()  # the one read of the device
    if not all(flags):
        i = flags.index(False)
        raise ValueError(
            f"sampling gave a non-finite value at step {i} of {len(flags)} (timestep "
            f"{timesteps[i].item()}): the weights are damaged or too large for the model's dtype "
            "(try torch.bfloat16 or torch.float32), or the scheduler cannot make so many steps"
        )
