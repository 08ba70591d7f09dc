"""Subprocesses with a time limit, which never outlive their test.

The children of a launcher keep its pipes open after it is killed, so `subprocess.run` with a
timeout would wait for them forever. Here a process and its children are killed as a group.
"""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

LIMIT_S = 180
# Between SIGABRT, at which the stacks are written, and SIGKILL.
_STACKS_S = 10


@contextmanager
def started(
    command: Sequence[str | Path], *, env: dict[str, str] | None = None, **options: Any
) -> Iterator[subprocess.Popen[Any]]:
    """A running process; it and its children are killed at the end of the block."""
    env = {**(os.environ if env is None else env), "PYTHONFAULTHANDLER": "1"}
    with subprocess.Popen(command, env=env, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run_process(
    command: Sequence[str | Path],
    *,
    timeout: float = LIMIT_S,
    env: dict[str, str] | None = None,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with captured text output.

    After `timeout` seconds the test fails with the output and the Python stacks of every process.
    """
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with started(command, env=env, cwd=cwd, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            written = "\n".join(map(str, _stacks(process)))
            pytest.fail(f"{command} took more than {timeout} s:\n{written}")
    return subprocess.CompletedProcess(command, process.returncode, output, errors)


@contextmanager
def started_ranks(
    command: Sequence[str | Path], count: int = 2, *, env: dict[str, str], **options: Any
) -> Iterator[list[subprocess.Popen[Any]]]:
    """The ranks of one run on the CPU, started without a launcher, as srun does."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    common = {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
    }  # fmt: skip
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    command,
                    env=env | common | {"RANK": rank, "LOCAL_RANK": rank},
                    **options,
                    **pipes,
                )
            )
            for rank in map(str, range(count))
        ]


def _stacks(process: "subprocess.Popen[str]") -> tuple[str, str]:
    """Output and errors of the processes, with the stacks that faulthandler writes at SIGABRT.

    One process at a time: they share a pipe, and faulthandler writes in small pieces.
    """
    parent = psutil.Process(process.pid)
    for one in [parent, *parent.children(recursive=True)]:
        with suppress(psutil.NoSuchProcess):
            one.send_signal(signal.SIGABRT)
            until = time.monotonic() + _STACKS_S
            while one.status() != psutil.STATUS_ZOMBIE and time.monotonic() < until:
                time.sleep(0.01)
    try:
        return process.communicate(timeout=_STACKS_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()
