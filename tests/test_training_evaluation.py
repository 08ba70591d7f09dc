"""Frechet distance between samples and real images during training."""

import os
import signal

import datasets
import numpy as np
import pytest
import torch
from tiny_runs import (
    Images,
    assert_equal_bits,
    checkpoint,
    metrics,
    on_grid,
    tiny_config,
    tiny_unet,
)

from ddpm_hf import ConfigError, load, train
from ddpm_hf.data import ImageFacts, TrainingImages
from ddpm_hf.evaluation.metrics import measure
from ddpm_hf.sampling import draw_images
from ddpm_hf.training.dataset_setup import hold_out
from ddpm_hf.training.periodic_evaluation import as_pixels

pytestmark = pytest.mark.filterwarnings("ignore:`timestep_spacing`")  # few steps
OPTIONS = {
    "evaluate_steps": 2, "evaluate_num_images": 6, "evaluate_features": "pixels",
    "sample_inference_steps": 3, "num_train_timesteps": 20, "checkpointing_steps": 100,
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    return folder


def run(folder, dataset=None, **options):
    config = tiny_config(folder, **{**OPTIONS, **options})
    return train(config, unet=tiny_unet(), dataset=dataset or on_grid())


def evaluation_entries(folder):
    return {
        entry["step"]: {name: value for name, value in entry.items() if "evaluation" in name}
        for entry in metrics(folder)
        if "evaluation_fd" in entry
    }


def by_pixels(images, num_bits=8):
    """Features of images in [0, 1], (N, C, H, W): their pixels, repeated for three channels."""
    largest = 2**num_bits - 1
    return ((images * largest).round() / largest).expand(-1, 3, -1, -1).flatten(1)


def as_unit(images):
    return torch.stack(list(images)) / 2 + 0.5


@pytest.mark.slow
@pytest.mark.parametrize("share", [None, "0.4"])
def test_distance_and_floor_equal_those_of_evaluate(tmp_path, capsys, share):
    result = run(tmp_path, validation_split=share)
    entries = evaluation_entries(tmp_path)
    assert list(entries) == [2, 4, 6]
    floor = "held-out images" if share else "halves of the training images"
    assert f"training images, with the floor of {floor}, features pixels" in capsys.readouterr().out
    real, held_out = by_pixels(as_unit(on_grid())), None
    if share:
        halves = hold_out(TrainingImages(on_grid()), 0.4, seed=0)
        real, held_out = (real[part.indices] for part in halves)
    drawn = np.stack(draw_images(load(result.model_dir), 6, batch_size=4, num_inference_steps=3,
                                 eta=0.0, progress=False))  # fmt: skip
    drawn = by_pixels(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    (fd,) = measure("fd", real, drawn, held_out)
    want = {
        "evaluation_fd": fd.value,
        "evaluation_fd_standard_error": fd.standard_error,
        "evaluation_fd_half": fd.floor.drawn,
        "evaluation_fd_half_real": fd.floor.real,
    }
    assert entries[6] == pytest.approx(want, rel=1e-5)  # the features are float32


@pytest.mark.slow
def test_evaluation_does_not_change_the_weights_and_is_reproduced_by_a_resumed_run(tmp_path, cache):
    run(tmp_path / "without", evaluate_steps=None)
    run(tmp_path / "straight")
    stop = Images(on_grid(), 4 * 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path / "resumed", dataset=stop).num_steps < 6
    kept = {path: path.stat().st_mtime_ns for path in cache.rglob("part-*")}
    run(tmp_path / "resumed")
    assert len(kept) == 1  # features of the real images, cached for all three runs
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("part-*")} == kept
    straight = checkpoint(tmp_path / "straight", 6)
    assert_equal_bits(checkpoint(tmp_path / "without", 6), straight)
    assert_equal_bits(checkpoint(tmp_path / "resumed", 6), straight)
    again, once = (
        evaluation_entries(tmp_path / "resumed"),
        evaluation_entries(tmp_path / "straight"),
    )
    assert list(again)[-2:] == [4, 6]  # an evaluation that a signal interrupts has no result
    assert again.items() <= once.items()
    assert not evaluation_entries(tmp_path / "without")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"evaluate_features": None}, "this run is not evaluated: `features` 'facebook/dinov2"),
        ({"dataset": on_grid(3)}, "could not evaluate the model at update 6: "),
    ],
    ids=["no such features", "too few images"],
)
def test_a_failed_evaluation_is_a_warning_and_the_run_continues(tmp_path, caplog, options, message):
    result = run(tmp_path, **options)
    assert result.num_steps == 6
    assert message in caplog.text
    assert not evaluation_entries(tmp_path)


@pytest.mark.slow
def test_unknown_features_are_refused_before_the_first_update_and_left_out_of_a_resumed_run(
    tmp_path, caplog
):
    with pytest.raises(ConfigError, match=r"`evaluate_features` must be a feature network: .*none"):
        run(tmp_path, evaluate_features="user/none")
    assert not (tmp_path / "checkpoints").exists()
    stop = Images(on_grid(), 4 * 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run(tmp_path, dataset=stop, evaluate_steps=None).num_steps < 6
    assert run(tmp_path, evaluate_features="user/none").num_steps == 6
    assert "this run is not evaluated" in caplog.text


def test_real_images_are_compared_without_augmentation():
    """Without flips and padding, with all 16 bits."""
    images = on_grid(5)
    training = TrainingImages(images, random_flip=True, size_multiple=16)
    selected, _ = hold_out(training, 0.4, seed=0)
    facts = ImageFacts(mode="L", height=8, width=8, bit_depth=16)
    for source, indices in ((training, range(5)), (selected, selected.indices)):
        pixels = as_pixels(source, facts)
        assert pixels.shape == (len(indices), 8, 8, 1)
        got = pixels.read(range(len(indices)))[..., 0] / 65535
        want = as_unit(images[i] for i in indices)[:, 0]
        assert got == pytest.approx(want.numpy(), abs=1 / 65535)
