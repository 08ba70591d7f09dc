"""Options for speed and memory: what they change, and that a resumed run is bit-equal."""

import importlib
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DModel
from tiny_runs import assert_equal_bits, checkpoint, metrics, run, stop_reading_at, tiny_unet

from ddpm_hf import TrainingError
from ddpm_hf.training import ConfigError, parse_config, warm_up
from ddpm_hf.utils.backend_settings import use_num_threads

pytestmark = pytest.mark.slow

MEASURED = 101  # updates; a shorter run on a CPU makes no trials


def test_gradient_checkpointing_recomputes_activations_and_may_change_on_resume(tmp_path):
    calls, options = {}, {"lr_scheduler": "constant"}
    for folder, on, steps in (("plain", False, 6), ("other", True, 3), ("other", False, 6)):
        unet, seen = tiny_unet(), []
        unet.down_blocks[0].register_forward_pre_hook(lambda *_, seen=seen: seen.append("block"))
        resnet = unet.down_blocks[0].resnets[0]
        resnet.register_forward_pre_hook(lambda *_, seen=seen: seen.append("resnet"))
        run(
            tmp_path / folder,
            unet=unet,
            **options,
            max_train_steps=steps,
            gradient_checkpointing=on,
        )
        calls[folder, on] = seen.count("resnet") - seen.count("block")
    assert calls == {("plain", False): 0, ("other", True): 3, ("other", False): 0}
    assert_equal_bits(checkpoint(tmp_path / "plain", 6), checkpoint(tmp_path / "other", 6))


def test_a_resumed_bf16_run_equals_an_uninterrupted_one(tmp_path):
    options = {"lr_scheduler": "constant", "mixed_precision": "bf16"}
    run(tmp_path / "straight", **options)
    run(tmp_path / "resumed", **options, max_train_steps=3)
    run(tmp_path / "resumed", **options)
    assert_equal_bits(checkpoint(tmp_path / "straight", 6), checkpoint(tmp_path / "resumed", 6))


@torch._dynamo.config.patch(disable=True)  # compiling takes a minute
def test_a_compiled_run_stays_compiled_on_resume(tmp_path, capsys):
    run(tmp_path, max_train_steps=2, lr_scheduler="constant", compile=True)
    run(tmp_path, lr_scheduler="constant")
    assert capsys.readouterr().out.count(", compiled") == 2
    with pytest.raises(ConfigError, match="`compile`: True -> False"):
        run(tmp_path, lr_scheduler="constant", compile=False)


class WrongWhenCompiled(UNet2DModel):
    """When compiled, only the last layer gets a gradient."""

    def forward(self, sample, *args, **options):
        if torch.compiler.is_compiling():
            sample = self.conv_in(sample).detach()
            return type("Output", (), {"sample": self.conv_out(sample)})
        return super().forward(sample, *args, **options)


def test_a_network_with_wrong_compiled_gradients_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    unet = WrongWhenCompiled(**{k: v for k, v in tiny_unet().config.items() if k[0] != "_"})
    with pytest.raises(TrainingError, match=r"off by \d+%; train it without `compile`"):
        run(tmp_path, unet=unet)
    assert not (tmp_path / "model").exists()


@torch._dynamo.config.patch(disable=True)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_compiled_gradients_are_not_checked_with_dropout_and_this_is_reported(
    tmp_path, capsys, dropout
):
    run(tmp_path, unet=tiny_unet(dropout=dropout), max_train_steps=2, compile=True)
    assert ("gradients are not checked" in capsys.readouterr().out) == (dropout > 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], None), (["--compile"], True), (["--no-compile"], False), (["--compile", "no"], False)],
    ids=str,
)
def test_compile_can_be_turned_off(flags, expected):
    assert parse_config([*flags, "photos"]).compile is expected


class LimitedMemory(UNet2DModel):
    """Runs out of memory with more than `max_images` images."""

    max_images = 1

    def forward(self, sample, *args, **options):
        if len(sample) > self.max_images:
            raise torch.OutOfMemoryError("no room")
        return super().forward(sample, *args, **options)


@pytest.fixture
def large_unet():
    torch.manual_seed(0)
    return LimitedMemory(**{k: v for k, v in tiny_unet().config.items() if k[0] != "_"})


def test_a_batch_that_does_not_fit_into_memory_is_split_into_micro_batches(
    tmp_path, capsys, large_unet
):
    options = {"max_train_steps": MEASURED, "checkpointing_steps": 2}
    large_unet.load_state_dict(tiny_unet().state_dict())
    run(tmp_path / "split", unet=large_unet, dataset=stop_reading_at(20), **options)
    assert "4 images at once do not fit: 2 in each of 2 passes" in capsys.readouterr().out
    options["gradient_accumulation_steps"] = 4
    run(tmp_path / "asked", dataset=stop_reading_at(20), **options)
    assert_equal_bits(checkpoint(tmp_path / "split", 2), checkpoint(tmp_path / "asked", 2))
    assert "gradient_accumulation_steps: 4" in (tmp_path / "split" / "config.yaml").read_text()


@pytest.mark.parametrize(("memory", "is_split"), [(1e5, True), (1e7, False)])
def test_a_batch_larger_than_the_memory_of_the_machine_is_split_before_it_is_tried(
    tmp_path, capsys, monkeypatch, memory, is_split
):
    """Linux grants too much memory and kills the process that uses it."""
    monkeypatch.setattr(warm_up, "memory_bytes", lambda: memory)
    run(tmp_path, dataset=stop_reading_at(8), max_train_steps=MEASURED)
    message = "4 images at once do not fit: 2 in each of 2 passes, the same batch"
    assert (message in capsys.readouterr().out) == is_split


def test_one_image_that_does_not_fit_is_an_error_with_a_fix(tmp_path, monkeypatch, large_unet):
    tries = []

    def spoil(*_):
        tries.append(1)
        if len(tries) > 1:  # the first call is a check in eval mode
            raise torch.OutOfMemoryError("no room")

    large_unet.mid_block.register_forward_hook(spoil)
    with pytest.raises(TrainingError, match="smaller `resolution` or network"):
        run(tmp_path, unet=large_unet, max_train_steps=MEASURED)


def test_steps_and_updates_do_not_synchronize_with_the_device(monkeypatch):
    """Counted by the benchmark; on a GPU the profiler counts."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    bench = importlib.import_module("bench_profile")
    of_step = bench.of_sampling(bench.GaussianDDPMPipeline, tiny_unet(), batch_size=2)
    assert bench.waits(of_step, "cpu") == 0
    # Smallest and largest pixel, checked before images go to the device.
    assert bench.waits(bench.of_training(tiny_unet(), batch_size=2), "cpu") == 2


def record(folder, step):
    return json.loads((folder / "checkpoints" / f"step-{step:08d}" / "state.json").read_text())


def test_a_resumed_run_keeps_its_number_of_threads(tmp_path):
    unet, seen = tiny_unet(), []
    options = {"lr_scheduler": "constant"}
    run(tmp_path / "straight", num_threads=2, **options)
    run(tmp_path / "resumed", num_threads=2, max_train_steps=3, **options)
    unet.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    result = run(tmp_path / "resumed", unet=unet, **options)
    assert seen[-1] == 2
    assert json.loads((result.model_dir / "training.json").read_text())["computation"] == {
        "mixed_precision": "no",
        "num_threads": 2,
        "compile": False,
        "gradient_checkpointing": False,
        "memory_format": "contiguous",
        "optimizer": "fused AdamW",
    }
    assert "num\\_threads 2, compile False" in (result.model_dir / "README.md").read_text()
    assert torch.get_num_threads() == 1  # as before the run
    assert_equal_bits(checkpoint(tmp_path / "straight", 6), checkpoint(tmp_path / "resumed", 6))


def test_threads_are_measured_once_before_the_first_update(tmp_path, monkeypatch, capsys):
    measurements, seen = [], []

    def measure(trial):
        measurements.append(1)
        return 2

    monkeypatch.setattr("ddpm_hf.training.cpu_threads.fastest_num_threads", measure)
    options = {"max_train_steps": MEASURED, "checkpointing_steps": 2}
    with use_num_threads(3):
        run(tmp_path, dataset=stop_reading_at(20), **options)
    assert "2 CPU threads, chosen by timing" in capsys.readouterr().out
    step = len(metrics(tmp_path))
    assert record(tmp_path, step)["num_threads"] == 2
    unet = tiny_unet()
    unet.register_forward_hook(lambda *_: seen.append(torch.get_num_threads()))
    with use_num_threads(3):  # the checkpoint decides, not the default
        run(tmp_path, dataset=stop_reading_at(20), unet=unet, **options)
    assert set(seen[1:]) == {2}  # the first call tests the network
    assert measurements == [1]
    assert all("num_threads" not in entry for entry in metrics(tmp_path))


def test_a_change_of_threads_on_resume_is_reported_logged_and_recorded(tmp_path, capsys):
    change = {"step": 4, "num_threads": 2, "num_threads_before": 1}
    options = {"lr_scheduler": "constant"}
    run(tmp_path, max_train_steps=3, num_threads=1, **options)
    assert "num_threads_changes" not in record(tmp_path, 3)
    capsys.readouterr()
    run(tmp_path, max_train_steps=6, num_threads=2, **options)
    assert "threads    2 instead of 1 from update 4 on" in capsys.readouterr().out
    run(tmp_path, max_train_steps=8, **options)
    assert "instead of" not in capsys.readouterr().out
    assert record(tmp_path, 8)["num_threads"] == 2
    assert record(tmp_path, 8)["num_threads_changes"] == [change]
    assert [entry for entry in metrics(tmp_path) if "num_threads" in entry] == [change]


def test_a_logged_change_of_threads_is_removed_if_its_updates_are_lost(tmp_path):
    options = {"lr_scheduler": "constant"}
    run(tmp_path, max_train_steps=3, num_threads=1, **options)
    run(tmp_path, max_train_steps=6, num_threads=2, checkpointing_steps=6, **options)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    run(tmp_path, max_train_steps=6, **options)
    assert record(tmp_path, 6)["num_threads"] == 1
    assert [entry["step"] for entry in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
