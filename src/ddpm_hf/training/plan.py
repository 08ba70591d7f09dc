"""The plan printed before training and the summary printed after it."""

import dataclasses
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from diffusers import UNet2DModel

from ddpm_hf.data.streaming import StreamedImages
from ddpm_hf.diffusion.config_extension import beta_schedule_of
from ddpm_hf.diffusion.image_format import ImageFacts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.options import for_user
from ddpm_hf.training.ema_sampling import grid_of
from ddpm_hf.training.file_system import FileSystem
from ddpm_hf.training.final_calibration import calibration_cost, describe_calibration
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.periodic_evaluation import PeriodicEvaluation
from ddpm_hf.training.post_hoc_averages import averaging_s, describe_averages
from ddpm_hf.training.run import Run
from ddpm_hf.training.trackers import installed_trackers, requested_trackers
from ddpm_hf.training.validation import Validation
from ddpm_hf.utils.text import counted, duration, is_notebook

_MAX_CLASSES = 40


COMMAND, CELL = "run the same command again", "run the cell again"


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will do, every proposed value included; `str()` gives the printed lines.

    Attributes:
        resumed_from: complete lines about the checkpoint; empty for a new run.
        classes: names of the classes and their numbers of images; empty without classes.
        measurements: complete lines about validation, evaluation and calibration.
        quality: expected samples; empty if unknown.
        time: expected duration; empty if unknown.
    """

    resumed_from: tuple[str, ...]
    images: str
    classes: str
    network: str
    diffusion: str
    training: str
    machine: str
    output: str
    measurements: tuple[str, ...]
    notes: tuple[str, ...]
    quality: str
    time: str

    def __str__(self) -> str:
        labels = ("images", "classes", "network", "diffusion", "training", "machine", "output")
        values = {label: getattr(self, label) for label in labels}
        lines = [f"{label:<10} {value}" for label, value in values.items() if value]
        notes = [f"note       {for_user(note)}" for note in self.notes]
        expected = {"quality": self.quality, "time": self.time}
        ends = [f"{label:<10} {value}" for label, value in expected.items() if value]
        return "\n".join([*self.resumed_from, *lines, *self.measurements, *notes, *ends])


def plan_training(
    run: Run,
    validation: Validation | None,
    evaluation: PeriodicEvaluation | None,
    update_s: float | None,
    file_system: FileSystem | None,
) -> TrainingPlan:
    """The plan of a run.

    Args:
        run: the run before its first update.
        validation, evaluation: what is measured during training.
        update_s: seconds per update; None if unknown.
        file_system: that of the run folder; None if unknown.
    """
    measurements = [measurement for measurement in (validation, evaluation) if measurement]
    calibration = [describe_calibration(run)] if run.config.calibrate else []
    share = averaging_s(run) / update_s if update_s and run.state.averages else 0.0
    averages = [describe_averages(run, share)] if run.state.averages else []
    costs = [measurement.relative_cost for measurement in measurements]
    return TrainingPlan(
        resumed_from=_describe_resume(run),
        images=_describe_images(run),
        classes=_describe_classes(run.components.facts),
        network=_describe_network(run.components.unet),
        diffusion=_describe_diffusion(run.components.scheduler),
        training=_describe_training(run),
        machine=_describe_machine(run),
        output=f"{run.paths.root}, losses in {_describe_losses(run)}"
        + (f"; {file_system}" if file_system else ""),
        measurements=(*(m.describe() for m in measurements), *calibration, *averages),
        notes=run.components.notes,
        quality=_describe_quality(run),
        time="" if update_s is None else _describe_time(run, update_s, [*costs, share]),
    )


def _describe_losses(run: Run) -> str:
    """The installed trackers of the run, or its log without any; and those to install."""
    requested = requested_trackers(run.config.report_to)
    names = [name for name in installed_trackers() if name in requested]
    shown = ["logs/ for TensorBoard" if name == "tensorboard" else name for name in names]
    missing = ", ".join(name for name in requested if name not in names)
    return (", ".join(shown) or run.paths.metrics.name) + (
        f" (not installed: {missing})" if missing else ""
    )


def _describe_images(run: Run) -> str:
    facts = run.components.facts
    depth = f" {facts.bit_depth} bit" * (facts.bit_depth != 8)
    size = f"{facts.width}x{facts.height}, {facts.mode}"
    source = run.components.images.source
    text = f"{len(run.components.images):,} of {size}{depth}"
    if not isinstance(source, StreamedImages):
        return text
    where = f"a cache of up to {source.cache.limit / 1e9:.3g} GB in {source.cache.folder}"
    held_out = len(source.cache.index.shards) - len(source.index.shards)
    without = f" ({held_out} held out)" * bool(held_out)
    shards = counted(len(source.index.shards), "shard")
    return f"{text}, from {shards}{without}, streamed through {where}"


def _describe_classes(facts: ImageFacts) -> str:
    """The classes with their numbers of training images."""
    if not facts.class_names or facts.class_counts is None:
        return ""
    pairs = [*zip(facts.class_names, facts.class_counts, strict=True)]
    shown = ", ".join(f"{name} ({count:,})" for name, count in pairs[:_MAX_CLASSES])
    return f"{len(pairs)}: {shown}" + ", ..." * (len(pairs) > _MAX_CLASSES)


def _describe_network(unet: UNet2DModel) -> str:
    channels = "-".join(map(str, unet.config.block_out_channels))
    count = sum(p.numel() for p in unet.parameters())
    return f"{type(unet).__name__}, {count:,} parameters, channels {channels}"


def _describe_diffusion(scheduler: GaussianDDPMScheduler) -> str:
    config = scheduler.config
    schedule, params = beta_schedule_of(config)
    schedule += f" ({', '.join(f'{k} {v:g}' for k, v in params.items())})" * bool(params)
    return (
        f"T={config.num_train_timesteps}, {schedule}, predicts {config.prediction_type}, "
        f"variance {config.variance_type}"
    )


def _describe_training(run: Run) -> str:
    config, steps = run.config, run.config.max_train_steps
    passes = config.gradient_accumulation_steps
    split = f" in {passes} micro-batches per process" * (passes > 1)
    epochs = round(steps * config.batch_size / len(run.components.images))
    return (
        f"{counted(steps, 'update')} of {counted(config.batch_size, 'image')}{split} "
        f"({counted(epochs, 'epoch')}), learning rate {config.learning_rate:g}, objective "
        f"{run.components.objective.name}, {config.timestep_sampling} timesteps"
    )


def _describe_quality(run: Run) -> str:
    """Samples of new networks after this number of updates; empty for images over 32x32 pixels.

    With 16 images per update, digits were recognisable after 200 updates and pixel faces after 600;
    faces had few errors after 2,000. Emoji of 32x32 pixels were blurs after 2,000 updates and
    partly recognisable after 10,000. Larger images were not measured (docs/training_quality.md).
    """
    facts, num_updates = run.components.facts, run.config.max_train_steps
    if run.config.pretrained is not None or max(facts.height, facts.width) > 32:
        return ""
    if num_updates < 200:
        return "blurs, enough to test the settings"
    if num_updates < 2000:
        return (
            "recognisable if the images are alike, such as digits, or pixel faces from 600 updates;"
            " blurs if they vary"
        )
    return (
        "few errors if the images are alike, such as pixel faces; if they vary, partly recognisable"
        " from 10,000 updates"
    )


def _describe_machine(run: Run) -> str:
    accelerator, computation = run.accelerator, run.computation
    details = {
        counted(computation.num_threads or 0, "thread"): computation.num_threads,
        f"TF32 in {' and '.join(computation.tf32 or ())}": computation.tf32,
        "compiled": computation.compile,
        "gradient checkpointing": computation.gradient_checkpointing,
        "channels last": computation.memory_format == "channels_last",
        computation.optimizer: True,
    }
    return ", ".join(
        [
            f"{accelerator.num_processes} x {accelerator.device.type}",
            f"mixed precision: {accelerator.mixed_precision}",
            *(text for text, holds in details.items() if holds),
        ]
    )


def _describe_resume(run: Run) -> tuple[str, ...]:
    """Lines about the checkpoint, and about the learning rate if the length of the run changed."""
    if run.record is None:
        return ()
    step, config = run.state.step, run.config
    resumed = f"resuming after update {step:,}, from {run.checkpoint}"
    previous = dataclasses.replace(config, max_train_steps=run.record.config["max_train_steps"])
    is_same_length = previous.max_train_steps == config.max_train_steps
    if is_same_length or config.lr_scheduler == "constant" or step == config.max_train_steps:
        return (resumed,)
    return resumed, (
        f"length     {counted(config.max_train_steps, 'update')} instead of "
        f"{previous.max_train_steps:,}: the learning rate goes from "
        f"{learning_rate(previous, step - 1):.2g} to {learning_rate(config, step):.2g} and then "
        "decays to 0"
    )


def _describe_time(run: Run, update_s: float, costs: Sequence[float]) -> str:
    """Duration of the remaining updates with all that is done between them, and the calibration.

    Args:
        run: the run.
        update_s: seconds per update.
        costs: of measurements and averages, relative to the updates.
    """
    config = run.config
    steps = min(config.sample_inference_steps, len(run.components.scheduler))
    grids = run.relative_cost(grid_of(run)[0] * steps, config.sample_steps)
    costs = [*costs, grids]
    all_updates_s = run.config.max_train_steps * update_s
    total_s = run.num_updates_left * update_s * (1 + sum(costs))
    total_s += all_updates_s * calibration_cost(run) if config.calibrate else 0.0
    what = "with all measurements and samples" if sum(costs) or config.calibrate else "in all"
    stop, again = ("interrupt the kernel", CELL) if is_notebook() else ("press Ctrl-C", COMMAND)
    return (
        f"about {duration(total_s)} {what} ({update_s:.2g} s per update); {stop} to stop, {again}"
        " to resume"
    )


def summarize(run: Run) -> str:
    """Result of a run and the next steps, as printed lines."""
    paths, step, model = run.paths, run.state.step, run.paths.model.root
    if run.stop.received is not None:
        again = CELL if is_notebook() else COMMAND
        return f"stopped    after update {step:,}, saved in {paths.checkpoints}; {again} to resume"
    grids = f", sample grids in {paths.samples}" * bool(run.config.num_samples)
    folder = shlex.quote(str(model))
    sample, push = f"ddpm-hf sample {folder}", f"ddpm-hf push {folder} YOU/NAME"
    if is_notebook():
        sample = f"ddpm_hf.load({str(model)!r})(batch_size=4).images"
        push = f"ddpm_hf.push({str(model)!r}, 'YOU/NAME')"
    return (
        f"done       {counted(step, 'update')}, this run took {duration(run.elapsed_s)}\n"
        f"model      {model}{grids}\n"
        f"next       {sample}\n"
        f"           {push}"
    )
