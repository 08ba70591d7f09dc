"""How a run ends: stop signals, errors, and ranks that ended or hang."""

import json
import os
import re
import signal
import time
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
import torch
from checkpoints import tiny_unet
from PIL import Image
from processes import LIMIT_S, forked, forked_ranks
from tiny_runs import assert_equal_bits, checkpoint

from ddpm_hf import ConfigError, TrainingConfig, train
from ddpm_hf.training import TrainingError, rank_coordination
from ddpm_hf.training.rank_coordination import roll_call_s

TRAIN = ["-m", "ddpm_hf", "train"]
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1]


def images():
    generator = torch.Generator().manual_seed(0)
    return list(torch.rand(12, 3, 8, 8, generator=generator) * 2 - 1)


class FailingImages:
    """Images that run `action` at the read number `at_read`."""

    def __init__(self, at_read, action):
        self.images, self.at_read, self.action = images(), at_read, action
        self.reads = 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.reads += 1
        if self.reads == self.at_read:
            self.action()
        return self.images[index]


def run(folder, action=None, dataset=None, **options):
    """Train for six updates; `action` runs in the third one."""
    unet, updates = tiny_unet(in_channels=3), []

    def count(module, args):
        updates.extend([1] if module.training else [])
        if len(updates) == 3 and action is not None:
            action()

    unet.register_forward_pre_hook(count)
    few = {"max_train_steps": 6, "batch_size": 4, "checkpointing_steps": 6, "num_samples": 0}
    config = TrainingConfig(output_dir=str(folder), learning_rate=1e-4, **(few | options))
    return train(config, unet=unet, dataset=dataset or images())


def newest_step(folder):
    steps = [int(path.name[5:]) for path in folder.glob("checkpoints/step-*")]
    return max(steps, default=0)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.parametrize("times", [1, 2], ids=["once", "to the process and to its group"])
def test_a_stop_signal_ends_the_run_after_saving_the_update(tmp_path, number, times):
    def send():
        for _ in range(times):
            signal.raise_signal(number)

    before = signal.getsignal(number)
    result = run(tmp_path, send)
    assert result.stopped_by == number
    assert result.exit_status == 128 + number
    assert newest_step(tmp_path) == result.num_steps == 3
    assert signal.getsignal(number) is before


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_an_ignored_signal_stays_ignored(tmp_path, number):
    """`nohup ddpm-hf train ... &` depends on it."""
    before = signal.signal(number, signal.SIG_IGN)
    try:
        result = run(tmp_path, lambda: signal.raise_signal(number))
    finally:
        signal.signal(number, before)
    assert result.stopped_by is None
    assert result.num_steps == 6


def test_a_second_stop_signal_ends_the_process_at_once(tmp_path):
    def ask_twice():
        signal.raise_signal(signal.SIGINT)
        time.sleep(1.1)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, ask_twice)


def test_unconnected_processes_are_refused_with_the_variable_to_set(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as set by torchrun
    with pytest.raises(ConfigError, match="ACCELERATE_USE_CPU=true before the launch"):
        run(tmp_path / "run")


@pytest.mark.parametrize(
    ("launch", "name"), [("DEEPSPEED", "DeepSpeed"), ("FSDP", "FSDP"), ("MEGATRON_LM", "Megatron")]
)
def test_a_launch_that_shards_the_weights_is_refused(tmp_path, monkeypatch, launch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{launch}", "true")
    with pytest.raises(ValueError, match=f"asks for {name}.*multi_gpu"):
        run(tmp_path / "run")
    assert not (tmp_path / "run").exists()


def raise_an_error():
    raise KeyError("no such row")


def kill_the_process():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("workers", "action", "message"),
    [
        (0, raise_an_error, r"image \d+ cannot be read: KeyError: 'no such row'"),
        (1, raise_an_error, r"image \d+ cannot be read: KeyError: 'no such row'"),
        # The error of torch depends on whether the worker was sending images.
        (
            1,
            kill_the_process,
            r"a process that reads images ended while rows (\d+, ){3}\d+ were due",
        ),
    ],
    ids=["raised", "raised in a worker", "a killed worker"],
)
def test_the_updates_before_an_unreadable_image_are_saved(tmp_path, workers, action, message):
    reads = FailingImages(None, None)
    run(tmp_path / "straight", dataset=reads)
    # While update 4 is read; a worker starts with the count of its parent.
    at_read = reads.reads - 24 + 3 * 4 + 2
    failing = FailingImages(at_read, action)
    options = {"dataloader_num_workers": workers}
    with pytest.raises(TrainingError, match=rf"^no images for update \d: .*{message}") as failure:
        run(tmp_path / "failed", dataset=failing, **options)
    assert "\n" not in str(failure.value)
    saved = newest_step(tmp_path / "failed")
    assert f"update {saved + 1}: " in str(failure.value)
    # The images that a killed worker has not sent are lost.
    assert saved in ((1, 2, 3) if action is kill_the_process else (3,))
    run(tmp_path / "failed", **options)
    assert_equal_bits(checkpoint(tmp_path / "failed", 6), checkpoint(tmp_path / "straight", 6))


@pytest.mark.slow
def test_an_unreadable_first_image_leaves_no_checkpoint(tmp_path):
    reads = FailingImages(None, None)
    run(tmp_path / "straight", dataset=reads)
    failing = FailingImages(reads.reads - 24 + 2, raise_an_error)
    with pytest.raises(TrainingError, match=r"^no images for update 1: "):
        run(tmp_path / "failed", dataset=failing)
    assert newest_step(tmp_path / "failed") == 0


# Several ranks without a launcher, as in `training/slurm.sh`.


@pytest.fixture
def photos(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(tmp_path / "photos" / f"{i}.png")
    network = tiny_unet(in_channels=3).config
    public = {key: value for key, value in network.items() if not key.startswith("_")}
    (tmp_path / "unet.json").write_text(json.dumps(public))
    return tmp_path / "photos"


def endless(photos, output_dir):
    return [
        str(photos), "--output-dir", str(output_dir),
        "--unet-config", str(photos.parent / "unet.json"),
        "--max-train-steps", "100000", "--checkpointing-steps", "100000", "--logging-steps", "1",
        "--batch-size", "4", "--num-samples", "0", "--ddp-timeout", "3",
    ]  # fmt: skip


def wait_until_training(output_dir, process):
    began, file = time.monotonic(), output_dir / "metrics.jsonl"
    while not file.exists() or not file.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() - began < LIMIT_S
        time.sleep(0.02)


@pytest.mark.parametrize("timeout_s", [12.0, 15.0, 300.0, 1e6])
def test_a_missing_rank_is_named_within_twice_the_timeout(timeout_s):
    """If the first rank hangs, its store does not answer the roll call."""
    answered_s = roll_call_s(timeout_s) + rank_coordination._ANSWER_S
    assert timeout_s + answered_s <= 2 * timeout_s


@pytest.mark.slow
def test_a_hanging_rank_ends_the_run_with_one_line_that_names_it(photos, tmp_path):
    """Two runs side by side: in one the first rank hangs, in the other the second."""
    with ExitStack() as stack:
        runs = [
            stack.enter_context(forked_ranks([*TRAIN, *endless(photos, tmp_path / name)]))
            for name in "01"
        ]
        for frozen, processes in enumerate(runs):
            wait_until_training(tmp_path / str(frozen), processes[0])
            processes[frozen].send_signal(signal.SIGSTOP)
        for frozen, processes in enumerate(runs):
            output = processes[1 - frozen].communicate(timeout=LIMIT_S)[0]
            assert processes[1 - frozen].returncode == 1
            assert re.search(f"ddpm-hf: error: rank {frozen} of 2 processes .* hangs", output)
            assert "Traceback" not in output


# The main process stops while the other one waits for it: before that, connecting would time out.
PREPARE_TOGETHER = """
import os, signal, time
from accelerate import PartialState
from ddpm_hf.training import ProcessError, main_first
state = PartialState(cpu=True)
def prepare():
    time.sleep(5 if state.is_main_process else 0)  # the other process finds the result in the cache
    return "ready"
def hang():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGSTOP)
print(main_first(state, prepare, timeout_s=3))
try:
    main_first(state, hang, timeout_s=3)
except ProcessError as error:
    print(error.is_reporting_rank, error)
"""


# One rank is lost. The next one waits for it, and notices a killed process at once; the third one
# waits for the second one, and notices nothing before its timeout.
LOSE_A_RANK = """
import os, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from accelerate import PartialState
from ddpm_hf.training import ProcessError, rank_coordination
rank_coordination._ROLL_CALL_S = 3.0  # shorter than the timeout, as 10 s are in a run
state, timeout_s = PartialState(cpu=True, timeout=timedelta(seconds=60)), 4
group = dist.new_group(timeout=timedelta(seconds=timeout_s))
lost, number = map(int, sys.argv[1:])
before = (state.process_index - 1) % 3
for rank in (lost + 1) % 3, (lost + 2) % 3:  # connects them
    if rank == state.process_index:
        dist.recv(torch.ones(1), before, group=group)
    elif state.process_index == (rank - 1) % 3:
        dist.send(torch.ones(1), rank, group=group)
state.wait_for_everyone()
if state.process_index == lost:
    os.kill(os.getpid(), number)
try:
    with rank_coordination.name_missing_ranks(state, timeout_s):
        dist.recv(torch.ones(1), before, group=group)
except ProcessError as error:
    print(error.is_reporting_rank, error, flush=True)
os._exit(0)
"""
LOSSES = [(0, "SIGSTOP"), (0, "SIGKILL"), (1, "SIGKILL"), (2, "SIGKILL")]


@pytest.fixture(scope="module")
def outputs():
    """Output of the remaining ranks, by lost rank and signal; the groups run side by side."""
    with ExitStack() as stack:
        groups = {
            (lost, name): stack.enter_context(
                forked_ranks(["-c", LOSE_A_RANK, str(lost), str(int(getattr(signal, name)))], 3)
            )
            for lost, name in LOSSES
        }
        groups["main"] = stack.enter_context(forked_ranks(["-c", PREPARE_TOGETHER]))
        return {
            key: [
                process.communicate(timeout=LIMIT_S)[0]
                for rank, process in enumerate(processes)
                if rank != (0 if key == "main" else key[0])
            ]
            for key, processes in groups.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "name"), LOSSES)
def test_every_remaining_rank_names_the_lost_one_and_the_lowest_reports_it(outputs, lost, name):
    for output, reports in zip(outputs[lost, name], ("True", "False"), strict=True):
        assert f"{reports} rank {lost} of 3 processes has ended" in output
    # The rank that waited for a killed one knows that it does not hang.
    is_certain = any("has ended. Run" in output for output in outputs[lost, name])
    assert is_certain == (name == "SIGKILL")


@pytest.mark.slow
def test_ranks_wait_for_a_slow_main_process_but_not_for_a_hanging_one(outputs):
    (output,) = outputs["main"]
    assert re.search(r"^ready$.*^True rank 0 of 2 processes", output, re.M | re.S), output


# Prints, when the process group is destroyed, whether a gradient reducer is left: it would hold the
# last reference to the group, and the process would never end.
REDUCERS = """
import gc, os, signal, socket, sys
import torch, torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.nn.parallel import DistributedDataParallel
import test_endings

destroy = dist.destroy_process_group
def print_and_destroy(group=None):
    gc.collect()  # wrappers of earlier runs
    wrappers = [o for o in gc.get_objects() if type(o) is DistributedDataParallel]
    if group is None:
        print(how, [w.reducer for w in wrappers], flush=True)
    destroy(group)
dist.destroy_process_group = print_and_destroy

def fail():
    raise RuntimeError("broken")
def stop():
    os.kill(os.getpid(), signal.SIGTERM)
for how, action in {"end": None, "stop": stop, "error": fail}.items():
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    try:
        result = test_endings.run(f"{sys.argv[1]}/{how}", action)
        print("stopped by", result.stopped_by)
    except RuntimeError as error:
        print("error", error)
    AcceleratorState._reset_state(reset_partial_state=True)
"""


@pytest.mark.slow
def test_no_gradient_reducer_outlives_the_process_group(tmp_path):
    arguments = ["-c", REDUCERS, str(tmp_path / "run")]
    with forked_ranks(arguments, cwd=Path(__file__).parent) as processes:
        for process in processes:
            output = process.communicate(timeout=LIMIT_S)[0]
            assert process.returncode == 0, output
            lines = re.findall("^(?:end|stop|error|stopped by) .*", output, re.MULTILINE)
            assert lines == [
                "end [None]", "stopped by None", "stop [None]", "stopped by 15",
                "error [None]", "error broken",
            ]  # fmt: skip


@pytest.mark.slow
def test_a_clean_stop_of_a_launch_is_saved_and_prints_no_traceback(photos, tmp_path):
    """With one process: test_training_processes.py stops two together."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    command = [*launch, *TRAIN, *endless(photos, tmp_path / "run")]
    env = os.environ | {"ACCELERATE_USE_CPU": "true"}
    with forked(command, env=env, cwd=tmp_path, merged=True) as launcher:
        wait_until_training(tmp_path / "run", launcher)
        (child,) = psutil.Process(launcher.pid).children()
        child.terminate()
        output = launcher.communicate(timeout=LIMIT_S)[0]
    assert launcher.returncode == 0, output
    assert "Traceback" not in output
    assert f"stopped    after update {newest_step(tmp_path / 'run')}," in output
