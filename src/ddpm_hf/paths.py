"""File layout of model folders and run folders, and checks of paths; imports no torch."""

import mimetypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

P = TypeVar("P", str, Path)
_STANDARD_TYPES = mimetypes.MimeTypes()  # without the files of this machine
# File types that the standard library does not know.
_OTHER_FILES = {
    ".7z", ".arrow", ".ckpt", ".h5", ".hdf5", ".npy", ".npz", ".parquet", ".pkl", ".pt", ".pth",
    ".safetensors", ".yaml", ".yml",
}  # fmt: skip
_ARCHIVES = {".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip", ".zst"}


def has_file_suffix(path: Path) -> bool:
    """Whether the suffix is that of a type of files; False for an existing folder."""
    suffix = path.suffix.lower()
    is_known = suffix in _OTHER_FILES or any(_STANDARD_TYPES.guess_type(f"x{suffix}"))
    return is_known and not path.is_dir()


def names_an_output(path: Path) -> bool:
    """Whether the path ends in a name; "", ".", ".." and "/" do not."""
    return path.name not in ("", "..")


def output_folder(output: P) -> P:
    """`output` if a folder of that name can be written.

    Raises:
        ValueError: for a path without a name, such as ".", for the name of an archive, and for an
            existing file. Results of drawn.npy may have its name.
    """
    path = Path(output)
    if not names_an_output(path):
        raise ValueError(f"name an output folder, such as results, got {os.fspath(output)!r}")
    if path.suffix.lower() in _ARCHIVES and not path.is_dir():
        raise ValueError(
            f"the output is a folder, but {path.name} has the suffix of an archive; leave out"
            f" {path.suffix}"
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, not a folder; choose another name")
    return output


class _UnderRoot:
    """Attribute with a path in the folder `root` of its owner."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, owner: "ModelPaths | RunPaths", kind: type) -> Path:
        return owner.root / self.name


@dataclass(frozen=True)
class ModelPaths:
    """Files of a portable checkpoint.

    Args:
        root: folder written by `save_pretrained` or by the trainer.
    """

    root: Path

    index = _UnderRoot("model_index.json")  # the pipeline's components; diffusers reads it first
    facts = _UnderRoot("training.json")  # facts about the training for the model card
    recipe = _UnderRoot("recipe.yaml")  # training options, readable by `--config`
    metrics = _UnderRoot("metrics.jsonl")  # training log, JSON lines
    card = _UnderRoot("README.md")  # model card
    samples = _UnderRoot("samples.png")  # sample grid in the model card


@dataclass(frozen=True)
class RunPaths:
    """Files of a training run.

    Args:
        root: `output_dir` of the run.
    """

    root: Path

    lock = _UnderRoot(".lock")  # of the training process
    config = _UnderRoot("config.yaml")  # complete options of the run
    metrics = _UnderRoot("metrics.jsonl")  # training log, JSON lines
    tracking = _UnderRoot("tracking.json")  # identity of the run in experiment trackers
    checkpoints = _UnderRoot("checkpoints")  # training checkpoints, from which a run resumes
    ema_snapshots = _UnderRoot("ema_snapshots")  # snapshots of the averages for post-hoc EMA
    ema_sweep = _UnderRoot("ema/sweep")  # results of `ddpm-hf ema --sweep`
    samples = _UnderRoot("samples")  # sample grids
    loss_picture = _UnderRoot("loss.png")  # curve of the training loss
    denoising_picture = _UnderRoot("denoising.png")  # trajectories of a few samples at the end

    @property
    def model(self) -> ModelPaths:
        """Portable checkpoint of the latest weights."""
        return ModelPaths(self.root / "model")

    @property
    def best(self) -> ModelPaths:
        """Portable checkpoint with the best validation result."""
        return ModelPaths(self.root / "best")

    def ema_model(self, sigma_rel: float) -> Path:
        """Model with an average of this relative length."""
        return self.root / "ema" / f"std-{sigma_rel:g}"

    def sample_grid(self, step: int) -> Path:
        """Sample grid after update `step`."""
        return self.samples / f"step-{step:08d}.png"

    def newest_sample_grid(self) -> Path | None:
        """Latest sample grid, if any."""
        return max(self.samples.glob("step-*.png"), default=None)

    def is_run(self) -> bool:
        """Whether the folder belongs to a training run."""
        return self.lock.exists() or any(self.checkpoints.glob("step-*"))


EMA_WEIGHTS = "ema.safetensors"
"""Averaged weights in a training checkpoint."""


def model_of_run(folder: Path) -> Path:
    """RUN/model for the folder RUN of a training run; other folders unchanged."""
    run = RunPaths(folder)
    has_model = run.model.index.is_file() and not ModelPaths(folder).index.is_file()
    return run.model.root if has_model and run.is_run() else folder


def run_of_checkpoint(folder: Path) -> RunPaths | None:
    """The run of a training checkpoint RUN/checkpoints/step-N; None for another folder."""
    run = RunPaths(folder.resolve().parent.parent)
    is_inside = folder.resolve().parent == run.checkpoints
    return run if is_inside and (folder / EMA_WEIGHTS).is_file() else None


def not_a_model(folder: Path, name: str) -> str:
    """Message for a folder without a model, with the folder inside or beside it that has one."""
    models = (folder / "model", folder.parent / "model", folder.parent)
    found = next((model for model in models if ModelPaths(model).index.is_file()), None)
    hint = f"; did you mean {found}?" if found else ""
    return f"{name} is not a pipeline checkpoint: it has no model_index.json{hint}"
