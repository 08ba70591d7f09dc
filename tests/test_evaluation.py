"""`ddpm-hf evaluate` with the bound: results, files, resumption and errors."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import SHORT_CHAIN, TWO_LEVELS, tiny_unet
from PIL import Image
from processes import finish_ranks

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, bits_per_dim, load
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation import dataset_likelihood
from ddpm_hf.evaluation.plots import rate_distortion, terms_where_measured
from ddpm_hf.randomness import seed_of

# Also for the two-process test, whose processes read the same model and images.
NUM_IMAGES, SIZE = 5, 7


def save_model(folder, facts=None, variance_type="fixed_small", **config):
    """A model of 7x7 images, which are padded to 8x8."""
    facts = facts or ImageFacts(mode="L", height=SIZE, width=SIZE)
    learned = 1 + variance_type.startswith("learned")
    channels = {"in_channels": facts.num_channels, "out_channels": learned * facts.num_channels}
    unet = tiny_unet(**TWO_LEVELS | channels | config)
    unet.register_to_config(_ddpm_hf=facts.to_config())
    scheduler = GaussianDDPMScheduler(variance_type=variance_type, **SHORT_CHAIN)
    GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"), variance_type="learned_range")


def save_images(folder, pixels):
    folder.mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i}.png")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A training and a test split."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, number in (("train", 2), ("test", NUM_IMAGES)):
        shape = (number, SIZE, SIZE)
        save_images(folder / split, rng.integers(0, 256, shape, dtype=np.uint8))
    return folder


@pytest.fixture
def evaluate(model, photos, tmp_path):
    """Runs the command and returns its first result as JSON, without its duration."""

    def run(*more, model=model, photos=photos, output=tmp_path / "evaluation"):
        status = main(["evaluate", str(model), str(photos), "--output", str(output), *more])
        assert status == 0
        return result_in(output)

    return run


def result_in(output):
    result = json.loads((output / "evaluation.json").read_text())["results"][0]
    assert result.pop("seconds_per_image") > 0
    return result


def padded(folder):
    """Images as network input: edges replicated, (N, 1, 8, 8)."""
    pixels = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
    images = torch.from_numpy(np.stack(pixels))[:, None].float() / 127.5 - 1
    return torch.nn.functional.pad(images, (0, 1, 0, 1), mode="replicate")


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--num-timesteps", "4"), ("--num-inference-steps", "5")])
def test_the_bound_matches_bits_per_dim_with_fixed_noise_per_image(
    evaluate, model, photos, capsys, more, tmp_path
):
    result = evaluate("--batch-size", "2", "--seed", "3", *more)
    printed = capsys.readouterr().out
    pipeline, images = load(model), padded(photos / "test")
    generators = [torch.Generator().manual_seed(seed_of(3, "bound", i)) for i in range(5)]
    options = {more[0][2:].replace("-", "_"): int(more[1])} if more else {}
    want = bits_per_dim(
        pipeline.unet, pipeline.scheduler, images, generator=generators, batch_size=2, **options
    )
    # Equal batches give equal bits; another batch size may round differently.
    assert result["total"] == want.total.tolist()
    assert result["value"] == pytest.approx(want.mean)
    assert result["standard_error"] == pytest.approx(want.standard_error)
    assert result["terms"] == pytest.approx(want.terms.mean(0).tolist())
    assert sum(result["terms"]) + result["parts"]["prior"]["value"] == pytest.approx(want.mean)
    known = want.num_measured > 0
    assert np.array(result["x_0_mse"], float)[known] == pytest.approx(want.x_0_mse[known].tolist())
    assert f"{want.mean:.4f}   {want.standard_error:.4f}" in printed
    assert "test: 5 images, 7x7, padded to 8x8, L, 8 bit" in printed
    assert "decoder exact; seed 3" in printed
    left = sorted(path.name for path in (tmp_path / "evaluation").iterdir())
    assert left == ["bits-per-timestep.png", "evaluation.json", "rate-distortion.png"]


class Stop:
    """Interrupts the measurement after `number` shards, and counts."""

    def __init__(self, monkeypatch, number=10**9):
        self.number, self.count, self.real = number, 0, dataset_likelihood.bits_per_dim
        monkeypatch.setattr(dataset_likelihood, "bits_per_dim", self)

    def __call__(self, *args, **kwargs):
        if self.count == self.number:
            raise KeyboardInterrupt
        self.count += 1
        return self.real(*args, **kwargs)


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes_and_a_finished_one_is_reused(
    evaluate, model, photos, tmp_path, monkeypatch, capsys
):
    whole = evaluate("--batch-size", "2")
    output = tmp_path / "again"
    command = ["evaluate", str(model), str(photos), "--output", str(output), "--batch-size", "2"]
    with monkeypatch.context() as patch:
        Stop(patch, number=2)
        assert main(command) == 130
    assert "repeat the command to resume" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        rest = Stop(patch)
        assert evaluate("--batch-size", "2", output=output) == whole
        assert rest.count == 1  # of three shards
        assert evaluate("--batch-size", "2", output=output) == whole
        assert rest.count == 1
        assert "measured before" in capsys.readouterr().err
        assert evaluate("--batch-size", "2", "--seed", "1", output=output) != whole
        assert rest.count == 4


@pytest.mark.slow
def test_two_processes_match_one_process(evaluate, model, photos, tmp_path):
    one = evaluate("--batch-size", "1")
    options = ["--output", str(tmp_path / "two"), "--batch-size", "1"]
    finish_ranks(["-m", "ddpm_hf", "evaluate", str(model), str(photos), *options], tmp_path)
    assert result_in(tmp_path / "two") == one


@pytest.mark.slow
@pytest.mark.filterwarnings("default:there is no split")
@pytest.mark.parametrize(
    ("splits", "measured"),
    [(("train", "validation"), "validation"), (("train", "validation", "test"), "test"),
     (("train",), "train")],
)  # fmt: skip
def test_the_held_out_split_is_measured_if_one_exists(evaluate, tmp_path, capsys, splits, measured):
    rng = np.random.default_rng(0)
    for number, split in enumerate(splits, 2):
        pixels = rng.integers(0, 256, (number, SIZE, SIZE), dtype=np.uint8)
        save_images(tmp_path / "own" / split, pixels)
    result = evaluate("--num-timesteps", "2", photos=tmp_path / "own")
    report = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert report["dataset"]["split"] == measured
    assert result["num_images"] == 2 + splits.index(measured)
    trained_on = "warning: there is no split test or validation: measured on 'train'"
    assert (trained_on in capsys.readouterr().err) == (measured == "train")


@pytest.mark.slow
def test_a_number_of_images_is_a_random_choice_by_the_seed(evaluate):
    def indices(seed):
        few = ("--num-images", "2", "--num-timesteps", "2")
        return evaluate(*few, "--seed", str(seed))["indices"]

    draws = [indices(seed) for seed in (0, 1, 2, 0)]
    assert len(set(map(tuple, draws))) > 1
    assert draws[0] == draws[3]
    assert all(len(set(draw)) == 2 for draw in draws)
    assert evaluate("--num-images", "1", "--num-timesteps", "2")["standard_error"] is None


@pytest.mark.slow
def test_the_result_is_written_into_the_card(evaluate, tmp_path):
    folder = save_model(tmp_path / "own")
    result = evaluate("--card", model=folder)
    metric = json.loads((folder / "training.json").read_text())["metrics"][0]
    assert metric["value"] == result["value"]
    assert metric["dataset"]["split"] == "test"
    card = (folder / "README.md").read_text()
    assert "bits/dim" in card
    assert f"{result['value']:.4g}" in card
    assert "5 images of test, standard error" in card
    name = metric["dataset"]["name"]
    assert f"\nddpm-hf evaluate . {name}\n```" in card
    assert str(tmp_path) not in card


@pytest.mark.slow
def test_images_are_converted_to_the_size_and_mode_of_the_model(evaluate, tmp_path):
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (2, 20, 30, 3), dtype=np.uint8)
    save_images(tmp_path / "large", pixels)
    assert evaluate("--split", "train", photos=tmp_path / "large")["shape"] == [1, 8, 8]


def deep_facts(**changes):
    return ImageFacts(**{"mode": "L", "height": SIZE, "width": SIZE, "bit_depth": 16, **changes})


REFUSED = [
    ({}, ["--split", "validation"], "validation"),
    ({}, ["--num-images", "6"], "--num-images is 6, but the dataset has 5"),
    ({}, ["--num-timesteps", "21"], "--num-timesteps must be an int in [2, 20], got 21"),
    ({}, ["--num-inference-steps", "21"], "--num-inference-steps must be in [1, 20], got 21"),
    ({"facts": deep_facts()}, [], "do not fit the model: bit_depth is 8 (the model's: 16)"),
    ({"facts": deep_facts(width=5)}, [], "height is 5 (the model's: 7)"),
    ({"num_class_embeds": 2}, [], "labels"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "more", "message"), REFUSED)
def test_images_or_options_that_do_not_fit_end_with_one_line_and_status_2(
    changes, more, message, model, photos, tmp_path, capsys
):
    folder = save_model(tmp_path / "other", **changes) if changes else model
    command = ["evaluate", str(folder), str(photos), "--output", str(tmp_path / "out"), *more]
    assert main(command) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_card_on_the_hub_is_rejected_before_the_work(photos, capsys):
    assert main(["evaluate", "user/model", str(photos), "--card"]) == 2
    assert "'user/model'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--metrics", "fid"], "--metrics must be one of"),
        (["--num-images", "0"], "--num-images must be at least 1, got 0"),
        (["--decoder", "x"], "--decoder must be one of"),
    ],
)
def test_an_option_out_of_range_ends_with_status_2(bad, message, model, photos, capsys):
    assert main(["evaluate", str(model), str(photos), *bad]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_classes_are_matched_by_name(evaluate, tmp_path):
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        pixels = rng.integers(0, 256, (2, SIZE, SIZE), dtype=np.uint8)
        save_images(tmp_path / "pets" / "test" / name, pixels)
        save_images(tmp_path / "pets" / "train" / name, pixels)
    results = []
    for names in (("cat", "dog"), ("dog", "cat")):
        facts = ImageFacts(mode="L", height=SIZE, width=SIZE, class_names=names)
        folder = save_model(tmp_path / names[0], facts, num_class_embeds=2)
        results.append(evaluate(model=folder, photos=tmp_path / "pets"))
    pipeline = load(tmp_path / "dog")
    images = torch.cat([padded(tmp_path / "pets" / "test" / c) for c in ("cat", "dog")])
    generators = [torch.Generator().manual_seed(seed_of(0, "bound", i)) for i in range(4)]
    labels = torch.tensor([1, 1, 0, 0])
    want = bits_per_dim(
        lambda x, t: pipeline.unet(x, t, class_labels=labels),
        pipeline.scheduler,
        images,
        generator=generators,
    )
    assert results[1]["total"] == want.total.tolist()
    assert results[0]["total"] != results[1]["total"]


def test_rate_and_distortion_follow_from_terms_and_errors():
    prior = SimpleNamespace(prior=SimpleNamespace(value=0.5))
    bound = SimpleNamespace(
        bit_depth=8, parts=prior, terms=(1.0, 2.0, 4.0), x_0_mse=(4.0, None, 0.01)
    )
    rate, distortion = rate_distortion(bound)
    assert rate.tolist() == [0.5, 3.5]
    assert distortion.tolist() == pytest.approx([255, 12.75])


def test_importance_sampled_terms_are_plotted_as_means_over_measured_images():
    bound = SimpleNamespace(
        num_images=8,
        timesteps=(9, 4, 0),
        num_measured=(1, 0, 8),
        num_expected=(0.5, 0.5, 1.0),
        terms=(6.0 / 0.5 / 8, 0.0, 2.0),  # 6 on one image of 8; never; 2 on all
    )
    timesteps, terms, is_measured = terms_where_measured(bound)
    assert timesteps.tolist() == [9, 4, 0]
    assert is_measured.tolist() == [True, False, True]
    assert terms[is_measured].tolist() == pytest.approx([6.0, 2.0])
