"""Damage in files that a command uses again, and full disks: never other results without a word."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from image_sets import as_numpy, greys
from test_sampling import CALL, all_of, build_pipeline

from ddpm_hf.data import preparation_cache, prepare_images
from ddpm_hf.diffusion import atomic_files
from ddpm_hf.diffusion.atomic_files import replacing_file, replacing_files, replacing_folder
from ddpm_hf.sampling import draw_to, open_drawn
from ddpm_hf.utils import shared_work
from ddpm_hf.utils.shared_work import compute_shards, distributed_state, sealed, unsealed


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[int(position * (len(content) - 1))] ^= 4
    path.write_bytes(content)


def truncate(path, share):
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])


DAMAGE = [
    *((flip, position) for position in (0.0, 0.3, 0.7, 1.0)),
    *((truncate, share) for share in (0.0, 0.5, 0.999)),
]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn") / "x"
    return folder, all_of(draw_to(build_pipeline(), folder, 10, **CALL))


@pytest.mark.slow
@pytest.mark.parametrize(("damage", "where"), DAMAGE)
@pytest.mark.parametrize("name", ["part-000001.npy", "options.json"])
def test_damaged_images_are_sampled_again(damage, where, name, drawn, tmp_path, caplog):
    source, want = drawn
    folder = tmp_path / "x"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder / name, where)
    np.testing.assert_array_equal(all_of(draw_to(build_pipeline(), folder, 10, **CALL)), want)
    again = all_of(open_drawn(folder))
    np.testing.assert_array_equal(again, want)


@pytest.mark.slow
def test_a_damaged_batch_is_named(drawn, tmp_path, caplog):
    folder = tmp_path / "x"
    folder.mkdir()
    for file in drawn[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    flip(folder / "part-000001.npy", 0.5)
    with pytest.raises(ValueError, match=r"part-000001.npy is damaged"):
        open_drawn(folder)
    draw_to(build_pipeline(), folder, 10, **CALL)
    assert f"{folder / 'part-000001.npy'} is damaged, and is computed again" in caplog.text


@pytest.mark.parametrize(("damage", "where"), DAMAGE)
def test_damaged_shards_of_tensors_are_computed_again(damage, where, tmp_path):
    state, calls = distributed_state(), []

    def compute(i):
        calls.append(i)
        return {"features": torch.arange(4.0) + i, "total": torch.zeros(2)}

    first = compute_shards(state, tmp_path, [1, 1], compute, progress=False)
    damage(tmp_path / "part-000001.safetensors", where)
    again = compute_shards(state, tmp_path, [1, 1], compute, progress=False)
    assert [shard["features"].tolist() for shard in again] == [
        shard["features"].tolist() for shard in first
    ]
    assert calls == [0, 1, 1]


def test_a_file_without_a_checksum_is_of_an_older_version(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(3))
    assert unsealed(tmp_path / "x.npy") == (tmp_path / "x.npy").read_bytes()
    (tmp_path / "y").write_bytes(sealed(b"content"))
    assert unsealed(tmp_path / "y") == b"content"


def change_size(path, _):
    path.write_bytes(path.read_bytes() + b"x")


def remove(path, _):
    path.unlink()


PREPARED_DAMAGE = [(flip, 0.2), (flip, 0.8), (truncate, 0), (change_size, 0), (remove, 0)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("is_large", "name", "damage", "where"),
    [
        (is_large, name, *damage)
        for is_large in (False, True)
        for name in ("images.arrow", "summary.json", "checksums.json")
        for damage in PREPARED_DAMAGE
        if not is_large or name == "checksums.json" or damage[0] is not flip
    ],
)
def test_damaged_prepared_images_are_prepared_again(
    is_large, name, damage, where, tmp_path, monkeypatch, caplog
):
    """A large folder is compared by the sizes of its files, which a flipped bit does not change."""
    if is_large:
        monkeypatch.setattr(preparation_cache, "_MAX_HASHED_BYTES", 0)
    options = {"cache_dir": tmp_path, "progress": False}
    want = as_numpy(prepare_images(greys((8, 8), (8, 8)), **options))
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    damage(folder / name, where)
    np.testing.assert_array_equal(as_numpy(prepare_images(greys((8, 8), (8, 8)), **options)), want)
    is_older = damage is remove and name == "checksums.json"
    assert ("is damaged: the images are prepared again" in caplog.text) != is_older


@pytest.fixture
def events(monkeypatch):
    """Names of the files and folders that are flushed to the disk or renamed, in order."""
    events = []

    def record(kind, function, name_of):
        def recorded(*args):
            events.append((kind, name_of(args[0])))
            return function(*args)

        return recorded

    name_of_descriptor = lambda fd: Path(os.readlink(f"/proc/self/fd/{fd}")).name  # noqa: E731
    monkeypatch.setattr(os, "fsync", record("flush", os.fsync, name_of_descriptor))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, record("rename", getattr(os, name), lambda p: Path(p).name))
    return events


def write_two(folder):
    (folder / "inner").mkdir()
    (folder / "a").write_text("a")
    (folder / "inner" / "b").write_text("b")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names of descriptors are in /proc")
@pytest.mark.parametrize("exists", [False, True])
@pytest.mark.parametrize("kind", ["files", "folder"])
def test_files_are_flushed_before_the_first_rename_and_names_after_the_last(
    kind, exists, events, tmp_path
):
    folder = tmp_path / "model"
    if exists:
        folder.mkdir()
    with (
        replacing_folder(folder)
        if kind == "folder"
        else replacing_files(folder, last="b", stale=list)
    ) as staging:
        write_two(staging)
    first = [event for event, _ in events].index("rename")
    last = max(events.index(("rename", n)) for n in (staging.name, "b") if ("rename", n) in events)
    assert {"a", "b", "inner", staging.name} == {name for _, name in events[:first]}
    in_place = exists and kind == "files"
    names = {"model", "inner"} if in_place else {tmp_path.name}
    assert {("flush", name) for name in names} <= set(events[last:])
    assert (folder / "inner" / "b").read_text() == "b"


def test_a_file_is_flushed_before_it_replaces_another_one(events, tmp_path):
    with replacing_file(tmp_path / "a") as temporary:
        temporary.write_text("a")
    assert events == [("flush", ".new-a"), ("rename", ".new-a")]


class FullDisk:
    """Each file takes at most `size` bytes; the error comes with the flush, as buffers cause it."""

    def __init__(self, file, size):
        self.file, self.size = file, size

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, content):
        self.file.write(content[: self.size])
        return len(content)


@pytest.mark.slow
@pytest.mark.parametrize("size", [0, 1, 100, 150])
def test_a_cut_part_never_counts_as_complete(size, tmp_path, monkeypatch):
    opened = atomic_files.Path.open
    with monkeypatch.context() as patch:
        patch.setattr(
            atomic_files.Path,
            "open",
            lambda self, mode="r", *a, **k: (
                FullDisk(opened(self, mode, *a, **k), size)
                if mode == "wb"
                else opened(self, mode, *a, **k)
            ),
        )
        with pytest.raises(OSError, match="bytes were written") as caught:
            draw_to(build_pipeline(), tmp_path / "x", 10, **CALL)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "x").glob("*.npy"))
    assert len(draw_to(build_pipeline(), tmp_path / "x", 10, **CALL)) == 10


@pytest.mark.slow
def test_an_unreadable_part_is_a_missing_part(tmp_path):
    want = all_of(draw_to(build_pipeline(), tmp_path / "x", 10, **CALL))
    part = tmp_path / "x" / "part-000000.npy"
    part.unlink()
    part.mkdir()
    np.testing.assert_array_equal(
        all_of(draw_to(build_pipeline(), tmp_path / "x", 10, **CALL)), want
    )
    assert shared_work.read_array(part) is not None
