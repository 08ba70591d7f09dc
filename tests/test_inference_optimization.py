"""`optimize`: what it changes, what it keeps, and what it reports."""

import json

import numpy as np
import pytest
import torch
import torch._dynamo
from diffusers import UNet2DModel
from torch.testing import assert_close

from ddpm_hf import (
    GaussianDDPMPipeline,
    GaussianDDPMScheduler,
    inference_optimization,
    load,
    optimize,
)
from ddpm_hf.cli import main
from ddpm_hf.inference_optimization import MIN_CALLS_TO_MEASURE
from ddpm_hf.inference_settings import InferenceSettings
from ddpm_hf.utils.backend_settings import is_channels_last, supports_bfloat16, tf32_operations
from ddpm_hf.utils.timing import fastest, fastest_num_threads


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
def _restore_process_settings():
    num_threads, matmul = torch.get_num_threads(), torch.backends.cuda.matmul
    precision, conv_precision = matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    yield
    torch.set_num_threads(num_threads)
    matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = precision, conv_precision


@pytest.mark.parametrize(("factor", "dtype"), [(1.01, "bfloat16"), (1.05, "float32")])
def test_a_faster_network_is_chosen_only_if_its_outputs_are_close(factor, dtype, monkeypatch):
    """The outputs of the candidate are off by 1 % or 5 %; at most 2 % are accepted."""
    module = inference_optimization
    monkeypatch.setattr(module, "supports_bfloat16", lambda device: True)
    monkeypatch.setattr(module, "time_in_turns", lambda calls: {call: [1.0] for call in calls})
    monkeypatch.setattr(module, "fastest", lambda seconds: list(seconds)[-1])
    cast = module._cast

    def cast_and_scaled(unet, dtype):
        for parameter in unet.conv_out.parameters():
            parameter.data *= factor
        return cast(unet, dtype)

    monkeypatch.setattr(module, "_cast", cast_and_scaled)
    options = {"memory_format": torch.contiguous_format, "compile": False, "num_threads": 1}
    pipeline = build_pipeline()
    assert optimize(pipeline, num_calls=MIN_CALLS_TO_MEASURE, **options).dtype == dtype


@pytest.mark.slow
def test_few_planned_calls_change_no_bit():
    pipeline = build_pipeline()
    before = sample(pipeline)
    result = optimize(pipeline, batch_size=2)
    assert torch.equal(sample(pipeline), before)
    assert result.deviation == 0
    assert result.speed_up is None


@pytest.mark.slow
def test_settings_chosen_by_measuring_change_float32_samples_by_rounding_only(tmp_path, capsys):
    pipeline = build_pipeline()
    before, weights = sample(pipeline), pipeline.unet.state_dict()
    result = optimize(pipeline, batch_size=2, num_calls=MIN_CALLS_TO_MEASURE)
    rounding = 0.02 if result.dtype == "bfloat16" else 1e-4  # bf16 on a CPU that supports it
    assert result.deviation < rounding
    assert_close(sample(pipeline), before, rtol=0, atol=10 * rounding)  # it adds up over 20 steps
    assert json.loads(json.dumps(result.to_dict()))["num_threads"] == torch.get_num_threads()
    assert capsys.readouterr().out == ""
    pipeline.save_pretrained(tmp_path)
    saved = load(tmp_path).unet.state_dict()
    assert result.dtype == "bfloat16" or all(
        torch.equal(saved[name], weights[name]) for name in weights
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ({"memory_format": torch.channels_last}, {"memory_format": "channels_last"}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        ({"num_threads": 2}, {"num_threads": 2}),
        ({"tf32": True}, {"tf32": True}),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_given_option_is_applied_and_nothing_else_changes(option, expected):
    pipeline = build_pipeline()
    before = sample(pipeline)
    result = optimize(pipeline, batch_size=2, num_calls=1, **option)
    unchanged = InferenceSettings("contiguous", "float32", compile=False, tf32=False, num_threads=1)
    assert result.settings_dict() == unchanged.settings_dict() | expected
    assert ("matrix products" in tf32_operations()) == result.tf32
    assert torch.get_num_threads() == result.num_threads
    # bf16 has 8 bits, and its rounding adds up over 20 steps.
    atol = 0.1 if result.dtype == "bfloat16" else 1e-4
    assert_close(sample(pipeline), before, rtol=0, atol=atol)


def test_recorded_settings_can_be_applied_again():
    recorded = optimize(
        build_pipeline(), 2, 1, memory_format=torch.channels_last, dtype=torch.bfloat16
    ).to_dict()
    settings = InferenceSettings.from_dict(json.loads(json.dumps(recorded)))
    assert optimize(build_pipeline(), 2, 1, **settings.arguments()).to_dict() == recorded


def build_guide(**config):
    pipeline = build_pipeline(**config)
    with torch.no_grad():
        pipeline.unet.conv_out.weight.mul_(0.9)
    return pipeline


@pytest.mark.slow
def test_a_guide_gets_the_settings_of_the_network():
    pipeline, guide = build_pipeline(), build_guide()
    call = {"guide": guide, "guidance_scale": 2.0}
    before = sample(pipeline, **call)
    options = {"dtype": torch.bfloat16, "memory_format": torch.channels_last}
    result = optimize(pipeline, batch_size=2, num_calls=1, guide=guide, **options)
    assert (guide.unet.dtype, is_channels_last(guide.unet)) == (torch.bfloat16, True)
    # bf16 has 8 bits; its rounding adds up over 20 steps, and guidance triples it.
    assert_close(sample(pipeline, **call), before, rtol=0, atol=0.3)
    assert str(result.guide).startswith("bfloat16, channels_last")


@pytest.mark.slow
def test_the_command_prints_the_settings_and_draws_the_same_images(tmp_path, capsys):
    build_pipeline().save_pretrained(tmp_path / "model")
    build_guide().save_pretrained(tmp_path / "guide")
    command = ["sample", str(tmp_path / "model"), "--num-images", "20", "--batch-size", "2"]
    command += ["--guide", str(tmp_path / "guide")]
    for name, options in (("exact", []), ("fast", ["--optimize"])):  # 200 calls: enough to measure
        assert main([*command, "--output", str(tmp_path / f"{name}.npy"), *options]) == 0
        out = capsys.readouterr().out
        assert ("optimized: " in out, "optimized guide: " in out) == (bool(options),) * 2
    exact, fast = (np.load(tmp_path / f"{name}.npy") for name in ("exact", "fast"))
    assert abs(exact - fast).max() < (0.1 if supports_bfloat16(torch.device("cpu")) else 1e-3)


@pytest.mark.slow
def test_the_command_measures_with_the_doubled_batch_of_classifier_free_guidance(tmp_path):
    build_pipeline(num_class_embeds=3).save_pretrained(tmp_path / "model")
    batch_sizes = set()
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            batch_sizes.add(len(inputs[0]))
            if type(module) is UNet2DModel and not inputs[0].is_meta
            else None
        )
    )
    command = ["sample", str(tmp_path / "model"), "--num-images", "2", "--guidance-scale", "2"]
    try:
        assert main([*command, "--output", str(tmp_path / "x.npy"), "--optimize"]) == 0
    finally:
        hook.remove()
    assert batch_sizes == {4}


@pytest.fixture
def set_compiler():
    """Function that sets the backend of `torch.compile`."""
    before = torch.compiler.get_default_backend()
    yield torch.compiler.set_default_backend
    torch.compiler.set_default_backend(before)
    torch._dynamo.reset()


@pytest.mark.slow
def test_a_compiled_network_samples_and_saves_like_a_plain_one(set_compiler, tmp_path):
    set_compiler("aot_eager")  # without the C++ compiler, which takes a minute
    pipeline = build_pipeline()
    before, weights = sample(pipeline), pipeline.unet.state_dict()
    result = optimize(pipeline, batch_size=2, num_calls=1, compile=True)
    assert (result.compile, result.notes[1:]) == (True, ())
    assert_close(sample(pipeline), before, rtol=0, atol=1e-4)
    pipeline.save_pretrained(tmp_path)
    assert load(tmp_path).unet.state_dict().keys() == weights.keys()


def no_compiler(*_):
    raise RuntimeError("no compiler here")


def wrong_compiler(graph, _):
    return lambda *inputs: [2 * output for output in graph(*inputs)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiler", "reason"),
    [(no_compiler, "no compiler here"), (wrong_compiler, "its outputs would be off by 1")],
)
def test_a_network_that_cannot_be_compiled_is_unchanged(set_compiler, compiler, reason):
    set_compiler(compiler)
    pipeline = build_pipeline()
    before = sample(pipeline)
    result = optimize(pipeline, batch_size=2, num_calls=1, compile=True)
    assert not result.compile
    assert reason in str(result)
    assert torch.equal(sample(pipeline), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [{"num_class_embeds": 3}, {"class_embed_type": "timestep"}, {"class_embed_type": "identity"}],
    ids=str,
)
def test_class_conditional_networks_are_measured_with_a_class(config):
    assert optimize(build_pipeline(**config), 2, MIN_CALLS_TO_MEASURE).deviation <= 0.02


@pytest.mark.parametrize(
    ("option", "error", "message"),
    [
        ({"guide": 8}, TypeError, "guide.*got int"),
        ({"batch_size": 0}, ValueError, "batch_size.*got 0"),
        ({"num_threads": 0}, ValueError, "num_threads.*got 0"),
        ({"dtype": 8}, TypeError, "dtype.*got 8"),
    ],
)
def test_bad_arguments_are_refused(option, error, message):
    with pytest.raises(error, match=message):
        optimize(build_pipeline(), **option)


@pytest.mark.parametrize(
    ("second", "third", "winner"),
    [(1.0, 1.0, "first"), (0.99, 2.0, "first"), (0.9, 1.0, "second"), (0.9, 0.8, "third")],
)
def test_only_a_clearly_faster_candidate_replaces_the_first(second, third, winner):
    # The median ignores one slow round of three, caused by another process.
    seconds = {"first": [1.0, 9.0, 1.0], "second": [second] * 3, "third": [third, third, 50.0]}
    assert fastest(seconds) == winner


@pytest.mark.slow
def test_one_thread_is_chosen_if_it_is_faster_than_two():
    slow_with_two = {1: 1000, 2: 300_000}
    call = lambda: sum(range(slow_with_two[torch.get_num_threads()]))  # noqa: E731
    assert fastest_num_threads(call, maximum=2) == 1
    assert fastest_num_threads(lambda: sum(range(100_000)), maximum=1) == 1
