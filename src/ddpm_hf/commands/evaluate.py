"""`ddpm-hf evaluate`."""

import argparse
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.commands.messages import flags_in_messages, say
from ddpm_hf.commands.options import command_parser, model_name, path, positive_int
from ddpm_hf.names import public_name

if TYPE_CHECKING:
    from ddpm_hf.evaluation.images import EvaluationImages

HELP = "measure a model on images: bits per dimension"
EXAMPLES = """
measure a model on images that it was not trained on

  ddpm-hf evaluate runs/photos/model ./photos --split test     every step of the chain
  ddpm-hf evaluate runs/photos/model ./photos --num-images 1000 --num-timesteps 32
                                                 an unbiased estimate, 30 times as fast
  ddpm-hf evaluate runs/photos/model ./photos --num-inference-steps 50
                                                 of the model as it samples in 50 steps
  accelerate launch --num-processes 4 -m ddpm_hf evaluate runs/photos/model ./photos

bits-per-dim is the variational bound on -log2 p(x) per value: what a lossless code made of the
model would need, and how well the model explains images that it has not seen. Lower is better. It
comes with its standard error over the images. What is interrupted goes on by the same command.
"""
METRICS = ("bits-per-dim",)
DECODERS = ("exact", "tanh")


def run(argv: list[str]) -> int:
    """Measure as `argv` says."""
    options = parser().parse_args(argv)
    with flags_in_messages(vars(options)):
        if options.card and not Path(options.model).is_dir():
            raise ValueError(
                f"card is for the folder of a model, and {options.model!r} is none: evaluate your"
                " copy of it, then `ddpm-hf push` it"
            )
        try:
            evaluate(options)
        except KeyboardInterrupt:
            say("ddpm-hf: what is measured so far is kept; the same command goes on")
            raise
    return 0


def parser() -> argparse.ArgumentParser:
    """What `ddpm-hf evaluate` understands."""
    parser = command_parser("evaluate", "MODEL DATASET [--option VALUE ...]", EXAMPLES)
    add_model(parser)
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=["bits-per-dim"],
        metavar="NAME",
        help=f"what to measure: {', '.join(METRICS)} (default: bits-per-dim)",
    )
    add_data(parser.add_argument_group("which images"))
    _add_bound(parser.add_argument_group("the bound"))
    _add_rest(parser.add_argument_group("where it goes, and how"))
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which model, and which images it is measured on."""
    add = parser.add_argument
    add("model", type=model_name, metavar="MODEL", help="Hub repository or folder of a model")
    add(
        "dataset",
        type=model_name,
        metavar="DATASET",
        help="folder of images, parquet or arrow files, or a data set on the Hub; its images get "
        "the model's size and mode",
    )


def add_data(group: Any, how_many: str = "all") -> None:
    """Which of the images."""
    group.add_argument(
        "--split", default="test", metavar="NAME", help="of the data set (default: %(default)s)"
    )
    group.add_argument(
        "--num-images",
        type=positive_int,
        metavar="N",
        help=f"so many, drawn by the seed (default: {how_many})",
    )
    group.add_argument("--dataset-config", metavar="NAME", help="configuration of a Hub data set")
    group.add_argument(
        "--dataset-revision", metavar="NAME", help="branch, tag or commit of a Hub data set"
    )
    group.add_argument(
        "--image-column", metavar="NAME", help="column of the images, if there are several"
    )
    group.add_argument(
        "--class-column",
        metavar="NAME",
        help="column of the classes, for a class-conditional model (default: the one declared so)",
    )
    group.add_argument(
        "--on-bad-image",
        choices=("error", "skip"),
        default="error",
        help="what to do about images that cannot be read (default: %(default)s)",
    )


def _add_bound(group: Any) -> None:
    group.add_argument(
        "--num-inference-steps",
        type=positive_int,
        metavar="K",
        help="the bound of the model as it samples in K steps (default: as many as it was trained "
        "with, which is the lowest)",
    )
    group.add_argument(
        "--num-timesteps",
        type=positive_int,
        metavar="M",
        help="measure M of the K terms of each image, drawn so that the result is unbiased: 32 are "
        "nearly as precise as 1,000 (default: all)",
    )
    group.add_argument(
        "--decoder",
        choices=DECODERS,
        default="exact",
        help="of the last step: exact; or tanh, the papers' approximation, to compare with their "
        "numbers (default: %(default)s)",
    )


def _add_rest(group: Any) -> None:
    group.add_argument(
        "--output",
        type=path,
        default=Path("evaluation"),
        metavar="FOLDER",
        help="folder for evaluation.json and the pictures (default: %(default)s)",
    )
    group.add_argument(
        "--card", action="store_true", help="put the result into the card of the model's folder"
    )
    add_work(group)


def add_work(group: Any) -> None:
    """How the measuring is done, and how the model is loaded."""
    group.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="the noise of image i depends on the seed and on i alone (default: %(default)s)",
    )
    group.add_argument(
        "--batch-size",
        type=positive_int,
        default=64,
        metavar="N",
        help="images at once, as memory allows (default: %(default)s)",
    )
    group.add_argument(
        "--revision", metavar="NAME", help="branch, tag or commit of the model on the Hub"
    )
    group.add_argument("--variant", metavar="NAME", help="variant of the weights, such as fp16")
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="open the pickled .bin weights of an old repository; they could run code, so only for"
        " authors you trust",
    )


def evaluate(options: argparse.Namespace) -> None:
    """Load model and images, measure, and write what was found.

    Raises:
        ValueError, OSError: if something cannot be loaded or measured.
    """
    from ddpm_hf.evaluation.likelihood import BoundOptions, forget_parts, measure_bits_per_dim
    from ddpm_hf.evaluation.report import read_result, table, write_report
    from ddpm_hf.hub.load import load
    from ddpm_hf.parts import join_processes

    options.output.mkdir(parents=True, exist_ok=True)  # fails before the work, if at all
    state = join_processes()
    pipeline = load(
        options.model,
        revision=options.revision,
        variant=options.variant,
        use_safetensors=not options.allow_pickle,
    ).to(state.device)
    images = images_of(options, pipeline.unet, state.is_main_process)
    bound = BoundOptions(
        num_inference_steps=options.num_inference_steps,
        num_timesteps=options.num_timesteps,
        decoder=options.decoder,
        seed=options.seed,
        batch_size=options.batch_size,
    )
    known = read_result(options.output, "bits-per-dim")
    result = measure_bits_per_dim(
        pipeline.unet,
        pipeline.scheduler,
        images,
        bound,
        options.output,
        state,
        known=known,
    )
    state.destroy_process_group()
    if result is None:  # the main process writes for all
        return
    if result is known:
        say(f"ddpm-hf: measured before, in {options.output}")
    dataset = dataset_facts(options, images)
    model = {"name": public_name(options.model), "revision": options.revision}
    file = write_report(options.output, model, dataset, [result])
    forget_parts(options.output, result)
    print(table(result, dataset))
    draw_plots(result, options.output)
    if options.card:
        write_card(Path(options.model), result, dataset)
    print(f"\nin {file}")


def images_of(
    options: argparse.Namespace, unet: Any, progress: bool, at_most: int | None = None
) -> "EvaluationImages":
    """The images that the options name, as the model sees them."""
    from ddpm_hf.data import load_images
    from ddpm_hf.evaluation.images import images_for

    dataset = load_images(
        options.dataset,
        config_name=options.dataset_config,
        split=options.split,
        revision=options.dataset_revision,
    )
    return images_for(
        unet,
        dataset,
        num_images=options.num_images,
        at_most=at_most,
        seed=options.seed,
        image_column=options.image_column,
        label_column=options.class_column or True,
        on_bad_image=options.on_bad_image,
        progress=progress,
    )


def dataset_facts(options: argparse.Namespace, images: "EvaluationImages") -> dict[str, Any]:
    """What the images are, as JSON values."""
    name = public_name(options.dataset)
    facts = {
        "name": name,
        "split": options.split,
        "config_name": options.dataset_config,
        "revision": options.dataset_revision,
        "image": images.facts.to_config()["image"],
    }
    is_of_hub = name == options.dataset and not os.path.exists(options.dataset)
    return facts | ({"hub_id": name} if is_of_hub else {})


def draw_plots(result: dict[str, Any], folder: Path) -> None:
    """The two pictures of the bound; without them the result is no worse."""
    try:
        from ddpm_hf.evaluation import plots

        plots.plot_terms(result, folder / "bits-per-timestep.png")
        plots.plot_rate_distortion(result, folder / "rate-distortion.png")
    except ImportError:
        warnings.warn("no pictures without matplotlib: pip install 'ddpm-hf[eval]'", stacklevel=2)
    except Exception as error:
        warnings.warn(f"the pictures were not drawn: {error}", stacklevel=2)


def write_card(folder: Path, result: dict[str, Any], dataset: dict[str, Any]) -> None:
    """Put the result into the model's card; without that the result is no worse."""
    from ddpm_hf.evaluation.report import card_result
    from ddpm_hf.hub.card import write_results

    try:
        print(f"in {write_results(folder, [card_result(result, dataset)])}")
    except (ValueError, OSError) as error:
        warnings.warn(f"the card was not written: {error}", stacklevel=2)
