"""`ddpm-hf ema`."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from ddpm_hf.commands.messages import command_options, resume_hint
from ddpm_hf.diffusion.atomic_files import read_json, read_text
from ddpm_hf.evaluation_options import DATASET_HELP, METRIC_NAMES, EmaSweepOptions
from ddpm_hf.options import REQUIRED, OptionError, for_user, option
from ddpm_hf.paths import ModelPaths, RunPaths, output_folder
from ddpm_hf.utils.bounded_yaml import load_yaml
from ddpm_hf.utils.text import check_local_path, close_paths

HELP = "choose the length of the weight average of a run after training"
DESCRIPTION = """
choose the length of the weight average of a run after training (post-hoc EMA, arXiv 2312.02696)

  ddpm-hf train ./photos --post-hoc-ema                  writes snapshots of two averages
  ddpm-hf ema runs/photos --std 0.03                     a model with a short average
  ddpm-hf ema runs/photos --std 0.05 0.1 0.2             three models
  ddpm-hf ema runs/photos --sweep --metrics fd bits-per-dim --num-timesteps 32
                                                         measure eight lengths, write the best
  ddpm-hf ema runs/photos ./photos --sweep --std 0.05 0.1 --metrics fd --num-images 1000
  accelerate launch --num-processes 4 -m ddpm_hf ema runs/photos --sweep --metrics fd

The length is sigma_rel, the standard deviation of the weights' profile over time, relative to the
updates so far: 0.05 averages about the last tenth of the run. Any length is a weighted sum of the
snapshots. Lengths of 0.03 to 0.2 are exact to 1 % of the profile; the error is printed.

Models are written to RUN/ema/std-LENGTH. They load like every model. RUN/model, with traditional
EMA, is not changed, unless --output names it.

--sweep measures each length, and RUN/model for comparison, with the same noise. The first metric
decides. The results and the curve are in RUN/ema/sweep. Repeat an interrupted command to resume it.
"""
_DATASET_OPTIONS = (
    "dataset", "dataset_config", "dataset_revision", "image_column", "class_column"
)  # fmt: skip
_RUN_HELP = "folder of a run that was trained with `--post-hoc-ema`"


@dataclass(frozen=True, kw_only=True)
class EmaCommand(EmaSweepOptions):
    """Options of `ddpm-hf ema`.

    Raises:
        OptionError: without `std` and `sweep`, and for options that need the other one.
    """

    folder: Path = option(REQUIRED, _RUN_HELP, metavar="RUN", is_path=True, is_positional=True)
    dataset: str | None = option(
        None,
        f"with `sweep`: {DATASET_HELP} (default: the dataset of the run)",
        metavar="DATASET",
        is_path=True,
        is_positional=True,
    )
    std: list[float] | None = option(
        None,
        "relative lengths sigma_rel (default with `sweep`: eight from 0.02 to 0.25)",
        minimum=0.005,
        maximum=0.288,
        metavar="X",
    )
    sweep: bool = option(False, "measure all lengths, and write the best model only")
    metrics: list[str] | None = option(
        None,
        f"metrics of `sweep`, of which the first decides: {', '.join(METRIC_NAMES)} (default: fd)",
        choices=METRIC_NAMES,
        metavar="NAME",
    )
    output: Path | None = option(
        None,
        "folder for the model (default: RUN/ema/std-LENGTH)",
        metavar="FOLDER",
        is_path=True,
        convert=output_folder,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.std and not self.sweep:
            raise OptionError("pass `std` with the length of the average, or `sweep`")
        if self.output is not None and not self.sweep and len(self.std or ()) > 1:
            raise OptionError(f"`output` needs a single `std`, got {len(self.std or ())}")
        measured = ("dataset", "metrics", *(field.name for field in fields(EmaSweepOptions)))
        for field in fields(self):
            is_given = getattr(self, field.name) != field.default
            if field.name in measured and is_given and not self.sweep:
                raise OptionError(f"`{field.name}` needs `sweep`")

    def model_folder(self, sigma_rel: float) -> Path:
        """Where the model with this length is written."""
        return self.output or RunPaths(self.folder).ema_model(sigma_rel)


def run(argv: list[str]) -> int:
    """Reconstruct averages of a run, or find the best one."""
    usage = "RUN [DATASET] (--std X [X ...] | --sweep) [--option VALUE ...]"
    with command_options(EmaCommand, argv, "ema", usage, DESCRIPTION) as options:
        check_run(options.folder)
        written = (options.model_folder(sigma_rel) for sigma_rel in options.std or ())
        for target in [options.output] if options.output else written:
            check_target(options.folder, target)
        if options.sweep:
            options = with_dataset_of_run(options)
            check_local_path(f"{options.dataset}")
            with resume_hint("measurements"):
                sweep(options)
        else:
            reconstruct(options)
    return 0


def check_run(folder: Path) -> None:
    """Raise ValueError unless the folder is that of a run with snapshots and a model."""
    paths = RunPaths(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not the folder of a run{close_paths(str(folder))}")
    if not any(paths.ema_snapshots.glob("step-*.safetensors")):
        raise ValueError(
            f"{folder} has no snapshots in {paths.ema_snapshots.name}/: train with --post-hoc-ema,"
            " in a new folder, since the averages start with the first update"
        )
    if not paths.model.index.is_file():
        raise ValueError(f"{folder} has no model yet: let the run write its first checkpoint")


def check_target(run: Path, target: Path) -> None:
    """Raise ValueError for a folder with other files than a model of this command.

    The model of the run itself may be replaced, because a user has named it.
    """
    is_own = target.resolve() == RunPaths(run).model.root.resolve()
    is_written_here = bool(read_json(ModelPaths(target).facts).get("ema"))
    if target.exists() and any(target.iterdir()) and not (is_own or is_written_here):
        raise ValueError(f"{target} is not empty: choose another `output`")


def with_dataset_of_run(options: EmaCommand) -> EmaCommand:
    """The options with the dataset that the configuration of the run names, if none is given.

    Raises:
        ValueError: if it names none.
    """
    if options.dataset is not None:
        return options
    file = RunPaths(options.folder).config
    content = read_config(file)
    if not isinstance(content.get("dataset"), str):
        raise ValueError(f"`dataset` is missing, and {file} names none: pass the real images")
    recorded = {name: content.get(name) for name in _DATASET_OPTIONS}
    missing = {name: v for name, v in recorded.items() if v and getattr(options, name) is None}
    return replace(options, **missing)


def read_config(file: Path) -> dict[str, Any]:
    """The options in the config.yaml of a run; empty without the file.

    Raises:
        ValueError: if it is not valid.
    """
    if not file.is_file():
        return {}
    text = read_text(file)
    try:
        content = load_yaml(text)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read: {error}") from None
    return content if isinstance(content, dict) else {}


def reconstruct(options: EmaCommand) -> None:
    """Write a model for each length.

    Raises:
        ValueError, OSError, SafetensorError: see `PostHocEMA`.
    """
    from ddpm_hf.post_hoc_ema.models import PostHocEMA
    from ddpm_hf.utils.shared_work import distributed_state

    if not distributed_state().is_main_process:
        return
    ema = PostHocEMA(options.folder)
    for sigma_rel in options.std or ():
        target = options.model_folder(sigma_rel)
        print(f"{ema.write_model(sigma_rel, target)}, in {target}")


def sweep(options: EmaCommand) -> None:
    """Measure all lengths, write the best model and print the result.

    Raises:
        ValueError, OSError: see `sweep_ema`.
    """
    from ddpm_hf.evaluation.ema_sweep import EMA_FILE, LENGTHS, sweep_ema, write_best
    from ddpm_hf.post_hoc_ema.models import PostHocEMA
    from ddpm_hf.utils.shared_work import leave_process_group

    results = RunPaths(options.folder).ema_sweep
    result = sweep_ema(
        options.folder,
        options.dataset,
        lengths=options.std or LENGTHS,
        metrics=options.metrics or ("fd",),
        output=results,
        **options.keywords(EmaSweepOptions),
    )
    if not leave_process_group():
        return
    print(for_user(f"{result}"))
    target = options.model_folder(result.best)
    check_target(options.folder, target)
    write_best(PostHocEMA(options.folder), result, results, target)
    print(f"\nin {results / EMA_FILE}; the model in {target}")
