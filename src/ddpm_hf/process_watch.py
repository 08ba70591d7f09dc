"""Watch over the processes of a launch: ranks that hang, and a launcher that was killed."""

import atexit
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any

HANG_S = 300.0
"""Seconds without a heartbeat after which a rank counts as hanging."""
_BEAT_S = 1.0
_LEAVE_S = 5.0
_LEFT = "-1"
_watching = threading.Lock()


def watch_launcher() -> None:
    """Send this process SIGTERM when its launcher is killed, which could not end it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_BEAT_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def watch_ranks(rank: int, num_processes: int) -> None:
    """End this process when another rank hangs or has ended; finished work is on disk.

    Each rank counts in the store of the process group. The timeout of the group cannot be used: a
    rank waits at the end for as long as the others compute. Beats are counted, not seconds, because
    all ranks may be suspended and continued. The store is on the first rank: if that rank has ended
    or hangs, no beat of this one is answered.
    """
    if num_processes == 1 or not _watching.acquire(blocking=False):
        return
    unanswered, is_exiting = [0], threading.Event()

    def beat() -> None:
        from torch import distributed as dist

        store: Any = dist.distributed_c10d._get_default_store()
        counts: dict[int, tuple[int, int]] = {}
        count = 0
        while dist.is_initialized() and not is_exiting.is_set():
            count += 1
            with suppress(RuntimeError):
                store.set(f"ddpm_hf/beat/{rank}", str(count))
                for other in range(num_processes):
                    key = f"ddpm_hf/beat/{other}"
                    seen = int(store.get(key)) if store.check([key]) else 0
                    if seen == int(_LEFT):
                        continue
                    if counts.setdefault(other, (seen, count))[0] != seen:
                        counts[other] = seen, count
                    elif (count - counts[other][1]) * _BEAT_S > HANG_S:
                        _end(f"rank {other} of {num_processes} processes has ended or hangs")
                unanswered[0] = 0
            is_exiting.wait(_BEAT_S)
        with suppress(RuntimeError):  # the process that holds the store may have ended
            store.set(f"ddpm_hf/beat/{rank}", _LEFT)  # the others need not wait for this rank

    thread = threading.Thread(target=beat, daemon=True)

    def leave() -> None:
        # A thread in a request to the store aborts an interpreter that is shutting down.
        is_exiting.set()
        thread.join(_LEAVE_S)

    def watch() -> None:
        # A request to the store never returns if the process that holds it hangs.
        while thread.is_alive():
            time.sleep(_BEAT_S)
            unanswered[0] += 1
            if unanswered[0] * _BEAT_S > HANG_S:
                _end(f"the first of {num_processes} processes has ended or hangs")
        _watching.release()

    thread.start()
    atexit.register(leave)
    threading.Thread(target=watch, daemon=True).start()


def _end(reason: str) -> None:
    print(
        f"ddpm-hf: error: {reason}: no answer in {HANG_S:g} s; repeat the command to resume",
        file=sys.stderr,
        flush=True,
    )
    os._exit(1)
