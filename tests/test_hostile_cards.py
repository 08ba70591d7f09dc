"""`--verify` and cards of strangers: what a card says is data, never a command."""

import os
import shutil
import time

import numpy as np
import pytest
import tiny_runs
import yaml
from checkpoints import image_facts_of, save_ours
from image_sets import folder_of
from image_zoo import encode

from ddpm_hf.cli import main
from ddpm_hf.evaluation import verify as module
from ddpm_hf.hub.card import card_to_share, write_model_card

pytestmark = pytest.mark.slow

SIZE = 8
GOOD = {"metrics": ["bits-per-dim"], "num_images": 4, "num_timesteps": 2, "batch_size": 4}
FIGURE = {"type": "bits-per-dim", "name": "bits", "value": 1.0,
          "args": {"evaluate": GOOD, "interval": [0.0, 1.0]}}  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    pixels = np.random.default_rng(0).integers(0, 256, (4, SIZE, SIZE), dtype=np.uint8)
    named = {f"test/{i}.png": encode(image) for i, image in enumerate(pixels)}
    return folder_of(tmp_path_factory.mktemp("photos"), named)


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    facts = image_facts_of("L", SIZE, SIZE)
    return save_ours(tmp_path_factory.mktemp("original") / "model", facts=facts)


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def copied(value):
    """A copy without shared parts, which YAML would write as aliases."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


def write_card(model, *figures, dataset="user/photos"):
    results = [
        {"task": {"type": "t"}, "dataset": {"name": "photos", "type": dataset}, "metrics": [figure]}
        for figure in figures
    ]
    index = {"model-index": [{"name": "m", "results": [copied(result) for result in results]}]}
    content = yaml.safe_dump(index)
    (model / "README.md").write_text(f"---\n{content}---\ntext\n")


def with_options(**options):
    return {**FIGURE, "args": {**FIGURE["args"], "evaluate": GOOD | options}}


def verify(model, photos, tmp_path):
    start = time.monotonic()
    status = main(
        ["evaluate", str(model), str(photos), "--verify", "--output", str(tmp_path / "o")]
    )
    assert time.monotonic() - start < 30
    return status


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_images": 10**12}, "at most 100000000, got 1000000000000"),
        ({"num_images": 50_001}, "at most 50,000"),
        ({"num_images": -1}, "at least 1"),
        ({"num_images": "all"}, 'the card: "num_images" must be'),
        ({"num_images": 1.5}, 'the card: "num_images" must be'),
        ({"num_images": True}, "boolean"),
        ({"batch_size": 10**9}, "at most 1000000, got 1000000000"),
        ({"num_timesteps": 10**9}, "at most 100000"),
        ({"num_inference_steps": 10**9}, "at most 100000"),
        ({"scheduler": "DDIM:num_train_timesteps=1000000000"}, "num_train_timesteps"),
        ({"scheduler": "UniPCMultistep:solver_order=1000000000"}, "solver_order"),
        ({"scheduler": "UniPCMultistep:solver_order=true"}, "solver_order"),
        ({"scheduler": 7}, "scheduler"),
        ({"scheduler": ["DDIM"]}, "scheduler"),
        ({"split": 7}, 'the card: "split" must be'),
        ({"split": {"a": 1}}, 'the card: "split" must be'),
        ({"seed": "x"}, 'the card: "seed" must be'),
        ({"seed": None}, 'the card: "seed" must be'),
        ({"decoder": "none"}, 'the card: "decoder" must be'),
        ({"features": 7}, 'the card: "features" must be'),
        ({"features": {"a": []}}, 'the card: "features" must be'),
        ({"metrics": "fd"}, "it records no valid metric"),
        ({"metrics": []}, "it records no valid metric"),
        ({"metrics": [["fd"]]}, "it records no valid metric"),
        ({"metrics": ["fid"]}, "it records no valid metric"),
        ({"use_safetensors": False}, "may not set the option 'use_safetensors'"),
        ({"output": "elsewhere"}, "may not set the option 'output'"),
        ({"revision": "main"}, "may not set the option 'revision'"),
        ({1: 2}, "may not set the option 1"),
    ],
)
def test_options_that_a_card_may_not_choose_are_refused_with_the_reason(
    options, reason, model, photos, tmp_path, capsys
):
    write_card(model, with_options(**options) if 1 not in options else {
        **FIGURE, "args": {"evaluate": {**GOOD, **options}, "interval": [0.0, 1.0]}})  # fmt: skip
    assert verify(model, photos, tmp_path) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("not checked     bits: 1 in the card (")
    assert reason in line


@pytest.mark.parametrize(
    "figure",
    [
        {"value": "1.0"},
        {"value": [1.0]},
        {"value": {"a": 1}},
        {"value": None},
        {"value": float("nan")},
        {"value": float("inf")},
        {"value": 10**400},
        {"value": True},
        {"args": None},
        {"args": []},
        {"args": "evaluate"},
        {"args": {"evaluate": []}},
        {"args": {"evaluate": GOOD}},
        {"args": {"evaluate": GOOD, "interval": []}},
        {"args": {"evaluate": GOOD, "interval": [0.0, 1.0, 2.0]}},
        {"args": {"evaluate": GOOD, "interval": ["a", "b"]}},
        {"args": {"evaluate": GOOD, "interval": [float("nan"), 1.0]}},
        {"args": {"evaluate": GOOD, "interval": [2.0, 1.0]}},
        {"args": {"evaluate": GOOD, "interval": [-(10**400), 1]}},
        {"args": {"evaluate": GOOD, "interval": {"low": 0}}},
        {"name": None},
        {"name": 7},
        {"name": ["x"]},
        {"name": {"a": 1}},
        {"name": "renamed"},
    ],
)
def test_a_claim_that_cannot_be_checked_gives_status_1(figure, model, photos, tmp_path, capsys):
    write_card(model, FIGURE, {**FIGURE, "name": "other", **figure})
    assert verify(model, photos, tmp_path) == 1
    printed = capsys.readouterr()
    assert printed.out.count("not checked") >= 1, printed
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("setup", ["bound", "samples"])
def test_a_figure_of_training_is_listed_and_leaves_the_status_to_the_others(
    setup, model, photos, tmp_path, capsys
):
    of_training = {**FIGURE, "name": "validation", "args": {setup: {"num_images": 64}}}
    write_card(model, of_training)
    assert verify(model, photos, tmp_path) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("not checked     validation: 1 in the card (measured in training;")
    write_card(model, of_training, FIGURE)
    assert verify(model, photos, tmp_path) == 1


@pytest.mark.slow
def test_the_card_of_a_run_as_the_trainer_writes_it_gives_status_0(photos, tmp_path, capsys):
    validation = {"validation_split": "0.3", "validation_timesteps": 4, "num_train_timesteps": 20}
    tiny_runs.run(tmp_path / "run", dataset=tiny_runs.on_grid(), max_train_steps=2, **validation)
    assert verify(tmp_path / "run" / "model", photos, tmp_path) == 0
    (line,) = capsys.readouterr().out.splitlines()[-1:]
    assert line.startswith("not checked     bits/dim")
    assert "measured in training" in line


def test_figures_that_cannot_be_measured_are_listed_with_the_others(
    model, photos, tmp_path, capsys
):
    broken = with_options(split="nowhere")
    write_card(model, FIGURE, {**broken, "name": "a"}, {**broken, "name": "b"})
    assert verify(model, photos, tmp_path) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[-2:]] == ["not checked     a", "not checked     b"]
    assert "nowhere" in lines[-1]
    assert len(lines) == 3


def test_names_of_a_card_are_printed_on_one_line_without_control_characters(
    model, photos, tmp_path, capsys
):
    bad = "\x1b]0;title\x07\x1b[2J\nreproduced     FD: 1 in the card\r\u202etxet\x9b31m"
    write_card(model, {**FIGURE, "name": bad}, {**FIGURE, "name": bad * 100, "args": None})
    assert verify(model, photos, tmp_path) == 1
    printed = capsys.readouterr()
    assert not any(line.startswith("reproduced") for line in printed.out.splitlines())
    assert all(char.isprintable() or char == "\n" for char in printed.out)
    assert max(map(len, printed.out.splitlines())) < 400


@pytest.mark.parametrize(
    "name",
    ["a/b", "./photos", "../x/photos", "/etc/passwd", "a/b/c", "https://x/y", "hf://datasets/a/b",
     "photos", 7, ["a/b"], None],
)  # fmt: skip
def test_a_card_names_datasets_on_the_hub_only(name, model, tmp_path, monkeypatch, capsys):
    """A dataset type that is a path on this machine is not opened."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    opened = []
    monkeypatch.setattr(module, "evaluate", lambda *args, **kwargs: opened.append(args))
    write_card(model, FIGURE, dataset=name)
    status = main(["evaluate", str(model), "--verify"])
    printed = capsys.readouterr()
    assert opened == []
    assert (status, "which is not on the Hub: pass DATASET)" in printed.out) == (1, True), printed
    assert "Traceback" not in printed.err


@pytest.mark.parametrize("name", ["a/b", "../b", "/a/b", "~/b", "a/b/c", "backbone"])
def test_a_card_names_features_on_the_hub_only(name, model, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    write_card(model, with_options(metrics=["fd"], features=name))
    assert verify(model, photos, tmp_path) == 1
    assert "are a local folder or a network in memory" in capsys.readouterr().out


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n"
    for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)
CARDS = {
    "aliases": LAUGHS,
    "one alias": "a: &a [1]\nb: *a\n",
    "merge": "a: &a {x: 1}\nb:\n  <<: *a\n",
    "itself": "a: &a [*a]\n",
    "flow": "a: " + "[" * 100_000 + "\n",
    "nested": "a: " + "[" * 1000 + "]" * 1000 + "\n",
    "maps": "".join("  " * i + "a:\n" for i in range(200)),
    "long": "a: " + "x" * 5_000_000 + "\n",
    "many keys": "".join(f"k{i}: 1\n" for i in range(200_000)),
    "object": "a: !!python/object/apply:os.system ['touch owned']\n",
    "list": "- 1\n",
    "text": "just text\n",
    "tab": "a:\tb: c: d\n",
    "index": "model-index: 7\n",
    "index of text": "model-index: [a]\n",
    "index of names": "model-index: [{name: m, results: [{}]}]\n",
    "results of text": "model-index: [{name: m, results: abc}]\n",
    "metadata errors": "ignore_metadata_errors: true\n",
    "eval results": "eval_results: [1]\n",
    "date": "a: 2020-99-99\n",
}


@pytest.mark.parametrize("kind", CARDS)
def test_metadata_that_costs_time_or_is_invalid_is_refused_in_one_line(
    kind, model, photos, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (model / "README.md").write_text(f"---\n{CARDS[kind]}---\ntext\n")
    assert verify(model, photos, tmp_path) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert len(error.splitlines()[-1]) < 1000
    assert not (tmp_path / "owned").exists()


@pytest.mark.filterwarnings("always:README.md has metadata")
@pytest.mark.parametrize("kind", ["aliases", "itself", "flow", "nested", "long", "many keys"])
def test_updates_and_pushes_of_a_card_leave_such_metadata_alone(kind, model):
    write_model_card(model)
    text = (model / "README.md").read_text().split("---\n", 2)[2]
    card = f"---\n{CARDS[kind]}---\n{text}"
    (model / "README.md").write_text(card)
    start = time.monotonic()
    with pytest.warns(UserWarning, match="metadata was left unchanged"):
        write_model_card(model)
    with pytest.warns(UserWarning, match="metadata was left unchanged"):
        shared = card_to_share(model, "user/name", remote=card)
    assert CARDS[kind] in shared.text
    assert time.monotonic() - start < 20


def test_a_card_that_is_no_regular_file_or_too_large_is_refused(model, photos, tmp_path, capsys):
    (model / "README.md").unlink(missing_ok=True)
    os.mkfifo(model / "README.md")
    assert verify(model, photos, tmp_path) == 2
    assert "is not a regular file" in capsys.readouterr().err
    (model / "README.md").unlink()
    (model / "README.md").symlink_to("/dev/zero")
    assert verify(model, photos, tmp_path) == 2
    (model / "README.md").unlink()
    (model / "README.md").write_text("x" * 2**23)
    assert verify(model, photos, tmp_path) == 2
    assert "at most" in capsys.readouterr().err
