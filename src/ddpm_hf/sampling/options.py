"""Options of sampling, shared by `draw_to`, `save_drawn` and `ddpm-hf sample`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ddpm_hf.options import OptionError, Options, option
from ddpm_hf.scheduler_spec import NAMES_HELP, scheduler_name

NOT_CONDITIONAL = "this model was not trained on classes: leave out `class_labels`"
CALIBRATED_SPACINGS = ("likelihood", "calibrated")
_FORMATS = ("png", "npz", "npy", "parquet")


@dataclass(frozen=True, kw_only=True)
class ImageOptions(Options):
    """Number, seed, classes and guidance.

    Raises:
        OptionError: for an interval of guidance without guidance.
    """

    _argument_group_name: ClassVar[str] = "images"

    num_images: int = option(16, "number of images", minimum=1, limit=100_000_000)
    seed: int = option(0, "seed of the noise; image i depends on the seed and i only")
    class_labels: list[int | str] | None = option(
        None,
        "for a class-conditional model: names or numbers of classes; image i gets number i modulo"
        " their count (default: all classes)",
        metavar="CLASS",
    )
    guidance_scale: float | None = option(
        None,
        "scale of classifier-free guidance: above 1, images are more typical of their class and"
        " vary less (default: 1, no guidance; 2 with `guide`)",
        metavar="S",
    )
    guidance_interval: tuple[float, float] | None = option(
        None,
        "guide only at steps whose log signal-to-noise ratio is in this range, such as -3 4",
        metavar=("LOW", "HIGH"),
    )
    guide: Any = option(
        None,
        "guide away from this weaker model, such as an early checkpoint of the same run, instead"
        " of the null class; works without classes, too",
        metavar="MODEL",
        is_path=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        is_guided = self.guidance_scale is not None or self.guide is not None
        if self.guidance_interval is not None and not is_guided:
            raise OptionError("`guidance_interval` needs `guidance_scale` or `guide`")


@dataclass(frozen=True, kw_only=True)
class StepOptions(Options):
    """Steps of the reverse process."""

    _argument_group_name: ClassVar[str] = "sampler"

    num_inference_steps: int | None = option(
        None,
        "number of denoising steps K: fewer are faster, more are better (default: the scheduler's"
        " usual number; for DDPM, the number of training timesteps)",
        minimum=1,
        limit=100_000,
        metavar="K",
    )
    eta: float | None = option(
        None,
        "noise of each step: 1 is DDPM, 0 is deterministic DDIM, which needs fewer steps (default:"
        " the scheduler's)",
        minimum=0,
        maximum=1,
    )
    batch_size: int = option(16, "images per batch, as memory allows", minimum=1, limit=1_000_000)


@dataclass(frozen=True, kw_only=True)
class DrawOptions(StepOptions, ImageOptions):
    """Options of `draw_to` and `save_drawn`."""

    timesteps: Any = option(None, "timesteps in decreasing order, instead of a number of steps")
    overwrite: bool = option(False, "replace images that were drawn with other options")
    progress: bool = option(True, "show progress bars on the main process")


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(StepOptions):
    """Choice of the sampler: a scheduler and its timesteps.

    Raises:
        OptionError: for options that exclude or require each other.
    """

    _argument_group_name: ClassVar[str] = "sampler"

    scheduler: str | None = option(
        None,
        f"scheduler that replaces the model's own: {NAMES_HELP}",
        convert=scheduler_name,
    )
    timestep_spacing: (
        Literal["leading", "linspace", "trailing", "quadratic", "likelihood", "calibrated"] | None
    ) = option(
        None,
        "spacing of the timesteps: leading, linspace, trailing or quadratic; after `ddpm-hf"
        " calibrate` also likelihood, or calibrated for DDIM (default: the model's)",
        metavar="NAME",
    )
    thorough: bool = option(
        False,
        "sample with DDPM in all training timesteps. The default without this option and without"
        " `scheduler`, `num_inference_steps`, `timestep_spacing` and `eta` is the setting that"
        " `ddpm-hf calibrate --sweep` recommends, if the model has one",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.thorough and (chosen := self.own_choices()):
            raise OptionError(f"`thorough` cannot be combined with `{chosen[0]}`: leave one out")
        if self.timestep_spacing in CALIBRATED_SPACINGS and self.num_inference_steps is None:
            raise OptionError(
                f"`timestep_spacing` {self.timestep_spacing} needs `num_inference_steps`"
            )

    def own_choices(self) -> list[str]:
        """Names of the given options that replace the recommended setting."""
        names = ("scheduler", "num_inference_steps", "timestep_spacing", "eta")
        return [name for name in names if getattr(self, name) is not None]


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """Output file or folder.

    Raises:
        OptionError: if `format` and the suffix of `output` differ.
    """

    _argument_group_name: ClassVar[str] = "output"

    output: Path | None = option(
        None,
        "an image file, such as x.png, for a grid of all images; x.npz, x.npy or x.parquet;"
        " otherwise a folder with one file per image (default: samples.png). Except for a grid, the"
        " options are recorded in PATH.json",
        metavar="PATH",
        is_path=True,
    )
    format: Literal["png", "npz", "npy", "parquet"] | None = option(
        None,
        "png; npz: `arr_0` has shape (N, height, width, channels) and the model's bit depth, 8 or"
        " 16, `arr_1` the classes; npy: the same pixels as float32 in [0, 1]; parquet: columns"
        " `image` and `label`, for datasets.load_dataset (default: from the suffix of `output`)",
    )
    overwrite: bool = option(False, "replace existing images")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format and self._suffix in _FORMATS and self._suffix != self.format:
            raise OptionError(
                f"`format` {self.format} does not match `output` {self.output}: leave one out"
            )

    @property
    def _suffix(self) -> str:
        return "" if self.output is None else self.output.suffix.lower().removeprefix(".")

    def output_path(self) -> Path:
        """Path of the output, with a suffix that states the format."""
        if self.output is None:
            return Path(f"samples.{self.format or 'png'}")
        if self.format in (None, "png", self._suffix):
            return self.output
        return self.output.with_name(f"{self.output.name}.{self.format}")


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(OutputOptions, SamplerOptions, ImageOptions):
    """Options of `ddpm-hf sample`, except for the model."""

    _argument_group_name: ClassVar[str] = "sampler"

    optimize: bool = option(
        False,
        "first measure which settings make the network fast on this device (memory format, bf16,"
        " compiled kernels, number of threads), as far as the number of images pays for it; images"
        " then differ by rounding errors, and the size of the difference is printed",
    )
