"""`ddpm-hf sample`."""

import argparse
import contextlib
import math
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.commands.messages import flags_in_messages, say
from ddpm_hf.commands.options import load_model
from ddpm_hf.commands.sample_options import CALIBRATED_SPACINGS, output_path, parser
from ddpm_hf.scheduler_spec import SchedulerSpec
from ddpm_hf.text import counted, public_name

if TYPE_CHECKING:
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline

HELP = "draw images from a model on the Hub or in a folder"
# With any of these the model's own scheduler samples, not the one that a sweep recommends.
OWN_CHOICE = ("scheduler", "num_inference_steps", "timestep_spacing", "eta")


def run(argv: list[str]) -> int:
    """Draw as `argv` says."""
    options = parser().parse_args(argv)
    with flags_in_messages(vars(options)):
        output = output_path(options.output, options.format)
        try:
            draw(options, output)
        except KeyboardInterrupt:
            say("ddpm-hf: what is drawn so far is kept; the same command goes on")
            raise
    return 0


def draw(options: argparse.Namespace, output: Path) -> None:
    """Load the model, draw the images and save them."""
    from ddpm_hf.hub.load import load
    from ddpm_hf.sampling.image_writer import check_is_free, drawing_into, parts_of, save_drawn
    from ddpm_hf.shared_work import distributed_state

    if not options.overwrite and not parts_of(output).exists():
        check_is_free(output)  # before the model is looked for
    output.parent.mkdir(parents=True, exist_ok=True)
    state = distributed_state()
    with drawing_into(output, state):
        pass  # is in use, if at all, before the model is looked for
    pipeline = load_model(options).to(state.device)
    call = sampler_call(pipeline, options)
    guide = load(options.guide) if options.guide else None
    if options.optimize:
        optimize(pipeline, guide, call, options, output, state)
    scale, interval = options.guidance_scale, options.guidance_interval
    is_new = save_drawn(
        pipeline,
        output,
        options.num_images,
        seed=options.seed,
        batch_size=options.batch_size,
        class_labels=options.class_labels,
        overwrite=options.overwrite,
        model={"name": public_name(options.model), "revision": options.revision},
        **call,
        guidance_scale=2.0 if options.guide and scale is None else scale,
        guidance_interval=interval and tuple(interval),
        guide=guide,
    )
    state.destroy_process_group()
    if state.is_main_process:
        already = "" if is_new else ", drawn before with these options"
        print(f"{counted(options.num_images, 'image')} in {output}{already}")


def sampler_call(pipeline: "GaussianDDPMPipeline", options: argparse.Namespace) -> dict[str, Any]:
    """Give the pipeline the scheduler that the options choose, and return how it is called.

    Without any of `OWN_CHOICE` that is what a sweep found best, where there was one.
    """
    from ddpm_hf.sampling.sampler_choice import calibrated_timesteps, change_scheduler

    spacing, steps = options.timestep_spacing, options.num_inference_steps
    given = [name for name in OWN_CHOICE if getattr(options, name) is not None]
    if options.thorough and given:
        other = f"{given[0]}={getattr(options, given[0])}"
        raise ValueError(f"thorough must be left out beside {other}: it is a choice of its own")
    if not given and not options.thorough and (call := recommended_call(pipeline)):
        return call
    name = "DDPM" if options.thorough else options.scheduler
    chosen = SchedulerSpec.parse(name) if name else SchedulerSpec()
    eta = chosen.eta if options.eta is None else options.eta
    if spacing in CALIBRATED_SPACINGS:
        change_scheduler(pipeline, chosen)
        return {"timesteps": calibrated_timesteps(pipeline, spacing, steps), "eta": eta}
    change_scheduler(pipeline, chosen.with_options(timestep_spacing=spacing))
    return {"num_inference_steps": steps, "eta": eta}


def recommended_call(pipeline: "GaussianDDPMPipeline") -> dict[str, Any]:
    """How to call it with what a sweep found best, which is said; {} where there is nothing."""
    from ddpm_hf.sampling.sampler_choice import recommended, use_recommended

    T, found = pipeline.scheduler.config.num_train_timesteps, recommended(pipeline)
    try:
        call = use_recommended(pipeline)
    except ValueError as error:
        warnings.warn(f"the recommended setting is left aside: {error}", stacklevel=2)
        return {}
    if found is not None:
        say(
            f"ddpm-hf: {found['scheduler']} in {counted(found['num_inference_steps'], 'step')}, as"
            f" `ddpm-hf calibrate --sweep` recommends; --thorough takes all {T:,} of DDPM"
        )
    return call


def optimize(
    pipeline: "GaussianDDPMPipeline",
    guide: Any,
    call: dict[str, Any],
    options: argparse.Namespace,
    output: Path,
    state: Any,
) -> None:
    """Make the networks fast for as many calls as these images take, and print how.

    The main process chooses for all, as it did when the images were begun: so all have their bits.
    """
    from ddpm_hf.diffusion.schedules import usual_num_steps
    from ddpm_hf.diffusion.speed import options_of
    from ddpm_hf.sampling.image_writer import kept_settings
    from ddpm_hf.sampling.sampling_record import speed_of
    from ddpm_hf.shared_work import on_main_process

    kind, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    steps = len(call.get("timesteps") or ()) or call["num_inference_steps"]
    steps = steps or usual_num_steps(kind, config.num_train_timesteps)
    batch_size = min(options.batch_size, options.num_images)
    num_calls = steps * math.ceil(options.num_images / batch_size)
    if guide is None and options.guidance_scale not in (None, 1):
        batch_size *= 2  # for the class and for none at once

    def choose() -> Any:
        kept = kept_settings(output, options.overwrite).get("speed")
        if kept is None:
            pipeline.optimize(batch_size, num_calls, guide=guide)
        return kept or speed_of(pipeline)

    chosen = on_main_process(state, choose)
    if pipeline.speed is None:
        with contextlib.redirect_stdout(sys.stdout if state.is_main_process else None):
            pipeline.optimize(batch_size, num_calls, guide=guide, **options_of(chosen))
