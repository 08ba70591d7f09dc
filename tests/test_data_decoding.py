"""Decoding of image files: the pixels are exact, or an error gives the reason."""

import re
import threading
import warnings

import datasets
import image_zoo as zoo
import numpy as np
import pytest
from image_sets import as_numpy, greys, prepare, rows

from ddpm_hf.data import DataError, decoding

CASES = [*zoo.modes(), *zoo.turned(), *zoo.animated(), *zoo.damaged(), *zoo.sizes()]
GOOD = [case for case in CASES if not case.problem]
BAD = [case for case in CASES if case.problem]


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@by_name(GOOD)
def test_every_kind_of_file_decodes_to_its_pixels(case):
    images = prepare(rows(case.data))
    (pixels,) = as_numpy(images)
    np.testing.assert_array_equal(pixels, case.pixels)
    assert images.facts.mode == case.mode
    assert images.facts.num_channels == len(pixels)
    assert (images.facts.height, images.facts.width) == pixels.shape[1:]
    assert pixels.dtype == (np.uint16 if images.facts.bit_depth == 16 else np.uint8)


@pytest.mark.slow
@by_name(BAD)
def test_an_unusable_file_is_reported_with_row_and_path(case):
    cells = rows(zoo.encode(zoo.GREY), case.data, names=["good.png", case.name])
    with pytest.raises(DataError) as caught:
        prepare(cells)
    first, line = str(caught.value).splitlines()
    assert "1 of 2 images" in first
    assert line.strip().startswith("row 1")
    assert case.data is None or repr(case.name) in line
    assert case.problem in line


@pytest.mark.slow
def test_unreadable_files_are_listed_before_any_image_is_decoded(tmp_path):
    bad = [a.data for a in zoo.damaged() if a.problem not in ("truncated", "Error")]
    cells = rows(zoo.encode(zoo.GREY), *bad)
    with pytest.raises(DataError) as caught:
        prepare(cells, cache_dir=tmp_path)
    assert len(str(caught.value).splitlines()) == 1 + len(bad) == 9
    assert [path for path in tmp_path.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.slow
def test_bad_images_can_be_skipped():
    good = [zoo.encode(zoo.grey(6, 9) + i) for i in range(4)]
    bad = [case.data for case in zoo.damaged()]
    cells = rows(good[0], *bad[:5], good[1], *bad[5:], *good[2:])
    with pytest.warns(UserWarning, match=f"4 images used, {len(bad)} left out") as caught:
        images = prepare(cells, on_bad_image="skip")
    assert str(caught[0].message).count("; row ") == 10  # all are in `skipped`
    assert images.left_out == {"bad images": len(bad)}
    assert len(images) == 4
    skipped = [int(re.match(r"row (\d+)", line)[1]) for line in images.skipped]
    assert skipped == [row for row in range(len(cells)) if row not in (0, 6, 13, 14)]
    want = [zoo.grey(6, 9)[None] + i for i in range(4)]
    np.testing.assert_array_equal(as_numpy(images), want)
    with pytest.raises(DataError, match=f"{len(bad)} of {len(cells)} images"):
        prepare(cells)  # also when read from the cache


def test_skipping_after_an_error_reads_the_cache(tmp_path):
    photo = zoo.encode(zoo.colour(64, 64), kind="JPEG")
    cells = rows(photo, photo[: len(photo) // 2])
    with pytest.raises(DataError, match=r"1 of 2 images.*\n  row 1 .*truncated"):
        prepare(cells, cache_dir=tmp_path)
    (made,) = tmp_path.glob("*/images.arrow")
    before = made.stat().st_mtime_ns
    with pytest.warns(UserWarning, match="1 image used, 1 left out"):
        images = prepare(cells, on_bad_image="skip", cache_dir=tmp_path)
    assert len(images) == 1
    assert made.stat().st_mtime_ns == before


def test_a_damaged_image_does_not_affect_size_and_mode():
    good = [zoo.encode(zoo.grey(28, 28) // 2 + i) for i in range(2)]
    big = zoo.encode(zoo.colour(100, 60))
    with pytest.warns(UserWarning, match="2 images used, 1 left out"):
        images = prepare(rows(*good, big[: len(big) // 2]), on_bad_image="skip")
    assert (images.facts.mode, images.facts.height, images.facts.width) == ("L", 28, 28)
    np.testing.assert_array_equal(images[1][0], zoo.grey(28, 28) // 2 + 1)


def test_skipping_all_images_is_an_error():
    with pytest.raises(DataError, match="2 of 2 images"):
        prepare(rows(b"text", None), on_bad_image="skip")


@pytest.mark.slow
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
    ],
)
def test_mixed_modes_get_the_smallest_lossless_mode(kinds, mode, bit_depth):
    cases = [next(a for a in GOOD if a.name == f"{kind}.png") for kind in kinds]
    images = prepare(rows(*(case.data for case in cases)))
    assert (images.facts.mode, images.facts.bit_depth) == (mode, bit_depth)
    for image, case in zip(as_numpy(images), cases, strict=True):
        own = case.pixels.astype(int)
        if bit_depth == 16 and case.pixels.max() <= 255:
            own = own * 257
        colour = own[: len(case.mode.rstrip("A"))]
        colours = image[: len(mode.rstrip("A"))]
        np.testing.assert_array_equal(colours, np.broadcast_to(colour, colours.shape))
        if mode.endswith("A"):
            opaque = np.full((6, 9), 257 * 255 if bit_depth == 16 else 255)
            alpha = own[-1] if case.mode.endswith("A") else opaque
            np.testing.assert_array_equal(image[-1], alpha)


def test_colour_has_8_bits_unless_16_are_requested():
    cells = rows(zoo.encode(zoo.COLOUR), zoo.encode(zoo.DEEP))
    colour = zoo.COLOUR.transpose(2, 0, 1).astype(int)
    with pytest.warns(UserWarning, match="1 of 2 images: 16 bits"):
        images = prepare(cells)
    assert (images.facts.mode, images.facts.bit_depth) == ("RGB", 8)
    want = np.stack([colour, np.broadcast_to(np.rint(zoo.DEEP / 257), (3, 6, 9))])
    np.testing.assert_array_equal(as_numpy(images), want)
    images = prepare(cells, bit_depth=16)
    assert (images.facts.mode, images.facts.bit_depth) == ("RGB", 16)
    want = np.stack([colour * 257, np.broadcast_to(zoo.DEEP, (3, 6, 9))])
    np.testing.assert_array_equal(as_numpy(images), want)


def test_16_bit_grey_keeps_its_transparent_colour_in_8_bits():
    marked = next(case for case in GOOD if case.name == "I16_marked.png")
    with pytest.warns(UserWarning, match="1 of 1 images: 16 bits"):
        images = prepare(rows(marked.data), bit_depth=8)
    assert (images.facts.mode, images.facts.bit_depth) == ("LA", 8)
    np.testing.assert_array_equal(images[0], np.rint(marked.pixels / 257))


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heif_are_decoded(kind, tmp_path):
    """Both codecs are lossy: a uniform colour is accurate to a few levels."""
    flat = np.full((64, 64, 3), (200, 90, 30), np.uint8)
    (image,) = prepare(rows(zoo.encode(flat, kind=kind)))
    assert image.shape == (3, 64, 64)
    assert np.abs(image.numpy().astype(int) - flat.transpose(2, 0, 1)).max() <= 4


def test_the_declared_mode_of_a_column_is_used():
    declared = datasets.Features({"image": datasets.Image(mode="RGB")})
    images = prepare(rows(zoo.encode(zoo.GREY)).cast(declared))
    assert images.facts.mode == "RGB"
    np.testing.assert_array_equal(images[0], np.stack([zoo.GREY] * 3))
    assert prepare(rows(zoo.encode(zoo.GREY)).cast(declared), image_mode="L").facts.mode == "L"


def test_image_mode_has_precedence_and_composites_on_white():
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


@pytest.mark.slow
def test_loss_of_quality_is_warned_about_with_a_count():
    losses = [
        (zoo.animated(), {}, "3 of 3 images: animated"),
        ([a for a in GOOD if a.name.startswith("RGB_16.")], {}, "2 of 2 images: 16 bits"),
        ([a for a in GOOD if a.name == "L.png"], {"resolution": 32}, "1 of 1 images: enlarged"),
    ]
    for cases, options, message in losses:
        for _ in range(2):  # also when read from the cache
            with pytest.warns(UserWarning, match=message):
                prepare(rows(*(case.data for case in cases)), **options)
    dark = zoo.encode((zoo.DEEP % 4096).astype(np.uint16))
    with pytest.warns(UserWarning, match="nearly black"):
        prepare(rows(dark))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("shape", [(2000, 1), (1, 2000)])
@pytest.mark.parametrize("crop", ["center", "random"])
def test_extreme_aspect_ratios_are_warned_about_and_stay_small(shape, crop):
    ramp = np.full(shape, 77, np.uint8)
    with pytest.warns(UserWarning, match="times longer than wide"):
        images = prepare(rows(zoo.encode(ramp)), resolution=16, crop=crop)
    assert images[0].shape == (1, 16, 16)
    assert (images[0] == 77).all()
    stored = sum(file.stat().st_size for file in images.folder.glob("*.arrow"))
    assert stored < 10_000  # 2000 * 16 * 16 bytes would be 512,000


# Sizes.


@pytest.mark.slow
def test_images_of_one_size_keep_it_and_others_get_a_proposed_resolution():
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


def test_crop_none_keeps_the_whole_image_and_needs_one_shape():
    images = prepare(greys((24, 36), (48, 72)), resolution=12, crop="none")
    assert [tuple(image.shape) for image in images] == [(1, 12, 18)] * 2
    # A smooth image is the same at any size.
    ramp = np.tile(np.linspace(0, 255, 72), (48, 1)).astype(np.uint8)
    (small,) = as_numpy(prepare(rows(zoo.encode(ramp)), resolution=24, crop="none"))
    np.testing.assert_allclose(small[0, 0], ramp.reshape(48, 36, 2).mean(2)[0], atol=2)
    with pytest.raises(DataError, match=r"one shape.*8x8, 10x8"):
        prepare(greys((8, 8), (8, 10)), resolution=8, crop="none")
    with pytest.raises(DataError, match="8192"):
        prepare(greys((1, 100)), resolution=100, crop="none")


def test_decoding_in_threads_leaves_other_warnings_as_they_are(monkeypatch):
    """The second thread starts before the first ends, and ends after it."""
    second_started, first_ended = threading.Event(), threading.Event()
    open_image = decoding._open_image

    def open_in_order(file):
        if threading.current_thread().name == "second":
            second_started.set()
            assert first_ended.wait(60)
        assert second_started.wait(60)
        return open_image(file)

    monkeypatch.setattr(decoding, "_open_image", open_in_order)
    cells = [{"bytes": zoo.encode(zoo.GREY), "path": None}]
    first, second = (
        threading.Thread(target=decoding.read_headers, args=(cells, None), name=name)
        for name in ("first", "second")
    )
    first.start()
    second.start()
    first.join()
    first_ended.set()
    second.join()
    with pytest.raises(UserWarning, match="of the user"):  # an error in tests
        warnings.warn("of the user", stacklevel=1)


def test_resizing_is_antialiased():
    checkers = np.indices((64, 64)).sum(0) % 2 * np.uint8(255)
    (small,) = as_numpy(prepare(rows(zoo.encode(checkers.astype(np.uint8))), resolution=16))
    # Without a low-pass filter every fourth pixel would be all black or all white.
    assert np.abs(small[0].astype(float) - 127.5).max() < 3


@pytest.mark.slow
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


def test_16_bit_images_resize_like_8_bit_images_with_more_levels():
    values = zoo.grey(40, 40)
    deep = prepare(rows(zoo.encode(values.astype(np.uint16) * 257)), resolution=16)
    flat = prepare(rows(zoo.encode(values)), resolution=16)
    difference = deep[0].numpy() / 257.0 - flat[0].numpy()
    # Pillow's 8-bit filter rounds after each of its two passes.
    assert np.abs(difference).max() < 1.1
    assert len(np.unique(deep[0].numpy() % 257)) > 100


def _blob(side, radius, softness):
    """A greenish disc with a soft edge, and bright red in the transparent pixels around it."""
    y, x = np.indices((side, side)) / side - 0.5
    alpha = np.rint(255 / (1 + np.exp((np.hypot(x, y) - radius) / softness)))
    colour = np.stack([0 * x, 200 + 40 * np.sin(9 * x), 100 + 90 * np.cos(7 * y)], -1)
    colour[alpha == 0] = 255, 0, 0
    return np.concatenate([colour, alpha[..., None]], -1).astype(np.uint8)


def test_the_colour_of_transparent_pixels_does_not_bleed_when_resizing():
    images = prepare(
        rows(*(zoo.encode(_blob(64, 0.3 + 0.02 * i, 1e-3)) for i in range(3))), resolution=16
    )
    for image in as_numpy(images):
        visible = image[3] > 0
        # 8-bit premultiplied colours of a nearly transparent pixel are coarse, but contain no red.
        assert image[0][visible].max() == 0
        assert (image[:3][:, ~visible] == 255).all()
        assert 0 < visible.sum() < visible.size


def test_resizing_and_compositing_commute():
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
