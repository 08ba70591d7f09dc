"""Stop signals: the current update is finished and saved before the run ends."""

import os
import signal
import threading
import time
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

# kill and Slurm's scancel; Ctrl-C; a terminal or ssh connection that closes; Slurm before a job's
# time limit. Windows lacks the last two.
_STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
]
# `timeout` and shells signal a process and its group: two signals for one request.
_SAME_REQUEST_S = 1.0


class StopSignal:
    """Context manager that records the first stop signal; a second one ends the process at once.

    Signals that were ignored before stay ignored, as `nohup` requires.

    Args:
        timeout_s: seconds that the ranks wait for each other in `synchronize`.

    Attributes:
        received: number of the signal, or None.
        failed: whether any rank reported a failure to `synchronize`.
    """

    def __init__(self, timeout_s: float = 300.0) -> None:
        self.timeout_s = timeout_s
        self.received: int | None = None
        self.failed = False
        self._received_at = 0.0
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> Self:
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            for number in _STOP_SIGNALS:
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        if dist.is_available() and dist.is_initialized():
            # On the CPU, so that `synchronize` does not wait for the accelerator.
            timeout = timedelta(seconds=self.timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._restore_handlers()

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = number, now
        elif now - self._received_at > _SAME_REQUEST_S and not is_under_a_launcher():
            self._restore_handlers()
            signal.raise_signal(number)

    def wait(self, timeout_s: float) -> bool:
        """Whether this process has received a signal or receives one within `timeout_s` s."""
        until = time.monotonic() + timeout_s
        while self.received is None and time.monotonic() < until:
            time.sleep(0.05)
        return self.received is not None

    def synchronize(self, failed: bool = False) -> bool:
        """Whether any rank received a signal or has `failed`; the same answer on all ranks."""
        self.failed = failed
        if self._group is not None:
            state = torch.tensor([self.received or 0, failed])
            dist.all_reduce(state, dist.ReduceOp.MAX, group=self._group)
            self.received, self.failed = int(state[0]) or None, bool(state[1])
        return self.received is not None or self.failed


def is_under_a_launcher() -> bool:
    """Whether torchrun, or `accelerate launch` through it, started this process.

    The launcher forwards every signal to its processes, which the terminal has signalled already,
    and kills those that are left after 30 s.
    """
    return "TORCHELASTIC_RUN_ID" in os.environ
