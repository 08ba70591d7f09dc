"""How many threads of the CPU share an operation, on a machine that may have other work."""

import statistics
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator

from ddpm_hf.diffusion.speed import fastest_num_threads

# "Slow" is half as fast as before, over at least so long and so many updates.
_WHILE_S = 20
_WHILE_UPDATES = 10
# After so many of these spans, a run with fewer threads than it could have asks again.
_SPANS_UNTIL_RETRY = 15


class Threads:
    """The number of threads, measured unless it is asked for or known.

    The last bits of a sum depend on it, so it is part of a run: a checkpoint keeps it, and the
    resumed run goes on with it. It is measured again when updates have been half as fast for a
    while: then something else keeps a core busy, for which all threads wait.

    Args:
        asked: the number that the options give, which then stays.
        before: that of the checkpoint, where a run is resumed.
        accelerator: a GPU needs no threads, and several processes get theirs from their launcher.

    Attributes:
        is_open: whether the number is to be measured before the first update.
    """

    def __init__(self, asked: int | None, before: int | None, accelerator: Accelerator) -> None:
        self._most = torch.get_num_threads()
        alone = accelerator.device.type == "cpu" and accelerator.num_processes == 1
        self._adapts = alone and asked is None and self._most > 1
        self.is_open = self._adapts and before is None
        self._pace = Pace()
        torch.set_num_threads(asked or (before if alone else None) or self._most)

    def choose(self, trial: Callable[[], Any]) -> int:
        """The number with which `trial` is fastest, which is set."""
        number = fastest_num_threads(trial, self._most)
        torch.set_num_threads(number)
        return number

    def should_be_chosen_again(self, seconds: float) -> bool:
        """Whether updates, the last of which took so long, have become slow."""
        has_fewer = torch.get_num_threads() < self._most
        return self._adapts and self._pace.is_slow(seconds, has_fewer)


class Pace:
    """Whether updates have been half as fast as before, for a while."""

    def __init__(self) -> None:
        self._best, self._spans = float("inf"), 0
        self._seconds: list[float] = []  # of the updates of this span

    def is_slow(self, seconds: float, has_fewer: bool = False) -> bool:
        """Take the time of an update into account.

        Args:
            seconds: it took.
            has_fewer: of the threads that it could have: then some minutes are enough to ask again.
        """
        self._seconds.append(seconds)
        if sum(self._seconds) < _WHILE_S or len(self._seconds) < _WHILE_UPDATES:
            return False
        median, self._seconds, self._spans = statistics.median(self._seconds), [], self._spans + 1
        if median > 2 * self._best or (has_fewer and self._spans >= _SPANS_UNTIL_RETRY):
            self._best, self._spans = float("inf"), 0
            return True
        self._best = min(self._best, median)
        return False
