"""One process at a time has a folder."""

import os
import shutil

import pytest

from ddpm_hf import locks
from ddpm_hf.cli import main
from ddpm_hf.locks import IN_USE, InUseError, locked, sole_use
from ddpm_hf.sampling.image_writer import parts_of
from ddpm_hf.shared_work import join_processes


def having(folder):
    return sole_use(join_processes(), folder, "it", "one")


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "no/model"],
        ["evaluate", "no/model", "no/photos"],
        ["evaluate", "no/model", "no/other", "no/photos"],
        ["calibrate", "no/model", "no/photos"],
    ],
    ids=["sample", "evaluate", "compare", "calibrate"],
)
def test_a_command_whose_output_is_in_use_says_so_before_anything_is_loaded(
    command, tmp_path, capsys
):
    output = tmp_path / "out"
    with having(parts_of(output) if command[0] == "sample" else output):
        assert main([*command, "--output", str(output)]) == 2
    said = capsys.readouterr().err
    assert f"{output} is in use by process {os.getpid()}; wait for it, or choose another" in said
    assert "another --output PATH" in said
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_left_holds_what_was_put_there_and_can_be_had_again(tmp_path):
    with having(tmp_path / "x"):
        (tmp_path / "x" / "result").touch()
    with having(tmp_path / "x"), pytest.raises(InUseError), having(tmp_path / "x"):
        pass
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["result"]


def test_a_lock_that_was_removed_while_it_was_waited_for_is_taken_anew(tmp_path, monkeypatch):
    acquire, times = locks._acquire, []

    def remove_once(lock, *words):
        times.append(1)
        if len(times) == 1:
            (tmp_path / "lock").unlink()
        acquire(lock, *words)

    monkeypatch.setattr(locks, "_acquire", remove_once)
    with locked(tmp_path / "lock", "it", "one"):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}"


def test_the_lock_of_another_one_in_a_new_folder_of_that_name_stays(tmp_path):
    with having(tmp_path / "x"):
        shutil.rmtree(tmp_path / "x")
        (tmp_path / "x").mkdir()
        (tmp_path / "x" / IN_USE).write_text("1")
    assert (tmp_path / "x" / IN_USE).read_text() == "1"
