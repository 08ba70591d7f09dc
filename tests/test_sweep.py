"""`ddpm-hf calibrate --sweep`: what it recommends, where that is kept, and who samples by it."""

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


def settings_by(folder):
    return json.loads((folder / "calibration.json").read_text())["results"][1]


def test_the_cheapest_as_good_as_the_best_is_kept_in_the_model_and_shown_in_its_card(
    photos, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(sweep, "NUM_STEPS", (2, 4))
    monkeypatch.setattr(sweep, "SAMPLERS", (sweep.PUBLISHED, SDE, UNIPC))
    model, output = save_model(tmp_path / "model"), tmp_path / "out"
    arguments = ["calibrate", str(model), str(photos), "--output", str(output), "--card", "--sweep",
                 "--sweep-images", "8", "--features", "pixels", "--batch-size", "8"]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr()
    found = settings_by(output)
    rows = {(row["scheduler"], row["num_inference_steps"]): row for row in found["settings"]}
    assert set(rows) == {(name, K) for name in (sweep.PUBLISHED, SDE, UNIPC) for K in (2, 4)}
    assert "all 20 steps cost more than all the others together" in printed.out
    good = [row for row in rows.values() if row["figures"]["fd"]["rank"]]
    chosen = min(good, key=lambda r: (r["num_network_calls"], r["figures"]["fd"]["value"]))
    recommended = {key: chosen[key] for key in ("scheduler", "num_inference_steps")}
    assert found["recommended"] == recommended
    assert "8 images by 192 features" in printed.out
    assert f"recommended: {chosen['scheduler']}, K = {chosen['num_inference_steps']}" in printed.out
    assert {"comparison.png", "samples.png"} <= {p.name for p in (output / "sweep").iterdir()}
    assert load(model).scheduler.recommended == recommended
    assert load(model).scheduler.x_0_mse is not None
    stock = DDPMScheduler.from_pretrained(model, subfolder="scheduler")  # without a warning
    assert stock.config.variance_type == "fixed_small"

    card = (model / "README.md").read_text()
    assert f"| {rows[SDE, 4]['num_network_calls']} |" in card
    assert f"Recommended: `{chosen['scheduler']}`, {chosen['num_inference_steps']} steps" in card
    images = [run(block, model) for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL)]
    for_stock = found["for_stock"]
    assert type(images[-1][0]) is DDPMPipeline
    for pipe, drawn, setting in zip(
        *zip(*images[-2:], strict=True), (recommended, for_stock), strict=True
    ):
        assert len(pipe.scheduler.timesteps) == setting["num_inference_steps"]
        assert np.isfinite(np.stack(drawn)).all()

    draws = []
    monkeypatch.setattr(sharded_sampling, "draw_batch", lambda *args, **kwargs: draws.append(1))
    assert main(arguments) == 0
    assert (draws, settings_by(output)["recommended"]) == ([], recommended)


def run(code, model):
    """The pipeline and the images of a block of a card."""
    space = {}
    torch.manual_seed(0)
    exec(code.replace('"."', repr(str(model))), space)
    return space["pipe"], space["images"]


@pytest.mark.parametrize(
    ("name", "num_steps"),
    [(SDE, 4), ("DDIM:timestep_spacing=trailing", 4), (sweep.PUBLISHED, 20)],
)
def test_stock_diffusers_draws_by_the_snippet_what_our_pipeline_does(name, num_steps, tmp_path):
    from ddpm_hf.hub.card import write_calibration

    setting = {"scheduler": name, "num_inference_steps": num_steps}
    model = save_model(tmp_path / "model", setting)
    write_calibration(model, {"sweep": {"for_stock": setting}})
    blocks = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 5
    ours, stock = run(blocks[3], model), run(blocks[4], model)
    assert isinstance(ours[0], GaussianDDPMPipeline)
    assert type(stock[0]) is DDPMPipeline
    for a, b in zip(ours[1], stock[1], strict=True):
        # Stock computes in float32 throughout: a pixel may be rounded to the next level.
        assert np.abs(np.asarray(a, int) - np.asarray(b, int)).max() <= 1


def drawn_by(folder):
    return json.loads((folder / "x.npz.json").read_text())["settings"]


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
def test_sample_takes_what_is_recommended_and_any_choice_overrides_it(
    kind, options, want, tmp_path, capsys
):
    model = save_model(tmp_path / "m", {"scheduler": SDE, "num_inference_steps": 4}, kind)
    arguments = ["sample", str(model), "--num-images", "1", "--output", str(tmp_path / "x.npz")]
    assert main([*arguments, *options]) == 0
    said = capsys.readouterr().err
    assert (f"{SDE} in 4 steps, as recommended by `ddpm-hf calibrate --sweep`" in said) == (
        not options
    )
    settings = drawn_by(tmp_path)
    own = (kind.__name__, 20)  # the usual 50 of DDIM are more than there are
    assert settings["scheduler"] == (want[0] or own[0])
    assert settings["num_inference_steps"] == (want[1] or own[1])


@pytest.mark.filterwarnings("always:the recommended setting")
def test_what_is_recommended_and_unknown_is_said_and_left_aside(tmp_path, capsys):
    model = save_model(tmp_path / "m", {"scheduler": "Newer", "num_inference_steps": 4})
    arguments = ["sample", str(model), "--num-images", "1", "--output", str(tmp_path / "x.npz")]
    assert main(arguments) == 0
    assert "recommended setting is not used: unknown scheduler 'Newer'" in (capsys.readouterr().err)
    assert drawn_by(tmp_path)["num_inference_steps"] == 20
    assert main([*arguments, "--thorough", "--eta", "0"]) == 2
    assert "--thorough cannot be combined with --eta" in capsys.readouterr().err


def test_a_pipeline_is_as_it_was_until_it_is_told(tmp_path):
    pipe = load(save_model(tmp_path / "m", {"scheduler": SDE, "num_inference_steps": 4}))
    assert isinstance(pipe.scheduler, GaussianDDPMScheduler)
    assert use_recommended(pipe) == {"num_inference_steps": 4}
    assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
    assert pipe.scheduler.config.algorithm_type == "sde-dpmsolver++"
    assert use_recommended(load(save_model(tmp_path / "none"))) == {}


def test_the_cheapest_of_the_good_ones_is_chosen_and_of_equal_cost_the_better():
    def row(calls, value, rank):
        return {"num_network_calls": calls, "figures": {"fd": {"value": value, "rank": rank}}}

    rows = [row(5, 9.0, ""), row(25, 2.0, "tie"), row(25, 1.9, "tie"), row(100, 1.8, "best")]
    assert sweep.cheapest(rows) is rows[2]
    assert sweep.cheapest(rows[:1]) is None


@pytest.mark.parametrize(("T", "is_whole"), [(1000, True), (1330, True), (1331, False), (4, True)])
def test_all_steps_are_swept_where_they_cost_no_more_than_the_rest(T, is_whole):
    choices = sweep.planned(T)
    assert ((sweep.PUBLISHED, T) in choices) == is_whole
    assert all(K < T for name, K in choices[:-1])
    if T > 100:
        assert sum(K for _, K in choices if K < T) == 7 * (5 + 10 + 25 + 50 + 100)


@pytest.mark.parametrize(
    ("name", "want"),
    [
        (SDE, "DPMSolverMultistepScheduler"),
        ("DDIM", "DDIMScheduler"),
        ("DDPM:x_0_mse=null,eta=0", None),  # clips, and takes eps from what is clipped
        ("DDIM:eta=1", None),
        ("DDPM", None),  # its variances may be calibrated
        (sweep.PUBLISHED, "DDPMScheduler"),
        (UNIPC, None),  # takes no generator, which that pipeline passes
        ("EulerDiscrete", None),  # needs its input scaled, which that pipeline does not
    ],
)
def test_what_stock_diffusers_can_run_is_known(name, want):
    found = stock_scheduler(name)
    assert (found and found[0]) == want
    assert found is None or "x_0_mse" not in found[1]


def test_a_name_that_would_be_code_is_none():
    for bad in ("DDIM:a='x'", "DDIM:a=`x`", "DDIM:a=<b>", "DDIM:a=(1)", "DDIM\n"):
        with pytest.raises(ValueError, match="must have the form NAME"):
            SchedulerSpec.parse(bad)
    assert {str(SchedulerSpec.parse(name)) for name in SCHEDULERS} == set(SCHEDULERS)
