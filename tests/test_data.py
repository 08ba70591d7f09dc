"""Images from files to training tensors: what comes out is what went in, or a refusal says why."""

import json
import pickle
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO

import datasets
import image_zoo as zoo
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_server import ClientError, HubClient, HubServer
from PIL import Image
from processes import run_process
from torch.utils.data import DataLoader

from ddpm_hf.data import (
    DataError,
    ImageFacts,
    TrainingImages,
    load_images,
    prepare_images,
    to_unit_range,
)

ANIMALS = [*zoo.modes(), *zoo.turned(), *zoo.animated(), *zoo.damaged(), *zoo.sizes()]
GOOD = [animal for animal in ANIMALS if not animal.refusal]
BAD = [animal for animal in ANIMALS if animal.refusal]
IMAGE = datasets.Features({"image": datasets.Image()})


def by_name(animals):
    return pytest.mark.parametrize("animal", animals, ids=lambda animal: animal.name)


prepare = partial(prepare_images, progress=False)


def rows(*files, names=None):
    """A data set that holds the bytes of files; None is a null cell."""
    names = names or [f"{i}.png" for i in range(len(files))]
    cells = [
        None if data is None else {"bytes": data, "path": name}
        for data, name in zip(files, names, strict=True)
    ]
    return datasets.Dataset.from_dict({"image": cells}, features=IMAGE)


def greys(*shapes):
    return rows(*(zoo.encode(zoo.grey(h, w)) for h, w in shapes))


def folder_of(root, files):
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def as_numpy(images):
    return np.stack([image.numpy() for image in images])


# What a file becomes.


@pytest.mark.filterwarnings("ignore::UserWarning")
@by_name(GOOD)
def test_every_kind_of_file_gives_the_pixels_that_went_in(animal):
    images = prepare(rows(animal.data))
    (pixels,) = as_numpy(images)
    np.testing.assert_array_equal(pixels, animal.pixels)
    assert images.facts.mode == animal.mode
    assert images.facts.num_channels == len(pixels)
    assert (images.facts.height, images.facts.width) == pixels.shape[1:]
    assert pixels.dtype == (np.uint16 if images.facts.bit_depth == 16 else np.uint8)


@by_name(BAD)
def test_a_file_that_cannot_be_used_is_refused_with_row_and_path(animal):
    cells = rows(zoo.encode(zoo.GREY), animal.data, names=["good.png", animal.name])
    with pytest.raises(DataError) as caught:
        prepare(cells)
    first, line = str(caught.value).splitlines()
    assert "1 of 2 images" in first
    assert line.strip().startswith("row 1")
    assert animal.data is None or repr(animal.name) in line
    assert animal.refusal in line


def test_all_bad_images_of_a_data_set_are_listed_at_once_and_can_be_skipped():
    good = [zoo.encode(zoo.grey(6, 9) + i) for i in range(4)]
    bad = [animal.data for animal in zoo.damaged()]
    cells = rows(good[0], *bad[:5], good[1], *bad[5:], *good[2:])
    with pytest.raises(DataError) as caught:
        prepare(cells)
    assert len(str(caught.value).splitlines()) == 1 + len(bad)
    with pytest.warns(UserWarning, match=f"{len(bad)} of {len(cells)} images"):
        images = prepare(cells, on_bad_image="skip")
    assert len(images) == 4
    skipped = [int(re.match(r"row (\d+)", line)[1]) for line in images.skipped]
    assert skipped == [row for row in range(len(cells)) if row not in (0, 6, 13, 14)]
    want = [zoo.grey(6, 9)[None] + i for i in range(4)]
    np.testing.assert_array_equal(as_numpy(images), want)
    with pytest.raises(DataError, match=f"{len(bad)} of {len(cells)} images"):
        prepare(cells)  # although they are in the cache by now


def test_a_data_set_without_a_single_good_image_is_refused_even_when_skipping():
    with pytest.raises(DataError, match="2 of 2 images"):
        prepare(rows(b"text", None), on_bad_image="skip")


@pytest.mark.parametrize(
    ("kinds", "mode", "bit_depth"),
    [
        (["L", "RGB"], "RGB", 8),
        (["L", "LA"], "LA", 8),
        (["LA", "RGB"], "RGBA", 8),
        (["L", "RGBA_opaque", "LA_opaque"], "RGB", 8),
        (["P_grey", "L"], "L", 8),
        (["P_grey", "P_grey_marked", "RGBA_opaque"], "RGBA", 8),
        (["1", "I16"], "L", 16),
        (["LA", "I16"], "LA", 16),
        (["RGB", "I16"], "RGB", 16),
    ],
)
def test_mixed_modes_get_the_smallest_mode_that_loses_nothing(kinds, mode, bit_depth):
    animals = [next(a for a in GOOD if a.name == f"{kind}.png") for kind in kinds]
    images = prepare(rows(*(animal.data for animal in animals)))
    assert (images.facts.mode, images.facts.bit_depth) == (mode, bit_depth)
    for image, animal in zip(as_numpy(images), animals, strict=True):
        own = animal.pixels.astype(int)
        if bit_depth == 16 and animal.pixels.max() <= 255:
            own = own * 257
        colour = own[: len(animal.mode.rstrip("A"))]
        colours = image[: len(mode.rstrip("A"))]
        np.testing.assert_array_equal(colours, np.broadcast_to(colour, colours.shape))
        if mode.endswith("A"):
            opaque = np.full((6, 9), 257 * 255 if bit_depth == 16 else 255)
            alpha = own[-1] if animal.mode.endswith("A") else opaque
            np.testing.assert_array_equal(image[-1], alpha)


def test_an_explicit_mode_wins_and_puts_transparent_pixels_on_white():
    colour = np.full((6, 9, 3), 100, np.uint8)
    see_through = zoo.encode(zoo._with_alpha(colour, (zoo.ALPHA > 0) * np.uint8(255)))
    for mode in ("L", "RGB"):
        images = prepare(rows(see_through), image_mode=mode)
        want = np.where(zoo.ALPHA > 0, 100, 255) + np.zeros((len(mode), 1, 1), int)
        np.testing.assert_array_equal(images[0], want)
        assert images.facts.mode == mode
    for mode in ("LA", "RGBA"):
        images = prepare(rows(zoo.encode(zoo.GREY)), image_mode=mode)
        want = np.stack([*[zoo.GREY] * (len(mode) - 1), zoo.OPAQUE])
        np.testing.assert_array_equal(images[0], want)
        assert images.facts.mode == mode


def test_what_is_lost_is_said_with_a_count():
    cases = [
        (zoo.animated(), {}, "3 of 3 images: animated"),
        ([a for a in GOOD if a.name == "RGB_16.png"], {}, "1 of 1 images: 16 bits"),
        ([a for a in GOOD if a.name == "L.png"], {"resolution": 32}, "1 of 1 images: enlarged"),
    ]
    for animals, options, message in cases:
        for _ in range(2):  # the cache must not swallow it
            with pytest.warns(UserWarning, match=message):
                prepare(rows(*(animal.data for animal in animals)), **options)
    dark = zoo.encode((zoo.DEEP % 4096).astype(np.uint16))
    with pytest.warns(UserWarning, match="nearly black"):
        prepare(rows(dark))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shape", [(2000, 1), (1, 2000)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_extreme_shapes_are_warned_about_and_stay_small(shape, crop):
    ramp = np.full(shape, 77, np.uint8)
    with pytest.warns(UserWarning, match="times longer than wide"):
        images = prepare(rows(zoo.encode(ramp)), resolution=16, crop=crop)
    assert images[0].shape == (1, 16, 16)
    assert (images[0] == 77).all()
    stored = sum(file.stat().st_size for file in images.folder.glob("*.arrow"))
    assert stored < 10_000  # 2000 * 16 * 16 bytes would be 512,000


# Sizes.


def test_images_of_one_size_keep_it_and_others_get_a_proposal():
    sized = {
        ((28, 28), (28, 28)): (28, 28),
        ((30, 50), (30, 50)): (30, 50),
        ((300, 300), (300, 300)): (64, 64),
        ((100, 50), (70, 90), (80, 80)): (64, 64),
        ((44, 60), (47, 52), (90, 90)): (40, 40),
        ((5, 7), (6, 7)): (8, 8),
    }
    for shapes, size in sized.items():
        facts = prepare(greys(*shapes)).facts
        assert (facts.height, facts.width) == size


def test_a_centre_crop_without_scaling_is_exact():
    tall, wide = zoo.grey(9, 4), zoo.grey(4, 8)
    images = prepare(rows(zoo.encode(tall), zoo.encode(wide)), resolution=4)
    np.testing.assert_array_equal(images[0][0], tall[2:6])
    np.testing.assert_array_equal(images[1][0], wide[:, 2:6])
    faint = np.concatenate([zoo.colour(4, 8), np.full((4, 8, 1), 3, np.uint8)], -1)
    (image,) = as_numpy(prepare(rows(zoo.encode(faint)), resolution=4))
    np.testing.assert_array_equal(image, faint[:, 2:6].transpose(2, 0, 1))


def test_no_crop_keeps_the_whole_image_and_refuses_several_shapes():
    images = prepare(greys((24, 36), (48, 72)), resolution=12, crop="none")
    assert [tuple(image.shape) for image in images] == [(1, 12, 18)] * 2
    # A smooth picture is the same picture at any size.
    ramp = np.tile(np.linspace(0, 255, 72), (48, 1)).astype(np.uint8)
    (small,) = as_numpy(prepare(rows(zoo.encode(ramp)), resolution=24, crop="none"))
    np.testing.assert_allclose(small[0, 0], ramp.reshape(48, 36, 2).mean(2)[0], atol=2)
    with pytest.raises(DataError, match=r"one shape.*8x8, 10x8"):
        prepare(greys((8, 8), (8, 10)), resolution=8, crop="none")
    with pytest.raises(DataError, match="8192"):
        prepare(greys((1, 100)), resolution=100, crop="none")


def test_resizing_is_antialiased():
    checkers = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    (small,) = as_numpy(prepare(rows(zoo.encode(checkers.astype(np.uint8))), resolution=16))
    # Without a low-pass filter every fourth pixel would be all black or all white.
    assert np.abs(small[0].astype(float) - 127.5).max() < 3


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("size", [5, 16, 33])
def test_resizing_a_constant_image_changes_nothing(size):
    for value, dtype in ((77, np.uint8), (31_234, np.uint16)):
        (image,) = as_numpy(
            prepare(rows(zoo.encode(np.full((16, 16), value, dtype))), resolution=size)
        )
        assert (image == value).all()


def test_opaque_images_resize_alike_with_and_without_alpha():
    plain = zoo.colour(40, 40)
    opaque = np.concatenate([plain, np.full((40, 40, 1), 255, np.uint8)], -1)
    with_alpha = prepare(rows(zoo.encode(opaque)), resolution=16)
    without = prepare(rows(zoo.encode(plain)), resolution=16)
    assert with_alpha.facts.mode == "RGB"
    np.testing.assert_array_equal(with_alpha[0], without[0])


def test_sixteen_bits_resize_as_eight_bits_do_but_finer():
    values = zoo.grey(40, 40)
    deep = prepare(rows(zoo.encode(values.astype(np.uint16) * 257)), resolution=16)
    flat = prepare(rows(zoo.encode(values)), resolution=16)
    difference = deep[0].numpy() / 257.0 - flat[0].numpy()
    # Pillow's 8-bit filter rounds after each of its two passes.
    assert np.abs(difference).max() < 1.1
    assert len(np.unique(deep[0].numpy() % 257)) > 100


def _blob(side, radius, softness):
    """A greenish disc with an edge of some softness, and bright red hidden outside of it."""
    y, x = np.indices((side, side)) / side - 0.5
    alpha = np.rint(255 / (1 + np.exp((np.hypot(x, y) - radius) / softness)))
    colour = np.stack([0 * x, 200 + 40 * np.sin(9 * x), 100 + 90 * np.cos(7 * y)], -1)
    colour[alpha == 0] = 255, 0, 0
    return np.concatenate([colour, alpha[..., None]], -1).astype(np.uint8)


def test_no_hidden_colour_bleeds_into_resized_images():
    images = prepare(
        rows(*(zoo.encode(_blob(64, 0.3 + 0.02 * i, 1e-3)) for i in range(3))), resolution=16
    )
    for image in as_numpy(images):
        visible = image[3] > 0
        # 8-bit premultiplied colours of a nearly transparent pixel are coarse, red is not in them.
        assert image[0][visible].max() == 0
        assert (image[:3][:, ~visible] == 255).all()
        assert 0 < visible.sum() < visible.size


def test_putting_on_a_background_and_resizing_may_be_exchanged():
    blob = _blob(64, 0.3, 0.04)
    for background in (0, 255):
        share = blob[..., 3:] / 255
        flat = np.rint(blob[..., :3] * share + background * (1 - share)).astype(np.uint8)
        (image,) = as_numpy(prepare(rows(zoo.encode(blob)), resolution=16)).astype(float)
        (want,) = as_numpy(prepare(rows(zoo.encode(flat)), resolution=16)).astype(float)
        got = image[:3] * image[3] / 255 + background * (1 - image[3] / 255)
        # Two passes of 8 bits on each side, premultiplied and not. (The edge is soft, because
        # ringing at a sharp one is clipped on either side in its own way.)
        assert np.abs(got - want).max() <= 3


# Which column, which rows.


def two_columns():
    cells = rows(zoo.encode(zoo.GREY))
    return cells.add_column("mask", [{"bytes": zoo.encode(zoo.GREY[::-1]), "path": None}]).cast(
        datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    )


def test_the_image_column_is_found_whatever_its_name():
    for name in ("img", "jpg", "picture of a cat"):
        images = prepare(rows(zoo.encode(zoo.GREY)).rename_column("image", name))
        np.testing.assert_array_equal(images[0][0], zoo.GREY)


def test_encoded_images_are_found_without_their_type():
    data = zoo.encode(zoo.GREY)
    for cell in (data, {"bytes": data, "path": "x.png"}):
        images = prepare(datasets.Dataset.from_dict({"picture": [cell], "number": [1]}))
        np.testing.assert_array_equal(images[0][0], zoo.GREY)


def test_of_two_image_columns_one_must_be_chosen():
    cells = two_columns()
    with pytest.raises(DataError, match=r"several columns.*image_column.*image.*mask"):
        prepare(cells)
    np.testing.assert_array_equal(prepare(cells, image_column="mask")[0][0], zoo.GREY[::-1])


def test_a_wrong_column_is_answered_with_the_right_ones():
    with pytest.raises(DataError, match=r"'imge'.*did you mean 'image'.*columns are image"):
        prepare(rows(zoo.encode(zoo.GREY)), image_column="imge")
    numbers = datasets.Dataset.from_dict({"number": [1, 2]})
    with pytest.raises(DataError, match=r"no column of images.*number \(int64\)"):
        prepare(numbers)
    with pytest.raises(DataError, match=r"'number' is no column of images"):
        prepare(numbers, image_column="number")


@pytest.mark.parametrize("count", [1, 3])
def test_few_rows_are_enough(count):
    assert len(prepare(greys(*[(8, 8)] * count))) == count


def test_no_rows_several_splits_and_other_types_are_refused():
    with pytest.raises(DataError, match="no rows"):
        prepare(rows())
    with pytest.raises(DataError, match=r"several splits.*test, train"):
        prepare(datasets.DatasetDict(test=greys((8, 8)), train=greys((8, 8))))
    with pytest.raises(TypeError, match=r"datasets\.Dataset.*list"):
        prepare([1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": 0}, "resolution must be an int in 1..8192, got 0"),
        ({"resolution": 8193}, "resolution"),
        ({"resolution": 64.0}, "resolution"),
        ({"resolution": True}, "resolution"),
        ({"image_mode": "CMYK"}, "image_mode must be one of None, L, LA, RGB, RGBA, got 'CMYK'"),
        ({"crop": "middle"}, "crop must be one of center, random, none, got 'middle'"),
        ({"on_bad_image": "ignore"}, "on_bad_image must be one of error, skip, got 'ignore'"),
    ],
)
def test_a_wrong_option_is_named_with_its_choices(options, message):
    with pytest.raises(ValueError, match=message):
        prepare(greys((8, 8)), **options)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"prepared in .*file.*HF_DATASETS_CACHE"):
        prepare(greys((8, 8)), cache_dir=tmp_path / "file")


def test_selected_shuffled_and_formatted_rows_are_those_prepared():
    cells = rows(*(zoo.encode(np.full((4, 4), i, np.uint8)) for i in range(10)))
    for chosen in (cells.select([7, 2, 2]), cells.shuffle(seed=3), cells.with_format("torch")):
        plain = chosen.with_format(None).cast_column("image", datasets.Image(decode=False))
        want = [int(np.array(Image.open(BytesIO(row["image"]["bytes"])))[0, 0]) for row in plain]
        assert [int(image[0, 0, 0]) for image in prepare(chosen)] == want


# The cache.


def test_the_second_preparation_reads_the_first():
    cells = greys((8, 8), (8, 8))
    first = prepare(cells)
    made = [(file.name, file.stat().st_mtime_ns) for file in sorted(first.folder.iterdir())]
    again = prepare(cells)
    assert [(f.name, f.stat().st_mtime_ns) for f in sorted(again.folder.iterdir())] == made
    np.testing.assert_array_equal(as_numpy(first), as_numpy(again))


def test_another_option_or_another_row_is_prepared_anew():
    cells = greys((8, 8), (8, 9))
    variants = [
        prepare(cells, resolution=8),
        prepare(cells, resolution=4),
        prepare(cells, resolution=8, crop="random"),
        prepare(cells, resolution=8, image_mode="RGB"),
        prepare(greys((8, 9), (8, 8)), resolution=8),
    ]
    assert len({images.folder for images in variants}) == len(variants)


def test_a_changed_file_is_prepared_anew(tmp_path):
    root = folder_of(tmp_path / "photos", {"a.png": zoo.encode(zoo.GREY)})
    np.testing.assert_array_equal(prepare(load_images(root))[0][0], zoo.GREY)
    (root / "a.png").write_bytes(zoo.encode(zoo.grey(12, 12)))
    np.testing.assert_array_equal(prepare(load_images(root))[0][0], zoo.grey(12, 12))


def test_what_a_killed_preparation_left_is_in_nobodys_way(tmp_path):
    cells = greys((8, 8))
    folder = prepare(cells, cache_dir=tmp_path).folder
    half = folder.with_name(f".new-{folder.name}")
    folder.rename(half)
    (half / "summary.json").unlink()
    np.testing.assert_array_equal(prepare(cells, cache_dir=tmp_path)[0][0], zoo.grey(8, 8))
    assert not half.exists()


def test_a_failed_preparation_leaves_nothing_half_written(tmp_path):
    with pytest.raises(DataError):
        prepare(rows(zoo.encode(zoo.GREY), b"text"), cache_dir=tmp_path)
    assert [file.suffix for file in tmp_path.iterdir()] in ([], [".lock"])


PREPARE_SCRIPT = """
import json, resource, sys
from ddpm_hf.data import load_images, prepare_images
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dataset = load_images(sys.argv[1])
images = prepare_images(dataset, cache_dir=sys.argv[2], on_bad_image="skip", progress=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
total = sum(int(image.sum()) for image in images)
print(json.dumps([str(images.folder), len(images), total, after - before]))
"""


def prepare_in_a_process(*arguments):
    command = [sys.executable, "-W", "ignore", "-c", PREPARE_SCRIPT, *map(str, arguments)]
    done = run_process(command)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_two_processes_that_start_at_once_prepare_the_same_images(tmp_path):
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
def test_decompression_bombs_cost_no_memory(tmp_path):
    bombs = {f"{side}.png": zoo.bomb(side) for side in (9_000, 12_000, 20_000)}
    folder_of(tmp_path / "in", {"good.png": zoo.encode(zoo.GREY), **bombs})
    _, count, _, kilobytes = prepare_in_a_process(tmp_path / "in", tmp_path / "out")
    assert count == 1
    # The smallest alone would take 81 MB of pixels; the libraries' own growth is some 10 MB.
    assert kilobytes < 50_000


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.slow
def test_many_images_are_prepared_by_several_processes_in_order():
    count = 2_500  # more than two processes' shares
    values = np.arange(count).astype(np.uint16)
    images = prepare(rows(*(zoo.encode(np.full((2, 2), value)) for value in values)))
    assert [int(image[0, 0, 0]) for image in images] == values.tolist()


def test_prepared_images_travel_to_workers_as_a_name():
    images = prepare(greys(*[(64, 64)] * 20))
    sent = pickle.dumps(images)
    assert len(sent) < 1000
    np.testing.assert_array_equal(as_numpy(pickle.loads(sent)), as_numpy(images))


# Facts.


@pytest.mark.parametrize(
    "facts",
    [
        ImageFacts("L", 28, 28),
        ImageFacts("RGBA", 64, 48, 16, ("a", "b")),
    ],
)
def test_facts_survive_their_json_form(facts):
    config = json.loads(json.dumps(facts.to_config()))
    assert config["format_version"] == 1
    assert set(config["image"]) == {"mode", "height", "width", "bit_depth"}
    assert ImageFacts.from_config(config) == facts


@pytest.mark.parametrize(
    "change",
    [
        {"mode": "CMYK"},
        {"height": 0},
        {"width": "28"},
        {"bit_depth": 12},
    ],
)
def test_wrong_facts_are_refused(change):
    config = ImageFacts("L", 28, 28).to_config()
    with pytest.raises(ValueError, match=next(iter(change))):
        ImageFacts.from_config({**config, "image": config["image"] | change})
    with pytest.raises(ValueError, match="format_version must be 1, got 2"):
        ImageFacts.from_config({**config, "format_version": 2})


# Training images.


@pytest.mark.parametrize(("dtype", "top"), [(torch.uint8, 255), (torch.uint16, 65535)])
def test_every_level_becomes_its_own_value_and_comes_back(dtype, top):
    levels = torch.arange(top + 1).to(dtype)
    values = to_unit_range(levels)
    exact = np.arange(top + 1) * 2 / top - 1
    # One rounding each of a quotient up to 2 and of a difference up to 1, in float32.
    np.testing.assert_allclose(values.numpy(), exact, rtol=0, atol=2**-23 + 2**-24)
    assert (values[0], values[-1]) == (-1, 1)
    np.testing.assert_array_equal(((values + 1) * (top / 2)).round().numpy(), np.arange(top + 1))


def test_only_stored_pixels_are_scaled():
    with pytest.raises(TypeError, match=r"uint8 or uint16, got torch\.int64"):
        to_unit_range(torch.zeros(3, dtype=torch.int64))


def prepared_stack(count, height, width, **options):
    images = (zoo.encode((zoo.grey(height, width) + 7 * i).astype(np.uint8)) for i in range(count))
    return prepare(rows(*images), **options)


def test_without_options_training_images_are_the_images():
    images = prepared_stack(5, 6, 9)
    training = TrainingImages(images)
    assert len(training) == 5
    assert training.shape == (1, 6, 9)
    for epoch in (0, 3):
        for index in range(5):
            want = images[index].numpy() / 127.5 - 1
            np.testing.assert_allclose(training[epoch, index], want, rtol=0, atol=2**-23)


def test_flips_mirror_about_half_of_the_images():
    images = prepared_stack(4, 6, 9)
    plain, flipping = TrainingImages(images), TrainingImages(images, seed=5, random_flip=True)
    mirrored = 0
    for epoch in range(100):
        for index in range(4):
            got, want = flipping[epoch, index], plain[epoch, index]
            is_mirrored = torch.equal(got, want.flip(-1))
            assert is_mirrored or torch.equal(got, want)
            mirrored += is_mirrored
    # 400 fair coins have a deviation of 10; the seed is fixed, z is 4.
    assert abs(mirrored - 200) < 40


def test_random_crops_are_windows_of_the_image_and_reach_everywhere():
    wide = zoo.grey(8, 14)
    images = prepare(rows(zoo.encode(wide), zoo.encode(wide.T.copy())), resolution=8, crop="random")
    training = TrainingImages(images)
    windows = {wide[:, x : x + 8].tobytes(): x for x in range(7)}
    seen = [((training[epoch, 0] + 1) * 127.5).round().to(torch.uint8) for epoch in range(200)]
    places = [windows[window.numpy().tobytes()] for window in seen]
    # Of 7 equally likely places in 200 draws none is left out but once in 10^12.
    assert set(places) == set(range(7))
    assert training[0, 1].shape == (1, 8, 8)
    np.testing.assert_array_equal(images[0][0], wide[:, 3:11])


def test_augmentation_depends_on_seed_epoch_and_index_only():
    images = prepare(greys(*[(8, 12)] * 30, (12, 12)), resolution=8, crop="random")
    make = partial(TrainingImages, images, random_flip=True)
    want = {(epoch, i): make(seed=1)[epoch, i] for epoch in range(3) for i in range(31)}
    training = make(seed=1)
    rng = np.random.default_rng(0)
    for _ in range(5):
        order = [tuple(map(int, key)) for key in rng.permutation(list(want))]
        got = training.__getitems__(order)
        assert all(torch.equal(got[k], want[order[k]]) for k in range(len(order)))
    other_seed = [make(seed=2)[key] for key in want]
    same = sum(torch.equal(a, b) for a, b in zip(other_seed, want.values(), strict=True))
    assert same < 60  # two flips by five places: a tenth of 93 by chance
    changes = sum(not torch.equal(want[0, i], want[1, i]) for i in range(31))
    assert changes > 15


@pytest.mark.slow
def test_loader_workers_change_nothing():
    training = TrainingImages(prepared_stack(10, 6, 9), random_flip=True)
    order = [(epoch, index) for epoch in range(2) for index in range(10)]
    loads = [
        torch.cat(list(DataLoader(training, batch_size=4, sampler=order, num_workers=workers)))
        for workers in (0, 2)
    ]
    assert torch.equal(*loads)


@pytest.mark.parametrize(
    ("native", "multiple", "padded", "before"),
    [
        ((28, 28), 8, (32, 32), (2, 2)),
        ((6, 9), 4, (8, 12), (1, 1)),
        ((9, 6), 4, (12, 8), (1, 1)),
        ((8, 8), 8, (8, 8), (0, 0)),
    ],
)
def test_padding_is_centred_and_repeats_the_edge(native, multiple, padded, before):
    images = prepared_stack(1, *native)
    training = TrainingImages(images, size_multiple=multiple)
    after = [p - n - b for p, n, b in zip(padded, native, before, strict=True)]
    widths = list(zip(before, after, strict=True))
    want = np.pad(images[0][0].numpy(), widths, mode="edge") / 127.5 - 1
    assert training.shape == (1, *padded)
    np.testing.assert_allclose(training[0, 0][0], want, rtol=0, atol=2**-23)


def test_any_sequence_of_float_images_can_be_trained_on():
    images = [torch.full((2, 5, 6), value, dtype=torch.float64) for value in (-1, 0, 1)]
    images[1][0, 0, 0] = 0.5
    training = TrainingImages(images, random_flip=True, size_multiple=2)
    assert training.shape == (2, 6, 6)
    assert training[0, 2].dtype == torch.float32
    assert {float(image[0, 0, 0]) for image in (training[e, 1] for e in range(20))} == {0.0, 0.5}
    assert images[1][0, 0, 0] == 0.5  # a mirror image must not be made in the caller's tensor


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], r"float tensors.*uint8"),
        ([torch.zeros(4, 4)], r"\(C, H, W\).*\(4, 4\)"),
        ([np.zeros((1, 4, 4))], "ndarray"),
        ([torch.full((1, 4, 4), 200.0)], r"\[-1, 1\], got 200..200"),
    ],
)
def test_other_images_are_refused_with_what_they_are(images, message):
    with pytest.raises(DataError, match=message):
        TrainingImages(images)


def test_images_of_another_shape_are_refused_by_index():
    training = TrainingImages([torch.zeros(1, 4, 4), torch.zeros(1, 4, 5)])
    with pytest.raises(DataError, match=r"image 1 has \(1, 4, 5\), but image 0 \(1, 4, 4\)"):
        training[0, 1]


# Sources.

CLASSES = {
    f"{name}/{i}.png": zoo.encode(zoo.grey(8, 8) // 2 + i) for name in "ba" for i in range(3)
}


def test_class_folders_become_names(tmp_path):
    dataset = load_images(folder_of(tmp_path, CLASSES))
    assert prepare(dataset).facts.class_names == ("a", "b")
    assert dataset["label"] == [0, 0, 0, 1, 1, 1]
    for name, file in (("flat", "x.png"), ("uneven", "c/deeper/0.png")):
        other = folder_of(tmp_path / name, {file: zoo.encode(zoo.GREY)})
        if name == "uneven":
            folder_of(other, CLASSES)
        assert prepare(load_images(other), resolution=8).facts.class_names is None


def test_a_folder_is_read_whatever_its_name_and_its_hidden_files(tmp_path):
    root = folder_of(tmp_path / "my *[photos]? {2020}", CLASSES)
    folder_of(
        root, {".cache/x.png": b"x", "__MACOSX/x.png": b"x", ".x.png": b"x", "notes.txt": b"x"}
    )
    assert len(prepare(load_images(root))) == 6
    assert len(prepare(load_images(str(root)))) == 6


def test_a_word_like_test_in_a_folder_name_makes_no_split(tmp_path):
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
    with pytest.raises(DataError, match=r"split 'trian'.*did you mean 'train'.*test, train"):
        load_images(tmp_path, split="trian")


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
    with pytest.raises(DataError, match="split 'test' does not exist; choices: train"):
        load_images(tmp_path, split="test")


def test_saved_data_sets_are_read(tmp_path):
    greys((8, 8), (8, 8)).save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=greys((8, 8)), test=greys((8, 8), (9, 9))).save_to_disk(
        tmp_path / "two"
    )
    assert len(prepare(load_images(tmp_path / "one"))) == 2
    assert len(prepare(load_images(tmp_path / "two", split="test[1:]"))) == 1
    with pytest.raises(DataError, match="choices: test, train"):
        load_images(tmp_path / "two", split="validation")


def test_metadata_files_are_heeded_and_cannot_reach_outside(tmp_path):
    root = folder_of(tmp_path / "in", CLASSES)
    (root / "metadata.jsonl").write_text('{"file_name": "a/1.png", "text": "one"}\n')
    dataset = load_images(root)
    assert dataset["text"] == ["one"]
    np.testing.assert_array_equal(prepare(dataset)[0][0], zoo.grey(8, 8) // 2 + 1)
    folder_of(tmp_path, {"secret.png": zoo.encode(zoo.GREY)})
    (root / "metadata.jsonl").write_text('{"file_name": "../secret.png"}\n')
    with pytest.raises(DataError, match=r"\.\./secret\.png"):
        load_images(root)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("", "has no name"),
        ("phots/", r"did you mean 'photos'"),
        ("./phots", r"did you mean 'photos'"),
        ("/no/such/folder", "does not exist"),
        ("https://example.com/a.png", "does not exist"),
        ("phots", r"no path here \(did you mean 'photos'\?\); as a Hub data set"),
        ("someone/phots", "as a Hub data set"),
        ("photos/*.parquet", "matches no file"),
        ("photos/a/0.png", r"is \.png: give a folder"),
        ("empty", "holds no images, parquet or arrow files, but nothing"),
        ("text", r"but 2 \.txt, 1 \.heic"),
        ("broken.parquet", "broken.parquet"),
    ],
)
def test_a_source_that_is_none_gets_one_clear_line(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    folder_of(tmp_path / "photos", CLASSES)
    (tmp_path / "empty").mkdir()
    folder_of(tmp_path / "text", dict.fromkeys(("a.txt", "b.txt", "c.heic"), b"x"))
    (tmp_path / "broken.parquet").write_bytes(b"not parquet")
    with pytest.raises(DataError, match=message) as caught:
        load_images(source)
    assert len(str(caught.value).splitlines()) == 1


def test_a_source_without_rows_is_refused(tmp_path):
    rows().to_parquet(tmp_path / "none.parquet", batch_size=1)
    with pytest.raises(DataError, match=r"none\.parquet"):
        load_images(tmp_path / "none.parquet")
    with pytest.raises(DataError, match="no rows"):
        load_images(folder_of(tmp_path / "in", CLASSES), split="train[:0]")


@pytest.mark.parametrize("name", ["config_name", "revision"])
def test_options_of_the_hub_are_refused_for_paths(tmp_path, name):
    with pytest.raises(DataError, match=f"{name} is for data sets on the Hub"):
        load_images(folder_of(tmp_path, CLASSES), **{name: "main"})


# Rows and files that point elsewhere.


@pytest.fixture
def counting_server():
    """A local HTTP server and the list of the paths that were asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(zoo.encode(zoo.GREY))

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def naming(path):
    """An Arrow table of two rows: an image, and nothing but a path."""
    cells = [{"bytes": zoo.encode(zoo.GREY), "path": "good.png"}, {"bytes": None, "path": path}]
    table = pa.table({"image": pa.array(cells, type=datasets.Image().pa_type)})
    return table.replace_schema_metadata(IMAGE.arrow_schema.metadata)


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


@pytest.mark.parametrize(
    "load", [load_from_memory, load_from_parquet, load_from_parquet_folder, load_from_saved]
)
@pytest.mark.parametrize("place", ["outside", "inside", "relative", "url", "zip"])
def test_rows_that_hold_only_a_path_or_url_are_refused_and_nothing_is_fetched(
    tmp_path, counting_server, load, place
):
    url, asked = counting_server
    folder = folder_of(tmp_path / "data", {"inside.png": zoo.encode(zoo.GREY)})
    folder_of(tmp_path, {"outside.png": zoo.encode(zoo.GREY)})
    path = {
        "outside": str(tmp_path / "outside.png"),
        "inside": str(folder / "inside.png"),
        "relative": "inside.png",
        "url": f"{url}/x.png",
        "zip": f"zip://x.png::{url}/x.zip",
    }[place]
    # Out of sight while loading, or it were a folder of images.
    (folder / "inside.png").rename(folder / "inside.txt")
    dataset = load(naming(path), folder)
    (folder / "inside.txt").rename(folder / "inside.png")
    with pytest.raises(DataError, match=r"1 of 2 rows hold no image but a path.*row 1") as caught:
        prepare(dataset, on_bad_image="skip")
    assert path in str(caught.value)
    assert asked == []


def test_paths_are_read_under_the_folder_that_the_caller_names(tmp_path, counting_server):
    url, asked = counting_server
    folder_of(tmp_path, {"in/a.png": zoo.encode(zoo.grey(6, 9) + 1), "b.png": b"x"})
    root = tmp_path / "in"
    (root / "link.png").symlink_to(tmp_path / "b.png")
    for path in ("a.png", f"{root}/a.png", f"{root}/../in/a.png"):
        images = prepare(datasets.Dataset(naming(path)), image_root=root)
        np.testing.assert_array_equal(images[1][0], zoo.grey(6, 9) + 1)
    for path in ("../b.png", str(tmp_path / "b.png"), "link.png", f"{url}/a.png"):
        with pytest.raises(DataError, match="not a file under"):
            prepare(datasets.Dataset(naming(path)), image_root=root)
    with pytest.raises(DataError, match=r"row 1 \('none.png'\): there is no such file"):
        prepare(datasets.Dataset(naming("none.png")), image_root=root)
    assert asked == []


def test_a_transform_is_refused_instead_of_ignored(tmp_path):
    dataset = load_images(folder_of(tmp_path, CLASSES))
    with pytest.raises(DataError, match=r"transform.*reset_format"):
        prepare_images(dataset.with_transform(lambda rows: rows))


def test_part_of_a_folder_needs_to_be_told_where_it_lies(tmp_path):
    dataset = load_images(folder_of(tmp_path, CLASSES)).select([4, 0])
    with pytest.raises(DataError, match=r"2 of 2 rows.*name the folder with.*image_root="):
        prepare(dataset)
    np.testing.assert_array_equal(
        prepare(dataset, image_root=tmp_path)[0][0], zoo.grey(8, 8) // 2 + 1
    )


@pytest.mark.parametrize("target", ["outside.png", "outside"])
def test_links_that_leave_the_folder_are_refused(tmp_path, target):
    root = folder_of(tmp_path / "in", CLASSES)
    folder_of(
        tmp_path, {"outside.png": zoo.encode(zoo.GREY), "outside/x.png": zoo.encode(zoo.GREY)}
    )
    (root / "a" / "link.png").symlink_to(tmp_path / target)
    with pytest.raises(DataError, match=r"1 links leave the folder.*link\.png"):
        load_images(root)


def test_links_within_the_folder_and_to_it_are_followed(tmp_path):
    root = folder_of(tmp_path / "in", CLASSES)
    (root / "a" / "link.png").symlink_to(root / "b" / "2.png")
    (tmp_path / "door").symlink_to(root)
    images = prepare(load_images(tmp_path / "door"))
    np.testing.assert_array_equal(images[3][0], zoo.grey(8, 8) // 2 + 2)


@pytest.mark.parametrize("name", ["../outside.arrow", "link.arrow"])
def test_a_saved_data_set_cannot_name_files_outside(tmp_path, name):
    greys((8, 8)).save_to_disk(tmp_path / "in")
    (arrow,) = (tmp_path / "in").glob("*.arrow")
    arrow.rename(tmp_path / "outside.arrow")
    if name == "link.arrow":
        (tmp_path / "in" / name).symlink_to(tmp_path / "outside.arrow")
    state = json.loads((tmp_path / "in" / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (tmp_path / "in" / "state.json").write_text(json.dumps(state))
    with pytest.raises(DataError, match=r"outside|leave"):
        load_images(tmp_path / "in")


# The Hub, over HTTP.

HUB_SCRIPT = """
from ddpm_hf.data import load_images, prepare_images
images = prepare_images(load_images(source, **options), progress=False)
result = [len(images), images.facts.to_config(), [int(image.sum()) for image in images]]
"""


@pytest.mark.slow
def test_data_sets_of_the_hub_are_loaded_and_rows_cannot_name_files_of_the_machine(tmp_path):
    photos = {name: data for name, data in CLASSES.items()}
    secret = folder_of(tmp_path / "home", {"secret.png": zoo.encode(zoo.GREY)}) / "secret.png"
    greys((8, 8), (8, 8)).to_parquet(tmp_path / "good.parquet")
    pq.write_table(naming(str(secret)), tmp_path / "bad.parquet")
    files = {
        "photos": photos,
        "rows": {"data/test-00000-of-00001.parquet": (tmp_path / "good.parquet").read_bytes()},
        "hostile": {"train.parquet": (tmp_path / "bad.parquet").read_bytes()},
    }
    with HubServer() as hub, HubClient(hub, tmp_path / "home", token=None) as client:
        for name, content in files.items():
            hub.add_repo(f"user/{name}", kind="dataset", files=content)
        count, facts, sums = client.run(HUB_SCRIPT, source="user/photos", options={})
        assert (count, facts["class_names"]) == (6, ["a", "b"])
        assert sums == [int((zoo.grey(8, 8) // 2 + i).sum()) for i in (0, 1, 2, 0, 1, 2)]
        assert client.run(HUB_SCRIPT, source="user/rows", options={"split": "test"})[0] == 2
        for source, options, message in [
            ("user/hostile", {}, "1 of 2 rows hold no image but a path"),
            ("user/rows", {}, "split 'train' does not exist; choices: test"),
            ("user/rows", {"config_name": "big"}, "'big' not found. Available: .'default'."),
            ("user/rows", {"revision": "v9"}, "v9"),
            ("user/nothing", {}, "user/nothing"),
        ]:
            with pytest.raises(ClientError, match=message) as caught:
                client.run(HUB_SCRIPT, source=source, options=options)
            assert caught.value.kind == "DataError"
