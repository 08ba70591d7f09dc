"""Resuming a run: damaged checkpoints, compiled networks, skipped updates, moved files."""

import hashlib
import json
import logging
import re
import shutil
import signal

import pytest
import yaml
from PIL import Image
from tiny_runs import (
    assert_equal_bits,
    checkpoint,
    metrics,
    run,
    stop_reading_at,
    tiny_config,
    tiny_images,
    tiny_unet,
)

from ddpm_hf import (
    ConfigError,
    GaussianDDPMPipeline,
    GaussianDDPMScheduler,
    TrainingConfig,
    calibrate_checkpoint,
    load,
    train,
)
from ddpm_hf.cli import main
from ddpm_hf.evaluation.subjects import is_model
from ddpm_hf.training import CheckpointError, parse_config
from ddpm_hf.training.checkpoint_record import find_checkpoint

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    run(folder)
    return folder


NESTED = "[" * 100_000
FILES = ["null", "[]", "{}", "7", *(
    json.dumps({"state.json": entry})
    for entry in (None, [], {"bytes": "x"}, {"bytes": 1, "sha256": None})
)]  # fmt: skip
MANIFESTS = [
    "", "null", "[]", "3", '"files"', "{}", NESTED, '{"a": ' + NESTED, "\udcff",
    *(f'{{"format_version": 1, "files": {files}}}' for files in FILES),
    *(f'{{"format_version": {version}, "files": {{}}}}' for version in ("null", "[]", "2")),
]  # fmt: skip
WRONG = {
    "step": "6", "ema_step": None, "scaler": [], "elapsed_s": {}, "config": 1, "parts": {"a": 0},
    "num_threads": "2", "num_processes": [], "num_threads_changes": [{"step": 1}],
}  # fmt: skip
STATES = ["", "null", "[]", "{}", NESTED, *(json.dumps({key: WRONG[key]}) for key in WRONG)]


@pytest.mark.parametrize("text", MANIFESTS, ids=lambda text: text[:40])
def test_a_checkpoint_with_a_malformed_manifest_is_skipped(finished, tmp_path, text):
    folder = copy_of(finished, tmp_path)
    (folder / "step-00000006" / "manifest.json").write_text(text, errors="surrogateescape")
    assert find_checkpoint(folder) == folder / "step-00000004"


@pytest.mark.parametrize("text", STATES, ids=lambda text: text[:40])
def test_a_checkpoint_with_a_malformed_record_is_skipped_even_if_the_checksum_matches(
    finished, tmp_path, text
):
    folder = copy_of(finished, tmp_path)
    newest = folder / "step-00000006"
    if text.startswith('{"'):  # one wrong value among valid ones
        text = json.dumps(json.loads((newest / "state.json").read_text()) | json.loads(text))
    (newest / "state.json").write_text(text)
    manifest = json.loads((newest / "manifest.json").read_text())
    data = text.encode()
    manifest["files"]["state.json"] = {
        "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()
    }  # fmt: skip
    (newest / "manifest.json").write_text(json.dumps(manifest))
    assert find_checkpoint(folder) == folder / "step-00000004"


def copy_of(finished, folder):
    shutil.copytree(finished, folder, dirs_exist_ok=True)
    return folder / "checkpoints"


def test_a_run_resumes_before_a_damaged_checkpoint_and_the_warning_names_the_file(
    finished, tmp_path, caplog
):
    newest = copy_of(finished, tmp_path) / "step-00000006"
    (newest / "manifest.json").write_text("null")
    with caplog.at_level(logging.WARNING):
        run(tmp_path)
    assert "step-00000006/manifest.json must hold a JSON object" in caplog.text
    assert_equal_bits(checkpoint(tmp_path, 6), checkpoint(finished, 6))


def test_a_file_named_like_a_checkpoint_is_ignored(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for step in (4, 8):
        (tmp_path / "checkpoints" / f"step-{step:08d}").write_text("a note")
    assert run(tmp_path).num_steps == 6
    assert checkpoint(tmp_path, 4)
    assert (tmp_path / "checkpoints" / "step-00000008").read_text() == "a note"


def test_a_run_with_only_damaged_checkpoints_is_refused(finished, tmp_path):
    for manifest in copy_of(finished, tmp_path).glob("*/manifest.json"):
        manifest.write_text("null")
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        run(tmp_path)


def test_a_compiled_run_resumes_uncompiled_and_back(finished, tmp_path, monkeypatch):
    for backend, steps in (("EAGER", 2), ("NO", 4), ("EAGER", 6)):
        monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", backend)
        run(tmp_path, max_train_steps=steps, lr_scheduler="constant")
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert checkpoint(tmp_path, 6).keys() == checkpoint(finished, 6).keys()
    run(tmp_path / "straight", lr_scheduler="constant")
    # The eager backend runs the same kernels.
    assert_equal_bits(checkpoint(tmp_path, 6), checkpoint(tmp_path / "straight", 6))


def test_a_skipped_update_is_logged_with_its_images_and_timesteps(tmp_path):
    unet, calls = tiny_unet(), []

    def spoil(module, args, output):
        calls.extend([1] if module.training else [])
        if len(calls) == 3 and module.training:
            output.sample.data[0, 0, 0, 0] = float("nan")

    unet.register_forward_hook(spoil)
    run(tmp_path, unet=unet, logging_steps=2)
    entries = metrics(tmp_path)
    assert [entry["skipped_updates"] for entry in entries] == [0, 1, 0]
    (skipped,) = entries[1]["skipped"]
    assert skipped["step"] == 3
    assert len(skipped["rows"]) == len(skipped["timesteps"]) == 4
    assert set(skipped["rows"]) <= set(range(len(tiny_images())))
    assert "skipped" not in entries[0] | entries[2]


def test_a_run_that_fails_at_its_start_removes_the_folders_it_created(tmp_path):
    with pytest.raises(ValueError, match="channels"):
        run(tmp_path / "runs" / "deep" / "photos", unet=tiny_unet(in_channels=2))
    assert list(tmp_path.iterdir()) == []


def train_in(folder, network_file, **options):
    """A run on a folder of images with the network of a file."""
    return train(
        tiny_config(
            folder / "run", unet_config=str(network_file), dataset=str(folder / "photos"), **options
        )
    )


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images that get a proposed resolution, and the file of a network."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    (tmp_path / "photos").mkdir()
    for i in range(6):
        Image.new("L", (9 + i, 9), 40 * i).save(tmp_path / "photos" / f"{i}.png")
    tiny_unet(sample_size=8).save_config(tmp_path / "network")
    return tmp_path


STEPS = {"num_train_timesteps": 20, "lr_scheduler": "constant"}
PROPOSALS = {
    "resolution": 8, "image_mode": "L", "bit_depth": 8, "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction", "variance_type": "fixed_small",
}  # fmt: skip


def test_a_proposal_may_be_given_when_a_run_is_resumed_and_nothing_else(photos):
    network = photos / "network" / "config.json"
    train_in(photos, network, max_train_steps=2, **STEPS)
    assert train_in(photos, network, max_train_steps=3, **STEPS, **PROPOSALS).num_steps == 3
    with pytest.raises(ConfigError) as raised:
        train_in(photos, network, max_train_steps=4, **STEPS, resolution=16, bit_depth=16)
    assert "(`resolution`: 8 -> 16; `bit_depth`: 8 -> 16)" in str(raised.value)
    assert re.search(r"add `output_dir` \S+run-2 for a new network, and also", str(raised.value))


def test_config_yaml_lists_every_option_and_repeats_the_run(photos):
    network = photos / "network" / "config.json"
    result = train_in(photos, network, max_train_steps=2, num_train_timesteps=20)
    recipe = photos / "run" / "config.yaml"
    values = yaml.safe_load(recipe.read_text())
    assert values.keys() == vars(TrainingConfig()).keys() - {"dry_run"}
    assert {name: values[name] for name in PROPOSALS} == PROPOSALS
    again = parse_config(["--config", str(recipe), "--output-dir", str(photos / "again")])
    train(again)
    assert_equal_bits(checkpoint(photos / "again", 2), checkpoint(photos / "run", 2))
    assert result.num_steps == 2


def test_a_moved_run_resumes_without_the_file_of_its_network(photos):
    network = photos / "network" / "config.json"
    train_in(photos, network, max_train_steps=2, **STEPS)
    moved = network.rename(photos / "moved.json")
    assert train_in(photos, moved, max_train_steps=3, **STEPS).num_steps == 3
    moved.unlink()
    assert train_in(photos, moved, max_train_steps=4, **STEPS).num_steps == 4
    tiny_unet(sample_size=8, layers_per_block=2).save_config(photos / "network")
    network.rename(moved)
    with pytest.raises(ConfigError, match=r"network layers_per_block: 1 -> 2"):
        train_in(photos, moved, max_train_steps=5, **STEPS)


@pytest.mark.parametrize("options", [{}, {"class_conditional": True}])
def test_pretrained_weights_are_compared_by_content_and_may_be_gone(photos, options):
    def fine_tune(base, steps):
        return train(
            tiny_config(
                photos / "run", dataset=str(photos / "photos"), pretrained=str(base),
                max_train_steps=steps, lr_scheduler="constant", **options,
            )
        )  # fmt: skip

    for path in sorted((photos / "photos").glob("?.png")) if options else ():
        path.with_suffix("").mkdir()
        path.rename(path.with_suffix("") / path.name)
    scheduler = GaussianDDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    for name in ("base", "other"):
        unet = tiny_unet()
        if name == "other":
            unet.conv_out.bias.data += 1
        GaussianDDPMPipeline(unet, scheduler).save_pretrained(photos / name)
    base = photos / "base"
    fine_tune(base, 2)
    with pytest.raises(ConfigError, match="pretrained weights"):
        fine_tune(photos / "other", 3)
    moved = base.rename(photos / "moved")
    assert fine_tune(moved, 3).num_steps == 3
    with pytest.raises(ConfigError, match="cannot be loaded"):
        fine_tune(base, 4)
    shutil.rmtree(moved)
    assert fine_tune(moved, 4).num_steps == 4
    record = json.loads((photos / "run" / "model" / "training.json").read_text())
    assert record["base_model"] == "moved"


def test_a_run_from_scratch_does_not_resume_with_pretrained_weights(photos):
    train_in(photos, photos / "network" / "config.json", max_train_steps=2, **STEPS)
    with pytest.raises(ConfigError, match="`pretrained`: None -> 'base'"):
        train(tiny_config(photos / "run", dataset=str(photos / "photos"), pretrained="base"))


@pytest.mark.filterwarnings("default:.* is a training run")
def test_a_run_and_its_checkpoints_are_models(photos):
    train_in(photos, photos / "network" / "config.json", max_train_steps=4, **STEPS)
    folder = photos / "run"
    early = folder / "checkpoints" / "step-00000002"
    weights = {
        name.removeprefix("ema.safetensors:"): value
        for name, value in checkpoint(folder, 2).items()
        if name.startswith("ema")
    }
    assert_equal_bits(dict(load(early).unet.state_dict()), weights)
    final = dict(load(folder / "model").unet.state_dict())
    with pytest.warns(UserWarning, match=r"run is a training run: its model is \S+run/model"):
        assert_equal_bits(dict(load(folder).unet.state_dict()), final)
    assert is_model(folder)
    assert is_model(early)
    with pytest.raises(ValueError, match=r"no model_index.json; did you mean \S+run/model\?"):
        load(folder / "checkpoints")
    before = sorted(early.iterdir())
    with pytest.raises(ValueError, match="is a training checkpoint, which must not be changed"):
        calibrate_checkpoint(early, str(photos / "photos"))
    few = ["--num-images", "1", "--num-inference-steps", "2"]
    for i, words in enumerate(([folder], [early], [folder, "--guide", str(early)])):
        output = ["--output", str(photos / f"{i}.npz")]
        assert main(["sample", *map(str, words), *few, *output]) == 0
    tuned = tiny_config(
        photos / "tuned", dataset=str(photos / "photos"), pretrained=str(early),
        max_train_steps=1, lr_warmup_steps=1,
    )  # fmt: skip
    result = train(tuned)  # the first update has learning rate 0
    assert_equal_bits(dict(load(result.model_dir).unet.state_dict()), weights)
    assert sorted(early.iterdir()) == before
    shutil.rmtree(folder / "model")
    with pytest.raises(ValueError, match=r"run/model, but that folder is missing"):
        load(early)


def test_an_interrupt_in_an_interactive_session_is_raised_after_saving(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.ps1", ">>> ", raising=False)
    with pytest.raises(KeyboardInterrupt, match="saved after update"):
        run(tmp_path, dataset=stop_reading_at(9, signal.SIGINT))
    assert run(tmp_path).num_steps == 6
