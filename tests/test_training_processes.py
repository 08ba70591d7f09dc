"""`ddpm-hf train` in subprocesses: killed and resumed, and with two ranks."""

import json
import os
import random
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import LIMIT_S, forked, forked_ranks, run_process
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
OPTIONS = ["--max-train-steps", str(STEPS), "--batch-size", "4", "--checkpointing-steps", "5",
           "--num-samples", "2", "--sample-steps", "15", "--sample-inference-steps", "4",
           "--gradient-accumulation-steps", "2"]  # fmt: skip
COMMAND = ["-m", "ddpm_hf", "train"]
SCRIPT = [str(Path(__file__).parents[1] / "training" / "train.py")]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
          "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
          "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder.parent / "unet.json").write_text(json.dumps(NETWORK))
    return folder


def arguments(program, photos, output, *more):
    config = ["--unet-config", str(photos.parent / "unet.json"), "--output-dir", str(output)]
    return [*program, str(photos), *config, *OPTIONS, *more]


@contextmanager
def running(num_processes, *given):
    """The processes of a run of `python ARGUMENTS`, on one or several ranks."""
    if num_processes == 1:
        with forked(arguments(*given)) as process:
            yield [process]
    else:
        with forked_ranks(arguments(*given), num_processes) as processes:
            yield processes


def finish(num_processes, *given):
    """Standard output of the first process of a run that ends with status 0."""
    with running(num_processes, *given) as processes:
        outputs = [process.communicate(timeout=LIMIT_S) for process in processes]
        assert [process.returncode for process in processes] == [0] * num_processes, outputs
    return outputs[0][0]


def weights(output):
    folder = output / "checkpoints" / f"step-{STEPS:08d}"
    return {
        f"{file.name}:{name}": value
        for file in folder.glob("*.safetensors")
        for name, value in load_file(file).items()
    }


def wait_for_another_checkpoint(output, process):
    reached, began = steps_logged(output), time.monotonic()
    while steps_logged(output) <= reached and process.poll() is None:
        assert time.monotonic() - began < LIMIT_S
        time.sleep(0.02)


def steps_logged(output):
    file = output / "checkpoints"
    return max((int(p.name[5:]) for p in file.glob("step-*")), default=0)


@pytest.mark.parametrize(
    ("program", "num_processes"),
    [(COMMAND, 1), (SCRIPT, 2)],
    ids=["one process", "two processes"],
)
def test_a_run_killed_at_random_and_resumed_equals_an_uninterrupted_run(
    program, num_processes, photos, tmp_path
):
    finish(num_processes, program, photos, tmp_path / "straight")
    rng = random.Random(5)
    for _ in range(2 if num_processes == 1 else 1):
        with running(num_processes, program, photos, tmp_path / "killed") as processes:
            wait_for_another_checkpoint(tmp_path / "killed", processes[0])
            time.sleep(rng.uniform(0, 0.3))
    output = finish(num_processes, program, photos, tmp_path / "killed")
    assert "resuming after update" in output

    straight, killed = weights(tmp_path / "straight"), weights(tmp_path / "killed")
    assert straight.keys() == killed.keys()
    assert all(torch.equal(straight[name], killed[name]) for name in straight)


def test_two_ranks_train_the_same_network_as_one_and_sigterm_stops_both(photos, tmp_path):
    no_dropout = photos.parent / "plain.json"
    no_dropout.write_text(json.dumps({**NETWORK, "dropout": 0.0}))
    plain = ["--unet-config", str(no_dropout), "--evaluate-steps", "15", "--evaluate-num-images",
             "7", "--evaluate-features", "pixels"]  # fmt: skip
    finish(1, COMMAND, photos, tmp_path / "one", *plain)
    two = (2, COMMAND, photos, tmp_path / "two", *plain)
    with running(*two) as processes:
        wait_for_another_checkpoint(tmp_path / "two", processes[0])
        for process in processes:
            process.send_signal(signal.SIGTERM)
        assert [process.wait(LIMIT_S) for process in processes] == [128 + signal.SIGTERM] * 2
    assert 0 < steps_logged(tmp_path / "two") < STEPS
    finish(*two)

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


@pytest.mark.parametrize("launched", [True, False], ids=["no split", "no folder"])
def test_invalid_input_to_two_ranks_is_one_line_too(launched, photos, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    if launched:
        options = [str(photos), "--split", "trian", "--output-dir", str(tmp_path / "other")]
        # Without the variable, two processes on a CPU are not connected.
        env = os.environ | {"ACCELERATE_USE_CPU": "true"}
        done = run_process([*LAUNCH, *SCRIPT, *options], env=env)
        output = done.stderr
        assert done.returncode != 0
    else:
        options = [str(photos), "--output-dir", str(tmp_path / "run")]  # has a model
        with forked_ranks([*COMMAND, *options]) as processes:
            output = "".join(process.communicate(timeout=LIMIT_S)[0] for process in processes)
            assert [process.returncode for process in processes] == [2, 2]
    ours = [line for line in output.splitlines() if line.startswith("ddpm-hf: error:")]
    assert len(ours) == 1, output
    # The launcher prints a traceback about its processes; ours print none.
    assert "ddpm_hf/training/" not in output
