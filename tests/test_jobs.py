"""Training as a job: `training/hf_job.py` for Hugging Face, `sky.yaml` for other clouds."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest
import yaml
from PIL import Image
from processes import run_forked
from tiny_runs import tiny_unet

from ddpm_hf.training import parse_config

TRAINING = Path(__file__).parents[1] / "training"
SCRIPT = TRAINING / "hf_job.py"


def script_metadata():
    block = re.search(r"^# /// script\n(.*?)^# ///$", SCRIPT.read_text(), re.DOTALL | re.MULTILINE)
    return tomllib.loads(re.sub("^# ?", "", block[1], flags=re.MULTILINE))


def test_the_script_requires_what_the_package_does():
    project = tomllib.loads((TRAINING.parent / "pyproject.toml").read_text())["project"]
    metadata = script_metadata()
    assert metadata["requires-python"] == project["requires-python"]
    name, extras = re.fullmatch(r"(.+)\[(.+)\]", *metadata["dependencies"]).groups()
    assert name == project["name"]
    assert set(extras.split(",")) <= project["optional-dependencies"].keys()


@pytest.mark.slow
def test_the_client_reads_machine_secret_and_volume_and_submits_nothing_in_a_dry_run(tmp_path):
    command = ["-m", "huggingface_hub.cli.hf", "jobs", "uv", "run", "--dry-run", "--attempts", "3",
               "-v", f"{tmp_path}:/package", "-v", "hf://buckets/me/runs:/runs",
               SCRIPT, "me/photos", "--batch-size", "64"]  # fmt: skip
    done = run_forked(command)
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stdout.split())
    table = script_metadata()["tool"]["hf-jobs"]
    given = ["attempts 3", "me/photos --batch-size 64", "hf://buckets/me/runs:/runs"]
    for text in [table["flavor"], table["timeout"], *table["secrets"], *given, "not submitted"]:
        assert text in shown


@pytest.mark.slow
def test_the_job_trains_in_the_folder_given_and_refuses_one_that_ends_with_the_job(tmp_path):
    (tmp_path / "photos").mkdir()
    for i in range(8):
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(tmp_path / "photos" / f"{i}.png")
    config = tiny_unet(in_channels=3, out_channels=3).config
    network = {key: value for key, value in config.items() if not key.startswith("_")}
    (tmp_path / "unet.json").write_text(json.dumps(network))
    options = [
        SCRIPT, tmp_path / "photos", "--unet-config", tmp_path / "unet.json",
        "--max-train-steps", "2", "--batch-size", "4", "--num-samples", "0",
    ]  # fmt: skip
    refused = run_forked(options)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert re.fullmatch("ddpm-hf: error: there is no volume at /runs.*--output-dir", line)
    planned = run_forked([*options, "--output-dir", tmp_path / "run", "--dry-run"])
    assert planned.returncode == 0, planned.stderr
    assert "nothing was written" in planned.stdout
    assert not (tmp_path / "run").exists()


def test_the_task_for_other_clouds_keeps_the_run_in_its_bucket():
    text = (TRAINING / "sky.yaml").read_text()
    assert len(text.splitlines()) < 20
    task = yaml.safe_load(text)
    (bucket,) = task["file_mounts"]
    words = shlex.split(task["run"].replace("$DATASET", task["envs"]["DATASET"]))
    config = parse_config(words[words.index("train") + 1 :], prog="train")
    assert config.dataset == task["envs"]["DATASET"]
    assert Path(config.run_folder()).is_relative_to(bucket)
    assert "--max-restarts" in words
