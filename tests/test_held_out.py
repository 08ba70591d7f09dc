"""The hold-out of a training run: recorded, identified in the data, and used for evaluation."""

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
from ddpm_hf.evaluation import dataset_likelihood, model_images
from ddpm_hf.evaluation.results import Evaluation
from ddpm_hf.randomness import seed_of
from ddpm_hf.training.dataset_setup import hold_out

few_steps = pytest.mark.filterwarnings("ignore:`timestep_spacing`")
pytestmark = [pytest.mark.slow, few_steps]
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
    """Grey images of several sizes, all larger than the model's."""
    rng = np.random.default_rng(0)
    shapes = [(9 + i % 3, 12) for i in range(NUM_IMAGES)]
    return [encode(rng.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]


@pytest.fixture(scope="module")
def photos(files, tmp_path_factory):
    named = {f"{i:02d}.png": file for i, file in enumerate(files)}
    return folder_of(tmp_path_factory.mktemp("photos"), named)


@pytest.fixture(scope="module")
def result(photos, tmp_path_factory):
    """Result of a run that held out a share."""
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


def read(folder):
    return Evaluation.from_dict(json.loads((folder / "evaluation.json").read_text()))


def command(name, model, photos, output, *more):
    return [name, str(model), str(photos), "--output", str(output), "--batch-size", "2", *more]


@pytest.mark.filterwarnings("default:there is no split")
def test_the_bound_is_measured_on_the_recorded_hold_out(model, photos, tmp_path, capsys):
    assert main(command("evaluate", model, photos, tmp_path / "out", "--card")) == 0
    printed = capsys.readouterr()
    assert "train: 5 images that training held out, 8x8" in printed.out
    assert "there is no split" not in printed.err
    evaluation = read(tmp_path / "out")
    assert (evaluation.dataset.split, evaluation.dataset.held_out) == ("train", DRAWN)
    assert list(evaluation.bound.indices) == HELD_OUT

    pipeline, images = load(model), TrainingImages(prepare(load_images(str(photos)), resolution=8))
    generators = [torch.Generator().manual_seed(seed_of(0, "bound", i)) for i in HELD_OUT]
    want = bits_per_dim(
        pipeline.unet, pipeline.scheduler, torch.stack([images[0, i] for i in HELD_OUT]),
        generator=generators, batch_size=2,
    )  # fmt: skip
    assert list(evaluation.bound.total) == want.total.tolist()

    assert "5 images that training held out, standard error" in (model / "README.md").read_text()
    verify = command("evaluate", model, photos, tmp_path / "new", "--verify")
    assert main(verify) == 0  # what training measured is listed, and does not count
    lines = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(lines) == ["not checked"] * 3 + ["reproduced"]
    (model / "training.json").unlink()
    main(verify)
    printed = capsys.readouterr()
    assert "(the held-out images differ from the card's)" in printed.out
    assert "measured on 'train'" in printed.err


def test_an_interrupted_evaluation_resumes_with_the_same_hold_out(
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
    assert len(calls) == 1 + 1 + 2  # three shards, one of them twice
    assert list(read(tmp_path).bound.indices) == HELD_OUT


def test_evaluate_matches_the_periodic_evaluation_of_training(result, photos):
    evaluation = evaluate(
        result.model_dir, photos, metrics=["fd"], num_images=6, batch_size=4,
        scheduler="DDPM:eta=0", num_inference_steps=3,
    )  # fmt: skip
    (fd,) = evaluation.results
    assert (fd.num_real, fd.setup.reference_split, fd.setup.held_out_split) == (
        15, "train", "train"
    )  # fmt: skip
    got = {
        "evaluation_fd": fd.value,
        "evaluation_fd_standard_error": fd.standard_error,
        "evaluation_fd_half": fd.floor.drawn,
        "evaluation_fd_half_real": fd.floor.real,
    }
    measured = next(m for m in metrics(result.model_dir) if m.items() >= {"step": 6}.items()
                    and "evaluation_fd" in m)  # fmt: skip
    assert got == pytest.approx({name: measured[name] for name in got}, rel=1e-5)  # of float32


def test_held_out_images_do_not_count_as_copies_of_training_images(model, photos, tmp_path, capsys):
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
    assert main([*arguments, "--split", "train"]) == 0  # ignores the hold-out
    assert copies() == [1, 1]


def changed(files, row):
    """The files, with the pixels of one image replaced."""
    return [encode(np.zeros((9, 12), np.uint8)) if i == row else f for i, f in enumerate(files)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda files: files[:-1], "the training run had 20 images, got 19"),
        (lambda files: changed(files, HELD_OUT[2]), "images differ from those of the run"),
        (lambda files: files[1:] + files[:1], "images differ from those of the run"),
    ],
    ids=["fewer", "others", "in another order"],
)
def test_other_data_is_measured_completely_with_a_warning(change, message, model, files):
    data = {"train": rows(*change(files))}
    with pytest.warns(UserWarning, match=f"recorded hold-out is not used: .*{message}"), \
            pytest.warns(UserWarning, match="measured on 'train'"):  # fmt: skip
        evaluation = evaluate(model, data)
    assert evaluation.bound.num_images == len(data["train"])
    assert evaluation.dataset.held_out is None


def test_the_hold_out_is_identified_by_its_pixels(model, files):
    """Neither the name of the data nor the other images matter."""
    data = {"train": rows(*changed(files, TRAINED_ON[0]))}
    assert list(evaluate(model, data).bound.indices) == HELD_OUT
    assert list(evaluate(model, data["train"]).bound.indices) == HELD_OUT
    assert evaluate(model, data, num_images=2).bound.num_images == 2
    with pytest.raises(ValueError, match="`num_images` is 6, but training held out 5"):
        evaluate(model, data, num_images=6)


def test_the_hold_out_of_a_class_conditional_model_is_used(tmp_path):
    rng = np.random.default_rng(0)
    images = {
        f"{name}/{i}.png": encode(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        for name in ("cats", "dogs")
        for i in range(10)
    }
    photos = folder_of(tmp_path / "photos", images)
    config = tiny_config(
        tmp_path / "run", dataset=str(photos), class_conditional=True, max_train_steps=2,
        num_train_timesteps=20, validation_split="0.25", validation_timesteps=2,
    )  # fmt: skip
    result = train(config)
    evaluation = evaluate(result.model_dir, str(photos))
    assert evaluation.dataset.held_out == DRAWN
    assert evaluation.bound.num_images == NUM_HELD_OUT


def test_an_existing_or_requested_split_takes_precedence(model, files):
    data = {"train": rows(*files), "test": rows(*files[:3])}
    assert evaluate(model, data).bound.num_images == 3
    assert evaluate(model, {"train": data["train"]}, split="train").bound.num_images == 20


def edited(folder, change):
    facts = json.loads((folder / "training.json").read_text())
    change(facts)
    (folder / "training.json").write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda facts: facts["dataset"].update(held_out=7), 'invalid "held_out" in training.json'),
        (
            lambda facts: facts["dataset"]["held_out"].pop("digest"),
            'invalid "held_out" in training.json',
        ),
        (
            lambda facts: facts["dataset"]["held_out"].update(num_held_out=20),
            "num_held_out.* must be in .*got 20",
        ),
        (lambda facts: facts["dataset"]["held_out"].update(seed="0"), "must be integers"),
    ],
)
def test_an_invalid_record_is_ignored_with_a_warning(change, message, model, files):
    with pytest.warns(UserWarning, match=f"is not used: .*{message}"), \
            pytest.warns(UserWarning, match="measured on 'train'"):  # fmt: skip
        evaluation = evaluate(edited(model, change), {"train": rows(*files)})
    assert evaluation.bound.num_images == NUM_IMAGES


def prepared_at_size(monkeypatch):
    sizes, real = [], model_images.prepare_images

    def prepare(*args, **kwargs):
        sizes.append(kwargs["resolution"])
        return real(*args, **kwargs)

    monkeypatch.setattr(model_images, "prepare_images", prepare)
    return sizes


@pytest.mark.filterwarnings("ignore:there is no split")
@pytest.mark.parametrize(
    "change",
    [
        {"height": 8192, "width": 8192},
        {"height": 8192},
        {"width": 16},
        {"bit_depth": 16},
        {"mode": "RGBA"},
    ],
)
def test_a_recorded_format_that_is_not_the_networks_prepares_no_images(
    change,
    model,
    photos,
    monkeypatch,
):
    edited(model, lambda facts: facts["dataset"]["image"].update(change))
    sizes = prepared_at_size(monkeypatch)
    with pytest.warns(UserWarning, match=r"hold-out is not used: training.json has .* images"):
        evaluate(model, photos)
    assert set(sizes) == {8}


@pytest.mark.filterwarnings("ignore:there is no split")
@pytest.mark.parametrize("number", [10**12, 21, 19])
def test_a_recorded_hold_out_of_another_number_of_images_prepares_none(
    number,
    model,
    photos,
    monkeypatch,
):
    edited(model, lambda facts: facts["dataset"]["held_out"].update(num_images=number))
    with pytest.warns(UserWarning, match=f"the training run had {number:,} images, got 20"):
        assert evaluate(model, photos).bound.num_images == 20


def test_a_base_model_without_the_same_hold_out_gives_a_warning(model, files):
    def with_base(facts, **base):
        facts.update(base_model="user/base", base=base)

    data = {"train": rows(*files)}
    edited(model, lambda facts: with_base(facts, dataset=facts["dataset"]))
    assert list(evaluate(model, data).bound.indices) == HELD_OUT  # the same hold-out
    edited(model, with_base)
    with pytest.warns(UserWarning, match="base model user/base may have been trained on"):
        assert list(evaluate(model, data).bound.indices) == HELD_OUT


def test_models_are_compared_on_their_common_hold_out(model, files, tmp_path, capsys):
    data, another = {"train": rows(*files)}, shutil.copytree(model, tmp_path / "another")

    def numbers():
        comparison = ddpm_hf.compare([model, another], data, num_timesteps=2, progress=False)
        return {row.figures["bits-per-dim"].num_images for row in comparison.settings}

    assert numbers() == {NUM_HELD_OUT}
    (another / "training.json").unlink()
    with pytest.warns(UserWarning, match="the models record different hold-outs"), \
            pytest.warns(UserWarning, match="measured on 'train'"):  # fmt: skip
        assert numbers() == {NUM_IMAGES}


def test_a_model_is_calibrated_on_its_hold_out(model, photos, tmp_path, capsys):
    assert main(command("calibrate", model, photos, tmp_path, "--card")) == 0
    content = json.loads((tmp_path / "calibration.json").read_text())
    assert content["results"][0]["indices"] == HELD_OUT
    images = f"5 images of {photos.name}, train that training held out"
    assert f"measured on {images}" in capsys.readouterr().out
    assert f"predicted from {images}" in (model / "README.md").read_text()


def test_a_hold_out_of_tensors_is_not_recorded(result, tmp_path):
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


def test_at_least_one_image_is_left_for_training():
    images = TrainingImages(on_grid(2))
    assert [len(part) for part in hold_out(images, 0.9, seed=0)] == [1, 1]
