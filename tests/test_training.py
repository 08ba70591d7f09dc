"""The training program on real, tiny runs: exact resume, right schedules, nothing lost."""

import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from processes import LIMIT_S, started
from safetensors.torch import load_file, save_file
from tiny_runs import (
    Images,
    assert_equal_bits,
    checkpoint,
    metrics,
    run,
    stop_reading_at,
    tiny_config,
    tiny_images,
    tiny_unet,
)
from torch.testing import assert_close
from transformers import get_scheduler

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, load, train
from ddpm_hf.losses import simple_loss
from ddpm_hf.training import CheckpointError, ConfigError, TrainingError
from ddpm_hf.training.learning_rate import learning_rate
from ddpm_hf.training.resolve import Machine, resolve

# Resume


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_run_that_was_stopped_and_resumed_equals_the_straight_run_bit_by_bit(
    tmp_path, accumulation
):
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
    # The shape of the first image, twice, and 4 updates of 4 images.
    assert images.reads <= 4 * 4 + 2


# Few steps leave a gap before the first one, which the scheduler says.
@pytest.mark.filterwarnings("ignore:timestep_spacing")
def test_sampling_and_saving_on_the_way_do_not_change_what_is_learned(tmp_path):
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


def test_a_damaged_newest_checkpoint_is_passed_over_for_the_one_before(tmp_path):
    run(tmp_path)
    want = checkpoint(tmp_path, 6)
    weights = tmp_path / "checkpoints" / "step-00000006" / "unet.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    images = Images(tiny_images(), None, None)

    run(tmp_path, dataset=images)

    assert images.reads >= 2 * 4  # updates 5 and 6 were done again
    assert_equal_bits(checkpoint(tmp_path, 6), want)


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_from_zero(tmp_path):
    run(tmp_path)
    for state in tmp_path.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        run(tmp_path)


def test_a_finished_run_is_left_as_it_is(tmp_path):
    run(tmp_path)
    before = checkpoint(tmp_path, 6)
    assert run(tmp_path).num_steps == 6
    assert_equal_bits(checkpoint(tmp_path, 6), before)
    assert len(metrics(tmp_path)) == 6


def test_a_finished_run_can_be_prolonged(tmp_path):
    run(tmp_path, lr_scheduler="constant", max_train_steps=3)
    run(tmp_path, lr_scheduler="constant", max_train_steps=6)
    run(tmp_path / "straight", lr_scheduler="constant")
    assert_equal_bits(checkpoint(tmp_path, 6), checkpoint(tmp_path / "straight", 6))


@pytest.mark.parametrize(
    "change",
    [{"learning_rate": 2e-3}, {"batch_size": 2}, {"seed": 1}, {"prediction_type": "sample"}],
    ids=lambda change: next(iter(change)),
)
def test_resuming_with_options_that_change_what_is_learned_is_refused(tmp_path, change):
    run(tmp_path)
    with pytest.raises(ConfigError, match=next(iter(change))):
        run(tmp_path, **change)


def test_resuming_in_another_precision_of_accelerate_is_refused(tmp_path, monkeypatch):
    run(tmp_path, max_train_steps=2)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="set `mixed_precision` to 'no'"):
        run(tmp_path)
    run(tmp_path, mixed_precision="no")
    assert len(metrics(tmp_path)) == 6


def test_resuming_on_other_images_is_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(ConfigError, match=r"11.*12"):
        run(tmp_path, dataset=tiny_images(12), max_train_steps=8)


def test_a_run_says_how_to_go_on_when_stopped_and_what_it_left_when_done(tmp_path, capsys):
    run(tmp_path, dataset=stop_reading_at(14))
    said = capsys.readouterr().out
    assert f"after update 2, saved in {tmp_path / 'checkpoints'}; run the same command" in said
    assert "done" not in said
    run(tmp_path)
    said = capsys.readouterr().out
    assert "done       6 updates" in said
    assert f"ddpm-hf sample {tmp_path / 'model'}\n" in said


# Schedules


@pytest.mark.parametrize("warmup", [0, 1, 7, 40])
@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_the_learning_rate_is_that_of_transformers(tmp_path, kind, warmup):
    options = tiny_config(
        tmp_path, lr_scheduler=kind, lr_warmup_steps=warmup, max_train_steps=40, learning_rate=3e-4
    )
    config = resolve(
        options, Machine("cpu"), num_images=1, image_size=8, learns_variance=False, num_channels=8
    )
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=3e-4)
    name = {"constant": "constant_with_warmup"}.get(kind, kind)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=40)
    for step in range(40):
        assert learning_rate(config, step) == schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_learning_rate_follows_the_updates_whatever_the_accumulation(tmp_path, accumulation):
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
        # size, so a small one passes that on enlarged. The bias of the keys is left out: softmax
        # does not feel it, so its gradient is nothing but rounding.
        assert (whole[name] - parts[name]).abs().mean() < 1e-5, name
    losses = [[entry["loss"] for entry in metrics(tmp_path / str(k))] for k in (1, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_average_is_that_of_the_weights_with_the_documented_decay(tmp_path):
    run(tmp_path, checkpointing_steps=1, checkpoints_total_limit=6, ema_decay=0.3)
    raw = [checkpoint(tmp_path, step) for step in range(1, 7)]
    names = [name.split(":")[1] for name in raw[0] if name.startswith("ema")]
    for name in names:
        average = raw[0][f"unet.safetensors:{name}"].double()  # decay 0 at the first update
        for n, tensors in enumerate(raw[1:], start=1):
            decay = min((1 + n) / (10 + n), 0.3)
            average = decay * average + (1 - decay) * tensors[f"unet.safetensors:{name}"].double()
        got = raw[-1][f"ema.safetensors:{name}"].double()
        # six float32 updates of values of the order of 1
        assert_close(got, average, rtol=0, atol=1e-6)


def test_one_batch_is_learned_by_heart(tmp_path):
    # x_0-prediction of a single image can reach a loss of 0.
    run(
        tmp_path,
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
def test_fp16_without_a_gpu_is_refused_instead_of_ignored(tmp_path):
    with pytest.raises(ConfigError, match="bf16"):
        run(tmp_path, mixed_precision="fp16")


# Nothing lost


def overflowing_on_black(denoiser, scheduler, x_0, t, noise):
    """A loss whose gradient is not finite for a black image."""
    loss = simple_loss(denoiser, scheduler, x_0, t, noise)
    return loss * torch.where(x_0.flatten(1).amax(1) == -1, float("inf"), 1.0)


BLACK = torch.full((1, 8, 8), -1.0)


def test_an_update_with_a_non_finite_gradient_leaves_weights_and_moments_alone(tmp_path):
    # Batches of one image of four: every fourth update is lost.
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


def test_a_run_without_any_finite_gradient_ends_with_an_error_and_no_bad_checkpoint(tmp_path):
    config = tiny_config(tmp_path, max_train_steps=100)
    with pytest.raises(TrainingError, match="learning_rate"):
        train(config, unet=tiny_unet(), dataset=[BLACK] * 3, loss=overflowing_on_black)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values()), path


def test_weights_that_are_not_finite_from_the_start_are_refused(tmp_path):
    unet = tiny_unet()
    unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(ValueError, match=r"conv_out\.bias"):
        run(tmp_path, unet=unet)
    assert not list(tmp_path.rglob("*.safetensors"))


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
    assert result.num_steps in (3, 4)  # noticed in the sampling, agreed upon after the next update
    assert not list(tmp_path.glob("samples/*"))


def test_two_runs_cannot_share_a_folder(tmp_path):
    def start_another():
        with pytest.raises(CheckpointError, match=f"in use by process {os.getpid()}"):
            run(tmp_path)

    run(tmp_path, dataset=Images(tiny_images(), 6, start_another))


def test_an_output_folder_that_cannot_be_made_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "file").write_text("in the way")
    images = Images(tiny_images(), None, None)
    with pytest.raises(CheckpointError, match="file/run"):
        run(tmp_path / "file" / "run", dataset=images)
    assert images.reads == 0


# Few steps leave a gap before the first one, which the scheduler says.
@pytest.mark.filterwarnings("ignore:timestep_spacing")
def test_no_file_of_a_run_is_a_pickle(tmp_path):
    run(tmp_path, num_samples=2, sample_steps=3, sample_inference_steps=2)
    starts = {path: path.read_bytes()[:2] for path in tmp_path.rglob("*") if path.is_file()}
    assert len(starts) > 10
    assert not [path for path, start in starts.items() if start in (b"PK", b"\x80\x02")]


def test_only_the_newest_checkpoints_are_kept_and_other_folders_left_alone(tmp_path):
    (tmp_path / "checkpoints" / "step-mine").mkdir(parents=True)
    run(tmp_path, checkpointing_steps=1, checkpoints_total_limit=3)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000004", "step-00000005", "step-00000006", "step-mine"]


def test_a_folder_with_a_model_of_somebody_else_is_not_written_to(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.py").write_text("x = 1")
    with pytest.raises(CheckpointError, match="contains model, which no training run"):
        run(tmp_path)
    assert [p.name for p in tmp_path.rglob("*")] == ["model", "mine.py"]


def test_what_a_person_puts_into_a_run_stays(tmp_path):
    run(tmp_path, max_train_steps=2)
    (tmp_path / "model" / "LICENSE").write_text("MIT")
    for name in (".new-idea", ".old-photos"):
        (tmp_path / name).mkdir()
    (tmp_path / ".new-note.txt").write_text("x")
    run(tmp_path, max_train_steps=4)
    assert (tmp_path / "model" / "LICENSE").read_text() == "MIT"
    assert all((tmp_path / n).exists() for n in (".new-idea", ".old-photos", ".new-note.txt"))


def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(ConfigError, match="channels"):
        run(tmp_path / "new", dataset=[torch.zeros(7, 8, 8)])
    assert not (tmp_path / "new").exists()


def test_a_disk_that_refuses_for_a_while_costs_only_what_was_due_then(tmp_path, caplog):
    """Files may not grow beyond 2 kB from update 2 to update 4, as on a disk that is full."""
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


# Few steps leave a gap before the first one, which the scheduler says.
@pytest.mark.filterwarnings("ignore:timestep_spacing")
def test_a_run_that_was_cut_short_before_its_model_was_written_writes_it_now(tmp_path):
    options = {"num_samples": 1, "sample_inference_steps": 2, "max_train_steps": 2}
    result = run(tmp_path, **options)
    shutil.rmtree(result.model_dir)
    shutil.rmtree(tmp_path / "samples")
    before = checkpoint(tmp_path, 2)
    run(tmp_path, **options)
    assert json.loads((result.model_dir / "training.json").read_text())["steps"] == 2
    assert (result.model_dir / "samples.png").exists()
    assert_equal_bits(before, checkpoint(tmp_path, 2))


def test_a_checkpoint_before_the_first_log_entry_comes_with_its_model(tmp_path, caplog):
    seen = []
    images = Images(tiny_images(), 14, lambda: seen.append((tmp_path / "model").exists()))
    run(tmp_path, dataset=images, checkpointing_steps=1, logging_steps=5)
    assert seen == [True]
    assert "could not" not in caplog.text


class FailsToSample(UNet2DModel):
    num_calls = 0

    def forward(self, *args, **options):
        self.num_calls += not self.training
        if not self.training and self.num_calls > 1:  # the first is a trial before the updates
            raise torch.OutOfMemoryError("no room")
        return super().forward(*args, **options)


def test_a_picture_that_cannot_be_drawn_costs_neither_the_run_nor_its_model(tmp_path, caplog):
    unet = FailsToSample(**{k: v for k, v in tiny_unet().config.items() if k[0] != "_"})
    result = run(tmp_path, unet=unet, num_samples=1, sample_steps=3, checkpointing_steps=3)
    assert "could not draw samples at update 3: no room" in caplog.text
    assert result.num_steps == 6
    assert load_file(result.model_dir / "unet" / "diffusion_pytorch_model.safetensors")


def test_an_accelerator_without_room_ends_with_the_option_that_helps(tmp_path):
    images = Images(tiny_images(), 10, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("no")))
    with pytest.raises(TrainingError, match="`gradient_accumulation_steps` 2"):
        run(tmp_path, dataset=images)


def test_a_network_that_cannot_be_compiled_ends_with_the_option_that_helps(tmp_path):
    unet = tiny_unet()

    def fail(module, args):
        if module.training:  # the first call is a trial before that
            raise torch._dynamo.exc.TorchDynamoException("no compiler\nand a page of frames")

    unet.register_forward_pre_hook(fail)
    with pytest.raises(TrainingError, match="compiled: no compiler; train it without `compile`"):
        run(tmp_path, unet=unet)


def test_a_tracker_that_fails_is_left_out_with_a_word(tmp_path, caplog, monkeypatch):
    (tmp_path / "logs").write_text("in the way of TensorBoard's folder")
    assert run(tmp_path).num_steps == 6
    assert "the tracker failed" in caplog.text
    assert len(metrics(tmp_path)) == 6


def test_the_lock_of_a_killed_run_is_waited_for_until_its_workers_end(tmp_path):
    """They inherit it, and notice the death of their parent only after seconds."""
    with started([sys.executable, "-c", ""]) as dead:
        dead.wait(LIMIT_S)
    (tmp_path / ".lock").write_text(str(dead.pid))
    hold = "import fcntl, sys, time; f = open(sys.argv[1]); fcntl.flock(f, 2); print(flush=True)"
    command = [sys.executable, "-c", f"{hold}; time.sleep(1)", str(tmp_path / ".lock")]
    with started(command, stdout=subprocess.PIPE) as worker:
        worker.stdout.readline()
        assert run(tmp_path, max_train_steps=2).num_steps == 2
        assert worker.wait(LIMIT_S) == 0


# What comes out, and what can go in


def test_the_model_loads_in_stock_diffusers_and_holds_the_averaged_weights(tmp_path):
    result = run(tmp_path)
    stock = DDPMPipeline.from_pretrained(result.model_dir)
    averages = load_file(tmp_path / "checkpoints" / "step-00000006" / "ema.safetensors")
    got = stock.unet.state_dict()
    assert got.keys() == averages.keys()
    assert all(torch.equal(got[name], averages[name]) for name in averages)
    assert stock(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"layers_per_block": 1_000_000}, "layers_per_block must be an int in 1..16, got 1000000"),
        ({"in_channels": 10**9}, "in_channels must be an int in 1..1024"),
        ({"block_out_channels": [8192] * 4, "layers_per_block": 16}, "of memory"),
    ],
)
def test_a_network_that_cannot_be_is_refused_before_any_image_is_read(tmp_path, arguments, why):
    (tmp_path / "unet.json").write_text(json.dumps(arguments))
    unread = Images(tiny_images(), 1, lambda: pytest.fail("an image was read"))
    config = tiny_config(tmp_path / "run", unet_config=str(tmp_path / "unet.json"))
    with pytest.raises(ConfigError, match=re.escape(why)):
        train(config, dataset=unread)


def test_a_card_is_renewed_around_what_a_person_wrote_in_it(tmp_path):
    run(tmp_path, max_train_steps=2, license="apache-2.0")
    card = tmp_path / "model" / "README.md"
    generated = card.read_text()
    assert "license: apache-2.0\n" in generated
    assert "| optimizer updates | 2 |" in generated
    card.write_text(generated.replace("license: apache-2.0", "license: mit") + "By Jane.\n")
    run(tmp_path, max_train_steps=4, license="apache-2.0")
    text = card.read_text()
    assert "license: mit\n" in text
    assert "By Jane.\n" in text
    assert "| optimizer updates | 4 |" in text
    card.write_text("# By hand\n")
    run(tmp_path, max_train_steps=6)
    assert card.read_text() == "# By hand\n"


def test_a_card_that_cannot_be_made_is_a_warning_and_the_model_is_written(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("ddpm_hf.hub.card._TEMPLATE", tmp_path / "nothing.md")
    run(tmp_path / "run", max_train_steps=2)
    assert "model card" in caplog.text
    assert (tmp_path / "run/model/unet/config.json").is_file()


def test_a_fine_tuned_model_tells_what_its_base_was_trained_on(tmp_path):
    run(tmp_path / "base", max_train_steps=2)
    config = tiny_config(
        tmp_path / "tuned", max_train_steps=2, pretrained=str(tmp_path / "base/model")
    )
    train(config, dataset=tiny_images())
    text = (tmp_path / "tuned/model/README.md").read_text()
    assert "Base: model. Its data: images passed in Python" in text
    assert "Its training: 2 optimizer updates." in text


# Few steps leave a gap before the first one, which the scheduler says.
@pytest.mark.filterwarnings("ignore:timestep_spacing")
def test_sample_grids_are_drawn_when_due(tmp_path):
    run(tmp_path, num_samples=4, sample_steps=2, sample_inference_steps=3)
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == [f"step-0000000{step}.png" for step in (2, 4, 6)]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, seed=seed)
    a, b, c = (checkpoint(tmp_path / name, 6) for name in "abc")
    assert_equal_bits(a, b)
    assert any(not torch.equal(a[name], c[name]) for name in a)


@pytest.fixture(params=["ours", "stock pipeline", "bare network"])
def pretrained(request, tmp_path):
    unet, folder = tiny_unet(), tmp_path / "pretrained"
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.5)
    scheduler = GaussianDDPMScheduler(
        num_train_timesteps=50,
        beta_schedule="squaredcos_cap_v2",
        x_0_mse=[0.1] * 50,
        calibrated_timesteps={"DDIM": {2: [49, 20]}},
        recommended={"scheduler": "DDIM", "num_inference_steps": 5},
    )
    if request.param == "ours":
        GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder)
    elif request.param == "stock pipeline":
        from diffusers import DDPMScheduler

        stock = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
        DDPMPipeline(unet, stock).save_pretrained(folder)
    else:
        unet.save_pretrained(folder)
    return request.param, folder, unet


def test_fine_tuning_starts_from_the_pretrained_weights_and_diffusion(tmp_path, pretrained):
    kind, folder, unet = pretrained
    # With warm-up the first update has learning rate 0: its weights are the pretrained ones.
    result = train(
        tiny_config(
            tmp_path / "run",
            pretrained=str(folder),
            max_train_steps=1,
            lr_warmup_steps=1,
            learning_rate=None,
        ),
        dataset=tiny_images(),
    )
    # However narrow the network: it does not start from scratch.
    assert "learning_rate: 0.0001\n" in (tmp_path / "run" / "config.yaml").read_text()
    got = DDPMPipeline.from_pretrained(result.model_dir)
    want = unet.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in got.unet.state_dict().items())
    expected_steps = 1000 if kind == "bare network" else 50
    assert got.scheduler.config.num_train_timesteps == expected_steps
    assert "_ddpm_hf" not in got.scheduler.config  # a calibration of other weights


def test_fine_tuning_on_images_of_another_kind_says_what_to_do(tmp_path, pretrained):
    images = [torch.zeros(3, 8, 8)] * 4
    with pytest.raises(ConfigError, match="image_mode"):
        train(tiny_config(tmp_path / "run", pretrained=str(pretrained[1])), dataset=images)


def test_a_network_beside_a_pretrained_one_is_refused_instead_of_ignored(tmp_path, pretrained):
    with pytest.raises(ConfigError, match="pretrained"):
        run(tmp_path / "run", pretrained=str(pretrained[1]))


def test_a_pretrained_folder_without_a_model_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="empty"):
        train(tiny_config(tmp_path / "run", pretrained=str(tmp_path / "empty")), dataset=[])


@pytest.mark.filterwarnings("ignore:timestep_spacing")
@pytest.mark.parametrize("size", [16, 6])
def test_fine_tuning_at_another_size_makes_a_model_of_that_size(tmp_path, pretrained, size):
    images = [torch.zeros(1, size, size)] * 4
    config = tiny_config(
        tmp_path / "run", pretrained=str(pretrained[1]), max_train_steps=1, num_samples=1,
        sample_inference_steps=2, lr_warmup_steps=0,
    )  # fmt: skip
    pipe = DDPMPipeline.from_pretrained(train(config, dataset=images).model_dir)
    assert pipe.unet.config.sample_size == size
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, size, size, 1)


class WithoutSample(UNet2DModel):
    """A network that breaks down when it is called."""

    def __init__(self, unet):
        super().__init__(**{k: v for k, v in unet.config.items() if k[0] != "_"})

    def forward(self, sample, timestep, class_labels=None):
        return super().forward(sample[:, :, 1:], timestep)


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"unet": torch.nn.Linear(2, 2)}, "must be a diffusers UNet2DModel, got Linear"),
        ({"unet": tiny_unet().bfloat16()}, "float32"),
        ({"unet": tiny_unet().requires_grad_(False)}, "require gradients"),
        ({"unet": tiny_unet(out_channels=2)}, "or `variance_type` to learned_range"),
        (
            {"scheduler": GaussianDDPMScheduler(variance_type="learned_range")},
            "set out_channels of the network to 2",
        ),
        (
            {"scheduler": DDIMScheduler()},
            "`scheduler` must be .* got DDIMScheduler, .* does not train",
        ),
        ({"unet": tiny_unet(time_embedding_type="fourier")}, "use 'positional'"),
        (
            {"unet": tiny_unet(time_embedding_type="learned", num_train_timesteps=10)},
            "learned embeddings of 10 timesteps, but the scheduler has 1000",
        ),
        ({"unet": WithoutSample(tiny_unet())}, "does not run on 8x8 images"),
        ({"dataset": []}, "at least one float tensor"),
        ({"dataset": [(torch.zeros(1, 8, 8), 3)]}, "the first item is tuple"),
        ({"dataset": iter([])}, "list_iterator"),
    ],
)
def test_parts_that_cannot_be_trained_are_refused_before_the_first_update(tmp_path, parts, said):
    parts = {"unet": tiny_unet(), "dataset": tiny_images()} | parts
    with pytest.raises(ConfigError, match=said):
        train(tiny_config(tmp_path / "run"), **parts)
    assert not (tmp_path / "run").exists()


def test_a_stock_scheduler_is_trained_as_our_own(tmp_path):
    stock = DDPMScheduler(num_train_timesteps=50, beta_schedule="squaredcos_cap_v2")
    result = train(
        tiny_config(tmp_path, max_train_steps=2),
        unet=tiny_unet(),
        scheduler=stock,
        dataset=tiny_images(),
    )
    assert load(result.model_dir).scheduler.config.num_train_timesteps == 50


def test_a_path_in_the_place_of_the_options_is_an_error_that_says_how():
    with pytest.raises(ConfigError, match=r"TrainingConfig\(dataset="):
        train("./photos")


def test_resuming_with_other_parts_is_refused_with_what_differs(tmp_path):
    run(tmp_path, max_train_steps=2)
    for parts, said in (
        ({"unet": tiny_unet(dropout=0.5)}, r"network dropout: 0.0 -> 0.5"),
        ({"unet": tiny_unet(block_out_channels=(8, 16))}, "network block_out_channels"),
        (
            {"scheduler": GaussianDDPMScheduler(50, beta_schedule="squaredcos_cap_v2")},
            "diffusion num_train_timesteps: 1000 -> 50",
        ),
        ({"dataset": tiny_images()[::-1]}, "images digest"),
        ({"dataset": tiny_images(12)}, "images number: 11 -> 12"),
    ):
        parts = {"unet": tiny_unet(), "dataset": tiny_images()} | parts
        with pytest.raises(ConfigError, match=said):
            train(tiny_config(tmp_path, max_train_steps=4), **parts)
    assert run(tmp_path, max_train_steps=4, dataset=tiny_images()).num_steps == 4


def halved(denoiser, scheduler, x_0, t, noise):
    return simple_loss(denoiser, scheduler, x_0, t, noise) / 2


def test_any_loss_can_be_trained_and_a_resumed_run_must_share_it(tmp_path):
    parts = {"dataset": tiny_images(), "max_train_steps": 2, "checkpointing_steps": 2}
    config = {k: parts.pop(k) for k in ("max_train_steps", "checkpointing_steps")}
    for name, loss in (("whole", None), ("half", halved)):
        train(tiny_config(tmp_path / name, **config), unet=tiny_unet(), loss=loss, **parts)
    whole, half = (metrics(tmp_path / name)[0]["loss"] for name in ("whole", "half"))
    assert half == pytest.approx(whole / 2)
    with pytest.raises(ConfigError, match=r"objective name: .*halved' -> 'simple'"):
        train(tiny_config(tmp_path / "half", max_train_steps=4), unet=tiny_unet(), **parts)


def test_fewer_updates_than_were_done_are_refused(tmp_path):
    run(tmp_path, max_train_steps=4)
    with pytest.raises(ConfigError, match=r"`max_train_steps` is 3.*4 updates already"):
        run(tmp_path, max_train_steps=3)


def only_pickles(folder):
    unet = UNet2DModel.from_pretrained(folder)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(unet.state_dict(), folder / "diffusion_pytorch_model.bin")


def lacking(folder):
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights.pop("conv_in.weight")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


def with_nan(folder):
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    weights["conv_in.weight"][0] = float("nan")
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [(only_pickles, "can carry code"), (lacking, "do not fit"), (with_nan, "not finite")],
)
def test_a_bare_network_is_looked_at_as_closely_as_a_pipeline(tmp_path, damage, said):
    tiny_unet().save_pretrained(tmp_path / "bare")
    damage(tmp_path / "bare")
    config = tiny_config(tmp_path / "run", pretrained=str(tmp_path / "bare"))
    with pytest.raises(ConfigError, match=said):
        train(config, dataset=tiny_images())
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_pickled_weights_are_fine_tuned_when_allowed(tmp_path):
    tiny_unet().save_pretrained(tmp_path / "bare")
    only_pickles(tmp_path / "bare")
    config = tiny_config(
        tmp_path / "run",
        pretrained=str(tmp_path / "bare"),
        use_safetensors=False,
        max_train_steps=2,
    )
    assert train(config, dataset=tiny_images()).num_steps == 2


def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(tmp_path):
    with pytest.raises(ConfigError, match=r"10.*9.*12"):
        run(tmp_path, batch_size=10, gradient_accumulation_steps=3)


def test_what_a_crash_left_behind_is_swept_and_a_retired_model_returns(tmp_path):
    run(tmp_path, max_train_steps=4)
    # A crash between the two renames of the model, and one inside a checkpoint.
    os.rename(tmp_path / "model", tmp_path / ".old-model")
    (tmp_path / "checkpoints" / ".new-step-00000006").mkdir()
    run(tmp_path, max_train_steps=4)
    assert (tmp_path / "model" / "model_index.json").is_file()
    hidden = [path.name for path in tmp_path.rglob(".*") if path.name != ".lock"]
    assert not hidden
    shutil.rmtree(tmp_path)
