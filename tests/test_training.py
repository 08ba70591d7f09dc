"""Training on tiny runs: exact resume, learning rate, accumulation, EMA and precision."""

import math
import signal

import pytest
import torch
from checkpoints import TWO_LEVELS
from tiny_runs import (
    Images,
    assert_equal_bits,
    checkpoint,
    few_steps,
    metrics,
    run,
    stop_reading_at,
    tiny_images,
    tiny_unet,
)
from torch.testing import assert_close

from ddpm_hf.training import CheckpointError, ConfigError

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_and_resumed_run_is_bit_equal_to_a_straight_one(tmp_path, accumulation):
    dropout = {"dropout": 0.2, "gradient_accumulation_steps": accumulation}
    unet = {"unet": tiny_unet(dropout=dropout.pop("dropout"))}
    run(tmp_path / "straight", **dropout, **unet)

    unet = tiny_unet(dropout=0.2)
    stopped = run(tmp_path / "resumed", dataset=stop_reading_at(15), unet=unet, **dropout)
    assert stopped.stopped_by == signal.SIGTERM
    assert stopped.num_steps == 3
    finished = run(tmp_path / "resumed", unet=tiny_unet(dropout=0.2), **dropout)

    assert finished.num_steps == 6
    assert_equal_bits(checkpoint(tmp_path / "resumed", 6), checkpoint(tmp_path / "straight", 6))
    without_speed = [
        [{k: v for k, v in entry.items() if k != "images_per_s"} for entry in metrics(folder)]
        for folder in (tmp_path / "resumed", tmp_path / "straight")
    ]
    assert without_speed[0] == without_speed[1]


def test_resuming_reads_no_image_twice(tmp_path):
    run(tmp_path, dataset=stop_reading_at(12))
    images = Images(tiny_images(), None, None)
    run(tmp_path, dataset=images)
    # The first image twice for its shape, and 4 updates of 4 images.
    assert images.reads <= 4 * 4 + 2


@few_steps
def test_sampling_and_checkpointing_do_not_change_the_weights(tmp_path):
    run(tmp_path / "silent", checkpointing_steps=6, unet=tiny_unet(dropout=0.3))
    run(
        tmp_path / "busy",
        num_samples=3,
        sample_steps=1,
        sample_inference_steps=2,
        checkpointing_steps=1,
        unet=tiny_unet(dropout=0.3),
    )
    assert_equal_bits(checkpoint(tmp_path / "busy", 6), checkpoint(tmp_path / "silent", 6))


def test_a_damaged_newest_checkpoint_is_skipped_for_the_previous_one(tmp_path):
    run(tmp_path)
    want = checkpoint(tmp_path, 6)
    weights = tmp_path / "checkpoints" / "step-00000006" / "unet.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    images = Images(tiny_images(), None, None)

    run(tmp_path, dataset=images)

    assert images.reads >= 2 * 4  # updates 5 and 6 are repeated
    assert_equal_bits(checkpoint(tmp_path, 6), want)


def test_a_run_with_only_damaged_checkpoints_does_not_restart(tmp_path):
    run(tmp_path)
    for state in tmp_path.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        run(tmp_path)


def test_rerunning_a_finished_run_changes_nothing(tmp_path):
    run(tmp_path)
    before = checkpoint(tmp_path, 6)
    assert run(tmp_path).num_steps == 6
    assert_equal_bits(checkpoint(tmp_path, 6), before)
    assert len(metrics(tmp_path)) == 6


def test_a_finished_run_can_be_extended(tmp_path):
    run(tmp_path, lr_scheduler="constant", max_train_steps=3)
    run(tmp_path, lr_scheduler="constant", max_train_steps=6)
    run(tmp_path / "straight", lr_scheduler="constant")
    assert_equal_bits(checkpoint(tmp_path, 6), checkpoint(tmp_path / "straight", 6))


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 2e-3}, {"batch_size": 2}, {"seed": 1}, {"prediction_type": "sample"}],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_other_training_options_raises(tmp_path, change):
    run(tmp_path)
    with pytest.raises(ConfigError, match=next(iter(change))):
        run(tmp_path, **change)


def test_resuming_in_another_precision_of_accelerate_raises(tmp_path, monkeypatch):
    run(tmp_path, max_train_steps=2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="set `mixed_precision` to 'no'"):
        run(tmp_path)
    run(tmp_path, mixed_precision="no")
    assert len(metrics(tmp_path)) == 6


def test_resuming_on_other_images_raises(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"other components \(.*11 -> 12"):
        run(tmp_path, dataset=tiny_images(12), max_train_steps=8)


def test_a_run_prints_how_to_resume_or_what_it_wrote(tmp_path, capsys):
    run(tmp_path, dataset=stop_reading_at(14))
    printed = capsys.readouterr().out
    assert f"after update 2, saved in {tmp_path / 'checkpoints'}; run the same command" in printed
    assert "done" not in printed
    run(tmp_path)
    printed = capsys.readouterr().out
    assert "done       6 updates" in printed
    assert f"ddpm-hf sample {tmp_path / 'model'}\n" in printed


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_learning_rate_does_not_depend_on_gradient_accumulation(tmp_path, accumulation):
    run(tmp_path, gradient_accumulation_steps=accumulation, max_train_steps=8)
    want = [0, 0.5] + [0.5 * (1 + math.cos(math.pi * k / 6)) for k in range(6)]
    got = [entry["learning_rate"] for entry in metrics(tmp_path)]
    assert got == pytest.approx([1e-3 * factor for factor in want])


def test_accumulation_gives_the_same_weights_up_to_rounding(tmp_path):
    for accumulation in (1, 4):
        run(tmp_path / str(accumulation), gradient_accumulation_steps=accumulation)
    whole, parts = (checkpoint(tmp_path / str(k), 6) for k in (1, 4))
    for name in (n for n in whole if n.startswith("unet") and not n.endswith("to_k.bias")):
        # Sums in another order differ by 1e-7 of their size; Adam divides a gradient by its own
        # size, which enlarges this for small gradients. The key bias is excluded: softmax does
        # not depend on it, so its gradient is only rounding.
        assert (whole[name] - parts[name]).abs().mean() < 1e-5, name
    losses = [[entry["loss"] for entry in metrics(tmp_path / str(k))] for k in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_ema_weights_follow_their_closed_form(tmp_path):
    run(tmp_path, checkpointing_steps=1, checkpoints_total_limit=6, ema_decay=0.3)
    raw = [checkpoint(tmp_path, step) for step in range(1, 7)]
    names = [name.split(":")[1] for name in raw[0] if name.startswith("ema")]
    for name in names:
        average = raw[0][f"unet.safetensors:{name}"].double()  # decay 0 at the first update
        for n, tensors in enumerate(raw[1:], start=1):
            decay = min((1 + n) / (10 + n), 0.3)
            average = decay * average + (1 - decay) * tensors[f"unet.safetensors:{name}"].double()
        got = raw[-1][f"ema.safetensors:{name}"].double()
        # six float32 updates of values of order 1
        assert_close(got, average, rtol=0, atol=1e-6)


def test_a_single_image_is_overfitted(tmp_path):
    # x_0-prediction of a single image can reach a loss of 0.
    run(
        tmp_path,
        unet=tiny_unet(**TWO_LEVELS | {"block_out_channels": (8, 8)}),
        dataset=tiny_images(1),
        max_train_steps=60,
        learning_rate=1e-2,
        prediction_type="sample",
        checkpointing_steps=60,
    )
    losses = [entry["loss"] for entry in metrics(tmp_path)]
    assert sum(losses[-5:]) < 0.2 * sum(losses[:5])


def test_bf16_keeps_weights_and_noise_in_float32(tmp_path):
    unet, inputs, inner = tiny_unet(), set(), set()
    unet.register_forward_pre_hook(lambda module, args: inputs.add(args[0].dtype))
    unet.conv_in.register_forward_hook(lambda module, args, output: inner.add(output.dtype))
    run(tmp_path, unet=unet, mixed_precision="bf16")
    assert inputs == {torch.float32}
    assert inner == {torch.bfloat16}
    assert {value.dtype for value in checkpoint(tmp_path, 6).values()} == {torch.float32}
    assert all(entry["loss"] > 0 for entry in metrics(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")
def test_fp16_without_a_gpu_raises(tmp_path):
    with pytest.raises(ConfigError, match="`mixed_precision` fp16 needs a GPU"):
        run(tmp_path, mixed_precision="fp16")
