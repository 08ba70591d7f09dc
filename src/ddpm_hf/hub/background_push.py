"""Upload of checkpoints during training; failures do not stop the run."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from ddpm_hf.hub.download import check_repo_id
from ddpm_hf.hub.published_files import prepare, published_files
from ddpm_hf.hub.push import Target, push_command
from ddpm_hf.hub.retry import WAITS_S, shorten

_PREFIX = ".pushing-"


class BackgroundPusher:
    """Uploads one checkpoint at a time in a thread; of those waiting, only the newest is kept.

    For the main process. The thread is a daemon: Python joins the thread of `HfApi.run_as_future`
    at exit, where a Hub that does not answer would keep the process alive.

    Args:
        repo_id: "user/name".
        public: make a new repository public.
        revision: branch to push to.
        token: by default that of `hf auth login` or HF_TOKEN.
        waits_s: seconds before each retry.

    Attributes:
        message: result of the last upload, in one line.
    """

    def __init__(
        self,
        repo_id: str,
        *,
        public: bool = False,
        revision: str | None = None,
        token: str | None = None,
        waits_s: Sequence[float] = WAITS_S,
    ) -> None:
        check_repo_id(repo_id)
        self.message = "nothing was pushed"
        self._stop = threading.Event()
        self._target = Target(repo_id, public, revision, False, token, tuple(waits_s), self._stop)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._waiting: _Snapshot | None = None
        self._newest: _Snapshot | None = None  # submitted
        self._pushed: _Snapshot | None = None

    def check(self) -> None:
        """Create the repository and check the right to write to it; to call before training.

        Raises:
            ValueError: if the token is missing or may not write, or the repository contains
                something else.
            HubError: if the Hub fails after all retries.
        """
        self._target.check_access()

    def submit(self, folder: str | os.PathLike[str], step: int) -> None:
        """Upload the current state of `folder` in the background. Never raises or blocks.

        Args:
            folder: a checkpoint. Its files are copied first, weights by hard links: replace them
                by new files, do not rewrite them in place.
            step: number in the title of the commit.
        """
        snapshot = _Snapshot(Path(folder), step)
        with self._lock:
            is_first, self._newest = self._newest is None, snapshot
        try:
            if is_first:
                _remove_leftovers(snapshot.folder.parent)
            snapshot.copy()
        except Exception as error:
            self._report(snapshot, error)
        else:
            self._enqueue(snapshot)

    def finish(self, timeout_s: float) -> bool:
        """Wait for the uploads, and retry the newest if it failed. Never raises.

        Args:
            timeout_s: time limit in seconds.
        Returns:
            whether the newest checkpoint is on the Hub, or none was submitted. If False, `message`
            has the reason and the command to push it.
        """
        deadline = time.monotonic() + timeout_s
        self._wait(deadline)
        newest = self._newest
        if newest and newest is not self._pushed and newest.path and not self._thread:
            self._enqueue(newest)
            self._wait(deadline)
        self._stop.set()
        if self._thread and newest:
            self._report(newest, TimeoutError(f"the upload took more than {timeout_s:g} s"))
        elif newest:
            newest.discard()
        return self._pushed is newest

    def _wait(self, deadline: float) -> None:
        if thread := self._thread:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _enqueue(self, snapshot: "_Snapshot") -> None:
        with self._lock:
            if self._waiting:
                self._waiting.discard()
            self._waiting = snapshot
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while snapshot := self._dequeue():
            try:
                folder = snapshot.path or snapshot.folder
                files = prepare(folder, self._target.repo_id)
                with disable_progress_bars():  # they would interrupt the bar of the trainer
                    result = self._target.upload(folder, files, f"Step {snapshot.step}")
            except Exception as error:
                self._report(snapshot, error)
            else:
                self._pushed = snapshot
                self.message = f"step {snapshot.step}: {result}"
            if snapshot is self._pushed or snapshot is not self._newest:
                snapshot.discard()

    def _dequeue(self) -> "_Snapshot | None":
        """The next checkpoint; None ends the thread."""
        with self._lock:
            snapshot, self._waiting = self._waiting, None
            if snapshot is None:
                self._thread = None
            return snapshot

    def _report(self, snapshot: "_Snapshot", error: Exception) -> None:
        target = self._target
        command = push_command(
            snapshot.folder, target.repo_id, public=target.public, revision=target.revision
        )
        reason = shorten(str(error)) or type(error).__name__
        self.message = f"step {snapshot.step} was not pushed: {reason}. To push it: {command}"


class _Snapshot:
    """Copy of a checkpoint next to it, on the same disk."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self.path: Path | None = None

    def copy(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.folder.parent))
        for source in published_files(self.folder):
            target = self.path / source.relative_to(self.folder)
            target.parent.mkdir(exist_ok=True)
            if source.suffix == ".safetensors":
                with suppress(OSError):  # file systems without hard links
                    os.link(source, target)
                    continue
            shutil.copyfile(source, target)

    def discard(self) -> None:
        if self.path:
            shutil.rmtree(self.path, ignore_errors=True)


def _remove_leftovers(folder: Path) -> None:
    """Remove copies of a killed run; the lock of the run excludes other runs."""
    for path in folder.glob(_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)
