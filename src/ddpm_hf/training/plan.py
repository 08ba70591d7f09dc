"""What a run says before it begins and after it has ended."""

import dataclasses
from collections.abc import Sequence

from ddpm_hf.diffusion.config_extension import beta_schedule_of
from ddpm_hf.text import counted, duration
from ddpm_hf.training.accelerator import available_trackers
from ddpm_hf.training.config import required
from ddpm_hf.training.final_calibration import describe_calibration
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.periodic_evaluation import Evaluation
from ddpm_hf.training.run import Run
from ddpm_hf.training.state import read_facts
from ddpm_hf.training.validation import Validation


def print_plan(
    run: Run, measurements: Sequence[Validation | Evaluation], seconds: float | None
) -> None:
    """Say what is about to happen and how long it will take; keep the options beside it.

    Args:
        run: which is about to begin.
        measurements: what is measured on the way.
        seconds: of an update, if known.
    """
    accelerator = run.accelerator
    if run.state.step:
        accelerator.print(f"resuming after update {run.state.step:,}, from {run.checkpoint}")
        accelerator.print(other_length(run), end="")
    accelerator.print(describe(run, measurements))
    if seconds is not None:
        updates = run.batches.stop - run.state.step
        accelerator.print(
            f"time       about {duration(updates * seconds)} ({seconds:.2g} s an update); "
            "stop at any time with Ctrl-C, run the same command again to go on"
        )
    if accelerator.is_main_process:
        run.paths.config.write_text(run.config.to_yaml(), encoding="utf-8")


def other_length(run: Run) -> str:
    """What the learning rate does where a resumed run has another length than before, else ""."""
    if run.checkpoint is None or run.config.lr_scheduler == "constant":
        return ""
    length = required(run.config.max_train_steps)
    before = dataclasses.replace(
        run.config, max_train_steps=read_facts(run.checkpoint)["config"]["max_train_steps"]
    )
    last = run.state.step - 1
    if before.max_train_steps == length or run.state.step == length:
        return ""
    return (
        f"length     {counted(length, 'update')} instead of {before.max_train_steps:,}: the "
        f"learning rate goes from {learning_rate(before, last):.2g} to "
        f"{learning_rate(run.config, last + 1):.2g} and then down to 0 at the end\n"
    )


def describe(run: Run, measurements: Sequence[Validation | Evaluation] = ()) -> str:
    """The plan of a run in a few lines, every proposed value included."""
    config, accelerator, unet = run.config, run.accelerator, run.state.unet
    facts, num_images = run.parts.facts, len(run.parts.images)
    parameters = sum(p.numel() for p in unet.parameters())
    channels = getattr(getattr(unet, "config", None), "block_out_channels", ())
    steps, batch = required(config.max_train_steps), required(config.batch_size)
    diffusion = run.parts.scheduler.config
    schedule, params = beta_schedule_of(diffusion)
    schedule += f" ({', '.join(f'{k} {v:g}' for k, v in params.items())})" * bool(params)
    split = f", {config.gradient_accumulation_steps} passes each" * (
        config.gradient_accumulation_steps > 1
    )
    losses = "logs/ for TensorBoard" if available_trackers() else f"{run.paths.metrics.name}"
    return "\n".join(
        [
            f"images     {num_images:,} of {facts.width}x{facts.height}, {facts.mode}"
            + f" {facts.bit_depth} bit" * (facts.bit_depth != 8)
            + (f", {len(facts.class_names)} classes" if facts.class_names else ""),
            f"network    {type(unet).__name__}, {parameters:,} parameters"
            + f", channels {'-'.join(map(str, channels))}" * bool(channels),
            f"diffusion  T={diffusion.num_train_timesteps}, {schedule}, "
            f"predicts {diffusion.prediction_type}, variance {diffusion.variance_type}",
            f"training   {counted(steps, 'update')} of {counted(batch, 'image')}{split} "
            f"({counted(round(steps * batch / num_images), 'epoch')}), "
            f"learning rate {config.learning_rate:g}, objective {run.parts.objective.name}",
            f"machine    {accelerator.num_processes} x {accelerator.device.type}, "
            f"mixed precision: {accelerator.mixed_precision}{_computed(run)}",
            f"output     {run.paths.root}, losses in {losses}",
            *(measurement.describe() for measurement in measurements),
            *([describe_calibration(run)] if config.calibrate else []),
            *(f"note       {note}" for note in run.parts.notes),
        ]
    )


def _computed(run: Run) -> str:
    """How the network is computed, where that is not as usual."""
    how = run.computation()
    words = {
        counted(how.get("num_threads", 0), "thread"): "num_threads" in how,
        f"TF32 in {' and '.join(how.get('tf32', ()))}": how.get("tf32"),
        "compiled": how["compile"],
        "gradient checkpointing": how["gradient_checkpointing"],
        "channels last": how["memory_format"] == "channels_last",
    }
    return "".join(f", {word}" for word, holds in words.items() if holds) + f", {how['optimizer']}"


def outcome(run: Run) -> str:
    """What a run left and what to do with it, in a few lines."""
    paths, step, model = run.paths, run.state.step, run.paths.model.root
    if run.stop.received is not None:
        return (
            f"stopped    after update {step:,}, saved in {paths.checkpoints}; run the same "
            "command again to go on"
        )
    grids = f", sample grids in {paths.samples}" * bool(run.config.num_samples)
    return (
        f"done       {counted(step, 'update')}, this run took {duration(run.elapsed_s)}\n"
        f"model      {model}{grids}\n"
        f"next       ddpm-hf sample {model}\n"
        f"           ddpm-hf push {model} YOU/NAME"
    )
