"""Exclusive locks on output folders."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LIMIT_S, run_process, started

from ddpm_hf.cli import main
from ddpm_hf.sampling.output_paths import batch_folder
from ddpm_hf.utils.locks import FOLDER_LOCK, InUseError, exclusive_folder, hold_lock
from ddpm_hf.utils.shared_work import distributed_state


def reserve(folder):
    return exclusive_folder(distributed_state(), folder, "output")


@pytest.mark.parametrize(
    "command",
    [
        "sample MODEL",
        "evaluate MODEL PHOTOS",
        "evaluate MODEL OTHER PHOTOS",
        "calibrate MODEL PHOTOS",
    ],
)
def test_a_command_reports_an_output_in_use_before_it_loads_anything(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for folder in map(Path, ("MODEL", "OTHER", "PHOTOS")):  # none can be loaded
        folder.mkdir()
        (folder / "model_index.json").touch()
    output = tmp_path / "out"
    with reserve(batch_folder(output) if command.startswith("sample") else output):
        assert main([*command.split(), "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert f"{output} is in use by process {os.getpid()}; wait for it, or choose another" in message
    assert not output.exists()


@pytest.mark.parametrize("command", ["sample MODEL", "evaluate MODEL PHOTOS"])
def test_an_output_that_cannot_be_written_is_named_by_its_flag(
    command, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for folder in map(Path, ("MODEL", "PHOTOS")):
        folder.mkdir()
        (folder / "model_index.json").touch()
    Path("file").touch()  # root may write everywhere else
    assert main([*command.split(), "--output", "file/out"]) == 1
    message = "--output file/out cannot be written: Not a directory; choose another one"
    assert message in capsys.readouterr().err


def test_a_released_folder_keeps_its_files_and_can_be_reserved_again(tmp_path):
    with reserve(tmp_path / "x"):
        (tmp_path / "x" / "result").touch()
    with reserve(tmp_path / "x"), pytest.raises(InUseError), reserve(tmp_path / "x"):
        pass
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["result"]


def test_a_folder_that_was_created_for_the_lock_is_removed_if_it_stays_empty(tmp_path):
    with reserve(tmp_path / "x"):
        assert (tmp_path / "x").is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_is_removed_while_waiting_is_created_again(tmp_path):
    """Its holder is a killed process whose child still has the lock."""
    lock = tmp_path / "lock"
    with started([sys.executable, "-c", ""]) as dead:
        dead.wait(LIMIT_S)
    lock.write_text(str(dead.pid))
    script = (
        "import fcntl, os, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True);"
        "time.sleep(1); os.unlink(sys.argv[1])"
    )
    with started([sys.executable, "-c", script, str(lock)], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        with hold_lock(lock, tmp_path, "output"):
            assert child.wait(LIMIT_S) == 0
            assert lock.read_text() == str(os.getpid())


@pytest.mark.slow
def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = (
        "import os, sys, pathlib; from ddpm_hf.utils.locks import hold_lock\n"
        "with hold_lock(pathlib.Path(sys.argv[1]), pathlib.Path(), 'output'):\n"
        "    os.kill(os.getpid(), 9)"
    )
    run_process([sys.executable, "-c", script, str(tmp_path / "lock")])
    assert (tmp_path / "lock").read_text() != str(os.getpid())
    with hold_lock(tmp_path / "lock", tmp_path, "output"):
        assert (tmp_path / "lock").read_text() == str(os.getpid())


def test_the_lock_of_another_process_in_a_recreated_folder_stays(tmp_path):
    with reserve(tmp_path / "x"):
        shutil.rmtree(tmp_path / "x")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / FOLDER_LOCK).write_text("1")
    assert (tmp_path / "x" / FOLDER_LOCK).read_text() == "1"
