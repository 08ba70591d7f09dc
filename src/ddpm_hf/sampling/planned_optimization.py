"""Optimization of the networks for the calls that a set of images takes."""

import math
from contextlib import suppress
from pathlib import Path

from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline
from ddpm_hf.diffusion.timestep_spacings import usual_num_steps
from ddpm_hf.inference_optimization import optimize
from ddpm_hf.inference_settings import InferenceSettings, OptimizedInference
from ddpm_hf.sampling.image_reader import RECORD_NAME
from ddpm_hf.sampling.options import DrawOptions
from ddpm_hf.sampling.output_paths import batch_folder, record_path
from ddpm_hf.sampling.sampling_record import DamagedRecordError, SamplingRecord
from ddpm_hf.utils.shared_work import distributed_state, on_main_process


def optimize_for_images(
    pipeline: GaussianDDPMPipeline, options: DrawOptions, output: Path
) -> OptimizedInference:
    """Optimize the networks for these images; called by all processes.

    The main process chooses the settings for all, or reads those of an interrupted run, so that all
    images have the same settings.

    Args:
        pipeline: pipeline that samples the images; its network is changed in place.
        options: options of the images; the network of the guide gets the same settings.
        output: path of the images.
    """
    batch_size = min(options.batch_size, options.num_images)
    num_calls = _num_steps(pipeline, options) * math.ceil(options.num_images / batch_size)
    if options.guide is None and options.guidance_scale not in (None, 1):
        batch_size *= 2  # the conditional and the unconditional half
    state = distributed_state()

    def choose() -> InferenceSettings:
        # Of the incomplete images, or of the complete ones.
        record = None
        with suppress(DamagedRecordError):  # the images are sampled again
            record = SamplingRecord.read(batch_folder(output) / RECORD_NAME)
        if record is None and not options.overwrite:
            record = SamplingRecord.read(record_path(output))
        if record is not None and record.settings.speed is not None:
            return InferenceSettings.from_dict(record.settings.speed)
        return optimize(pipeline, batch_size, num_calls, guide=options.guide)

    chosen = on_main_process(state, choose)
    if state.is_main_process and isinstance(chosen, OptimizedInference):
        return chosen
    return optimize(pipeline, batch_size, num_calls, guide=options.guide, **chosen.arguments())


def _num_steps(pipeline: GaussianDDPMPipeline, options: DrawOptions) -> int:
    if options.timesteps:
        return len(options.timesteps)
    kind, T = type(pipeline.scheduler).__name__, pipeline.scheduler.config.num_train_timesteps
    return options.num_inference_steps or usual_num_steps(kind, T)
