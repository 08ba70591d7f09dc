"""Pushing checkpoints while training goes on: nothing that happens here stops or fails the run."""

import os
import shutil
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

from ddpm_hf.hub.load import check_repo_id
from ddpm_hf.hub.push import Target, prepare, push_command, shared_files
from ddpm_hf.hub.retry import WAITS_S, shorten

_PREFIX = ".pushing-"


class BackgroundPusher:
    """Uploads one checkpoint at a time; of those that wait meanwhile only the newest is kept.

    To be used by one process of the run. The thread is a daemon, unlike that of
    `HfApi.run_as_future`, which Python joins at exit: a Hub that hangs must not hold a run that was
    told to end.

    Args:
        repo_id: "user/name".
        public: make a new repository public.
        revision: branch to push to.
        token: by default that of `hf auth login` or HF_TOKEN.
        waits_s: seconds before each further attempt after a failure that may pass.

    Attributes:
        message: the last outcome, in one line.
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
        self._waiting: _Copy | None = None
        self._newest: _Copy | None = None  # submitted
        self._pushed: _Copy | None = None

    def check(self) -> None:
        """Make the repository and prove the right to write to it; call it before step 1.

        Raises:
            ValueError: without a token or that right, or if the repository holds something else.
            HubError: if the Hub still failed at the last attempt.
        """
        self._target.check_access()

    def submit(self, folder: str | os.PathLike[str], step: int) -> None:
        """Upload `folder` as it is now, in the background. Never raises, never waits for the Hub.

        Args:
            folder: a checkpoint. Its files are copied first; weights by hard links, so they must be
                replaced by others, not rewritten in place.
            step: named in the commit.
        """
        copy = _Copy(Path(folder), step)
        with self._lock:
            before, self._newest = self._newest, copy
        try:
            if before is None:
                _remove_leftovers(copy.folder.parent)
            copy.make()
        except Exception as error:
            self._report(copy, error)
        else:
            self._hand_over(copy)

    def finish(self, timeout_s: float) -> bool:
        """Wait for the uploads, trying once more the newest if it had failed. Never raises.

        Args:
            timeout_s: give up after so many seconds.
        Returns:
            whether the newest checkpoint is on the Hub, or none was submitted. If not, `message`
            says why and how to push by hand.
        """
        deadline = time.monotonic() + timeout_s
        self._wait(deadline)
        newest = self._newest
        if newest and newest is not self._pushed and newest.path and not self._thread:
            self._hand_over(newest)
            self._wait(deadline)
        self._stop.set()
        if self._thread and newest:
            self._report(newest, TimeoutError(f"no end of the upload within {timeout_s:g} s"))
        elif newest:
            newest.discard()
        return self._pushed is newest

    def _wait(self, deadline: float) -> None:
        if thread := self._thread:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _hand_over(self, copy: "_Copy") -> None:
        with self._lock:
            if self._waiting:
                self._waiting.discard()
            self._waiting = copy
            if self._thread is None:
                disable_progress_bars()  # they would break into the trainer's own
                self._thread = threading.Thread(target=self._work, name="hub-push", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        while copy := self._take():
            try:
                folder = copy.path or copy.folder
                files = prepare(folder, self._target.repo_id)
                result = self._target.upload(folder, files, f"Step {copy.step}")
            except Exception as error:
                self._report(copy, error)
            else:
                self._pushed = copy
                self.message = f"step {copy.step}: {result}"
            if copy is self._pushed or copy is not self._newest:
                copy.discard()

    def _take(self) -> "_Copy | None":
        """The next to upload; None ends the thread."""
        with self._lock:
            copy, self._waiting = self._waiting, None
            if copy is None:
                self._thread = None
            return copy

    def _report(self, copy: "_Copy", error: Exception) -> None:
        target = self._target
        command = push_command(
            copy.folder, target.repo_id, public=target.public, revision=target.revision
        )
        reason = shorten(str(error)) or type(error).__name__
        self.message = f"step {copy.step} is not on the Hub: {reason}. To push it: {command}"


class _Copy:
    """A checkpoint as it was when it was submitted, beside it on the same disk."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self.path: Path | None = None

    def make(self) -> None:
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=self.folder.parent))
        self.path = path
        for source in shared_files(self.folder):
            target = path / source.relative_to(self.folder)
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
    """Remove copies that a killed run left; only one run at a time has this folder."""
    for path in folder.glob(_PREFIX + "*"):
        shutil.rmtree(path, ignore_errors=True)
