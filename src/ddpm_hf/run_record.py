"""The record of a training run, `training.json`, which is published with its model."""

from collections.abc import Mapping
from dataclasses import dataclass

from ddpm_hf.json_records import JsonObject, Record, optional

FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Computation(Record):
    """How the updates are computed: as requested, proposed, or chosen by measuring.

    Attributes:
        mixed_precision: "no", "bf16" or "fp16".
        num_threads: CPU threads of the main process; None on CUDA.
        tf32: operations in TF32 precision on CUDA; None on other devices.
        compile: whether the network is compiled.
        gradient_checkpointing: whether activations are recomputed in the backward pass.
        memory_format: of the weights, "contiguous" or "channels_last".
        optimizer: its name.
    """

    mixed_precision: str
    num_threads: int | None = optional()
    tf32: tuple[str, ...] | None = optional()
    compile: bool
    gradient_checkpointing: bool
    memory_format: str
    optimizer: str


@dataclass(frozen=True, kw_only=True)
class DatasetRecord(Record):
    """The training images.

    Attributes:
        name: Hub id, or name of the folder without its path.
        config_name: configuration of a Hub dataset.
        split: split of the dataset.
        num_images: number of images trained on.
        num_skipped: number of unreadable images.
        left_out: number of files that were not images, by reason.
        image: mode, size and bit depth.
        held_out: which images were held out of the training split.
        hub_id: the name, if it is a Hub id.
    """

    name: str
    config_name: str | None
    split: str
    num_images: int
    num_skipped: int
    left_out: Mapping[str, int]
    image: Mapping[str, object]
    held_out: Mapping[str, object] | None = optional()
    hub_id: str | None = optional()


@dataclass(frozen=True)
class BoundSetup:
    """How a bound in bits/dim was measured; the model card compares these.

    Attributes:
        images: number and origin of the images.
        num_images: number of images.
        num_inference_steps: number of steps K.
        num_timesteps: number of measured terms per image.
        is_calibrated: whether the variances are calibrated.
        eta: noise of the sampler; None for 1.
    """

    images: str
    num_images: int
    num_inference_steps: int
    num_timesteps: int
    is_calibrated: bool
    eta: float | None = None


@dataclass(frozen=True)
class SampleSetup:
    """How samples were compared with training images during training.

    Attributes:
        num_images: number of samples.
        num_inference_steps: number of steps K of deterministic DDIM.
        features: name of the feature network.
    """

    num_images: int
    num_inference_steps: int
    features: str


@dataclass(frozen=True, kw_only=True)
class MetricRecord(Record):
    """A measured value, as the model card shows it.

    Attributes:
        type, name: of the metric in the model index.
        value: the value.
        standard_error: its standard error; None where `how` says how precise it is.
        how: one line about the measurement.
        dataset: "name", "split" and, for a Hub dataset, "hub_id"; None for the training set.
        args: how it was measured, as JSON values and records. Of the trainer: "bound", a
            `BoundSetup`, or "samples", a `SampleSetup`. Of `evaluate`: "evaluate", its options;
            "interval"; "bound"; and digests of weights, features and held-out images.
    """

    type: str
    name: str
    value: float
    standard_error: float | None = optional()
    how: str
    dataset: Mapping[str, str] | None = optional()
    args: JsonObject


@dataclass(frozen=True)
class EmaFacts(Record):
    """How the weights of a model were averaged; entry "ema" of its training.json.

    Attributes:
        sigma_rel: relative length of the profile.
        steps: number of updates that it covers.
        num_snapshots: number of snapshots that the weights are a sum of.
        profile_error: norm of the difference to the exact profile, relative to that of the profile.
    """

    sigma_rel: float
    steps: int
    num_snapshots: int
    profile_error: float

    def __str__(self) -> str:
        return (
            f"sigma_rel {self.sigma_rel:g} at update {self.steps:,}, from {self.num_snapshots} "
            f"snapshots: profile off by {self.profile_error:.2g}"
        )


@dataclass(frozen=True, kw_only=True)
class RunRecord(Record):
    """What happened in a training run, without local paths.

    Attributes:
        dataset: the training images.
        config: the options, as `TrainingConfig` has them.
        steps: number of updates.
        num_images_seen: steps times batch size.
        duration_s: seconds of training, including earlier runs that this one resumed.
        hardware: devices and number of processes.
        computation: how the updates were computed.
        versions: of the main libraries.
        created: UTC time, ISO 8601.
        metrics: values measured with these weights during training.
        kept_by: figure by which these weights were the best of the run; None for the last ones.
        base_model: the pretrained model that was fine-tuned.
        base: entries of its own `training.json`.
        license: of the model.
    """

    dataset: DatasetRecord
    config: Mapping[str, object]
    steps: int
    num_images_seen: int
    duration_s: float
    hardware: str
    computation: Computation
    versions: Mapping[str, str]
    created: str
    metrics: tuple[MetricRecord, ...] = ()
    kept_by: str | None = optional()
    base_model: str | None = optional()
    base: Mapping[str, object] | None = optional()
    license: str | None = optional()

    def to_dict(self) -> JsonObject:
        """The contents of `training.json`."""
        return {"format_version": FORMAT_VERSION, **super().to_dict()}
