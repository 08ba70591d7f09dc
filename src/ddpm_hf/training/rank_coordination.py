"""The processes of a run: the main one goes first, none is waited for in vain, all end in order."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch.nn.parallel import DistributedDataParallel

from ddpm_hf.training.errors import TrainingError

T = TypeVar("T")

# How often the main process tells the others that it is at work.
_PULSE_S = 1.0


class ProcessError(TrainingError):
    """Another process of the run has ended, or stands still.

    Attributes:
        speaks: whether this process is the first of those that are left, and says it for all.
    """

    def __init__(self, message: str, speaks: bool) -> None:
        super().__init__(message)
        self.speaks = speaks


def on_main(
    process: Accelerator | PartialState, action: Callable[[], T], timeout_s: float = 300.0
) -> T | None:
    """`action()` on the main process, None on the others; bad input there is an error on all.

    Without that the others would wait, until the launcher ends them with a page of tracebacks. They
    wait for as long as it takes, while the main process shows that it is alive.

    Raises:
        ProcessError: on the others, if it does not for `timeout_s` seconds.
    """
    if process.num_processes == 1:
        return action()
    result, failure = None, None
    with name_missing_processes(process, timeout_s), _gloo_group(timeout_s) as group:
        with _pulse(process.is_main_process, group):
            if process.is_main_process:
                try:
                    result = action()
                except (ValueError, OSError) as error:
                    failure = error
        failures = [failure]
        dist.broadcast_object_list(failures, group=group)
    if failures[0] is not None:
        raise failures[0]
    return result


def main_first(
    process: Accelerator | PartialState, action: Callable[[], T], timeout_s: float = 300.0
) -> T:
    """`action()` on the main process and then on the others, which find what it has cached."""
    result = on_main(process, action, timeout_s)
    return action() if result is None else result


@contextmanager
def _gloo_group(timeout_s: float) -> Iterator[Any]:
    """All processes, on the CPU: NCCL would count the time that they wait."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    yield group
    dist.destroy_process_group(group)


@contextmanager
def _pulse(is_main: bool, group: Any) -> Iterator[None]:
    """While the main process is inside, it tells the others so; they stay until it is through."""

    def tell(is_done: bool) -> bool:
        done = torch.tensor(is_done)
        dist.broadcast(done, 0, group=group)
        return bool(done)

    def beat() -> None:
        with suppress(RuntimeError):  # one of the others has ended: the last call says so too
            while not through.wait(_PULSE_S):
                tell(False)

    if not is_main:
        while not tell(False):
            pass
        yield
        return
    through, thread = threading.Event(), threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        through.set()
        thread.join()
        tell(True)


def roll_call_s(timeout_s: float) -> float:
    """How long those that are left wait for each other's sign of life when one does not answer.

    Longer than an update takes, by which they may be apart.
    """
    return min(timeout_s, 10.0)


@contextmanager
def name_missing_processes(process: Accelerator | PartialState, timeout_s: float) -> Iterator[None]:
    """Inside, an operation of all processes that fails because of one says which.

    Raises:
        ProcessError: on every process that is left.
    """
    try:
        yield
    except RuntimeError as error:
        if process.num_processes == 1 or not _is_of_the_connection(error):
            raise
        wait_s = roll_call_s(timeout_s)
        missing = _missing_processes(process.process_index, process.num_processes, wait_s)
        left = [rank for rank in range(process.num_processes) if rank not in missing]
        which = f"rank {', '.join(map(str, missing))}" if missing else "one"
        raise ProcessError(
            f"{which} of {process.num_processes} processes has ended, or stands still: no answer "
            f"in {timeout_s:g} s. The same command goes on from the last checkpoint; if it was "
            "only slow, raise ddp_timeout",
            speaks=process.process_index == min(left),
        ) from error


def _is_of_the_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _missing_processes(rank: int, num_processes: int, wait_s: float) -> list[int]:
    """The ranks that give no sign of life."""
    # Not by the process group, which is broken. The launcher keeps the store, or rank 0.
    store = dist.distributed_c10d._get_default_store()
    silent: list[int] = []

    def call() -> None:
        try:
            store.set(f"ddpm_hf/alive/{rank}", "")
            time.sleep(wait_s)
            ranks = range(num_processes)
            silent.extend(r for r in ranks if not store.check([f"ddpm_hf/alive/{r}"]))
        except dist.DistError:
            silent.append(0)

    # In a thread, for the store waits without end where its keeper stands still.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(2 * wait_s)
    return [0] if thread.is_alive() else silent


def free_gradient_reducer(model: torch.nn.Module) -> None:
    """Let `model` forget how its gradients are summed, before the process group is destroyed.

    The reducer of DistributedDataParallel holds the process group. Freed as the last one to do so,
    it waits for gloo's threads with Python's lock in its hands, while they need that lock to free
    their last tensors: the process never ends (pytorch/pytorch#56297).
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.reducer = module.logger = None  # type: ignore[assignment]


def leave_process_group(after_error: bool) -> None:
    """Destroy the process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    # NCCL would wait for what the others, after an error, may never do; it ends with the process.
    if not after_error or dist.get_backend() == "gloo":
        dist.destroy_process_group()
