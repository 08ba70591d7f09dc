"""Preparation of images: column, options and cache."""

import json
import os
import pickle
import signal
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO

import datasets
import image_zoo as zoo
import numpy as np
import pytest
from image_sets import as_numpy, folder_of, greys, prepare, rows
from PIL import Image
from processes import run_forked

from ddpm_hf.data import DataError, load_images, preprocessing


def two_columns():
    cells = rows(zoo.encode(zoo.GREY))
    return cells.add_column("mask", [{"bytes": zoo.encode(zoo.GREY[::-1]), "path": None}]).cast(
        datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    )


def test_the_image_column_may_have_any_name():
    for name in ("img", "jpg", "picture of a cat"):
        images = prepare(rows(zoo.encode(zoo.GREY)).rename_column("image", name))
        np.testing.assert_array_equal(images[0][0], zoo.GREY)


def test_encoded_images_are_found_in_undeclared_columns():
    data = zoo.encode(zoo.GREY)
    for cell in (data, {"bytes": data, "path": "x.png"}):
        images = prepare(datasets.Dataset.from_dict({"picture": [cell], "number": [1]}))
        np.testing.assert_array_equal(images[0][0], zoo.GREY)


def test_several_image_columns_need_image_column():
    cells = two_columns()
    with pytest.raises(DataError, match=r"several image columns; set `image_column`.*image.*mask"):
        prepare(cells)
    np.testing.assert_array_equal(prepare(cells, image_column="mask")[0][0], zoo.GREY[::-1])


def test_the_error_for_a_wrong_column_lists_the_columns():
    with pytest.raises(DataError, match=r"'imge'.*did you mean 'image'.*columns are image"):
        prepare(rows(zoo.encode(zoo.GREY)), image_column="imge")
    numbers = datasets.Dataset.from_dict({"number": [1, 2]})
    with pytest.raises(DataError, match=r"no image column.*number \(int64\)"):
        prepare(numbers)
    with pytest.raises(DataError, match="`image_column` must be an image column, got 'number'"):
        prepare(numbers, image_column="number")


def test_a_dataset_dict_of_one_split_is_accepted():
    assert len(prepare(datasets.DatasetDict(test=greys((8, 8), (8, 8))))) == 2


@pytest.mark.parametrize("count", [1, 3])
def test_small_datasets_are_accepted(count):
    assert len(prepare(greys(*[(8, 8)] * count))) == count


def test_empty_datasets_several_splits_and_other_types_are_rejected():
    with pytest.raises(DataError, match=r"^the dataset has no rows$"):
        prepare(rows())
    with pytest.raises(DataError, match=r"several splits.*test, train"):
        prepare(datasets.DatasetDict(test=greys((8, 8)), train=greys((8, 8))))
    with pytest.raises(TypeError, match=r"datasets\.Dataset.*list"):
        prepare([1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, r"`resolution` must be an int in \[1, 8192\], got 0"),
        ({"resolution": 8193}, "`resolution` must be .* got 8193"),
        ({"resolution": 64.0}, "`resolution` must be .* got 64.0"),
        ({"resolution": True}, "`resolution` must be .* got True"),
        ({"image_mode": "CMYK"}, "`image_mode` must be one of None, L, LA, RGB, RGBA, got 'CMYK'"),
        ({"bit_depth": 12}, "`bit_depth` must be one of None, 8, 16, got 12"),
        ({"crop": "middle"}, "`crop` must be one of center, random, none, native, got 'middle'"),
        ({"on_bad_image": "ignore"}, "`on_bad_image` must be one of error, skip, got 'ignore'"),
    ],
)
def test_an_invalid_option_is_reported_with_its_choices(options, message):
    with pytest.raises(ValueError, match=message):
        prepare(greys((8, 8)), **options)


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"prepared in .*file.*HF_DATASETS_CACHE"):
        prepare(greys((8, 8)), cache_dir=tmp_path / "file")


def test_selected_shuffled_and_formatted_rows_are_prepared_in_order():
    cells = rows(*(zoo.encode(np.full((4, 4), i, np.uint8)) for i in range(10)))
    for chosen in (cells.select([7, 2, 2]), cells.shuffle(seed=3), cells.with_format("torch")):
        plain = chosen.with_format(None).cast_column("image", datasets.Image(decode=False))
        want = [int(np.array(Image.open(BytesIO(row["image"]["bytes"])))[0, 0]) for row in plain]
        assert [int(image[0, 0, 0]) for image in prepare(chosen)] == want


# The cache.


def test_a_second_preparation_reads_the_cache():
    cells = greys((8, 8), (8, 8))
    first = prepare(cells)
    made = [(file.name, file.stat().st_mtime_ns) for file in sorted(first.folder.iterdir())]
    again = prepare(cells)
    assert [(f.name, f.stat().st_mtime_ns) for f in sorted(again.folder.iterdir())] == made
    np.testing.assert_array_equal(as_numpy(first), as_numpy(again))


def test_options_and_rows_are_part_of_the_cache_key():
    cells = greys((8, 8), (8, 9))
    variants = [
        prepare(cells, resolution=8),
        prepare(cells, resolution=4),
        prepare(cells, resolution=8, crop="random"),
        prepare(cells, resolution=8, image_mode="RGB"),
        prepare(greys((8, 9), (8, 8)), resolution=8),
    ]
    assert len({images.folder for images in variants}) == len(variants)


def test_a_changed_file_is_decoded_again(tmp_path):
    root = folder_of(tmp_path / "photos", {"a.png": zoo.encode(zoo.GREY)})
    np.testing.assert_array_equal(prepare(load_images(root))[0][0], zoo.GREY)
    (root / "a.png").write_bytes(zoo.encode(zoo.grey(12, 12)))
    np.testing.assert_array_equal(prepare(load_images(root))[0][0], zoo.grey(12, 12))


def test_leftovers_of_a_killed_preparation_are_removed(tmp_path):
    cells = greys((8, 8))
    folder = prepare(cells, cache_dir=tmp_path).folder
    half = folder.with_name(f".new-{folder.name}")
    folder.rename(half)
    (half / "summary.json").unlink()
    np.testing.assert_array_equal(prepare(cells, cache_dir=tmp_path)[0][0], zoo.grey(8, 8))
    assert not half.exists()


def test_a_failed_preparation_leaves_no_files(tmp_path):
    with pytest.raises(DataError, match=r"row 1 \('1.png'\): not an image"):
        prepare(rows(zoo.encode(zoo.GREY), b"text"), cache_dir=tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] in ([], [".lock"])


PREPARE_SCRIPT = """
import json, resource, sys, warnings
from ddpm_hf.data import load_images, prepare_images
warnings.simplefilter("ignore")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = load_images(sys.argv[1])
images = prepare_images(dataset, cache_dir=sys.argv[2], on_bad_image="skip", progress=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(int(image.sum()) for image in images)
print(json.dumps([str(images.folder), len(images), total, after - before]))
"""


def prepare_in_a_process(*arguments):
    done = run_forked(["-c", PREPARE_SCRIPT, *arguments])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_two_concurrent_preparations_give_the_same_folder(tmp_path):
    folder_of(
        tmp_path / "in", {f"{i}.png": zoo.encode(zoo.grey(32, 32) // 2 + i) for i in range(99)}
    )
    with ThreadPoolExecutor() as both:
        folders = [tmp_path / "in"] * 2, [tmp_path / "out"] * 2
        one, two = (found[:3] for found in both.map(prepare_in_a_process, *folders))
    assert one == two
    assert one[1] == 99
    made = [file for file in (tmp_path / "out").iterdir() if file.suffix != ".lock"]
    assert [str(file) for file in made] == one[:1]


@pytest.mark.slow
def test_decompression_bombs_are_not_decoded(tmp_path):
    bombs = {f"{side}.png": zoo.bomb(side) for side in (9_000, 12_000, 20_000)}
    folder_of(tmp_path / "in", {"good.png": zoo.encode(zoo.GREY), **bombs})
    _, count, _, kilobytes = prepare_in_a_process(tmp_path / "in", tmp_path / "out")
    assert count == 1
    # The smallest alone would take 81 MB of pixels; the libraries grow by about 10 MB.
    assert kilobytes < 50_000


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_several_processes_keep_the_order_of_many_images():
    count = 2_500  # enough for more than two processes
    values = np.arange(count).astype(np.uint16)
    images = prepare(rows(*(zoo.encode(np.full((2, 2), value)) for value in values)))
    assert [int(image[0, 0, 0]) for image in images] == values.tolist()


def kill_itself(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_killed_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(preprocessing, "_ROWS_PER_WORKER", 2)
    monkeypatch.setattr(preprocessing, "decode_images", kill_itself)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(DataError, match="prepares the images was killed, perhaps because memory"):
        prepare(rows(*[zoo.encode(zoo.GREY)] * 8), cache_dir=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


def test_the_batches_of_many_images_are_as_large_as_those_of_few():
    images = prepare(greys(*[(128, 128)] * 100), resolution=256)
    (file,) = images.folder.glob("images*.arrow")
    assert datasets.Dataset.from_file(str(file)).data.column("pixels").num_chunks == 2


def test_prepared_images_are_pickled_without_pixels():
    images = prepare(greys(*[(64, 64)] * 20))
    sent = pickle.dumps(images)
    assert len(sent) < 1000
    np.testing.assert_array_equal(as_numpy(pickle.loads(sent)), as_numpy(images))
