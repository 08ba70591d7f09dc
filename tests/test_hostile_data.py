"""Datasets of strangers: images or a refusal of one message, in bounded time and memory."""

import contextlib
import json
import os
import shutil
import socket
import struct
import time
import zlib
from itertools import chain

import datasets
import image_zoo as zoo
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_sets import folder_of, greys, prepare, rows
from peak_memory import peak_memory_growth

from ddpm_hf.cli import run_command
from ddpm_hf.data import DataError, encoded_images, file_limits, load_images, prepare_images
from ddpm_hf.data.file_limits import MAX_LINE_BYTES
from ddpm_hf.data.shards import read_cells
from ddpm_hf.sampling import open_drawn

MAX_SECONDS, MAX_BYTES = 20, 2**28
IMAGE_FILE = zoo.encode(zoo.grey(8, 8))

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture
def status_of(tmp_path, capsys):
    """The exit status of a command that prepares a dataset."""

    def check(source, read=load_images):
        def command(argv):
            found = read(source)
            if isinstance(found, datasets.Dataset):
                prepare(found, cache_dir=tmp_path / "cache")
            return 0

        start = time.monotonic()
        with peak_memory_growth() as memory:
            status = run_command(command, [])
        printed = capsys.readouterr().err
        assert "Traceback" not in printed
        assert time.monotonic() - start < MAX_SECONDS
        assert memory.num_bytes < MAX_BYTES
        if status:
            assert "ddpm-hf: error: " in printed
            assert max(map(len, printed.splitlines())) < 1500
        return status

    return check


def header_of(kind, width, height):
    """The start of an image file that claims this size."""
    if kind == "png":
        return zoo.png(width, height, 8, 0, b"")
    if kind == "bmp":
        facts = (40, width, height, 1, 24, 0, 0, 1, 1, 0, 0)
        return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + struct.pack("<IiiHHIIiiII", *facts)
    if kind == "gif":
        return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + b","
    return b"P6 %d %d 255\n" % (width, height)


BOMB = zlib.compress(bytes(2**24))
FILES = {
    "empty": b"",
    "text": b"not an image",
    "page": b"<!DOCTYPE html><html></html>",
    "vector": b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "archive": b"PK\x03\x04" + bytes(100),
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n",
    "cut": IMAGE_FILE[:-20],
    "changed": IMAGE_FILE[:40] + b"\xff\xff" + IMAGE_FILE[42:],
    "only a header": zoo.png(8, 8, 8, 0, b""),
    "no size": zoo.png(0, 0, 8, 0, b""),
    "wrong depth": zoo.png(8, 8, 7, 0, b"\0" * 72),
    "wrong type": zoo.png(8, 8, 8, 5, b"\0" * 72),
    "text chunk": zoo.png(8, 8, 8, 0, bytes(72), zoo.chunk(b"zTXt", b"a\0\0" + BOMB)),
    "profile": zoo.png(8, 8, 8, 0, bytes(72), zoo.chunk(b"iCCP", b"a\0\0" + BOMB)),
    "EXIF": zoo.png(8, 8, 8, 0, bytes(72), zoo.chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "JPEG start": b"\xff\xd8\xff\xe0" + bytes(64),
    "TIFF loop": b"II*\0\x08\0\0\0\0\0\x08\0\0\0",
    "TIFF offset": b"II*\0\xff\xff\xff\xff",
    "WebP": b"RIFF\xff\xff\xff\xffWEBPVP8X" + bytes(32),
    "AVIF": struct.pack(">I", 24) + b"ftypavif" + bytes(64),
    "icon": b"\0\0\1\0\1\0" + bytes(32),
    **{f"{kind} {size}": header_of(kind, size, size) for kind in ("png", "bmp", "gif", "ppm")
       for size in (20_000, 65_535)},
    "wide": header_of("ppm", 10**9, 1),
    "digits": b"P6 " + b"9" * 10_000,
}  # fmt: skip


# Damage outside the pixels: only the end marker and a checksum are missing, or the EXIF data lie.
READABLE_FILES = {"cut", "EXIF"}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_image_is_refused_and_can_be_skipped(name, status_of, tmp_path):
    folder = folder_of(tmp_path / "x", {"good.png": IMAGE_FILE, "bad.png": FILES[name]})
    assert status_of(folder) == (0 if name in READABLE_FILES else 2)
    images = prepare(load_images(folder), on_bad_image="skip", cache_dir=tmp_path / "cache")
    assert len(images) == (2 if name in READABLE_FILES else 1)


LONG_NAME = "x" * 251 + ".png"
METADATA = {
    "empty.csv": b"",
    "one name.csv": b"file_name\n",
    "bytes.csv": bytes(range(256)),
    "null.csv": b"file_name,a\ngood.png,\0\n",
    "no such file.csv": b"file_name,a\nnone.png,1\n",
    "outside.csv": b"file_name,a\n../../etc/passwd,1\n",
    "absolute.csv": b"file_name,a\n/etc/passwd,1\n",
    "address.csv": b"file_name,a\nhttp://127.0.0.1:1/x.png,1\n",
    "quote.csv": b'file_name,a\ngood.png,"x\n',
    "more cells.csv": b"file_name,a\ngood.png,1,2,3,4\n",
    "fewer cells.csv": b"file_name,a,b\ngood.png\n",
    "twice.csv": b"file_name,a\ngood.png,1\ngood.png,2\n",
    "same column.csv": b"file_name,file_name\ngood.png,good.png\n",
    "latin.csv": b"file_name,a\ngood.png,\xe9\n",
    "utf16.csv": "file_name,a\ngood.png,1\n".encode("utf-16"),
    "long cell.csv": b"file_name,a\ngood.png," + b"x" * 200_000 + b"\n",
    "long line.csv": b"file_name,a\ngood.png," + b"x" * 3_000_000 + b"\n",
    "long name.csv": b"file_name,a\n" + b"x" * 5000 + b".png,1\n",
    "empty.jsonl": b"",
    "text.jsonl": b"hello\n",
    "list.jsonl": b'[{"file_name": "good.png"}]\n',
    "nested.jsonl": b'{"file_name": "good.png", "a": ' + b"[" * 100 + b"]" * 100 + b"}\n",
    "deep.jsonl": b'{"file_name": ' + b"[" * 100_000 + b"\n",
    "number.jsonl": b'{"file_name": 7}\n',
    "null.jsonl": b'{"file_name": null}\n',
    "object.jsonl": b'{"file_name": {"a": 1}}\n',
    "mixed.jsonl": b'{"file_name": "good.png", "a": 1}\n{"file_name": "good.png", "a": "x"}\n',
    "second line.jsonl": b'{"file_name": "good.png"}\n{{{\n',
    "cut.jsonl": b'{"file_name": "good.png", "a": "',
    "outside.jsonl": b'{"file_name": "../x.png"}\n',
    "long line.jsonl": b'{"file_name": "good.png"}\n{"file_name": "' + b"x" * 3_000_000 + b'"}\n',
    "several.jsonl": b'{"a_file_name": "good.png", "b_file_name": "good.png"}\n',
    "text.parquet": b"hello",
    "cut.parquet": b"PAR1" + bytes(20) + b"PAR1",
    "footer.parquet": b"PAR1" + struct.pack("<I", 2**31 - 1) + b"PAR1",
}
# Without a column `file_name` or its first line, the file is not metadata of the images.
NO_METADATA = {
    "empty.csv", "bytes.csv", "latin.csv", "utf16.csv", "empty.jsonl", "text.jsonl", "list.jsonl",
    "deep.jsonl", "cut.jsonl", "text.parquet", "cut.parquet", "footer.parquet",
}  # fmt: skip
VALID_METADATA = {"null.csv", "fewer cells.csv", "twice.csv", "same column.csv"}


@pytest.mark.parametrize("name", METADATA)
def test_hostile_metadata_is_ignored_or_refused(name, status_of, tmp_path):
    folder = folder_of(tmp_path / "x", {"good.png": IMAGE_FILE})
    (folder / f"metadata.{name.split('.')[1]}").write_bytes(METADATA[name])
    assert status_of(folder) == (0 if name in NO_METADATA | VALID_METADATA else 2)


LABELS = {
    "text": "hello", "deep": "[" * 100_000, "list": "[]", "number": '{"labels": 7}',
    "words": '{"labels": ["ab", "cd"]}', "huge": '{"labels": [["good.png", 1' + "0" * 400 + "]]}",
    "fraction": '{"labels": [["good.png", 0.5]]}', "list label": '{"labels": [["good.png", [1]]]}',
    "no names": '{"labels": [[7, 1]]}', "null": '{"labels": null}',
    "true": '{"labels": [["a", true]]}',
}  # fmt: skip


@pytest.mark.parametrize("name", LABELS)
def test_hostile_labels_are_refused_if_labels_are_needed(name, status_of, tmp_path):
    folder = folder_of(tmp_path / "x", {"good.png": IMAGE_FILE, "a.png": IMAGE_FILE})
    (folder / "dataset.json").write_text(LABELS[name])

    def with_labels(source):
        return prepare_images(load_images(source), label_column=True, progress=False)

    assert status_of(folder) == 0
    assert status_of(folder, with_labels) == 2


def folder_with_itself(folder):
    (folder / "again").symlink_to(folder)


def folder_with_nothing(folder):
    (folder / "good.png").unlink()


def deep_folders(folder):
    (folder / "/".join(["d"] * 200)).mkdir(parents=True)


def dangling_link(folder):
    (folder / "x.png").symlink_to("nowhere")


def folder_named_like_an_image(folder):
    (folder / "x.png").mkdir()


def names_with_control_characters(folder):
    folder_of(folder, {"a\x1b[2J\nb.png": b"x", "\u202egnp.png": b"x", LONG_NAME: b"x"})


def name_that_is_not_text(folder):
    with open(os.fsencode(folder) + b"/\xff\xfe.png", "wb") as file:
        file.write(IMAGE_FILE)


def pattern_in_the_name(folder):
    folder_of(folder, {"[a-z]*?.png": IMAGE_FILE, "${HOME}.png": IMAGE_FILE, "-rf.png": b"x"})


def many_classes(folder):
    folder_of(folder, {f"{i}/x.png": IMAGE_FILE for i in range(100)})


def bind_socket(path):
    """A Unix socket, whose address is limited to about 100 characters."""
    server = socket.socket(socket.AF_UNIX)
    with contextlib.chdir(path.parent):
        server.bind(path.name)
    server.close()


def loading_script(folder):
    folder_of(folder, {"x.py": b"raise SystemExit(7)", "dataset_infos.json": b"[", "README.md": (
        b"---\nconfigs:\n- config_name: default\n  data_files: /etc/passwd\n---\n")})  # fmt: skip


@pytest.mark.parametrize("name", ["x.png", "a/x.png", "metadata.csv", "dataset.json", "x.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_a_special_file_in_a_folder_is_refused_by_name(kind, name, tmp_path):
    """Opening a pipe would wait for ever, and a device may have no end."""
    path = folder_of(tmp_path / "x", {"good.png": IMAGE_FILE, "a/good.png": IMAGE_FILE}) / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        bind_socket(path)
    with pytest.raises(DataError, match=rf"{path.name}' is not a regular file: move it out"):
        load_images(tmp_path / "x")


READABLE_FOLDERS = [
    folder_with_itself, deep_folders, folder_named_like_an_image, many_classes, loading_script,
]  # fmt: skip
REFUSED_FOLDERS = [
    folder_with_nothing, dangling_link, names_with_control_characters, name_that_is_not_text,
    pattern_in_the_name,
]  # fmt: skip


@pytest.mark.parametrize("change", READABLE_FOLDERS + REFUSED_FOLDERS)
def test_an_unusual_folder_is_read_or_refused(change, status_of, tmp_path):
    folder = folder_of(tmp_path / "x", {"good.png": IMAGE_FILE})
    change(folder)
    assert status_of(folder) == (0 if change in READABLE_FOLDERS else 2)


CELLS = [{"bytes": IMAGE_FILE, "path": "x.png"}]
COLUMNS = {
    "none": pa.table({"a": [1]}),
    "no columns": pa.table({}),
    "no rows": pa.table({"image": pa.array([], pa.binary())}),
    "null": pa.table({"image": pa.array([None], pa.binary())}),
    "null type": pa.table({"image": pa.nulls(2)}),
    "text": pa.table({"image": ["/etc/passwd"]}),
    "numbers": pa.table({"image": [1, 2]}),
    "list": pa.table({"image": [[IMAGE_FILE]]}),
    "nested": pa.table({"image": [{"bytes": {"bytes": IMAGE_FILE}, "path": None}]}),
    "more fields": pa.table({"image": [CELLS[0] | {"x": 1}]}),
    "text as bytes": pa.table({"image": [{"bytes": "text", "path": "x"}]}),
    "two": pa.table({"a": CELLS, "b": CELLS}),
    "empty name": pa.table({"": CELLS}),
    "control characters": pa.table({"\x1b[2J\n": [1]}),
    "dictionary": pa.table({"image": pa.array([IMAGE_FILE] * 3).dictionary_encode()}),
    "labels": pa.table({"image": CELLS, "label": [10**12]}),
    "path": pa.table({"image": [{"bytes": None, "path": "/etc/passwd"}]}),
    "address": pa.table({"image": [{"bytes": None, "path": "http://127.0.0.1:1/x"}]}),
}
READABLE_COLUMNS = {"empty name", "dictionary", "labels"}
READABLE_INFORMATION = [
    "[]",
    '{"info": {"features": {"image": {"_type": "Image", "mode": 7}}}}',
    '{"info": {"features": {"image": {"_type": "Image", "mode": "NOPE"}}}}',
    '{"info": {"features": {"other": {"_type": "Image"}}}}',
]
REFUSED_INFORMATION = [
    "[", "7", '{"info": 7}', '{"info": {"features": 7}}',
    '{"info": {"features": {"image": 7}}}',
    '{"info": {"features": {"image": {"_type": "Nope"}}}}',
    '{"info": {"features": {"image": {"_type": "os.system"}}}}',
    '{"info": {"features": {"image": {"_type": "ClassLabel", "names": 7}}}}',
    '{"info": {"features": {"image": {"_type": "Value", "dtype": "nope"}}}}',
    '{"info": {"features": ' + '{"a": ' * 500 + "1" + "}" * 500 + "}}",
]  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_hostile_columns_are_read_or_refused(name, status_of, tmp_path):
    table = COLUMNS[name]
    pq.write_table(table, tmp_path / "x.parquet")
    assert status_of(tmp_path / "x.parquet") == (0 if name in READABLE_COLUMNS else 2)


@pytest.mark.parametrize(
    "information", READABLE_INFORMATION + REFUSED_INFORMATION, ids=lambda text: text[:60]
)
def test_a_hostile_description_of_columns_is_ignored_or_refused(information, status_of, tmp_path):
    table = pa.table({"image": CELLS}).replace_schema_metadata({"huggingface": information})
    pq.write_table(table, tmp_path / "x.parquet")
    assert status_of(tmp_path / "x.parquet") == (0 if information in READABLE_INFORMATION else 2)


def arrow_stream():
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, COLUMNS["labels"].schema) as writer:
        writer.write_table(COLUMNS["labels"])
    return sink.getvalue().to_pybytes()


STREAM = arrow_stream()
TABLES = {
    "empty.parquet": b"",
    "text.parquet": b"hello" * 10,
    "marks.parquet": b"PAR1PAR1",
    "footer.parquet": b"PAR1" + bytes(100) + struct.pack("<I", 10**6) + b"PAR1",
    "zeros.parquet": b"PAR1" + bytes(100) + struct.pack("<I", 50) + b"PAR1",
    "empty.arrow": b"",
    "text.arrow": b"hello" * 10,
    "cut.arrow": STREAM[: len(STREAM) // 2],
    "length.arrow": b"\xff\xff\xff\xff\xff\xff\xff\x7f" + STREAM[8:],
    "body.arrow": STREAM[:-40] + b"\xff" * 40,
    "schema.arrow": STREAM[:16] + b"\xff" * 40 + STREAM[56:],
}


@pytest.mark.parametrize("name", TABLES)
def test_damaged_tables_are_refused(name, status_of, tmp_path):
    (tmp_path / name).write_bytes(TABLES[name])
    assert status_of(tmp_path / name) == 2
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / name).rename(folder / name)
    assert status_of(folder) == 2


@pytest.mark.parametrize("name", ["x.parquet", "train-0.arrow"])
@pytest.mark.parametrize("position", [0.1, 0.3, 0.5, 0.7, 0.9, 0.97])
def test_a_flipped_byte_in_a_table_is_read_or_refused(name, position, status_of, tmp_path):
    pq.write_table(COLUMNS["labels"], tmp_path / "x.parquet")
    (tmp_path / "train-0.arrow").write_bytes(STREAM)
    content = bytearray((tmp_path / name).read_bytes())
    content[int(position * len(content))] ^= 0xFF
    (tmp_path / name).write_bytes(content)
    assert status_of(tmp_path / name) in (0, 2)


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json"])
@pytest.mark.parametrize(
    "text",
    ["", "7", "[]", "{}", "{", "[" * 100_000, '{"_data_files": 7}', '{"_data_files": [7]}',
     '{"_data_files": [{"filename": 7}]}', '{"_data_files": [{"filename": "none.arrow"}]}',
     '{"_data_files": [{"filename": "/etc/passwd"}]}', '{"splits": 7}', '{"splits": [7]}',
     '{"_fingerprint": 7, "_data_files": []}', '{"features": 7}', '{"features": {"image": 7}}',
     '{"features": {"image": {"_type": "Nope"}}}'],
    ids=lambda text: text[:40],
)  # fmt: skip
def test_damaged_files_of_a_saved_dataset_are_refused(name, text, status_of, tmp_path):
    greys((8, 8)).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / name).write_text(text)
    is_readable = name == "dataset_info.json" and (text == "{}" or "_data_files" in text)
    assert status_of(tmp_path / "saved") == (0 if is_readable else 2)


def test_a_parquet_file_with_huge_rows_is_refused_by_its_metadata(tmp_path, monkeypatch):
    monkeypatch.setattr(file_limits, "MAX_IMAGE_BYTES", 2**20)
    table = pa.table({"image": [bytes(2**21)]})
    pq.write_table(table, tmp_path / "x.parquet", compression="zstd")  # 0.2 kB
    with pytest.raises(DataError, match=r"x.parquet' has rows of 2 MiB"):
        load_images(tmp_path / "x.parquet")
    folder = folder_of(tmp_path / "x", {"good.png": IMAGE_FILE})
    table = pa.table({"file_name": ["good.png"], "text": ["x" * 2**21]})
    pq.write_table(table, folder / "metadata.parquet")
    with pytest.raises(DataError, match=r"metadata.parquet' has rows of 2 MiB"):
        load_images(folder)
    monkeypatch.setattr(file_limits, "MAX_METADATA_BYTES", 2**20)
    names = {"file_name": ["good.png"] * 30, "text": ["x" * 2**19] * 30}
    pq.write_table(pa.table(names), folder / "metadata.parquet")
    with pytest.raises(DataError, match=r"metadata.parquet' has .* MB of rows in memory"):
        load_images(folder)


def repeated(value, count, path):
    """A parquet file whose rows hold the same image, which is stored once."""
    indices = pa.array(np.zeros(count, np.int32))
    images = pa.DictionaryArray.from_arrays(indices, pa.array([value]))
    names = pa.DictionaryArray.from_arrays(indices, pa.array(["x.png"]))
    cells = pa.StructArray.from_arrays([images, names], ["bytes", "path"])
    pq.write_table(pa.table({"image": cells}), path, compression="zstd", store_schema=False)


def test_a_small_parquet_file_with_more_rows_than_the_disk_holds_is_refused(status_of, tmp_path):
    count = 2 * shutil.disk_usage(tmp_path).free // 2**20
    repeated(bytes(2**20), count, tmp_path / "x.parquet")
    assert (tmp_path / "x.parquet").stat().st_size < 2**20
    message = r"the table of .*x.parquet' needs [\d,]+ GB, but .* free: free disk space"
    with pytest.raises(DataError, match=message):
        load_images(tmp_path / "x.parquet")
    assert status_of(tmp_path) == 2


def test_repeated_rows_are_counted_and_read_in_small_batches(tmp_path):
    file = tmp_path / "x.parquet"
    repeated(bytes(2**23), 40, file)
    size = file_limits.parquet_size([str(file)])
    assert size.of_row == pytest.approx(2**23, rel=1e-3)
    assert size.of_table == pytest.approx(41 * 2**23, rel=1e-3)  # and the dictionary
    assert size.reader_options()["batch_size"] * size.of_row <= 2**28
    batches = [[len(cell["bytes"]) for cell in cells] for cells in read_cells(file, "image")]
    assert max(map(len, batches)) * 2**23 <= 2**28
    assert [*chain(*batches)] == [2**23] * 40


def test_distinct_images_need_their_own_size(tmp_path):
    images = [bytes([i]) * 1000 * (1 + i % 5) for i in range(256)]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet", row_group_size=64)
    size = file_limits.parquet_size([str(tmp_path / "x.parquet")])
    assert size.of_table == pytest.approx(sum(map(len, images)), rel=0.05)
    assert size.of_row < 6000


def test_rows_of_few_distinct_values_are_no_large_rows(tmp_path):
    table = pa.table({"image": [IMAGE_FILE] * 9999, "text": ["ab"] * 9999, "label": [1] * 9999})
    pq.write_table(table, tmp_path / "x.parquet")
    size = file_limits.parquet_size([str(tmp_path / "x.parquet")])
    assert size.of_row < len(IMAGE_FILE) + 100
    assert size.reader_options() == {}


def test_a_parquet_file_with_a_large_row_group_is_read_in_batches(status_of, tmp_path, monkeypatch):
    monkeypatch.setattr(file_limits, "_BATCH_BYTES", 1000)
    files = [zoo.encode(zoo.grey(8, 8) + np.uint8(i)) for i in range(20)]
    pq.write_table(pa.table({"image": files}), tmp_path / "x.parquet")
    options = file_limits.parquet_size([str(tmp_path / "x.parquet")]).reader_options()
    assert 1 <= options["batch_size"] < 20
    images = prepare(load_images(tmp_path / "x.parquet"), cache_dir=tmp_path / "cache")
    assert [image[0, 0, 0].item() for image in images] == list(range(20))


def test_a_row_with_a_huge_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(encoded_images, "MAX_IMAGE_BYTES", 2**20)
    found = rows(IMAGE_FILE, None, IMAGE_FILE + bytes(2**20), IMAGE_FILE)
    with pytest.raises(DataError, match="row 2 has 1 MiB"):
        prepare(found, on_bad_image="skip", cache_dir=tmp_path)
    assert len(prepare(found.select([0, 3]), cache_dir=tmp_path)) == 2


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("line", [2, 3])
def test_a_long_line_of_metadata_is_refused_before_it_is_read(line, suffix, tmp_path):
    folder = folder_of(tmp_path, {"good.png": IMAGE_FILE})
    named = {"csv": "good.png,x", "jsonl": '{"file_name": "good.png"}'}[suffix]
    lines = ["file_name,a" if suffix == "csv" else named, named, named]
    (folder / f"metadata.{suffix}").write_text("\n".join(lines))
    assert len(load_images(folder)) == (2 if suffix == "csv" else 3)
    lines[line - 1] += "x" * MAX_LINE_BYTES
    (folder / f"metadata.{suffix}").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"has a line of more than 1,048,576 bytes"):
        load_images(folder)


NAMES = ["", "no-such-folder", "*", "**/*.parquet", "[", "~nobody/x", "a/b/c", "\0", "x" * 300,
         "../" * 50, "hf://datasets/a/b", "http://127.0.0.1:1/x.parquet", "s3://a/b",
         "file:///etc"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:20])
def test_a_name_that_is_no_data_set_is_refused(name, status_of, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert status_of(name) == (1 if len(name) == 300 else 2)  # 1: an error of the file system


def array_file(header, magic=b"\x93NUMPY\x01\x00"):
    text = header.encode() + b" " * (-len(header) % 64) + b"\n"
    return magic + struct.pack("<H", len(text)) + text


ARRAYS = {
    "huge": array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 9, 9, 3)}"),
    "code": array_file("{'descr': __import__('os').system('x'), 'shape': (1,)}"),
    "objects": array_file("{'descr': '|O', 'fortran_order': False, 'shape': (1, 8, 8, 1)}") + b"x",
    "negative": array_file("{'descr': '|u1', 'fortran_order': False, 'shape': (-1, 8, 8, 1)}"),
    "nested": array_file("{'descr': '|u1', 'shape': " + "(" * 9000),
    "version": array_file("{}", b"\x93NUMPY\x09\x00"),
    "zip": b"PK\x03\x04" + bytes(60),
}


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("name", ARRAYS)
def test_hostile_arrays_are_refused(name, suffix, status_of, tmp_path):
    (tmp_path / f"x{suffix}").write_bytes(ARRAYS[name])
    assert status_of(tmp_path / f"x{suffix}", open_drawn) == 2


RECORD = {"num_images": 4, "batch_size": 2, "seed": 0, "class_labels": None, "dtype": "uint8"}


@pytest.mark.parametrize(
    "changes",
    [{"num_images": 10**12}, {"num_images": -1}, {"num_images": 0}, {"num_images": "4"},
     {"num_images": 1.5}, {"num_images": None}, {"num_images": True}, {"batch_size": 0},
     {"batch_size": -1}, {"batch_size": "2"}, {"batch_size": None}, {"batch_size": 1},
     {"num_images": 10**9, "batch_size": 10**9}, {"class_labels": 7}, {"class_labels": ["x"]},
     {"class_labels": [[1], [2, 3]]}, {"class_labels": [1.5]}],
    ids=str,
)  # fmt: skip
def test_a_hostile_record_of_drawn_images_is_refused(changes, status_of, tmp_path):
    for i in range(2):
        np.save(tmp_path / f"part-{i:06d}.npy", np.zeros((2, 8, 8, 1), np.uint8))
    (tmp_path / "options.json").write_text(json.dumps({"settings": RECORD}))
    assert status_of(tmp_path, open_drawn) == 0
    (tmp_path / "options.json").write_text(json.dumps({"settings": RECORD | changes}))
    assert status_of(tmp_path, open_drawn) == 2
