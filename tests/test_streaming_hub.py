"""Streaming a dataset of a Hub on the loopback interface: faults, the token, and its revision."""

import itertools
import json
from pathlib import Path

import pytest
from test_streaming import png, write_parquet
from test_streaming_runs import NETWORK

pytestmark = pytest.mark.slow

SHARDS, ROWS = 3, 4
SETUP = """
import sys
if tests not in sys.path:
    sys.path.insert(0, tests)
from ddpm_hf.data import remote_files
from test_streaming import SIZE, numbers
limits = remote_files.WAITS_S, remote_files.TIMEOUT_S
remote_files.WAITS_S, remote_files.TIMEOUT_S = (0.01,) * 4, 1.5
"""
OPEN = """
from ddpm_hf.data.shard_files import find_shards
from ddpm_hf.data.streaming import open_stream
import numpy as np
images = open_stream(find_shards(repo), resolution=SIZE, cache_dir=cache)
result = len(images)
"""
READ = """
result = numbers(images.read(range(len(images)), np.zeros((0, 2), np.float32)))
"""
# Trains up to update `steps`; the result is the numbers in the images of each update.
TRAIN = """
from ddpm_hf import TrainingConfig, train
from ddpm_hf.losses import simple_loss
seen = []
def numbered(denoiser, scheduler, x_0, t, noise):
    seen.append(numbers(x_0))
    return simple_loss(denoiser, scheduler, x_0, t, noise)
train(
    TrainingConfig(
        dataset=repo, streaming=True, resolution=SIZE, unet_config=network, batch_size=2,
        max_train_steps=steps, num_samples=0, num_threads=1, report_to=["none"], output_dir=folder,
        lr_scheduler="constant", lr_warmup_steps=0,
    ),
    loss=numbered,
)
result = seen
"""


def shard(tmp_path: Path, first: int) -> bytes:
    write_parquet(tmp_path / "shard.parquet", [png(first + row) for row in range(ROWS)])
    return (tmp_path / "shard.parquet").read_bytes()


_NUMBERS = itertools.count()


@pytest.fixture
def repo(hub, tmp_path):
    """A private dataset of a new name."""
    names = [f"data/train-{number:05d}-of-{SHARDS:05d}.parquet" for number in range(SHARDS)]
    files = {name: shard(tmp_path, ROWS * number) for number, name in enumerate(names)}
    return hub.add_repo(f"user/streamed{next(_NUMBERS)}", files, kind="dataset", private=True).id


@pytest.fixture
def client(hub_process, repo):
    hub_process.run(SETUP, tests=Path(__file__).parent, repo=repo)
    yield hub_process
    hub_process.run("remote_files.WAITS_S, remote_files.TIMEOUT_S = limits")


def test_shards_that_fail_break_off_or_stall_are_fetched_again(client, hub, repo, tmp_path):
    every = [*range(SHARDS * ROWS)]
    for fault in ({"status": 503}, {"kind": "cut"}, {"kind": "slow", "seconds": 5}):
        assert client.run(OPEN, cache=tmp_path / str(fault)) == len(every)
        before = hub.count("GET /objects/")
        hub.fault("GET /objects/", **fault)
        assert client.run(READ) == every
        assert hub.count("GET /objects/") == before + SHARDS + 1
    assert hub.count(f"GET /datasets/{repo}/resolve/[0-9a-f]{{40}}/data") > 0
    assert not hub.tokens_at_storage


def test_a_streaming_dataset_of_the_hub_is_read_from_its_commit(client, repo):
    code = """
import datasets
from ddpm_hf.data.shard_files import find_shards, shards_of
rows = datasets.load_dataset(repo, split="train", streaming=True)
found = find_shards(repo)
result = [shards_of(rows).locations, found.locations, found.revision]
try:
    find_shards("hf://datasets/user/none/a.tar")
except ValueError as error:
    result.append(str(error))
"""
    streamed, found, revision, message = client.run(code)
    assert streamed == found
    assert all(f"/{repo}/resolve/{revision}/data/" in location for location in found)
    assert message.startswith("hf://datasets/user/none/a.tar is not found: ")


def test_a_resumed_run_reads_the_commit_that_it_started_with(client, hub, repo, tmp_path):
    (tmp_path / "unet.json").write_text(json.dumps(NETWORK))
    options = {"network": tmp_path / "unet.json", "cache": tmp_path / "cache"}
    straight = client.run(TRAIN, steps=6, folder=tmp_path / "straight", **options)
    begun = client.run(TRAIN, steps=3, folder=tmp_path / "run", **options)
    changed = {f"data/train-00000-of-{SHARDS:05d}.parquet": shard(tmp_path, 100)}
    hub.edit(repo, changed, kind="dataset")
    assert begun + client.run(TRAIN, steps=6, folder=tmp_path / "run", **options) == straight
    assert max(map(max, client.run(TRAIN, steps=6, folder=tmp_path / "new", **options))) >= 100
