"""Ranks of a command that hang or were killed, and a launcher that was killed."""

import os
import signal
import sys
import time

import pytest
from processes import started, started_ranks

CODE = """
import sys, time
from ddpm_hf import process_watch
process_watch.HANG_S = 5.0
from ddpm_hf.shared_work import distributed_state, on_main_process
state = distributed_state()
on_main_process(state, lambda: None)
print("ready", flush=True)
time.sleep(float(sys.argv[1]) * state.process_index)
state.wait_for_everyone()
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("rank", "number"), [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (1, signal.SIGKILL)]
)
def test_a_rank_that_hangs_or_is_killed_ends_the_others_within_twice_the_timeout(rank, number):
    command = [sys.executable, "-c", CODE, "60"]
    with started_ranks(command, env=dict(os.environ)) as processes:
        for process in processes:
            assert process.stdout.readline().strip() == "ready"
        processes[rank].send_signal(number)
        start = time.monotonic()
        other = processes[1 - rank]
        output, _ = other.communicate(timeout=60)
        assert time.monotonic() - start < 12
        assert other.returncode not in (0, None), output


def test_a_rank_may_wait_for_longer_than_the_timeout():
    with started_ranks([sys.executable, "-c", CODE, "12"], env=dict(os.environ)) as processes:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs


LAUNCHER = """
import os, subprocess, sys, time
worker = '''
import time
from ddpm_hf.process_watch import watch_launcher
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
    with started(
        [sys.executable, "-c", LAUNCHER], env=environment, stdout=-1, text=True
    ) as launcher:
        worker = int(launcher.stdout.readline())
        assert launcher.stdout.readline().strip() == "ready"
        launcher.kill()
        launcher.wait()
        until = time.monotonic() + 20
        while time.monotonic() < until and _is_running(worker):
            time.sleep(0.2)
        assert not _is_running(worker)


def _is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
