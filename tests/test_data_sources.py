"""Image sources: folders, files, saved datasets and the Hub."""

import json
import logging
import os
import pickle
import textwrap

import datasets
import image_zoo as zoo
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import ClientError
from image_sets import CLASSES, folder_of, greys, naming, prepare, rows
from processes import run_forked

from ddpm_hf.data import DataError, load_images


def test_class_folders_become_class_names(tmp_path):
    dataset = load_images(folder_of(tmp_path, CLASSES))
    assert prepare(dataset).facts.class_names == ("a", "b")
    assert dataset["label"] == [0, 0, 0, 1, 1, 1]
    flat = folder_of(tmp_path / "flat", {"x.png": zoo.encode(zoo.GREY)})
    assert prepare(load_images(flat), resolution=8).facts.class_names is None


def test_special_characters_and_hidden_files_do_not_affect_a_folder(tmp_path):
    root = folder_of(tmp_path / "my *[photos]? {2020}", CLASSES)
    folder_of(root, {".cache/x.png": b"x", "__MACOSX/._x.png": b"x", ".x.png": b"x"})
    assert len(prepare(load_images(root))) == 6
    assert len(prepare(load_images(str(root)))) == 6


def test_unused_files_of_a_folder_are_counted_by_kind(tmp_path):
    odd = ["a.mov", "b.MOV", "Thumbs.db", "notes", "c.tar.gz", "album.parquet"]
    dataset = load_images(folder_of(tmp_path, {**CLASSES, **dict.fromkeys(odd, b"x")}))
    with pytest.warns(UserWarning, match="left out") as caught:
        images = prepare(dataset)
    want = {".mov": 2, "Thumbs.db": 1, "without a suffix": 1, ".gz": 1, ".parquet": 1}
    assert images.left_out == want
    kinds = [".mov", "Thumbs.db", ".parquet", ".gz", "without a suffix"]
    assert list(images.left_out) == kinds  # by number, then by file name
    (message,) = (str(warning.message) for warning in caught)
    assert message.startswith("6 images used, 6 left out (.mov 2, ")
    assert pickle.loads(pickle.dumps(images)).left_out == want


HEIC_SCRIPT = """
import sys, warnings
sys.modules["pillow_heif"] = None  # as if it were not installed
from ddpm_hf.data import load_images, prepare_images
with warnings.catch_warnings(record=True) as caught:
    prepare_images(load_images(sys.argv[1]), progress=False)
print(caught[0].message)
"""


@pytest.mark.slow
def test_unsupported_formats_are_counted_with_an_install_hint(tmp_path):
    photos = {f"IMG_{i}.HEIC": b"\0\0\0\x18ftypheic" for i in range(40)}
    folder_of(tmp_path, {**CLASSES, **photos})
    done = run_forked(["-c", HEIC_SCRIPT, tmp_path])
    want = "6 images used, 40 left out (.heic 40); for .heic install pillow-heif"
    assert done.stdout.strip() == want


def test_images_outside_split_folders_are_counted(tmp_path):
    picture = zoo.encode(zoo.GREY)
    names = ["train/1.png", "test/1.png", "test/2.png", "beach/1.png"]
    dataset = load_images(folder_of(tmp_path, dict.fromkeys(names, picture)))
    with pytest.warns(UserWarning, match="1 image used, 1 left out"):
        images = prepare(dataset)
    assert images.left_out == {"outside of the split folders": 1}


def test_images_in_folders_with_a_reserved_name_are_counted(tmp_path):
    root = folder_of(tmp_path, {**CLASSES, "__others__/x.png": b"x", "__others__/y/z.png": b"x"})
    with pytest.warns(UserWarning, match=r"6 images used, 2 left out \(in folders named __\* 2\)"):
        prepare(load_images(root))


@pytest.mark.parametrize("place", ["", "runs/photos/", "my runs/1/"])
def test_outputs_of_training_runs_are_left_out(tmp_path, place):
    files = ["samples/step-1.png", "model/samples.png", "model/model_index.json"]
    files += ["config.yaml", "metrics.jsonl", "loss.png", "denoising.png"]
    drawn = {f"{place}{name}": zoo.encode(zoo.GREY) for name in files}
    folder_of(tmp_path, {**CLASSES, **drawn, "models/7/model_index.json": b"{}"})
    folder_of(tmp_path, {"models/7/samples.png": zoo.encode(zoo.GREY)})
    dataset = load_images(tmp_path)
    with pytest.warns(UserWarning, match="6 images used, 5 left out"):
        images = prepare(dataset)
    assert images.left_out == {"in folders of training runs": 5}
    with pytest.raises(DataError, match=r"contains no images.*1 in folders of training runs"):
        load_images(tmp_path / "models")


def test_a_file_name_that_is_not_utf_8_is_a_bad_image(tmp_path):
    root = folder_of(tmp_path, CLASSES)
    name = os.fsencode(root / "a") + b"/caf\xe9.png"
    with open(name, "wb") as file:
        file.write(zoo.encode(zoo.grey(8, 8)))
    with pytest.raises(DataError, match=r"1 of 7 images.*\n.*caf\\\\xe9\.png.*not UTF-8: rename"):
        prepare(load_images(root))
    with pytest.warns(UserWarning, match="6 images used, 1 left out"):
        assert len(prepare(load_images(root), on_bad_image="skip")) == 6


def test_a_tilde_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    folder_of(tmp_path / "photos", CLASSES)
    assert len(prepare(load_images("~/photos"), cache_dir="~/cache")) == 6
    assert (tmp_path / "cache").is_dir()


def test_a_folder_name_that_contains_a_split_name_is_not_a_split(tmp_path):
    picture = zoo.encode(zoo.GREY)
    names = ["train station/1.png", "my test shots/1.png", "beach/1.png"]
    dataset = load_images(folder_of(tmp_path / "places", dict.fromkeys(names, picture)))
    assert dataset.features["label"].names == ["beach", "my test shots", "train station"]
    vehicles = folder_of(tmp_path / "vehicles", {"train/1.png": picture, "bus/1.png": picture})
    assert load_images(vehicles).features["label"].names == ["bus", "train"]


def test_split_folders_are_splits(tmp_path):
    counts = {"train": 3, "test": 2}
    for split, count in counts.items():
        folder_of(tmp_path / split, {k: v for k, v in CLASSES.items() if int(k[2]) < count})
    for split, count in counts.items():
        dataset = load_images(tmp_path, split=split)
        assert len(dataset) == 2 * count
        assert dataset.features["label"].names == ["a", "b"]
    assert len(load_images(tmp_path, split="train[:4]+test")) == 8
    with pytest.raises(DataError, match=r"`split` must be .*'trian' \(did you mean 'train'"):
        load_images(tmp_path, split="trian")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_parquet_and_arrow_files_are_read_by_name_glob_and_folder(tmp_path, kind):
    parts = [greys((8, 8), (8, 8)), greys((8, 8))]
    for number, part in enumerate(parts):
        file = tmp_path / f"train-{number} [x].{kind}"
        if kind == "parquet":
            part.to_parquet(file)
        else:
            with pa.OSFile(str(file), "wb") as stream:
                pa.ipc.new_stream(stream, part.data.schema).write_table(part.data.table)
    assert len(prepare(load_images(tmp_path / f"train-0 [x].{kind}"))) == 2
    assert len(prepare(load_images(f"{tmp_path}/*.{kind}"))) == 3
    assert len(prepare(load_images(tmp_path))) == 3
    with pytest.raises(DataError, match="`split` must be one of train, got 'test'"):
        load_images(tmp_path, split="test")


def test_saved_data_sets_are_read(tmp_path):
    greys((8, 8), (8, 8)).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=greys((8, 8)), test=greys((8, 8), (9, 9))).save_to_disk(
        tmp_path / "two"
    )
    assert len(prepare(load_images(tmp_path / "one"))) == 2
    assert len(prepare(load_images(tmp_path / "two", split="test[1:]"))) == 1
    with pytest.raises(DataError, match="`split` must be one of test, train, got 'validation'"):
        load_images(tmp_path / "two", split="validation")


def test_metadata_files_are_used_and_cannot_name_files_outside(tmp_path):
    root = folder_of(tmp_path / "in", CLASSES)
    (root / "metadata.jsonl").write_text('{"file_name": "a/1.png", "text": "one"}\n')
    dataset = load_images(root)
    assert dataset["text"] == ["one"]
    with pytest.warns(UserWarning, match=r"1 image used, 5 left out \(not in the metadata 5\)"):
        images = prepare(dataset)
    np.testing.assert_array_equal(images[0][0], zoo.grey(8, 8) // 2 + 1)
    folder_of(tmp_path, {"secret.png": zoo.encode(zoo.GREY)})
    (root / "metadata.jsonl").write_text('{"file_name": "../secret.png"}\n')
    with pytest.raises(DataError, match=r"\.\./secret\.png"):
        load_images(root)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.json", '{"album": "holiday"}'),
        ("metadata.txt", "holiday"),
        ("metadata.csv", "album,year\nholiday,2020\n"),
        ("metadata.jsonl", '{"album": "holiday"}\n'),
        ("metadata.jsonl", ""),
        ("metadata.parquet", "no parquet"),
    ],
)
def test_unrelated_metadata_files_do_not_leave_images_out(tmp_path, name, text):
    photos = ("beach test 1", "beach test 2", "train ride", "harbour", "dunes")
    root = folder_of(tmp_path, {f"{photo}.png": zoo.encode(zoo.GREY) for photo in photos})
    (root / name).write_text(text)
    with pytest.warns(UserWarning, match="5 images used, 1 left out"):
        assert len(prepare(load_images(root))) == 5


def test_split_names_in_file_names_are_ignored_with_metadata(tmp_path):
    photos = ("beach test 1.png", "train ride.png", "dunes.png")
    root = folder_of(tmp_path, dict.fromkeys(photos, zoo.encode(zoo.GREY)))
    lines = [f"{name},{row}" for row, name in enumerate(photos)]
    (root / "metadata.csv").write_text("\n".join(["file_name,number", *lines]))
    dataset = load_images(root)
    assert dataset["number"] == [0, 1, 2]
    assert prepare(dataset).left_out == {}


@pytest.mark.slow
@pytest.mark.parametrize("at_top", [True, False])
def test_split_folders_are_splits_with_metadata(tmp_path, at_top):
    counts = {"train": 3, "test": 2}
    lines = []
    for split, count in counts.items():
        names = [f"{split}/{i}.png" for i in range(count)]
        folder_of(tmp_path, {name: zoo.encode(zoo.grey(8, 8) + i) for i, name in enumerate(names)})
        lines += [{"file_name": name, "number": i} for i, name in enumerate(names)]
    for place in [""] if at_top else ["train/", "test/"]:
        own = [
            line | {"file_name": line["file_name"].removeprefix(place)}
            for line in lines
            if line["file_name"].startswith(place)
        ]
        (tmp_path / place / "metadata.jsonl").write_text("\n".join(map(json.dumps, own)))
    for split, count in counts.items():
        assert load_images(tmp_path, split=split)["number"] == list(range(count))
    images = prepare(load_images(tmp_path, split="test"))
    np.testing.assert_array_equal(images[1][0], zoo.grey(8, 8) + 1)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "has no name"),
        ("phots/", r"did you mean 'photos'"),
        ("./phots", r"did you mean 'photos'"),
        ("/no/such/folder", "does not exist"),
        ("https://example.com/a.png", "does not exist"),
        ("phots", r"not a local path \(did you mean 'photos'\?\); as a Hub dataset"),
        ("someone/phots", "as a Hub dataset"),
        ("photos/*.parquet", "matches no file"),
        ("photos/a/0.png", r"got \.png; pass a folder"),
        ("empty", "contains no files; supported images"),
        ("text", r"no images, parquet or arrow files, but 2 \.txt, 1 \.mov"),
        ("broken.parquet", "broken.parquet"),
    ],
)
def test_an_invalid_source_is_reported_in_one_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photos", CLASSES)
    (tmp_path / "empty").mkdir()
    folder_of(tmp_path / "text", dict.fromkeys(("a.txt", "b.txt", "c.mov"), b"x"))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=message) as caught:
        load_images(source)
    assert len(str(caught.value).splitlines()) == 1


def test_a_damaged_file_is_reported_once(tmp_path):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    (tmp_path / "broken.arrow").write_bytes(b"not arrow" * 9)
    logging.getLogger("datasets").addHandler(handler)
    try:
        with pytest.raises(DataError, match=r"broken\.arrow' cannot be loaded"):
            load_images(tmp_path / "broken.arrow")
    finally:
        logging.getLogger("datasets").removeHandler(handler)
    assert records == []


def test_a_source_without_rows_is_rejected(tmp_path):
    rows().to_parquet(tmp_path / "none.parquet", batch_size=1)
    with pytest.raises(DataError, match=r"none\.parquet"):
        load_images(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no rows"):
        load_images(folder_of(tmp_path / "in", CLASSES), split="train[:0]")


@pytest.mark.parametrize("name", ["config_name", "revision"])
def test_hub_options_are_rejected_for_local_paths(tmp_path, name):
    with pytest.raises(DataError, match=f"`{name}` applies to datasets on the Hub"):
        load_images(folder_of(tmp_path, CLASSES), **{name: "main"})


# The Hub, over HTTP.


HUB_SCRIPT = """
from ddpm_hf.data import load_images, prepare_images
images = prepare_images(load_images(source, **options), progress=False)
result = [len(images), images.facts.to_config(), [int(image.sum()) for image in images]]
"""


HUB_SCRIPT_ON_A_DISK = """
import types
from unittest.mock import patch
with patch("shutil.disk_usage", lambda folder: types.SimpleNamespace(free=free)):
""" + textwrap.indent(HUB_SCRIPT, "    ")


@pytest.mark.slow
def test_hub_datasets_that_do_not_fit_on_the_disk_are_refused_before_their_download(
    hub, hub_process, tmp_path
):
    greys(*[(8, 8)] * 50).to_parquet(tmp_path / "many.parquet")
    indices = pa.array([0] * 1000, pa.int32())
    image = pa.DictionaryArray.from_arrays(indices, pa.array([bytes(2**20)]))
    pq.write_table(pa.table({"image": image}), tmp_path / "bomb.parquet", compression="zstd")

    def load(name, free):
        options = {"source": f"user/{name}", "options": {}, "free": free}
        return hub_process.run(HUB_SCRIPT_ON_A_DISK, **options)[0]

    for name in ("many", "bomb"):
        content = (tmp_path / f"{name}.parquet").read_bytes()
        hub.add_repo(f"user/{name}", kind="dataset", files={"train.parquet": content})
    size = (tmp_path / "many.parquet").stat().st_size
    message = r"the dataset 'user/many' \(1 file of .* MB, and their table\) needs .* free: free"
    with pytest.raises(ClientError, match=message) as caught:
        load("many", 2 * size - 1)
    assert caught.value.kind == "DataError"
    assert not hub.count("GET .*train.parquet")
    assert load("many", 10**9) == 50
    assert load("many", 10**5) == 50  # nothing is downloaded or written again
    with pytest.raises(ClientError, match=r"train.parquet' needs 1 GB, but"):
        load("bomb", 10**9)


@pytest.mark.slow
def test_hub_datasets_are_loaded_and_cannot_name_local_files(hub, hub_process, tmp_path):
    secret = folder_of(tmp_path / "home", {"secret.png": zoo.encode(zoo.GREY)}) / "secret.png"
    greys((8, 8), (8, 8)).to_parquet(tmp_path / "good.parquet")
    pq.write_table(naming(str(secret)), tmp_path / "bad.parquet")
    files = {
        "photos": CLASSES,
        "rows": {"data/test-00000-of-00001.parquet": (tmp_path / "good.parquet").read_bytes()},
        "hostile": {"train.parquet": (tmp_path / "bad.parquet").read_bytes()},
    }
    for name, content in files.items():
        hub.add_repo(f"user/{name}", kind="dataset", files=content)
    client, written = hub_process, len(hub_process.log.read_text())
    count, facts, sums = client.run(HUB_SCRIPT, source="user/photos", options={})
    assert (count, facts["class_names"]) == (6, ["a", "b"])
    assert sums == [int((zoo.grey(8, 8) // 2 + i).sum()) for i in (0, 1, 2, 0, 1, 2)]
    assert client.run(HUB_SCRIPT, source="user/rows", options={"split": "test"})[0] == 2
    for source, options, message in [
        ("user/hostile", {}, "1 of 2 rows contain no image but a path"),
        ("user/rows", {}, "`split` must be one of test, got 'train'"),
        ("user/rows", {"config_name": "big"}, "'big' not found. Available: .'default'."),
        ("user/rows", {"revision": "v9"}, "v9"),
        ("user/nothing", {}, "user/nothing"),
    ]:
        with pytest.raises(ClientError, match=message) as caught:
            client.run(HUB_SCRIPT, source=source, options=options)
        assert caught.value.kind == "DataError"
    hub.stop()
    try:  # the cache answers at once
        assert client.run(HUB_SCRIPT, source="user/rows", options={"split": "test"})[0] == 2
    finally:
        hub.start()
    assert "Retrying" not in client.log.read_text()[written:]
