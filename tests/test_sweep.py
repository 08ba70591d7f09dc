"""`ddpm-hf calibrate --sweep`: the choice, where it is stored, and sampling with it."""

import json
import re

import numpy as np
import pytest
import torch
from checkpoints import SHORT_CHAIN, tiny_unet
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler
from image_sets import folder_of
from image_zoo import encode

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, load
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts
from ddpm_hf.evaluation import sweep
from ddpm_hf.evaluation.calibration_results import CheckpointCalibration
from ddpm_hf.evaluation.comparison_results import ComparisonRow, RankedFigure
from ddpm_hf.evaluation.figures import ModelFacts
from ddpm_hf.sampling import sharded_sampling, use_recommended
from ddpm_hf.scheduler_spec import SCHEDULERS, SchedulerSpec, stock_scheduler

SDE = "DPMSolverMultistep:algorithm_type=sde-dpmsolver++,timestep_spacing=trailing"
UNIPC = "UniPCMultistep:timestep_spacing=trailing"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    rng = np.random.default_rng(0)
    files = {
        f"{split}/{i:02d}.png": encode(rng.integers(0, 256, (8, 8), dtype=np.uint8))
        for split in ("train", "test")
        for i in range(8)
    }
    return folder_of(tmp_path_factory.mktemp("photos"), files)


def save_model(folder, recommended=None, scheduler=GaussianDDPMScheduler):
    unet = tiny_unet()
    unet.register_to_config(_ddpm_hf=ImageFacts(mode="L", height=8, width=8).to_config())
    own = GaussianDDPMScheduler(**SHORT_CHAIN, recommended=recommended)
    GaussianDDPMPipeline(unet, scheduler.from_config(own.config)).save_pretrained(folder)
    return folder


def read(folder):
    return CheckpointCalibration.from_dict(json.loads((folder / "calibration.json").read_text()))


@pytest.mark.slow
def test_the_recommended_setting_is_stored_in_the_model_and_shown_in_its_card(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sweep, "NUM_STEPS", (2, 4))
    monkeypatch.setattr(sweep, "SAMPLERS", (sweep.PUBLISHED, SDE, UNIPC))
    model, output = save_model(tmp_path / "model"), tmp_path / "out"
    arguments = ["calibrate", str(model), str(photos), "--output", str(output), "--card", "--sweep",
                 "--sweep-images", "8", "--features", "pixels", "--batch-size", "8"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    calibration = read(output)
    swept = calibration.sweep
    assert [(row.scheduler, row.num_inference_steps) for row in swept.settings] == [
        (sweep.PUBLISHED, 2), (sweep.PUBLISHED, 4), (SDE, 2), (SDE, 4), (UNIPC, 2), (UNIPC, 4)
    ]  # fmt: skip
    assert swept.all_steps is None
    assert "all 20 steps cost more than all other settings together" in printed.out
    assert "8 images by 192 features" in printed.out
    assert "DDPM, uncalibrated, K = 2 " in printed.out  # the words of the pictures
    assert "x_0_mse" not in printed.out.partition("recommended: ")[0]
    assert printed.out.startswith(str(calibration))
    assert {"comparison.png", "samples.png"} <= {p.name for p in (output / "sweep").iterdir()}
    recommended = swept.recommended.to_dict()
    assert re.search(
        rf"recommended: .*, K = {recommended['num_inference_steps']}"
        rf" \(scheduler {re.escape(recommended['scheduler'])}\)",
        printed.out,
    )
    assert load(model).scheduler.recommended == recommended
    assert load(model).scheduler.x_0_mse is not None
    stock = DDPMScheduler.from_pretrained(model, subfolder="scheduler")  # without a warning
    assert stock.config.variance_type == "fixed_small"

    card = (model / "README.md").read_text()
    assert f"| {swept.settings[3].num_network_calls} |" in card
    name, num_steps = recommended["scheduler"], recommended["num_inference_steps"]
    assert f"Recommended: `{name}`, {num_steps} steps" in card
    images = [run(block, model) for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]
    assert type(images[-1][0]) is DDPMPipeline
    for pipe, drawn, setting in zip(
        *zip(*images[-2:], strict=True), (swept.recommended, swept.for_stock), strict=True
    ):
        assert len(pipe.scheduler.timesteps) == setting.num_inference_steps
        assert np.isfinite(np.stack(drawn)).all()

    draws = []
    monkeypatch.setattr(sharded_sampling, "draw_batch", lambda *args, **kwargs: draws.append(1))
    assert main(arguments) == 0
    assert (draws, read(output).sweep.recommended) == ([], swept.recommended)


def run(code, model):
    """Pipeline and images of a code block of a card."""
    space = {}
    torch.manual_seed(0)
    exec(code.replace('"."', repr(str(model))), space)
    return space["pipe"], space["images"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_steps"),
    [(SDE, 4), ("DDIM:timestep_spacing=trailing", 4), (sweep.PUBLISHED, 20)],
)
def test_stock_diffusers_with_the_cards_snippet_matches_our_pipeline(name, num_steps, tmp_path):
    from ddpm_hf.hub.card import write_model_card

    setting = {"scheduler": name, "num_inference_steps": num_steps}
    model = save_model(tmp_path / "model", setting)
    facts = {"calibration": {"sweep": {"for_stock": setting}}}
    (model / "training.json").write_text(json.dumps(facts))
    write_model_card(model)
    blocks = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    ours, stock = run(blocks[3], model), run(blocks[4], model)
    assert isinstance(ours[0], GaussianDDPMPipeline)
    assert type(stock[0]) is DDPMPipeline
    for a, b in zip(ours[1], stock[1], strict=True):
        # Stock computes in float32 only: a pixel may be rounded to the next level.
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def drawn_by(folder):
    return json.loads((folder / "x.npz.json").read_text())["settings"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [GaussianDDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    ("options", "want"),
    [
        ([], ("DPMSolverMultistepScheduler", 4)),
        (["--thorough"], ("GaussianDDPMScheduler", 20)),
        (["--num-inference-steps", "3"], (None, 3)),
        (["--eta", "0"], (None, None)),
        (["--scheduler", "DDPM:eta=0", "--num-inference-steps", "2"], ("GaussianDDPMScheduler", 2)),
    ],
)
def test_sample_uses_the_recommended_setting_unless_the_user_chooses(
    kind, options, want, tmp_path, capsys
):
    model = save_model(tmp_path / "m", {"scheduler": SDE, "num_inference_steps": 4}, kind)
    arguments = ["sample", str(model), "--num-images", "1", "--output", str(tmp_path / "x.npz")]
    assert main([*arguments, *options]) == 0
    is_reported = "DPMSolverMultistep, SDE in 4 steps, as recommended" in capsys.readouterr().err
    assert is_reported == (not options)
    settings = drawn_by(tmp_path)
    own = (kind.__name__, 20)  # fewer than the usual 50 of DDIM
    assert settings["scheduler"] == (want[0] or own[0])
    assert settings["num_inference_steps"] == (want[1] or own[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("always:the recommended setting")
def test_an_unknown_recommended_setting_is_ignored_with_a_warning(tmp_path, capsys):
    model = save_model(tmp_path / "m", {"scheduler": "Newer", "num_inference_steps": 4})
    arguments = ["sample", str(model), "--num-images", "1", "--output", str(tmp_path / "x.npz")]
    assert main(arguments) == 0
    warning = "recommended setting is not used: unknown scheduler 'Newer'"
    assert warning in capsys.readouterr().err
    assert drawn_by(tmp_path)["num_inference_steps"] == 20
    assert main([*arguments, "--thorough", "--eta", "0"]) == 2
    assert "--thorough cannot be combined with --eta" in capsys.readouterr().err


def test_a_pipeline_uses_the_recommended_setting_only_on_request(tmp_path):
    pipe = load(save_model(tmp_path / "m", {"scheduler": SDE, "num_inference_steps": 4}))
    assert isinstance(pipe.scheduler, GaussianDDPMScheduler)
    assert use_recommended(pipe) == {"num_inference_steps": 4}
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert use_recommended(load(save_model(tmp_path / "none"))) == {}


def row(num_calls, value, rank):
    fd = RankedFigure(
        name="fd", label="FD", value=value, interval=(0.0, 9.0), standard_error=1.0, rank=rank
    )
    return ComparisonRow(
        setting=f"{num_calls}", name=None, scheduler="DDIM", num_inference_steps=num_calls,
        model=ModelFacts(name="m", revision=None, weights=""), num_network_calls=num_calls,
        seconds_per_image=None, folder="", figures={"fd": fd},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "want"),
    [
        ([(5, 9.0, ""), (25, 2.0, "tie"), (100, 1.8, "best")], 1),  # the cheapest tie
        ([(25, 2.0, "tie"), (25, 1.9, "tie"), (100, 1.8, "best")], 1),  # of equal cost, the better
        ([(5, 9.0, ""), (25, 3.0, ""), (100, 1.8, "best")], 2),  # only the best
        ([(5, 1.8, "best"), (25, 1.9, "tie")], 0),
    ],
)
def test_the_cheapest_setting_that_is_the_best_or_a_tie_is_chosen(rows, want):
    rows = [row(*facts) for facts in rows]
    assert sweep.cheapest(rows) is rows[want]


def test_without_the_best_or_a_tie_nothing_is_chosen():
    assert sweep.cheapest([row(5, 9.0, "")]) is None


@pytest.mark.parametrize(
    ("T", "num_settings", "has_all_steps"),
    [(1000, 36, True), (1330, 36, True), (1331, 35, False), (60, 29, True), (4, 1, True)],
)
def test_all_steps_are_swept_if_they_cost_no_more_than_the_rest(T, num_settings, has_all_steps):
    """Seven samplers in 5, 10, 25, 50 and 100 steps make 1,330 network calls."""
    choices = sweep.planned(T)
    assert len(choices) == num_settings
    assert ((sweep.PUBLISHED, T) in choices) == has_all_steps
    assert ("DDPM:timestep_spacing=trailing", 5) in choices or T <= 5


@pytest.mark.parametrize(
    ("name", "want"),
    [
        (SDE, "DPMSolverMultistepScheduler"),
        ("DDIM", "DDIMScheduler"),
        ("DDPM:x_0_mse=null,eta=0", None),  # clips x_0 and recomputes eps
        ("DDIM:eta=1", None),
        ("DDPM", None),  # its variances may be calibrated
        (sweep.PUBLISHED, "DDPMScheduler"),
        (UNIPC, None),  # takes no generator, which that pipeline passes
        ("EulerDiscrete", None),  # needs its input scaled, which that pipeline does not
    ],
)
def test_the_samplers_that_stock_diffusers_can_run(name, want):
    stock = stock_scheduler(name)
    assert (stock and stock[0]) == want
    assert stock is None or "x_0_mse" not in stock[1]


def test_a_name_that_contains_code_is_rejected():
    for bad in ("DDIM:a='x'", "DDIM:a=`x`", "DDIM:a=<b>", "DDIM:a=(1)", "DDIM\n"):
        with pytest.raises(ValueError, match="must have the form NAME"):
            SchedulerSpec.parse(bad)
    assert {str(SchedulerSpec.parse(name)) for name in SCHEDULERS} == set(SCHEDULERS)
