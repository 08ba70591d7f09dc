"""From the options as given to the complete configuration of a run.

`resume_options` fills open options from the run that is resumed, before anything is loaded;
`resolve` fills the rest from the images, the network and the machine. Imports no torch.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddpm_hf.diffusion.config_extension import beta_schedule_of
from ddpm_hf.diffusion.schedules import BETA_SCHEDULES
from ddpm_hf.training.config import ResolvedConfig, TrainingConfig
from ddpm_hf.training.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

# Options that a resumed run may change; all others affect what the network learns.
CHANGEABLE_ON_RESUME = frozenset(
    {
        "max_train_steps", "gradient_accumulation_steps", "dataloader_num_workers", "output_dir",
        "streaming_cache_gb", "post_hoc_ema_steps",
        # Compared by content, in the components of the run.
        "dataset", "image_column", "class_column", "pretrained", "unet_config",
        "gradient_checkpointing",  # bit-equal
        "num_threads",  # another number changes the last bits of sums
        "dry_run", "logging_steps", "report_to", "tracker_project_name", "run_name",
        "sample_steps", "num_samples", "sample_inference_steps",
        "checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "public", "license",
        "use_safetensors", "calibrate", "ddp_timeout",
        "validation_steps", "validation_images", "validation_timesteps", "keep_best",
        "best_metric",
        "evaluate_steps", "evaluate_num_images", "evaluate_features",
    }
)  # fmt: skip

# Snapshots at 32 times give profiles with sigma_rel .03 to .2 to 1 % (docs/ema.md).
_NUM_SNAPSHOTS = 32
_VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned_range")


@dataclass(frozen=True)
class Machine:
    """Device type, such as "cpu" or "cuda", number of processes, and precision of accelerate."""

    device: str
    num_processes: int = 1
    mixed_precision: str = "no"

    @classmethod
    def of(cls, accelerator: "Accelerator") -> "Machine":
        """The machine of an `Accelerator`."""
        device, precision = accelerator.device.type, accelerator.mixed_precision
        return cls(device, accelerator.num_processes, precision)


def implied_options(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Values of open options that the images and the diffusion of a run imply.

    With them a recipe gives the same run. Images that keep a size of their own that is not square
    have no `resolution`.

    Args:
        parts: images and diffusion, as `Components.identity` describes them.
    """
    images, diffusion = parts.get("images", {}), parts.get("diffusion", {})
    names = ("num_train_timesteps", "prediction_type", "variance_type")
    implied = {
        "resolution": images.get("height") if images.get("height") == images.get("width") else None,
        "image_mode": images.get("mode"),
        "bit_depth": images.get("bit_depth"),
        "beta_schedule": beta_schedule_of(diffusion)[0] if diffusion else None,
        **{name: diffusion.get(name) for name in names},
    }
    choices = {"beta_schedule": BETA_SCHEDULES, "variance_type": _VARIANCE_TYPES}
    return {
        name: value
        for name, value in implied.items()
        if value is not None and value in choices.get(name, [value])
    }


def resume_options(
    options: TrainingConfig, previous: Mapping[str, Any], parts: Mapping[str, Any] | None = None
) -> TrainingConfig:
    """The options of a resumed run: open options keep their previous value.

    Args:
        options: the options of the new command.
        previous: the complete options of the run so far, from its checkpoint. Unknown ones are
            ignored; missing ones, which are newer than the run, had their default.
        parts: its components, from the same checkpoint. An option that was open in the run so far
            may be set to the value that they have.
    Raises:
        ConfigError: for changed options that affect what the network learns.
    """
    before = vars(TrainingConfig()) | dict(previous)
    given = {name: value for name, value in vars(options).items() if value is not None}
    proposed = {
        name: value
        for name, value in implied_options(parts or {}).items()
        if before[name] is None and name in given
    }
    changed = [
        f"`{name}`: {proposed.get(name, before[name])!r} -> {value!r}"
        for name, value in given.items()
        if value != proposed.get(name, before[name])
        and (name not in CHANGEABLE_ON_RESUME or (name, before[name]) == ("pretrained", None))
    ]
    if changed:
        raise ConfigError(
            f"{options.run_folder()} holds a run with other options ({'; '.join(changed)}); "
            + options.resume_hint()
        )
    kept = {name: before[name] for name in vars(options) if name not in given or name in proposed}
    warmup, num_updates = kept.get("lr_warmup_steps") or 0, given.get("max_train_steps", math.inf)
    if num_updates < warmup:
        raise ConfigError(
            f"`max_train_steps` must be at least {warmup}, the number of warmup updates of the run "
            f"in {options.run_folder()}, got {num_updates}; " + options.resume_hint()
        )
    return TrainingConfig(**(given | kept))


def resolve(
    options: TrainingConfig,
    machine: Machine,
    *,
    num_images: int,
    image_size: int,
    learns_variance: bool,
    num_channels: int,
    prediction_type: str,
    has_custom_loss: bool,
) -> ResolvedConfig:
    """The complete configuration of a run; as a recipe it gives the same run again.

    Args:
        options: the options as given, with those of the resumed run filled in.
        machine: hardware and processes; a CPU gets a shorter run.
        num_images: number of images in the dataset, held-out ones included.
        image_size: longer side of the images in pixels.
        learns_variance: whether the network predicts the variance of the reverse step.
        num_channels: channels of the first level of the network.
        prediction_type: target of the network.
        has_custom_loss: whether `train` was called with a loss.
    Raises:
        ConfigError: if the batch does not divide into equal micro-batches, or if accelerate is
            configured for another precision than that of the resumed run.
    """
    on_cpu, pretrained = machine.device == "cpu", options.pretrained is not None
    _check_precision(options, machine)
    batch_size = _batch_size(options, machine, image_size)
    max_train_steps = options.max_train_steps or _num_updates(
        num_images, batch_size, image_size, on_cpu
    )
    warmup, rate = options.lr_warmup_steps, options.learning_rate
    interval = 250 if on_cpu else 1000
    checkpointing_steps = options.checkpointing_steps or interval
    snapshot_steps = options.post_hoc_ema_steps
    if options.post_hoc_ema and snapshot_steps is None:
        snapshot_steps = -(-max_train_steps // _NUM_SNAPSHOTS)
    objective = options.objective or ("hybrid" if learns_variance else "simple")
    # In short runs better for v and x_0, and worse for epsilon (docs/training_quality.md).
    is_asymmetric = (
        on_cpu and not pretrained and objective == "simple" and not has_custom_loss
        and prediction_type != "epsilon"
    )  # fmt: skip
    sampling = options.timestep_sampling or ("asymmetric" if is_asymmetric else "uniform")
    proposed = {
        "objective": objective,
        "timestep_sampling": sampling,
        "max_train_steps": max_train_steps,
        "batch_size": batch_size,
        "learning_rate": _learning_rate(num_channels, pretrained, on_cpu) if rate is None else rate,
        "lr_warmup_steps": min(max_train_steps // 20, 1000) if warmup is None else warmup,
        "mixed_precision": machine.mixed_precision,
        "validation_steps": options.validation_steps or checkpointing_steps,
        "sample_steps": options.sample_steps or interval,
        "checkpointing_steps": checkpointing_steps,
        "post_hoc_ema_steps": snapshot_steps,
    }
    return ResolvedConfig(**(vars(options) | proposed))


def _check_precision(options: TrainingConfig, machine: Machine) -> None:
    precision = options.mixed_precision
    if precision not in (None, machine.mixed_precision):
        raise ConfigError(
            f"{options.run_folder()} holds a run with `mixed_precision` {precision!r}, but "
            f"accelerate is configured for {machine.mixed_precision!r}: set `mixed_precision` to "
            f"{precision!r}, or choose another `output_dir`"
        )


def _batch_size(options: TrainingConfig, machine: Machine, image_size: int) -> int:
    """The batch size: given, 16 on a CPU, or 32 to 64 on a GPU by the size of the images.

    On a CPU, images per second hardly depend on the batch size, and after equal time 16 images gave
    the better samples (docs/training_quality.md).
    """
    shares = machine.num_processes * options.gradient_accumulation_steps
    if options.batch_size is None:
        usual = 16 if machine.device == "cpu" else (64 if image_size <= 64 else 32)
        return max(usual // shares, 1) * shares
    if options.batch_size % shares:
        lower = options.batch_size // shares * shares
        choices = f"{lower} or {lower + shares}" if lower else f"{shares}"
        raise ConfigError(
            f"`batch_size` must be a multiple of {shares} (processes x "
            f"`gradient_accumulation_steps`), got {options.batch_size}; set it to {choices}. A run "
            "that is resumed keeps its `batch_size`: start a number of processes that divides it"
        )
    return options.batch_size


def _num_updates(num_images: int, batch_size: int, image_size: int, on_cpu: bool) -> int:
    """400 epochs, within the limits of an evening (CPU) or a night (GPU)."""
    longest = (10_000 if image_size <= 32 else 3000) if on_cpu else 50_000
    return min(max(400 * num_images // batch_size, 2000), longest)


def _learning_rate(num_channels: int, is_pretrained: bool, on_cpu: bool) -> float:
    """Peak learning rate of AdamW.

    DDPM's networks, with 128 channels, used 1e-4 to 2e-4 (2006.11239, appendix B); Adam's best
    rate falls with the width (2203.03466). In the short runs of a CPU, 2e-3 was best for 32
    channels (docs/training_quality.md).
    """
    if is_pretrained:
        return 1e-4
    highest = 2e-3 if on_cpu else 4e-4
    return min(max((highest * 32) / num_channels, 1e-4), highest)
