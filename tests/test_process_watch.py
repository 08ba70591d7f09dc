"""Ranks of a command that hang or were killed, and a launcher that was killed."""

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil
import pytest
from processes import LIMIT_S, forked, forked_ranks, started

from ddpm_hf.utils.process_watch import is_launcher

pytestmark = pytest.mark.slow
HANG_S = 5.0
CODE = f"""
import sys, time
from ddpm_hf.utils import process_watch
process_watch.HANG_S = {HANG_S}
from ddpm_hf.utils.shared_work import distributed_state, on_main_process
state = distributed_state()
on_main_process(state, lambda: None)
print("ready", flush=True)
time.sleep(float(sys.argv[1]) * state.process_index)
state.wait_for_everyone()
print("done", flush=True)
"""


def wait_until(holds, limit_s=LIMIT_S):
    until = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_ranks_that_hang_or_are_killed_end_the_others_and_slow_ones_do_not():
    """Five pairs of ranks side by side, the last one without a loss."""
    losses = [(lost, how) for lost in (0, 1) for how in (signal.SIGSTOP, signal.SIGKILL)]
    with ExitStack() as stack:
        pairs = [stack.enter_context(forked_ranks(["-c", CODE, "60"])) for _ in losses]
        slow = stack.enter_context(forked_ranks(["-c", CODE, f"{1.5 * HANG_S}"]))
        wait_until(lambda: all("ready" in rank.output() for pair in pairs for rank in pair))
        for pair, (lost, number) in zip(pairs, losses, strict=True):
            pair[lost].send_signal(number)
        start = time.monotonic()
        for pair, (lost, _) in zip(pairs, losses, strict=True):
            output, _ = pair[1 - lost].communicate(timeout=60)
            assert pair[1 - lost].returncode not in (0, None), output
        assert time.monotonic() - start < 2 * HANG_S + 2
        outputs = [process.communicate(timeout=120)[0] for process in slow]
        assert [process.returncode for process in slow] == [0, 0], outputs


LAUNCHER = """
import os, subprocess, sys, time
worker = '''
import time
from ddpm_hf.utils.process_watch import watch_launcher
watch_launcher()
print("ready", flush=True)
time.sleep(100)
'''
process = subprocess.Popen([sys.executable, "-c", worker], start_new_session=True)
print(process.pid, flush=True)
time.sleep(100)
"""


def test_the_workers_of_a_killed_launcher_end():
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "1"}
    with forked(["-c", LAUNCHER], env=environment) as launcher:
        wait_until(lambda: "ready" in launcher.output())
        worker = int(launcher.output().split()[0])
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(LIMIT_S)
        wait_until(lambda: not _is_running(worker), 20)


WORKER = """
import os, sys, time
from pathlib import Path
from ddpm_hf.utils.process_watch import watch_launcher
watch_launcher()
Path(sys.argv[1]).write_text(f"{os.getpid()} ")
time.sleep(100)
"""


def test_the_worker_of_a_killed_launch_of_one_process_ends(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    command = [*launch, "--mixed_precision", "no", "worker.py", "pid"]
    pid = tmp_path / "pid"
    with started(command, cwd=tmp_path) as launcher:
        wait_until(lambda: pid.exists() and pid.read_text().endswith(" "))
        worker = int(pid.read_text())
        assert _is_running(worker)
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(LIMIT_S)
        wait_until(lambda: not _is_running(worker), 20)


def test_only_the_command_line_of_a_launcher_makes_a_parent_a_launcher(monkeypatch, tmp_path):
    """A shell with the variables of `accelerate launch` may end before its command."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    (tmp_path / "accelerate").write_text("input()")
    (tmp_path / "accelerate_photos").write_text("input()")
    for name, expected in (("accelerate", True), ("accelerate_photos", False)):
        command = [sys.executable, str(tmp_path / name), "launch"]
        with started(command, stdin=subprocess.PIPE) as parent:
            wait_until(psutil.Process(parent.pid).cmdline)  # empty just after the start
            assert is_launcher(parent.pid) is expected
            monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
            assert not is_launcher(parent.pid)
            monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert not is_launcher(parent.pid)  # it has ended


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
