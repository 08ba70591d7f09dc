"""Streams: shards over HTTP, a bounded cache, and a sequence that is a function of position."""

import io
import json
import os
import tarfile
import threading
from collections import Counter
from contextlib import suppress
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from shard_server import ShardServer, break_off, refuse, stall
from torch.utils.data import DataLoader

from ddpm_hf.data import DataError, prepare_images, read_batches, remote_files, to_unit_range
from ddpm_hf.data.shards import ShardIndex, find_shards, index_shards
from ddpm_hf.data.streaming import StreamedTrainingImages, open_stream
from ddpm_hf.randomness import Batches, ShardOrder
from ddpm_hf.training import ConfigError, TrainingConfig

NUM_SHARDS, NUM_ROWS, SIZE = 20, 3, 8

NO_CROPS = np.zeros((0, 2), np.float32)  # streams do not crop


def png(number: int) -> bytes:
    """An image whose first pixels are its number."""
    pixels = np.full((SIZE, SIZE, 3), 100, np.uint8)
    pixels[0, :2, 0] = divmod(number, 256)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def numbers(images) -> list[int]:
    """The numbers in images (B, C, H, W) in [-1, 1]."""
    pixels = ((images[:, 0, 0, :2] + 1) * 127.5).round().int()
    return (pixels[:, 0] * 256 + pixels[:, 1]).tolist()


def write_parquet(path: Path, contents: list[bytes]) -> None:
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    cells = [{"bytes": content, "path": None} for content in contents]
    rows = {"image": cells, "caption": [f"caption {n}" for n in range(len(contents))]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def write_tar(path: Path, contents: list[bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            for name, data in ((f"{number:04d}.png", content), (f"{number:04d}.json", b"{}")):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Shards of both kinds with the images 0, 1, ... in order."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(NUM_SHARDS):
        contents = [png(shard * NUM_ROWS + row) for row in range(NUM_ROWS)]
        write_parquet(folder / f"train-{shard:03d}.parquet", contents)
        write_tar(folder / f"train-{shard:03d}.tar", contents)
    return folder


@pytest.fixture
def server(folder):
    with ShardServer(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(remote_files, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(remote_files, "TIMEOUT_S", 0.5)


def stream_of(source, cache_dir, **options):
    return open_stream(str(source), resolution=SIZE, cache_dir=cache_dir, **options)


def sequence(images, **facts):
    """The numbers of all images of some updates, in training order."""
    training = StreamedTrainingImages(images, seed=3)
    workers = facts.pop("num_workers", 0)
    usual = {"num_images": len(images), "seed": 3, "batch_size": 4, "start": 0, "stop": 45}
    batches = Batches(**usual | facts, order=training.order)
    loader = DataLoader(training, batch_sampler=batches, num_workers=workers)
    return [numbers(batch) for batch in read_batches(loader)]


# Sources


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_shards_of_a_folder_a_glob_and_a_url_hold_the_same_images(suffix, folder, server, tmp_path):
    sources = (folder / f"*.{suffix}", f"{server.url}/train-{{000..019}}.{suffix}")
    for place, source in enumerate(sources):
        images = stream_of(source, tmp_path / str(place))
        assert len(images) == NUM_SHARDS * NUM_ROWS
        every = range(len(images))
        assert numbers(images.read(every, NO_CROPS)) == [*every]


def test_the_pixels_are_those_of_prepared_images(folder, tmp_path):
    rng = np.random.default_rng(0)
    contents = []
    for shape in ((20, 30, 3), (17, 9), (40, 40, 4)):
        file = io.BytesIO()
        Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(file, "png")
        contents.append(file.getvalue())
    write_parquet(tmp_path / "a.parquet", contents)
    images = stream_of(tmp_path / "a.parquet", tmp_path / "cache")
    rows = datasets.Dataset.from_parquet(str(tmp_path / "a.parquet"))
    prepared = prepare_images(rows, resolution=SIZE, image_mode="RGB", cache_dir=tmp_path / "all")
    streamed = images.read([0, 1, 2], NO_CROPS)
    assert torch.equal(streamed, to_unit_range(torch.stack([*prepared])))


def test_a_parquet_index_reads_only_the_ends_of_the_files(server, folder):
    big = folder / "big.parquet"
    write_parquet(big, [bytes(10**6)])
    index = index_shards([f"{server.url}/big.parquet"])
    assert (index.num_images, index.shards[0].num_bytes) == (1, big.stat().st_size)
    assert server.sent["big.parquet"] <= 2**16
    big.unlink()


def test_the_rows_of_tar_files_come_from_an_index_if_there_is_one(folder, server):
    url = f"{server.url}/train-000.tar"
    assert index_shards([url]).num_images == NUM_ROWS
    assert server.requests["train-000.tar"] == 1
    listing = {"shardlist": [{"url": "train-000.tar", "nsamples": NUM_ROWS}]}
    (folder / "index.json").write_text(json.dumps(listing))
    assert index_shards([url]).num_images == NUM_ROWS
    assert server.requests["train-000.tar"] == 1
    (folder / "index.json").unlink()


def test_a_number_of_rows_that_is_wrong_names_the_shard(folder, tmp_path):
    write_tar(tmp_path / "a.tar", [png(0), png(1)])
    for count in (1, 3):
        listing = {"shardlist": [{"url": "a.tar", "nsamples": count}]}
        (tmp_path / "index.json").write_text(json.dumps(listing))
        images = stream_of(tmp_path / "a.tar", tmp_path / f"cache{count}")
        with pytest.raises(DataError, match=rf"a.tar cannot be read: .* expected {count} images"):
            images.cache.fetch(0)


def test_splits_of_a_folder_are_named_in_the_paths(tmp_path):
    for name in ("train-0", "train-1", "test-0"):
        write_tar(tmp_path / f"{name}.tar", [png(0)])
    assert [Path(p).name for p in find_shards(str(tmp_path))] == ["train-0.tar", "train-1.tar"]
    assert [Path(p).name for p in find_shards(str(tmp_path), split="test")] == ["test-0.tar"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "a.txt").write_text("no shard"), "needs .parquet or .tar files"),
        (lambda f: (f / "a.parquet").write_text("no parquet at all"), "is not a parquet file"),
        (lambda f: (f / "a.tar").write_text("no tar"), "a.tar cannot be read: no .tar file"),
        (lambda f: write_tar(f / "a.tar", []), "no images"),
    ],
)
def test_files_that_are_no_shards_are_named(make, message, tmp_path):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        stream_of(tmp_path, tmp_path / "cache")


def test_a_path_in_a_parquet_row_opens_no_file_of_this_machine(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(7))
    table = datasets.Dataset.from_dict(
        {"image": [{"bytes": None, "path": str(tmp_path / "secret.png")}]},
        features=datasets.Features({"image": datasets.Image(decode=False)}),
    ).data.table
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 0: the file is empty"):
        stream_of(tmp_path / "a.parquet", tmp_path / "cache").cache.fetch(0)


def test_a_bad_image_stops_or_is_replaced_by_the_next_one_with_a_warning(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [png(0), b"broken", b"broken", png(3), b"broken"])
    with pytest.raises(DataError, match="3 of 5 images cannot be used; set `on_bad_image`"):
        stream_of(tmp_path / "a.tar", tmp_path / "first").cache.fetch(0)
    images = stream_of(tmp_path / "a.tar", tmp_path / "second", on_bad_image="skip")
    assert numbers(images.read(range(5), NO_CROPS)) == [0, 3, 3, 3, 0]
    assert "3 of 5 images cannot be used and are replaced by the next one" in caplog.text


# Order


def test_each_epoch_has_every_image_once_and_an_order_of_its_own():
    sizes = [3, 5, 4, 2, 7, 1, 3, 9, 4, 4]
    order, total = ShardOrder(0, sizes), sum(sizes)
    epochs = [[order.index(epoch, place) for place in range(total)] for epoch in range(3)]
    assert all(sorted(epoch) == [*range(total)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    backwards = [ShardOrder(0, sizes).index(2, place) for place in reversed(range(total))]
    assert backwards[::-1] == epochs[2]


def test_a_group_of_shards_is_read_before_the_next_one():
    count = ShardOrder.NUM_MIXED
    order = ShardOrder(0, [10] * 3 * count)
    shards = [order.index(0, place) // 10 for place in range(30 * count)]
    groups = [set(shards[start : start + 10 * count]) for start in range(0, 30 * count, 10 * count)]
    assert [len(group) for group in groups] == [count] * 3
    assert set.union(*groups) == {*range(3 * count)}


def test_neighbours_of_a_stream_are_uncorrelated_but_for_their_group():
    """The mean place of a group of k shards has 1/k of the variance of the place of a shard."""
    order, count = ShardOrder(1, [50] * 400), 20_000
    places = np.array([order.index(0, place) for place in range(count)])
    correlation = np.corrcoef(places[:-1], places[1:])[0, 1]
    # 50 groups estimate the variance of their means within a fifth.
    assert correlation == pytest.approx(1 / ShardOrder.NUM_MIXED, rel=0.5)
    groups = np.split(places, 400 // ShardOrder.NUM_MIXED)
    within = [np.corrcoef(group[:-1], group[1:])[0, 1] for group in groups]
    assert abs(np.mean(within)) < 4 / np.sqrt(count)


# The sequence


def test_the_sequence_is_the_same_for_any_number_of_processes_and_any_start(folder, tmp_path):
    images = stream_of(folder / "*.parquet", tmp_path)
    straight = sequence(images)
    assert Counter(chain(*straight)) == {n: 3 for n in range(60)}  # 180 images: three epochs
    assert sequence(images, start=17) == straight[17:]
    ranks = [sequence(images, rank=rank, num_processes=2) for rank in range(2)]
    assert [first + second for first, second in zip(*ranks, strict=True)] == straight


@pytest.mark.slow
def test_the_sequence_is_the_same_with_loader_workers_and_a_cold_cache(server, tmp_path):
    source = f"{server.url}/train-{{000..019}}.tar"
    straight = sequence(stream_of(source, tmp_path / "first"))
    small = stream_of(source, tmp_path / "second", cache_gb=1e-9 * least(source, tmp_path))
    assert sequence(small, num_workers=2) == straight


def least(source, tmp_path):
    return stream_of(source, tmp_path).least_bytes + 1


# The cache


@pytest.mark.slow
def test_the_cache_never_exceeds_its_limit_and_fetches_each_shard_once_an_epoch(server, tmp_path):
    source = f"{server.url}/train-{{000..019}}.parquet"
    limit = least(source, tmp_path)
    images = stream_of(source, tmp_path, cache_gb=limit / 1e9)
    largest, is_over = [0], threading.Event()

    def watch():
        while not is_over.wait(0.002):
            used = 0
            for root, _, names in os.walk(tmp_path):
                for name in names:
                    with suppress(FileNotFoundError):
                        used += os.path.getsize(os.path.join(root, name))
            largest[0] = max(largest[0], used)

    watcher = threading.Thread(target=watch)
    watcher.start()
    seen = [*chain(*sequence(images, stop=15))]
    is_over.set()
    watcher.join()
    assert Counter(seen) == {n: 1 for n in range(60)}
    assert 0 < largest[0] <= limit
    fetched = [count for name, count in server.requests.items() if name.endswith("parquet")]
    assert len(fetched) == NUM_SHARDS
    assert sum(fetched) <= NUM_SHARDS + ShardOrder.NUM_MIXED  # those of the next epoch, ahead


@pytest.mark.slow
def test_a_cache_that_holds_everything_fetches_each_shard_once(server, tmp_path):
    images = stream_of(f"{server.url}/train-{{000..019}}.parquet", tmp_path)
    sequence(images)
    again = stream_of(f"{server.url}/train-{{000..019}}.parquet", tmp_path)
    sequence(again)
    assert set(server.requests.values()) == {1}


def test_a_cache_that_is_too_small_states_the_least_size(server, tmp_path):
    with pytest.raises(DataError, match=r"`streaming_cache_gb` must be at least .* got 1e-06"):
        stream_of(f"{server.url}/train-{{000..019}}.tar", tmp_path, cache_gb=1e-6)


def test_what_a_killed_process_left_is_removed(folder, tmp_path):
    images = stream_of(folder / "*.tar", tmp_path)
    for shard in (0, 5):
        part = images.cache.folder / f"{shard:06d}.part"
        part.mkdir(parents=True)
        (part / "reserved.json").write_text("20000000000")
        (part / "download").write_bytes(b"half")
    images.cache.fetch(0)
    assert not list(images.cache.folder.glob("*.part"))


def test_a_damaged_file_in_the_cache_is_fetched_again(folder, tmp_path):
    images = stream_of(folder / "*.tar", tmp_path)
    images.cache.fetch(2)
    path = images.cache.folder / "000002.bin"
    path.write_bytes(path.read_bytes()[:300])
    assert numbers(images.read([6, 7, 8], NO_CROPS)) == [6, 7, 8]


# Servers


@pytest.mark.parametrize("fault", [refuse(503, 2), break_off(2)], ids=["busy", "broken"])
def test_a_shard_that_fails_is_fetched_again(fault, server, tmp_path):
    images = stream_of(f"{server.url}/train-{{000..019}}.parquet", tmp_path)
    server.fault = fault
    images.cache.fetch(3)
    assert server.requests["train-003.parquet"] == 3
    server.fault = lambda *_: False
    assert numbers(images.read([9, 10], NO_CROPS)) == [9, 10]


def test_a_broken_transfer_continues_where_it_ended(tmp_path):
    content = np.random.default_rng(0).bytes(10**6)
    (tmp_path / "a.tar").write_bytes(content)
    with ShardServer(tmp_path) as server:
        server.fault = break_off(1)
        remote_files.download(f"{server.url}/a.tar", tmp_path / "copy", len(content))
        assert server.sent["a.tar"] < 0.6 * len(content)
    assert (tmp_path / "copy").read_bytes() == content


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (refuse(500, 99), "train-003.parquet failed after 3 attempts: status 500"),
        (refuse(404, 99), "train-003.parquet failed after 1 attempts: status 404"),
        (break_off(99), "train-003.parquet failed after 3 attempts: "),
        (stall(1.0), "train-003.parquet failed after 3 attempts: "),
    ],
    ids=["broken", "missing", "interrupted", "stalled"],
)
def test_a_shard_that_keeps_failing_or_stalls_is_named(fault, message, server, tmp_path):
    images = stream_of(f"{server.url}/train-{{000..019}}.parquet", tmp_path)
    server.fault = fault
    with pytest.raises(DataError, match=message):
        images.cache.fetch(3)
    assert not list(images.cache.folder.glob("*.part"))


def test_the_token_of_the_hub_goes_to_no_other_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canary" * 5)
    stream_of(f"{server.url}/train-{{000..001}}.parquet", tmp_path).cache.fetch(0)
    assert server.headers
    assert not [headers for headers in server.headers if "canary" in str(headers)]


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "https://me:pass@host/a.tar"}, "without password and query string"),
        ({"dataset": "https://host/a.tar?signature=1"}, "without password and query string"),
        ({"resolution": None}, "`streaming` needs `resolution`"),
        ({"crop": "random"}, "`crop` cannot be used with `streaming`"),
        ({"validation_split": "0.1"}, "`validation_split` cannot be used"),
        ({"class_conditional": True, "evaluate_steps": 5}, "`class_conditional` and `evaluate_st"),
        ({"streaming": False}, "URLs of parquet or .tar files need `streaming`"),
    ],
)
def test_what_a_stream_cannot_do_is_refused(options, message):
    usual = {"dataset": "https://host/a-{000..009}.tar", "streaming": True, "resolution": 8}
    with pytest.raises(ConfigError, match=message) as error:
        TrainingConfig(**usual | options)
    assert "pass@" not in str(error.value)
    assert "signature" not in str(error.value)


def test_the_run_of_a_url_is_named_after_its_files():
    url = "https://host/path/train-{000..009}.tar"
    config = TrainingConfig(dataset=url, streaming=True, resolution=8)
    assert config.run_folder() == Path("runs/train-")


def test_shards_are_identified_by_names_sizes_and_rows(folder):
    index = index_shards(find_shards(str(folder / "*.tar")))
    moved = ShardIndex(tuple(index.shards[::-1]))
    assert moved.digest != index.digest
    assert index_shards(find_shards(str(folder / "*.tar"))).digest == index.digest
