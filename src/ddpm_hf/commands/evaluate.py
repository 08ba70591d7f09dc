"""`ddpm-hf evaluate`."""

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_hf.commands.messages import command_messages, say
from ddpm_hf.commands.options import (
    add_comparison,
    add_data,
    add_dataset,
    add_work,
    command_parser,
    given,
    model_name,
    path,
    positive_int,
    sampler,
)
from ddpm_hf.scheduler_spec import NAMES_HELP

if TYPE_CHECKING:
    from ddpm_hf.evaluation.results import Evaluation

HELP = "measure a model or images: bits/dim, FD, KID, precision, recall, copies"
EXAMPLES = """
measure a model on images that it was not trained on, or images beside real ones

  ddpm-hf evaluate runs/photos/model ./photos    bits/dim, every step of the chain
  ddpm-hf evaluate runs/photos/model ./photos --num-images 1000 --num-timesteps 32
                                                 an unbiased estimate, 30 times as fast
  ddpm-hf evaluate runs/photos/model ./photos --num-inference-steps 50
                                                 of the model as it samples in 50 steps
  ddpm-hf evaluate runs/photos/model ./photos --metrics fd kid precision-recall memorisation
                                                 draws images, and compares them with real ones
  ddpm-hf evaluate ./drawn ./photos --metrics fd --features efficientnet-lite0
                                                 images that are there, by a network from PyPI
  ddpm-hf evaluate runs/a/model runs/b/model ./drawn ./photos --metrics fd precision-recall
                                                 models and images, side by side
  ddpm-hf evaluate runs/photos/model ./photos --schedulers DDPM DDPM:eta=0 DPMSolverMultistep
      --num-inference-steps 5 10 25 50 1000 --metrics fd    every sampler in every number of steps
  ddpm-hf evaluate runs/photos/model ./photos --verify
                                                 measures again what the model's card claims
  accelerate launch --num-processes 4 -m ddpm_hf evaluate runs/photos/model ./photos

bits-per-dim is the variational bound on -log2 p(x) per value: what a lossless code made of the
model would need, and how well the model explains images that it has not seen. Lower is better. It
comes with its standard error over the images.

The other metrics compare drawn images with those of --reference-split by what a network sees in
them: fd, the Frechet distance of its features (what FID is with Inception's), and kid, the kernel
distance: lower is better; precision-recall, the share of drawn images that look real, and of real
ones that could be drawn; coverage, with density, the same less sensitive to outliers; memorisation,
the share of drawn images that are copies of training images. Each has an interval of 95 %, and
stands beside what real images get at the same number: no difference within chance is a tie. FD
depends on the number of images, so only values at one number are comparable.

Of several subjects, schedulers or numbers of steps, each setting is an evaluation in a folder of
its own, by the same seed; a table, curves and rows of samples show them side by side, with those
that are too close to the best to tell. What cannot be measured is left out, with the reason.

What is interrupted goes on by the same command.
"""
METRICS = ("bits-per-dim", "fd", "kid", "precision-recall", "coverage", "memorisation")
DECODERS = ("exact", "tanh")
_NOT_REPRODUCED = 1


def run(argv: list[str]) -> int:
    """Measure as `argv` says."""
    command = parser()
    options = command.parse_intermixed_args(argv)
    subjects = options.subjects
    if len(subjects) > 1:
        options.dataset = subjects.pop()
    elif not options.verify:
        command.error("the following arguments are required: DATASET")
    steps, schedulers = options.num_inference_steps, options.schedulers
    is_one = max(len(subjects), len(steps), len(schedulers)) == 1
    with command_messages(None):
        if (options.card or options.verify) and not is_one:
            raise ValueError(
                f"{'card' if options.card else 'verify'} is for one model with one scheduler and"
                " one number of steps"
            )
        if options.card and not Path(subjects[0]).is_dir():
            raise ValueError(
                f"card is for the folder of a model, and {subjects[0]!r} is none: evaluate your"
                " copy of it, then `ddpm-hf push` it"
            )
        try:
            if options.verify:
                return verify(options)
            return evaluate(options) if is_one else compare(options)
        except KeyboardInterrupt:
            say("ddpm-hf: what is measured so far is kept; the same command goes on")
            raise


def parser() -> argparse.ArgumentParser:
    """What `ddpm-hf evaluate` understands."""
    usage = "MODEL_OR_IMAGES [MODEL_OR_IMAGES ...] DATASET [--option VALUE ...]"
    parser = command_parser("evaluate", usage, EXAMPLES)
    parser.add_argument(
        "subjects",
        nargs="+",
        type=model_name,
        metavar="MODEL_OR_IMAGES",
        help="Hub repository or folder of a model; or images: a folder, .npz, .npy or parquet file",
    )
    add_dataset(parser, "?")
    parser.add_argument(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="NAME",
        help=f"what to measure: {', '.join(METRICS)} (default: bits-per-dim of models, the others "
        "of images, and where --schedulers is given)",
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="measure again what the card of the model claims; the exit status is 1 if a figure is "
        "not reproduced within its interval",
    )
    add_data(parser.add_argument_group("which images"))
    _add_drawing(parser.add_argument_group("how a model draws"))
    comparison = parser.add_argument_group("the comparison with real images")
    add_comparison(comparison)
    comparison.add_argument(
        "--per-class",
        action="store_true",
        help="compare the images of each class, too: for models and images with classes",
    )
    _add_bound(parser.add_argument_group("the bound"))
    _add_rest(parser.add_argument_group("where it goes, and how"))
    return parser


def _add_drawing(group: Any) -> None:
    group.add_argument(
        "--num-inference-steps",
        nargs="+",
        type=positive_int,
        default=[None],
        metavar="K",
        help="steps, of the bound too (default: as many as are usual for the scheduler; of DDPM "
        "those that it was trained with)",
    )
    group.add_argument(
        "--schedulers",
        "--scheduler",
        nargs="+",
        type=sampler,
        default=[None],
        metavar="NAME",
        help=f"in place of the model's own: {NAMES_HELP}",
    )


def _add_bound(group: Any) -> None:
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


def evaluate(options: argparse.Namespace) -> int:
    """Measure, and show what was found.

    Raises:
        ValueError, OSError: if something cannot be loaded or measured.
    """
    from ddpm_hf.evaluation.evaluate import evaluate
    from ddpm_hf.evaluation.result_files import EVALUATION_FILE, known_results
    from ddpm_hf.evaluation.result_pictures import save_bound_plots
    from ddpm_hf.shared_work import distributed_state

    (subject,), (K,), (scheduler,) = (
        options.subjects, options.num_inference_steps, options.schedulers
    )  # fmt: skip
    how = {"scheduler": scheduler, "num_inference_steps": K, **_how(options)}
    known = known_results(options.output)
    evaluation = evaluate(subject, options.dataset, **how, **_loading(options))
    is_main = distributed_state().is_main_process
    distributed_state().destroy_process_group()
    if not is_main:
        return 0
    if evaluation.results == known:
        say(f"ddpm-hf: measured before, in {options.output}")
    print(evaluation)
    if evaluation.bound is not None:
        save_bound_plots(evaluation.bound, options.output)
    if options.card:
        write_card(Path(subject), evaluation)
    print(f"\nin {options.output / EVALUATION_FILE}")
    return 0


def compare(options: argparse.Namespace) -> int:
    """Measure all settings, and show them side by side.

    Raises:
        ValueError, OSError: if the data or a model cannot be loaded, or no setting be measured.
    """
    from ddpm_hf.evaluation.compare import compare
    from ddpm_hf.evaluation.result_files import COMPARISON_FILE
    from ddpm_hf.shared_work import distributed_state

    comparison = compare(
        options.subjects,
        options.dataset,
        schedulers=[name for name in options.schedulers if name],
        num_inference_steps=[K for K in options.num_inference_steps if K],
        **_how(options),
        **_loading(options),
    )
    is_main = distributed_state().is_main_process
    distributed_state().destroy_process_group()
    if is_main:
        print(comparison)
        print(f"\nin {options.output / COMPARISON_FILE}")
    return 0


def verify(options: argparse.Namespace) -> int:
    """Measure again what the card claims; 0 if all of that is reproduced.

    Raises:
        ValueError, OSError: if there is nothing to verify, or it cannot be measured.
    """
    from ddpm_hf.evaluation.verify import verify
    from ddpm_hf.shared_work import distributed_state

    how = {"features": options.features, **_loading(options)}
    claims = verify(options.subjects[0], options.dataset, **how)
    is_main = distributed_state().is_main_process
    distributed_state().destroy_process_group()
    is_reproduced = all(claim.is_reproduced is not False for claim in claims)
    if not is_main:
        return 0 if is_reproduced else _NOT_REPRODUCED
    words = {True: "reproduced", False: "NOT reproduced", None: "not checked"}
    for claim in claims:
        said = f"{claim.name}: {claim.claimed:.6g} in the card"
        if claim.measured is not None:
            said += f", {claim.measured:.6g} measured"
        remark = f" ({claim.remark})" if claim.remark else ""
        print(f"{words[claim.is_reproduced]:15} {said}{remark}")
    return 0 if is_reproduced else _NOT_REPRODUCED


def _how(options: argparse.Namespace) -> dict[str, Any]:
    names = ("metrics", "features", "num_images", "seed", "split", "reference_split",
             "dataset_config", "dataset_revision", "image_column", "class_column", "per_class",
             "on_bad_image", "num_timesteps", "decoder", "batch_size")  # fmt: skip
    return given(options, names)


def _loading(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "output": options.output,
        "revision": options.revision,
        "variant": options.variant,
        "use_safetensors": not options.allow_pickle,
    }


def write_card(folder: Path, evaluation: "Evaluation") -> None:
    """Put results into the model's card; without that they are no worse."""
    from ddpm_hf.evaluation.card_metrics import card_metrics
    from ddpm_hf.hub.card import write_results

    metrics = [metric.to_dict() for metric in card_metrics(evaluation)]
    try:
        print(f"in {write_results(folder, metrics)}")
    except (ValueError, OSError) as error:
        warnings.warn(f"the card was not written: {error}", stacklevel=2)
