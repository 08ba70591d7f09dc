"""Training on a stream: killed, resumed and distributed runs see the sequence of a straight run."""

import json
import os
import pickle
import shutil
import signal
from itertools import chain
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from processes import LIMIT_S, forked, forked_ranks
from shard_server import ShardServer
from test_streaming import (
    NUM_ROWS,
    NUM_SHARDS,
    SIZE,
    numbers,
    png,
    sequence,
    stream_of,
    write_parquet,
)  # fmt: skip
from tiny_runs import assert_equal_bits, checkpoint

from ddpm_hf import TrainingConfig, train
from ddpm_hf.data.image_order import Batches
from ddpm_hf.data.streaming import StreamedTrainingImages
from ddpm_hf.losses import simple_loss

pytestmark = pytest.mark.slow

STEPS, BATCH = 30, 4
# Trains on a stream; its loss writes the numbers in the images of each update, and ends the process
# at the call number sys.argv[3].
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
from ddpm_hf import TrainingConfig, train
from ddpm_hf.losses import simple_loss

folder, options, last_call = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
steps = [int(path.name[5:]) for path in folder.glob("run/checkpoints/step-*")]
calls, first = [], max(steps, default=0)

def numbered(denoiser, scheduler, x_0, t, noise):
    pixels = ((x_0[:, 0, 0, :2] + 1) * 127.5).round().int()
    calls.append((pixels[:, 0] * 256 + pixels[:, 1]).tolist())
    if len(calls) == last_call:
        os.kill(os.getpid(), signal.SIGKILL)
    with open(folder / f"seen-{os.environ.get('RANK', 0)}.jsonl", "a") as file:
        file.write(json.dumps([first + len(calls), calls[-1]]) + "\\n")
    return simple_loss(denoiser, scheduler, x_0, t, noise)

train(TrainingConfig(output_dir=str(folder / "run"), **options), loss=numbered)
"""
NETWORK = {
    "block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def stream(tmp_path_factory):
    """Options of a run on a stream with the smallest cache."""
    folder = tmp_path_factory.mktemp("stream")
    for shard in range(NUM_SHARDS):
        contents = [png(shard * NUM_ROWS + row) for row in range(NUM_ROWS)]
        write_parquet(folder / f"train-{shard:03d}.parquet", contents)
    (folder / "unet.json").write_text(json.dumps(NETWORK))
    with ShardServer(folder) as server:
        source = f"{server.url}/train-{{000..029}}.parquet"
        least = stream_of(source, folder / "cache").least_bytes
        yield {
            "dataset": source, "streaming": True, "resolution": SIZE,
            "streaming_cache_gb": (least + 1) / 1e9, "unet_config": str(folder / "unet.json"),
            "max_train_steps": STEPS, "batch_size": BATCH, "checkpointing_steps": 5,
            "num_samples": 0, "num_threads": 1, "report_to": ["none"],
        }  # fmt: skip


def arguments(folder, options, last_call=0):
    folder.mkdir(exist_ok=True)
    return ["-c", PROGRAM, str(folder), json.dumps(options), str(last_call)]


def finish(folder, options):
    with forked(arguments(folder, options)) as process:
        output, errors = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, errors
    return output


def seen(folder, rank=0):
    """Numbers by update; an update that was repeated must have the same ones."""
    lines = [json.loads(line) for line in (folder / f"seen-{rank}.jsonl").open()]
    found = dict(lines)
    assert all(found[step] == numbers for step, numbers in lines)
    return [found[step] for step in sorted(found)]


@pytest.fixture(scope="module")
def straight(stream, tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    output = finish(folder, stream)
    assert f"{NUM_SHARDS * NUM_ROWS} of {SIZE}x{SIZE}, RGB" in output
    assert f"from {NUM_SHARDS} shards" in output
    return folder


def test_a_run_reads_every_image_once_an_epoch(straight):
    images = [*chain(*seen(straight))]
    size = NUM_SHARDS * NUM_ROWS
    epochs = [images[start : start + size] for start in range(0, STEPS * BATCH, size)]
    assert [sorted(epoch) for epoch in epochs] == [[*range(size)]] * 2
    assert epochs[0] != epochs[1]


def test_a_run_killed_three_times_repeats_and_loses_no_image(straight, stream, tmp_path):
    folder = tmp_path / "killed"
    for last_call in (8, 9, 7):
        with forked(arguments(folder, stream, last_call)) as process:
            assert process.wait(LIMIT_S) == -signal.SIGKILL
    finish(folder, stream)
    assert seen(folder) == seen(straight)
    assert_equal_bits(checkpoint(folder / "run", STEPS), checkpoint(straight / "run", STEPS))


def test_two_processes_see_the_sequence_of_one(straight, stream, tmp_path):
    folder = tmp_path / "two"
    with forked_ranks(arguments(folder, stream)) as ranks:
        outputs = [rank.communicate(timeout=LIMIT_S) for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0, 0], outputs
    both = [first + second for first, second in zip(seen(folder, 0), seen(folder, 1), strict=True)]
    assert both == seen(straight)


def test_changed_shards_are_refused_and_a_larger_cache_is_not(straight, stream, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(straight, folder)
    extended = stream | {"max_train_steps": STEPS + 1, "streaming_cache_gb": 1.0}
    run = {"output_dir": str(folder / "run")}
    fewer = {"dataset": extended["dataset"].replace("029}", "028}")}
    with pytest.raises(ValueError, match="other components"):
        train(TrainingConfig(**extended | run | fewer), loss=numbered)
    assert train(TrainingConfig(**extended | run), loss=numbered).num_steps == STEPS + 1


def numbered(denoiser, scheduler, x_0, t, noise):
    """A loss with the name of the one in PROGRAM."""
    return simple_loss(denoiser, scheduler, x_0, t, noise)


numbered.__module__ = "__main__"  # part of the name that a resumed run compares


def noted_images():
    """A list, and a loss that adds the images of each batch to it."""
    seen = []

    def noted(denoiser, scheduler, x_0, t, noise):
        seen.append(numbers(x_0))
        return simple_loss(denoiser, scheduler, x_0, t, noise)

    return seen, noted


def write_shards_and_network(folder, num_shards):
    (folder / "unet.json").write_text(json.dumps(NETWORK))
    for shard in range(num_shards):
        write_parquet(folder / f"{shard}.parquet", [png(4 * shard + row) for row in range(4)])


def test_a_streaming_dataset_gives_the_run_of_its_files(tmp_path):
    seen, noted = noted_images()
    write_shards_and_network(tmp_path, 3)
    pattern = str(tmp_path / "*.parquet")
    options = {
        "resolution": SIZE, "unet_config": str(tmp_path / "unet.json"), "batch_size": 3,
        "num_samples": 0, "report_to": ["none"], "lr_scheduler": "constant", "lr_warmup_steps": 0,
    }  # fmt: skip
    named = {"dataset": pattern, "streaming": True, "output_dir": str(tmp_path / "named")}
    train(TrainingConfig(max_train_steps=6, **options | named), loss=noted)
    expected, seen[:] = [*seen], []
    for steps in (2, 6):
        run = {"max_train_steps": steps, "output_dir": str(tmp_path / "passed")}
        rows = datasets.load_dataset("parquet", data_files=pattern, split="train", streaming=True)
        train(TrainingConfig(**options | run), dataset=rows, loss=noted)
    assert seen == expected
    with pytest.raises(ValueError, match="`streaming` needs `resolution`"):
        train(TrainingConfig(output_dir=str(tmp_path / "none")), dataset=rows)


def test_a_stream_with_classes_measures_images_that_it_does_not_train_on(tmp_path):
    seen, noted = noted_images()
    write_shards_and_network(tmp_path, 4)
    result = train(
        TrainingConfig(
            dataset=str(tmp_path / "*.parquet"), streaming=True, resolution=SIZE, batch_size=6,
            unet_config=str(tmp_path / "unet.json"), num_train_timesteps=4, max_train_steps=6,
            class_conditional=True, validation_split=0.3, validation_images=4,
            validation_timesteps=2, evaluate_steps=3, evaluate_num_images=4, calibrate=True,
            evaluate_features="pixels", sample_inference_steps=2, num_samples=0,
            report_to=["none"], output_dir=str(tmp_path / "run"),
        ),
        loss=noted,
    )  # fmt: skip
    # Two of four shards hold the 30 % of the images; the others are read in 4.5 epochs.
    training = sorted({*chain(*seen)})
    assert len(training) == 8
    assert len({number // 4 for number in training}) == 2
    entries = [json.loads(line) for line in result.metrics_file.open()]
    measured = [entry for entry in entries if "evaluation_fd" in entry]
    assert [entry["step"] for entry in measured] == [3, 6]
    assert "validation_bits_per_dim" in entries[-1]
    facts = json.loads((result.model_dir / "unet" / "config.json").read_text())["_ddpm_hf"]
    assert (facts["class_names"], facts["class_counts"]) == (["even", "odd"], [4, 4])
    scheduler = json.loads((result.model_dir / "scheduler" / "scheduler_config.json").read_text())
    assert "x_0_mse" in json.dumps(scheduler)


def test_a_dry_run_of_a_stream_states_its_shards_and_writes_nothing(stream, tmp_path, capsys):
    run = {"output_dir": str(tmp_path / "run"), "dry_run": True}
    assert train(TrainingConfig(**stream | run)).num_steps == 0
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert f"{NUM_SHARDS * NUM_ROWS} of {SIZE}x{SIZE}, RGB, from {NUM_SHARDS} shards" in printed
    assert f"MB in {NUM_SHARDS} shards; the images are checked when read" in printed
    assert "of streamed images in the cache" in printed


def test_the_memory_of_a_stream_does_not_grow_over_ten_epochs(tmp_path):
    for shard in range(20):
        write_parquet(tmp_path / f"train-{shard:02d}.parquet", [png(row) for row in range(20)])
    images = stream_of(tmp_path / "*.parquet", tmp_path / "cache")
    limit = images.least_bytes / 1e9
    images = stream_of(tmp_path / "*.parquet", tmp_path / "cache", cache_gb=limit + 1e-9)
    sequence(images, batch_size=40, stop=20)  # two epochs, for caches and allocators
    before = psutil.Process(os.getpid()).memory_info().rss
    sequence(images, batch_size=40, stop=100)
    assert psutil.Process(os.getpid()).memory_info().rss - before < 20e6


def test_a_spawned_process_reads_the_same_images(tmp_path):
    write_parquet(tmp_path / "a.parquet", [png(row) for row in range(8)])
    training = StreamedTrainingImages(stream_of(tmp_path / "a.parquet", tmp_path / "cache"))
    (batch,) = Batches(8, 0, 8, 0, 1, order=training.order)
    copied = pickle.loads(pickle.dumps(training))
    first, second = (np.stack(each.__getitems__(batch)) for each in (training, copied))
    assert (first == second).all()
    assert Path(copied.source.cache.folder).is_dir()
