"""File systems of run folders: probed before training, and used for what they can do."""

import errno
import fcntl
import io
import os
import re

import pytest
from tiny_runs import assert_equal_bits, checkpoint, metrics, run, stop_reading_at

from ddpm_hf.training import CheckpointError
from ddpm_hf.training.file_system import probe_file_system


def refuse(number):
    def call(*arguments, **options):
        raise OSError(number, os.strerror(number))

    return call


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """A folder as hf-mount 0.9 mounts a bucket by default: a file is written once, in order."""
    folder, open_text, open_file = tmp_path / "bucket", io.open, os.open
    folder.mkdir()

    def check(path, continues):
        inside = str(path).startswith(str(folder)) and os.path.isfile(path)
        if inside and continues:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    def text(path, mode="r", *rest, **options):
        check(path, "a" in mode or "+" in mode)
        return open_text(path, mode, *rest, **options)

    def file(path, flags, *rest, **options):
        check(path, flags & (os.O_WRONLY | os.O_RDWR) and not flags & (os.O_TRUNC | os.O_EXCL))
        return open_file(path, flags, *rest, **options)

    monkeypatch.setattr(io, "open", text)
    monkeypatch.setattr(os, "open", file)
    return folder


def test_a_disk_can_do_everything_and_the_probe_leaves_nothing(tmp_path, caplog):
    probed = probe_file_system(tmp_path)
    assert re.fullmatch(r"(\w|\.)+(\s\w+)? with rename, append, fsync, locks", str(probed))
    assert not probed.missing
    assert not caplog.records
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("module", "name", "action", "missing"),
    [
        (os, "fsync", refuse(errno.EINVAL), "fsync"),
        (fcntl, "flock", refuse(errno.ENOLCK), "locks"),
        (fcntl, "flock", lambda *_: None, "locks"),  # two holders
    ],
)
def test_a_missing_ability_is_a_warning_with_its_consequence_and_training_runs(
    tmp_path, monkeypatch, caplog, module, name, action, missing
):
    monkeypatch.setattr(module, name, action)
    run(tmp_path / "run", max_train_steps=2)
    (warning,) = [r.getMessage() for r in caplog.records if r.name.endswith("file_system")]
    assert re.match(f"no {missing} in `output_dir` {tmp_path / 'run'} \\(.+\\): .+", warning)
    assert (tmp_path / "run" / "model").is_dir()


@pytest.mark.parametrize("name", ["rename", "replace"])
def test_a_folder_where_nothing_can_be_renamed_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.setattr(os, name, refuse(errno.ENOSYS))
    with pytest.raises(CheckpointError, match=f"cannot rename .*{os.strerror(errno.ENOSYS)}"):
        run(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_run_in_a_bucket_resumes_bit_exactly_with_its_whole_log(bucket, tmp_path, caplog):
    run(tmp_path / "straight")
    assert run(bucket / "run", dataset=stop_reading_at(15)).num_steps < 6
    run(bucket / "run")
    assert "no append" in caplog.text
    assert_equal_bits(checkpoint(bucket / "run", 6), checkpoint(tmp_path / "straight", 6))
    assert [entry["step"] for entry in metrics(bucket / "run")] == [1, 2, 3, 4, 5, 6]
