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
from datasets.distributed import split_dataset_by_node
from huggingface_hub import constants
from PIL import Image
from shard_server import ShardServer, break_off, refuse, stall
from torch.utils.data import DataLoader

from ddpm_hf.data import (
    DataError,
    prepare_images,
    read_batches,
    remote_files,
    shard_cache,
    to_unit_range,
)  # fmt: skip
from ddpm_hf.data.image_order import Batches, ShardOrder
from ddpm_hf.data.shard_files import find_shards, shards_of
from ddpm_hf.data.shard_index import ShardIndex
from ddpm_hf.data.shards import index_shards
from ddpm_hf.data.streaming import StreamedTrainingImages, open_stream
from ddpm_hf.training import ConfigError, TrainingConfig

NUM_SHARDS, NUM_ROWS, SIZE = 30, 2, 24

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


CLASSES = datasets.ClassLabel(names=["even", "odd"])


def write_parquet(path: Path, contents: list[bytes], labels=None, kind=CLASSES) -> None:
    """A shard with captions and labels, by default 0, 1, 0, 1, ..."""
    count = len(contents)
    features = {"image": datasets.Image(), "caption": datasets.Value("string"), "label": kind}
    rows = {
        "image": [{"bytes": content, "path": None} for content in contents],
        "caption": [f"caption {n}" for n in range(count)],
        "label": [n % 2 for n in range(count)] if labels is None else labels,
    }
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(path)


def write_tar(path: Path, contents: list[bytes], others=None) -> None:
    """A shard of samples with an image and other files, given by extension."""
    with tarfile.open(path, "w") as tar:
        for number, content in enumerate(contents):
            files = {"png": content, "json": b"{}"} | (others[number] if others else {})
            for extension, data in files.items():
                member = tarfile.TarInfo(f"./set.1/{number:04d}.{extension}")
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
    monkeypatch.setattr(remote_files, "TIMEOUT_S", 10.0)


def stream_of(source, cache_dir, **options):
    files = find_shards(str(source))
    return open_stream(files, resolution=SIZE, cache_dir=cache_dir, **options)


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
    sources = (folder / f"*.{suffix}", f"{server.url}/train-{{000..029}}.{suffix}")
    for place, source in enumerate(sources):
        images = stream_of(source, tmp_path / str(place))
        assert len(images) == NUM_SHARDS * NUM_ROWS
        every = range(len(images))
        assert numbers(images.read(every, NO_CROPS)) == [*every]


def test_the_pixels_are_those_of_prepared_images(folder, tmp_path):
    rng = np.random.default_rng(0)
    contents = []
    for shape in ((60, 90, 3), (51, 27), (120, 120, 4)):
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
    for name in ("train-[0]", "train-1", "test-0"):
        write_tar(tmp_path / f"{name}.tar", [png(0)])
    names = {
        split: [Path(path).name for path in find_shards(str(tmp_path), split=split).locations]
        for split in ("train", "test")
    }
    assert names == {"train": ["train-1.tar", "train-[0].tar"], "test": ["test-0.tar"]}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda f: (f / "a.txt").write_text("no shard"), "needs .parquet or .tar files"),
        (
            lambda f: (f / "a.parquet").write_text("no parquet at all"),
            "is not a readable parquet file",
        ),
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


def test_a_local_tar_file_that_is_rewritten_with_the_same_size_is_read_again(tmp_path):
    path, sizes = tmp_path / "a.tar", set()
    for number, labels in enumerate(([0, 1], [1, 0])):
        write_tar(path, [png(number)] * 2, [{"cls": b"%d" % label} for label in labels])
        os.utime(path, ns=(number, number))
        sizes.add(path.stat().st_size)
        images = stream_of(path, tmp_path / "cache", label_column=True)
        assert images.labels.tolist() == labels
        assert numbers(images.read(range(2), NO_CROPS)) == [number, number]
    assert len(sizes) == 1  # files in a .tar file are padded


def test_hidden_files_of_a_folder_are_no_shards(tmp_path):
    for name in ("a.tar", "._a.tar", ".cache/b.tar"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / name, [png(0)])
    assert find_shards(str(tmp_path)).locations == (str(tmp_path / "a.tar"),)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://bucket/a-{0..9}.tar", "reads https, http and hf addresses, got 's3://bucket/a-0"),
        ("https://word@host/a.tar", "with a user, a password or a query string"),
        ("https://me:word@host/a.tar", "with a user, a password or a query string"),
        ("https://host/a.tar?key=word", "with a user, a password or a query string"),
    ],
)
def test_addresses_that_cannot_be_read_are_refused_without_a_request(url, message):
    with pytest.raises(DataError, match=message) as error:
        find_shards(url)
    assert "word@" not in str(error.value)


def test_a_bad_image_stops_or_is_replaced_by_the_next_one_with_a_warning(tmp_path, caplog):
    write_tar(tmp_path / "a.tar", [png(0), b"broken", b"broken", png(3), b"broken"])
    with pytest.raises(DataError, match="3 of 5 images cannot be used; set `on_bad_image`"):
        stream_of(tmp_path / "a.tar", tmp_path / "first").cache.fetch(0)
    images = stream_of(tmp_path / "a.tar", tmp_path / "second", on_bad_image="skip")
    assert numbers(images.read(range(5), NO_CROPS)) == [0, 3, 3, 3, 0]
    assert "3 of 5 images cannot be used and are replaced by the next one" in caplog.text


# Streaming datasets of the library `datasets`


def streamed(folder: Path, suffix: str, **options) -> datasets.IterableDataset:
    kind = {"parquet": "parquet", "tar": "webdataset"}[suffix]
    files = {"train": sorted(str(path) for path in folder.glob(f"*.{suffix}"))}
    return datasets.load_dataset(kind, data_files=files, split="train", streaming=True, **options)


@pytest.mark.parametrize("suffix", ["parquet", "tar"])
def test_the_files_of_a_streaming_dataset_are_found(suffix, folder):
    assert shards_of(streamed(folder, suffix)) == find_shards(str(folder / f"*.{suffix}"))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows.shuffle(seed=0),
        lambda rows: rows.map(lambda row: row),
        lambda rows: rows.filter(lambda row: True),
        lambda rows: rows.take(3),
        lambda rows: rows.rename_column("image", "photo"),
        lambda rows: split_dataset_by_node(rows, 0, 2),
        lambda rows: datasets.IterableDataset.from_generator(lambda: iter([{"image": png(0)}])),
        lambda rows: datasets.Dataset.from_dict({"image": [png(0)]}).to_iterable_dataset(),
    ],
)
def test_rows_that_are_not_those_of_whole_files_are_refused(change, folder):
    with pytest.raises(
        DataError, match=r"unknown: pass load_dataset\(..., streaming=True\) without"
    ):
        shards_of(change(streamed(folder, "parquet")))


def test_a_part_of_the_rows_of_a_parquet_file_is_refused(folder):
    filters = [("caption", "==", "caption 1")]
    with pytest.raises(DataError, match="are unknown"):
        shards_of(streamed(folder, "parquet", filters=filters))


# Classes


def labels_of(source, column=True):
    index = index_shards(find_shards(str(source)).locations, None, column)
    return index.labels.tolist(), index.class_names


def test_labels_of_parquet_shards_are_read_without_the_images(server, folder):
    for number in range(2):
        # Noise, so that the images take most of the file.
        contents = [np.random.default_rng(row).bytes(10**6) for row in range(3)]
        write_parquet(folder / f"big-{number}.parquet", contents)
    url = f"{server.url}/big-{{0..1}}.parquet"
    assert labels_of(url) == ([0, 1, 0, 0, 1, 0], ("even", "odd"))
    assert labels_of(url, "caption")[0] == [0, 1, 2, 0, 1, 2]
    assert server.sent["big-0.parquet"] < 4 * 2**16
    for path in folder.glob("big-*"):
        path.unlink()


def test_labels_of_tar_shards_come_from_cls_and_json_files(server, folder):
    others = [
        {"cls": b"3\n", "json": b'{"kind": "cat"}'},
        {"json": b'{"kind": "dog"}'},
        {"cls": b"7"},
    ]
    write_tar(folder / "classes.tar", [png(n) for n in range(3)], others)
    for source in (folder / "classes.tar", f"{server.url}/classes.tar"):
        assert labels_of(source) == ([0, -1, 1], ("3", "7"))
        assert labels_of(source, "kind") == ([0, 1, -1], ("cat", "dog"))
    (folder / "classes.tar").unlink()


def test_files_that_hold_no_label_are_no_label(tmp_path):
    odd = [b"[" * 10**5, b"[1]", b"\xff", b'{"kind": null}', b'{"kind": "a"}' + b" " * 2**20]
    others = [{"json": content, "cls": b"1" * 5000} for content in odd]
    others += [{"json": b'{"kind": "%s"}' % kind, "cls": b"-1"} for kind in (b"a", b"b")]
    write_tar(tmp_path / "a.tar", [png(0)] * len(others), others)
    assert labels_of(tmp_path, "kind") == ([-1] * 5 + [0, 1], ("a", "b"))
    with pytest.raises(DataError, match="the labels have several types"):
        labels_of(tmp_path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
def test_a_link_in_a_tar_file_is_no_label(kind, server, folder):
    path = folder / "links.tar"
    write_tar(path, [png(0)] * 3, [{"cls": b"0"}, {"cls": b"1"}, {}])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("./set.1/0002.cls")
        link.type, link.linkname = kind, "missing"
        tar.addfile(link)
    for source in (path, f"{server.url}/links.tar"):
        assert labels_of(source) == ([0, 1, -1], ("0", "1"))
    path.unlink()


def test_tar_files_are_read_once_for_their_labels(server, folder, tmp_path):
    write_tar(folder / "a-0.tar", [png(0), png(1)], [{"cls": b"0"}, {"cls": b"1"}])
    url = f"{server.url}/a-{{0..0}}.tar"
    first, second = (stream_of(url, tmp_path, label_column=True).labels for _ in range(2))
    assert first.tolist() == second.tolist() == [0, 1]
    assert server.requests["a-0.tar"] == 1
    (folder / "a-0.tar").unlink()


@pytest.mark.parametrize(
    ("write", "column", "message"),
    [
        (lambda f: write_tar(f / "a.tar", [png(0)] * 2), True, "no image .* has a .cls file"),
        (
            lambda f: write_tar(f / "a.tar", [png(0)] * 2, [{"cls": b"1"}, {"cls": b"cat"}]),
            True,
            "the labels have several types",
        ),
        (lambda f: write_parquet(f / "a.parquet", [png(0)] * 2), "lable", "no column 'lable'"),
        (
            lambda f: write_parquet(f / "a.parquet", [png(0)] * 2, None, datasets.Value("int32")),
            True,
            "no class labels; name the label column",
        ),
    ],
)
def test_labels_that_are_missing_or_unusable_are_refused(write, column, message, tmp_path):
    write(tmp_path)
    with pytest.raises(DataError, match=message):
        labels_of(tmp_path, column)


def test_a_replaced_image_has_the_class_of_its_replacement(tmp_path):
    others = [{"cls": b"0"}, {"cls": b"1"}, {"cls": b"0"}, {"cls": b"0"}]
    write_tar(tmp_path / "a.tar", [b"broken", png(1), png(2), b"broken"], others)
    options = {"on_bad_image": "skip", "label_column": True}
    training = StreamedTrainingImages(stream_of(tmp_path / "a.tar", tmp_path / "cache", **options))
    images, classes = zip(*training.__getitems__([(0, row) for row in range(4)]), strict=True)
    assert numbers(torch.stack(images)) == [1, 1, 2, 1]
    assert classes == (1, 1, 0, 1)


# Held-out shards


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.1, 3), (0.5, 15), (0.99, 29)])
def test_whole_shards_are_held_out_until_they_have_the_fraction(fraction, count, folder, tmp_path):
    images = stream_of(folder / "*.parquet", tmp_path, label_column=True)
    training, held_out = images.split(fraction, seed=0)
    assert (len(held_out), len(training)) == (2 * count, 60 - 2 * count)
    parts = [numbers(part.read(range(len(part)), NO_CROPS)) for part in (training, held_out)]
    assert sorted(chain(*parts)) == [*range(60)]
    pairs = [(0, place) for place in range(len(training))]
    assert parts[0] == [training.dataset_index(place) for place in range(len(training))]
    classes = [each for _, each in StreamedTrainingImages(training).__getitems__(pairs)]
    assert classes == [number % 2 for number in parts[0]]
    assert images.split(fraction, seed=0)[1].numbers == held_out.numbers
    if count == 3:
        assert images.split(fraction, seed=1)[1].numbers != held_out.numbers


def test_a_single_shard_cannot_be_held_out(tmp_path):
    write_tar(tmp_path / "a.tar", [png(0), png(1)])
    with pytest.raises(DataError, match="`validation_split` holds out whole shards"):
        stream_of(tmp_path / "a.tar", tmp_path / "cache").split(0.5, seed=0)


# Order


def test_each_epoch_has_every_image_once_and_an_order_of_its_own():
    sizes = [3, 5, 4, 2, 7, 1, 3, 9, 4, 4]
    order, total = ShardOrder(0, sizes), sum(sizes)
    epochs = [[order.index(epoch, place) for place in range(total)] for epoch in range(3)]
    assert all(sorted(epoch) == [*range(total)] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    backwards = [ShardOrder(0, sizes).index(2, place) for place in reversed(range(total))]
    assert backwards[::-1] == epochs[2]


@pytest.mark.parametrize("sizes", [[16] * 60, [16] * 17, [16] * 5, [*range(1, 40)]])
def test_at_most_a_window_of_shards_is_open_and_a_closed_one_stays_closed(sizes):
    order, starts = ShardOrder(0, sizes), np.cumsum(sizes)
    for epoch in range(2):
        images = [order.index(epoch, place) for place in range(sum(sizes))]
        shards = np.searchsorted(starts, images, side="right").tolist()
        first = {shard: place for place, shard in reversed([*enumerate(shards)])}
        last = {shard: place for place, shard in enumerate(shards)}
        # Within a stage the shards open and close at random.
        is_open = [sum(first[s] <= place <= last[s] for s in first) for place in range(len(shards))]
        assert max(is_open) <= ShardOrder.NUM_MIXED + 1
        for place, (image, shard) in enumerate(zip(images, shards, strict=True)):
            needed = order.needed_shards(epoch, image)
            window = needed[: ShardOrder.NUM_MIXED]
            assert shard in window
            assert all(s in window for s in first if first[s] < place < last[s] and s != shard)


def test_the_shards_of_the_next_epoch_follow_those_of_the_last_window():
    order = ShardOrder(0, [4] * 50)
    last, first = order.index(0, 199), order.index(1, 0)
    count = ShardOrder.NUM_MIXED
    window, following = (
        order.needed_shards(0, last)[part] for part in (slice(count), slice(count, None))
    )
    upcoming = order.needed_shards(1, first)[:count]
    assert following == [shard for shard in upcoming if shard not in window]


def test_neighbours_of_a_stream_are_correlated_by_the_inverse_of_the_window():
    """The mean place of k shards has 1/k of the variance of the place of a shard."""
    order, count = ShardOrder(1, [20] * 2000), 40_000
    places = np.array([order.index(0, place) for place in range(count)])
    correlation = np.corrcoef(places[:-1], places[1:])[0, 1]
    # 2000 / 16 windows without common shards estimate the variance within a fifth.
    assert correlation == pytest.approx(1 / ShardOrder.NUM_MIXED, rel=0.5)


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
    source = f"{server.url}/train-{{000..029}}.tar"
    straight = sequence(stream_of(source, tmp_path / "first"))
    small = stream_of(source, tmp_path / "second", cache_gb=1e-9 * least(source, tmp_path))
    assert sequence(small, num_workers=2) == straight


def least(source, tmp_path):
    return stream_of(source, tmp_path).least_bytes + 1


# The cache


@pytest.mark.slow
def test_the_cache_never_exceeds_its_limit_and_fetches_each_shard_once_an_epoch(server, tmp_path):
    source = f"{server.url}/train-{{000..029}}.parquet"
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
    assert sum(fetched) <= NUM_SHARDS + ShardOrder.NUM_MIXED  # next epoch, ahead


@pytest.mark.slow
def test_a_cache_that_holds_everything_fetches_each_shard_once(server, tmp_path):
    images = stream_of(f"{server.url}/train-{{000..029}}.parquet", tmp_path)
    sequence(images)
    again = stream_of(f"{server.url}/train-{{000..029}}.parquet", tmp_path)
    sequence(again)
    assert set(server.requests.values()) == {1}


def test_a_cache_that_is_too_small_states_the_least_size(server, tmp_path):
    with pytest.raises(DataError, match=r"`streaming_cache_gb` must be at least .* got 1e-06"):
        stream_of(f"{server.url}/train-{{000..029}}.tar", tmp_path, cache_gb=1e-6)


def test_a_shard_that_is_read_finds_room_though_others_are_needed_too(
    folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(shard_cache, "_SPACE_WAIT_S", 0.1)
    limit = least(folder / "*.tar", tmp_path)
    images = stream_of(folder / "*.tar", tmp_path, cache_gb=limit / 1e9)
    cache, last, needed = images.cache, NUM_SHARDS - 1, range(NUM_SHARDS)
    found = [cache.fetch(shard, needed, wait=False) for shard in needed]
    # The 18 shards that a cache must hold, and 3 in the place of downloads, which a folder has not.
    assert found == [shard < ShardOrder.NUM_MIXED + 2 + 3 for shard in needed]
    record = np.empty(1, cache.dtype)
    cache.read(last, [1], [record.view(np.uint8).data], needed)
    assert record["pixels"][0, 0, 0, 1] == 2 * last + 1


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
    path.write_bytes(path.read_bytes()[:200])
    assert numbers(images.read([4, 5], NO_CROPS)) == [4, 5]


# Servers


@pytest.mark.parametrize("fault", [refuse(503, 2), break_off(2)], ids=["busy", "broken"])
def test_a_shard_that_fails_is_fetched_again(fault, server, tmp_path):
    images = stream_of(f"{server.url}/train-{{000..029}}.parquet", tmp_path)
    server.fault = fault
    images.cache.fetch(3)
    assert server.requests["train-003.parquet"] == 3
    server.fault = lambda *_: False
    assert numbers(images.read([6, 7], NO_CROPS)) == [6, 7]


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
    ],
    ids=["broken", "missing", "interrupted"],
)
def test_a_shard_that_keeps_failing_is_named(fault, message, server, tmp_path):
    images = stream_of(f"{server.url}/train-{{000..029}}.parquet", tmp_path)
    server.fault = fault
    with pytest.raises(DataError, match=message):
        images.cache.fetch(3)
    assert not list(images.cache.folder.glob("*.part"))


@pytest.mark.slow
def test_a_shard_that_stalls_is_named(server, tmp_path, monkeypatch):
    images = stream_of(f"{server.url}/train-{{000..029}}.parquet", tmp_path)
    server.fault = stall(1.0)
    monkeypatch.setattr(remote_files, "TIMEOUT_S", 0.5)
    with pytest.raises(DataError, match=r"train-003.parquet failed after 3 attempts: "):
        images.cache.fetch(3)
    assert not list(images.cache.folder.glob("*.part"))


def test_the_token_of_the_hub_goes_to_no_other_server(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canary" * 5)
    stream_of(f"{server.url}/train-{{000..001}}.parquet", tmp_path).cache.fetch(0)
    assert server.headers
    assert not [headers for headers in server.headers if "canary" in str(headers)]


def test_the_token_of_the_hub_needs_the_scheme_of_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "canary" * 5)
    for endpoint, is_sent in ((server.url, True), (server.url.replace("http", "https"), False)):
        server.headers.clear()
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        remote_files.read_end(f"{server.url}/train-000.tar", 10)
        assert ("canary" in str(server.headers)) == is_sent


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "https://me:pass@host/a.tar"}, "without password and query string"),
        ({"dataset": "https://host/a.tar?signature=1"}, "without password and query string"),
        ({"resolution": None}, "`streaming` needs `resolution`"),
        ({"crop": "random"}, "`crop` must be center with `streaming`, got random"),
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
    files = find_shards(str(folder / "*.tar")).locations
    index = index_shards(files)
    moved = ShardIndex(tuple(index.shards[::-1]))
    assert moved.digest != index.digest
    assert index_shards(files).digest == index.digest
