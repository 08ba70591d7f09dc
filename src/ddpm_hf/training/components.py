"""Components of a run: images, network, scheduler and objective."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from accelerate import Accelerator
from diffusers import UNet2DModel

from ddpm_hf.data import ImageDataset, ImageFacts
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.data.training_dataset import Selection
from ddpm_hf.diffusion.image_format import set_image_facts
from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler
from ddpm_hf.losses import Loss
from ddpm_hf.training.checkpoint_record import CheckpointRecord
from ddpm_hf.training.config import ResolvedConfig, TrainingConfig
from ddpm_hf.training.dataset_setup import (
    RunImages,
    TrainingData,
    open_images,
    split_off_validation,
)
from ddpm_hf.training.errors import ConfigError
from ddpm_hf.training.image_notes import copy_notes, count_classes, mode_notes, select_classes
from ddpm_hf.training.model import build_model
from ddpm_hf.training.objective import Objective, build_objective
from ddpm_hf.training.pretrained import load_starting_model
from ddpm_hf.training.rank_coordination import main_first
from ddpm_hf.training.resolve import Machine, resolve


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

    images: RunImages
    held_out: RunImages | None
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
        record: of the resumed checkpoint; see `load_starting_model`.
    Raises:
        ConfigError, DataError: if a component is invalid or does not fit the others.
    """
    if options.pretrained is not None and unet is not None:
        raise ConfigError("`pretrained` and `unet` exclude each other: leave one of them out")
    base = load_starting_model(options, record)
    loaded = main_first(
        accelerator, lambda: open_images(options, dataset, base.unet), options.ddp_timeout
    )
    if loaded.revision is not None and options.dataset_revision is None:
        # A resumed run reads the same commit.
        options = dataclasses.replace(options, dataset_revision=loaded.revision)
    facts, image_notes = select_classes(options.class_conditional, loaded.facts)
    unet, scheduler, model_notes = build_model(options, base, facts, accelerator, unet, scheduler)
    config = resolve(
        options,
        Machine.of(accelerator),
        num_images=len(loaded.images),
        image_size=max(facts.height, facts.width),
        learns_variance=scheduler.learns_variance,
        num_channels=unet.config.block_out_channels[0],
        prediction_type=scheduler.config.prediction_type,
        has_custom_loss=loss is not None,
    )
    training, held_out = split_off_validation(config, loaded.images, facts, unet)
    facts, class_notes = count_classes(
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
        base=base.record,
        base_identity=base.identity,
        notes=(
            *mode_notes(options.image_mode, loaded.images, base.unet is not None),
            *image_notes, *class_notes, *copy_notes(config, len(training)), *model_notes,
        ),
    )  # fmt: skip
