"""Stopping on request: SIGTERM and SIGINT let the update finish and the state be saved."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist


class StopSignal:
    """While entered, the first SIGTERM or SIGINT is noted; a second one ends the process at once.

    Attributes:
        received: the signal's number, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}
        self._group: Any = None

    def __enter__(self) -> Self:
        # Python delivers signals to the main thread only, and only there may handlers be set.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        if dist.is_available() and dist.is_initialized():
            # On the CPU, so that agreeing does not make the host wait for the accelerator.
            self._group = dist.new_group(backend="gloo")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        for each, handler in self._previous.items():
            signal.signal(each, handler)

    def agreed(self) -> bool:
        """Whether any process was asked to stop; the same answer on all of them."""
        if self._group is not None:
            number = torch.tensor(self.received or 0)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
            self.received = int(number) or None
        return self.received is not None
