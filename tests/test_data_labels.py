"""Class labels: numbers and names from a column, and unusual columns."""

import pickle

import datasets
import image_zoo as zoo
import numpy as np
import pytest
import torch
from image_sets import CLASSES, folder_of, prepare, rows
from torch.utils.data import DataLoader

from ddpm_hf.data import DataError, TrainingImages, load_images, read_batches

CAT_OR_DOG = datasets.ClassLabel(names=["cat", "dog"])


def labelled(values, kind=None):
    """Constant images of grey level 0, 1, ..., with a label column "kind"."""
    images = rows(*(zoo.encode(np.full((4, 4), i, np.uint8)) for i in range(len(values))))
    column = datasets.Dataset.from_dict({"kind": values})
    if kind is not None:
        column = column.cast_column("kind", kind)  # unlike `cast`, does not check the numbers
    return datasets.concatenate_datasets([images, column], axis=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "kind", "numbers", "names"),
    [
        ([1, 0, 1], CAT_OR_DOG, [1, 0, 1], ("cat", "dog")),
        (["b", "a", "b"], None, [1, 0, 1], ("a", "b")),
        ([7, 10, 9, 7], None, [0, 2, 1, 0], ("7", "9", "10")),
        ([True, False], None, [1, 0], ("False", "True")),
        ([0, 5], datasets.ClassLabel(num_classes=300), [0, 5], tuple(map(str, range(300)))),
    ],
)
def test_classes_are_numbers_and_names(values, kind, numbers, names):
    images = prepare(labelled(values, kind), label_column="kind")
    assert images.labels.tolist() == numbers
    assert images.facts.class_names == names


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "kind", "numbers"),
    [
        ([1, -1, 0, None], CAT_OR_DOG, [1, -1, 0, -1]),
        (["b", "", "a", None], None, [1, -1, 0, -1]),
        ([3, -1, 2, None], None, [1, -1, 0, -1]),
    ],
)
def test_images_without_a_label_get_minus_1_and_are_counted(values, kind, numbers):
    with pytest.warns(UserWarning, match="2 of 4 images have no label"):
        images = prepare(labelled(values, kind), label_column="kind")
    assert images.labels.tolist() == numbers


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        ([-1, -1], CAT_OR_DOG, "got no label"),
        ([1, 1, -1], CAT_OR_DOG, "got only the class 'dog'"),
        (["x", "x"], None, "got only the class 'x'"),
        ([f"a photo of {i}" for i in range(30)], None, "30 distinct values in 30 rows"),
        ([0.5, 1.5], None, "got float64"),
        ([0, 1, 2, 7], CAT_OR_DOG, r"2 classes 0\.\.1, but 2 of 4 rows .* \(2, 7\), such as row 2"),
        ([0, 1, -2], CAT_OR_DOG, r"1 of 3 rows have other labels \(-2\)"),
    ],
)
def test_columns_that_are_not_classes_are_rejected(values, kind, message):
    with pytest.raises(DataError, match=message):
        prepare(labelled(values, kind), label_column="kind")


def test_sub_folders_are_classes_on_request(tmp_path):
    dataset = load_images(folder_of(tmp_path, CLASSES))
    images = prepare(dataset)
    assert images.labels is None
    assert images.facts.class_names == ("a", "b")
    requested = prepare(dataset, label_column=True)
    assert requested.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert requested.folder == images.folder  # read from the cache


def test_the_only_class_column_is_found():
    one = labelled([0, 1], CAT_OR_DOG)
    assert prepare(one, label_column=True).labels.tolist() == [0, 1]
    two = one.add_column("other", [1, 0]).cast_column("other", CAT_OR_DOG)
    with pytest.raises(DataError, match=r"several class columns, kind, other; name"):
        prepare(two, label_column=True)
    with pytest.raises(DataError, match=r"no column 'kinds' \(did you mean 'kind'\?\)"):
        prepare(two, label_column="kinds")
    with pytest.raises(DataError, match=r"no class labels.*sub-folder"):
        prepare(rows(zoo.encode(zoo.GREY)), label_column=True)


def test_labels_follow_their_images_when_rows_are_skipped_or_selected():
    def spoil(row, place):
        return {"image": {"bytes": b"x", "path": None}} if place == 1 else row

    chosen = labelled([5, 6, 7, 8] * 2).select([6, 1, 4, 3, 0])
    chosen = chosen.cast_column("image", datasets.Image(decode=False))
    broken = chosen.map(spoil, with_indices=True, features=chosen.features)
    with pytest.warns(UserWarning, match="4 images used, 1 left out"):
        images = prepare(broken, label_column="kind", on_bad_image="skip")
    assert [int(image[0, 0, 0]) for image in images] == [6, 4, 3, 0]
    # The image of grey level i has the label 5 + i % 4.
    assert [images.facts.class_names[label] for label in images.labels] == ["7", "5", "8", "5"]
    again = pickle.loads(pickle.dumps(images))
    assert again.labels.tolist() == images.labels.tolist()
    assert again.facts == images.facts


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_images_come_with_their_labels(workers):
    images = prepare(labelled(["b", "a", "c", "a"] * 2), label_column="kind")
    training = TrainingImages(images, random_flip=True, size_multiple=8)
    image, label = training[0, 2]
    assert (image.shape, label) == ((1, 8, 8), 2)
    order = [[(0, 3), (0, 4)], [(1, 2), (1, 1)]]
    loader = DataLoader(training, batch_sampler=order, num_workers=workers)
    batches = list(read_batches(loader))
    assert [labels.tolist() for _, labels in batches] == [[0, 1], [2, 0]]
    assert batches[0][1].dtype == torch.int64
    greys = [((x_0[:, 0, 0, 0] + 1) * 127.5).round().tolist() for x_0, _ in batches]
    assert greys == [[3, 4], [2, 1]]
