"""The folder of a run: nothing in it is half-written, and one run at a time has it."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ddpm_hf.diffusion.atomic_files import remove_folder
from ddpm_hf.locks import InUseError, hold_lock
from ddpm_hf.paths import RunPaths

_LEFTOVER = re.compile(r"(\.del-)?(?P<kind>\.(new|old|del)-)(?P<name>model|best|step-\d{8})")


class CheckpointError(ValueError):
    """A run folder or checkpoint that cannot be used."""


def remove_leftovers(folder: Path) -> None:
    """Clear what a crash left in `folder`: half-written folders go, a retired one without its
    successor returns."""
    if not folder.is_dir():
        return
    for leftover in folder.iterdir():
        found = _LEFTOVER.fullmatch(leftover.name) if leftover.is_dir() else None
        if found and found["kind"] == ".old-" and not (folder / found["name"]).exists():
            os.rename(leftover, folder / found["name"])
        elif found:
            remove_folder(leftover)


@contextlib.contextmanager
def run_lock(paths: RunPaths) -> Iterator[None]:
    """Hold a run's folder (made if missing) for this run alone, until the block or process ends.

    A run that fails before it has written anything else leaves no folder that was not there.

    Raises:
        CheckpointError: if it cannot be written, another run holds it, or it holds other things.
    """
    output_dir, file = paths.root, paths.lock
    made = [path for path in (output_dir, *output_dir.parents) if not path.exists()]
    _refuse_foreign_files(paths)
    with contextlib.ExitStack() as stack:
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(hold_lock(file, output_dir, "output_dir"))
        except InUseError as error:
            raise CheckpointError(f"{error}") from error
        except OSError as error:
            raise CheckpointError(
                f"cannot write to output_dir {output_dir}: {error.strerror}; choose another one"
            ) from error
        try:
            yield
        finally:
            if made and list(output_dir.iterdir()) == [file]:
                file.unlink()
                with contextlib.suppress(OSError):  # somebody else's work has begun there
                    for path in made:
                        path.rmdir()


def _refuse_foreign_files(paths: RunPaths) -> None:
    # What a run replaces or cuts: such files of somebody else's must not be there when it begins.
    written = (paths.model.root, paths.config, paths.metrics)
    foreign = [path.name for path in written if path.exists()]
    if foreign and not paths.is_run():
        raise CheckpointError(
            f"output_dir {paths.root} holds {', '.join(foreign)}, which no run of training put "
            "there and this one would replace; choose another one"
        )


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinities are refused."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
