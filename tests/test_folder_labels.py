"""Labels of image folders: class folders, dataset.json and codes in a metadata.csv."""

import json

import image_zoo as zoo
import pytest
from image_sets import folder_of, prepare

from ddpm_hf.data import DataError, load_images

PIXELS = zoo.encode(zoo.GREY)


def classes_of(root, split="train", column=True):
    """Class name of each image, None without label; by file name relative to the root."""
    dataset = load_images(root, split=split)
    images = prepare(dataset, label_column=column)
    names = images.facts.class_names
    paths = [row["path"].removeprefix(f"{root}/") for row in _cells(dataset)]
    labels = images.labels.tolist()
    return {
        path: None if label < 0 else names[label] for path, label in zip(paths, labels, strict=True)
    }


def _cells(dataset):
    return dataset.with_format("arrow")[:].column("image").to_pylist()


def folder_with(root, *files):
    return folder_of(root, dict.fromkeys(files, PIXELS))


@pytest.mark.slow
@pytest.mark.parametrize(
    "files",
    [
        ("cats/2023/1.png", "cats/2024/1.png", "dogs/2023/1.png"),
        ("cats/a/b/1.png", "dogs/c/1.png"),
        ("cats/same/1.png", "dogs/same/1.png"),
    ],
)
def test_the_first_folder_is_the_class(tmp_path, files):
    root = folder_with(tmp_path, *files)
    with pytest.warns(UserWarning, match=rf"{len(files)} of {len(files)} images are in a sub-f"):
        assert classes_of(root) == {file: file.split("/")[0] for file in files}


def test_images_at_another_depth_are_named_and_counted(tmp_path):
    files = ("cats/1.png", "cats/more/2.png", "dogs/1.png", "cover.png")
    root = folder_with(tmp_path, *files)
    with pytest.warns(UserWarning, match="images") as warned:
        assert [*classes_of(root).values()] == ["cats", "cats", None, "dogs"]
    text = "\n".join(str(warning.message) for warning in warned)
    assert "1 of 4 images are outside of the class folders, such as 'cover.png'" in text
    assert "1 of 4 images are in a sub-folder of their class folder" in text
    assert "'cats/more/2.png'" in text
    assert "1 of 4 images has no label" in text


def test_images_at_another_depth_are_silent_without_classes(tmp_path, recwarn):
    root = folder_with(tmp_path, "cats/1.png", "cats/more/2.png", "dogs/1.png", "cover.png")
    assert len(prepare(load_images(root))) == 4
    assert not recwarn


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_first_folder_below_the_split_is_the_class(tmp_path, split):
    files = [f"{part}/{name}/2023/1.png" for part in ("train", "test") for name in ("cats", "dogs")]
    root = folder_with(tmp_path, *files)
    with pytest.warns(UserWarning, match="2 of 2 images are in a sub-folder"):
        assert [*classes_of(root, split).values()] == ["cats", "dogs"]


def test_joined_splits_share_the_class_numbers(tmp_path):
    root = folder_with(
        tmp_path, "train/cats/1.png", "train/dogs/1.png", "test/apes/1.png", "test/dogs/1.png"
    )
    assert [*classes_of(root, "train+test").values()] == ["cats", "dogs", "apes", "dogs"]


def test_a_single_folder_is_no_class_and_its_sub_folders_are_named(tmp_path):
    root = folder_with(tmp_path, "pets/cats/1.png", "pets/dogs/1.png")
    with pytest.raises(DataError, match=r"only class folder is 'pets'.*'cats', 'dogs'.*pass"):
        classes_of(root)
    with pytest.raises(DataError, match=r"no column 'label'; the only class folder is 'pets'"):
        classes_of(root, column="label")


def edm_folder(root, labels):
    folder_with(root, "00000/a.png", "00000/b.png", "00001/c.png", "00001/d.png")
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


LABELS = {"00000/a.png": 10, "00000/b.png": 9, "00001/c.png": 10, "00001/d.png": 9}


@pytest.mark.slow
@pytest.mark.parametrize("labels", [LABELS, [*LABELS.items()]])
@pytest.mark.parametrize("folder", ["", "train"])
def test_a_dataset_json_has_the_labels(tmp_path, labels, folder, recwarn):
    edm_folder(tmp_path / folder, labels)
    assert [*classes_of(tmp_path).values()] == ["10", "9", "10", "9"]
    assert load_images(tmp_path).features["label"].names == ["9", "10"]
    assert not recwarn  # the file counts as used


def test_images_that_are_not_in_a_dataset_json_are_named(tmp_path):
    root = edm_folder(tmp_path, {**LABELS, "00001/d.png": -1, "x.png": 3})
    folder_with(root, "00001/e.png")
    not_there = pytest.warns(UserWarning, match=r"1 of 5 images are not in 'dataset\.json', such")
    with not_there, pytest.warns(UserWarning, match="2 of 5 images have no label"):
        assert [*classes_of(root).values()] == ["10", "9", "10", None, None]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "'dataset.json' has no labels"),
        ({file: [0.0, 1.0] for file in LABELS}, r"must be integers, got \[0.0, 1.0\]"),
        ({"other.png": 1}, "no label for any image, such as '00000/a.png'"),
        (["00000/a.png", 1], "does not list pairs"),
    ],
)
def test_a_dataset_json_without_classes_is_named(tmp_path, labels, message):
    with pytest.raises(DataError, match=message):
        classes_of(edm_folder(tmp_path, labels))


def test_another_dataset_json_is_an_unused_file(tmp_path):
    root = folder_with(tmp_path, "cats/1.png", "dogs/1.png")
    (root / "dataset.json").write_text('{"name": "pets"}')
    with pytest.warns(UserWarning, match=r"2 images used, 1 left out \(.json 1\)"):
        assert [*classes_of(root).values()] == ["cats", "dogs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("codes", "names"),
    [
        (["007", "010", "7"], ("007", "010", "7")),
        (["NA", "null", "None", "nan"], ("NA", "None", "nan", "null")),
        (["NA", "0", "1"], ("0", "1", "NA")),
        (["1E5", "2E3"], ("1E5", "2E3")),
        (["10", "9", "-1", ""], ("9", "10")),
        (["True", "False"], ("False", "True")),
    ],
)
@pytest.mark.filterwarnings("ignore:4 of 8 images have no label")
def test_codes_of_a_metadata_csv_stay_as_written(tmp_path, codes, names):
    root = folder_with(tmp_path, *(f"{i}.png" for i in range(2 * len(codes))))
    lines = [f"{i}.png,{code}" for i, code in enumerate(codes * 2)]
    (root / "metadata.csv").write_text("\n".join(["file_name,code", *lines]))
    labels = prepare(load_images(root), label_column="code")
    assert labels.facts.class_names == names
    got = [names[label] if label >= 0 else None for label in labels.labels]
    assert got == [code if code in names else None for code in codes] * 2


def test_codes_of_several_metadata_files_stay_as_written(tmp_path):
    for folder in ("a", "b"):
        folder_with(tmp_path, f"{folder}/0.png", f"{folder}/1.png")
        (tmp_path / folder / "metadata.csv").write_text(
            f"\ufefffile_name,code,size\n0.png,0{len(folder)},0.5\n\n1.png,{folder},1.5\n"
        )
    rows = load_images(tmp_path)
    assert rows["code"] == ["01", "a", "01", "b"]
    assert rows["size"] == [0.5, 1.5, 0.5, 1.5]


@pytest.mark.parametrize("line", [",cat", " "])
def test_a_line_of_a_metadata_csv_without_a_file_is_refused(tmp_path, line):
    root = folder_with(tmp_path, "0.png", "1.png")
    (root / "metadata.csv").write_text(f"file_name,code\n0.png,dog\n{line}\n")
    with pytest.raises(DataError, match="cannot be read: each needs a file name"):
        load_images(root)
