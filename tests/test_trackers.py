"""Experiment trackers of a run: real trackio, MLflow and TensorBoard, offline."""

import json
import logging
import os
import shutil
import sqlite3
import threading
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from accelerate.utils import LoggerType
from tiny_runs import metrics, on_grid, run, tiny_config

from ddpm_hf.training import ConfigError, trackers
from ddpm_hf.training.options import TRACKERS
from ddpm_hf.training.trackers import TrackedRun, Trackers, public_config, requested_trackers

CANARY = "hf_" + "canary" * 5


def test_all_trackers_of_accelerate_can_be_named():
    assert {*TRACKERS, "all"} == set(LoggerType.list())


@pytest.mark.parametrize("names", ["trackio,mlflow", "trackio mlflow", ["trackio, mlflow"]])
def test_trackers_are_separated_by_commas_or_spaces(names, tmp_path):
    assert tiny_config(tmp_path, report_to=names).report_to == ["trackio", "mlflow"]


def test_an_unknown_tracker_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ConfigError, match=r"`report_to` must be one of \['all', 'none'.*trackio"):
        tiny_config(tmp_path, report_to="trackoi")


def test_none_turns_all_trackers_off_and_all_means_the_installed_ones():
    assert requested_trackers(["none"]) == []
    assert "tensorboard" in requested_trackers(["all"])
    assert requested_trackers(["wandb", "wandb"]) == ["wandb"]


def test_the_configuration_in_trackers_has_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    options = {"dataset": "https://me:pass@host/a?sig=1", "run_name": CANARY, "batch_size": 4}
    public = public_config(options | {"pretrained": None, "report_to": ["trackio", "mlflow"]})
    assert public == {
        "dataset": "https://[hidden]@host/a?[hidden]",
        "run_name": "[hidden]",
        "batch_size": 4,
        "report_to": "trackio, mlflow",
    }


@pytest.mark.slow
def test_missing_trackers_are_warnings_and_the_run_continues(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    assert run(tmp_path, report_to="all,comet_ml,swanlab").num_steps == 6
    assert "comet_ml is not installed: pip install comet-ml" in caplog.text
    assert "swanlab is not installed: pip install swanlab" in caplog.text


@pytest.mark.parametrize("name", TRACKERS)
def test_a_tracker_that_is_not_installed_is_a_warning(name, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "get_available_trackers", lambda: [])
    tracked = TrackedRun(tmp_path, tmp_path / "tracking.json", "project", None, {})
    tracking = Trackers([name], tracked)
    tracking.log(1, {"loss": 2.0})
    tracking.close()
    assert f"the tracker {name} is not installed: pip install" in caplog.text


class Recorder(GeneralTracker):
    """Tracker that keeps its entries; `block` holds up its start."""

    name, requires_logging_directory, tracker = "recorder", False, None

    def __init__(self, project, block=None, error=None):
        self.entries, self.is_finished, self.block, self.error = [], False, block, error

    def start(self):
        if self.block:
            self.block.wait(30)
        if self.error:
            raise self.error

    def log(self, values, step=None):
        self.entries.append((step, values))

    def finish(self):
        self.is_finished = True


@pytest.fixture
def track(tmp_path, monkeypatch):
    """Start the given trackers under names that `Trackers` knows."""

    def start(*recorders, **facts):
        names = TRACKERS[-len(recorders) :]
        monkeypatch.setattr(trackers, "get_available_trackers", lambda: names)
        for name, recorder in zip(names, recorders, strict=True):
            monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, recorder_class(recorder))
        tracked = TrackedRun(tmp_path, tmp_path / "tracking.json", "project", None, {}, **facts)
        return Trackers(names, tracked)

    return start


def recorder_class(recorder):
    class Same(Recorder):
        def __new__(cls, project, **_):
            return recorder

        def __init__(self, *_, **__):
            pass

    return Same


def test_a_tracker_that_fails_does_not_stop_the_others(track, caplog):
    failing, working = Recorder("", error=RuntimeError(f"offline, {CANARY}")), Recorder("")
    tracking = track(failing, working)
    tracking.log(1, {"loss": 2.0})
    tracking.close()
    assert working.entries == [(1, {"loss": 2.0})]
    assert working.is_finished
    assert "failed and is not used any more: RuntimeError: offline, [hidden]" in caplog.text


def test_a_tracker_that_hangs_delays_neither_the_run_nor_its_end(track, caplog):
    release = threading.Event()
    tracking = track(Recorder("", block=release))
    tracking.log(1, {"loss": 2.0})
    tracking.close(timeout_s=0.1)
    release.set()
    assert "did not finish in time" in caplog.text


def test_a_tracker_without_room_for_entries_is_given_up(track, caplog, monkeypatch):
    monkeypatch.setattr(trackers, "_MAX_PENDING", 2)
    release = threading.Event()
    tracking = track(Recorder("", block=release))
    for step in range(1, 5):
        tracking.log(step, {"loss": 2.0})
    release.set()
    assert "2 entries wait to be sent" in caplog.text


def test_entries_that_were_sent_before_a_kill_are_not_sent_again(track):
    track(Recorder("")).close()  # makes the tracked run known
    recorder = Recorder("")
    tracking = track(recorder, step=4, sent_until=6)
    for step in range(4, 9):
        tracking.log(step, {})
    tracking.close()
    assert [step for step, _ in recorder.entries] == [4, 7, 8]


def test_a_run_that_starts_again_without_a_checkpoint_is_tracked_as_a_new_one(track, tmp_path):
    track(Recorder("")).close()
    first = json.loads((tmp_path / "tracking.json").read_text())["id"]
    recorder = Recorder("")
    tracking = track(recorder, step=0, sent_until=6)
    tracking.log(1, {})
    tracking.close()
    assert [step for step, _ in recorder.entries] == [1]
    assert json.loads((tmp_path / "tracking.json").read_text())["id"] != first


def trackio_series(folder: Path) -> list[tuple[str, int, str]]:
    """Run, update and JSON of all entries of the project `folder.name`."""
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{folder.name}.db") as database:
        return database.execute(
            "SELECT run_name, step, metrics FROM metrics ORDER BY id"
        ).fetchall()


def logged(folder):
    """Update and finite values of the entries in metrics.jsonl."""
    return [(entry.pop("step"), entry) for entry in metrics(folder)]


OPTIONS = {
    "num_samples": 2, "sample_steps": 4, "sample_inference_steps": 2, "max_train_steps": 8,
    "validation_split": "0.2", "validation_steps": 4, "validation_images": 2,
    "validation_timesteps": 2,
}  # fmt: skip


def train_killed_and_resumed(folder, **options):
    """A run whose last checkpoint is lost, so that it repeats the last two updates."""
    run(folder, dataset=on_grid(), **OPTIONS, **options)
    shutil.rmtree(folder / "checkpoints" / "step-00000008")
    before = logged(folder)
    run(folder, dataset=on_grid(), **OPTIONS, **options)
    assert [(s, e["loss"]) for s, e in logged(folder)] == [(s, e["loss"]) for s, e in before]
    return before


@pytest.mark.slow
def test_trackio_holds_the_series_of_a_resumed_run_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    folder = tmp_path / "photos"
    options = {"report_to": "trackio", "tracker_project_name": "photos", "license": CANARY}
    expected = train_killed_and_resumed(folder, **options)
    entries = [(name, step, json.loads(text)) for name, step, text in trackio_series(folder)]
    assert len({name for name, _, _ in entries}) == 1
    values = [(step, entry) for _, step, entry in entries if "samples" not in entry]
    assert values == expected
    assert [step for _, step, entry in entries if "samples" in entry] == [4, 8]
    tracked = Path(os.environ["TRACKIO_DIR"])
    assert len([*tracked.rglob("*.png")]) == 2
    files = [*tracked.rglob("*"), folder / "tracking.json"]
    assert not [path for path in files if path.is_file() and CANARY.encode() in path.read_bytes()]
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "tracker" in r.msg]


@pytest.mark.slow
def test_mlflow_holds_the_series_of_a_resumed_run_once(tmp_path, monkeypatch):
    reason = "mlflow-skinny, which downgrades importlib_metadata, is no development package"
    mlflow = pytest.importorskip("mlflow", reason=reason)
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = tmp_path / "store"
    mlflow.set_tracking_uri(store.as_uri())
    folder = tmp_path / "photos"
    options = {"report_to": "mlflow", "run_name": "first", "license": CANARY}
    expected = train_killed_and_resumed(folder, **options)
    client = mlflow.MlflowClient()
    (experiment,) = [e for e in client.search_experiments() if e.name == "ddpm-hf"]
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_name == "first"
    for key in ("loss", "validation_bits_per_dim", "images_per_s"):
        history = client.get_metric_history(tracked.info.run_id, key)
        series = [(step, entry[key]) for step, entry in expected if key in entry]
        assert [(point.step, point.value) for point in history] == series
    assert len([*store.rglob("samples*.png")]) == 2
    files = [path for path in store.rglob("*") if path.is_file()]
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]
