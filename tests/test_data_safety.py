"""Paths outside the dataset are rejected, and messages contain no secrets."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import datasets
import image_zoo as zoo
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import CLASSES, folder_of, greys, naming, prepare

from ddpm_hf.data import DataError, load_images, prepare_images


@pytest.fixture
def counting_server():
    """A local HTTP server and the list of requested paths."""
    requested = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            requested.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(zoo.encode(zoo.GREY))

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requested
    server.shutdown()
    server.server_close()


def load_from_memory(table, _):
    return datasets.Dataset(table)


def load_from_parquet(table, folder):
    pq.write_table(table, folder / "rows.parquet")
    return load_images(folder / "rows.parquet")


def load_from_parquet_folder(table, folder):
    pq.write_table(table, folder / "rows.parquet")
    return load_images(folder)


def load_from_saved(table, folder):
    greys((8, 8), (8, 8)).save_to_disk(folder / "saved")
    with pa.OSFile(str(next((folder / "saved").glob("*.arrow"))), "wb") as file:
        pa.ipc.new_stream(file, table.schema).write_table(table)
    return load_images(folder / "saved")


@pytest.mark.slow
@pytest.mark.parametrize(
    "load", [load_from_memory, load_from_parquet, load_from_parquet_folder, load_from_saved]
)
@pytest.mark.parametrize("place", ["outside", "inside", "relative", "url", "zip"])
def test_rows_with_only_a_path_or_url_are_rejected_without_a_request(
    tmp_path, counting_server, load, place
):
    url, requested = counting_server
    folder = folder_of(tmp_path / "data", {"inside.png": zoo.encode(zoo.GREY)})
    folder_of(tmp_path, {"outside.png": zoo.encode(zoo.GREY)})
    path = {
        "outside": str(tmp_path / "outside.png"),
        "inside": str(folder / "inside.png"),
        "relative": "inside.png",
        "url": f"{url}/x.png",
        "zip": f"zip://x.png::{url}/x.zip",
    }[place]
    # Renamed while loading; otherwise it would be an image folder.
    (folder / "inside.png").rename(folder / "inside.txt")
    dataset = load(naming(path), folder)
    (folder / "inside.txt").rename(folder / "inside.png")
    with pytest.raises(
        DataError, match=r"1 of 2 rows contain no image but a path.*row 1"
    ) as caught:
        prepare(dataset, on_bad_image="skip")
    assert path in str(caught.value)
    assert requested == []


def test_paths_are_read_under_image_root(tmp_path, counting_server):
    url, requested = counting_server
    folder_of(tmp_path, {"in/a.png": zoo.encode(zoo.grey(6, 9) + 1), "b.png": b"x"})
    root = tmp_path / "in"
    (root / "link.png").symlink_to(tmp_path / "b.png")
    for path in ("a.png", f"{root}/a.png", f"{root}/../in/a.png"):
        images = prepare(datasets.Dataset(naming(path)), image_root=root)
        np.testing.assert_array_equal(images[1][0], zoo.grey(6, 9) + 1)
    for path in ("../b.png", str(tmp_path / "b.png"), "link.png", f"{url}/a.png"):
        with pytest.raises(DataError, match="not under"):
            prepare(datasets.Dataset(naming(path)), image_root=root)
    with pytest.raises(DataError, match=r"row 1 \('none.png'\): file not found"):
        prepare(datasets.Dataset(naming("none.png")), image_root=root)
    assert requested == []


def test_a_transform_is_rejected_instead_of_ignored(tmp_path):
    dataset = load_images(folder_of(tmp_path, CLASSES))
    with pytest.raises(DataError, match=r"transform.*reset_format"):
        prepare_images(dataset.with_transform(lambda rows: rows))


def test_selected_rows_of_a_folder_need_image_root(tmp_path):
    dataset = load_images(folder_of(tmp_path, CLASSES)).select([4, 0])
    with pytest.raises(DataError, match=r"2 of 2 rows.*pass the folder as `image_root`"):
        prepare(dataset)
    np.testing.assert_array_equal(
        prepare(dataset, image_root=tmp_path)[0][0], zoo.grey(8, 8) // 2 + 1
    )


def imagefolder(root):
    """A folder loaded by `datasets` alone, a dictionary of one split."""
    folder_of(root, CLASSES)
    return datasets.load_dataset("imagefolder", data_dir=str(root))


def test_a_folder_loaded_by_imagefolder_needs_no_image_root(tmp_path):
    dataset = imagefolder(tmp_path / "in")
    images = prepare(dataset)
    np.testing.assert_array_equal(images[2][0], zoo.grey(8, 8) // 2 + 2)
    assert images.facts.class_names == ("a", "b")
    assert len(prepare(dataset["train"].shuffle(seed=1).select([0, 5, 3]))) == 3


@pytest.mark.parametrize("place", ["outside", "link"])
def test_other_rows_joined_with_imagefolder_rows_are_rejected(tmp_path, place):
    folder_of(tmp_path, {"outside.png": zoo.encode(zoo.GREY)})
    if place == "link":
        (tmp_path / "in" / "a").mkdir(parents=True)
        (tmp_path / "in" / "a" / "x.png").symlink_to(tmp_path / "outside.png")
        dataset = imagefolder(tmp_path / "in")["train"]
    else:
        mine = imagefolder(tmp_path / "in")["train"].select_columns(["image"])
        foreign = datasets.Dataset(naming(str(tmp_path / "outside.png")))
        dataset = datasets.concatenate_datasets([mine, foreign])
    with pytest.raises(DataError, match=r"rows contain no image but a path.*image_root"):
        prepare(dataset)


@pytest.mark.parametrize(
    "source",
    [
        "https://user:S3cret@example.com/a.parquet",
        "https://example.com/a.parquet?token=S3cret",
        "https://user:S3cret@example.com/*.parquet",
        "./hf_S3cretS3cretS3cret",
        "user/hf_S3cretS3cretS3cret",
    ],
)
def test_secrets_in_dataset_names_are_hidden(source):
    with pytest.raises(DataError, match=r"\[hidden\]") as caught:
        load_images(source)
    assert "S3cret" not in str(caught.value)


@pytest.mark.parametrize("target", ["outside.png", "outside"])
def test_links_out_of_the_folder_are_rejected(tmp_path, target):
    root = folder_of(tmp_path / "in", CLASSES)
    folder_of(
        tmp_path, {"outside.png": zoo.encode(zoo.GREY), "outside/x.png": zoo.encode(zoo.GREY)}
    )
    (root / "a" / "link.png").symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"1 link leads out of the folder.*link\.png"):
        load_images(root)


def test_links_to_and_within_the_folder_are_followed(tmp_path):
    root = folder_of(tmp_path / "in", CLASSES)
    (root / "a" / "link.png").symlink_to(root / "b" / "2.png")
    (tmp_path / "door").symlink_to(root)
    images = prepare(load_images(tmp_path / "door"))
    np.testing.assert_array_equal(images[3][0], zoo.grey(8, 8) // 2 + 2)


@pytest.mark.parametrize("name", ["../outside.arrow", "link.arrow"])
def test_a_saved_dataset_cannot_name_files_outside(tmp_path, name):
    greys((8, 8)).save_to_disk(tmp_path / "in")
    (arrow,) = (tmp_path / "in").glob("*.arrow")
    arrow.rename(tmp_path / "outside.arrow")
    if name == "link.arrow":
        (tmp_path / "in" / name).symlink_to(tmp_path / "outside.arrow")
    state = json.loads((tmp_path / "in" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "in" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"outside|leads out of the folder"):
        load_images(tmp_path / "in")
