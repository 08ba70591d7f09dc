"""Time limits of the tests: a hanging test fails with its stack."""

import ast
import re
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import run_process

ROOT = Path(__file__).parents[1]

# The first hangs in Python code. The second hangs with the GIL held, so no Python code can end it.
HANGING = """
import ctypes, time
def test_sleeps():
    time.sleep(600)
def test_holds_the_lock():
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2):
        ctypes.PyDLL(None).pthread_mutex_lock(mutex)
def test_is_fine():
    assert time.monotonic() > 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "with a worker"])
def test_a_hanging_test_fails_with_its_stack(tmp_path, workers):
    (tmp_path / "test_hanging.py").write_text(HANGING)
    limits = ("-o", "timeout=1", "-o", "faulthandler_timeout=3", "-p", "no:cacheprovider")
    configuration = ("-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path))
    command = [sys.executable, "-m", "pytest", "-v", *configuration, *limits, *workers]
    done = run_process([*command, "test_hanging.py"], cwd=tmp_path)
    assert done.returncode != 0
    output = done.stdout + done.stderr
    assert re.search(r"FAILED.*test_sleeps|test_sleeps FAILED", output)
    assert re.search(r'File ".*test_hanging.py", line 8 in test_holds_the_lock', output)
    if workers:  # the remaining tests of a killed worker run in another one
        assert "Timeout (>1.0s)" in output
        assert re.search(r"PASSED.*test_is_fine", output)
        assert "1 passed" in output


PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
child.wait()
"""


def test_a_process_past_its_limit_is_killed_with_its_children_and_their_stacks_are_shown():
    began = time.monotonic()
    # Two interpreters need this time to start on a busy machine.
    with pytest.raises(pytest.fail.Exception, match="took more than 4 s") as failure:
        run_process([sys.executable, "-c", PARENT], timeout=4)
    output = str(failure.value)
    assert output.count('File "<string>", line') >= 2  # parent and child
    child = int(re.search(r"^(\d+)$", output, re.MULTILINE)[1])
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() - began < 60
        time.sleep(0.01)


@pytest.mark.slow
def test_every_subprocess_of_the_tests_has_a_time_limit():
    """The functions of `processes` have one; `subprocess` is for commands without children.

    Benchmarks give the limit to `communicate`.
    """
    unlimited = []
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or path.stem == "processes":
                continue
            called = ast.unparse(node.func)
            limited = any(keyword.arg == "timeout" for keyword in node.keywords)
            limited |= path.parent.name == "benchmarks" and called == "subprocess.Popen"
            if called.startswith("subprocess.") and not limited:
                unlimited.append(f"{path.name}:{node.lineno}: {called}")
    assert unlimited == []
