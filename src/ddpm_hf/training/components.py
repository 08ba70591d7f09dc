"""Components of a run: images, network, scheduler and objective."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from accelerate import Accelerator
from diffusers import UNet2DModel

from ddpm_hf.data import ImageDataset, ImageFacts, TrainingImages
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.data.labels import Labels
from ddpm_hf.diffusion.image_format import set_image_facts, size_multiple
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.losses import Loss
from ddpm_hf.paths import RunPaths
from ddpm_hf.text import counted, share_that_has
from ddpm_hf.training.checkpoint_record import CheckpointRecord
from ddpm_hf.training.component_checks import check_runs, check_scheduler, check_trainable
from ddpm_hf.training.config import ResolvedConfig, TrainingConfig
from ddpm_hf.training.dataset_setup import (
    HeldOut,
    Selection,
    TrainingData,
    open_images,
    split_off_validation,
)
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.network import (
    PretrainedModel,
    adapt_to_classes,
    adapt_to_variance,
    build_scheduler,
    build_unet,
    is_recorded_and_gone,
    load_pretrained,
    recorded_model,
    sample_size,
    unet_arguments,
)
from ddpm_hf.training.objective import Objective, build_objective
from ddpm_hf.training.rank_coordination import main_first
from ddpm_hf.training.resolve import Machine, resolve

_FEW_COLOURED = 0.05  # share of coloured images below which the plan mentions them
_UNBALANCED = 5  # ratio of class counts that the plan mentions


@dataclass(frozen=True)
class Components:
    """Everything that a run trains or trains on.

    Attributes:
        images, held_out: training and validation images, augmented and padded.
        num_skipped: number of unreadable images.
        left_out: number of files and rows that are not used, by kind or reason.
        digest: identifies the images when a run is resumed.
        base: training.json of the pretrained model; empty without one.
        base_identity: identity of the pretrained network; empty without one.
        notes: remarks for the plan.
    """

    images: TrainingImages | Selection
    held_out: HeldOut | None
    facts: ImageFacts
    num_skipped: int
    left_out: dict[str, int]
    digest: str
    unet: UNet2DModel
    scheduler: GaussianDDPMScheduler
    objective: Objective
    base: Mapping[str, object] = field(default_factory=dict)
    base_identity: Mapping[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def identity(self) -> dict[str, dict[str, object]]:
        """What a resumed run must share with the run so far, as JSON values."""
        return {
            "network": _public(self.unet.config),
            "diffusion": _public(self.scheduler.config),
            "images": {
                **self.facts.to_config()["image"],
                "number": len(self.images),
                "digest": self.digest,
            },
            "objective": {"name": self.objective.name},
            **({"pretrained": dict(self.base_identity)} if self.base_identity else {}),
        }

    @cached_property
    def hold_out(self) -> dict[str, object] | None:
        """Record of a held-out fraction of a dataset, as JSON values, to find its images again."""
        source = self.images.images if isinstance(self.images, Selection) else None
        if self.held_out is None or source is None or not isinstance(source.images, ImageDataset):
            return None
        draw = HoldOut(len(self.held_out), len(source), source.seed)
        return {**dataclasses.asdict(draw), "digest": draw.digest(source.images)}


def _public(config: Mapping[str, object]) -> dict[str, object]:
    return {key: value for key, value in config.items() if not key.startswith("_")}


def assemble(
    options: TrainingConfig,
    accelerator: Accelerator,
    unet: UNet2DModel | None,
    scheduler: GaussianDDPMScheduler | None,
    dataset: TrainingData | None,
    loss: Loss | None,
    record: CheckpointRecord | None = None,
) -> tuple[ResolvedConfig, Components]:
    """The complete configuration and the components of a run.

    Args:
        options: the options as given, with those of the resumed run filled in.
        accelerator: device, processes and precision.
        unet, scheduler, dataset, loss: replace the components that the options describe; see
            `train`.
        record: of the resumed checkpoint. It describes the network and the diffusion if the
            pretrained model or the file of the network is gone.
    Raises:
        ConfigError, DataError: if a component is invalid or does not fit the others.
    """
    pretrained = _load_pretrained(options, unet, record)
    if options.unet_config is not None and not is_recorded_and_gone(options, "unet_config", record):
        unet_arguments(options.unet_config)  # an invalid file fails before images are prepared
    loaded = main_first(
        accelerator, lambda: open_images(options, dataset, pretrained.unet), options.ddp_timeout
    )
    if loaded.revision is not None and options.dataset_revision is None:
        # A resumed run reads the same commit.
        options = dataclasses.replace(options, dataset_revision=loaded.revision)
    facts, notes = _select_classes(options, loaded.facts)
    notes = _mode_notes(options, loaded.images) + notes
    if scheduler is None:
        scheduler = build_scheduler(options, pretrained.scheduler)
    scheduler, scheduler_notes = _without_calibration(check_scheduler(scheduler))
    unet_notes: list[str] = []
    if unet is None:
        device = accelerator.device.type
        unet, unet_notes = _create_unet(options, pretrained, scheduler, facts, device, record)
    check_trainable(unet, scheduler, facts)
    config = resolve(
        options,
        Machine.of(accelerator),
        num_images=len(loaded.images),
        image_size=max(facts.height, facts.width),
        learns_variance=scheduler.learns_variance,
        num_channels=unet.config.block_out_channels[0],
    )
    set_image_facts(unet, facts)
    unet.register_to_config(sample_size=sample_size(facts, size_multiple(unet)))
    with accelerator.autocast():
        check_runs(unet.to(accelerator.device))
    training, held_out = split_off_validation(config, loaded.images, facts, unet, dataset is None)
    facts, class_notes = _count_classes(
        facts, training.labels, held_out.labels if held_out else None, config.class_dropout
    )
    set_image_facts(unet, facts)
    return config, Components(
        images=training,
        held_out=held_out,
        facts=facts,
        num_skipped=len(getattr(loaded.images, "skipped", ())),
        left_out=dict(getattr(loaded.images, "left_out", {})),
        digest=loaded.digest,
        unet=unet,
        scheduler=scheduler,
        objective=build_objective(config, scheduler, facts.bit_depth, loss),
        base=pretrained.record,
        base_identity=pretrained.identity,
        notes=(*notes, *class_notes, *scheduler_notes, *unet_notes),
    )


def _load_pretrained(
    options: TrainingConfig, unet: UNet2DModel | None, record: CheckpointRecord | None
) -> PretrainedModel:
    if options.pretrained is None:
        return PretrainedModel()
    if unet is not None:
        raise ConfigError("`pretrained` and `unet` exclude each other: leave one of them out")
    is_gone = is_recorded_and_gone(options, "pretrained", record)
    if record is not None and is_gone and "pretrained" in record.parts:
        return recorded_model(record, RunPaths(options.run_folder()))
    return load_pretrained(options.pretrained, options.use_safetensors)


def _select_classes(options: TrainingConfig, facts: ImageFacts) -> tuple[ImageFacts, list[str]]:
    """The facts without class names if training is unconditional, and notes for the plan."""
    names = facts.class_names
    if options.class_conditional or names is None:
        return facts, []
    shown = ", ".join(names[:5]) + ", ..." * (len(names) > 5)
    return dataclasses.replace(facts, class_names=None), [
        f"the images have {len(names)} classes ({shown}); `class_conditional` trains on them"
    ]


def _mode_notes(options: TrainingConfig, images: object) -> list[str]:
    """Notes for the plan about the images that set the mode, or lose their colours to it."""
    if not isinstance(images, ImageDataset) or options.image_mode is not None:
        return []
    mode, count = images.facts.mode, len(images)
    colour, alpha = images.num_with_colour, images.num_with_alpha
    if options.pretrained is not None:
        text = "colours, which are removed because the pretrained model is grayscale"
        is_reduced = colour and mode in ("L", "LA")
        return [f"{share_that_has(colour, count, 'image')} {text}"] if is_reduced else []
    notes = []
    if mode.endswith("A"):
        notes.append(
            f"{share_that_has(alpha, count, 'image')} transparent pixels, so the model gets an "
            f"alpha channel; `image_mode` {mode[:-1]} places them on white instead"
        )
    if mode.startswith("RGB") and colour < _FEW_COLOURED * count:
        notes.append(
            f"{share_that_has(colour, count, 'image')} colours, so the model gets colour channels; "
            f"`image_mode` L removes them"
        )
    return notes


def _count_classes(
    facts: ImageFacts, labels: Labels | None, held_out: Labels | None, class_dropout: float
) -> tuple[ImageFacts, list[str]]:
    """The facts with the number of training images of each class, and notes for the plan."""
    names = facts.class_names
    if labels is None or names is None:
        return facts, []
    counts = np.bincount(labels[labels >= 0], minlength=len(names)).tolist()
    facts = dataclasses.replace(
        facts,
        class_counts=tuple(counts),
        has_null_class=class_dropout > 0 or bool((labels < 0).any()),
    )
    notes = []
    if untrained := [name for name, count in zip(names, counts, strict=True) if not count]:
        of_held_out = set() if held_out is None else {names[i] for i in held_out if i >= 0}
        why = " (`validation_split` holds out all of them)" * (of_held_out >= set(untrained))
        notes.append(
            f"no training image has the class {_shown(untrained)}{why}: `ddpm-hf sample` draws the"
            " other classes by default"
        )
    fewest, most = min(filter(None, counts), default=0), max(counts)
    if most >= _UNBALANCED * fewest:
        rare, common = names[counts.index(fewest)], names[counts.index(most)]
        notes.append(
            f"the classes are unbalanced: {counted(fewest, 'image')} of {rare!r}, {most:,} of "
            f"{common!r}"
        )
    return facts, notes


def _shown(names: Sequence[str], count: int = 10) -> str:
    return ", ".join(map(repr, names[:count])) + ", ..." * (len(names) > count)


def _without_calibration(
    scheduler: GaussianDDPMScheduler,
) -> tuple[GaussianDDPMScheduler, list[str]]:
    """The scheduler without the calibration of other weights, and notes for the plan.

    Training uses the published variances.
    """
    if scheduler.x_0_mse is None and not (scheduler.calibrated_timesteps or scheduler.recommended):
        return scheduler, []
    uncalibrated = GaussianDDPMScheduler.from_config(
        scheduler.config, x_0_mse=None, calibrated_timesteps=None, recommended=None
    )
    note = "the pretrained calibration was removed; run `ddpm-hf calibrate` after training"
    return uncalibrated, [note]


def _create_unet(
    options: TrainingConfig,
    pretrained: PretrainedModel,
    scheduler: GaussianDDPMScheduler,
    facts: ImageFacts,
    device: str,
    record: CheckpointRecord | None,
) -> tuple[UNet2DModel, list[str]]:
    """The pretrained network, adapted to variance and classes, or a new one; notes for the plan."""
    unet, names = pretrained.unet, facts.class_names or ()
    if unet is None:
        torch.manual_seed(options.seed)  # the same initial weights on every process
        num_classes = len(names) or None
        if record is not None and is_recorded_and_gone(options, "unet_config", record):
            return UNet2DModel.from_config(record.parts["network"]), []
        return build_unet(facts, device, options.unet_config, scheduler, num_classes), []
    notes = adapt_to_variance(unet, scheduler, pretrained.scheduler)
    return unet, notes + (adapt_to_classes(unet, names) if names else [])
