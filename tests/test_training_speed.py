"""Options that make a run faster, or fit: what they change, and that no bit is lost by resuming."""

import importlib
import json
import re
from pathlib import Path

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DModel
from tiny_runs import assert_equal_bits, checkpoint, run, stop_reading_at, tiny_unet

from ddpm_hf import TrainingError
from ddpm_hf.diffusion.speed import threads
from ddpm_hf.training import ConfigError, parse_config
from ddpm_hf.training.cpu_threads import Pace

MEASURED = 101  # updates, from which on a run on a CPU tries what fits


def test_gradient_checkpointing_computes_twice_and_a_run_may_change_it(tmp_path):
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


def test_a_run_in_bf16_that_is_resumed_equals_one_that_was_not(tmp_path):
    options = {"lr_scheduler": "constant", "mixed_precision": "bf16"}
    run(tmp_path / "straight", **options)
    run(tmp_path / "resumed", **options, max_train_steps=3)
    run(tmp_path / "resumed", **options)
    assert_equal_bits(checkpoint(tmp_path / "straight", 6), checkpoint(tmp_path / "resumed", 6))


@torch._dynamo.config.patch(disable=True)  # the compiler alone takes a minute
def test_a_compiled_run_stays_compiled_when_it_is_resumed(tmp_path, capsys):
    run(tmp_path, max_train_steps=2, lr_scheduler="constant", compile=True)
    run(tmp_path, lr_scheduler="constant")
    assert capsys.readouterr().out.count(", compiled") == 2
    with pytest.raises(ConfigError, match="`compile`: True -> False"):
        run(tmp_path, lr_scheduler="constant", compile=False)


class WrongWhenCompiled(UNet2DModel):
    """Has no gradient before its last layer, in a compiled network alone."""

    def forward(self, sample, *args, **options):
        if torch.compiler.is_compiling():
            sample = self.conv_in(sample).detach()
            return type("Output", (), {"sample": self.conv_out(sample)})
        return super().forward(sample, *args, **options)


def test_a_network_that_is_compiled_wrongly_is_not_trained(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    unet = WrongWhenCompiled(**{k: v for k, v in tiny_unet().config.items() if k[0] != "_"})
    with pytest.raises(TrainingError, match=r"off by \d+%; train it with compile=False"):
        run(tmp_path, unet=unet)
    assert not (tmp_path / "model").exists()


@torch._dynamo.config.patch(disable=True)
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_it_is_said_that_gradients_of_a_compiled_network_with_dropout_are_not_checked(
    tmp_path, capsys, dropout
):
    run(tmp_path, unet=tiny_unet(dropout=dropout), max_train_steps=2, compile=True)
    assert ("gradients are not checked" in capsys.readouterr().out) == (dropout > 0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], None), (["--compile"], True), (["--no-compile"], False), (["--compile", "no"], False)],
    ids=str,
)
def test_a_switch_has_an_opposite(flags, expected):
    assert parse_config([*flags, "photos"]).compile is expected


class NeedsRoom(UNet2DModel):
    """Has the memory for `most` images at once."""

    most = 1

    def forward(self, sample, *args, **options):
        if len(sample) > self.most:
            raise torch.OutOfMemoryError("no room")
        return super().forward(sample, *args, **options)


@pytest.fixture
def large_unet():
    torch.manual_seed(0)
    return NeedsRoom(**{k: v for k, v in tiny_unet().config.items() if k[0] != "_"})


def test_a_batch_that_does_not_fit_is_split_and_stays_the_same(tmp_path, capsys, large_unet):
    options = {"max_train_steps": MEASURED, "checkpointing_steps": 2}
    large_unet.load_state_dict(tiny_unet().state_dict())
    run(tmp_path / "split", unet=large_unet, dataset=stop_reading_at(20), **options)
    assert "4 images at once do not fit: 2 in each of 2 passes" in capsys.readouterr().out
    options["gradient_accumulation_steps"] = 4
    run(tmp_path / "asked", dataset=stop_reading_at(20), **options)
    assert_equal_bits(checkpoint(tmp_path / "split", 2), checkpoint(tmp_path / "asked", 2))
    assert "gradient_accumulation_steps: 4" in (tmp_path / "split" / "config.yaml").read_text()


def test_one_image_that_does_not_fit_ends_with_what_helps(tmp_path, monkeypatch, large_unet):
    tries = []

    def spoil(*_):
        tries.append(1)
        if len(tries) > 1:  # the first is a trial in eval mode, before there are gradients
            raise torch.OutOfMemoryError("no room")

    large_unet.mid_block.register_forward_hook(spoil)
    with pytest.raises(TrainingError, match="smaller resolution or network"):
        run(tmp_path, unet=large_unet, max_train_steps=MEASURED)


def test_no_step_and_no_update_waits_for_the_device(monkeypatch):
    """The benchmark's own count, which on a GPU is that of the profiler."""
    monkeypatch.syspath_prepend(Path(__file__).parent / "benchmarks")
    bench = importlib.import_module("bench_profile")
    of_step = bench.of_sampling(bench.GaussianDDPMPipeline, tiny_unet(), batch_size=2)
    assert bench.waits(of_step, "cpu") == 0
    # Smallest and largest pixel, before images go to a device.
    assert bench.waits(bench.of_training(tiny_unet(), batch_size=2), "cpu") == 2


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
    assert torch.get_num_threads() == 1  # as it was before
    assert_equal_bits(checkpoint(tmp_path / "straight", 6), checkpoint(tmp_path / "resumed", 6))


def test_a_run_whose_updates_become_slow_measures_its_threads_again(tmp_path, monkeypatch, capsys):
    updates = iter(range(1, 7))
    monkeypatch.setattr(Pace, "is_slow", lambda *_: next(updates) == 3)
    with threads(2):
        run(tmp_path, checkpointing_steps=6)
    said = re.search(r"updates are slow: (\d) threads? from update 4 on", capsys.readouterr().out)
    state = json.loads((tmp_path / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["num_threads"] == int(said[1])


@pytest.mark.parametrize(
    ("seconds", "slow"),
    [
        ([1.0] * 400, []),
        ([1.0] * 40 + [1.9] * 40, []),
        ([1.0] * 40 + [9.0] * 2 + [1.0] * 40, []),  # a short halt
        ([1.0] * 40 + [2.5] * 100, [50]),  # said once: that is the pace from then on
        ([0.01] * 4000 + [0.03] * 1000, [4667]),
    ],
    ids=["even", "not twice", "short", "twice", "fast updates"],
)
def test_updates_are_slow_when_they_take_twice_as_long_for_a_while(seconds, slow):
    pace = Pace()
    assert [i + 1 for i, each in enumerate(seconds) if pace.is_slow(each)] == slow


def test_a_run_with_fewer_threads_than_it_could_have_asks_again_after_minutes():
    pace = Pace()
    assert [i for i in range(1000) if pace.is_slow(1.0, has_fewer=True)] == [299, 599, 899]
