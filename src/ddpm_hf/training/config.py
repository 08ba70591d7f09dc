"""What to train: the options of a run, what they admit, and what a resumed run may change.

The same fields are the flags of `ddpm-hf train`, the keys of a YAML recipe and the arguments of
`TrainingConfig` in Python.
"""

import dataclasses
import math
import os
import shlex
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

Number = TypeVar("Number", int, float)


class ConfigError(ValueError):
    """An option with a value that cannot work; the message names it, the choices and the fix."""


class TrainingError(RuntimeError):
    """A run that cannot go on; its last checkpoint is good."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


MIN_SIZE = 3
"""Fewest pixels a side: a network has nothing to halve below that."""

_PATHS = ("dataset", "output_dir", "pretrained", "unet_config")  # a leading ~ means home

# What a resumed run may change: everything else shapes what is learned.
FREE_ON_RESUME = frozenset(
    {
        "max_train_steps", "gradient_accumulation_steps", "dataloader_num_workers", "output_dir",
        "dataset",  # the images themselves are compared
        "gradient_checkpointing",  # the same bits
        "num_threads",  # sums of the other number differ in their last bits
        "logging_steps", "sample_steps", "num_samples", "sample_inference_steps",
        "checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "public", "license",
        "allow_pickle", "calibrate", "ddp_timeout",
        "validation_steps", "validation_images", "validation_timesteps", "keep_best",
    }
)  # fmt: skip


@dataclass
class DataOptions:
    """Which images, and how they become tensors."""

    _argument_group_name: ClassVar[str] = "images"

    dataset: str | None = _option(
        None,
        "folder of images, Hub data set, parquet/arrow files (a file, a glob or a folder), or a "
        "save_to_disk folder",
    )
    dataset_config: str | None = _option(None, "configuration of a Hub data set that has several")
    dataset_revision: str | None = _option(None, "branch, tag or commit of a Hub data set")
    split: str = _option("train", "split to train on; slices such as 'train[:1000]' work")
    image_column: str | None = _option(
        None, "column that holds the images (default: the only image column)"
    )
    resolution: int | None = _option(
        None,
        "images are resized to this many pixels a side (default: their own size when all agree)",
    )
    image_mode: Literal["L", "LA", "RGB", "RGBA"] | None = _option(
        None, "convert images to this mode: 1, 2, 3 or 4 channels (default: their own)"
    )
    bit_depth: Literal[8, 16] | None = _option(
        None, "bits per channel (default: 16 where all images are grey and some have 16, else 8)"
    )
    class_conditional: bool = _option(
        False, "train on the class labels, too, so that a class can be drawn"
    )
    class_column: str | None = _option(
        None,
        "column of the class labels (default: the one that is declared as such, or the sub-folders "
        "of a folder); implies class_conditional",
    )
    crop: Literal["center", "random", "none"] = _option(
        "center",
        "images of unequal size become square: cut the middle, or another part in every epoch; "
        "'none' keeps the whole image and needs one shape",
    )
    random_flip: bool = _option(
        False, "mirror every second image left to right (leave off for digits and text)"
    )
    on_bad_image: Literal["error", "skip"] = _option(
        "error", "unreadable images: list them and stop before training, or leave them out"
    )
    dataloader_num_workers: int | None = _option(
        None, "processes that load batches (default: 4 with a GPU, else none)"
    )


@dataclass
class ModelOptions:
    """Which network, and which diffusion."""

    _argument_group_name: ClassVar[str] = "network and diffusion"

    pretrained: str | None = _option(
        None,
        "fine-tune: start from the weights of this Hub repository or folder (a pipeline or a bare "
        "UNet2DModel)",
    )
    allow_pickle: bool = _option(
        False,
        "open the pickled .bin weights of an old pretrained repository; they could run code, so "
        "only for authors you trust",
    )
    unet_config: str | None = _option(
        None,
        "JSON file with the arguments of a UNet2DModel; channels and classes that it leaves out "
        "are those of the images (default: proposed)",
    )
    num_train_timesteps: int | None = _option(
        None, "steps T of the diffusion (default: 1000, or the pretrained model's)"
    )
    beta_schedule: str | None = _option(
        None, "noise schedule (default: squaredcos_cap_v2, or the pretrained model's)"
    )
    prediction_type: Literal["epsilon", "sample", "v_prediction"] | None = _option(
        None, "what the network predicts (default: v_prediction, or the pretrained model's)"
    )
    variance_type: Literal["fixed_small", "fixed_large", "learned_range"] | None = _option(
        None,
        "variance of a reverse step; learned_range: the network predicts it, which gives better "
        "likelihoods (default: fixed_small, or the pretrained model's)",
    )


@dataclass
class OptimizationOptions:
    """How long, and how fast."""

    _argument_group_name: ClassVar[str] = "optimization"

    objective: Literal["simple", "hybrid", "vlb"] | None = _option(
        None,
        "what an update minimises: the squared error, the variational bound, or the squared error "
        "with the bound for a learned variance (default: hybrid if the variance is learned, else "
        "simple)",
    )
    loss_weighting: Literal["none", "min_snr", "p2", "truncated_snr"] = _option(
        "none", "weights of the squared error by noise level"
    )
    timestep_sampling: Literal["uniform", "low_discrepancy", "loss_second_moment"] = _option(
        "uniform",
        "timesteps of a batch: independent, evenly spaced, or more of those with large losses (for "
        "objective vlb)",
    )
    class_dropout: float = _option(
        0.1,
        "share of the labels that are hidden from the network, so that it learns to draw without "
        "one, which guidance needs",
    )
    max_train_steps: int | None = _option(None, "optimizer updates in all (default: proposed)")
    batch_size: int | None = _option(
        None,
        "images per optimizer update, over all processes and accumulation steps together, so that "
        "a recipe means the same on one GPU and on eight (default: proposed)",
    )
    gradient_accumulation_steps: int = _option(
        1, "forward and backward passes that each process splits its share of a batch into"
    )
    learning_rate: float | None = _option(
        None,
        "peak learning rate of AdamW (default: 1e-4; more, up to 4e-4, for a network that starts "
        "from scratch with fewer than 128 channels)",
    )
    lr_scheduler: Literal["cosine", "constant"] = _option(
        "cosine", "after the warm-up: fall to 0 along a cosine, or stay"
    )
    lr_warmup_steps: int | None = _option(
        None, "updates over which the learning rate rises (default: a twentieth, at most 1000)"
    )
    weight_decay: float = _option(0.0, "AdamW's weight decay")
    max_grad_norm: float = _option(1.0, "gradients are clipped to this norm")
    ema_decay: float = _option(
        0.9999,
        "highest decay of the moving average of the weights, which is what is sampled and shared; "
        "at update n it is at most (1 + n) / (10 + n)",
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = _option(
        None, "precision of the network's arithmetic (default: accelerate's configuration)"
    )
    compile: bool | None = _option(
        None,
        "compile the network by torch.compile, which takes minutes before the first update and "
        "pays in long runs; --no-compile: not (default: accelerate's configuration)",
    )
    gradient_checkpointing: bool = _option(
        False,
        "compute activations anew in the backward pass: the same bits, about a third slower, in a "
        "fraction of the memory",
    )
    num_threads: int | None = _option(
        None,
        "threads of the CPU that share an operation (default: as many as the cores, or one where "
        "that is faster, because something else keeps a core busy)",
    )
    ddp_timeout: int = _option(
        300, "seconds that the processes of a run wait for one that does not answer"
    )
    seed: int = _option(0, "every random number of the run follows from it")


@dataclass
class ValidationOptions:
    """Bits/dim of held-out images on the way; for the whole bound see `ddpm-hf evaluate`."""

    _argument_group_name: ClassVar[str] = "validation"

    validation_split: str | None = _option(
        None,
        "measure bits/dim on these images: a split such as 'test', or a share of the training "
        "images such as 0.05, which is then not trained on (default: no measurement)",
    )
    validation_steps: int | None = _option(
        None, "updates between two measurements (default: as checkpointing_steps)"
    )
    validation_images: int = _option(64, "how many of the images are measured, always the same")
    validation_timesteps: int = _option(
        16, "network calls per image, at timesteps drawn such that the measurement is unbiased"
    )
    keep_best: bool = _option(
        False, "also keep the model with the lowest bits/dim so far, in the folder best/"
    )


@dataclass
class OutputOptions:
    """What is written, where and when."""

    _argument_group_name: ClassVar[str] = "output"

    output_dir: str | None = _option(None, "folder of the run (default: runs/NAME of the data set)")
    logging_steps: int = _option(20, "updates between two log entries")
    sample_steps: int | None = _option(None, "updates between two sample grids (default: proposed)")
    num_samples: int = _option(16, "images in a sample grid; 0 draws none")
    sample_inference_steps: int = _option(
        50, "denoising steps of a sample grid (deterministic DDIM, which needs few)"
    )
    checkpointing_steps: int | None = _option(
        None, "updates between two checkpoints (default: proposed)"
    )
    checkpoints_total_limit: int = _option(2, "newest checkpoints that are kept")
    calibrate: bool = _option(
        False,
        "in the end measure what the model loses in few steps, and the best variances for them, as "
        "`ddpm-hf calibrate` does on 64 images",
    )
    push_to_hub: str | None = _option(
        None, "also push to this Hub repository, 'user/name', at every checkpoint"
    )
    public: bool = _option(False, "make a new Hub repository public (default: private)")
    license: str | None = _option(
        None, "licence of the model, for its card: a name that the Hub knows, such as 'apache-2.0'"
    )


@dataclass
class TrainingConfig(
    OutputOptions, ValidationOptions, OptimizationOptions, ModelOptions, DataOptions
):
    """Every option of a training run; None means: propose it from the data and the machine.

    Raises:
        ConfigError: for a value of the wrong type or out of range, naming field, value and choices.
    """

    def __post_init__(self) -> None:
        # Not `field.type`: HfArgumentParser rewrites that.
        hints = typing.get_type_hints(type(self))
        for option in fields(self):
            value = _checked(option.name, hints[option.name], getattr(self, option.name))
            is_home = option.name in _PATHS and isinstance(value, str) and value.startswith("~")
            setattr(self, option.name, os.path.expanduser(value) if is_home else value)
        self.class_conditional |= self.class_column is not None
        self._check_ranges()

    def _check_ranges(self) -> None:
        at_least = {
            "resolution": MIN_SIZE, "num_train_timesteps": 1, "max_train_steps": 1, "batch_size": 1,
            "gradient_accumulation_steps": 1, "logging_steps": 1, "sample_steps": 1,
            "checkpointing_steps": 1, "checkpoints_total_limit": 1, "sample_inference_steps": 1,
            "validation_steps": 1, "validation_images": 2, "validation_timesteps": 2,
            "ddp_timeout": 1, "num_threads": 1, "lr_warmup_steps": 0, "num_samples": 0,
            "dataloader_num_workers": 0, "seed": 0,
        }  # fmt: skip
        if "://" in (self.dataset or ""):  # not repeated: it may hold a password
            raise ConfigError(
                "dataset is a URL: give the name of a Hub data set, such as 'user/photos', or "
                "download the images and give their folder"
            )
        if self.output_dir == "":
            raise ConfigError("output_dir is empty; name the folder of the run, or leave it out")
        if self.seed >= 2**32:
            raise ConfigError(f"seed must be below 2**32, got {self.seed}")
        for name, lowest in at_least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise ConfigError(f"{name} must be at least {lowest}, got {value}")
        # Adam moves a weight by little more than the learning rate, so a rate of at most 1 means
        # that finite gradients cannot make a weight overflow.
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ConfigError(
                f"learning_rate must be above 0 and at most 1, got {self.learning_rate}; "
                "1e-4 is a good start"
            )
        if not 0 <= self.class_dropout < 1:
            raise ConfigError(f"class_dropout must be in [0, 1), got {self.class_dropout}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not (0 < self.max_grad_norm < math.inf):
            raise ConfigError(f"max_grad_norm must be positive, got {self.max_grad_norm}")
        if not 0 <= self.weight_decay < 1:
            raise ConfigError(f"weight_decay must be in [0, 1), got {self.weight_decay}")
        if self.pretrained and self.unet_config:
            raise ConfigError(
                "pretrained and unet_config exclude each other: a pretrained model brings its own "
                "network; leave one out"
            )
        if (self.lr_warmup_steps or 0) > (self.max_train_steps or math.inf):
            raise ConfigError(
                f"lr_warmup_steps ({self.lr_warmup_steps}) must not exceed max_train_steps "
                f"({self.max_train_steps})"
            )

    def run_folder(self) -> Path:
        """`output_dir`, by default runs/NAME with the name of the data set."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = Path(self.dataset or "images").resolve().name
        return Path("runs") / (name.split("*")[0].split(".")[0] or "images")

    def how_to_change(self) -> str:
        """The end of a refusal to resume: how to train with what is new all the same."""
        folder = shlex.quote(str(self.run_folder()))
        return (
            "resume with the same, or start a new run from its weights: add "
            f"pretrained={folder}/model output_dir={folder}-2"
        )

    def to_yaml(self) -> str:
        """The options as a recipe that `--config` reads back; what is None is left out."""
        chosen = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        return yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True)


def _checked(name: str, annotation: Any, value: Any) -> Any:
    """`value` if the annotation admits it (an int where a float is asked for, too)."""
    if isinstance(value, Path):
        value = str(value)
    kinds = _kinds(annotation)
    if value is None and type(None) in kinds:
        return None
    choices = [c for k in kinds if typing.get_origin(k) is Literal for c in typing.get_args(k)]
    if choices:
        if value not in choices:
            raise ConfigError(f"{name} must be one of {choices}, got {value!r}")
        return value
    if float in kinds and type(value) is int:
        return float(value)
    if type(value) not in kinds:
        wanted = " or ".join(k.__name__ for k in kinds if k is not type(None))
        raise ConfigError(f"{name} must be of type {wanted}, got {value!r}")
    return value


def _kinds(annotation: Any) -> tuple[Any, ...]:
    if isinstance(annotation, types.UnionType) or typing.get_origin(annotation) is typing.Union:
        return typing.get_args(annotation)
    return (annotation,)


def merge_resumed_config(given: TrainingConfig, before: dict[str, Any]) -> TrainingConfig:
    """The configuration of a resumed run: what is left open now is as it was.

    Args:
        given: the options of the new command.
        before: the complete options of the run so far.
    Raises:
        ConfigError: for options that shape what is learned and differ.
    """
    now = dataclasses.asdict(given)
    # An option that is newer than the run was at its default then.
    before = {option.name: option.default for option in fields(TrainingConfig)} | before
    merged: dict[str, Any] = {
        name: before.get(name) if value is None else value for name, value in now.items()
    }
    changed = [
        f"{name}: {before.get(name)!r} -> {value!r}"
        for name, value in merged.items()
        if value != before.get(name) and name not in FREE_ON_RESUME
    ]
    if changed:
        raise ConfigError(
            f"{given.run_folder()} holds a run with other options ({'; '.join(changed)}); "
            + given.how_to_change()
        )
    return TrainingConfig(**merged)


def required(value: Number | None) -> Number:
    """A value that `propose` has filled in."""
    if value is None:
        raise ConfigError("the configuration is not complete: propose() fills it in")
    return value
