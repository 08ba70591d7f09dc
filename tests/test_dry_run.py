"""`ddpm-hf train --dry-run`: facts and the plan, and nothing written."""

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import metrics, run

from ddpm_hf import TrainingConfig, train
from ddpm_hf.data import load_images, prepare_images

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """Two classes of grey and coloured images in two sizes, with a copy, a text, a broken file."""
    rng = np.random.default_rng(0)
    for label, shape in (("cat", (10, 8)), ("dog", (8, 8, 3))):
        path = tmp_path / "pets" / label
        path.mkdir(parents=True)
        for index in range(3):
            Image.fromarray(rng.integers(256, size=shape, dtype=np.uint8)).save(
                path / f"{index}.png"
            )
    (tmp_path / "pets" / "dog" / "copy.png").write_bytes((path / "0.png").read_bytes())
    (tmp_path / "pets" / "dog" / "broken.png").write_bytes(b"no image")
    (tmp_path / "pets" / "notes.txt").write_text("notes")
    return tmp_path / "pets"


def all_files(*roots):
    return {path for root in roots for path in Path(root).rglob("*")}


@pytest.mark.filterwarnings("ignore:7 images used")
def test_a_dry_run_prints_facts_and_plan_and_writes_nothing(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder.parent)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    cache.mkdir(parents=True, exist_ok=True)
    before = all_files(folder.parent, cache)
    result = train(
        TrainingConfig(
            dataset=str(folder), class_conditional=True, on_bad_image="skip", dry_run=True,
            max_train_steps=10, batch_size=4, report_to=["swanlab"],
        )
    )  # fmt: skip
    assert all_files(folder.parent, cache) == before
    assert Path(datasets.config.HF_DATASETS_CACHE) == cache
    assert result.num_steps == 0
    assert not result.model_dir.exists()
    printed = capsys.readouterr().out
    for expected in (
        "classes    2: cat (3), dog (4)",
        "parameters",
        "losses in metrics.jsonl (not installed: swanlab)",
        "quality    blurs, enough to test the settings",
        "s per update",
        "data       RGB 4, L 3; 2 sizes, 8x8 to 8x10",
        "data       1 image equal to another one after preparation",
        "7 images used, 2 left out (",
        "broken.png",
        "B per process, with all libraries, for 4 images at once",
        "free; ",
        "nothing was written",
    ):
        assert expected in printed, expected


@pytest.mark.filterwarnings("ignore:7 images used")
def test_a_dry_run_names_the_folder_of_images_that_a_script_prepared(tmp_path, folder, capsys):
    images = prepare_images(
        load_images(folder), image_mode="L", on_bad_image="skip", cache_dir=tmp_path / "cache"
    )
    run(tmp_path / "run", dataset=images, dry_run=True)
    printed = capsys.readouterr().out
    assert f"nothing was written, except for the prepared images in {images.folder}," in printed


def test_a_dry_run_of_an_interrupted_run_shows_how_it_would_resume(tmp_path, capsys):
    run(tmp_path, max_train_steps=4)
    before = {path: path.stat().st_mtime_ns for path in all_files(tmp_path)}
    assert run(tmp_path, max_train_steps=6, dry_run=True).num_steps == 4
    assert {path: path.stat().st_mtime_ns for path in all_files(tmp_path)} == before
    assert "resuming after update 4" in capsys.readouterr().out
    assert len(metrics(tmp_path)) == 4
    assert os.listdir(tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("num_updates", "size", "quality"),
    [
        (199, 8, "blurs, enough to test the settings"),
        (200, 8, "recognisable if the images are alike"),
        (2000, 8, "few errors if the images are alike"),
        (2000, 40, None),  # not measured
    ],
)
def test_the_plan_states_the_expected_quality_of_small_images(
    num_updates, size, quality, tmp_path, capsys
):
    images = torch.rand(4, 1, size, size) * 2 - 1
    run(tmp_path, dataset=[*images], dry_run=True, lr_warmup_steps=0, max_train_steps=num_updates)
    lines = capsys.readouterr().out.splitlines()
    found = [line for line in lines if line.startswith("quality")]
    assert len(found) == (quality is not None)
    assert all(line.startswith(f"quality    {quality}") for line in found)


def test_the_plan_says_when_samples_may_become_copies(tmp_path, capsys):
    images = [*torch.rand(4, 1, 8, 8) * 2 - 1]
    common = {"dataset": images, "dry_run": True, "batch_size": 4, "lr_warmup_steps": 0}
    run(tmp_path / "a", **common, max_train_steps=5)
    assert "copies" not in capsys.readouterr().out
    run(tmp_path / "b", **common, max_train_steps=6)
    note = "note       6 passes over 4 images: samples may become copies of them"
    assert f"{note}; `evaluate_steps` measures it during training\n" in capsys.readouterr().out
