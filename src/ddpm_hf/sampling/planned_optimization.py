"""Optimization of the networks for the calls that a set of images takes."""

import math
from pathlib import Path
from typing import Any

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.timestep_spacings import usual_num_steps
from ddpm_hf.inference_optimization import optimize
from ddpm_hf.inference_settings import InferenceSettings, OptimizedInference
from ddpm_hf.sampling.image_writer import recorded_settings
from ddpm_hf.sampling.options import SamplingOptions
from ddpm_hf.sampling.sampler_choice import SamplerSetting
from ddpm_hf.shared_work import distributed_state, on_main_process


def optimize_for_images(
    pipeline: GaussianDDPMPipeline,
    setting: SamplerSetting,
    options: SamplingOptions,
    output: Path,
    guide: Any = None,
) -> OptimizedInference:
    """Optimize the networks for these images; called by all processes.

    The main process chooses the settings for all, or reads those of an interrupted run, so that all
    images have the same settings.

    Args:
        pipeline: pipeline that samples the images; its network is changed in place.
        setting: sampler of the images.
        options: options of the images.
        output: path of the images.
        guide: guide of the images; its network gets the same settings.
    """
    batch_size = min(options.batch_size, options.num_images)
    num_calls = _num_steps(setting) * math.ceil(options.num_images / batch_size)
    if guide is None and options.guidance_scale not in (None, 1):
        batch_size *= 2  # the conditional and the unconditional half
    state = distributed_state()

    def choose() -> InferenceSettings:
        recorded = recorded_settings(output, options.overwrite)
        if recorded is not None and recorded.speed is not None:
            return InferenceSettings.from_dict(recorded.speed)
        return optimize(pipeline, batch_size, num_calls, guide=guide)

    chosen = on_main_process(state, choose)
    if state.is_main_process and isinstance(chosen, OptimizedInference):
        return chosen
    return optimize(pipeline, batch_size, num_calls, guide=guide, **chosen.arguments())


def _num_steps(setting: SamplerSetting) -> int:
    if setting.timesteps:
        return len(setting.timesteps)
    kind, T = type(setting.scheduler).__name__, setting.scheduler.config.num_train_timesteps
    return setting.num_inference_steps or usual_num_steps(kind, T)
