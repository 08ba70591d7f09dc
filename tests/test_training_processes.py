"""`ddpm-hf train` in subprocesses: killed and resumed, and with two ranks."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import LIMIT_S, run_process, started, started_ranks
from safetensors.torch import load_file
from tiny_runs import metrics

from ddpm_hf.cli import main

pytestmark = pytest.mark.slow

NETWORK = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "dropout": 0.1,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
STEPS = 30
SILENT = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
OPTIONS = ["--max-train-steps", str(STEPS), "--batch-size", "4", "--checkpointing-steps", "5",
           "--num-samples", "2", "--sample-steps", "15", "--sample-inference-steps", "4",
           "--gradient-accumulation-steps", "2"]  # fmt: skip
ONE = [sys.executable, "-m", "ddpm_hf.cli", "train"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
          "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
TWO = [*LAUNCH, "-m", "ddpm_hf", "train"]
SCRIPT = [*LAUNCH, str(Path(__file__).parents[1] / "training" / "train.py")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder.parent / "unet.json").write_text(json.dumps(NETWORK))
    return folder


def command(launcher, photos, output, *more):
    config = ["--unet-config", str(photos.parent / "unet.json"), "--output-dir", str(output)]
    return [*launcher, str(photos), *config, *OPTIONS, *more]


def environment(tmp_path):
    # Without ACCELERATE_USE_CPU, two processes on a CPU are not connected.
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **variables, "HF_HOME": str(tmp_path / "hf")}


def weights(output):
    folder = output / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{file.name}:{name}": value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def finish(arguments, tmp_path):
    done = run_process(arguments, env=environment(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def wait_for_another_checkpoint(output, process):
    reached, began = steps_logged(output), time.monotonic()
    while steps_logged(output) <= reached and process.poll() is None:
        assert time.monotonic() - began < LIMIT_S
        time.sleep(0.02)


def steps_logged(output):
    file = output / "checkpoints"
    return max((int(p.name[5:]) for p in file.glob("step-*")), default=0)


@pytest.mark.parametrize("launcher", [ONE, SCRIPT], ids=["one process", "two processes"])
def test_a_run_killed_at_random_and_resumed_equals_an_uninterrupted_run(launcher, photos, tmp_path):
    finish(command(launcher, photos, tmp_path / "straight"), tmp_path)
    rng = random.Random(5)
    for _ in range(2 if launcher is ONE else 1):
        killed = command(launcher, photos, tmp_path / "killed")
        with started(killed, env=environment(tmp_path), **SILENT) as process:
            wait_for_another_checkpoint(tmp_path / "killed", process)
            time.sleep(rng.uniform(0, 0.3))
    again = finish(command(launcher, photos, tmp_path / "killed"), tmp_path)
    assert "resuming after update" in again.stdout

    straight, killed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)


def test_two_ranks_train_the_same_network_as_one_and_sigterm_stops_both(photos, tmp_path):
    no_dropout = photos.parent / "plain.json"
    no_dropout.write_text(json.dumps({**NETWORK, "dropout": 0.0}))
    plain = ["--unet-config", str(no_dropout), "--evaluate-steps", "15", "--evaluate-num-images",
             "7", "--evaluate-features", "pixels"]  # fmt: skip
    finish(command(ONE, photos, tmp_path / "one", *plain), tmp_path)
    two = command(TWO, photos, tmp_path / "two", *plain)
    with started(two, env=environment(tmp_path), **SILENT) as process:
        wait_for_another_checkpoint(tmp_path / "two", process)
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(LIMIT_S) != 0
    assert 0 < steps_logged(tmp_path / "two") < STEPS
    finish(command(TWO, photos, tmp_path / "two", *plain), tmp_path)

    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in (n for n in one if n.startswith("unet")):
        # The sum over a batch is rounded in another order; Adam divides by its size.
        assert (one[name] - two[name]).abs().mean() < 1e-4, name
    one, two = (metrics(tmp_path / name)[-1] for name in ("one", "two"))
    # The samples differ by rounding to steps of 1/255.
    assert two["evaluation_fd"] == pytest.approx(one["evaluation_fd"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/photos"], "/nowhere/photos"),
        (["PHOTOS", "--split", "trian"], "train"),
        (["PHOTOS", "--image-column", "img"], "image"),
        (["PHOTOS", "--beta-schedule", "cosinus"], "squaredcos_cap_v2"),
        (["PHOTOS", "--learning-rate", "-1"], "learning-rate"),
        (["PHOTOS", "--unet-config", "PHOTOS/0.png"], "unet-config"),
        (["PHOTOS", "--config", "PHOTOS/none.yaml"], "none.yaml"),
        (["PHOTOS", "--pretrained", "PHOTOS"], "pretrained"),
        (["PHOTOS", "--output-dir", "PHOTOS/0.png/run"], "output-dir"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else "",
)
def test_invalid_input_is_one_line_and_status_2_and_writes_nothing(
    arguments, message, photos, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *(a.replace("PHOTOS", str(photos)) for a in arguments)]) == 2
    shown = capfd.readouterr().err
    last = shown.strip().splitlines()[-1]
    assert last.startswith("ddpm-hf: error:")
    assert message in last
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("launcher", "arguments"),
    [
        (SCRIPT, ["PHOTOS", "--split", "trian"]),
        ([sys.executable, "-m", "ddpm_hf", "train"], ["PHOTOS", "IN USE"]),
    ],
    ids=["no split", "no folder"],
)
def test_invalid_input_to_two_ranks_is_one_line_too(launcher, arguments, photos, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    folder = ["--output-dir", str(tmp_path / ("run" if "IN USE" in arguments else "other"))]
    arguments = [a.replace("PHOTOS", str(photos)) for a in arguments if a != "IN USE"]
    command = [*launcher, *arguments, *folder]
    if launcher is SCRIPT:
        done = run_process(command, env=environment(tmp_path))
        output = done.stderr
        assert done.returncode != 0
    else:
        with started_ranks(command, env=environment(tmp_path)) as processes:
            output = "".join(process.communicate(timeout=LIMIT_S)[0] for process in processes)
            assert [process.returncode for process in processes] == [2, 2]
    ours = [line for line in output.splitlines() if line.startswith("ddpm-hf: error:")]
    assert len(ours) == 1, output
    # The launcher prints a traceback about its processes; ours print none.
    assert "ddpm_hf/training/" not in output
