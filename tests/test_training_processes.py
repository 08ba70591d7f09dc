"""`ddpm-hf train` in subprocesses: killed and resumed, restarted, and with two ranks."""

import faulthandler
import json
import os
import random
import signal
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
from accelerate.utils import is_port_in_use
from PIL import Image
from processes import (
    LIMIT_S,
    forked,
    forked_ranks,
    free_port,
    rank_environments,
)
from safetensors.torch import load_file
from tiny_runs import assert_equal_bits, metrics

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
TRAINING = Path(__file__).parents[1] / "training"
SCRIPT = [str(TRAINING / "train.py")]
MULTI_NODE = str(TRAINING / "accelerate" / "multi_node.yaml")


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


@pytest.fixture(scope="module")
def straight(photos):
    """The tensors of uninterrupted runs, by number of processes."""
    done = {}

    def of(num_processes):
        if num_processes not in done:
            output = photos.parent / f"straight{num_processes}"
            finish(num_processes, COMMAND, photos, output)
            done[num_processes] = weights(output)
        return done[num_processes]

    return of


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
    program, num_processes, photos, tmp_path, straight
):
    rng = random.Random(5)
    for _ in range(2 if num_processes == 1 else 1):
        with running(num_processes, program, photos, tmp_path / "killed") as processes:
            wait_for_another_checkpoint(tmp_path / "killed", processes[0])
            time.sleep(rng.uniform(0, 0.3))
    output = finish(num_processes, program, photos, tmp_path / "killed")
    assert "resuming after update" in output

    assert_equal_bits(weights(tmp_path / "killed"), straight(num_processes))


MACHINES = [[
    "-m", "accelerate.commands.launch", "--config_file", MULTI_NODE, "--rdzv_backend", "c10d",
    "--num_processes", "2", "--machine_rank", rank, "--main_process_ip", "127.0.0.1",
    "--main_process_port", "PORT", "--num_cpu_threads_per_process", "1",
    "--mixed_precision", "no", "--max_restarts", "1",
    # 150 s: on a busy machine, a launcher may be late by more than the default of 15 s.
    "--rdzv_conf", "keep_alive_max_attempt=30",
] for rank in ("0", "1")]  # fmt: skip


@contextmanager
def launched(launchers, photos, output):
    """The launchers of a training run, one for each machine, with a process each."""
    port, env = str(free_port()), os.environ | {"ACCELERATE_USE_CPU": "true"}
    with ExitStack() as stack:
        processes = []
        for words in launchers:
            # The first launcher refuses to start if the port of the rendezvous is in use, and on
            # one host any launcher may open it.
            while processes and not is_port_in_use(int(port)):
                assert processes[0].poll() is None, processes[0].output()
                time.sleep(0.02)
            program = [port if word == "PORT" else word for word in [*words, *COMMAND]]
            command = arguments(program, photos, output)
            processes.append(stack.enter_context(forked(command, env=env, merged=True)))
        yield processes


def process_of_rank(launchers, rank):
    children = [p for launcher in launchers for p in psutil.Process(launcher.pid).children()]
    return next(p for p in children if p.environ().get("RANK") == str(rank))


@pytest.mark.timeout(600)  # each launch starts its processes twice
def test_a_launch_on_two_machines_restarts_by_itself_and_equals_an_uninterrupted_run(
    photos, tmp_path, straight
):
    """accelerate hands the launch to torchrun, which restarts the processes."""
    faulthandler.cancel_dump_traceback_later()  # `faulthandler_timeout` is shorter
    with launched(MACHINES, photos, tmp_path / "run") as launchers:
        wait_for_another_checkpoint(tmp_path / "run", launchers[0])
        assert all(process.poll() is None for process in launchers), launchers[0].output()
        process_of_rank(launchers, 1).kill()
        outputs = [launcher.communicate()[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "resuming after update" in outputs[0]
    assert_equal_bits(weights(tmp_path / "run"), straight(2))


def test_a_process_or_machine_that_never_comes_is_an_error_within_the_time_limit(photos, tmp_path):
    command = arguments(COMMAND, photos, tmp_path / "run", "--ddp-timeout", "2")
    waits = [*MACHINES[0][:-1], "join_timeout=2"]
    first, second = rank_environments(2)[0], rank_environments(2)[1] | {"LOCAL_RANK": "0"}
    with ExitStack() as stack:
        alone = [
            stack.enter_context(forked(command, env=os.environ | env, merged=True))
            for env in (first, second)
        ]
        (launcher,) = stack.enter_context(launched([waits], photos, tmp_path / "run"))
        for process in alone:
            output = process.communicate()[0]
            assert process.returncode == 1
            assert "\nddpm-hf: error: the 2 processes of this launch did not" in f"\n{output}"
            assert "Traceback" not in output
        assert "RendezvousTimeoutError" in launcher.communicate()[0]
    assert not (tmp_path / "run").exists()


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
    # The gradient of the bias of keys is 0 up to rounding, which Adam enlarges.
    for name in (n for n in one if n.startswith("unet") and not n.endswith("to_k.bias")):
        # The sum over a batch is rounded in another order; Adam divides by its size.
        assert (one[name] - two[name]).abs().mean() < 1e-4, name
    one, two = (metrics(tmp_path / name)[-1] for name in ("one", "two"))
    # The samples differ by rounding to steps of 1/255.
    assert two["evaluation_fd"] == pytest.approx(one["evaluation_fd"], rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere/photos"], "'/nowhere/photos' does not exist"),
        (["PHOTOS", "--split", "trian"], "--split must be one of train, got 'trian'"),
        (["PHOTOS", "--image-column", "img"], "--image-column must be an image column, got 'img'"),
        (["PHOTOS", "--beta-schedule", "cosinus"], "--beta-schedule must be one of"),
        (["PHOTOS", "--learning-rate", "-1"], "--learning-rate must be in (0, 1], got -1"),
        (["PHOTOS", "--unet-config", "PHOTOS/0.png"], "--unet-config PHOTOS/0.png is not"),
        (["PHOTOS", "--config", "PHOTOS/none.yaml"], "cannot read the recipe PHOTOS/none.yaml"),
        (
            ["PHOTOS", "--pretrained", "PHOTOS"],
            "--pretrained 'PHOTOS' cannot be loaded: PHOTOS has no weights",
        ),
        (["PHOTOS", "--output-dir", "PHOTOS/0.png/run"], "--output-dir"),
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
    assert message.replace("PHOTOS", str(photos)) in last
    assert "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("program", "options"),
    [(SCRIPT, ["--split", "trian"]), (COMMAND, [])],
    ids=["no split", "a folder with a model"],
)
def test_invalid_input_to_two_ranks_is_one_line_too(program, options, photos, tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    options = [str(photos), "--output-dir", str(tmp_path / "run"), *options]
    with forked_ranks([*program, *options]) as processes:
        output = "".join(process.communicate(timeout=LIMIT_S)[0] for process in processes)
        assert [process.returncode for process in processes] == [2, 2]
    ours = [line for line in output.splitlines() if line.startswith("ddpm-hf: error:")]
    assert len(ours) == 1, output
    assert "Traceback" not in output
