"""Frechet distance and share of copies of samples during training."""

import json
import os
import signal
from dataclasses import replace

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

from ddpm_hf import ConfigError, TrainingConfig, load, train
from ddpm_hf.data import ImageFacts, TrainingImages
from ddpm_hf.evaluation.metrics import measure
from ddpm_hf.run_record import SampleSetup
from ddpm_hf.sampling import draw_images
from ddpm_hf.training.dataset_setup import hold_out
from ddpm_hf.training.periodic_evaluation import PeriodicEvaluation, as_pixels
from ddpm_hf.training.resolve import resume_options
from ddpm_hf.training.sample_figures import SampleFigure, SampleFigures

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
@pytest.mark.parametrize("share", [None, "0.15", "0.4"])
def test_distance_copies_and_their_floors_equal_those_of_evaluate(tmp_path, capsys, share):
    result = run(tmp_path, validation_split=share)
    entries = evaluation_entries(tmp_path)
    assert list(entries) == [2, 4, 6]
    floor = "held-out images" if share == "0.4" else "halves of the training images"
    assert f"training images, with the floor of {floor}, features pixels" in capsys.readouterr().out
    real, held_out = by_pixels(as_unit(on_grid())), None
    if share:
        halves = hold_out(TrainingImages(on_grid()), float(share), seed=0)
        real, held_out = (real[part.indices] for part in halves)
        held_out = held_out if len(held_out) >= 4 else None
    drawn = np.stack(draw_images(load(result.model_dir), 6, batch_size=4, num_inference_steps=3,
                                 eta=0.0, progress=False))  # fmt: skip
    drawn = by_pixels(torch.from_numpy(drawn).permute(0, 3, 1, 2))
    want = {}
    for name, metric in (("fd", "fd"), ("copies", "memorisation")):
        (figure,) = measure(metric, real, drawn, held_out)
        want |= {
            f"evaluation_{name}": figure.value,
            f"evaluation_{name}_standard_error": figure.standard_error,
            f"evaluation_{name}_half": figure.floor.drawn,
            f"evaluation_{name}_half_real": figure.floor.real,
        }
    assert entries[6] == pytest.approx(want, rel=1e-5)  # the features are float32
    facts = json.loads((result.model_dir / "training.json").read_text())
    shown = {record["type"]: record["value"] for record in facts["metrics"]}
    for name in ("fd", "copies"):
        assert shown[name] == entries[6][f"evaluation_{name}"]
    card = (result.model_dir / "README.md").read_text()
    assert "share of copies (pixels, during training)" in card


def test_an_evaluation_with_too_few_training_images_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="`evaluate_steps` needs at least 4 training images, got"):
        run(tmp_path / "run", dataset=on_grid()[:3])
    assert not (tmp_path / "run").exists()


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
def test_the_run_continues_with_a_warning_if_the_default_features_do_not_load(tmp_path, caplog):
    assert run(tmp_path, evaluate_features=None).num_steps == 6
    assert "this run is not evaluated: `features` 'facebook/dinov2" in caplog.text
    assert not evaluation_entries(tmp_path)


@pytest.mark.slow
def test_a_failed_evaluation_is_a_warning_and_the_run_continues(tmp_path, caplog, monkeypatch):
    def fail(_):
        raise MemoryError("no memory for the samples")

    monkeypatch.setattr(PeriodicEvaluation, "_sample_features", fail)
    assert run(tmp_path).num_steps == 6
    assert "could not evaluate the model at update 6: no memory for the samples" in caplog.text
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


@pytest.mark.slow
def test_copies_are_reported_once_and_are_not_kept_as_the_best_model(tmp_path, caplog, monkeypatch):
    """The samples of updates 2, 4 and 6: random images, other ones, then the training images."""
    generator = torch.Generator().manual_seed(2)
    noise = [torch.rand(12, 192, generator=generator) * scale for scale in (1.0, 0.9)]
    copies = by_pixels(as_unit(on_grid()))[:12] + 1e-4
    samples = iter([*noise, copies, copies])
    monkeypatch.setattr(PeriodicEvaluation, "_sample_features", lambda self: next(samples))
    options = {"evaluate_num_images": 12, "max_train_steps": 8, "best_metric": "fd"}
    run(tmp_path, **options)
    entries = evaluation_entries(tmp_path)
    distances = {step: entry["evaluation_fd"] for step, entry in entries.items()}
    assert min(distances, key=distances.get) in (6, 8)
    assert [entry["evaluation_copies"] for entry in entries.values()] == [0, 0, 1, 1]
    best = min((2, 4), key=distances.get)
    facts = json.loads((tmp_path / "best" / "training.json").read_text())
    assert (facts["steps"], facts["kept_by"]) == (best, "fd")
    assert facts["metrics"][0]["value"] == distances[best]
    card = (tmp_path / "best" / "README.md").read_text()
    assert "| kept for | the lowest Frechet distance in the run, among models" in card
    (warning,) = (text for text in caplog.messages if "copies" in text)
    assert warning.startswith("update 6: 100% of 12 samples are copies of training images (")
    assert f"best/ has the model of update {best}; stop here, add training images, or" in warning
    assert "with `random_flip` and dropout in `unet_config`" in warning


def figures(value, count, real):
    setup = SampleSetup(num_images=count, num_inference_steps=10, features="pixels")
    copies = SampleFigure(value, 0.1, value / 2, real)
    return SampleFigures(SampleFigure(8.0, 0.5, 9.0, 3.0), copies, setup)


@pytest.mark.parametrize(
    ("value", "count", "real", "are_copies"),
    [
        (0.01, 256, 0.01, False),
        (0.04, 10_000, 0.0, False),  # as many as chance may give
        (0.12, 25, 0.01, False),  # 3 of 25
        (0.12, 256, 0.01, True),
        (0.3, 256, 0.25, False),  # real images repeat training images, too
        (0.6, 256, 0.25, True),
        (1.0, 4, 0.25, True),
    ],
)
def test_samples_are_copies_beyond_the_floor_and_chance(value, count, real, are_copies):
    assert figures(value, count, real).are_copies is are_copies


def test_figures_are_read_from_the_log_as_they_were_measured():
    measured = figures(0.3, 256, 0.01)
    assert SampleFigures.logged(measured.log_values(), measured.setup) == measured
    lacking = {key: value for key, value in measured.log_values().items() if "half" not in key}
    assert SampleFigures.logged(lacking, measured.setup) is None
    assert SampleFigures.logged({}, measured.setup) is None


def test_the_figure_of_the_best_model_follows_what_is_measured():
    def kept_by(**options):
        return TrainingConfig(dataset="x", **options).kept_by

    both = {"validation_split": "0.1", "evaluate_steps": 5}
    assert kept_by(**both) is None
    assert kept_by(**both, keep_best=True) == "bits-per-dim"
    assert kept_by(evaluate_steps=5, keep_best=True) == "fd"
    assert kept_by(**both, best_metric="fd") == "fd"
    before = TrainingConfig(dataset="x", **both, best_metric="fd")
    again = TrainingConfig(dataset="x", **both, best_metric="bits-per-dim")
    assert resume_options(again, vars(before)).kept_by == "bits-per-dim"
    assert resume_options(replace(before, best_metric=None), vars(before)).kept_by == "fd"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep_best": True}, "`keep_best` needs `validation_split`, for bits/dim, or"),
        (
            {"best_metric": "fd", "validation_split": "0.1"},
            "`best_metric` fd needs `evaluate_steps`",
        ),
        (
            {"best_metric": "bits-per-dim", "evaluate_steps": 5},
            "`best_metric` bits-per-dim needs `validation_split`",
        ),
        ({"best_metric": "kid"}, "`best_metric` must be one of"),
    ],
)
def test_a_best_model_without_figures_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(dataset="x", **options)
