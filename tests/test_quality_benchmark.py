"""The benchmark of quality for equal time runs, continues and gives each setting its time."""

import importlib
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_hf.data import ImageFacts

pytestmark = pytest.mark.slow

SECONDS = 0.2


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    return importlib.import_module("bench_quality")


def write_images(folder):
    """20 training and 8 held-out images, half transparent, one in grey."""
    pixels = np.random.default_rng(0).integers(0, 256, (28, 16, 16, 4), np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    images[0] = images[0].convert("LA")
    for split, chosen in (("train", images[:20]), ("test", images[20:])):
        features = datasets.Features({"image": datasets.Image()})
        data = datasets.Dataset.from_dict({"image": chosen}, features)
        data.to_parquet(folder / f"{split}.parquet")


def test_settings_train_for_equal_time_and_a_repeated_command_trains_only_new_ones(
    tmp_path, bench, monkeypatch, capsys
):
    folder, file = tmp_path / "images", tmp_path / "results.json"
    folder.mkdir()
    write_images(folder)
    arguments = [
        *("bench_quality", str(folder), "--size", "8", "--json", str(file), "--turns", "1"),
        *("--seconds", str(SECONDS), "--num-images", "8", "--steps", "2", "--features", "pixels"),
    ]
    monkeypatch.setattr(sys, "argv", [*arguments, "--arms", "stock", "ours"])
    bench.main()
    first = json.loads(file.read_text())
    trained = []
    train = bench.train_and_measure
    monkeypatch.setattr(
        bench, "train_and_measure", lambda name, *rest: trained.append(name) or train(name, *rest)
    )
    monkeypatch.setattr(sys, "argv", [*arguments, "--arms", "stock", "ours", "x_0"])
    bench.main()
    results = json.loads(file.read_text())
    assert trained == ["x_0"]
    assert {key: results["runs"][key] for key in first["runs"]} == first["runs"]
    for name in ("stock", "ours", "x_0"):
        half, end = results["runs"][f"{name}, seed 0"]
        update_s = results["costs"]["reference_s"] * results["costs"][name]
        assert half["updates"] * 2 == end["updates"]
        assert end["updates"] == max(2, 2 * round(SECONDS / update_s / 2))
        assert np.isfinite([end["fd"], end["bits_per_dim"]]).all()
        with Image.open(
            file.with_suffix("") / f"{name}, seed 0, {end['updates']} updates.png"
        ) as row:
            assert row.width > 5 * row.height
    with Image.open(file.with_suffix("") / "samples.png") as rows:
        assert rows.height > row.height * 3
    assert "| x_0 |" in capsys.readouterr().out
    assert file.with_suffix(".png").is_file()


def test_results_of_other_settings_are_not_continued(tmp_path, bench, monkeypatch):
    file = tmp_path / "results.json"
    file.write_text(json.dumps({"settings": {"seconds": 1}}))
    monkeypatch.setattr(sys, "argv", ["bench_quality", "--json", str(file)])
    with pytest.raises(SystemExit, match="other settings"):
        bench.earlier_results(bench.parse())


def test_every_setting_has_a_network_for_the_images(bench):
    settings = {arm.network: arm for arm in bench.ARMS.values()}
    assert len(settings) > 5
    facts, images = ImageFacts("RGB", 32, 32), torch.zeros(1, 3, 32, 32, device="meta")
    with torch.device("meta"):
        unets = {change: arm.build_unet(facts, 0) for change, arm in settings.items()}
        for change, unet in unets.items():
            assert unet(images, torch.zeros(1)).sample.shape == images.shape, change
    stock = unets[bench.ARMS["stock, own network"].network]
    assert round(sum(p.numel() for p in stock.parameters()) / 1e6) == 114
