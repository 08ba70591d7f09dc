"""Options of `edit_images` and `ddpm-hf edit`."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ddpm_hf.options import REQUIRED, OptionError, Options, option
from ddpm_hf.paths import output_folder
from ddpm_hf.sampling.options import SamplerOptions
from ddpm_hf.scheduler_spec import SchedulerSpec


@dataclass(frozen=True, kw_only=True)
class EditOptions(SamplerOptions):
    """Kind of the edit and its sampler.

    Raises:
        OptionError: for options that exclude or require each other.
    """

    _argument_group_name: ClassVar[str] = "edit"

    mask_image: Path | None = option(
        None,
        "inpaint: picture of the same size, white where the image is drawn anew",
        metavar="FILE",
        flag="--mask",
        is_path=True,
    )
    between: Path | None = option(
        None,
        "interpolate: the other end, a picture of the same size",
        metavar="FILE",
        is_path=True,
    )
    source_class: int | str | None = option(
        None,
        "change the class: the class of the picture; `class_labels` is the new one",
        metavar="CLASS",
    )
    strength: float | None = option(
        None,
        "image to image: share of the steps that are taken, above 0 and at most 1; more forgets"
        " more of the picture (default: 0.5)",
        maximum=1,
    )
    log_snr: float | None = option(
        None, "image to image: log signal-to-noise ratio to start at, instead of `strength`"
    )
    class_labels: list[int | str] | None = option(
        None,
        "for a class-conditional model: one class, by name or number",
        metavar="CLASS",
    )
    guidance_scale: float = option(1.0, "scale of classifier-free guidance; 1 turns it off")
    num_images: int = option(
        8,
        "draws, or images from one end to the other; a change of class gives one image",
        minimum=1,
        limit=1_000_000,
    )
    seed: int = option(0, "draw i depends on the seed and i only")
    method: Literal["repaint", "covariance"] = option(
        "repaint",
        "inpainting: repaint repeats steps; covariance conditions on the known pixels by the"
        " network's Jacobian, at the cost of about 10 network evaluations a step",
    )
    jump_length: int = option(
        10, "repaint: steps that are repeated at a time", minimum=1, limit=100_000
    )
    jump_n_sample: int = option(10, "repaint: passes over them", minimum=1, limit=10_000)
    num_inference_steps: int | None = option(
        None,
        "number of steps K (default: as recommended for the model, otherwise 50)",
        minimum=1,
        limit=100_000,
        metavar="K",
    )
    batch_size: int = option(8, "images per batch, as memory allows", minimum=1, limit=1_000_000)

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = {
            "mask_image": self.mask_image,
            "between": self.between,
            "source_class": self.source_class,
            "strength": self.strength,
            "log_snr": self.log_snr,
        }
        given = [name for name, value in kinds.items() if value is not None]
        if len(given) > 1:
            raise OptionError(f"`{given[0]}` and `{given[1]}` exclude each other: leave one out")
        if self.source_class is not None and not self.class_labels:
            raise OptionError("`source_class` needs `class_labels`, the new class")
        if self.class_labels is not None and len(self.class_labels) != 1:
            raise OptionError(
                f"`class_labels` must be one class for an edit, got {self.class_labels}"
            )
        if self.between is not None and self.num_images < 2:
            raise OptionError("`num_images` must be at least 2 to interpolate, got 1")
        if self.scheduler and self.kind != "image to image" and not is_ddpm_or_ddim(self.scheduler):
            raise OptionError(
                f"`scheduler` must be DDPM or DDIM to {self.kind}, got {self.scheduler}; others"
                " apply to image to image"
            )

    @property
    def kind(self) -> str:
        """Name of the edit: inpaint, interpolate, change class or image to image."""
        if self.mask_image is not None:
            return "inpaint"
        if self.between is not None:
            return "interpolate"
        return "image to image" if self.source_class is None else "change class"


def is_ddpm_or_ddim(scheduler: str) -> bool:
    """Whether a specification of a scheduler names one of these."""
    return SchedulerSpec.parse(scheduler).scheduler in ("DDPM", "DDIM")


@dataclass(frozen=True, kw_only=True)
class EditOutputOptions(Options):
    """Output folder."""

    _argument_group_name: ClassVar[str] = "output"

    output: Path = option(
        Path("edited"),
        "folder for the images, a grid, their standard deviation and edit.json",
        metavar="FOLDER",
        is_path=True,
        convert=output_folder,
    )
    overwrite: bool = option(False, "replace images that were drawn with other options")


@dataclass(frozen=True, kw_only=True)
class PictureArgument(Options):
    """The picture to edit."""

    image: Path = option(
        REQUIRED,
        "picture of the model's size",
        metavar="PICTURE",
        is_path=True,
        is_positional=True,
    )
