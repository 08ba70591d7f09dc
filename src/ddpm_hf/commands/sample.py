"""`ddpm-hf sample`."""

import argparse
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.commands.messages import flags_in_messages
from ddpm_hf.commands.options import command_parser, model_name, path, positive_int
from ddpm_hf.wording import counted

if TYPE_CHECKING:
    from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline

HELP = "draw images from a model on the Hub or in a folder"
EXAMPLES = """
draw images from a model on the Hub or in a folder

  ddpm-hf sample runs/photos/model                      one grid, samples.png
  ddpm-hf sample runs/photos/model --output images      a folder, one file each
  ddpm-hf sample google/ddpm-cifar10-32 --scheduler DDIM      50 steps, not 1,000
  ddpm-hf sample runs/pets/model --class-labels cat dog       of each in turn
  ddpm-hf sample runs/photos/model --num-images 5000 --format npz   to evaluate
"""
# Those of diffusers that sample a model of this kind.
SCHEDULERS = (
    "DDPM", "DDIM", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep",
    "DEISMultistep", "SASolver", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete",
    "KDPM2Discrete", "KDPM2AncestralDiscrete", "LMSDiscrete",
)  # fmt: skip
SPACINGS = ("leading", "linspace", "trailing", "quadratic")
FORMATS = ("png", "npz", "npy")


def run(argv: list[str]) -> int:
    """Draw as `argv` says."""
    options = parser().parse_args(argv)
    with flags_in_messages(vars(options)):
        output = output_path(options.output, options.format)
        if not options.overwrite:
            refuse_to_overwrite(output)
        output.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
        draw(options, output)
    return 0


def parser() -> argparse.ArgumentParser:
    """What `ddpm-hf sample` understands."""
    parser = command_parser("sample", "MODEL [--option VALUE ...]", EXAMPLES)
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help="Hub repository or folder of a model")
    _add_what(parser.add_argument_group("what is drawn"))
    _add_how(parser.add_argument_group("how it is drawn"))
    _add_where(parser.add_argument_group("where it goes"))
    _add_model(parser.add_argument_group("which files of the model"))
    return parser


def _add_what(group: Any) -> None:
    group.add_argument(
        "--num-images",
        type=positive_int,
        default=16,
        metavar="N",
        help="how many images (default: %(default)s)",
    )
    group.add_argument(
        "--class-labels",
        nargs="+",
        metavar="CLASS",
        help="for a class-conditional model: names or numbers of classes, given to the images in "
        "turn (default: every class)",
    )
    group.add_argument(
        "--guidance-scale",
        type=float,
        metavar="S",
        help="classifier-free guidance: above 1, images are more typical of their class and vary "
        "less (default: 1, which is none; 2 with --guide)",
    )
    group.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide only where the log of the signal-to-noise ratio is in this range, such as -3 4",
    )
    group.add_argument(
        "--guide",
        type=model_name,
        metavar="MODEL",
        help="guide away from this weaker model, such as an early checkpoint of the same run, in "
        "the place of the null class; works without classes, too",
    )
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="image i depends on the seed and on i alone (default: %(default)s)",
    )


def _add_how(group: Any) -> None:
    group.add_argument(
        "--scheduler",
        type=lambda name: name.removesuffix("Scheduler"),
        choices=SCHEDULERS,
        metavar="NAME",
        help=f"in place of the model's own: {', '.join(SCHEDULERS)}",
    )
    group.add_argument(
        "--num-inference-steps",
        type=positive_int,
        metavar="K",
        help="denoising steps: fewer are faster, more are better (default: the scheduler's usual "
        "number; of DDPM: as many as the model was trained with)",
    )
    group.add_argument(
        "--timestep-spacing",
        choices=SPACINGS,
        metavar="NAME",
        help=f"which timesteps those are: {', '.join(SPACINGS)} (default: the model's)",
    )
    group.add_argument(
        "--eta",
        type=float,
        help="noise in each step: 1: DDPM; 0: deterministic DDIM, which needs fewer steps (default:"
        " the scheduler's)",
    )
    group.add_argument(
        "--optimize",
        action="store_true",
        help="first measure what makes the network fast on this device (memory format, bf16, "
        "compiled kernels, number of threads), as far as so many images are worth it; they then "
        "differ by rounding, and a line says how far",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=16,
        metavar="N",
        help="images drawn at once, as memory allows (default: %(default)s)",
    )


def _add_where(group: Any) -> None:
    group.add_argument(
        "--output",
        type=path,
        metavar="PATH",
        help="an image file for one grid of all, else a folder for one file each (default: "
        "samples.png)",
    )
    group.add_argument(
        "--format",
        choices=FORMATS,
        help="png; npz: `arr_0` is (N, height, width, channels), 8 or 16 bits as the model was "
        "trained; npy: the same as float32 in [0, 1] (default: as --output says)",
    )
    group.add_argument("--overwrite", action="store_true", help="replace images of before")


def _add_model(group: Any) -> None:
    group.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit on the Hub (default: main)"
    )
    group.add_argument("--variant", metavar="NAME", help="variant of the weights, such as fp16")
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open the pickled .bin weights of an old repository; they could run code, so only for"
        " authors you trust",
    )


def output_path(output: Path | None, form: str | None) -> Path:
    """Where the images go, by --output and --format.

    Raises:
        ValueError: if these two do not fit together.
    """
    if output is None:
        return Path(f"samples.{form or 'png'}")
    suffix = output.suffix.lower()
    if form in (None, "png") and suffix not in (".npz", ".npy"):
        return output
    if form is None or suffix == f".{form}":
        return output
    if suffix.removeprefix(".") in FORMATS:
        raise ValueError(f"--format {form} does not fit --output {output}; leave one of them out")
    return output.with_name(f"{output.name}.{form}")


def refuse_to_overwrite(output: Path) -> None:
    """Raise ValueError if images would replace or join earlier ones."""
    is_full = output.is_dir() and any(output.glob("[0-9]*.png"))
    if output.is_file() or is_full:
        what = f"{output} holds images" if is_full else f"{output} is there"
        raise ValueError(f"{what} already; choose another --output, or pass --overwrite")


def draw(options: argparse.Namespace, output: Path) -> None:
    """Load the model, draw the images and save them."""
    from ddpm_hf.diffusion.pipeline import image_facts
    from ddpm_hf.hub.load import load
    from ddpm_hf.pictures import best_device, save_images
    from ddpm_hf.sampling import draw_images

    pipeline = load(
        options.model,
        revision=options.revision,
        variant=options.variant,
        use_safetensors=not options.allow_pickle,
    )
    facts = image_facts(pipeline.unet)
    bit_depth = 8 if facts is None else facts.bit_depth
    class_names = None if facts is None else facts.class_names
    check_files_can_hold(output, pipeline.unet.config.in_channels, bit_depth)
    change_scheduler(pipeline, options.scheduler, options.timestep_spacing)
    scale = options.guidance_scale
    call = {
        "eta": options.eta,
        "guidance_scale": 2.0 if options.guide and scale is None else scale,
        "guidance_interval": options.guidance_interval and tuple(options.guidance_interval),
        "guide": options.guide and load(options.guide),
    }
    labels = class_of_each(pipeline, options, class_names)
    pipeline = pipeline.to(best_device())
    if options.optimize:
        optimize(pipeline, options)
    images = draw_images(
        pipeline,
        options.num_images,
        batch_size=options.batch_size,
        seed=options.seed,
        class_labels=labels,
        num_inference_steps=options.num_inference_steps,
        **{name: value for name, value in call.items() if value is not None},
    )
    rows = [name_of(label, class_names) for label in labels] if labels else None
    save_images(images, output, bit_depth, rows)
    print(f"{counted(len(images), 'image')} in {output}")


def optimize(pipeline: "GaussianDDPMPipeline", options: argparse.Namespace) -> None:
    """Make the network fast for as many calls as these images take, and print how."""
    from ddpm_hf.diffusion.schedules import usual_num_steps

    kind, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    steps = options.num_inference_steps or usual_num_steps(kind, config.num_train_timesteps)
    batch_size = min(options.batch_size, options.num_images)
    pipeline.optimize(batch_size, steps * math.ceil(options.num_images / batch_size))


def name_of(label: int | str, class_names: Sequence[str] | None) -> str:
    """What a class is called."""
    if isinstance(label, int) and class_names and label < len(class_names):
        return class_names[label]
    return str(label)


def check_files_can_hold(output: Path, num_channels: int, bit_depth: int) -> None:
    """Say before the work what files of one picture each cannot hold of such images.

    Raises:
        ValueError: for more than four channels.
    """
    from ddpm_hf.pictures import MOST_PICTURE_CHANNELS, is_picture

    if output.suffix in (".npz", ".npy") or is_picture(output):
        return
    if num_channels > MOST_PICTURE_CHANNELS:
        raise ValueError(
            f"{output}: no picture file holds the {num_channels} channels of this model; pass "
            "--format npz or --format npy (or an --output that ends in .png, for a grid to look at)"
        )
    if bit_depth == 16 and num_channels > 1:
        warnings.warn("PNG gets 8 of the 16 bits of this model; --format npz has all", stacklevel=2)


def change_scheduler(
    pipeline: "GaussianDDPMPipeline", name: str | None, spacing: str | None
) -> None:
    """Put another scheduler of the same diffusion in the place of the model's.

    Raises:
        ValueError: if the scheduler has no such spacing.
    """
    import diffusers

    from ddpm_hf.diffusion.scheduling import GaussianDDPMScheduler

    kind = type(pipeline.scheduler)
    if name is not None:
        kind = GaussianDDPMScheduler if name == "DDPM" else getattr(diffusers, f"{name}Scheduler")
    if spacing is not None and (
        "timestep_spacing" not in kind._get_init_keys(kind)
        or (spacing == "quadratic" and kind is not GaussianDDPMScheduler)
    ):
        raise ValueError(f"timestep_spacing={spacing} is not one of {kind.__name__}'s")
    if name is not None or spacing is not None:
        changes = {} if spacing is None else {"timestep_spacing": spacing}
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **changes)


def class_of_each(
    pipeline: "GaussianDDPMPipeline", options: argparse.Namespace, names: Sequence[str] | None
) -> list[int | str] | None:
    """The class of each image; every class in turn where none is asked for.

    Raises:
        ValueError: for labels of a model without numbered classes.
    """
    num_classes = pipeline.unet.config.num_class_embeds
    labels: Sequence[int | str] | None = options.class_labels
    if num_classes is None:
        if labels is not None:
            raise ValueError("class_labels must be left out: this model was not trained on classes")
        return None
    if labels is None:
        labels = names or range(num_classes)
    is_number = [str(n).isdecimal() and n not in (names or ()) for n in labels]
    labels = [int(n) if number else n for n, number in zip(labels, is_number, strict=True)]
    return [labels[i % len(labels)] for i in range(options.num_images)]
