"""No test can stand still: what strikes when one does, and that nothing escapes it."""

import ast
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import run_process

ROOT = Path(__file__).parents[1]

# The first is stopped where Python runs; the second holds the interpreter's lock, so that no
# Python code can end it.
HANGING = """
import ctypes, time
def test_sleeps():
    time.sleep(600)
def test_holds_the_lock():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
def test_is_fine():
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["alone", "with a worker"])
def test_a_test_that_stands_still_fails_with_its_stack(tmp_path, workers):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    limits = ("-o", "timeout=1", "-o", "faulthandler_timeout=3", "-p", "no:cacheprovider")
    configuration = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path))
    command = [sys.executable, "-m", "pytest", "-v", *configuration, *limits, *workers]
    done = run_process([*command, "test_hanging.py"], cwd=tmp_path)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert re.search(r"FAILED.*test_sleeps|test_sleeps FAILED", said)
    assert re.search(r'File ".*test_hanging.py", line 8 in test_holds_the_lock', said)
    if workers:  # what a worker that had to be killed leaves is run by another one
        assert "Timeout (>1.0s)" in said
        assert re.search(r"PASSED.*test_is_fine", said)
        assert "1 passed" in said


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def test_a_process_past_its_time_ends_with_its_children_and_shows_their_stacks():
    began = time.monotonic()
    # Time for two interpreters to begin on a busy machine.
    with pytest.raises(pytest.fail.Exception, match="took more than 4 s") as failure:
        run_process([sys.executable, "-c", PARENT], timeout=4)
    said = str(failure.value)
    assert said.count('File "<string>", line') >= 2  # parent and child
    child = int(re.search(r"^(\d+)$", said, re.MULTILINE)[1])
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 60
        time.sleep(0.01)


def test_every_process_of_a_test_has_a_time_limit():
    """Those of `processes` do; `subprocess` itself is for what starts no further ones."""
    without = []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.stem == "processes":
                continue
            called = ast.unparse(node.func)
            limited = any(keyword.arg == "timeout" for keyword in node.keywords)
            if called == "subprocess.Popen" or (called.startswith("subprocess.") and not limited):
                without.append(f"{path.name}:{node.lineno}: {called}")
    assert without == []
