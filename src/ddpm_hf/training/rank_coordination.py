"""Rank coordination and hang detection for the processes of one training run."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from torch.nn.parallel import DistributedDataParallel

from ddpm_hf.training.errors import TrainingError
from ddpm_hf.training.signals import StopSignal, is_under_a_launcher
from ddpm_hf.utils import shared_work

T = TypeVar("T")

_HEARTBEAT_S = 1.0
_ANSWER_S = 2.0  # for requests to the store of the process group
_ROLL_CALL_S = 10.0
_POLL_S = 0.1
_RESULT = "ddpm_hf/missing"  # key of the result in the store
_LAUNCHER_S = 2.0  # for the signal of a launcher, which looks for ended processes every 0.1 s


class ProcessError(TrainingError):
    """Another rank has ended or hangs.

    Attributes:
        is_reporting_rank: whether this rank prints the error: the lowest rank that is alive.
    """

    def __init__(self, message: str, is_reporting_rank: bool) -> None:
        super().__init__(message)
        self.is_reporting_rank = is_reporting_rank


def on_main_process(
    process: Accelerator | PartialState, action: Callable[[], T], timeout_s: float = 300.0
) -> T | None:
    """Run `action` on the main process; return its result there and None on other ranks.

    Adds hang detection to `shared_work.on_main_process`: the other ranks wait without a time limit
    while the main process sends heartbeats. The result is not pickled.

    Args:
        process: rank and number of processes.
        action: a ValueError or OSError that it raises is raised on all ranks.
        timeout_s: seconds without a heartbeat after which the main process counts as hanging.
    Raises:
        ProcessError: on the remaining ranks, if a rank has ended or the main process hangs.
    """
    if process.num_processes == 1:
        return action()
    results: list[T] = []
    with name_missing_ranks(process, timeout_s), _gloo_group(timeout_s) as group:

        def act() -> None:
            with _heartbeat(group):
                results.append(action())

        if not process.is_main_process:
            _wait_for_main_process(group)
        shared_work.on_main_process(PartialState(), act)
    return results[0] if results else None


def main_first(
    process: Accelerator | PartialState, action: Callable[[], T], timeout_s: float = 300.0
) -> T:
    """Run `action` on the main process, then on the other ranks, which find its cached result.

    Args and errors as for `on_main_process`.
    """
    result = on_main_process(process, action, timeout_s)
    return action() if result is None else result


@contextmanager
def _gloo_group(timeout_s: float) -> Iterator[Any]:
    """A process group on the CPU, where waiting ranks do not hit the timeout of NCCL."""
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    yield group
    dist.destroy_process_group(group)


@contextmanager
def _heartbeat(group: Any) -> Iterator[None]:
    """Send heartbeats from a thread until the block ends; on the main process."""
    is_over = threading.Event()

    def beat() -> None:
        with suppress(RuntimeError):  # a rank has ended; the last broadcast below raises too
            while not is_over.wait(_HEARTBEAT_S):
                _broadcast_is_over(False, group)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        _broadcast_is_over(True, group)


def _wait_for_main_process(group: Any) -> None:
    while not _broadcast_is_over(False, group):
        pass


def _broadcast_is_over(value: bool, group: Any) -> bool:
    """The `value` of the main process, on all ranks."""
    is_over = torch.tensor(value)
    dist.broadcast(is_over, 0, group=group)
    return bool(is_over)


def roll_call_s(timeout_s: float) -> float:
    """Largest delay in seconds between ranks that notice the same timeout.

    Longer than an update, because ranks may be one update apart. With `_ANSWER_S`, a lost rank is
    named within twice the timeout.
    """
    return min(timeout_s, _ROLL_CALL_S)


@contextmanager
def name_missing_ranks(process: Accelerator | PartialState, timeout_s: float) -> Iterator[None]:
    """Turn a failed collective operation into a ProcessError that names the missing ranks.

    Raises:
        ProcessError: on every remaining rank, with the same ranks.
    """
    try:
        yield
    except RuntimeError as error:
        if process.num_processes == 1 or not _is_lost_connection(error):
            raise
        # Without a timeout, a closed connection shows that a process has ended; other ranks may
        # notice it later. Gloo says "Timed out", NCCL "timeout".
        has_ended = not re.search("timed out|timeout", str(error), re.IGNORECASE)
        missing = _missing_ranks(process.process_index, process.num_processes, has_ended, timeout_s)
        remaining = [rank for rank in range(process.num_processes) if rank not in missing]
        which = f"rank {', '.join(map(str, missing))}" if missing else "one"
        fate, advice = "has ended", ""
        if not has_ended or len(missing) != 1:
            fate = f"has ended or hangs: no answer in {timeout_s:g} s"
            advice = "; if the process was only slow, raise `ddp_timeout`"
        raise ProcessError(
            f"{which} of {process.num_processes} processes {fate}. Run the same command again to "
            f"resume from the last checkpoint{advice}",
            is_reporting_rank=process.process_index == min(remaining),
        ) from None


@contextmanager
def leave_to_launcher(stop: StopSignal) -> Iterator[None]:
    """End this rank without a roll call if the launcher ends it because another rank has ended.

    torchrun names that rank and restarts all ranks, if `--max-restarts` permits.

    Raises:
        ProcessError: if a collective operation fails and the launcher sends a signal.
    """
    try:
        yield
    except RuntimeError as error:
        is_lost = is_under_a_launcher() and _is_lost_connection(error)
        if not (is_lost and stop.wait(_LAUNCHER_S)):
            raise
        raise ProcessError(
            "another process has ended; the last checkpoint is complete", is_reporting_rank=False
        ) from None


def _is_lost_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _missing_ranks(rank: int, num_processes: int, has_ended: bool, timeout_s: float) -> list[int]:
    """The ranks that do not report to the store of the process group; the same on all ranks.

    A rank with a connection to a process that ended notices it at once, and another rank only by
    its timeout. Therefore the first one waits for the answer of the other one, and the first result
    holds for all ranks.

    Differs from `torch.distributed.monitored_barrier` (torch 2.13, 3 ranks on gloo), which names a
    hanging rank on rank 0 only, while the other ranks name rank 0; which names no rank if one was
    killed ("Connection closed by peer"); and which needs a group that did not fail. Here every
    remaining rank has to know which one reports the error.

    Args:
        rank: this rank.
        num_processes: number of ranks.
        has_ended: whether a process has ended. If not, the operation timed out, and all ranks that
            wait for it notice it at the same time.
        timeout_s: timeout of collective operations.
    """
    store = dist.distributed_c10d._get_default_store()  # on the launcher or rank 0
    late_s = roll_call_s(timeout_s)
    wait_s = late_s + (timeout_s if has_ended else 0)
    results = [[0]]  # if the store does not answer

    def call() -> None:
        with suppress(dist.DistError):
            results.append(_call_roll(store, rank, range(num_processes), has_ended, wait_s))

    # In a thread: a request never returns if the process that holds the store hangs.
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(wait_s + _ANSWER_S)
    missing = results[-1]
    if rank == 0:  # the store ends with this process: the others read the result first
        readers = [f"ddpm_hf/read/{r}" for r in range(num_processes) if r not in missing]
        with suppress(dist.DistError):
            store.wait(readers, timedelta(seconds=late_s))
    return missing


def _call_roll(
    store: Any, rank: int, ranks: Sequence[int], has_ended: bool, wait_s: float
) -> list[int]:
    """The ranks that do not answer within `wait_s` seconds, or the result of an earlier rank."""
    store.set(f"ddpm_hf/alive/{rank}", "")
    start, missing = time.monotonic(), ranks
    while True:
        missing = [r for r in missing if not store.check([f"ddpm_hf/alive/{r}"])]
        waited_s = time.monotonic() - start
        # If all others answer, the last one is the process that has ended.
        is_known = len(missing) <= int(has_ended) and waited_s > _ANSWER_S
        if not missing or is_known or waited_s > wait_s or store.check([_RESULT]):
            break
        time.sleep(_POLL_S)
    result = json.loads(store.compare_set(_RESULT, "", json.dumps(missing)))  # sets it only once
    store.set(f"ddpm_hf/read/{rank}", "")
    return result  # type: ignore[no-any-return]


def free_gradient_reducer(model: torch.nn.Module) -> None:
    """Free the gradient reducer of DistributedDataParallel before the process group.

    The reducer holds the process group. If it holds the last reference, it is freed with the GIL
    held while it joins gloo's threads, which need the GIL to free their last tensors: the process
    never ends (pytorch/pytorch#56297).
    """
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            module.reducer = module.logger = None  # type: ignore[assignment]


def destroy_process_group(after_error: bool) -> None:
    """Destroy the process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return
    # After an error NCCL would wait for operations of the other ranks; it ends with the process.
    if not after_error or dist.get_backend() == "gloo":
        dist.destroy_process_group()
