"""Class-conditional training: labels, class dropout, and sampling by class."""

import json
import os
import runpy
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import image_facts_of
from datasets import ClassLabel, Dataset
from PIL import Image
from tiny_runs import assert_equal_bits, checkpoint, few_steps, tiny_config, tiny_images, tiny_unet

from ddpm_hf import (
    ConfigError,
    GaussianDDPMPipeline,
    GaussianDDPMScheduler,
    TrainingConfig,
    evaluate,
    load,
    train,
)
from ddpm_hf.commands.messages import command_messages
from ddpm_hf.data import DataError, load_images, prepare_images
from ddpm_hf.data.hold_out import HoldOut
from ddpm_hf.diffusion.image_format import image_facts
from ddpm_hf.evaluation.model_images import images_for
from ddpm_hf.pictures import image_grid
from ddpm_hf.randomness import dropped_labels
from ddpm_hf.sampling.class_labels import label_cycle
from ddpm_hf.training.ema_sampling import grid_of

OPTIONS = {"class_conditional": True, "num_train_timesteps": 20, "checkpointing_steps": 100}


@pytest.fixture
def pets(tmp_path, monkeypatch):
    """A folder of dark cats and bright dogs."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rng = np.random.default_rng(0)
    for name, level in (("cat", 40), ("dog", 215)):
        folder = tmp_path / "pets" / name
        folder.mkdir(parents=True)
        for i in range(6):
            pixels = np.clip(rng.normal(level, 20, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.png")
    return str(tmp_path / "pets")


def labelled(pets):
    return prepare_images(load_images(pets), label_column=True, progress=False)


def run(folder, pets, unet=None, **options):
    config = tiny_config(folder, **{**OPTIONS, **options})
    return train(config, unet=unet or tiny_unet(num_class_embeds=3), dataset=labelled(pets))


@pytest.mark.slow
def test_a_trained_class_can_be_sampled_by_name(tmp_path, pets):
    result = run(
        tmp_path / "run",
        pets,
        max_train_steps=150,
        learning_rate=5e-3,
        batch_size=8,
        logging_steps=50,
        class_dropout=0.2,
    )
    pipeline = load(result.model_dir)
    means = {}
    for name in ("cat", "dog"):
        generator = torch.Generator().manual_seed(0)
        images = pipeline(8, generator, output_type="np", class_labels=name, guidance_scale=2.0)
        means[name] = images.images.mean()
    # dark is 40 / 255 = 0.16 and bright 0.84
    assert means["cat"] < 0.4
    assert means["dog"] > 0.6


@pytest.mark.slow
def test_the_script_with_replaceable_parts_trains_on_classes(tmp_path, pets):
    script = runpy.run_path(str(Path(__file__).parents[1] / "training" / "train.py"))
    config = tiny_unet(num_class_embeds=None).config
    network = {key: value for key, value in config.items() if not key.startswith("_")}
    (tmp_path / "unet.json").write_text(json.dumps(network))
    options = f"--unet-config {tmp_path}/unet.json --max-train-steps 1 --batch-size 4"
    output = ["--num-samples", "0", "--output-dir", str(tmp_path / "run")]
    assert script["main"]([pets, "--class-conditional", *options.split(), *output]) == 0
    assert load(tmp_path / "run" / "model").unet.config.num_class_embeds == 3


@pytest.mark.parametrize(
    ("num_samples", "num_classes", "count"), [(16, 3, 15), (2, 3, 3), (16, 100, 64), (0, 3, 0)]
)
def test_a_grid_has_equally_many_images_of_each_class(num_samples, num_classes, count):
    facts = SimpleNamespace(trained_classes=[*range(num_classes)])
    config = SimpleNamespace(num_samples=num_samples)
    run = SimpleNamespace(config=config, components=SimpleNamespace(facts=facts))
    num_images, labels = grid_of(run)
    assert num_images == count
    assert labels is None or len(labels) == count


@pytest.mark.slow
@few_steps
def test_sub_folders_are_classes(tmp_path, pets, capsys):
    config = tiny_config(
        tmp_path / "run",
        dataset=pets,
        **OPTIONS,
        max_train_steps=1,
        lr_warmup_steps=0,
        num_samples=4,
        sample_inference_steps=2,
    )
    result = train(config)
    assert "12 of 8x8, L\nclasses    2: cat (6), dog (6)\n" in capsys.readouterr().out
    config = json.loads((result.model_dir / "unet" / "config.json").read_text())
    assert config["num_class_embeds"] == 3
    assert config["_ddpm_hf"]["class_names"] == ["cat", "dog"]
    assert config["_ddpm_hf"]["class_counts"] == [6, 6]
    assert "cat" in (result.model_dir / "README.md").read_text()
    with Image.open(next((tmp_path / "run" / "samples").glob("*.png"))) as grid:
        assert grid.height == 2 * 256 + 2  # a row for each class
        assert grid.width > 2 * 256 + 2  # and its name on the left


def with_labels(numbers, names=("cat", "dog", "eel")):
    """Grey images with these labels."""
    images = [Image.new("L", (8, 8), 20 * i) for i in range(len(numbers))]
    rows = Dataset.from_dict({"image": images, "label": numbers})
    return rows.cast_column("label", ClassLabel(names=list(names)))


@pytest.mark.filterwarnings("ignore:1 of 5 images has no label")
def test_images_without_a_label_are_left_out_of_measurements():
    unet = tiny_unet(num_class_embeds=3)
    unet.register_to_config(_ddpm_hf=image_facts_of("L", 8, 8, class_names=["dog", "cat"]))
    rows = with_labels([0, None, 1, 1, 0], ["cat", "dog"])
    with pytest.warns(UserWarning, match="1 image without a label left out"):
        images = images_for(unet, rows, progress=False)
    assert images.indices == [0, 2, 3, 4]
    assert images.labels_of(range(4)).tolist() == [1, 0, 0, 1]
    with pytest.raises(DataError, match="no image has a label"):
        images_for(unet, rows, rows=[1], progress=False)
    for candidates, message in (
        (None, "the dataset has 4 with a label"),
        ([0, 1, 2], "training held out 2 with a label"),
        ([0, 2], "training held out 2$"),
    ):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="1 image without a label left out")
            with pytest.raises(DataError, match=f"`num_images` is 5, but {message}"):
                images_for(unet, rows, rows=candidates, num_images=5, progress=False)


@pytest.mark.slow
@few_steps
@pytest.mark.parametrize("validation_split", [None, "0.5"])
def test_classes_without_a_training_image_are_named_and_not_sampled(
    tmp_path, capsys, validation_split
):
    # Without a hold-out no image is an eel; with this seed and one, both eels are held out.
    numbers = [0, 1] * 5 + [0, 2 if validation_split else 1]
    held_out = lambda seed: 11 in HoldOut(6, 12, seed).rows()[1]  # noqa: E731
    config = tiny_config(
        tmp_path / "run",
        **{**OPTIONS, "num_samples": 3, "sample_inference_steps": 2},
        max_train_steps=1,
        lr_warmup_steps=0,
        validation_split=validation_split,
        seed=next(filter(held_out, range(20))),
    )
    result = train(config, dataset=with_labels(numbers))
    why = " (`validation_split` holds out all of them)" if validation_split else ""
    note = f"note       no training image has the class 'eel'{why}: "
    assert note in capsys.readouterr().out
    unet = load(result.model_dir).unet
    assert label_cycle(unet, None) == [0, 1]
    assert label_cycle(unet, ["eel"]) == [2]
    assert image_facts(unet).class_counts[2] == 0


@pytest.mark.slow
@few_steps
def test_unbalanced_classes_are_mentioned_in_the_plan(tmp_path, capsys):
    config = tiny_config(tmp_path / "run", **OPTIONS, max_train_steps=1, lr_warmup_steps=0)
    train(config, dataset=with_labels([0] * 10 + [1, 2]))
    text = capsys.readouterr().out
    assert "classes    3: cat (10), dog (1), eel (1)\n" in text
    assert "the classes are unbalanced: 1 image of 'dog', 10 of 'cat'" in text


@pytest.mark.slow
@few_steps
@pytest.mark.parametrize(
    ("dropout", "numbers", "is_trained"),
    [(0.0, [0, 1] * 6, False), (0.1, [0, 1] * 6, True), (0.0, [0, 1, -1] * 4, True)],
)
@pytest.mark.filterwarnings("ignore:4 of 12 images have no label")
def test_the_null_class_is_trained_by_dropped_or_missing_labels(
    tmp_path, dropout, numbers, is_trained
):
    config = tiny_config(
        tmp_path / "run", **OPTIONS, max_train_steps=1, lr_warmup_steps=0, class_dropout=dropout
    )
    pipeline = load(train(config, dataset=with_labels(numbers, ["cat", "dog"])).model_dir)
    call = {"class_labels": "cat", "guidance_scale": 2.0, "num_inference_steps": 2}
    if is_trained:
        assert len(pipeline(**call).images) == 1
    else:
        with pytest.raises(ValueError, match="trained with `class_dropout` 0"):
            pipeline(**call)


def test_undeclared_labels_are_refused_before_the_first_update(tmp_path):
    labels = with_labels([0, 1] * 5 + [2, 3], ["cat", "dog"])
    with pytest.raises(DataError, match=r"2 of 12 rows have other labels \(2, 3\)"):
        train(tiny_config(tmp_path / "run", **OPTIONS), dataset=labels)


@pytest.mark.slow
def test_unused_classes_are_mentioned_in_the_plan(tmp_path, pets, capsys):
    config = tiny_config(tmp_path / "run", dataset=pets, max_train_steps=1, lr_warmup_steps=0)
    with command_messages(TrainingConfig):
        pipeline = load(train(config).model_dir)
    assert "2 classes (cat, dog); --class-conditional trains on them" in capsys.readouterr().out
    assert pipeline.unet.config.num_class_embeds is None


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_with_classes_is_bit_equal_to_a_straight_one(tmp_path, pets, accumulation):
    options = {"gradient_accumulation_steps": accumulation, "class_dropout": 0.5}
    run(tmp_path / "straight", pets, **options)
    unet = tiny_unet(num_class_embeds=3)
    calls = []

    def stop(module, args):
        calls.append(1)
        if len(calls) == 4 * accumulation:
            os.kill(os.getpid(), signal.SIGTERM)

    unet.register_forward_pre_hook(stop)
    assert run(tmp_path / "resumed", pets, unet, **options).num_steps < 6
    run(tmp_path / "resumed", pets, **options)
    assert_equal_bits(checkpoint(tmp_path / "resumed", 6), checkpoint(tmp_path / "straight", 6))


def test_class_dropout_has_the_given_probability_and_depends_on_seed_and_update_only():
    draws = torch.stack([dropped_labels(0, s, 64, 0.25, "cpu") for s in range(100)])
    # 6400 draws with probability 1/4, 4 standard errors
    assert abs(draws.float().mean().item() - 0.25) < 4 * (0.25 * 0.75 / 6400) ** 0.5
    assert torch.equal(draws[3], dropped_labels(0, 3, 64, 0.25, "cpu"))
    assert not torch.equal(draws[3], draws[4])
    assert not dropped_labels(0, 3, 64, 0.0, "cpu").any()


@pytest.mark.slow
@pytest.mark.parametrize(("dropout", "told"), [(0.0, {0, 1}), (0.999999, {2})])
def test_class_dropout_replaces_the_class_by_the_null_class(tmp_path, pets, dropout, told):
    unet, seen = tiny_unet(num_class_embeds=3), set()
    unet.class_embedding.register_forward_pre_hook(
        lambda module, args: seen.update(args[0].tolist()) if module.training else None
    )
    run(tmp_path, pets, unet, class_dropout=dropout, max_train_steps=4)
    assert seen == told


@pytest.mark.slow
def test_an_unconditional_network_with_new_class_embeddings_samples_as_before(tmp_path, pets):
    scheduler = GaussianDDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    before = GaussianDDPMPipeline(tiny_unet(), scheduler)
    before.save_pretrained(tmp_path / "plain")
    config = tiny_config(
        tmp_path / "run",
        dataset=pets,
        pretrained=str(tmp_path / "plain"),
        class_conditional=True,
        max_train_steps=1,
        lr_warmup_steps=1,  # the first update has learning rate 0
    )
    after = load(train(config).model_dir)
    draws = [
        pipeline(2, torch.Generator().manual_seed(0), output_type="np", **call).images
        for pipeline, call in ((before, {}), (after, {"class_labels": "dog"}))
    ]
    np.testing.assert_array_equal(draws[0], draws[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("unet", "options", "message"),
    [
        (tiny_unet(), {}, "num_class_embeds of the network is None, but 2 classes need 3"),
        (tiny_unet(num_class_embeds=2), {}, "is 2, but 2 classes need 3"),
        (
            tiny_unet(class_embed_type="timestep"),
            {},
            "class_embed_type of the network must be None, got 'timestep'",
        ),
        (
            tiny_unet(num_class_embeds=3),
            {"class_conditional": False},
            "embeddings of 2 classes and the null class, but training is unconditional",
        ),
    ],
)
def test_a_network_that_does_not_fit_the_classes_raises(tmp_path, pets, unet, options, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "run", pets, unet, **options)


def test_class_conditional_training_without_labels_raises(tmp_path):
    with pytest.raises(ConfigError, match="`class_conditional` needs the labels"):
        train(tiny_config(tmp_path, **OPTIONS), dataset=tiny_images())


def test_row_names_of_a_grid_do_not_change_its_images_and_are_truncated():
    images = [np.full((64, 64, 1), 0.5)] * 4
    plain = image_grid(images, 2)
    named = image_grid(images, 2, row_names=["cat", "a name that is too long for the grid " * 3])
    assert named.height == plain.height
    assert plain.width < named.width < plain.width + 250
    right = named.crop((named.width - plain.width, 0, named.width, named.height))
    assert np.array_equal(np.asarray(right), np.asarray(plain))


@pytest.mark.slow
@few_steps
@pytest.mark.filterwarnings("ignore:6 images used, 6 left out", "ignore:there is no split")
def test_measurements_read_the_classes_from_the_column_of_training(tmp_path, pets):
    rows = [f"cat/{i}.png,{'0' * (1 + i % 2)}" for i in range(6)]
    (tmp_path / "pets" / "metadata.csv").write_text("\n".join(["file_name,code", *rows]))
    config = tiny_config(
        tmp_path / "run", dataset=pets, class_column="code", num_train_timesteps=20,
        max_train_steps=1, lr_warmup_steps=0,
    )  # fmt: skip
    model = str(train(config).model_dir)
    how = {"num_images": 4, "num_timesteps": 2, "progress": False}
    assert evaluate(model, pets, metrics=["bits-per-dim"], **how).results
    (tmp_path / "pets" / "metadata.csv").write_text("\n".join(["file_name,name", *rows]))
    with pytest.raises(DataError, match=r"label column \(`class_column`\), one of name"):
        evaluate(model, pets, metrics=["bits-per-dim"], **how)
