"""Folders and JSON files of results."""

import functools
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState

from ddpm_hf.diffusion.atomic_files import read_text, write_text
from ddpm_hf.evaluation.figures import BoundResult, MetricResult
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.json_records import Record
from ddpm_hf.utils.digests import json_digest
from ddpm_hf.utils.locks import exclusive_folder

logger = logging.getLogger(__name__)

EVALUATION_FILE, COMPARISON_FILE, CALIBRATION_FILE = (
    "evaluation.json", "comparison.json", "calibration.json"
)  # fmt: skip
MAX_BYTES = 2**28  # a file lists every image


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
        folder = Path(temporary if output is None else output).expanduser()
        with exclusive_folder(state, folder, "output"):
            yield folder


def known_results(folder: Path) -> tuple[BoundResult | MetricResult, ...]:
    """Results of an earlier evaluation in this folder; empty without a valid file."""
    path = folder / EVALUATION_FILE
    try:
        return read_evaluation(folder).results
    except FileNotFoundError:
        return ()
    except (OSError, AttributeError, ValueError, RecursionError) as error:
        _report(f"{path} is damaged, and measured again: {error!s:.200}")
        return ()


def read_evaluation(folder: Path) -> Evaluation:
    """The evaluation in a folder.

    Raises:
        ValueError, OSError: if there is none, or it is damaged.
    """
    content = json.loads(read_text(folder / EVALUATION_FILE, MAX_BYTES))
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    if content.pop("sha256", None) not in (None, json_digest(content)):
        raise ValueError("it differs from its checksum")
    return Evaluation.from_dict(content)


@functools.cache  # several metrics read the file
def _report(message: str) -> None:
    logger.warning("%s", message)


def write_result(folder: Path, result: Record, file_name: str) -> Path:
    """Write a result as JSON."""
    path = folder / file_name
    write_text(path, json.dumps(result.to_dict(), indent=1, ensure_ascii=False) + "\n")
    return path
