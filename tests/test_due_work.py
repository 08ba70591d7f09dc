"""Measurements, grids and the best model that are due at the update where a run stops."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from processes import forked_ranks
from tiny_runs import Images, few_steps, metrics, on_grid, tiny_config, tiny_unet

from ddpm_hf import train
from ddpm_hf.training import artifacts, loop
from ddpm_hf.training.periodic_evaluation import PeriodicEvaluation

pytestmark = [pytest.mark.slow, few_steps]
OPTIONS = {
    "max_train_steps": 6, "validation_split": "0.3", "validation_steps": 2,
    "validation_timesteps": 4, "num_train_timesteps": 20, "keep_best": True,
    "evaluate_steps": 3, "evaluate_num_images": 4, "evaluate_features": "pixels",
    "sample_inference_steps": 3, "num_samples": 4, "sample_steps": 2, "checkpointing_steps": 100,
    "logging_steps": 4, "learning_rate": 0.05,
}  # fmt: skip
MEASURED = ("validation_bits_per_dim", "validation_standard_error", "evaluation_fd")


def run(folder, dataset=None, **options):
    config = tiny_config(folder, **OPTIONS | options)
    return train(config, unet=tiny_unet(), dataset=dataset or on_grid())


def work(folder):
    """Everything that was due: measurements by update, grids, the best and the last model."""
    values = {
        entry["step"]: {key: entry[key] for key in MEASURED if key in entry}
        for entry in metrics(folder)
    }
    pictures = [*(folder / "samples").iterdir(), folder / "model" / "samples.png"]
    grids = {path.name: path.read_bytes() for path in pictures}
    return (
        {step: measured for step, measured in values.items() if measured}, grids,
        facts_of(folder),
    )  # fmt: skip


def facts_of(folder):
    """What the best and the last model record."""
    names = ("steps", "metrics", "kept_by")
    facts = [
        json.loads((folder / name / "training.json").read_text()) for name in ("best", "model")
    ]
    return [{name: fact.get(name) for name in names} for fact in facts]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    run(folder)
    return work(folder)


def stop():
    os.kill(os.getpid(), signal.SIGTERM)


# During updates 1, 2 (validation and grid), 3 (distance) and 6 (all of them).
@pytest.mark.parametrize("read", [4, 8, 12, 24])
def test_a_stop_at_any_update_leaves_nothing_out(read, straight, tmp_path):
    assert run(tmp_path, dataset=Images(on_grid(), read, stop)).stopped_by
    run(tmp_path)
    assert work(tmp_path) == straight
    steps = [entry["step"] for entry in metrics(tmp_path)]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("call", [1, 2])
def test_an_interrupted_measurement_is_made_up(call, straight, tmp_path, monkeypatch):
    calls, sample = [], PeriodicEvaluation._sample_features

    def stopping(self):
        calls.append(1)
        if len(calls) == call:
            stop()
        return sample(self)

    monkeypatch.setattr(PeriodicEvaluation, "_sample_features", stopping)
    assert run(tmp_path).num_steps == 3 * call
    run(tmp_path)
    assert work(tmp_path) == straight


def test_the_best_model_by_the_frechet_distance_survives_stops(tmp_path):
    """Stopped at both updates where the distance is due, the last one included."""
    by_distance = {"best_metric": "fd", "validation_split": None, "num_samples": 0}
    run(tmp_path / "straight", **by_distance)
    for read in (12, 12):
        run(tmp_path / "stopped", dataset=Images(on_grid(), read, stop), **by_distance)
    run(tmp_path / "stopped", **by_distance)
    straight, stopped = (facts_of(tmp_path / name) for name in ("straight", "stopped"))
    assert straight == stopped
    assert straight[0]["kept_by"] == "fd"
    assert [metric["type"] for metric in straight[0]["metrics"]] == ["fd", "copies"]


@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_interrupted_grid_is_made_up(call, straight, tmp_path, monkeypatch):
    calls, draw = [], artifacts.draw_share

    def stopping(*args):
        calls.append(1)
        if len(calls) == call:
            stop()
        return draw(*args)

    monkeypatch.setattr(artifacts, "draw_share", stopping)
    assert run(tmp_path).num_steps == 2 * call
    run(tmp_path)
    assert work(tmp_path) == straight


RANK = """
import os, sys
from pathlib import Path
import test_due_work
from tiny_runs import Images, on_grid
images, (folder, read) = on_grid(), sys.argv[1:]
if read != "0" and os.environ["RANK"] == "1":
    images = Images(images, int(read), test_due_work.stop)
result = test_due_work.run(Path(folder), images)
print("updates:", result.num_steps)
"""


def run_ranks(folder, read=0):
    """Train on two ranks; rank 1 is stopped at its read number `read`. Returns the updates."""
    code = ["-c", RANK, str(folder), str(read)]
    with forked_ranks(code, cwd=Path(__file__).parent) as processes:
        outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    (updates,) = {int(output.rpartition("updates:")[2]) for output in outputs}
    return updates


def test_work_that_two_ranks_leave_out_is_made_up(tmp_path):
    assert run_ranks(tmp_path / "straight") == 6
    assert run_ranks(tmp_path / "stopped", read=24) == 3
    assert metrics(tmp_path / "stopped")[-1].keys().isdisjoint(MEASURED)
    assert run_ranks(tmp_path / "stopped") == 6
    assert work(tmp_path / "stopped") == work(tmp_path / "straight")


def test_a_stop_while_work_is_made_up_makes_no_update(straight, tmp_path, monkeypatch):
    run(tmp_path, dataset=Images(on_grid(), 4 * 4, stop))
    before = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    with monkeypatch.context() as patch:
        draw = artifacts.draw_share
        patch.setattr(artifacts, "draw_share", lambda *args: (stop(), draw(*args))[1])
        patch.setattr(PeriodicEvaluation, "_sample_features", lambda self: (stop(), 1 / 0))
        run(tmp_path)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == before
    run(tmp_path)
    assert work(tmp_path) == straight


def test_a_kill_between_checkpoint_and_grid_leaves_nothing_out(straight, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*args):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.Artifacts, "draw_samples", kill)
        with pytest.raises(Killed):
            run(tmp_path, checkpointing_steps=2)
    run(tmp_path)
    assert work(tmp_path) == straight


@pytest.mark.parametrize("step", [1, 2, 3])
def test_the_first_loss_after_a_resume_covers_the_updates_since_the_entry_before(
    step, tmp_path, monkeypatch
):
    """The run is killed after update 3, and resumes from the checkpoint of update 2."""
    losses, real = [], loop.train_step

    def recording(run, batches, update):
        result = real(run, batches, update)
        losses.append((update + 1, result[0].item()))
        return result

    class Killed(BaseException):
        pass

    def kill():
        raise Killed

    monkeypatch.setattr(loop, "train_step", recording)
    options = {"checkpointing_steps": step, "validation_split": None, "evaluate_steps": None,
               "num_samples": 0, "keep_best": False, "logging_steps": 6}  # fmt: skip
    images = Images(on_grid(), 4 * 5, kill)
    with pytest.raises(BaseException):  # noqa: B017, PT011
        run(tmp_path, dataset=images, **options)
    run(tmp_path, **options)
    by_update, last = dict(losses), 0
    for entry in metrics(tmp_path):
        covered = [by_update[update] for update in range(last + 1, entry["step"] + 1)]
        assert entry["loss"] == pytest.approx(torch.tensor(covered).mean().item(), rel=1e-5)
        last = entry["step"]
    assert last == 6
