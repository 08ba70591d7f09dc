"""Options of `evaluate`, `compare` and `calibrate_checkpoint`, in groups that they share.

Result files and model cards record them, with the command that measures the same; no torch is
imported.

The bases of a class are listed from the last recorded group to the first: the fields of a dataclass
follow the reversed order of its bases.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

from ddpm_hf.model_options import LoadOptions
from ddpm_hf.options import Options, option
from ddpm_hf.scheduler_spec import NAMES_HELP, scheduler_name
from ddpm_hf.utils.text import public_name

BITS = "bits-per-dim"
METRIC_NAMES = (BITS, "fd", "kid", "precision-recall", "coverage", "memorisation")
DEFAULT_FEATURES = "facebook/dinov2-base"
DATASET_HELP = (
    "folder of images, parquet or arrow files, or a dataset on the Hub; images are converted to the"
    " model's size and mode"
)


@dataclass(frozen=True, kw_only=True)
class BatchOptions(Options):
    """Batch size of the network calls."""

    batch_size: int = option(
        64, "images per batch, as memory allows", minimum=1, limit=1_000_000, metavar="N"
    )


@dataclass(frozen=True, kw_only=True)
class LikelihoodOptions(Options):
    """Estimator of the variational bound."""

    _argument_group_name: ClassVar[str] = "variational bound"

    num_timesteps: int | None = option(
        None,
        "number of network calls M per image: importance-samples M of the K terms of the bound,"
        " without bias; 32 are nearly as precise as 1,000 (default: all K)",
        minimum=1,
        limit=100_000,
        metavar="M",
    )
    decoder: Literal["exact", "tanh"] = option(
        "exact",
        "likelihood of the last step: exact, or tanh, the approximation of the papers, for"
        " comparison with published numbers",
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerOptions(Options):
    """Scheduler and number of inference steps."""

    scheduler: str | None = option(
        None, f"scheduler that replaces the model's own: {NAMES_HELP}", convert=scheduler_name
    )
    num_inference_steps: int | None = option(
        None,
        "number of steps K of the sampler and of the bound (default: the scheduler's usual number;"
        " for DDPM, the number of training timesteps)",
        minimum=1,
        limit=100_000,
        metavar="K",
    )


@dataclass(frozen=True, kw_only=True)
class UnreadableImages(Options):
    """Policy for images that cannot be read."""

    _argument_group_name: ClassVar[str] = "real images"

    on_bad_image: Literal["error", "skip"] = option(
        "error", "what to do with unreadable images, real or drawn"
    )


@dataclass(frozen=True, kw_only=True)
class PerClassOptions(Options):
    """Comparison of each class."""

    _argument_group_name: ClassVar[str] = "comparison of images"

    per_class: bool = option(
        False, "also compare the images of each class; needs a model or images with classes"
    )


@dataclass(frozen=True, kw_only=True)
class DataSelection(Options):
    """Selection of the real images."""

    _argument_group_name: ClassVar[str] = "real images"

    num_images: int | None = option(
        None,
        "number of images: real ones for bits/dim, and existing ones, chosen by the seed (default:"
        " all); drawn ones for the other metrics (default: as many as there are real ones, at most"
        " 10,000)",
        minimum=1,
        limit=100_000_000,
        metavar="N",
    )
    seed: int = option(
        0, "seed of the noise; the noise of image i depends on the seed and i only", metavar="N"
    )
    split: str | None = option(
        None,
        "held-out split of the dataset, with images that the model was not trained on (default:"
        " test or validation if one exists, else the images that training held out)",
        metavar="NAME",
    )
    reference_split: str = option(
        "train",
        "split that drawn images are compared with; the held-out split gives the floor",
        metavar="NAME",
    )
    dataset_config: str | None = option(None, "configuration of a Hub dataset", metavar="NAME")
    dataset_revision: str | None = option(
        None, "branch, tag or commit of a Hub dataset", metavar="NAME"
    )
    image_column: str | None = option(
        None, "column with the images, if there are several", metavar="NAME"
    )
    class_column: str | None = option(
        None,
        "column with the classes, for a class-conditional model (default: the one that training"
        " used, else the declared one)",
        metavar="NAME",
    )


@dataclass(frozen=True, kw_only=True)
class DataOptions(UnreadableImages, DataSelection):
    """Selection of the real images, and policy for unreadable ones."""


@dataclass(frozen=True, kw_only=True)
class FeatureOptions(Options):
    """Feature network that images are compared by."""

    _argument_group_name: ClassVar[str] = "comparison of images"

    features: Any = option(
        DEFAULT_FEATURES,
        "feature network: a vision model of transformers by name or folder; efficientnet-lite0,"
        " which needs no download (extra eval); or pixels",
        metavar="NAME",
    )

    def recorded(self) -> Self:
        """The options with the name of the feature network in place of an object or a path."""
        return replace(self, features=public_name_of(self.features))


def public_name_of(source: Any) -> str:
    """Name of a model, a set of images or a feature network in reports."""
    if isinstance(source, str | os.PathLike):
        return public_name(os.fspath(source))
    name = getattr(source, "name", None)  # of a feature network
    return name if isinstance(name, str) else type(source).__name__


@dataclass(frozen=True, kw_only=True)
class ComparisonOptions(
    LoadOptions,
    BatchOptions,
    LikelihoodOptions,
    DataOptions,
    PerClassOptions,
    DataSelection,
    FeatureOptions,
):
    """Options of `compare` that all settings share."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions(
    LoadOptions,
    BatchOptions,
    LikelihoodOptions,
    SchedulerOptions,
    DataOptions,
    PerClassOptions,
    DataSelection,
    FeatureOptions,
):
    """Options of `evaluate`."""


@dataclass(frozen=True, kw_only=True)
class EmaSweepOptions(
    BatchOptions, LikelihoodOptions, SchedulerOptions, DataOptions, DataSelection, FeatureOptions
):
    """Options of `sweep_ema`, which measure each length."""


@dataclass(frozen=True, kw_only=True)
class CalibrationOptions(LoadOptions, BatchOptions, DataOptions, FeatureOptions):
    """Options of `calibrate_checkpoint`."""

    num_images: int | None = option(
        None,
        "number of images, chosen by the seed (default: 256, or all if fewer)",
        minimum=1,
        limit=100_000_000,
        metavar="N",
    )
    timesteps: bool = option(
        False,
        "also find timesteps for DDIM and DPM-Solver++ 2M in 5 to 25 steps, against 100 steps of"
        " the same network: about 4,000 network calls with 32 images",
    )
    sweep: bool = option(
        False, "also find the sampler and number of steps that `ddpm-hf sample` uses by default"
    )
    sweep_images: int | None = option(
        None,
        "images drawn for each setting of the sweep; fewer than the dimensions of the features"
        " distinguish little and favour too few steps (default: as many as there are real ones, at"
        " most 10,000)",
        minimum=1,
        limit=100_000_000,
        metavar="N",
    )
    card: bool = option(False, "write the tables into the card of the model's folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in fields(self):
            is_of_sweep = field.name in ("sweep_images", "features", "reference_split")
            if is_of_sweep and not self.sweep and getattr(self, field.name) != field.default:
                raise ValueError(f"`{field.name}` needs `sweep`")

    def sweep_options(self) -> EvaluationOptions:
        """Options of the evaluations of the sweep."""
        shared = {
            field.name: getattr(self, field.name)
            for group in (BatchOptions, DataOptions, FeatureOptions)
            for field in fields(group)
        }
        return EvaluationOptions(**shared | {"num_images": self.sweep_images})


DEFAULTS = {field.name: field.default for field in fields(EvaluationOptions)}
"""Default of each option of `evaluate`."""


def command_of(
    subjects: Sequence[str], dataset: str, options: Mapping[str, object], command: str = "evaluate"
) -> str:
    """Command line that measures the same, without options at their default."""
    defaults: dict[str, object] = dict(DEFAULTS)
    if command == "evaluate" and not options.get("scheduler") and not options.get("schedulers"):
        defaults["metrics"] = [BITS]
    words = ["ddpm-hf", command, *subjects, dataset]
    for name, value in options.items():
        if value not in (None, [], defaults.get(name)):
            values = value if isinstance(value, list) else [value] if value is not True else []
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
