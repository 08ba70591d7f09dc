"""`evaluate` on images from a model, from files and in memory; JSON, cards and `verify`."""

import json
import os
import re
import time

import numpy as np
import pandas
import pytest
from checkpoints import SHORT_CHAIN, tiny_unet
from image_sets import folder_of, rows
from image_zoo import encode
from PIL import Image
from processes import LIMIT_S, forked_ranks
from transformers import ViTConfig, ViTModel
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

import ddpm_hf
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation import frechet_distance, precision_recall
from ddpm_hf.evaluation.metrics import METRICS
from ddpm_hf.evaluation.result_files import known_results
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.evaluation.verify import CARD_OPTIONS
from ddpm_hf.evaluation_options import METRIC_NAMES
from ddpm_hf.sampling import open_drawn

SIZE, NUM_TRAIN, NUM_TEST = 8, 24, 20


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def pixels():
    """Smooth grey images of each split, and drawn ones."""
    rng, names = np.random.default_rng(0), {"train": NUM_TRAIN, "test": NUM_TEST, "drawn": 22}
    small = {name: rng.integers(0, 256, (num, 3, 3), dtype=np.uint8) for name, num in names.items()}
    return {
        name: np.stack([np.asarray(Image.fromarray(x).resize((SIZE, SIZE))) for x in images])
        for name, images in small.items()
    }


def files(pixels):
    return {
        f"{split}/{i:02d}.png": encode(image)
        for split in ("train", "test")
        for i, image in enumerate(pixels[split])
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory, pixels):
    return folder_of(tmp_path_factory.mktemp("photos"), files(pixels))


@pytest.fixture
def model(tmp_path):
    unet = tiny_unet(in_channels=1, out_channels=1)
    unet.register_to_config(_ddpm_hf=ImageFacts(mode="L", height=SIZE, width=SIZE).to_config())
    folder = tmp_path / "model"
    GaussianDDPMPipeline(unet, GaussianDDPMScheduler(**SHORT_CHAIN)).save_pretrained(folder)
    return folder


@pytest.fixture
def backbone(tmp_path):
    folder = tmp_path / "backbone"
    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    ViTModel(config).save_pretrained(folder)
    BitImageProcessorPil(crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def evaluate(subject, dataset, **options):
    return ddpm_hf.evaluate(subject, dataset, **{"features": "pixels", "progress": False} | options)


def flat(images):
    return np.repeat(images.reshape(len(images), 1, -1), 3, 1).reshape(len(images), -1) / 255


@pytest.mark.slow
def test_image_files_and_images_in_memory_give_the_same_results(pixels, photos, tmp_path):
    drawn, metrics = pixels["drawn"], ("fd", "precision-recall", "memorisation")
    folder_of(tmp_path, {f"d/{i:02d}.png": encode(x) for i, x in enumerate(drawn)})
    np.savez(tmp_path / "d.npz", drawn[..., None])
    evaluation = evaluate(drawn, photos, metrics=metrics)
    figures = evaluation.figures
    real, fake = flat(pixels["train"]), flat(drawn)
    # The features are float32.
    assert figures["fd"].value == pytest.approx(frechet_distance(real, fake), rel=1e-5)
    want = precision_recall(real, fake)
    assert (figures["precision"].value, figures["recall"].value) == want
    assert figures["fd"].setup.held_out_split == "test"
    assert figures["fd"].setup.features.dims == 3 * SIZE**2
    as_rows = rows(*files(pixels).values())
    splits = {"train": as_rows.select(range(NUM_TRAIN)),
              "test": as_rows.select(range(NUM_TRAIN, NUM_TRAIN + NUM_TEST))}  # fmt: skip
    pil = [Image.fromarray(image) for image in drawn]
    for subject in (tmp_path / "d", tmp_path / "d.npz", pil):
        assert evaluate(subject, photos, metrics=metrics).results == evaluation.results
    assert evaluate(drawn, splits, metrics=metrics).results == evaluation.results


@pytest.mark.slow
def test_an_evaluation_prints_as_a_table_and_converts_to_json_html_and_pandas(pixels, photos):
    metrics = ("fd", "precision-recall")
    evaluation = evaluate(pixels["drawn"], photos, metrics=metrics, seed=3)
    fd = evaluation.figures["fd"]
    first = str(evaluation).splitlines()[1]
    assert first.split()[:3] == ["Frechet", "distance", f"{fd.value:.4g}"]
    assert f"22 drawn images against {NUM_TRAIN} of train; by pixels" in str(evaluation)
    assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation
    assert evaluation.to_dict()["options"].items() >= {"metrics": [*metrics], "seed": 3}.items()
    frame = pandas.DataFrame(evaluation.rows()).set_index("name")
    assert list(frame.index) == ["fd", "precision", "recall"]
    assert frame.loc["fd", ["low", "high"]].tolist() == list(fd.interval)
    assert frame.loc["fd", "floor_real"] == fd.floor.real
    assert f"<td>{fd.value:.4g}</td>" in evaluation._repr_html_()


@pytest.mark.slow
@pytest.mark.parametrize("position", [0.05, 0.2, 0.4, 0.6, 0.8, 0.95])
def test_an_evaluation_with_a_flipped_bit_is_measured_again(position, pixels, photos, tmp_path):
    options = {"metrics": ["fd"], "features": "pixels", "output": tmp_path}
    want, file = evaluate(pixels["drawn"], photos, **options), tmp_path / "evaluation.json"
    content = bytearray(file.read_bytes())
    content[int(position * len(content))] ^= 4
    file.write_bytes(content)
    assert evaluate(pixels["drawn"], photos, **options).results == want.results
    assert json.loads(file.read_text())["results"] == want.to_dict()["results"]


@pytest.mark.slow
def test_a_damaged_result_file_counts_as_no_known_results(pixels, photos, tmp_path):
    evaluation = evaluate(pixels["drawn"], photos, metrics=["fd"], output=tmp_path)
    assert known_results(tmp_path) == evaluation.results
    file = tmp_path / "evaluation.json"
    text = file.read_text()
    for damaged in (
        text[:-9], "[]", "null", text.replace('"value"', '"worth"'),
        re.sub(r'"value": [^,]*', '"value": "much"', text), re.sub(r'"fd"', "7", text),
        text.replace('"floor": {', '"floor": [{'), "[" * 10_000,
    ):  # fmt: skip
        assert damaged != text
        file.write_text(damaged)
        assert known_results(tmp_path) == ()
        assert evaluate(pixels["drawn"], photos, metrics=["fd"]).results == evaluation.results


def test_without_held_out_images_the_floor_compares_halves(pixels):
    real = rows(*files(pixels).values())
    figures = evaluate(pixels["drawn"], real, num_images=20).figures
    assert set(figures) == {"fd", "kid", "precision", "recall", "density", "coverage", "copies"}
    assert all(figure.floor_between == "halves" for figure in figures.values())
    assert figures["kid"].num_drawn == 20
    assert figures["kid"].num_real == NUM_TRAIN + NUM_TEST
    assert figures["kid"].floor_num_images == (22, 10)


def read(folder):
    return Evaluation.from_dict(json.loads((folder / "evaluation.json").read_text()))


def command(model, photos, output, *more):
    options = ["--metrics", "fd", "memorisation", "bits-per-dim", "--features", "pixels",
               "--num-images", "12", "--num-inference-steps", "4"]  # fmt: skip
    return ["evaluate", str(model), str(photos), "--output", str(output), *options, *more]


@pytest.mark.slow
def test_a_model_is_measured_by_its_drawn_images(model, photos, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(command(model, photos, output)) == 0
    evaluation = read(output)
    drawn = open_drawn(output / "drawn")
    assert (len(drawn), drawn.options["num_inference_steps"]) == (12, 4)
    assert evaluation.figures["fd"].setup.num_inference_steps == 4
    assert evaluation.bound.num_images == 12
    assert evaluation.model.weights == drawn.options["weights"]
    assert str(evaluation) in capsys.readouterr().out
    names = {path.name for path in output.iterdir()}
    assert {"samples.png", "closest-pairs.png", "evaluation.json"} <= names
    options = evaluation.to_dict()["options"]
    assert set(options) == {"metrics", *CARD_OPTIONS}
    assert evaluate(model, photos, **options | {"output": output}).results == evaluation.results


@pytest.mark.slow
def test_verify_reproduces_a_card_and_detects_a_changed_figure(model, photos, tmp_path, capsys):
    assert main([*command(model, photos, tmp_path / "out"), "--card"]) == 0
    card = model / "README.md"
    again = f"ddpm-hf evaluate . {photos.name} --metrics fd memorisation --features pixels"
    assert again in card.read_text()
    assert str(tmp_path) not in card.read_text()
    verify = ["evaluate", str(model), str(photos), "--output", str(tmp_path / "new"), "--verify"]
    capsys.readouterr()
    assert main(verify) == 0
    assert capsys.readouterr().out.count("\nreproduced ") + 1 == 3
    text = card.read_text()
    value = read(tmp_path / "out").figures["fd"].value
    assert str(value) in text
    card.write_text(text.replace(f"value: {value}", f"value: {value / 2}"))
    interval = r"(interval:\n *- )\S+(\n *- )\S+"  # a wide interval does not help
    card.write_text(re.sub(interval, r"\g<1>0.0\g<2>1000000.0", card.read_text()))
    assert main(verify) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("NOT")] == [
        "NOT reproduced  Frechet distance (pixels)"
    ]


@pytest.mark.slow
def test_figures_with_features_from_a_folder_need_that_folder_to_be_verified(
    model, photos, tmp_path, capsys, backbone
):
    how = ["--metrics", "fd", "--num-images", "12", "--num-inference-steps", "4"]
    given = ["--features", str(backbone), "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(model), str(photos), *how, *given, "--card"]) == 0
    verify = ["evaluate", str(model), str(photos), "--verify", "--output", str(tmp_path / "new")]
    assert main(verify) == 1
    assert "the card's features 'backbone' are a local folder" in capsys.readouterr().out
    assert main([*verify, "--features", str(backbone)]) == 0
    assert capsys.readouterr().out.startswith("reproduced ")


CARD = """---
model-index:
- name: m
  results:
  - task: {type: unconditional-image-generation}
    dataset: {name: photos, type: photos}
    metrics:
    - {type: fd, name: fd, value: 1.0, args: ARGS}
---
"""
NO_OPTIONS = "the card records no options of `evaluate` for it"
UNUSABLE = [
    (
        "{evaluate: {metrics: [fd], use_safetensors: false}, interval: [0.0, 1.0]}",
        "a card may not set the option 'use_safetensors'",
    ),
    (
        "{evaluate: {metrics: [fd], output: elsewhere}, interval: [0.0, 1.0]}",
        "a card may not set the option 'output'",
    ),
    (
        "{evaluate: {metrics: fd}, interval: [0.0, 1.0]}",
        "it records no valid metric of `evaluate`",
    ),
    ("{evaluate: [fd], interval: [0.0, 1.0]}", NO_OPTIONS),
    (
        "{evaluate: {metrics: [fd]}, interval: 1.0}",
        "its value and interval must be finite numbers",
    ),
    ("{}", NO_OPTIONS),
]


@pytest.mark.slow
@pytest.mark.parametrize(("args", "reason"), UNUSABLE)
def test_a_card_with_other_options_than_those_of_evaluate_cannot_be_verified(
    args, reason, model, photos, capsys
):
    """A card is untrusted: it must not choose pickled weights or an output folder."""
    (model / "README.md").write_text(CARD.replace("ARGS", args))
    assert main(["evaluate", str(model), str(photos), "--verify"]) == 1
    assert f"not checked     fd: 1 in the card ({reason})" in capsys.readouterr().out


REFUSED = [
    ({"metrics": ["fid"]}, "`metrics` must contain only bits-per-dim, fd, .*, got 'fid'"),
    ({"metrics": "fd"}, r"`metrics` must be a list, such as \['fd'\], got 'fd'"),
    ({"metrics": []}, "`metrics` is empty; choices: bits-per-dim, fd"),
    ({"metrics": ["bits-per-dim"]}, "`metrics`: bits-per-dim needs a model; ndarray is a set"),
    ({"scheduler": "DDIM"}, "`scheduler` applies to models; ndarray is a set of images"),
    ({"scheduler": "DDMI"}, "did you mean 'DDPM' or 'DDIM'"),
    ({"num_images": 0}, "`num_images` must be at least 1, got 0"),
    ({"on_bad_image": "ignore"}, "`on_bad_image` must be one of .*, got 'ignore'"),
    (
        {"reference_split": "none", "split": "neither"},
        "`reference_split` must be one of test, train, got 'none'",
    ),
    ({"features": "./missing"}, "does not exist"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_invalid_options_are_rejected_with_the_choices(options, message, pixels, photos):
    with pytest.raises(ValueError, match=message):
        evaluate(pixels["drawn"], photos, **options)


def test_an_unknown_split_of_a_mapping_is_rejected_with_close_names(pixels):
    splits = {"train": rows(encode(pixels["drawn"][0]))}
    with pytest.raises(ValueError, match=r"one of train, got 'trian' \(did you mean 'train'\?"):
        evaluate(pixels["drawn"], splits, reference_split="trian")


def test_an_unknown_option_is_rejected_with_close_names(pixels, photos):
    with pytest.raises(TypeError, match="'num_image'; did you mean num_images"):
        evaluate(pixels["drawn"], photos, num_image=3)


def test_an_array_out_of_range_is_rejected(photos):
    with pytest.raises(
        ValueError, match=r"uint8, uint16 or floating point in \[0, 1\], got float64 in 2..2"
    ):
        evaluate(np.full((2, 8, 8), 2.0), photos)


def test_the_names_of_metrics_match_their_implementations():
    assert ("bits-per-dim", *METRICS) == METRIC_NAMES


@pytest.mark.slow
def test_two_processes_that_are_killed_and_restarted_match_one_process(model, photos, tmp_path):
    """Draws, features and figures; more images than one file of features holds."""
    arguments = ["evaluate", str(model), str(photos), "--metrics", "fd", "memorisation",
                 "--features", "pixels", "--num-images", "600", "--num-inference-steps", "2",
                 "--batch-size", "20"]  # fmt: skip
    assert main([*arguments, "--output", str(tmp_path / "one")]) == 0
    two = ["-m", "ddpm_hf", *arguments, "--output", str(tmp_path / "two")]
    # Without the features that the single process cached.
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    drawn = tmp_path / "two" / "drawn"
    with forked_ranks(two, env=environment) as processes:
        began = time.monotonic()
        while len(list(drawn.glob("part-*"))) < 3:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() - began < LIMIT_S
            time.sleep(0.01)
    assert 3 <= len(list(drawn.glob("part-*"))) < 30
    with forked_ranks(two, env=environment) as processes:
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    one, two = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["results"]
        for name in ("one", "two")
    )
    for figure in (*one, *two):
        figure.pop("seconds_per_image")
    assert two == one


RANK_PROGRAM = """
import sys
from ddpm_hf import compare, evaluate
model, photos, output = sys.argv[1:]
options = {
    "metrics": ["fd", "bits-per-dim"], "features": "pixels", "num_images": 12, "batch_size": 4
}
evaluation = evaluate(model, photos, **options, num_inference_steps=2, output=output)
comparison = compare(
    [model], photos, **options, num_inference_steps=[2, 99], output=output + "-2", progress=False
)
print("result", hash(repr(evaluation.to_dict())), hash(repr(comparison.to_dict())))
"""


@pytest.mark.slow
def test_every_rank_returns_the_same_result(model, photos, tmp_path):
    arguments = ["-c", RANK_PROGRAM, model, photos, tmp_path / "out"]
    with forked_ranks(arguments) as processes:  # with one seed of `hash`, that of their server
        outputs = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    first, second = (re.findall(r"^result .*", output, re.MULTILINE) for output in outputs)
    assert first == second
    assert len(first) == 1
