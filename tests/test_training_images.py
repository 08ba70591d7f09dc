"""Training images: pixel values, augmentation by seed, epoch and index, padding and checks."""

import os
import signal
from functools import partial

import image_zoo as zoo
import numpy as np
import pytest
import torch
from image_sets import greys, prepare, rows
from torch.utils.data import DataLoader

from ddpm_hf.data import DataError, TrainingImages, read_batches, to_unit_range


@pytest.mark.parametrize(("dtype", "top"), [(torch.uint8, 255), (torch.uint16, 65535)])
def test_every_pixel_value_maps_to_its_own_float_and_back(dtype, top):
    levels = torch.arange(top + 1).to(dtype)
    values = to_unit_range(levels)
    exact = np.arange(top + 1) * 2 / top - 1
    # float32 rounding of a quotient up to 2 and of a difference up to 1.
    np.testing.assert_allclose(values.numpy(), exact, rtol=0, atol=2**-23 + 2**-24)
    assert (values[0], values[-1]) == (-1, 1)
    np.testing.assert_array_equal(((values + 1) * (top / 2)).round().numpy(), np.arange(top + 1))


def test_only_unsigned_integers_are_scaled_to_the_unit_range():
    with pytest.raises(TypeError, match=r"uint8 or uint16, got torch\.int64"):
        to_unit_range(torch.zeros(3, dtype=torch.int64))


def prepared_stack(count, height, width, **options):
    images = (zoo.encode((zoo.grey(height, width) + 7 * i).astype(np.uint8)) for i in range(count))
    return prepare(rows(*images), **options)


def test_without_augmentation_training_images_equal_the_source():
    images = prepared_stack(5, 6, 9)
    training = TrainingImages(images)
    assert len(training) == 5
    assert training.shape == (1, 6, 9)
    for epoch in (0, 3):
        for index in range(5):
            want = images[index].numpy() / 127.5 - 1
            np.testing.assert_allclose(training[epoch, index], want, rtol=0, atol=2**-23)


def test_random_flip_mirrors_about_half_of_the_images():
    images = prepared_stack(4, 6, 9)
    plain, flipping = TrainingImages(images), TrainingImages(images, seed=5, random_flip=True)
    mirrored = 0
    for epoch in range(100):
        for index in range(4):
            got, want = flipping[epoch, index], plain[epoch, index]
            is_mirrored = torch.equal(got, want.flip(-1))
            assert is_mirrored or torch.equal(got, want)
            mirrored += is_mirrored
    # 400 fair coins have standard deviation 10; fixed seed, z = 4.
    assert abs(mirrored - 200) < 40


def test_random_crops_are_windows_at_every_position():
    wide = zoo.grey(8, 14)
    images = prepare(rows(zoo.encode(wide), zoo.encode(wide.T.copy())), resolution=8, crop="random")
    training = TrainingImages(images)
    windows = {wide[:, x : x + 8].tobytes(): x for x in range(7)}
    seen = [((training[epoch, 0] + 1) * 127.5).round().to(torch.uint8) for epoch in range(200)]
    places = [windows[window.numpy().tobytes()] for window in seen]
    # 200 draws miss one of 7 equally likely places with probability 10^-12.
    assert set(places) == set(range(7))
    assert training[0, 1].shape == (1, 8, 8)
    np.testing.assert_array_equal(images[0][0], wide[:, 3:11])


def test_augmentation_is_a_function_of_seed_epoch_and_index():
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
    assert same < 60  # 2 flips x 5 places: about 9 of 93 agree by chance
    changes = sum(not torch.equal(want[0, i], want[1, i]) for i in range(31))
    assert changes > 15


@pytest.mark.slow
def test_loader_workers_do_not_change_the_images():
    training = TrainingImages(prepared_stack(10, 6, 9), random_flip=True)
    order = [(epoch, index) for epoch in range(2) for index in range(10)]
    loads = [
        torch.cat(list(DataLoader(training, batch_size=4, sampler=order, num_workers=workers)))
        for workers in (0, 2)
    ]
    assert torch.equal(*loads)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("native", "multiple", "padded", "before"),
    [
        ((28, 28), 8, (32, 32), (2, 2)),
        ((6, 9), 4, (8, 12), (1, 1)),
        ((9, 6), 4, (12, 8), (1, 1)),
        ((8, 8), 8, (8, 8), (0, 0)),
    ],
)
def test_padding_is_centred_and_replicates_the_edge(native, multiple, padded, before):
    images = prepared_stack(1, *native)
    training = TrainingImages(images, size_multiple=multiple)
    after = [p - n - b for p, n, b in zip(padded, native, before, strict=True)]
    widths = list(zip(before, after, strict=True))
    want = np.pad(images[0][0].numpy(), widths, mode="edge") / 127.5 - 1
    assert training.shape == (1, *padded)
    np.testing.assert_allclose(training[0, 0][0], want, rtol=0, atol=2**-23)


def test_a_sequence_of_float_images_is_accepted():
    images = [torch.full((2, 5, 6), value, dtype=torch.float64) for value in (-1, 0, 1)]
    images[1][0, 0, 0] = 0.5
    training = TrainingImages(images, random_flip=True, size_multiple=2)
    assert training.shape == (2, 6, 6)
    assert training[0, 2].dtype == torch.float32
    assert {float(image[0, 0, 0]) for image in (training[e, 1] for e in range(20))} == {0.0, 0.5}
    assert images[1][0, 0, 0] == 0.5  # flips must not change the tensors of the caller


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "no images"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8)], r"float tensors.*uint8"),
        ([torch.zeros(4, 4)], r"\(C, H, W\).*\(4, 4\)"),
        ([np.zeros((1, 4, 4))], "ndarray"),
        ([torch.full((1, 4, 4), 200.0)], r"\[-1, 1\], image 0 has 200..200"),
    ],
)
def test_invalid_images_raise_with_their_type_shape_or_range(images, message):
    with pytest.raises(DataError, match=message):
        TrainingImages(images)


def test_an_image_of_another_shape_raises_with_its_index():
    training = TrainingImages([torch.zeros(1, 4, 4), torch.zeros(1, 4, 5)])
    with pytest.raises(DataError, match=r"image 1 has \(1, 4, 5\), but image 0 \(1, 4, 4\)"):
        training[0, 1]


@pytest.mark.parametrize("value", [1.5, -7.0, float("nan"), float("inf")])
def test_every_image_is_checked_when_it_is_read(value):
    images = torch.zeros(100, 1, 4, 4)
    images[41, 0, 2, 3] = value
    training = TrainingImages(images)
    assert len(training.__getitems__([(0, index) for index in range(41)])) == 41
    with pytest.raises(DataError, match=r"\[-1, 1\], image 41 has"):
        training.__getitems__([(0, 40), (0, 41)])


def test_images_in_0_to_1_warn():
    images = torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match=r"in \[0, 1\].*x \* 2 - 1"):
        TrainingImages(images)
    TrainingImages(images * 2 - 1)
    images[10, 0, 0, 0] = -1
    TrainingImages(images)  # one bright image among others does not warn


class Stream:
    """A source of unknown length: the image at position i has the value i / 100."""

    num_images = labels = None

    def read(self, positions, offsets):
        assert offsets.shape == (len(positions), 2)
        return torch.stack([torch.full((1, 3, 4), position / 100) for position in positions])


def test_a_source_of_unknown_length_is_read_by_position():
    training = TrainingImages(Stream(), seed=1, random_flip=True, size_multiple=2)
    assert training.shape == (1, 4, 4)
    batch = training.__getitems__([(0, 50), (0, 7)])
    assert [image.mean().item() for image in batch] == pytest.approx([0.5, 0.07])
    assert torch.equal(training[0, 7], batch[1])
    with pytest.raises(TypeError, match="no length"):
        len(training)


class Failing:
    """Images where reading index 7 calls `action`."""

    def __init__(self, action):
        self.action = action

    def __len__(self):
        return 12

    def __getitem__(self, index):
        if index == 7:
            self.action()
        return torch.zeros(1, 4, 4)


def fail():
    raise OSError("the disk is gone\nfor good")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def loader_of(action, workers):
    order = [[(0, index) for index in range(first, first + 2)] for first in range(0, 12, 2)]
    return DataLoader(TrainingImages(Failing(action)), batch_sampler=order, num_workers=workers)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_raises_with_its_index_after_earlier_batches(workers):
    batches = read_batches(loader_of(fail, workers))
    assert [len(next(batches)) for _ in range(3)] == [2, 2, 2]
    with pytest.raises(DataError) as caught:
        next(batches)
    assert str(caught.value) == "image 7 cannot be read: OSError: the disk is gone"


@pytest.mark.slow
def test_a_killed_loader_worker_raises_with_the_rows_of_its_batch():
    with pytest.raises(DataError, match=r"process that reads images ended while rows \d+, \d+"):
        list(read_batches(loader_of(die, workers=1)))
