"""`compare`, and `evaluate` with several subjects, schedulers or numbers of steps."""

import json
import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from checkpoints import SHORT_CHAIN, tiny_unet
from image_sets import folder_of
from image_zoo import encode
from processes import run_process

import ddpm_hf
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation import compare, measurement
from ddpm_hf.sampling import open_drawn, sharded_sampling
from ddpm_hf.sampling.sampler_choice import build_scheduler, sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec

SIZE = 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Grey images of two splits, and some that count as drawn."""
    rng = np.random.default_rng(0)
    splits = {"photos/train": 14, "photos/test": 12, "drawn": 12}
    files = {
        f"{split}/{i:02d}.png": encode(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8))
        for split, number in splits.items()
        for i in range(number)
    }
    return folder_of(tmp_path_factory.mktemp("images"), files) / "photos"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models, whose folders have one name."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        unet = tiny_unet(seed)
        unet.register_to_config(_ddpm_hf=ImageFacts(mode="L", height=SIZE, width=SIZE).to_config())
        scheduler = GaussianDDPMScheduler(**SHORT_CHAIN)
        GaussianDDPMPipeline(unet, scheduler).save_pretrained(root / name / "model")
    return [root / name / "model" for name in "ab"]


USUAL = {"features": "pixels", "num_images": 12, "batch_size": 6, "metrics": ["fd", "coverage"]}


def command(subjects, photos, output, *more):
    options = ["--features", "pixels", "--num-images", "12", "--batch-size", "6"]
    options += ["--metrics", "fd", "coverage", "--output", str(output)]
    return ["evaluate", *map(str, subjects), str(photos), *options, *more]


SWEEP = ["--schedulers", "DDPM:eta=0", "DPMSolverMultistep:algorithm_type=dpm", "DDIM",
         "--num-inference-steps", "2", "4"]  # fmt: skip


def test_each_setting_is_an_evaluation_of_its_own_and_stands_in_the_table(
    models, photos, tmp_path, capsys
):
    output = tmp_path / "out"
    assert main(command([*models, photos.parent / "drawn"], photos, output, *SWEEP)) == 0
    printed = capsys.readouterr()
    result = json.loads((output / "comparison.json").read_text())
    rows = {row["setting"]: row for row in result["settings"]}
    assert list(rows) == [
        *(
            f"{name}/model, {scheduler}, K = {K}"
            for name in "ab"
            for scheduler in ("DDPM:eta=0", "DDIM")
            for K in (2, 4)
        ),
        "drawn",
    ]
    for label, options in {
        "b/model, DDPM:eta=0, K = 4": {"scheduler": "DDPM:eta=0", "num_inference_steps": 4},
        "a/model, DDIM, K = 2": {"scheduler": "DDIM", "num_inference_steps": 2},
    }.items():
        model = models["ab".index(label[0])]
        alone = ddpm_hf.evaluate(model, photos, progress=False, **USUAL, **options)
        for figure in alone["results"]:
            got = rows[label]["figures"][figure["name"]]
            assert (got["value"], got["interval"]) == (figure["value"], figure["interval"])
    row = rows["b/model, DDPM:eta=0, K = 4"]
    assert (row["num_network_calls"], row["num_inference_steps"]) == (4, 4)
    assert row["seconds_per_image"] > 0
    assert rows["drawn"]["num_network_calls"] is None
    assert (output / row["folder"] / "evaluation.json").is_file()
    assert {"comparison.png", "samples.png"} <= {path.name for path in output.iterdir()}
    assert [left["setting"] for left in result["left_out"]] == [
        f"{name}/model, DPMSolverMultistep:algorithm_type=dpm, K = {K}"
        for name in "ab"
        for K in (2, 4)
    ]
    for said in (
        "left out: a/model, DPMSolver",
        "dpm is not implemented",
        "real images",
        "s/image",
    ):
        assert said in printed.out
    assert f"{row['figures']['fd']['value']:.4g} +- " in printed.out
    assert "12 of 13: b/model, DDIM, K = 4" in printed.err


def test_what_is_done_is_not_done_again(models, photos, tmp_path, monkeypatch, capsys):
    batches, measured = [], []
    draw, measure = sharded_sampling.draw_batch, measurement.measure

    def drawing(*args, **kwargs):
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        batches.append(1)
        return draw(*args, **kwargs)

    def measuring(*args, **kwargs):
        measured.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(sharded_sampling, "draw_batch", drawing)
    monkeypatch.setattr(measurement, "measure", measuring)
    options = ["--num-inference-steps", "2", "3", "--metrics", "coverage"]
    arguments = command(models[:1], photos, tmp_path / "out", *options)
    stop_at = 3  # in the second of two settings, of two batches each
    assert main(arguments) == 130
    assert "repeat the command to resume" in capsys.readouterr().err
    stop_at = None
    assert main(arguments) == 0
    assert (len(batches), len(measured)) == (4, 2)
    folder = tmp_path / "out" / "3"
    assert open_drawn(folder / "drawn").seconds_per_image > 0  # of the batch that was left
    first = (tmp_path / "out" / "comparison.json").read_text()
    assert main(arguments) == 0
    assert (len(batches), len(measured)) == (4, 2)
    assert without_time((tmp_path / "out" / "comparison.json").read_text()) == without_time(first)
    assert main([*arguments, "--seed", "1"]) == 0
    assert (len(batches), len(measured)) == (8, 4)


def without_time(text):
    return {k: v for k, v in json.loads(text).items() if k not in ("created", "command")}


def test_models_and_numbers_of_steps_are_compared_by_their_bound(models, photos, tmp_path, capsys):
    options = ["--num-inference-steps", "5", "20", "--output", str(tmp_path)]
    assert main(["evaluate", *map(str, models), str(photos), *options]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "comparison.json").read_text())["settings"]
    bits = [row["figures"]["bits-per-dim"] for row in rows]
    assert sum(one["rank"] == "best" for one in bits) == 1
    want = ddpm_hf.evaluate(models[1], photos, num_inference_steps=5, progress=False)
    assert bits[2]["value"] == want["results"][0]["value"]
    assert f"{bits[2]['value']:.4g} +- " in printed
    assert "12 images of photos, test" in printed


def test_a_tie_is_a_gap_that_the_same_halves_show_by_chance():
    def row(value, halves):
        figures = {"fd": {"value": value}, "precision": {"value": -value}}
        return {"figures": figures, "draws": dict.fromkeys(figures, (halves, 2.0))}

    # Halves that vary together tell the settings apart, where each interval holds the other value.
    together = row(1.0, [0.0, 4.0, 8.0]), row(1.5, [0.5, 4.5, 8.7])
    compare._rank(rows := list(together))
    fd = [one["figures"]["fd"] for one in rows]
    assert [one["rank"] for one in fd] == ["best", ""]
    assert fd[1]["gap_of_chance"] == pytest.approx(2 * np.std([0.5, 0.5, 0.7], ddof=1))
    assert fd[1]["gap"] == 0.5
    assert [one["figures"]["precision"]["rank"] for one in rows] == ["best", ""]
    apart = row(1.0, [0.0, 4.0, 8.0]), row(1.5, [8.5, 4.5, 0.5])
    compare._rank(rows := list(apart))
    assert [one["figures"]["fd"]["rank"] for one in rows] == ["best", "tie"]
    unequal = row(1.0, [0.0, 2.0]), row(1.5, [0.0, 2.0, 4.0])
    compare._rank(rows := list(unequal))
    assert rows[1]["figures"]["fd"]["gap_of_chance"] == pytest.approx(2 * math.sqrt(2 + 4))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("DDIM", SchedulerSpec("DDIM")),
        ("DDIMScheduler", SchedulerSpec("DDIM")),
        ("DDPM:eta=0", SchedulerSpec("DDPM", eta=0)),
        (
            "DPMSolverMultistep:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true",
            SchedulerSpec(
                "DPMSolverMultistep",
                {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
            ),
        ),
        ("DDPM:x_0_mse=null,eta=0.5", SchedulerSpec("DDPM", {"x_0_mse": None}, 0.5)),
    ],
)
def test_the_name_of_a_sampler_says_all_of_it(text, want):
    assert SchedulerSpec.parse(text) == want
    assert SchedulerSpec.parse(str(want)) == want


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("DDMI", "did you mean 'DDPM' or 'DDIM'"),
        ("nothing", "choices: DDPM, DDIM"),
        ("DDPM:eta", "must have the form NAME:option=value"),
        ("DDPM:eta=2", r"must be a number in \[0, 1\], got 2"),
    ],
)
def test_a_name_of_no_sampler_is_refused_with_the_choices(text, said, models, photos):
    with pytest.raises(ValueError, match=said):
        ddpm_hf.compare(models, photos, schedulers=[text])


def test_where_nothing_can_be_measured_the_reason_is_the_error(models, photos, tmp_path, capsys):
    arguments = command(models[:1], photos, tmp_path, "--num-inference-steps", "21", "30")
    assert main(arguments) == 2
    assert "none of the settings can be measured" in capsys.readouterr().err
    assert main([*arguments, "--card"]) == 2
    assert "--card needs one model with one scheduler" in capsys.readouterr().err


def test_karras_sigmas_are_refused_where_they_would_be_of_almost_pure_noise():
    karras = SchedulerSpec.parse("DPMSolverMultistep:use_karras_sigmas=true")
    pipeline = SimpleNamespace(scheduler=GaussianDDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    own = pipeline.scheduler
    with pytest.raises(ValueError, match="almost pure noise"):
        build_scheduler(pipeline, karras)
    assert pipeline.scheduler is own
    pipeline.scheduler = GaussianDDPMScheduler()  # linear
    with sampled_by(pipeline, karras):
        assert pipeline.scheduler.config.use_karras_sigmas
    assert isinstance(pipeline.scheduler, GaussianDDPMScheduler)


@pytest.mark.slow
def test_two_processes_compare_as_one_does(models, photos, tmp_path):
    arguments = command(models[:1], photos, tmp_path / "one", *SWEEP)
    assert main(arguments) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu",
              "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
              "--dynamo_backend", "no", "--main_process_port", "0"]  # fmt: skip
    two = command(models[:1], photos, tmp_path / "two", *SWEEP)
    process = run_process([*launch, "-m", "ddpm_hf", *two])
    assert process.returncode == 0, process.stderr
    one, two = (
        json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two")
    )
    assert one["left_out"] == two["left_out"]
    for first, second in zip(one["settings"], two["settings"], strict=True):
        # Torch's kernels may round the network's float32 otherwise beside a process group.
        want, got = (row["figures"]["fd"]["value"] for row in (first, second))
        assert got == pytest.approx(want, rel=1e-3)
