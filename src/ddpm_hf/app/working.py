"""Work as generators: pace of their progress, time limit, and threads that end when asked to."""

import threading
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import closing
from typing import Any, TypeVar

import torch

from ddpm_hf.app.request_errors import RequestError

T = TypeVar("T")
UPDATE_INTERVAL_S = 0.2
TIME_LIMIT_S = 600


class Pace:
    """Tells when to report progress, at most every `interval_s` seconds.

    A report takes longer than a step of a small network, and a closed generator ends at a report.
    """

    def __init__(self, interval_s: float = UPDATE_INTERVAL_S) -> None:
        self._interval_s, self._last = interval_s, time.monotonic()

    def is_due(self) -> bool:
        """Whether it is time; if so, the next interval starts."""
        now = time.monotonic()
        is_due = now - self._last >= self._interval_s
        self._last = now if is_due else self._last
        return is_due


class WorkStopped(Exception):
    """Raised in the thread to end its work."""


def watched(network: torch.nn.Module, work: Callable[[], T]) -> Generator[int, None, T]:
    """Run a function that calls a network, in a thread.

        result = yield from watched(unet, lambda: pipe.inpaint(...))

    Args:
        network: where the work can be ended: before each of its calls.
        work: the function.
    Yields:
        the number of calls so far, a few times a second.
    Returns:
        the result of the function.
    Raises:
        ValueError: after `TIME_LIMIT_S` seconds. Errors of the function are passed on.
    """
    calls, is_stopped, start = 0, threading.Event(), time.monotonic()
    worker: list[int] = []

    def before_call(*_: object) -> None:
        nonlocal calls
        if threading.get_ident() not in worker:
            return
        if is_stopped.is_set():
            raise WorkStopped
        calls += 1

    def run() -> T:
        worker.append(threading.get_ident())
        return work()

    hook = network.register_forward_pre_hook(before_call)
    try:
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(run)
            try:
                while wait([future], UPDATE_INTERVAL_S).not_done:
                    check_time(start)
                    yield calls
            finally:
                is_stopped.set()
        return future.result()
    finally:
        hook.remove()


def with_progress(
    work: Generator[int, None, T], shown: Callable[[int], Any]
) -> Generator[Any, None, T]:
    """The work of another generator.

        result = yield from with_progress(watched(unet, work), lambda calls: f"{calls} calls")

    Args:
        work: yields the number of calls so far.
        shown: what to yield for it.
    """
    with closing(work):
        while True:
            try:
                calls = next(work)
            except StopIteration as end:
                result: T = end.value
                return result
            yield shown(calls)


def check_time(start: float) -> None:
    """Raise ValueError if the work that began at `start` takes too long."""
    if time.monotonic() - start > TIME_LIMIT_S:
        raise RequestError("time", seconds=TIME_LIMIT_S)
