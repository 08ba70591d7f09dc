"""`--post-hoc-ema` of training and `ddpm-hf ema`: exact resume, models of any length, the sweep."""

import json
import shutil

import numpy as np
import pytest
import torch
from checkpoints import SHORT_CHAIN
from image_sets import folder_of
from image_zoo import encode
from safetensors.torch import load_file
from tiny_runs import (
    assert_equal_bits,
    checkpoint,
    resolved,
    run,
    stop_reading_at,
    tiny_config,
    tiny_unet,
)

from ddpm_hf import ConfigError, GaussianDDPMScheduler, load, train
from ddpm_hf.cli import main
from ddpm_hf.evaluation.ema_sweep import EmaSweep
from ddpm_hf.post_hoc_ema.models import PostHocEMA
from ddpm_hf.post_hoc_ema.profiles import gamma_of, solve_weights

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* left out .split"),
    pytest.mark.filterwarnings("ignore:`timestep_spacing`"),
]
NUM_UPDATES, EVERY = 10, 3


def average_run(folder, **overrides):
    options = {"max_train_steps": NUM_UPDATES, "post_hoc_ema_steps": EVERY}
    return run(folder, **options | overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that keeps the weights after every update."""
    folder = tmp_path_factory.mktemp("finished")
    average_run(folder, checkpointing_steps=1, checkpoints_total_limit=NUM_UPDATES)
    return folder


def snapshots(folder):
    """Name and bytes of the snapshot files."""
    return {path.name: path.read_bytes() for path in (folder / "ema_snapshots").iterdir()}


def names(*steps):
    return {f"step-{n:08d}-std-{s}.safetensors" for n in steps for s in ("0.05", "0.1")}


def of_file(tensors, file):
    prefix = f"{file}.safetensors:"
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def test_training_averages_every_update_and_stores_snapshots(finished):
    assert snapshots(finished).keys() == names(3, 6, 9, 10)
    thetas = [of_file(checkpoint(finished, t), "unet") for t in range(1, NUM_UPDATES + 1)]
    for sigma_rel in ("0.05", "0.1"):
        power = gamma_of(float(sigma_rel)) + 1
        kept = of_file(checkpoint(finished, NUM_UPDATES), f"ema-std-{sigma_rel}")
        path = finished / "ema_snapshots" / f"step-{NUM_UPDATES:08d}-std-{sigma_rel}.safetensors"
        stored = load_file(path)
        assert kept.keys() == stored.keys()
        for name, average in kept.items():
            exact = sum(
                ((t / NUM_UPDATES) ** power - ((t - 1) / NUM_UPDATES) ** power)
                * theta[name].double()
                for t, theta in enumerate(thetas, start=1)
            )
            torch.testing.assert_close(average.double(), exact, rtol=1e-5, atol=1e-6)
            assert torch.equal(stored[name], average.half())


def test_a_stopped_and_resumed_run_has_the_same_averages_and_snapshots(finished, tmp_path):
    stopped = average_run(tmp_path, dataset=stop_reading_at(17))
    assert stopped.stopped_by is not None
    assert 0 < stopped.num_steps < NUM_UPDATES
    average_run(tmp_path)
    assert_equal_bits(checkpoint(tmp_path, NUM_UPDATES), checkpoint(finished, NUM_UPDATES))
    assert snapshots(tmp_path) == snapshots(finished)


def test_what_a_killed_run_wrote_after_its_checkpoint_is_written_again(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for step in range(5, NUM_UPDATES + 1):
        shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
    (folder / "ema_snapshots" / "step-00000009-std-0.05.safetensors").write_bytes(b"cut")
    (folder / "ema_snapshots" / ".new-step-00000010-std-0.05.safetensors").touch()
    average_run(folder, checkpointing_steps=1)
    assert snapshots(folder) == snapshots(finished)


def test_another_interval_may_follow_but_averages_start_with_the_run(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    average_run(folder, max_train_steps=12, post_hoc_ema_steps=2)
    assert snapshots(folder).keys() == names(3, 6, 9, 10, 12)
    plain = tmp_path / "plain"
    run(plain, max_train_steps=2)
    assert not (plain / "ema_snapshots").exists()
    with pytest.raises(ConfigError, match="`post_hoc_ema`: False -> True"):
        run(plain, max_train_steps=4, post_hoc_ema=True)


def test_the_plan_and_a_dry_run_state_the_cost(tmp_path, capsys):
    average_run(tmp_path / "run", max_train_steps=4000, post_hoc_ema_steps=100, dry_run=True)
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    parameters = sum(p.numel() for p in tiny_unet().parameters())
    size = f"{40 * 4 * parameters / 1e6:.2g} MB"
    assert f"80 snapshots, 2 every 100 updates, {size} in" in printed
    assert f"snapshots {size})" in printed
    assert "of the time\n" in printed


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Photos, and a finished run on them."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    files = {
        f"{split}/{i:02d}.png": encode(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        for split in ("train", "test")
        for i in range(8)
    }
    photos = folder_of(folder / "photos", files)
    config = tiny_config(folder / "run", dataset=str(photos), max_train_steps=12,
                         post_hoc_ema_steps=2, calibrate=False)  # fmt: skip
    scheduler = GaussianDDPMScheduler(**SHORT_CHAIN)
    train(config, unet=tiny_unet(), scheduler=scheduler)
    return folder


@pytest.fixture
def copy(world, tmp_path, monkeypatch):
    """A copy of the run, next to the photos that its configuration names."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    shutil.copytree(world / "run", tmp_path / "run")
    return tmp_path / "run"


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_model_of_any_length_is_written_next_to_that_of_the_run(copy, capsys):
    before = files_of(copy / "model")
    assert main(["ema", str(copy), "--std", "0.03", "0.1"]) == 0
    printed = capsys.readouterr().out
    assert files_of(copy / "model") == before

    taken = sorted((copy / "ema_snapshots").iterdir())
    times = [int(path.name[5:13]) for path in taken]
    gammas = [gamma_of(float(path.stem.partition("-std-")[2])) for path in taken]
    weights, error = solve_weights(times, gammas, 12, gamma_of(0.03))
    got = load(copy / "ema" / "std-0.03").unet.state_dict()
    for name, value in got.items():
        exact = sum(w * load_file(p)[name].double() for w, p in zip(weights, taken, strict=True))
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)
    stored = load_file(copy / "ema_snapshots" / "step-00000012-std-0.1.safetensors")
    for name, value in load(copy / "ema" / "std-0.1").unet.state_dict().items():
        torch.testing.assert_close(value, stored[name].float(), rtol=1e-5, atol=1e-6)

    record = json.loads((copy / "ema" / "std-0.03" / "training.json").read_text())
    assert record["ema"] == {
        "sigma_rel": 0.03, "steps": 12, "num_snapshots": 12, "profile_error": pytest.approx(error)
    }  # fmt: skip
    assert (record["steps"], record["num_images_seen"]) == (12, 48)
    card = (copy / "ema" / "std-0.03" / "README.md").read_text()
    assert "12 updates with a power-function profile of relative length 0.03, reconstructed" in card
    assert "power-function" not in (copy / "model" / "README.md").read_text()
    assert f"sigma_rel 0.03 at update 12, from 12 snapshots: profile off by {error:.2g}" in printed


def test_the_model_of_the_run_is_replaced_only_when_it_is_named(copy, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    words = ["ema", str(copy), "--std", "0.05", "--output"]
    assert main([*words, str(tmp_path / "mine")]) == 2
    assert "mine is not empty: choose another --output" in capsys.readouterr().err
    for _ in range(2):  # a model of this command is written again
        assert main([*words, str(tmp_path / "new" / "short")]) == 0
    (copy / "model" / "LICENSE").write_text("mine")
    assert main([*words, str(copy / "model")]) == 0
    assert (copy / "model" / "LICENSE").read_text() == "mine"
    a, b = (load(path).unet.state_dict() for path in (copy / "model", tmp_path / "new" / "short"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_damaged_snapshot_is_left_out_and_named(copy, capsys):
    path = copy / "ema_snapshots" / "step-00000012-std-0.05.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    assert main(["ema", str(copy), "--std", "0.05"]) == 0
    printed = capsys.readouterr()
    assert "step-00000012-std-0.05.safetensors is left out" in printed.err
    assert "from 11 snapshots" in printed.out


def sweep(copy, world, *more):
    return main([
        "ema", str(copy), "--sweep", "--std", "0.05", "0.1", "0.2", "--metrics", "fd",
        "bits-per-dim", "--features", "pixels", "--num-images", "8", "--batch-size", "8", *more
    ])  # fmt: skip


def test_a_sweep_measures_all_lengths_and_writes_the_best(copy, world, capsys):
    assert sweep(copy, world) == 0  # the photos are those of config.yaml
    printed = capsys.readouterr().out
    folder = copy / "ema" / "sweep"
    content = json.loads((folder / "ema.json").read_text())
    result = EmaSweep.from_dict(content)
    assert result.to_dict() == content
    assert printed.startswith(str(result))
    assert [row.name for row in result.settings] == ["std-0.05", "std-0.1", "std-0.2", "model"]
    assert all(row.figures.keys() == {"fd", "bits-per-dim"} for row in result.settings)
    averages = {name: facts.sigma_rel for name, facts in result.averages.items()}
    assert averages == {"std-0.05": 0.05, "std-0.1": 0.1, "std-0.2": 0.2}
    by_length = {row.name: row.figures["fd"].value for row in result.settings[:3]}
    assert result.command.startswith(
        "ddpm-hf ema run photos --sweep --std 0.05 0.1 0.2 --metrics fd"
    )
    assert result.best == averages[min(by_length, key=by_length.get)]
    assert {"ema.png", "samples.png"} <= {path.name for path in folder.iterdir()}

    target = copy / "ema" / f"std-{result.best:g}"
    pipeline, _ = PostHocEMA(copy).pipeline(result.best)
    written = load(target).unet.state_dict()
    assert all(torch.equal(w, written[n]) for n, w in pipeline.unet.state_dict().items())
    metrics = json.loads((target / "training.json").read_text())["metrics"]
    (fd,) = (m for m in metrics if m["type"] == "fd")
    assert fd["value"] == by_length[f"std-{result.best:g}"]
    assert not [p for p in (copy / "ema").iterdir() if p.name not in ("sweep", target.name)]

    # An interrupted sweep resumes with the images that it has drawn.
    drawn = {path: path.stat().st_mtime_ns for path in folder.rglob("drawn/*")}
    (folder / "ema.json").unlink()
    (folder / "std-0.2" / "evaluation.json").unlink()
    assert drawn
    assert sweep(copy, world) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("drawn/*")} == drawn
    again = EmaSweep.from_dict(json.loads((folder / "ema.json").read_text()))
    assert [row.figures for row in again.settings] == [row.figures for row in result.settings]


REFUSALS = [
    (["RUN"], "pass --std with the length of the average, or --sweep"),
    (["RUN", "--std", "0.3"], "--std must be in [0.005, 0.288], got 0.3"),
    (["RUN", "--std", "0"], "--std must be in [0.005, 0.288], got 0"),
    (["RUN", "--std", "0.05", "0.1", "--output", "x"], "--output needs a single --std, got 2"),
    (["RUN", "--std", "0.05", "--metrics", "fd"], "--metrics needs --sweep"),
    (["RUN", "--std", "0.05", "--num-images", "8"], "--num-images needs --sweep"),
    (["RUN", "photos", "--std", "0.05"], "DATASET needs --sweep"),
    (["RUN", "--sweep", "--metrics", "fid"], "--metrics must be one of"),
    (["nowhere", "--std", "0.05"], "nowhere is not the folder of a run"),
    (["empty", "--std", "0.05"], "empty has no snapshots in ema_snapshots/: train with"),
    (["new", "--std", "0.05"], "new has no model yet"),
    (["RUN", "--sweep", "--output", "empty/.."], "--output: name an output folder"),
    (["RUN", "--sweep", "--output", "python"], "python is not empty: choose another --output"),
    (["python", "--sweep"], "DATASET is missing"),
    (["broken", "--sweep"], "config.yaml cannot be read"),
    (["moved", "--sweep"], "'./gone' does not exist"),
]


@pytest.fixture(scope="module")
def folders(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("folders")
    (folder / "empty").mkdir()
    shutil.copytree(world / "run", folder / "RUN")
    shutil.copytree(world / "run" / "ema_snapshots", folder / "new" / "ema_snapshots")
    for name, text in (("python", "seed: 0\n"), ("broken", "a: [\n"), ("moved", "dataset: ./gone")):
        shutil.copytree(world / "run", folder / name)
        (folder / name / "config.yaml").write_text(text)
    return folder


def test_a_sweep_samples_with_the_requested_sampler(copy, world):
    sampler = ("--scheduler", "DDIM", "--num-inference-steps", "3")
    assert main(["ema", str(copy), "--sweep", "--std", "0.1", "--features", "pixels",
                 "--num-images", "8", *sampler]) == 0  # fmt: skip
    result = EmaSweep.from_dict(json.loads((copy / "ema" / "sweep" / "ema.json").read_text()))
    assert [row.setting for row in result.settings] == ["std-0.1", "model"]
    for row in result.settings:
        assert (row.scheduler, row.num_inference_steps, row.num_network_calls) == ("DDIM", 3, 3)
    assert "--scheduler DDIM --num-inference-steps 3" in result.command


@pytest.mark.parametrize(("words", "message"), REFUSALS, ids=[r[1][:40] for r in REFUSALS])
def test_bad_input_is_refused_in_one_line(folders, monkeypatch, capsys, words, message):
    monkeypatch.chdir(folders)
    assert main(["ema", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_resolved_options_are_recorded_with_the_run(world):
    assert "post_hoc_ema_steps: 2\n" in (world / "run" / "config.yaml").read_text()
    assert resolved(tiny_config(world, post_hoc_ema=True)).post_hoc_ema_steps == 1
