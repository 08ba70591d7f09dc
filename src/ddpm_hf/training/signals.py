"""Stopping on request: a signal lets the update finish and the state be saved."""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

# What people and schedulers send to end a run: kill and Slurm's scancel; Ctrl-C; a terminal or an
# ssh connection that closes; Slurm ahead of a job's time limit. Windows lacks the last two.
_STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]
# `timeout` and shells send a signal to a process and to its group: that is one request.
_SAME_REQUEST_S = 1.0


class StopSignal:
    """While entered, the first of those signals is noted; a second one ends the process at once.

    A signal that was ignored before stays ignored: that is how `nohup` protects a run.

    Args:
        timeout_s: how long the processes of a run wait for each other in `agreed`.

    Attributes:
        received: the signal's number, or None.
        failed: whether one of the processes said in `agreed` that it cannot go on.
    """

    def __init__(self, timeout_s: float = 300.0) -> None:
        self.timeout_s = timeout_s
        self.received: int | None = None
        self.failed = False
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and only there may handlers be set.
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._note)
        if dist.is_available() and dist.is_initialized():
            # On the CPU, so that agreeing does not make the host wait for the accelerator.
            timeout = timedelta(seconds=self.timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
        elif now - self._received_at > _SAME_REQUEST_S and not is_under_a_launcher():
            self._restore()
            signal.raise_signal(number)

    def agreed(self, failed: bool = False) -> bool:
        """Whether any process was asked to stop or has failed; the same answer on all of them."""
        self.failed = failed
        if self._group is not None:
            found = torch.tensor([self.received or 0, failed])
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self._group)
            self.received, self.failed = int(found[0]) or None, bool(found[1])
        return self.received is not None or self.failed


def is_under_a_launcher() -> bool:
    """Whether torchrun, or `accelerate launch` by it, started this process.

    It repeats every signal to its processes, which the terminal has sent to them too, and kills
    those that are still there after 30 s.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ
