"""`optimize`: what it changes, what it leaves as it is, and what it says."""

import json

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import UNet2DModel
from torch.testing import assert_close

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler, load
from ddpm_hf.cli import main
from ddpm_hf.diffusion.speed import (
    FEWEST_CALLS,
    fastest,
    fastest_num_threads,
    has_bfloat16,
    is_channels_last,
    tf32_operations,
)


def build_pipeline(**config):
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        **config,
    )
    scheduler = GaussianDDPMScheduler(20, beta_schedule="squaredcos_cap_v2")
    pipeline = GaussianDDPMPipeline(unet, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline, **call):
    return pipeline(2, torch.Generator().manual_seed(1), output_type="pt", **call).images


@pytest.fixture(autouse=True)
def _settings_of_the_process_stay():
    num_threads, matmul = torch.get_num_threads(), torch.backends.cuda.matmul
    precision, of_conv = matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    yield
    torch.set_num_threads(num_threads)
    matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = precision, of_conv


def test_for_few_calls_every_bit_stays_as_it_was():
    pipeline = build_pipeline()
    before = sample(pipeline)
    chosen = pipeline.optimize(batch_size=2)
    assert torch.equal(sample(pipeline), before)
    assert chosen.deviation == 0
    assert chosen.speed_up is None


def test_what_is_chosen_by_measuring_moves_float32_samples_by_rounding_alone(tmp_path, capsys):
    pipeline = build_pipeline()
    before, weights = sample(pipeline), pipeline.unet.state_dict()
    chosen = pipeline.optimize(batch_size=2, num_calls=FEWEST_CALLS)
    rounding = 0.02 if chosen.dtype == "bfloat16" else 1e-4  # on a CPU that has it
    assert chosen.deviation < rounding
    assert_close(sample(pipeline), before, rtol=0, atol=10 * rounding)  # 20 steps of such
    assert str(chosen) in capsys.readouterr().out
    assert json.loads(json.dumps(chosen.to_dict()))["num_threads"] == torch.get_num_threads()
    pipeline.save_pretrained(tmp_path)
    saved = load(tmp_path).unet.state_dict()
    assert chosen.dtype == "bfloat16" or all(
        torch.equal(saved[name], weights[name]) for name in weights
    )


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"memory_format": torch.channels_last}, {"memory_format": "channels_last"}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"num_threads": 2}, {"num_threads": 2}),
        ({"tf32": True}, {"tf32": True}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_an_option_that_is_given_is_set_and_nothing_else_changes(option, said):
    pipeline = build_pipeline()
    before = sample(pipeline)
    chosen = pipeline.optimize(batch_size=2, num_calls=1, **option).to_dict()
    usual = {"memory_format": "contiguous", "dtype": "float32", "compile": False, "tf32": False}
    expected = {**usual, "num_threads": 1, **said}
    assert {key: chosen[key] for key in expected} == expected
    assert ("matrix products" in tf32_operations()) == chosen["tf32"]
    assert torch.get_num_threads() == chosen["num_threads"]
    # bf16 keeps 8 bits, and its rounding adds up over 20 steps.
    atol = 0.1 if chosen["dtype"] == "bfloat16" else 1e-4
    assert_close(sample(pipeline), before, rtol=0, atol=atol)


def build_guide(**config):
    pipeline = build_pipeline(**config)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.9)
    return pipeline


def test_a_guide_is_run_as_the_network_is(capsys):
    pipeline, guide = build_pipeline(), build_guide()
    call = {"guide": guide, "guidance_scale": 2.0}
    before = sample(pipeline, **call)
    options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    pipeline.optimize(batch_size=2, num_calls=1, guide=guide, **options)
    assert (guide.unet.dtype, is_channels_last(guide.unet)) == (torch.bfloat16, True)
    # bf16 keeps 8 bits; its rounding adds up over 20 steps, and guidance triples it.
    assert_close(sample(pipeline, **call), before, rtol=0, atol=0.3)
    assert "optimized guide: bfloat16, channels_last" in capsys.readouterr().out


def test_the_command_says_how_it_is_fast_and_draws_the_same_images(tmp_path, capsys):
    build_pipeline().save_pretrained(tmp_path / "model")
    build_guide().save_pretrained(tmp_path / "guide")
    command = ["sample", str(tmp_path / "model"), "--num-images", "20", "--batch-size", "2"]
    command += ["--guide", str(tmp_path / "guide")]
    for name, options in (("exact", []), ("fast", ["--optimize"])):  # 200 calls: enough to measure
        assert main([*command, "--output", str(tmp_path / f"{name}.npy"), *options]) == 0
        out = capsys.readouterr().out
        assert ("optimized: " in out, "optimized guide: " in out) == (bool(options),) * 2
    exact, fast = (np.load(tmp_path / f"{name}.npy") for name in ("exact", "fast"))
    assert abs(exact - fast).max() < (0.1 if has_bfloat16(torch.device("cpu")) else 1e-3)


def test_the_command_measures_with_as_many_images_as_guidance_computes_at_once(tmp_path):
    build_pipeline(num_class_embeds=3).save_pretrained(tmp_path / "model")
    seen = set()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: seen.add(len(given[0])) if type(module) is UNet2DModel else None
    )
    command = ["sample", str(tmp_path / "model"), "--num-images", "2", "--guidance-scale", "2"]
    try:
        assert main([*command, "--output", str(tmp_path / "x.npy"), "--optimize"]) == 0
    finally:
        hook.remove()
    assert seen == {4}


@pytest.fixture
def backend():
    """A function that chooses what `torch.compile` compiles by."""
    before = torch.compiler.get_default_backend()
    yield torch.compiler.set_default_backend
    torch.compiler.set_default_backend(before)
    torch._dynamo.reset()


def test_a_compiled_network_samples_and_saves_like_a_plain_one(backend, tmp_path):
    backend("aot_eager")  # all but the compiler of C++, which takes a minute
    pipeline = build_pipeline()
    before, weights = sample(pipeline), pipeline.unet.state_dict()
    chosen = pipeline.optimize(batch_size=2, num_calls=1, compile=True)
    assert (chosen.compile, chosen.notes[1:]) == (True, ())
    assert_close(sample(pipeline), before, rtol=0, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    assert load(tmp_path).unet.state_dict().keys() == weights.keys()


def no_compiler(*_):
    raise RuntimeError("no compiler here")


def wrong_compiler(graph, _):
    return lambda *inputs: [2 * output for output in graph(*inputs)]


@pytest.mark.parametrize(
    ("compiler", "said"),
    [(no_compiler, "no compiler here"), (wrong_compiler, "its outputs would be off by 1")],
)
def test_a_network_that_cannot_be_compiled_stays_as_it_is(backend, compiler, said):
    backend(compiler)
    pipeline = build_pipeline()
    before = sample(pipeline)
    chosen = pipeline.optimize(batch_size=2, num_calls=1, compile=True)
    assert not chosen.compile
    assert said in str(chosen)
    assert torch.equal(sample(pipeline), before)


@pytest.mark.parametrize(
    "config",
    [{"num_class_embeds": 3}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}],
    ids=str,
)
def test_networks_that_are_told_a_class_are_measured_with_one(config):
    assert build_pipeline(**config).optimize(batch_size=2, num_calls=FEWEST_CALLS).deviation <= 0.02


@pytest.mark.parametrize(
    ("option", "error"),
    [
        ({"guide": 8}, TypeError),
        ({"batch_size": 0}, ValueError),
        ({"num_threads": 0}, ValueError),
        ({"dtype": 8}, TypeError),
    ],
)
def test_bad_arguments_are_refused(option, error):
    with pytest.raises(error):
        build_pipeline().optimize(**option)


@pytest.mark.parametrize(
    ("second", "third", "winner"),
    [(1.0, 1.0, "first"), (0.99, 2.0, "first"), (0.9, 1.0, "second"), (0.9, 0.8, "third")],
)
def test_only_what_is_clearly_faster_takes_the_place_of_what_is_there(second, third, winner):
    # One slow round of three, as where another process ran, does not count.
    seconds = {"first": [1.0, 9.0, 1.0], "second": [second] * 3, "third": [third, third, 50.0]}
    assert fastest(seconds) == winner


def test_two_threads_give_way_to_one_where_one_is_faster():
    slow_with_two = {1: 1000, 2: 300_000}
    call = lambda: sum(range(slow_with_two[torch.get_num_threads()]))  # noqa: E731
    assert fastest_num_threads(call, most=2) == 1
    assert fastest_num_threads(lambda: sum(range(100_000)), most=1) == 1
