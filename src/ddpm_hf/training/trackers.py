"""Experiment trackers of a run: TensorBoard, trackio, W&B, MLflow, SwanLab and others.

Accelerate's tracker classes send the scalars. Each tracker has a thread of its own, because a
service that is offline may block for minutes, raise anything, or replace signal handlers (SwanLab
replaces that of Ctrl-C in the main thread). MLflow also keeps its active run per thread.
"""

import importlib
import json
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from numpy.typing import NDArray
from PIL.Image import Image

from ddpm_hf.diffusion.atomic_files import read_json, write_text
from ddpm_hf.training.options import TRACKERS
from ddpm_hf.utils.text import without_secrets

logger = logging.getLogger(__name__)

_MAX_PENDING = 1000
"""Entries that wait for a slow service: hours of a run with the default `logging_steps`."""


@dataclass(frozen=True)
class TrackedRun:
    """A run as the trackers see it.

    Attributes:
        folder: folder of the run.
        identity_file: JSON file that keeps the identity of the run for resuming.
        project: name of the project or experiment.
        name: name of the run; None for the name of the folder with a few digits of the id.
        config: options of the run, without secrets.
        step: number of updates of the checkpoint that the run resumes from; 0 for a new run.
        sent_until: last update with an entry before this start; beyond `step` after a kill.
        is_public: whether a new remote dashboard is public.
    """

    folder: Path
    identity_file: Path
    project: str
    name: str | None
    config: Mapping[str, Any]
    step: int = 0
    sent_until: int = 0
    is_public: bool = False


class Trackers:
    """The trackers of a run. A tracker that fails is a warning and is not used any more.

    Args:
        names: trackers by accelerate's name; one that is not installed is a warning.
        run: what they track.
    """

    def __init__(self, names: Iterable[str], run: TrackedRun) -> None:
        installed, identity = installed_trackers(), _Identity(run.identity_file, run.step > 0)
        self._trackers = []
        for name in names:
            if name in installed:
                self._trackers.append(_Tracker(name, run, identity))
            else:
                logger.warning(
                    "the tracker %s is not installed: pip install %s", name, name.replace("_", "-")
                )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the entry of update `step`."""
        for tracker in self._trackers:
            tracker.submit(step, lambda t: t.log(dict(values), step=step))

    def show(self, step: int, grid: Image) -> None:
        """Send the sample grid of update `step`."""
        for tracker in self._trackers:
            if send := _IMAGES.get(tracker.name):
                tracker.submit(step, partial(send, _array(grid), step))

    def close(self, timeout_s: float = 30) -> None:
        """Send what is pending and close the trackers, within one time limit for all of them."""
        deadline = time.monotonic() + timeout_s
        for tracker in self._trackers:
            tracker.request_end()
        for tracker in self._trackers:
            tracker.join(deadline)
        self._trackers = []


class _Identity:
    """What services recognize the run by, in the folder of the run.

    A run that starts again without a checkpoint may have other options: it is tracked as a new one.

    Attributes:
        id: 32 hexadecimal digits.
        known: the trackers that have the run, with the id that a service gave it, or None.
    """

    def __init__(self, file: Path, is_resumed: bool) -> None:
        self._file, self._lock = file, threading.Lock()
        try:
            content = read_json(file) if is_resumed else {}
        except (OSError, ValueError) as error:
            logger.warning("the run is tracked as a new one: %s", error)
            content = {}
        self.id: str = content.get("id") or secrets.token_hex(16)
        self.known: dict[str, str | None] = content.get("trackers") or {}

    def remember(self, tracker: str, service_id: str | None) -> None:
        """Record that a tracker has the run."""
        with self._lock:
            self.known[tracker] = service_id
            content = {"id": self.id, "trackers": self.known}
            write_text(self._file, json.dumps(content, indent=2) + "\n")


class _Tracker:
    """One tracker in its thread."""

    def __init__(self, name: str, run: TrackedRun, identity: _Identity) -> None:
        self.name, self._run, self._identity = name, run, identity
        # TensorBoard removes what lies beyond the checkpoint; the others keep it.
        is_continued = name in identity.known and name != "tensorboard"
        self._repeated = range(run.step + 1, (run.sent_until if is_continued else 0) + 1)
        self._actions: queue.Queue[Callable[[Any], object] | None] = queue.Queue(_MAX_PENDING)
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def submit(self, step: int, action: Callable[[Any], object]) -> None:
        """Queue an action of update `step`, unless it was done before the run was killed."""
        if step not in self._repeated:
            self._put(action)

    def request_end(self) -> None:
        """Queue the end of the thread."""
        self._put(None)

    def join(self, deadline: float) -> None:
        """Wait for the end of the thread until `deadline`, in seconds of `time.monotonic`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._fail("it did not finish in time; its last entries may be missing")

    def _put(self, action: Callable[[Any], object] | None) -> None:
        if self._has_failed:
            return
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            self._fail(f"{_MAX_PENDING} entries wait to be sent")

    def _work(self) -> None:
        try:
            tracker = _start(self.name, self._run, self._identity)
            while (action := self._actions.get()) is not None:
                action(tracker)
            tracker.finish()
        except (Exception, SystemExit) as error:  # a service may raise anything
            self._fail(" ".join(f"{type(error).__name__}: {error}".split()))

    def _fail(self, reason: str) -> None:
        if not self._has_failed:
            self._has_failed = True
            text = without_secrets(f"{reason:.300}")
            logger.warning("the tracker %s failed and is not used any more: %s", self.name, text)


def installed_trackers() -> list[str]:
    """The trackers that are installed, by accelerate's name."""
    available = {str(tracker) for tracker in get_available_trackers()}
    return [name for name in TRACKERS if name in available]


def requested_trackers(report_to: list[str] | None) -> list[str]:
    """The trackers of the option `report_to`: by default TensorBoard, if it is installed."""
    if report_to is None:
        return [name for name in installed_trackers() if name == "tensorboard"]
    names = [name for name in report_to if name not in ("all", "none")]
    return [*dict.fromkeys([*names, *(installed_trackers() if "all" in report_to else [])])]


def public_config(options: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Options as values that every tracker takes, without secrets and open options."""
    return {
        name: value if isinstance(value, bool | int | float) else without_secrets(_as_text(value))
        for name, value in options.items()
        if value is not None
    }


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _start(name: str, run: TrackedRun, identity: _Identity) -> Any:
    """Accelerate's tracker, started as a new run or as the continuation of a known one."""
    is_new = name not in identity.known
    kind, arguments = LOGGER_TYPE_TO_CLASS[name], _arguments(name, run, identity)
    folder = [str(run.folder)] if kind.requires_logging_directory else []
    project = "logs" if name == "tensorboard" else run.project  # a folder in that of the run
    tracker = kind(project, *folder, **arguments)
    tracker.start()
    if name == "tensorboard":
        text = "\n".join(f"    {key}: {value}" for key, value in run.config.items())
        tracker.tracker.add_text("config", text, run.step)
        return tracker
    if is_new and "config" not in arguments:
        tracker.store_init_configuration(dict(run.config))
    identity.remember(name, tracker.tracker.info.run_id if name == "mlflow" else None)
    return tracker


def _arguments(name: str, run: TrackedRun, identity: _Identity) -> dict[str, Any]:
    """Keyword arguments that name the run, continue it, and keep it where the user expects it."""
    title = run.name or f"{run.folder.resolve().name}-{identity.id[:6]}"
    config = dict(run.config)
    if name == "tensorboard":
        return {"purge_step": run.step + 1 if run.step or run.sent_until else None}
    if name == "trackio":  # local, unless its environment variables name a Space or a server
        resume = "allow" if name in identity.known else "never"
        hidden = {"private": not run.is_public, "embed": False}
        return {"name": title, "config": config, "resume": resume, **hidden}
    if name == "wandb":
        local = {"dir": str(run.folder)}
        return {"name": title, "id": identity.id, "resume": "allow", "config": config, **local}
    if name == "swanlab":  # ids have 21 characters
        return {"name": title, "id": identity.id[:21], "resume": "allow", "config": config}
    if name == "mlflow":
        return {"run_name": title, "run_id": identity.known.get(name)}
    return {}


def _array(grid: Image) -> NDArray[np.uint8]:
    return np.asarray(grid.convert("RGB"))


def _show_in_tensorboard(grid: NDArray[np.uint8], step: int, tracker: Any) -> None:
    tracker.log_images({"samples": grid[None]}, step=step, dataformats="NHWC")


def _show_in_trackio(grid: NDArray[np.uint8], step: int, tracker: Any) -> None:
    tracker.log({"samples": importlib.import_module("trackio").Image(grid)}, step=step)


def _show_in_mlflow(grid: NDArray[np.uint8], step: int, tracker: Any) -> None:
    importlib.import_module("mlflow").log_image(grid, key="samples", step=step)


def _show_list(grid: NDArray[np.uint8], step: int, tracker: Any) -> None:
    tracker.log_images({"samples": [grid]}, step=step)


def _show_array(grid: NDArray[np.uint8], step: int, tracker: Any) -> None:
    tracker.log_images({"samples": grid}, step=step)


# `log_images` takes other values in each class of accelerate. The other trackers get no images.
_IMAGES: dict[str, Callable[[NDArray[np.uint8], int, Any], None]] = {
    "tensorboard": _show_in_tensorboard,
    "trackio": _show_in_trackio,
    "mlflow": _show_in_mlflow,
    "wandb": _show_list,
    "swanlab": _show_list,
    "aim": _show_array,
    "clearml": _show_array,
}
