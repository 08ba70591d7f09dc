"""Configuration of a training run: as given by the user, and complete."""

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

import yaml

from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.options import (
    DataOptions,
    ModelOptions,
    OptimizationOptions,
    OutputOptions,
    PeriodicEvaluationOptions,
    ValidationOptions,
)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(
    OutputOptions,
    PeriodicEvaluationOptions,
    ValidationOptions,
    OptimizationOptions,
    ModelOptions,
    DataOptions,
):
    """Options of a training run; None means: chosen from the data and the machine.

    Raises:
        ConfigError: for an invalid value or combination; the message names option, value and
            choices.
    """

    _error = ConfigError

    def __post_init__(self) -> None:
        if self.report_to is not None:
            object.__setattr__(self, "report_to", _split_names(self.report_to))
        super().__post_init__()
        is_conditional = self.class_conditional or self.class_column is not None
        object.__setattr__(self, "class_conditional", is_conditional)
        object.__setattr__(self, "keep_best", self.keep_best or self.best_metric is not None)
        has_snapshots = self.post_hoc_ema or self.post_hoc_ema_steps is not None
        object.__setattr__(self, "post_hoc_ema", has_snapshots)
        self._check_data_and_output()
        self._check_best()
        self._check_optimization()

    def _check_data_and_output(self) -> None:
        if self.streaming:
            self._check_streaming()
        elif "://" in (self.dataset or ""):  # may hold a password: keep it out of the message
            raise ConfigError(
                "`dataset` must not be a URL: pass the name of a Hub dataset, such as "
                "'user/photos', or download the images and pass their folder; URLs of parquet or "
                ".tar files need `streaming`"
            )
        if self.pretrained and self.unet_config:
            raise ConfigError(
                "`pretrained` and `unet_config` exclude each other: a pretrained model comes with "
                "its own network; leave one of them out"
            )

    def _check_streaming(self) -> None:
        """Refuse what needs all images at once, and URLs with secrets."""
        url = urlsplit(self.dataset or "")
        if url.username or url.password or url.query:
            raise ConfigError(
                "`dataset` must be a URL without password and query string, which would be "
                "recorded; use a server that needs none, or the Hub with HF_TOKEN"
            )
        if self.resolution is None:
            raise ConfigError(
                "`streaming` needs `resolution`: the sizes of images that are not read yet are "
                "unknown"
            )
        if self.crop != "center":
            raise ConfigError(
                f"`crop` must be center with `streaming`, got {self.crop}: its cache holds images "
                "of one size"
            )

    def _check_optimization(self) -> None:
        # Adam moves a weight by little more than the learning rate, so at a rate of at most 1
        # finite gradients cannot make a weight overflow.
        if self.learning_rate is not None and not 0 < self.learning_rate <= 1:
            raise ConfigError(
                f"`learning_rate` must be in (0, 1], got {self.learning_rate}; start with 1e-4"
            )
        if self.max_grad_norm <= 0:
            raise ConfigError(f"`max_grad_norm` must be positive, got {self.max_grad_norm}")
        for name in ("class_dropout", "ema_decay", "weight_decay"):
            if getattr(self, name) >= 1:
                raise ConfigError(f"`{name}` must be in [0, 1), got {getattr(self, name)}")
        if (self.lr_warmup_steps or 0) > (self.max_train_steps or math.inf):
            raise ConfigError(
                f"`lr_warmup_steps` must not exceed `max_train_steps`, got {self.lr_warmup_steps} "
                f"and {self.max_train_steps}"
            )

    def _check_best(self) -> None:
        needs = "validation_split" if self.kept_by == "bits-per-dim" else "evaluate_steps"
        if self.keep_best and getattr(self, needs) is None:
            raise ConfigError(
                "`keep_best` needs `validation_split`, for bits/dim, or `evaluate_steps`, for the "
                "Frechet distance"
                if self.best_metric is None
                else f"`best_metric` {self.best_metric} needs `{needs}`"
            )

    @property
    def kept_by(self) -> Literal["bits-per-dim", "fd"] | None:
        """The figure of the model in best/; None if none is kept."""
        if not self.keep_best or self.best_metric is not None:
            return self.best_metric
        return "fd" if self.validation_split is None else "bits-per-dim"

    def run_folder(self) -> Path:
        """Folder of the run: `output_dir`, by default runs/NAME with the name of the dataset."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        name = Path(self.dataset or "images").resolve().name
        return Path("runs") / (re.split(r"[*{.]", name)[0] or "images")

    def resume_hint(self) -> str:
        """Hint appended to resume errors: how to train with the changed options."""
        folder = self.run_folder()
        other, model = (shlex.quote(path) for path in (f"{folder}-2", f"{folder}/model"))
        return (
            "resume with the original options, or train in another folder: add `output_dir` "
            f"{other} for a new network, and also `pretrained` {model} to fine-tune the weights"
        )

    def to_yaml(self, proposed: Mapping[str, Any] | None = None) -> str:
        """The options as a recipe for `--config`.

        Args:
            proposed: values of open options. With them every option is listed, without them those
                that are None are left out.
        """
        values = self.to_dict()
        if proposed is None:
            values = {name: value for name, value in values.items() if value is not None}
        else:
            values |= {name: value for name, value in proposed.items() if values[name] is None}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _split_names(names: str | Sequence[str]) -> list[str]:
    """The names in a list and in texts with commas or spaces."""
    texts = [names] if isinstance(names, str) else names
    return [name for text in texts for name in str(text).replace(",", " ").split()]


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(TrainingConfig):
    """Complete configuration: every option that an update, a log or a checkpoint needs has a value.

    Made by `ddpm_hf.training.resolve.resolve`. Options that remain None have a meaning of their
    own, such as `pretrained` (train a new network) or `evaluate_steps` (no evaluation).
    """

    objective: Literal["simple", "hybrid", "vlb"] = field()
    timestep_sampling: Literal["uniform", "low_discrepancy", "asymmetric", "loss_second_moment"] = (
        field()
    )
    max_train_steps: int = field()
    batch_size: int = field()
    learning_rate: float = field()
    lr_warmup_steps: int = field()
    mixed_precision: Literal["no", "fp16", "bf16"] = field()
    validation_steps: int = field()
    sample_steps: int = field()
    checkpointing_steps: int = field()
