"""Folders and JSON files of results."""

import json
import os
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ddpm_hf.diffusion.atomic_files import write_text
from ddpm_hf.evaluation.figures import BoundResult, MetricResult
from ddpm_hf.evaluation.options import EvaluationOptions
from ddpm_hf.evaluation.records import Record
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.locks import exclusive_folder

EVALUATION_FILE, COMPARISON_FILE, CALIBRATION_FILE = (
    "evaluation.json", "comparison.json", "calibration.json"
)  # fmt: skip
MAX_BYTES = 2**28  # a file lists every image
# Options that a recorded command omits at their default.
_OMITTED = ("reference_split", "on_bad_image", "decoder", "batch_size", "per_class")
_DEFAULTS = {f.name: f.default for f in fields(EvaluationOptions) if f.name in _OMITTED}


@contextmanager
def results_folder(state: PartialState, output: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Exclusive lock on the output folder; a temporary folder for None.

    Raises:
        ValueError: if another process uses the folder, or several ranks share no folder.
        OSError: if it cannot be written.
    """
    if output is None and state.num_processes > 1:
        raise ValueError("`output` must be a folder when several processes share the work")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(output or temporary).expanduser()
        with exclusive_folder(state, folder, "output"):
            yield folder


def known_results(folder: Path) -> tuple[BoundResult | MetricResult, ...]:
    """Results of an earlier evaluation in this folder; empty without a valid file."""
    path = folder / EVALUATION_FILE
    try:
        if path.stat().st_size > MAX_BYTES:
            return ()
        return Evaluation.from_dict(json.loads(path.read_text(encoding="utf-8"))).results
    except (OSError, ValueError, RecursionError):
        return ()


def write_result(folder: Path, result: Record, file_name: str) -> Path:
    """Write a result as JSON."""
    path = folder / file_name
    write_text(path, json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return path


def command_of(subjects: Sequence[str], dataset: str, options: Mapping[str, Any]) -> str:
    """Command line that measures the same."""
    words = ["ddpm-hf", "evaluate", *subjects, dataset]
    for name, value in options.items():
        if value is not None and value != _DEFAULTS.get(name):
            values = value if isinstance(value, list) else [value] if value is not True else []
            words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)
