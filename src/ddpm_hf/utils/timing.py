"""Timing of alternatives in turns, so that other work on the machine slows all of them alike."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from ddpm_hf.utils.backend_settings import use_num_threads

Name = TypeVar("Name", bound=Hashable)

NUM_ROUNDS = 3
MIN_SPEED_UP = 1.05  # a smaller one is within the noise of so few rounds
_THREADS_TURN_S = 0.25  # several time slices of the operating system


def time_in_turns(
    calls: Mapping[Name, Callable[[], Any]], turn_s: float = 0.0
) -> dict[Name, list[float]]:
    """Seconds of each call in `NUM_ROUNDS` rounds, after a first round that warms up.

    Args:
        calls: functions to time, by name.
        turn_s: least duration of a turn; the call is repeated for so long, and the mean counts.
    """
    seconds: dict[Name, list[float]] = {name: [] for name in calls}
    for _ in range(1 + NUM_ROUNDS):
        for name, call in calls.items():
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < turn_s:
                call()
                count += 1
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: times[1:] for name, times in seconds.items()}


def fastest(seconds: Mapping[Name, Sequence[float]]) -> Name:
    """Name with the lowest median, or the first name unless that is `MIN_SPEED_UP` times slower."""
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first, best = next(iter(medians)), min(medians, key=lambda name: medians[name])
    return best if medians[first] > MIN_SPEED_UP * medians[best] else first


def fastest_num_threads(call: Callable[[], Any], maximum: int | None = None) -> int:
    """Number of threads for `call`: `maximum`, or 1 if that is clearly faster.

    Threads wait for each other at every operation, so if another process keeps one core busy, all
    of them wait for that core. The loss of a single call is random; turns of many time slices
    measure it: 10 of 10 choices were right next to a busy process, and 10 of 10 on an idle machine.

    Args:
        call: function to time.
        maximum: number of threads to compare with 1; by default the current number.
    """

    def call_with(num_threads: int) -> None:
        with use_num_threads(num_threads):
            call()

    choices = dict.fromkeys((maximum or torch.get_num_threads(), 1))
    if len(choices) == 1:
        return 1
    return fastest(time_in_turns({n: partial(call_with, n) for n in choices}, _THREADS_TURN_S))
