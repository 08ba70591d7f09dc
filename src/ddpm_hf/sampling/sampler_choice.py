"""Choice of the sampler: the recommended setting, all training timesteps, or the user's own."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import diffusers
from diffusers import SchedulerMixin

from ddpm_hf.diffusion.config_extension import extension_of
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.sampling.options import CALIBRATED_SPACINGS, SamplerOptions
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.utils.text import did_you_mean

# Karras' sigmas suit linear betas, where alpha_bar ends at 4e-5, and not cosine betas, where it
# ends at 2e-9.
_MIN_SIGNAL_FOR_KARRAS = 1e-6


@dataclass(frozen=True)
class SamplerSetting:
    """A scheduler with the arguments that sampling needs besides.

    Attributes:
        scheduler: a scheduler for the beta schedule of the model.
        num_inference_steps: number of steps K; None for the scheduler's usual number.
        timesteps: the timesteps, if they are given instead of their number.
        eta: noise of each step, in [0, 1]; None for the scheduler's default.
        recommended: name of the scheduler, if this is the recommended setting of the model.
    """

    scheduler: SchedulerMixin
    num_inference_steps: int | None = None
    timesteps: tuple[int, ...] | None = None
    eta: float | None = None
    recommended: str | None = None

    def arguments(self) -> Mapping[str, Any]:
        """Arguments of a call of the pipeline, without those that are None."""
        names = ("num_inference_steps", "timesteps", "eta")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def choose_setting(
    pipeline: GaussianDDPMPipeline, options: SamplerOptions | None = None
) -> SamplerSetting:
    """Resolve the options of the sampler into a complete setting.

        setting = choose_setting(pipe)
        pipe.scheduler = setting.scheduler
        images = pipe(4, **setting.arguments()).images

    By default the setting that `ddpm-hf calibrate --sweep` recommends, if the model has one. With
    `thorough`, DDPM in all training timesteps. Any other option of the sampler replaces the
    recommended setting; what it leaves open is as configured in the model's scheduler.

    Args:
        pipeline: pipeline with the scheduler of the model, which is not replaced.
        options: options of the sampler.
    Raises:
        ValueError: if the scheduler does not support an option, or is not calibrated for it.
    """
    options = options or SamplerOptions()
    if not options.thorough and not options.own_choices():
        try:
            if (setting := recommended_setting(pipeline)) is not None:
                return setting
        except ValueError as error:
            warnings.warn(f"the recommended setting is not used: {error}", stacklevel=2)
    name = "DDPM" if options.thorough else options.scheduler
    spec = SchedulerSpec.parse(name) if name else SchedulerSpec()
    eta, spacing, K = spec.eta, options.timestep_spacing, options.num_inference_steps
    eta = eta if options.eta is None else options.eta
    if spacing in CALIBRATED_SPACINGS:
        scheduler = build_scheduler(pipeline, spec)
        return SamplerSetting(
            scheduler, timesteps=_calibrated_timesteps(scheduler, spacing, K), eta=eta
        )
    scheduler = build_scheduler(pipeline, spec.with_options(timestep_spacing=spacing))
    if spacing and K and isinstance(scheduler, GaussianDDPMScheduler):
        scheduler.set_timesteps(K, timestep_spacing=spacing)  # warns of a spacing that fits badly
    return SamplerSetting(scheduler, K, eta=eta)


def recommended_setting(pipeline: GaussianDDPMPipeline) -> SamplerSetting | None:
    """The setting that `ddpm-hf calibrate --sweep` stored in the model; None if there is none.

    Raises:
        ValueError: if this version cannot use it.
    """
    scheduler = pipeline.scheduler
    if "recommended" not in extension_of(scheduler.config):
        return None
    if not isinstance(scheduler, GaussianDDPMScheduler):  # others keep the entry unread
        scheduler = GaussianDDPMScheduler.from_config(scheduler.config)
    if (recommended := scheduler.recommended) is None:
        return None
    spec = SchedulerSpec.parse_foreign(recommended["scheduler"])
    K = recommended["num_inference_steps"]
    chosen = build_scheduler(pipeline, spec)
    try:
        chosen.set_timesteps(K)
    except Exception as error:  # schedulers of diffusers raise errors of every kind
        raise ValueError(f"{spec} in {K} steps: {error}") from None
    return SamplerSetting(chosen, K, eta=spec.eta, recommended=recommended["scheduler"])


def use_recommended(pipeline: GaussianDDPMPipeline) -> Mapping[str, Any]:
    """Set the scheduler that `ddpm-hf calibrate --sweep` recommends for the model.

        images = pipe(4, **use_recommended(pipe)).images

    Args:
        pipeline: its scheduler is replaced.
    Returns:
        arguments of a call of the pipeline; {} for a model without a recommended setting.
    Raises:
        ValueError: if this version cannot use the setting.
    """
    setting = recommended_setting(pipeline)
    if setting is None:
        return {}
    pipeline.scheduler = setting.scheduler
    return setting.arguments()


def build_scheduler(pipeline: GaussianDDPMPipeline, spec: SchedulerSpec) -> SchedulerMixin:
    """A scheduler for the same diffusion process as that of the pipeline.

    Args:
        pipeline: its scheduler is not replaced.
        spec: the scheduler; its `eta` is an argument of the pipeline's call.
    Returns:
        the pipeline's own scheduler if `spec` changes nothing.
    Raises:
        ValueError: if the scheduler has no such option, or does not support its value.
    """
    name, own = spec.scheduler, pipeline.scheduler
    kind = type(own)
    if name is not None:
        kind = GaussianDDPMScheduler if name == "DDPM" else getattr(diffusers, f"{name}Scheduler")
    known = kind._get_init_keys(kind)
    for option, value in spec.options.items():
        is_ours = kind is GaussianDDPMScheduler
        if option not in known or (value == "quadratic" and not is_ours):
            shown = "DDPM" if is_ours else kind.__name__
            hint = "" if option in known else did_you_mean(option, known)
            raise ValueError(f"{shown} does not support `{option}`={value}{hint}")
    if name is None and not spec.options:
        return own
    try:
        scheduler = kind.from_config(own.config, **spec.options)
    except (ArithmeticError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise ValueError(f"{spec}: {error}") from None
    alpha_bar_T = float(scheduler.alphas_cumprod[-1])
    if scheduler.config.get("use_karras_sigmas") and alpha_bar_T < _MIN_SIGNAL_FOR_KARRAS:
        raise ValueError(
            f"use_karras_sigmas is not supported for betas that end in almost pure noise"
            f" (alpha_bar = {alpha_bar_T:.1g}): nearly all steps would be spent there"
        )
    return scheduler


@contextmanager
def sampled_by(pipeline: GaussianDDPMPipeline, spec: SchedulerSpec) -> Iterator[None]:
    """Replace the pipeline's scheduler until the block ends; see `build_scheduler`."""
    own = pipeline.scheduler
    pipeline.scheduler = build_scheduler(pipeline, spec)
    try:
        yield
    finally:
        pipeline.scheduler = own


def _calibrated_timesteps(
    scheduler: SchedulerMixin, spacing: str, num_inference_steps: int | None
) -> tuple[int, ...]:
    """Timesteps that a calibrated scheduler chooses, which its configuration cannot hold."""
    if not isinstance(scheduler, GaussianDDPMScheduler):
        name = type(scheduler).__name__
        raise ValueError(f"{name} does not support `timestep_spacing`={spacing}")
    scheduler.set_timesteps(num_inference_steps, timestep_spacing=spacing)
    return tuple(scheduler.timesteps.tolist())
