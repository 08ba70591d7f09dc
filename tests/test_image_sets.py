"""Sets of drawn images: mixed modes and sizes, splits, damaged files, value ranges."""

import io
import zipfile

import datasets
import numpy as np
import pytest
import torch
from image_zoo import encode
from PIL import Image

from ddpm_hf import evaluate
from ddpm_hf.cli import main
from ddpm_hf.evaluation.subjects import facts_of_set, image_set
from ddpm_hf.sampling import open_drawn

COLOURS = np.random.default_rng(0).integers(0, 256, (16, 8, 8, 3), dtype=np.uint8)
GREY = COLOURS[..., :1].repeat(3, -1)
PNG = encode(COLOURS[0])


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def folder(root, images):
    """A folder of PNG files, by name or in order; bytes are written as they are."""
    if not isinstance(images, dict):
        images = {f"{i:02}.png": image for i, image in enumerate(images)}
    for name, image in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            (root / name).write_bytes(image)
        else:
            (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(root / name)
    return root


def pixels_of(images):
    return images.read(range(len(images)))


DEEP = Image.fromarray(COLOURS[0, ..., 0].astype(np.uint16) * 257)
CLEAR = Image.fromarray(np.dstack([COLOURS[0], COLOURS[1, ..., 0]]))
PALETTE = Image.fromarray(COLOURS[0]).convert("P")
# One image among colours or grey ones, and the mode and bit depth that lose nothing.
MIXED = {
    "grey among colours": (Image.fromarray(COLOURS[0]).convert("L"), COLOURS, "RGB", 8),
    "1 bit among colours": (Image.fromarray(COLOURS[0]).convert("1"), COLOURS, "RGB", 8),
    "palette among grey": (PALETTE, GREY[..., 0], "RGB", 8),
    "transparent among colours": (CLEAR, COLOURS, "RGBA", 8),
    "grey and alpha among colours": (CLEAR.convert("LA"), COLOURS, "RGBA", 8),
    "colour among grey": (Image.fromarray(COLOURS[0]), GREY[..., 0], "RGB", 8),
    "16 bits among 8": (DEEP, GREY[..., 0], "L", 16),
    "16 bits among colours": (DEEP, COLOURS, "RGB", 16),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", MIXED)
def test_mixed_modes_become_the_smallest_that_loses_nothing_in_any_order(case, tmp_path):
    one, others, mode, bit_depth = MIXED[case]
    first = open_drawn(folder(tmp_path / "first", [one, *others[1:]]))
    last = open_drawn(folder(tmp_path / "last", [*others[1:], one]))
    for images in (first, last):
        facts = facts_of_set(images)
        assert (facts.mode, facts.bit_depth) == (mode, bit_depth)
    np.testing.assert_array_equal(pixels_of(first), np.roll(pixels_of(last), 1, 0))
    peak = 2**bit_depth // 255
    rest = others[1:] if others.ndim == 4 or mode == "L" else GREY[1:]
    rest = rest[..., None] if rest.ndim == 3 else rest
    channels = {"L": 1, "RGB": 3, "RGBA": 3}[mode]
    np.testing.assert_array_equal(pixels_of(first)[1:, ..., :channels], rest * np.uint16(peak))


@pytest.mark.slow
def test_the_distance_does_not_depend_on_which_image_is_grey(tmp_path):
    grey = Image.fromarray(COLOURS[0]).convert("L")
    real = folder(tmp_path / "real", COLOURS[::-1])
    values = [
        evaluate(
            folder(tmp_path / name, images), real, metrics=["fd"], features="pixels", progress=False
        ).figures["fd"].value
        for name, images in {
            "first": [grey, *COLOURS[1:]], "last": [*COLOURS[1:], grey]
        }.items()
    ]  # fmt: skip
    assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_mixed_sizes_are_refused_with_two_files(tmp_path):
    images = [*COLOURS[:3], COLOURS[3][:, :6], COLOURS[4]]
    message = r"must have one size, got 8x8 in row 0 .*00\.png'\) and 6x8 in row 3 .*03\.png"
    with pytest.raises(ValueError, match=message):
        open_drawn(folder(tmp_path / "x", images))
    with pytest.raises(ValueError, match=r"one size, got 6x8 .*00\.png'\) and 8x8 .*01\.png"):
        open_drawn(folder(tmp_path / "y", images[::-1][1:]))


@pytest.mark.slow
@pytest.mark.parametrize("size", [(3, 5), (300, 280)])
def test_images_of_any_size_keep_it(size, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, *size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(pixels_of(open_drawn(folder(tmp_path / "x", images))), images)


def test_all_splits_of_a_folder_are_read(tmp_path):
    names = [f"{'train' if i < 10 else 'test'}/{'ab'[i % 2]}/{i:02}.png" for i in range(16)]
    images = open_drawn(folder(tmp_path / "x", dict(zip(names, COLOURS, strict=True))))
    order = [*range(10, 16, 2), *range(11, 16, 2), *range(0, 10, 2), *range(1, 10, 2)]
    np.testing.assert_array_equal(pixels_of(images), COLOURS[order])
    assert images.labels.tolist() == [i % 2 for i in order]
    assert images.class_names == ("a", "b")


def test_num_images_of_a_set_are_chosen_by_the_seed_from_all_of_its_folders(tmp_path):
    levels = range(10, 170, 10)
    names = [f"{'ab'[level > 80]}/{level:03}.png" for level in levels]
    flat = [np.full((8, 8), level, np.uint8) for level in levels]
    drawn = folder(tmp_path / "x", dict(zip(names, flat, strict=True)))
    real = folder(tmp_path / "real", COLOURS[..., 0])

    def chosen(seed):
        sets = []

        def network(x):
            sets.append([round(255 * level) for level in x[:, 0, 0, 0].tolist()])
            return x.flatten(1)

        options = {"metrics": ["fd"], "features": network, "num_images": 8, "seed": seed}
        (fd,) = evaluate(drawn, real, **options, progress=False).results
        assert fd.num_drawn == 8
        return sets[-1]

    first = chosen(0)
    assert len({*first}) == 8
    assert {*first} <= {*levels}
    assert min(first) <= 80 < max(first)
    assert chosen(0) == first != chosen(1)


def test_selected_images_are_those_of_the_indices_with_their_labels(tmp_path):
    np.savez(tmp_path / "x.npz", COLOURS, np.arange(16) % 3)
    few = open_drawn(tmp_path / "x.npz").select([7, 2, 9])
    np.testing.assert_array_equal(pixels_of(few), COLOURS[[7, 2, 9]])
    np.testing.assert_array_equal(few.read(range(1, 3)), COLOURS[[2, 9]])
    assert few.labels.tolist() == [1, 2, 0]


def test_a_parquet_file_of_one_class_keeps_its_labels(tmp_path):
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"])
    )
    rows = {"image": [Image.fromarray(image) for image in COLOURS[:4]], "label": [1] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "x.parquet")
    images = open_drawn(tmp_path / "x.parquet")
    assert (images.labels.tolist(), images.class_names) == ([1] * 4, ("a", "b"))


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DAMAGED_PICTURES = {
    "cut": PNG[: len(PNG) // 2], "cut in its header": PNG[:20], "empty": b"",
    "html": b"<html>404</html>", "lfs": LFS,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("kind", DAMAGED_PICTURES)
def test_a_damaged_picture_is_named_or_skipped(kind, row, tmp_path):
    names = [f"{'ab'[i // 8]}/{i:02}.png" for i in range(16)]
    files = dict(zip(names, COLOURS, strict=True)) | {names[row]: DAMAGED_PICTURES[kind]}
    folder(tmp_path / "x", files)
    with pytest.raises(ValueError, match=rf"1 of 16 images .*\n  row {row} .*/{row:02}\.png"):
        open_drawn(tmp_path / "x")
    with pytest.warns(UserWarning, match=rf"1 left out .*/{row:02}\.png"):
        images = open_drawn(tmp_path / "x", on_bad_image="skip")
    np.testing.assert_array_equal(pixels_of(images), np.delete(COLOURS, row, 0))
    assert images.labels.tolist() == [0] * 7 + [1] * 8


@pytest.mark.slow
@pytest.mark.filterwarnings("always:15 images used")
def test_the_command_skips_bad_images_of_both_sets(tmp_path, capsys):
    drawn = folder(tmp_path / "drawn", [PNG[:50], *COLOURS[1:]])
    real = folder(tmp_path / "real", [*COLOURS[:-1], PNG[:50]])
    command = ["evaluate", str(drawn), str(real), "--metrics", "fd", "--features", "pixels"]
    command += ["--output", str(tmp_path / "out")]
    assert main(command) == 2
    assert "set --on-bad-image to 'skip'" in capsys.readouterr().err
    assert main([*command, "--on-bad-image", "skip"]) == 0
    assert capsys.readouterr().err.count("1 left out") == 2


def array_file(save, *arrays):
    file = io.BytesIO()
    save(file, *arrays)
    return file.getvalue()


NPY, NPZ = array_file(np.save, COLOURS), array_file(np.savez, COLOURS)
COMPRESSED = array_file(np.savez_compressed, COLOURS)
DAMAGED_ARRAYS = {
    "half.npz": (NPZ[: len(NPZ) // 2], "is cut or damaged"),
    "half.npy": (NPY[: len(NPY) // 2], "is cut or damaged"),
    "header.npy": (NPY[:40], "is cut or damaged"),
    "flipped.npz": (COMPRESSED[:500] + b"\0\0\0\0" + COMPRESSED[504:], "is cut or damaged"),
    "byte.npz": (NPZ[:600] + bytes([NPZ[600] ^ 255]) + NPZ[601:], "is cut or damaged"),
    "empty.npz": (b"", "is empty"),
    "empty.npy": (b"", "is empty"),
    "page.npz": (b"<!DOCTYPE html><html>404</html>", "is a web page"),
    "page.npy": (b"\n <html>404</html>", "is a web page"),
    "pointer.npz": (LFS, "is a Git LFS pointer"),
    "text.npy": (b"1 2 3\n", r"is not a \.npy or \.npz file"),
    "objects.npy": (array_file(np.save, np.array([{}, 1])), "holds Python objects"),
    "objects.npz": (array_file(np.savez, np.array([{}, 1])), "holds Python objects"),
    "labels.npz": (array_file(np.savez, COLOURS, np.arange(3)), r"class numbers .* shape \(3,\)"),
    "names.npz": (array_file(np.savez, COLOURS, np.array(["a"] * 16)), "class numbers .* <U1"),
    "none.npy": (array_file(np.save, COLOURS[:0]), r"at least one image, got shape \(0, 8, 8, 3"),
    "flat.npy": (array_file(np.save, COLOURS[..., 0]), r"got uint8 of shape \(16, 8, 8\)"),
    "signed.npy": (array_file(np.save, COLOURS.astype(int)), "got int64 of shape"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DAMAGED_ARRAYS)
def test_a_damaged_array_file_is_named_in_one_line_without_unsafe_advice(name, tmp_path, capsys):
    data, message = DAMAGED_ARRAYS[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name} .*{message}|{name} {message}") as error:
        open_drawn(tmp_path / name)
    assert "\n" not in str(error.value)
    folder(tmp_path / "real", COLOURS)
    assert main(["evaluate", str(tmp_path / name), str(tmp_path / "real")]) == 2
    printed = capsys.readouterr().err
    assert name in printed
    assert "pickle" not in printed


@pytest.mark.parametrize("name", ["half", "empty", "page"])
def test_a_damaged_parquet_file_is_named(name, tmp_path, capfd):
    content = {"half": b"PAR1" + b"\0" * 99, "empty": b"", "page": b"<html>404</html>"}[name]
    (tmp_path / f"{name}.parquet").write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}\.parquet' cannot be loaded"):
        open_drawn(tmp_path / f"{name}.parquet")


def test_the_content_decides_what_an_array_file_is(tmp_path):
    (tmp_path / "x.npy").write_bytes(NPZ)
    (tmp_path / "X.NPZ").write_bytes(NPY)
    with zipfile.ZipFile(tmp_path / "zipped.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("arr_0.npy", NPY)
    for name in ("x.npy", "X.NPZ", "zipped.npz"):
        np.testing.assert_array_equal(pixels_of(open_drawn(tmp_path / name)), COLOURS)


UNIT = COLOURS.astype(np.float32) / 255
WRONG_RANGES = {
    "signed": (UNIT * 2 - 1, r"float32 in -1\.\.1; use \(x \+ 1\) / 2"),
    "bytes": (UNIT * 255, r"float32 in 0\.\.255; use x / 255"),
    "slightly above": (UNIT * np.float32(1.0001), r"float32 in 0\.\.1\.0001"),
    "half precision": ((UNIT * 2 - 1).astype(np.float16), r"float16 in -1\.\.1"),
    "infinite": (np.where(UNIT < 0.1, np.inf, UNIT), r"in 0\.1\d+\.\.inf"),
    "minus infinite": (np.where(UNIT < 0.1, -np.inf, UNIT), r"in -inf\.\.1"),
    "NaN": (np.where(UNIT < 0.01, np.nan, UNIT), r"in nan\.\.nan"),
}


@pytest.mark.parametrize("case", WRONG_RANGES)
def test_floats_out_of_range_are_refused_with_file_and_range(case, tmp_path):
    array, message = WRONG_RANGES[case]
    np.save(tmp_path / "x.npy", array)
    np.savez(tmp_path / "x.npz", array)
    np.savez_compressed(tmp_path / "small.npz", array)
    for name in ("x.npy", "x.npz", "small.npz"):
        with pytest.raises(ValueError, match=rf"/{name} must hold .*{message}"):
            open_drawn(tmp_path / name)
    for images in (array, list(array), torch.from_numpy(array).permute(0, 3, 1, 2)):
        with pytest.raises(ValueError, match=f"the set must hold .*{message}"):
            image_set(images)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_in_range_of_any_precision_are_read(dtype, tmp_path):
    np.save(tmp_path / "x.npy", (COLOURS / 255).astype(dtype))
    for images in (open_drawn(tmp_path / "x.npy"), image_set((COLOURS / 255).astype(dtype)[::-1])):
        assert pixels_of(images).dtype == np.uint8
        np.testing.assert_array_equal(np.sort(pixels_of(images), 0), np.sort(COLOURS, 0))


PICTURES = [Image.fromarray(image) for image in COLOURS]
UNLIKE = {
    "sizes": (
        [*PICTURES, PICTURES[0].resize((8, 9))],
        "image 0 is RGB 8x8 and image 16 is RGB 8x9",
    ),
    "modes": ([*PICTURES, PICTURES[0].convert("L")], "image 0 is RGB 8x8 and image 16 is L 8x8"),
    "palettes": ([PALETTE, PALETTE], "images must have mode .*, got P; use"),
    "shapes": ([COLOURS[0], COLOURS[1, 1:]], r"uint8 of shape \(8, 8, 3\) and image 1"),
    "nothing": ([], "at least one image"),
    "one tensor": (torch.zeros(3, 8, 8), r"\(N, C, H, W\), got shape \(3, 8, 8\)"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_images_in_memory_must_be_alike(case):
    images, message = UNLIKE[case]
    with pytest.raises(ValueError, match=message):
        image_set(images)


def measured_against(drawn, real):
    return evaluate(drawn, real, metrics=["fd"], features="pixels", progress=False).figures["fd"]


@pytest.mark.slow
def test_drawn_images_of_16_bits_are_compared_with_real_ones_of_8(tmp_path):
    real = folder(tmp_path / "real", GREY[..., 0])
    deep = [Image.fromarray(image.astype(np.uint16) * 257) for image in GREY[::-1, ..., 1]]
    want = measured_against(folder(tmp_path / "drawn", list(GREY[::-1, ..., 1])), real)
    got = measured_against(folder(tmp_path / "deep", deep), real)
    assert got.value == pytest.approx(want.value, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("real", "message"),
    [
        ([*COLOURS[:8, :4], *COLOURS[8:, :6]], "several shapes instead of 8x5"),
        (COLOURS, r"width is 5 \(the drawn images': 8\)"),
    ],
)
def test_images_that_do_not_fit_are_refused_without_a_word_of_a_model(real, message, tmp_path):
    folder(tmp_path / "real", list(real))
    with pytest.raises(ValueError, match=f"do not fit the drawn images: .*{message}") as error:
        measured_against(folder(tmp_path / "drawn", list(COLOURS[:, :5])), tmp_path / "real")
    assert "model" not in str(error.value)
    assert "crop" not in str(error.value)
