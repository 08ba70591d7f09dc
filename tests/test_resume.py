"""Resuming a run: damaged checkpoints, compiled networks, skipped updates."""

import hashlib
import json
import logging
import shutil

import pytest
from tiny_runs import assert_equal_bits, checkpoint, metrics, run, tiny_images, tiny_unet

from ddpm_hf.training import CheckpointError
from ddpm_hf.training.state import find_checkpoint


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


@pytest.mark.slow
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
