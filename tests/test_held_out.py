"""What a run held out itself: recorded, found again in its data, and measured instead of all."""

import json
import shutil

import numpy as np
import pytest
import torch
from image_sets import folder_of, prepare, rows
from image_zoo import encode
from tiny_runs import metrics, on_grid, tiny_config, tiny_unet

import ddpm_hf
from ddpm_hf import bits_per_dim, load, train
from ddpm_hf.cli import main
from ddpm_hf.data import TrainingImages, load_images
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.evaluation import dataset_likelihood
from ddpm_hf.randomness import seed_of
from ddpm_hf.training.dataset_setup import hold_out

pytestmark = pytest.mark.filterwarnings("ignore:`timestep_spacing`")  # few steps
NUM_IMAGES, NUM_HELD_OUT = 20, 5
DRAWN = HoldOut(NUM_HELD_OUT, NUM_IMAGES, seed=0)
TRAINED_ON, HELD_OUT = DRAWN.rows()


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def files():
    """Grey images of several sizes, all larger than those of the model."""
    rng = np.random.default_rng(0)
    shapes = [(9 + i % 3, 12) for i in range(NUM_IMAGES)]
    return [encode(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture(scope="module")
def photos(files, tmp_path_factory):
    named = {f"{i:02d}.png": file for i, file in enumerate(files)}
    return folder_of(tmp_path_factory.mktemp("photos"), named)


@pytest.fixture(scope="module")
def result(photos, tmp_path_factory):
    """Of a run that held a share out."""
    config = tiny_config(
        tmp_path_factory.mktemp("run"), dataset=str(photos), resolution=8, num_train_timesteps=20,
        validation_split="0.25", validation_timesteps=4, checkpointing_steps=100,
        evaluate_steps=6, evaluate_features="pixels", evaluate_num_images=6,
        sample_inference_steps=3,
    )  # fmt: skip
    return train(config, unet=tiny_unet())


@pytest.fixture
def model(result, tmp_path):
    return shutil.copytree(result.model_dir, tmp_path / "model")


def evaluate(model, dataset, **options):
    options = {"num_timesteps": 2, "features": "pixels", "progress": False} | options
    return ddpm_hf.evaluate(model, dataset, **options)


def bits(report):
    return next(r for r in report["results"] if r["name"] == "bits-per-dim")


def command(name, model, photos, output, *more):
    return [name, str(model), str(photos), "--output", str(output), "--batch-size", "2", *more]


@pytest.mark.filterwarnings("default:there is no split")
def test_the_bound_is_of_the_images_that_training_held_out_and_says_so(
    model, photos, tmp_path, capsys
):
    assert main(command("evaluate", model, photos, tmp_path / "out", "--card")) == 0
    printed = capsys.readouterr()
    assert "train: 5 images that training held out, 8x8" in printed.out
    assert "there is no split" not in printed.err
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    drawn = {"num_held_out": 5, "num_images": 20, "seed": 0}
    assert (report["dataset"]["split"], report["dataset"]["held_out"]) == ("train", drawn)
    assert bits(report)["indices"] == HELD_OUT

    pipeline, images = load(model), TrainingImages(prepare(load_images(str(photos)), resolution=8))
    generators = [torch.Generator().manual_seed(seed_of(0, "bound", i)) for i in HELD_OUT]
    want = bits_per_dim(
        pipeline.unet, pipeline.scheduler, torch.stack([images[0, i] for i in HELD_OUT]),
        generator=generators, batch_size=2,
    )  # fmt: skip
    assert bits(report)["total"] == want.total.tolist()

    assert "5 images that training held out, standard error" in (model / "README.md").read_text()
    verify = command("evaluate", model, photos, tmp_path / "new", "--verify")
    assert main(verify) == 0
    assert "reproduced" in capsys.readouterr().out
    (model / "training.json").unlink()
    main(verify)
    said = capsys.readouterr()
    assert "(the held-out images are others than the card's)" in said.out
    assert "measured on 'train'" in said.err


def test_what_was_interrupted_goes_on_with_the_same_images(
    model, photos, tmp_path, monkeypatch, capsys
):
    calls, measure = [], dataset_likelihood.bits_per_dim

    def measuring(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkeypatch.setattr(dataset_likelihood, "bits_per_dim", measuring)
    assert main(command("evaluate", model, photos, tmp_path)) == 130
    assert main(command("evaluate", model, photos, tmp_path)) == 0
    assert len(calls) == 1 + 1 + 2  # of three parts
    assert bits(json.loads((tmp_path / "evaluation.json").read_text()))["indices"] == HELD_OUT


def test_drawn_images_are_compared_as_in_training(result, photos):
    report = evaluate(
        result.model_dir, photos, metrics=["fd"], num_images=6, batch_size=4,
        scheduler="DDPM:eta=0", num_inference_steps=3,
    )  # fmt: skip
    (fd,) = report["results"]
    assert (fd["num_real"], fd["reference_split"], fd["held_out_split"]) == (15, "train", "train")
    got = {
        "evaluation_fd": fd["value"],
        "evaluation_fd_standard_error": fd["standard_error"],
        "evaluation_fd_half": fd["floor"]["drawn"],
        "evaluation_fd_half_real": fd["floor"]["real"],
    }
    measured = next(m for m in metrics(result.model_dir) if m.items() >= {"step": 6}.items()
                    and "evaluation_fd" in m)  # fmt: skip
    assert got == pytest.approx({name: measured[name] for name in got}, rel=1e-5)  # of float32


def test_an_image_that_was_held_out_is_no_copy_of_one_that_was_trained_on(
    model, photos, tmp_path, capsys
):
    images = prepare(load_images(str(photos)), resolution=8)
    for name, indices in (("held-out", HELD_OUT), ("known", TRAINED_ON)):
        np.save(tmp_path / f"{name}.npy", np.stack([images[i].movedim(0, 2) for i in indices]))
    files = [str(tmp_path / f"{name}.npy") for name in ("held-out", "known")]
    how = ["--metrics", "memorisation", "--features", "pixels", "--num-inference-steps", "2"]
    arguments = ["evaluate", *files, str(model), str(photos), *how, "--output", str(tmp_path / "o")]

    def copies():
        settings = json.loads((tmp_path / "o" / "comparison.json").read_text())["settings"]
        return [row["figures"]["copies"]["value"] for row in settings][:2]

    assert main(arguments) == 0
    assert copies() == [0, 1]
    assert (
        f"15 real ones of {photos.name} without the 5 that training held out"
        in capsys.readouterr().out
    )
    assert main([*arguments, "--split", "train"]) == 0  # as if nothing were known
    assert copies() == [1, 1]


def changed(files, row):
    """The files, one of them with other pixels."""
    return [encode(np.zeros((9, 12), np.uint8)) if i == row else f for i, f in enumerate(files)]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda files: files[:-1], "the run had 20 images, and here are 19"),
        (lambda files: changed(files, HELD_OUT[2]), "images in their places are others"),
        (lambda files: files[1:] + files[:1], "images in their places are others"),
    ],
    ids=["fewer", "others", "in another order"],
)
def test_other_data_are_measured_as_a_whole_and_the_reason_is_said(change, said, model, files):
    data = {"train": rows(*change(files))}
    with pytest.warns(UserWarning, match=f"training held out are not used: .*{said}"), \
            pytest.warns(UserWarning, match="measured on 'train'"):  # fmt: skip
        report = evaluate(model, data)
    assert bits(report)["num_images"] == len(data["train"])
    assert "held_out" not in report["dataset"]


def test_held_out_images_are_known_by_their_pixels_alone(model, files):
    """Not by the name of the data, and whatever became of the others."""
    data = {"train": rows(*changed(files, TRAINED_ON[0]))}
    assert bits(evaluate(model, data))["indices"] == HELD_OUT
    assert bits(evaluate(model, data["train"]))["indices"] == HELD_OUT
    assert bits(evaluate(model, data, num_images=2))["num_images"] == 2
    with pytest.raises(ValueError, match="num_images is 6, but training held out 5"):
        evaluate(model, data, num_images=6)


def test_a_split_that_is_there_or_asked_for_goes_first(model, files):
    data = {"train": rows(*files), "test": rows(*files[:3])}
    assert bits(evaluate(model, data))["num_images"] == 3
    assert bits(evaluate(model, {"train": data["train"]}, split="train"))["num_images"] == 20


def edited(folder, change):
    facts = json.loads((folder / "training.json").read_text())
    change(facts)
    (folder / "training.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts["dataset"].update(held_out=7), "in another form"),
        (lambda facts: facts["dataset"]["held_out"].pop("digest"), "in another form"),
        (lambda facts: facts["dataset"]["held_out"].update(num_held_out=20), "some left"),
        (lambda facts: facts["dataset"]["held_out"].update(seed="0"), "whole numbers"),
    ],
)
def test_a_training_json_that_is_not_understood_is_said_and_left_aside(change, said, model, files):
    with pytest.warns(UserWarning, match=f"are not used: .*{said}"), \
            pytest.warns(UserWarning, match="measured on 'train'"):  # fmt: skip
        report = evaluate(edited(model, change), {"train": rows(*files)})
    assert bits(report)["num_images"] == NUM_IMAGES


def test_a_base_model_that_may_know_the_images_is_named(model, files):
    def with_base(facts, **base):
        facts.update(base_model="user/base", base=base)

    data = {"train": rows(*files)}
    edited(model, lambda facts: with_base(facts, dataset=facts["dataset"]))
    assert bits(evaluate(model, data))["indices"] == HELD_OUT  # which held out the same
    edited(model, with_base)
    with pytest.warns(UserWarning, match="base model user/base may have been trained on"):
        assert bits(evaluate(model, data))["indices"] == HELD_OUT


def test_models_are_compared_on_what_all_of_them_held_out(model, files, tmp_path, capsys):
    data, another = {"train": rows(*files)}, shutil.copytree(model, tmp_path / "another")

    def numbers():
        result = ddpm_hf.compare([model, another], data, num_timesteps=2, progress=False)
        return {row["figures"]["bits-per-dim"]["num_images"] for row in result["settings"]}

    assert numbers() == {NUM_HELD_OUT}
    (another / "training.json").unlink()
    with pytest.warns(UserWarning, match="not all of the models tell of the same ones"), \
            pytest.warns(UserWarning, match="measured on 'train'"):  # fmt: skip
        assert numbers() == {NUM_IMAGES}


def test_a_model_is_calibrated_on_what_its_training_held_out(model, photos, tmp_path, capsys):
    assert main(command("calibrate", model, photos, tmp_path, "--card")) == 0
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert found["results"][0]["indices"] == HELD_OUT
    said = f"5 images of {photos.name}, train that training held out"
    assert f"measured on {said}" in capsys.readouterr().out
    assert f"predicted from {said}" in (model / "README.md").read_text()


def test_only_what_can_be_found_again_is_recorded(result, tmp_path):
    dataset = json.loads((result.model_dir / "training.json").read_text())["dataset"]
    assert dataset["num_images"] == 15
    assert dataset["held_out"].items() >= {"num_held_out": 5, "num_images": 20, "seed": 0}.items()
    config = tiny_config(tmp_path, validation_split="0.25", max_train_steps=2, validation_steps=2,
                         validation_timesteps=4, num_train_timesteps=20)  # fmt: skip
    of_tensors = train(config, unet=tiny_unet(), dataset=on_grid())
    assert (
        "held_out"
        not in json.loads((of_tensors.model_dir / "training.json").read_text())["dataset"]
    )


def test_an_image_is_left_to_train_on():
    images = TrainingImages(on_grid(2))
    assert [len(part) for part in hold_out(images, 0.9, seed=0)] == [1, 1]
