"""Checks of a run folder without torch, so that a command refuses before it is loaded."""

import shlex
from pathlib import Path

from ddpm_hf.paths import RunPaths
from ddpm_hf.training.checkpoint_record import list_checkpoints, read_record
from ddpm_hf.training.config import TrainingConfig
from ddpm_hf.training.errors import CheckpointError, ConfigError
from ddpm_hf.training.resolve import resume_options
from ddpm_hf.utils.connection import check_dataset
from ddpm_hf.utils.text import check_local_path, close_paths


def check_before_loading(options: TrainingConfig) -> None:
    """Check the options against the run in their folder, and the paths of a new run.

    Raises:
        ConfigError: for options that a resumed run may not change, and for a missing file.
        DataError: for a folder of images without the labels that the options request.
        CheckpointError: for a folder with files that no run wrote.
    """
    paths = RunPaths(options.run_folder())
    refuse_foreign_files(paths)
    if not (checkpoints := list_checkpoints(paths.checkpoints)):
        _check_sources(options)
        return
    try:
        record = read_record(checkpoints[0])
    except (CheckpointError, OSError):
        return  # a damaged checkpoint is reported under the lock of the run
    resume_options(options, record.config, record.parts)


def _check_sources(options: TrainingConfig) -> None:
    if options.dataset is not None:
        try:
            check_dataset(options.dataset)
        except ValueError as error:
            raise ConfigError(f"{error}") from None
    if options.pretrained is not None:
        try:
            check_local_path(options.pretrained)
        except ValueError as error:
            raise ConfigError(f"`pretrained`: {error}") from None
    file = options.unet_config
    if file is not None and not Path(file).is_file():
        raise ConfigError(f"`unet_config`: {file!r} is not a file{close_paths(file)}")
    folder = Path(options.dataset or "").expanduser()
    if options.class_conditional and options.dataset and folder.is_dir():
        from ddpm_hf.data.sources import check_folder_labels  # loads pandas

        check_folder_labels(folder, options.split, options.class_column)


def refuse_foreign_files(paths: RunPaths) -> None:
    """Refuse a folder with files that a run would replace: of other origin, or a trained model.

    Raises:
        CheckpointError: with their names.
    """
    written = (paths.model.root, paths.config, paths.metrics)
    for path in (paths.config, paths.metrics):
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path} is not a regular file; choose another `output_dir`")
    foreign = [path.name for path in written if path.exists()]
    if foreign and not paths.is_run():
        raise CheckpointError(
            f"`output_dir` {paths.root} contains {', '.join(foreign)}, which no training run "
            "wrote and this one would replace; choose another one"
        )
    model = paths.model.root
    if model.exists() and not any(paths.checkpoints.glob("*step-*")):
        raise CheckpointError(
            f"`output_dir` {paths.root} has a trained model, which a new run would replace, but no "
            f"checkpoint to resume from. Choose another `output_dir`, with `pretrained` "
            f"{shlex.quote(str(model))} to start from its weights, or move {model} away"
        )
