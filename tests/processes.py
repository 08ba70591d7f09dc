"""Subprocesses with a time limit, which never outlive their test.

The children of a launcher keep its pipes open after it is killed, so `subprocess.run` with a
timeout would wait for them forever. Here a process and its children are killed as a group.

`forked`, `run_forked` and `forked_ranks` run Python in a process that is forked from a server with
torch and diffusers imported, which saves the 5 s of these imports. `started`, `run_process` and
`started_ranks` start a new interpreter, for tests of what happens before or during the imports.
"""

import atexit
import faulthandler
import gc
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest

LIMIT_S = 180
# Between SIGABRT, at which the stacks are written, and SIGKILL.
_STACKS_S = 10

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch.distributed",
        "torch.utils.data",
        "accelerate",
        "datasets",
        "diffusers.models.unets.unet_2d",
        "diffusers.pipelines.ddpm.pipeline_ddpm",
        "diffusers.schedulers.scheduling_ddim",
        "diffusers.training_utils",
        "matplotlib.figure",
        "torch.utils.tensorboard",
    ]
)


class Forked:
    """A Python process forked from the server, with the interface of `subprocess.Popen`.

    Args:
        arguments: the arguments of `python`: `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`.
        merged: write standard error to standard output.
    """

    def __init__(
        self,
        arguments: Sequence[str | Path],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        merged: bool = False,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._output = self._folder / "stdout"
        self._errors = self._output if merged else self._folder / "stderr"
        self._process = _SERVER.Process(
            target=_run_python,
            args=(
                [str(argument) for argument in arguments],
                dict(os.environ if env is None else env),
                str(cwd or Path.cwd()),
                (self._output, self._errors),
            ),
        )
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        """The exit status, or minus the number of the signal; None while the process runs."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """Same as `returncode`."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to the process alone."""
        os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Wait for the end and return the exit status.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout)
        return self.returncode

    def communicate(self, timeout: float = LIMIT_S) -> tuple[str, str]:
        """Wait for the end; standard output and standard error."""
        self.wait(timeout)
        return self.output(), self._errors.read_text() if self._errors.exists() else ""

    def output(self) -> str:
        """Standard output so far."""
        return self._output.read_text() if self._output.exists() else ""

    def close(self) -> None:
        """Kill the process and its children."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _run_python(
    arguments: list[str], env: dict[str, str], cwd: str, outputs: tuple[Path, Path]
) -> None:
    """Do in a forked process what `python ARGUMENTS` does in a new one."""
    os.setsid()
    gc.freeze()  # a collection skips the objects of the imported libraries
    os.fsync = lambda descriptor: None  # as in conftest.py
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    faulthandler.enable()
    os.environ.clear()
    os.environ.update(env)
    if "HF_DATASETS_CACHE" in env:  # which datasets reads when it is imported
        datasets.config.HF_DATASETS_CACHE = Path(env["HF_DATASETS_CACHE"])
    os.chdir(cwd)
    first, *rest = arguments
    places = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:0] = [cwd if first in ("-m", "-c") else str(Path(first).parent), *places]
    try:
        if first == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


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


@contextmanager
def forked(
    arguments: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
    merged: bool = False,
) -> Iterator[Forked]:
    """`python ARGUMENTS`, forked; killed with its children at the end of the block."""
    process = Forked(arguments, env, cwd, merged)
    try:
        yield process
    finally:
        process.close()


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
    return _finished(started(command, env=env, cwd=cwd, **pipes), command, timeout)


def run_forked(
    arguments: Sequence[str | Path],
    *,
    timeout: float = LIMIT_S,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> subprocess.CompletedProcess[str]:
    """The same as `run_process([sys.executable, *arguments])`, forked."""
    return _finished(forked(arguments, env=env, cwd=cwd), arguments, timeout)


def _finished(
    context: AbstractContextManager["subprocess.Popen[str] | Forked"],
    command: Sequence[str | Path],
    timeout: float,
) -> subprocess.CompletedProcess[str]:
    with context as process:
        try:
            output, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            written = "\n".join(map(str, _stacks(process)))
            pytest.fail(f"{command} took more than {timeout} s:\n{written}")
        return subprocess.CompletedProcess(command, process.returncode or 0, output, errors)


@contextmanager
def started_ranks(
    command: Sequence[str | Path], count: int = 2, *, env: Mapping[str, str], **options: Any
) -> Iterator[list[subprocess.Popen[Any]]]:
    """The ranks of one run on the CPU, started without a launcher, as srun does."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with ExitStack() as stack:
        yield [
            stack.enter_context(started(command, env={**env, **rank}, **options, **pipes))
            for rank in rank_environments(count)
        ]


@contextmanager
def forked_ranks(
    arguments: Sequence[str | Path],
    count: int = 2,
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | Path | None = None,
) -> Iterator[list[Forked]]:
    """The ranks of `python ARGUMENTS` on the CPU, forked, each with one merged output."""
    env = os.environ if env is None else env
    with ExitStack() as stack:
        yield [
            stack.enter_context(forked(arguments, env={**env, **rank}, cwd=cwd, merged=True))
            for rank in rank_environments(count)
        ]


def finish_ranks(arguments: Sequence[str | Path], cache: Path) -> None:
    """Run `python ARGUMENTS` on two ranks, with a cache of features of their own."""
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache / "cache")}
    with forked_ranks(arguments, env=env) as processes:
        outputs = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


def free_port() -> int:
    """A port of this machine that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


def rank_environments(count: int) -> list[dict[str, str]]:
    """The environment variables of each rank."""
    port = free_port()
    common = {
        "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count),
    }  # fmt: skip
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def _stacks(process: "subprocess.Popen[str] | Forked") -> tuple[str, str]:
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
