"""`compare`, and `ddpm-hf evaluate` with several subjects, schedulers or numbers of steps."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pandas
import pytest
import torch
from checkpoints import SHORT_CHAIN, tiny_unet
from diffusers import DDIMScheduler
from image_sets import folder_of
from image_zoo import encode
from processes import finish_ranks

import ddpm_hf
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, bits_per_dim
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts, load_images
from ddpm_hf.evaluation import image_metrics
from ddpm_hf.evaluation.compare import gap_of_chance, ranked_figure
from ddpm_hf.evaluation.comparison_results import Comparison
from ddpm_hf.evaluation.evaluate import Evaluator
from ddpm_hf.evaluation.figures import FeatureNetwork, Floor, MeasurementSetup, MetricResult
from ddpm_hf.evaluation.model_images import images_for
from ddpm_hf.evaluation_options import EvaluationOptions
from ddpm_hf.randomness import seed_of
from ddpm_hf.sampling import open_drawn, sharded_sampling
from ddpm_hf.sampling.sampler_choice import build_scheduler, sampled_by
from ddpm_hf.scheduler_spec import SchedulerSpec

SIZE = 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Grey images of two splits, and some that serve as drawn ones."""
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
    """Two models in folders of the same name."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        unet = tiny_unet(seed)
        unet.register_to_config(_ddpm_hf=ImageFacts(mode="L", height=SIZE, width=SIZE).to_config())
        scheduler = GaussianDDPMScheduler(**SHORT_CHAIN)
        GaussianDDPMPipeline(unet, scheduler).save_pretrained(root / name / "model")
    return [root / name / "model" for name in "ab"]


OPTIONS = {"features": "pixels", "num_images": 12, "batch_size": 6, "metrics": ["fd", "coverage"]}


def command(subjects, photos, output, *more):
    options = ["--features", "pixels", "--num-images", "12", "--batch-size", "6"]
    options += ["--metrics", "fd", "coverage", "--output", str(output)]
    return ["evaluate", *map(str, subjects), str(photos), *options, *more]


SWEEP = ["--schedulers", "DDPM:eta=0", "DPMSolverMultistep:algorithm_type=dpm", "DDIM",
         "--num-inference-steps", "2", "4"]  # fmt: skip


SWEPT = {
    "schedulers": ["DDPM:eta=0", "DPMSolverMultistep:algorithm_type=dpm", "DDIM"],
    "num_inference_steps": [2, 4],
}


@pytest.fixture(scope="module")
def swept(models, photos, tmp_path_factory):
    """Two models with every scheduler and number of steps, and images; with the output folder."""
    output = tmp_path_factory.mktemp("swept")
    subjects = [*models, photos.parent / "drawn"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield (
            ddpm_hf.compare(subjects, photos, **OPTIONS, **SWEPT, output=output, progress=False),
            output,
        )


@pytest.mark.slow
def test_the_time_of_a_comparison_is_stated_before_the_work(photos, tmp_path, capsys):
    pipeline = GaussianDDPMPipeline(tiny_unet(), GaussianDDPMScheduler(**SHORT_CHAIN))
    options = EvaluationOptions(num_images=10, batch_size=4, features="pixels")
    evaluator = Evaluator(photos, ["fd"], options)
    model, measured = evaluator.load(pipeline), tmp_path / "evaluation.json"
    samplers = {tmp_path / "a": (None, 5), tmp_path / "b": (None, 10), tmp_path: (None, 20)}
    measured.touch()
    evaluator.announce_time(model, samplers)
    assert "s: 2 settings of 10 images, 45 network calls" in capsys.readouterr().err
    evaluator.announce_time(model, {tmp_path / "a": (None, 5)})
    assert capsys.readouterr().err == ""


def test_each_setting_has_its_own_folder_on_every_file_system(photos, tmp_path):
    names = ("a b", "a-b", "A-b", "a-b-2")
    rng = np.random.default_rng(2)
    for name in names:
        np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (12, SIZE, SIZE, 1), np.uint8))
    sets, output = [tmp_path / f"{name}.npy" for name in names], tmp_path / "out"
    options = {"metrics": ["fd"], "features": "pixels", "output": output, "progress": False}
    rows = ddpm_hf.compare(sets, photos, **options).settings
    assert len({row.folder.casefold() for row in rows}) == 4
    for row in rows:
        recorded = json.loads((output / row.folder / "evaluation.json").read_text())
        assert recorded["results"][0]["value"] == row.figures["fd"].value


def test_an_empty_comparison_is_refused_in_words():
    with pytest.raises(ValueError, match="`models_or_images` is empty"):
        ddpm_hf.compare([], "photos")


@pytest.mark.slow
def test_a_model_given_twice_is_named_without_its_private_path(models, photos, tmp_path):
    options = {**OPTIONS, "metrics": ["fd"], "num_inference_steps": [2], "progress": False}
    result = ddpm_hf.compare([models[0]] * 2, photos, **options, output=tmp_path)
    names = ["model (1), K = 2", "model (2), K = 2"]
    assert sorted(row.setting for row in result.settings) == names


def test_all_combinations_are_measured_or_left_out_with_the_reason(swept):
    comparison, _ = swept
    assert [row.setting for row in comparison.settings] == [
        "a/model, DDPM:eta=0, K = 2",
        "a/model, DDPM:eta=0, K = 4",
        "a/model, DDIM, K = 2",
        "a/model, DDIM, K = 4",
        "b/model, DDPM:eta=0, K = 2",
        "b/model, DDPM:eta=0, K = 4",
        "b/model, DDIM, K = 2",
        "b/model, DDIM, K = 4",
        "drawn",
    ]
    assert [(row.name, row.num_inference_steps) for row in comparison.left_out] == [
        ("a/model", 2), ("a/model", 4), ("b/model", 2), ("b/model", 4)
    ]  # fmt: skip
    assert all("dpm is not implemented" in row.reason for row in comparison.left_out)


@pytest.mark.slow
@pytest.mark.parametrize(("row", "scheduler", "K"), [(5, "DDPM:eta=0", 4), (2, "DDIM", 2)])
def test_each_row_matches_a_separate_evaluation(swept, models, photos, row, scheduler, K):
    comparison, output = swept
    measured = comparison.settings[row]
    model = models[row // 4]
    alone = ddpm_hf.evaluate(
        model, photos, progress=False, **OPTIONS, scheduler=scheduler, num_inference_steps=K
    )
    for name, figure in measured.figures.items():
        want = alone.figures[name]
        assert (figure.value, figure.interval, figure.floor) == (
            want.value, want.interval, want.floor
        )  # fmt: skip
    assert (measured.num_network_calls, measured.num_inference_steps) == (K, K)
    assert measured.seconds_per_image > 0
    assert (output / measured.folder / "evaluation.json").is_file()


@pytest.mark.slow
def test_a_comparison_prints_as_a_table_and_converts_to_json_and_pandas(swept):
    comparison, output = swept
    content = json.loads((output / "comparison.json").read_text())
    assert comparison.to_dict() == content
    assert Comparison.from_dict(content) == comparison
    assert {"comparison.png", "samples.png"} <= {path.name for path in output.iterdir()}
    images = comparison.settings[-1]
    assert (images.num_network_calls, images.scheduler) == (None, None)
    lines = str(comparison).splitlines()
    (line,) = (line for line in lines if line.startswith("b/model, DDIM, K = 4"))
    fd = comparison.settings[7].figures["fd"]
    assert f"{fd.value:.4g} +- {fd.half_width:.2g}" in line
    assert any(line.startswith("  real images") for line in lines)
    assert any(line.startswith("left out: a/model, DPMSolver") for line in lines)
    assert any(line.startswith("a/model, DDPM, eta 0, K = 2 ") for line in lines)
    frame = pandas.DataFrame(comparison.rows()).pivot(
        index="setting", columns="figure", values="value"
    )
    assert frame.shape == (9, 3)
    assert frame.loc["b/model, DDIM, K = 4", "fd"] == fd.value
    assert "b/model, DDIM, K = 4" in comparison._repr_html_()


def test_sets_of_different_numbers_are_reported_as_such(photos):
    pixels = np.random.default_rng(1).integers(0, 256, (20, SIZE, SIZE), dtype=np.uint8)
    sets = [pixels[:12], pixels]
    options = {"metrics": ["fd"], "features": "pixels", "progress": False}
    text = str(ddpm_hf.compare(sets, photos, **options))
    assert "12 to 20 drawn images against 14 real ones" in text
    assert "pass `num_images` 12 to compare at one number" in text
    text = str(ddpm_hf.compare(sets, photos, **options, num_images=12))
    assert "\n12 drawn images against 14 real ones" in text
    assert "at one number" not in text


@pytest.mark.slow
def test_the_command_prints_the_comparison_and_its_progress(models, photos, tmp_path, capsys):
    options = ["--num-inference-steps", "2", "30"]
    assert main(command(models[:1], photos, tmp_path, *options)) == 0
    printed = capsys.readouterr()
    comparison = Comparison.from_dict(json.loads((tmp_path / "comparison.json").read_text()))
    assert len(comparison.settings) == len(comparison.left_out) == 1
    assert printed.out.startswith(str(comparison).partition("`num_inference_steps`")[0])
    assert "--num-inference-steps must be an int in [1, 20], got 30" in printed.out
    assert "1 of 2: K = 2" in printed.err


@pytest.mark.slow
def test_finished_settings_are_reused_and_interrupted_ones_resume(
    models, photos, tmp_path, monkeypatch, capsys
):
    batches, measured = [], []
    draw, measure = sharded_sampling.draw_batch, image_metrics.measure

    def drawing(*args, **kwargs):
        if len(batches) == stop_at:
            raise KeyboardInterrupt
        batches.append(1)
        return draw(*args, **kwargs)

    def measuring(*args, **kwargs):
        measured.append(1)
        return measure(*args, **kwargs)

    monkeypatch.setattr(sharded_sampling, "draw_batch", drawing)
    monkeypatch.setattr(image_metrics, "measure", measuring)
    options = ["--num-inference-steps", "2", "3", "--metrics", "coverage"]
    arguments = command(models[:1], photos, tmp_path / "out", *options)
    stop_at = 3  # in the second of two settings, of two batches each
    assert main(arguments) == 130
    assert "repeat the command to resume" in capsys.readouterr().err
    stop_at = None
    assert main(arguments) == 0
    assert (len(batches), len(measured)) == (4, 2)
    folder = tmp_path / "out" / "3"
    assert open_drawn(folder / "drawn").seconds_per_image > 0  # of the remaining batch
    first = (tmp_path / "out" / "comparison.json").read_text()
    assert main(arguments) == 0
    assert (len(batches), len(measured)) == (4, 2)
    assert without_time((tmp_path / "out" / "comparison.json").read_text()) == without_time(first)
    assert main([*arguments, "--seed", "1"]) == 0
    assert (len(batches), len(measured)) == (8, 4)


def without_time(text):
    return {k: v for k, v in json.loads(text).items() if k not in ("created", "command")}


@pytest.mark.slow
def test_models_and_numbers_of_steps_are_compared_by_their_bound(models, photos):
    comparison = ddpm_hf.compare(models, photos, num_inference_steps=[5, 20], progress=False)
    bounds = [row.figures["bits-per-dim"] for row in comparison.settings]
    assert [bound.rank for bound in bounds].count("best") == 1
    assert min(bounds, key=lambda bound: bound.value).rank == "best"
    want = ddpm_hf.evaluate(models[1], photos, num_inference_steps=5, progress=False)
    assert bounds[2].value == want.bound.value
    assert f"{bounds[2].value:.4g} +- " in str(comparison)
    assert "12 images of photos, test" in str(comparison)
    assert all(row.seconds_per_image > 0 for row in comparison.settings)
    assert "s/image: time of the bound in one process" in str(comparison)


@pytest.mark.slow
def test_only_samplers_with_a_bound_get_one_and_eta_is_used(models, photos, tmp_path):
    schedulers = ["DDPM", "DDIM", "DDPM:eta=0", "DDPM:eta=0.5", "DPMSolverMultistep"]
    call = {"metrics": ["bits-per-dim"], "num_inference_steps": [5], "progress": False}
    comparison = ddpm_hf.compare(
        models[0], photos, schedulers=schedulers, output=tmp_path / "out", **call
    )
    bounds = {row.scheduler: row.figures["bits-per-dim"].value for row in comparison.settings}
    assert [*bounds] == ["DDPM", "DDPM:eta=0.5"]
    assert {row.scheduler: row.reason.split(", got ")[1] for row in comparison.left_out} == {
        "DDIM": "DDIM, whose steps define no bound",
        "DDPM:eta=0": "DDPM:eta=0, which is deterministic",
        "DPMSolverMultistep": "DPMSolverMultistep, whose steps define no bound",
    }
    pipeline = GaussianDDPMPipeline.from_pretrained(models[0])
    want = ddpm_hf.evaluate(pipeline, photos, **call | {"num_inference_steps": 5}).bound
    assert bounds["DDPM"] == want.value
    assert (want.eta, "eta" in want.to_dict()) == (None, False)
    # Noise of image i as in the evaluation; all twelve images of the held-out split.
    images = images_for(pipeline.unet, load_images(photos, split="test"), progress=False)
    generators = [torch.Generator().manual_seed(seed_of(0, "bound", i)) for i in range(12)]
    of_eta = bits_per_dim(
        pipeline.unet, pipeline.scheduler, images.batch(range(12)), num_inference_steps=5,
        eta=0.5, generator=generators, progress=False,
    )  # fmt: skip
    assert bounds["DDPM:eta=0.5"] == pytest.approx(of_eta.mean, rel=1e-6)
    assert abs(bounds["DDPM:eta=0.5"] - bounds["DDPM"]) > 0.01
    text = (tmp_path / "out" / "DDPM-eta=0.5-5" / "evaluation.json").read_text()
    assert json.loads(text)["results"][0]["eta"] == 0.5


@pytest.mark.slow
def test_the_bound_of_a_model_whose_own_sampler_has_none_is_refused(models, photos):
    pipeline = GaussianDDPMPipeline.from_pretrained(models[0])
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    with pytest.raises(ValueError, match=r"`metrics`: bits-per-dim needs .* DDPM .*, got DDIM"):
        ddpm_hf.evaluate(pipeline, photos, progress=False)
    bound = {"metrics": ["bits-per-dim"], "scheduler": "DDPM", "num_inference_steps": 2}
    assert ddpm_hf.evaluate(pipeline, photos, **bound, progress=False).bound.value > 0


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["DDIM", "DDPM:eta=0", "UniPCMultistep"])
def test_the_command_refuses_the_bound_of_a_sampler_that_has_none(
    scheduler, models, photos, tmp_path, capsys
):
    arguments = ["evaluate", str(models[0]), str(photos), "--schedulers", scheduler,
                 "--metrics", "bits-per-dim", "fd", "--features", "pixels"]  # fmt: skip
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    message = f"--metrics: bits-per-dim needs the scheduler DDPM with eta above 0, got {scheduler},"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "drawn").exists()


def figure(name, value, halves):
    features = FeatureNetwork(name="pixels", size=None, mean=(), std=(), digest=None, dims=3)
    setup = MeasurementSetup(
        seed=0, num_inference_steps=None, scheduler=None, seconds_per_image=None,
        reference_split="train", held_out_split=None, features=features, inputs="",
    )  # fmt: skip
    return MetricResult(
        name=name, label=name, value=value, interval=(0.0, 9.0), standard_error=1.0,
        floor=Floor(real=0.0, drawn=0.0), verdict="tie", note="", metric=name,
        halves=tuple(halves), num_real=9, num_drawn=9, num_resamples=len(halves),
        floor_between="halves", floor_num_images=(4, 4), setup=setup,
    )  # fmt: skip


def test_a_tie_is_a_gap_within_the_paired_variation_of_the_halves():
    best = figure("fd", 1.0, [0.0, 4.0, 8.0])
    # Each interval contains the other value, but the halves vary together.
    worse = ranked_figure(figure("fd", 1.5, [0.5, 4.5, 8.7]), best)
    assert (worse.rank, worse.gap) == ("", 0.5)
    # T_19 times the standard deviation of 0.5, 0.5, 0.7.
    assert worse.gap_of_chance == pytest.approx(2.093 * 0.2 / math.sqrt(3))
    assert ranked_figure(figure("fd", 1.5, [8.5, 4.5, 0.5]), best).rank == "tie"
    assert ranked_figure(best, best).rank == "best"


def test_halves_of_different_numbers_are_compared_without_pairing():
    best, other = figure("fd", 1.0, [0.0, 2.0]), figure("fd", 1.5, [0.0, 2.0, 4.0])
    assert gap_of_chance(other, best) == pytest.approx(2.093 * math.sqrt(2 + 4))


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
def test_a_scheduler_spec_survives_a_round_trip_through_its_name(text, want):
    assert SchedulerSpec.parse(text) == want
    assert SchedulerSpec.parse(str(want)) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("DDMI", "did you mean 'DDPM' or 'DDIM'"),
        ("nothing", "choices: DDPM, DDIM"),
        ("DDPM:eta", "must have the form NAME:option=value"),
        ("DDPM:eta=2", r"must be a number in \[0, 1\], got 2"),
    ],
)
def test_an_invalid_scheduler_name_is_rejected_with_the_choices(text, message, models, photos):
    with pytest.raises(ValueError, match=message):
        ddpm_hf.compare(models, photos, schedulers=[text])


@pytest.mark.slow
def test_without_any_measurable_setting_the_reason_is_the_error(models, photos, tmp_path, capsys):
    arguments = command(models[:1], photos, tmp_path, "--num-inference-steps", "21", "30")
    assert main(arguments) == 2
    assert "none of the settings can be measured" in capsys.readouterr().err
    assert main([*arguments, "--card"]) == 2
    assert "--card needs one model with one scheduler" in capsys.readouterr().err


def test_karras_sigmas_are_rejected_for_schedules_that_end_in_almost_pure_noise():
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
def test_two_processes_match_one_process(models, photos, tmp_path):
    arguments = command(models[:1], photos, tmp_path / "one", *SWEEP)
    assert main(arguments) == 0
    two = command(models[:1], photos, tmp_path / "two", *SWEEP)
    finish_ranks(["-m", "ddpm_hf", *two], tmp_path)
    one, two = (
        json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("one", "two")
    )
    assert one["left_out"] == two["left_out"]
    for first, second in zip(one["settings"], two["settings"], strict=True):
        # Kernels may round float32 differently with a process group.
        want, got = (row["figures"]["fd"]["value"] for row in (first, second))
        assert got == pytest.approx(want, rel=1e-3)
