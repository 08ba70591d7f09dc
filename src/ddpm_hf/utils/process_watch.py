"""Watch over the processes of a launch: ranks that hang, and a launcher that was killed."""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import PurePath
from typing import Any

HANG_S = 300.0
"""Seconds without a heartbeat after which a rank counts as hanging."""
_BEAT_S = 1.0
_LEAVE_S = 5.0
_LEFT = "-1"
# Names under which `accelerate launch` runs.
_LAUNCHERS = {
    "accelerate",
    "accelerate-launch",
    "accelerate.commands.accelerate_cli",
    "accelerate.commands.launch",
}
_watching = threading.Lock()


def watch_launcher() -> None:
    """Send this process SIGTERM when its launcher is killed, which could not end it."""
    launcher = os.getppid()
    if not is_launcher(launcher):
        return

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_BEAT_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def is_launcher(parent: int) -> bool:
    """Whether the parent of this process is torchrun or `accelerate launch`.

    `accelerate launch` sets the same variables for one process as a user may set in a shell, which
    a command outlives under `nohup`. Therefore the command line of the parent counts.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return True
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return False
    import psutil

    with suppress(psutil.Error):
        words = psutil.Process(parent).cmdline()
        return not _LAUNCHERS.isdisjoint(PurePath(word).name.removesuffix(".exe") for word in words)
    return False


def watch_ranks(rank: int, num_processes: int) -> None:
    """End this process when another rank hangs or has ended; finished work is on disk."""
    if num_processes > 1 and _watching.acquire(blocking=False):
        _RankWatch(rank, num_processes).start()


class _RankWatch:
    """Counts the beats of all ranks in the store of the process group.

    The timeout of the group cannot be used: a rank waits at the end for as long as the others
    compute. Beats are counted, not seconds, because all ranks may be suspended and continued. The
    store is on the first rank: if that rank has ended or hangs, no beat of this one is answered.
    """

    def __init__(self, rank: int, num_processes: int) -> None:
        self.rank, self.num_processes = rank, num_processes
        self._seen: dict[int, tuple[int, int]] = {}  # beat of each rank, and own beat at that time
        self._num_unanswered = 0
        self._is_exiting = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def start(self) -> None:
        """Start to beat and to watch, until the process group is destroyed."""
        self._thread.start()
        atexit.register(self._leave)
        threading.Thread(target=self._watch, daemon=True).start()

    def _beat(self) -> None:
        from torch import distributed as dist

        store: Any = dist.distributed_c10d._get_default_store()
        count = 0
        while dist.is_initialized() and not self._is_exiting.is_set():
            count += 1
            with suppress(RuntimeError):  # of a store that has ended
                self._exchange(store, count)
                self._num_unanswered = 0
            self._is_exiting.wait(_BEAT_S)
        with suppress(RuntimeError):
            store.set(_key(self.rank), _LEFT)  # the others need not wait for this rank

    def _exchange(self, store: Any, count: int) -> None:
        store.set(_key(self.rank), str(count))
        for other in range(self.num_processes):
            beat = int(store.get(_key(other))) if store.check([_key(other)]) else 0
            before, since = self._seen.setdefault(other, (beat, count))
            if beat != before:
                self._seen[other] = beat, count
            elif beat != int(_LEFT) and (count - since) * _BEAT_S > HANG_S:
                _end(f"rank {other} of {self.num_processes} processes has ended or hangs")

    def _watch(self) -> None:
        # A request to the store never returns if the process that holds it hangs.
        while self._thread.is_alive():
            time.sleep(_BEAT_S)
            self._num_unanswered += 1
            if self._num_unanswered * _BEAT_S > HANG_S:
                _end(f"the first of {self.num_processes} processes has ended or hangs")
        _watching.release()

    def _leave(self) -> None:
        # A thread in a request to the store aborts an interpreter that is shutting down.
        self._is_exiting.set()
        self._thread.join(_LEAVE_S)


def _key(rank: int) -> str:
    return f"ddpm_hf/beat/{rank}"


def _end(reason: str) -> None:
    print(
        f"ddpm-hf: error: {reason}: no answer in {HANG_S:g} s; repeat the command to resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
