"""The configuration of a run: what the options admit, and what a resumed run may change."""

import dataclasses
import math
import os
import shlex
import types
import typing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from ddpm_hf.training.options import (
    DataOptions,
    EvaluationOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    ValidationOptions,
)

Number = TypeVar("Number", int, float)


class ConfigError(ValueError):
    """An option with a value that cannot work; the message names it, the choices and the fix."""


class TrainingError(RuntimeError):
    """A run that cannot go on; its last checkpoint is good."""


MIN_SIZE = 3
"""Fewest pixels a side: a network has nothing to halve below that."""

# A leading ~ means home.
_PATHS = ("dataset", "output_dir", "pretrained", "unet_config", "evaluate_features")

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
        "evaluate_steps", "evaluate_num_images", "evaluate_features",
    }
)  # fmt: skip


@dataclass
class TrainingConfig(
    OutputOptions,
    EvaluationOptions,
    ValidationOptions,
    OptimizationOptions,
    ModelOptions,
    DataOptions,
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
            "evaluate_steps": 1, "evaluate_num_images": 4, "ddp_timeout": 1, "num_threads": 1,
            "lr_warmup_steps": 0, "num_samples": 0, "dataloader_num_workers": 0, "seed": 0,
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
