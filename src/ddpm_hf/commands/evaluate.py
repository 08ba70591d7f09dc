"""`ddpm-hf evaluate`."""

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ddpm_hf.commands.messages import command_options, resume_hint, say
from ddpm_hf.evaluation_options import DATASET_HELP, METRIC_NAMES, ComparisonOptions
from ddpm_hf.model_options import LoadOptions
from ddpm_hf.options import REQUIRED, OptionError, for_user, option
from ddpm_hf.paths import output_folder
from ddpm_hf.scheduler_spec import NAMES_HELP, scheduler_name
from ddpm_hf.utils.connection import check_dataset
from ddpm_hf.utils.text import check_local_path, escaped

if TYPE_CHECKING:
    from ddpm_hf.evaluation.results import Evaluation

HELP = "measure a model or images: bits/dim, FD, KID, precision, recall, copies"
DESCRIPTION = """
measure a model on held-out images, or compare images with real ones

  ddpm-hf evaluate runs/photos/model ./photos    bits/dim in all training timesteps
  ddpm-hf evaluate runs/photos/model ./photos --num-images 1000 --num-timesteps 32
                                                 an unbiased estimate, 30 times as fast
  ddpm-hf evaluate runs/photos/model ./photos --num-inference-steps 50
                                                 bits/dim of the model that samples in 50 steps
  ddpm-hf evaluate runs/photos/model ./photos --metrics fd kid precision-recall memorisation
                                                 draw images and compare them with real ones
  ddpm-hf evaluate ./drawn ./photos --metrics fd --features efficientnet-lite0
                                                 existing images, with a network from PyPI
  ddpm-hf evaluate runs/a/model runs/b/model ./drawn ./photos --metrics fd precision-recall
                                                 a table of models and images
  ddpm-hf evaluate runs/photos/model ./photos --schedulers DDPM DDPM:eta=0 DPMSolverMultistep
      --num-inference-steps 5 10 25 50 1000 --metrics fd    each sampler in each number of steps
  ddpm-hf evaluate runs/photos/model ./photos --verify
                                                 measure the figures of the model card again
  accelerate launch --num-processes 4 -m ddpm_hf evaluate runs/photos/model ./photos

bits-per-dim is the variational bound on -log2 p(x) per pixel value: the length of a lossless code
based on the model, and a measure of how well the model explains held-out images. Lower is better.
It is printed with its standard error over the images.

The other metrics compare drawn images with those of --reference-split by the features of a network:
fd, the Frechet distance (called FID with the features of Inception), and kid, the kernel distance:
lower is better; precision-recall, the share of drawn images that look real, and of real images that
the model could draw; coverage, with density, the same with less influence of outliers;
memorisation, the share of drawn images that are copies of training images. Each is printed with a
95 % confidence interval and with the value that real images get at the same sample size; a
difference within the interval is a tie. FD depends on the number of images: compare values at one
number only.

With several subjects, schedulers or numbers of steps, each setting is an evaluation in its own
folder with the same seed. A table, curves and rows of samples compare them, and mark those that are
not distinguishable from the best. Settings that cannot be measured are listed with the reason.

Repeat an interrupted command to resume it.
"""
NOT_REPRODUCED = 1


@dataclass(frozen=True, kw_only=True)
class EvaluateCommand(ComparisonOptions):
    """Options of `ddpm-hf evaluate`.

    Raises:
        OptionError: without a dataset, or for options that need a single setting.
    """

    subjects: list[str] = option(
        REQUIRED,
        "Hub repository or folder of a model; or images: a folder, .npz, .npy or parquet file",
        metavar="MODEL_OR_IMAGES",
        is_path=True,
        is_positional=True,
    )
    dataset: str | None = option(
        None,
        DATASET_HELP,
        metavar="DATASET",
        is_path=True,
        is_positional=True,
    )
    metrics: list[str] | None = option(
        None,
        f"metrics: {', '.join(METRIC_NAMES)} (default: bits-per-dim for a model, the other ones for"
        " images and with `schedulers`)",
        choices=METRIC_NAMES,
        metavar="NAME",
    )
    num_inference_steps: list[int] | None = option(
        None,
        "numbers of steps K of the sampler and of the bound (default: the scheduler's usual number;"
        " for DDPM, the number of training timesteps)",
        minimum=1,
        limit=100_000,
        metavar="K",
    )
    schedulers: list[str] | None = option(
        None,
        f"schedulers that replace the model's own: {NAMES_HELP}",
        aliases=("--scheduler",),
        convert=scheduler_name,
    )
    output: Path = option(
        Path("evaluation"),
        "folder for evaluation.json and the pictures",
        metavar="FOLDER",
        is_path=True,
        convert=output_folder,
    )
    card: bool = option(False, "write the result into the card of the model's folder")
    verify: bool = option(
        False,
        "measure the figures of the model card again; the exit status is 1 if one is not reproduced"
        " within its interval, or cannot be measured (those of training are only listed)",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset is None and len(self.subjects) > 1:  # argparse gives all words to subjects
            object.__setattr__(self, "dataset", self.subjects[-1])
            object.__setattr__(self, "subjects", self.subjects[:-1])
        if self.dataset is None and not self.verify:
            raise OptionError("`dataset` is missing: it is optional with `verify` only")
        if (self.card or self.verify) and not self.is_single:
            name = "card" if self.card else "verify"
            raise OptionError(
                f"`{name}` needs one model with one scheduler and one number of steps"
            )
        if self.card and not Path(self.subjects[0]).is_dir():
            raise OptionError(
                f"`card` needs the folder of a model, got {self.subjects[0]!r}: evaluate a local"
                " copy, then `ddpm-hf push` it"
            )

    @property
    def is_single(self) -> bool:
        """Whether there is only one setting to measure."""
        lists = (self.subjects, self.schedulers, self.num_inference_steps)
        return all(len(values or ()) <= 1 for values in lists)


def run(argv: list[str]) -> int:
    """Evaluate models or images."""
    usage = "MODEL_OR_IMAGES [MODEL_OR_IMAGES ...] DATASET [--option VALUE ...]"
    with command_options(EvaluateCommand, argv, "evaluate", usage, DESCRIPTION) as options:
        from ddpm_hf.commands.model_checks import check_model_options, downloaded_models

        for path in options.subjects:
            check_local_path(path)
        if options.dataset is not None:
            check_dataset(options.dataset)
        if options.is_single and options.num_inference_steps:
            check_model_options(
                options.subjects[0], num_inference_steps=options.num_inference_steps[0]
            )
        with downloaded_models(options.subjects, options), resume_hint("measurements"):
            if options.verify:
                return verify(options)
            (evaluate if options.is_single else compare)(options)
    return 0


def evaluate(options: EvaluateCommand) -> None:
    """Measure one setting and print the result.

    Raises:
        ValueError, OSError: see `ddpm_hf.evaluate`.
    """
    from ddpm_hf.evaluation.evaluate import evaluate
    from ddpm_hf.evaluation.result_files import EVALUATION_FILE, known_results
    from ddpm_hf.evaluation.result_pictures import save_bound_plots
    from ddpm_hf.utils.shared_work import leave_process_group

    known = known_results(options.output)
    evaluation = evaluate(
        options.subjects[0],
        options.dataset,
        metrics=options.metrics,
        output=options.output,
        scheduler=options.schedulers[0] if options.schedulers else None,
        num_inference_steps=options.num_inference_steps[0] if options.num_inference_steps else None,
        **options.keywords(ComparisonOptions),
    )
    if not leave_process_group():
        return
    if evaluation.results == known:
        say(f"ddpm-hf: measured before, in {options.output}")
    print(for_user(f"{evaluation}"))
    if evaluation.bound is not None:
        save_bound_plots(evaluation.bound, options.output)
    if options.card:
        write_card(Path(options.subjects[0]), evaluation)
    print(f"\nin {options.output / EVALUATION_FILE}")


def compare(options: EvaluateCommand) -> None:
    """Measure all settings and print the comparison.

    Raises:
        ValueError, OSError: see `ddpm_hf.compare`.
    """
    from ddpm_hf.evaluation.compare import compare
    from ddpm_hf.evaluation.result_files import COMPARISON_FILE
    from ddpm_hf.utils.shared_work import leave_process_group

    comparison = compare(
        options.subjects,
        options.dataset,
        schedulers=options.schedulers or [],
        num_inference_steps=options.num_inference_steps or [],
        metrics=options.metrics,
        output=options.output,
        **options.keywords(ComparisonOptions),
    )
    if leave_process_group():
        print(for_user(f"{comparison}"))
        print(f"\nin {options.output / COMPARISON_FILE}")


def verify(options: EvaluateCommand) -> int:
    """Measure the figures of the model card again; 0 if all that can be verified are reproduced.

    Raises:
        ValueError, OSError: see `evaluation.verify.verify`.
    """
    from ddpm_hf.evaluation.verify import verify
    from ddpm_hf.utils.shared_work import leave_process_group

    claims = verify(
        options.subjects[0],
        options.dataset,
        features=options.features,
        output=options.output,
        **options.keywords(LoadOptions),
    )
    verdicts = {True: "reproduced", False: "NOT reproduced", None: "not checked"}
    for claim in claims if leave_process_group() else []:
        figures = f"{escaped(claim.name)}: {claim.claimed:.6g} in the card"
        if claim.measured is not None:
            figures += f", {claim.measured:.6g} measured"
        remark = f" ({for_user(escaped(claim.remark))})" if claim.remark else ""
        print(f"{verdicts[claim.is_reproduced]:15} {figures}{remark}")
    is_verified = all(claim.is_reproduced for claim in claims if claim.is_checkable)
    return 0 if is_verified else NOT_REPRODUCED


def write_card(folder: Path, evaluation: "Evaluation") -> None:
    """Write the results into the model card; a failure is a warning."""
    from ddpm_hf.evaluation.card_metrics import card_metrics
    from ddpm_hf.hub.card import write_results

    try:
        print(f"in {write_results(folder, card_metrics(evaluation))}")
    except (ValueError, OSError) as error:
        warnings.warn(f"the card was not written: {error}", stacklevel=2)
