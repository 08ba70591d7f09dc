"""Training under failures: non-finite gradients, signals, full disks, foreign folders, crashes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import UNet2DModel
from processes import LIMIT_S, started
from safetensors.torch import load_file
from tiny_runs import (
    Images,
    assert_equal_bits,
    checkpoint,
    few_steps,
    metrics,
    run,
    tiny_config,
    tiny_images,
    tiny_unet,
)

from ddpm_hf import train
from ddpm_hf.losses import simple_loss
from ddpm_hf.training import CheckpointError, ConfigError, TrainingError
from ddpm_hf.training.accelerator import create_accelerator
from ddpm_hf.training.run_log import MetricsLog
from ddpm_hf.training.trackers import TrackedRun, Trackers


def overflowing_on_black(denoiser, scheduler, x_0, t, noise):
    """A loss whose gradient is not finite for a black image."""
    loss = simple_loss(denoiser, scheduler, x_0, t, noise)
    return loss * torch.where(x_0.flatten(1).amax(1) == -1, float("inf"), 1.0)


BLACK = torch.full((1, 8, 8), -1.0)


@pytest.mark.slow
def test_a_non_finite_gradient_does_not_change_weights_or_moments(tmp_path):
    # One of four images is black and a batch is one image: every fourth update is skipped.
    config = tiny_config(
        tmp_path,
        batch_size=1,
        max_train_steps=8,
        checkpointing_steps=1,
        checkpoints_total_limit=8,
    )
    images = [BLACK, *tiny_images(3)]
    train(config, unet=tiny_unet(), dataset=images, loss=overflowing_on_black)
    entries = metrics(tmp_path)
    lost = [entry["step"] for entry in entries if entry["skipped_updates"]]
    assert len(lost) == 2
    for step in lost:
        assert entries[step - 1]["loss"] is None
        if step > 1:
            before, after = checkpoint(tmp_path, step - 1), checkpoint(tmp_path, step)
            raw = [name for name in before if not name.startswith("ema")]
            assert_equal_bits({n: before[n] for n in raw}, {n: after[n] for n in raw})
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values()), path


@pytest.mark.slow
def test_a_run_without_finite_gradients_raises_and_saves_no_bad_checkpoint(tmp_path):
    config = tiny_config(tmp_path, max_train_steps=100)
    with pytest.raises(TrainingError, match="learning_rate"):
        train(config, unet=tiny_unet(), dataset=[BLACK] * 3, loss=overflowing_on_black)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values()), path


def test_non_finite_initial_weights_raise(tmp_path):
    unet = tiny_unet()
    unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"conv_out\.bias"):
        run(tmp_path, unet=unet)
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_sampling_saves_the_current_update(tmp_path, number):
    unet = tiny_unet()
    calls = []

    def kill_while_sampling(module, args):
        if not module.training:
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), number)

    unet.register_forward_pre_hook(kill_while_sampling)
    result = run(tmp_path, unet=unet, num_samples=2, sample_steps=3, sample_inference_steps=50)
    assert result.stopped_by == number
    assert len(calls) < 50
    assert checkpoint(tmp_path, result.num_steps)
    assert result.num_steps == 3
    assert not list(tmp_path.glob("samples/*"))


@pytest.mark.slow
def test_two_runs_cannot_share_a_folder(tmp_path):
    def start_another():
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
            run(tmp_path)

    run(tmp_path, dataset=Images(tiny_images(), 6, start_another))


def test_an_uncreatable_output_folder_raises_before_images_are_read(tmp_path):
    (tmp_path / "file").write_text("in the way")
    images = Images(tiny_images(), None, None)
    with pytest.raises(CheckpointError, match="file/run"):
        run(tmp_path / "file" / "run", dataset=images)
    assert images.reads == 0


@pytest.mark.slow
@few_steps
def test_no_file_of_a_run_is_a_pickle(tmp_path):
    run(tmp_path, num_samples=2, sample_steps=3, sample_inference_steps=2)
    starts = {path: path.read_bytes()[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert len(starts) > 10
    assert not [path for path, start in starts.items() if start in (b"PK", b"\x80\x02")]


@pytest.mark.slow
def test_old_checkpoints_are_pruned_and_other_folders_kept(tmp_path):
    (tmp_path / "checkpoints" / "step-mine").mkdir(parents=True)
    run(tmp_path, checkpointing_steps=1, checkpoints_total_limit=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005", "step-00000006", "step-mine"]


def test_a_folder_with_a_foreign_model_is_not_overwritten(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.py").write_text("x = 1")
    with pytest.raises(CheckpointError, match="contains model, which no training run"):
        run(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "mine.py"]


@pytest.mark.slow
def test_a_trained_model_without_checkpoints_is_not_replaced_by_a_new_run(tmp_path):
    result = run(tmp_path, max_train_steps=2)
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"has a trained model.*`pretrained`"):
        run(tmp_path, max_train_steps=4)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    result.model_dir.rename(tmp_path / "old")
    assert run(tmp_path, max_train_steps=2).num_steps == 2


@pytest.mark.slow
def test_user_files_in_a_run_folder_are_kept(tmp_path):
    run(tmp_path, max_train_steps=2)
    (tmp_path / "model" / "LICENSE").write_text("MIT")
    for name in (".new-idea", ".old-photos"):
        (tmp_path / name).mkdir()
    (tmp_path / ".new-note.txt").write_text("x")
    run(tmp_path, max_train_steps=4)
    assert (tmp_path / "model" / "LICENSE").read_text() == "MIT"
    assert all((tmp_path / n).exists() for n in (".new-idea", ".old-photos", ".new-note.txt"))


def test_a_run_that_fails_to_start_creates_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="channels"):
        run(tmp_path / "new", dataset=[torch.zeros(7, 8, 8)])
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_temporarily_full_disk_skips_only_the_writes_due_then(tmp_path, caplog):
    """From update 2 to 4 files are limited to 2 kB, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    class Disk(Images):
        def __getitem__(self, index):
            if self.reads in (5, 17):  # before the second and the fifth update
                limit(2000 if self.reads == 5 else limits[0])
            return super().__getitem__(index)

    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        result = run(tmp_path, dataset=Disk(tiny_images(), None, None), logging_steps=2)
    finally:
        limit(limits[0])
        signal.signal(signal.SIGXFSZ, before)
    assert "could not save at update 2" in caplog.text
    assert "could not export the model at update 2" in caplog.text
    assert result.num_steps == 6
    straight = run(tmp_path / "straight")
    assert_equal_bits(checkpoint(tmp_path, 6), checkpoint(tmp_path / "straight", 6))
    assert straight.model_dir.exists()


@pytest.mark.slow
@few_steps
def test_an_entry_that_a_full_disk_cuts_off_is_removed(tmp_path):
    file, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    tracked = TrackedRun(tmp_path, tmp_path / "tracking.json", "project", None, {})
    with create_accelerator(tiny_config(tmp_path)) as accelerator:
        log = MetricsLog(file, accelerator, 0, 4, Trackers([], tracked))
    log.append({"step": 1, "loss": 0.5})
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 10, limits[1]))
        with pytest.raises(OSError, match="large"):
            log.append({"step": 2, "loss": 0.25})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    log.append({"step": 3, "loss": 0.125})
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 3]


def test_resuming_exports_a_missing_model(tmp_path):
    options = {"num_samples": 1, "sample_inference_steps": 2, "max_train_steps": 2}
    result = run(tmp_path, **options)
    shutil.rmtree(result.model_dir)
    shutil.rmtree(tmp_path / "samples")
    before = checkpoint(tmp_path, 2)
    run(tmp_path, **options)
    assert json.loads((result.model_dir / "training.json").read_text())["steps"] == 2
    assert (result.model_dir / "samples.png").exists()
    assert_equal_bits(before, checkpoint(tmp_path, 2))


@pytest.mark.slow
def test_a_checkpoint_before_the_first_log_entry_exports_a_model(tmp_path, caplog):
    seen = []
    images = Images(tiny_images(), 14, lambda: seen.append((tmp_path / "model").exists()))
    run(tmp_path, dataset=images, checkpointing_steps=1, logging_steps=5)
    assert seen == [True]
    assert "could not" not in caplog.text


class FailsToSample(UNet2DModel):
    num_calls = 0

    def forward(self, *args, **options):
        self.num_calls += not self.training
        if not self.training and self.num_calls > 1:  # the first call is a check
            raise torch.OutOfMemoryError("no room")
        return super().forward(*args, **options)


@pytest.mark.slow
def test_a_failed_sample_grid_does_not_stop_the_run(tmp_path, caplog):
    unet = FailsToSample(**{k: v for k, v in tiny_unet().config.items() if k[0] != "_"})
    result = run(tmp_path, unet=unet, num_samples=1, sample_steps=3, checkpointing_steps=3)
    assert "could not draw samples at update 3: no room" in caplog.text
    assert result.num_steps == 6
    assert load_file(result.model_dir / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.mark.slow
def test_out_of_memory_suggests_gradient_accumulation(tmp_path):
    images = Images(tiny_images(), 10, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(TrainingError, match="`gradient_accumulation_steps` 2"):
        run(tmp_path, dataset=images)


def test_a_failed_compilation_suggests_to_turn_it_off(tmp_path):
    unet = tiny_unet()

    def fail(module, args):
        if module.training:  # the first call is a check
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a page of frames")

    unet.register_forward_pre_hook(fail)
    with pytest.raises(TrainingError, match="compiled: no compiler; train it without `compile`"):
        run(tmp_path, unet=unet)


@pytest.mark.slow
def test_a_failing_tracker_is_disabled_with_a_warning(tmp_path, caplog, monkeypatch):
    (tmp_path / "logs").write_text("in the way of TensorBoard's folder")
    assert run(tmp_path).num_steps == 6
    assert "the tracker tensorboard failed" in caplog.text
    assert len(metrics(tmp_path)) == 6


@pytest.mark.slow
def test_a_run_waits_for_the_lock_held_by_workers_of_a_killed_run(tmp_path):
    """Workers inherit the lock and notice the death of their parent only after seconds."""
    with started([sys.executable, "-c", ""]) as dead:
        dead.wait(LIMIT_S)
    (tmp_path / ".lock").write_text(str(dead.pid))
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True)"
    command = [sys.executable, "-c", f"{hold}; time.sleep(1)", str(tmp_path / ".lock")]
    with started(command, stdout=subprocess.PIPE) as worker:
        worker.stdout.readline()
        assert run(tmp_path, max_train_steps=2).num_steps == 2
        assert worker.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_leftovers_of_a_crash_are_removed_and_the_model_is_restored(tmp_path):
    run(tmp_path, max_train_steps=4)
    # One crash between the two renames of the model, and one while writing a checkpoint.
    os.rename(tmp_path / "model", tmp_path / ".old-model")
    (tmp_path / "checkpoints" / ".new-step-00000006").mkdir()
    run(tmp_path, max_train_steps=4)
    assert (tmp_path / "model" / "model_index.json").is_file()
    hidden = [path.name for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert not hidden
    shutil.rmtree(tmp_path)
