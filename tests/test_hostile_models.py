"""Model folders of strangers: a refusal of one line or a few images, in bounded time and memory."""

import json
import shutil
import struct
import time

import numpy as np
import pytest
import torch
from checkpoints import SHORT_CHAIN, TWO_LEVELS, tiny_unet
from image_sets import folder_of
from image_zoo import encode
from peak_memory import peak_memory_growth
from safetensors.torch import load_file, save_file

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.data import ImageFacts

INDEX, SCHEDULER, NETWORK = (
    "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"
)  # fmt: skip
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
MAX_SECONDS, MAX_BYTES = 20, 2**27
NAN, INF, HUGE = float("nan"), float("inf"), 10**400

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original") / "model"
    unet = tiny_unet(**TWO_LEVELS)
    unet.register_to_config(_ddpm_hf=ImageFacts(mode="L", height=8, width=8).to_config())
    scheduler = GaussianDDPMScheduler(
        **SHORT_CHAIN,
        x_0_mse=[0.1] * 20,
        calibrated_timesteps={"DDIM": {2: [19, 9]}},
        recommended={"scheduler": "DDIM", "num_inference_steps": 2},
    )
    GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


def patch(path, changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def patch_extension(path, changes):
    content = json.loads(path.read_text())
    content["_ddpm_hf"] |= changes
    path.write_text(json.dumps(content))


def sample(model, capsys):
    """Exit status of sampling one image, and the last line of the messages, if any."""
    start = time.monotonic()
    with peak_memory_growth() as memory:
        status = main(["sample", str(model), "--num-images", "1", "--batch-size", "1",
                       "--output", str(model.parent / "out")])  # fmt: skip
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert time.monotonic() - start < MAX_SECONDS
    assert memory.num_bytes < MAX_BYTES
    line = (printed.splitlines() or [""])[-1]
    if status:
        assert line.startswith("ddpm-hf: error: ")
        assert len(line) < 1000
    return status, line


REFUSED = [
    *((INDEX, {"_class_name": value}) for value in (None, 7, [], "StableDiffusionPipeline", "os")),
    *((INDEX, {"unet": value}) for value in (
        None, [], ["os", "system"], ["diffusers"], ["diffusers", 7], "UNet2DModel",
        ["diffusers", "UNet2DConditionModel"], {"a": 1},
    )),
    *((INDEX, {"scheduler": value}) for value in (
        ["diffusers", "Nope"], ["diffusers", None], ["diffusers"], [], {"a": 1}, 7,
        ["diffusers", "../x"], ["diffusers", "UNet2DModel"], ["diffusers", ["DDPMScheduler"]],
        ["subprocess", "Popen"], ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    )),
    *((INDEX, {"vae": value}) for value in (["os", "system"], 7, [], {"a": []})),
    *((SCHEDULER, {"num_train_timesteps": value}) for value in (
        0, -1, 1.5, "20", True, None, 10**9, HUGE, NAN, INF, [20],
    )),
    *((SCHEDULER, {"beta_schedule": value}) for value in (7, "nope", None, [])),
    *((SCHEDULER, {"trained_betas": value}) for value in (
        [], [1] * 3, "abc", [[0.1] * 20], [NAN] * 20, {"a": 1}, [HUGE] * 20, ["x"] * 20, [2.0] * 20,
    )),
    *((SCHEDULER, {"beta_schedule": "linear", "beta_start": value}) for value in (
        "x", -1, NAN, [0.1], 2, HUGE, {},
    )),
    *((SCHEDULER, {key: value}) for key in (
        "variance_type", "prediction_type", "timestep_spacing",
    ) for value in ("nope", 7, [], {})),
    (SCHEDULER, {"steps_offset": 10**9}),
    (SCHEDULER, {"steps_offset": "a"}),
    (SCHEDULER, {"clip_sample_range": -1}),
    (SCHEDULER, {"clip_sample_range": "x"}),
    (SCHEDULER, {"thresholding": True, "dynamic_thresholding_ratio": 5}),
    *((NETWORK, {"sample_size": value}) for value in (
        0, -8, "8", 10**9, [8], [8, 10**6], [1, 2, 3], 1.5, {"a": 1}, True,
    )),
    *((NETWORK, {"in_channels": value}) for value in (0, -1, 10**9, 7, "1", None, 1.5)),
    *((NETWORK, {"out_channels": value}) for value in (0, 10**6, 7, "1")),
    *((NETWORK, {"block_out_channels": value}) for value in (
        [], [8] * 40, [10**9, 10**9], ["8", "8"], [8, -8], [0, 0], 7, [8.5, 8], [[8], [8]], "ab",
        [4, 4], {"a": 1},
    )),
    *((NETWORK, {"layers_per_block": value}) for value in (10**9, 0, "1", [1], None, -1)),
    *((NETWORK, {"norm_num_groups": value}) for value in (0, 3, 10**9, -4, "4")),
    *((NETWORK, {"attention_head_dim": value}) for value in (0, 7, 10**9, -1, "x")),
    *((NETWORK, {"down_block_types": value}) for value in (
        [], ["os", "os"], [["a"], ["b"]], ["DownBlock2D"], "DownBlock2D", 7, None,
    )),
    (NETWORK, {"up_block_types": ["nope", "UpBlock2D"]}),
    (NETWORK, {"dropout": "x"}),
    (NETWORK, {"dropout": 2}),
    (NETWORK, {"num_class_embeds": 10**12}),
    (NETWORK, {"num_class_embeds": "3"}),
    (NETWORK, {"num_class_embeds": -1}),
    (NETWORK, {"time_embedding_type": "nope"}),
    (NETWORK, {"time_embedding_type": "fourier"}),
    (NETWORK, {"act_fn": 7}),
    (NETWORK, {"act_fn": "none"}),
    (NETWORK, {"quantization_config": {"load_in_8bit": True}}),
    (NETWORK, {"resnet_time_scale_shift": "nope"}),
    (NETWORK, {"norm_eps": "x"}),
    (NETWORK, {"downsample_padding": 10**6}),
    (NETWORK, {"freq_shift": "x"}),
    *((NETWORK, {"_ddpm_hf": {"format_version": 1, "image": {
        "mode": "L", "height": 8, "width": 8, "bit_depth": 8} | image}}) for image in (
        {"height": 10**9}, {"height": 8192}, {"width": "8"}, {"mode": "XYZ"}, {"mode": ["L"]},
        {"mode": "RGB"}, {"bit_depth": 7}, {"bit_depth": None}, {"height": 9},
    )),
]  # fmt: skip


@pytest.mark.parametrize(("file", "changes"), REFUSED, ids=lambda value: str(value)[:60])
def test_a_hostile_configuration_is_refused_by_name(file, changes, model, capsys):
    patch(model / file, changes)
    status, line = sample(model, capsys)
    assert status == 2
    assert str(model) in line or "_ddpm_hf" in changes
    assert "--" not in line  # the value is not from the command line
    if file == SCHEDULER:
        assert list(changes)[-1] in line


def test_a_network_that_divides_by_zero_is_refused_after_the_first_step(model, capsys):
    patch(model / NETWORK, {"mid_block_scale_factor": 0})
    status, line = sample(model, capsys)
    assert status == 2
    assert "non-finite value at step 0 of 2" in line


HARMLESS = [
    (INDEX, {"_diffusers_version": []}),
    (INDEX, {"_name_or_path": "/etc/passwd"}),
    (SCHEDULER, {"_class_name": "os.system"}),
    (SCHEDULER, {"unknown": "[" * 1000}),
    (SCHEDULER, {"_ddpm_hf": []}),
    (SCHEDULER, {"_ddpm_hf": {"fingerprint": "0" * 16, "format_version": 1}}),
    (SCHEDULER, {"_ddpm_hf": {"format_version": 10**9}}),
    (NETWORK, {"_class_name": "os.system"}),
    (NETWORK, {"unknown": 10**400}),
    (NETWORK, {"_ddpm_hf": {"format_version": 99}}),
    (NETWORK, {"mid_block_type": "nope"}),
    (NETWORK, {"downsample_type": "nope"}),
]


@pytest.mark.parametrize(("file", "changes"), HARMLESS, ids=lambda value: str(value)[:60])
def test_entries_without_effect_are_ignored(file, changes, model, capsys):
    patch(model / file, changes)
    assert sample(model, capsys)[0] == 0


EXTENSIONS = [
    *({"recommended": value} for value in (
        "x", 7, [], {"scheduler": 7}, {"scheduler": "DDIM"}, {"num_inference_steps": 2},
        {"scheduler": "DDIM", "num_inference_steps": 10**9},
        {"scheduler": "DDIM", "num_inference_steps": -1},
        {"scheduler": "DDIM", "num_inference_steps": "2"},
        {"scheduler": "DDIM:num_train_timesteps=1000000000", "num_inference_steps": 2},
        {"scheduler": "UniPCMultistep:solver_order=1000000000", "num_inference_steps": 2},
        {"scheduler": "DDIM:trained_betas=null", "num_inference_steps": 2},
        {"scheduler": "DDIM:" + "a=1," * 10_000, "num_inference_steps": 2},
        {"scheduler": "DDPM:eta=1e999", "num_inference_steps": 2},
        {"scheduler": "\x1b[2J", "num_inference_steps": 2},
    )),
    *({"x_0_mse": value} for value in ("a", 7, [], [NAN] * 20, [0.1] * 10**5, [-1] * 20, [[1]])),
    *({"calibrated_timesteps": value} for value in (
        "x", [], {"DDIM": 7}, {"DDIM": {"2": [10**9]}}, {"DDIM": {"x": [1]}}, {"DDIM": {"2": "a"}},
        {"DDIM": {"2": [1, 2]}}, {"DDIM": {"-1": []}}, {"DDIM": {"2": [NAN, 1]}},
    )),
    {"beta_schedule": 7},
    {"beta_schedule": "\x1b[2J"},
    {"beta_schedule_params": {"tau": "x"}},
    {"beta_schedule_params": {"tau": 1e300}},
    {"fingerprint": 7},
    {"fingerprint": []},
    {"format_version": None},
    {"format_version": "1"},
]  # fmt: skip


@pytest.mark.parametrize("changes", EXTENSIONS, ids=lambda changes: str(changes)[:60])
def test_a_hostile_extension_is_ignored(changes, model, capsys):
    patch_extension(model / SCHEDULER, changes)
    assert sample(model, capsys)[0] == 0


def header(entries):
    content = json.dumps(entries).encode()
    return struct.pack("<Q", len(content)) + content


def entry(start=0, end=4, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


CONTENTS = {
    "empty": b"",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zip": b"PK\x03\x04" + b"\0" * 100,
    "long header": struct.pack("<Q", 2**63) + b"{}",
    "header of 4 GB": struct.pack("<Q", 2**32) + b"{}",
    "no header": struct.pack("<Q", 2) + b"{}",
    "list": struct.pack("<Q", 2) + b"[]",
    "not UTF-8": struct.pack("<Q", 2) + b"\xff\xff",
    "nested": struct.pack("<Q", 20_000) + b"[" * 20_000,
    "offsets": header({"x": entry(0, 2**40)}),
    "huge shape": header({"x": entry(shape=(2**40, 2**40))}) + b"\0" * 4,
    "negative shape": header({"x": entry(shape=(-1,))}) + b"\0" * 4,
    "dtype": header({"x": entry(dtype="X9")}) + b"\0" * 4,
    "overlap": header({"x": entry(), "y": entry()}) + b"\0" * 4,
    "metadata": header({"__metadata__": {"format": []}, "x": entry()}) + b"\0" * 4,
    "another tensor": header({"x": entry()}) + b"\0" * 4,
}


@pytest.mark.parametrize("name", CONTENTS)
def test_hostile_weight_files_are_refused_in_one_line(name, model, capsys):
    (model / WEIGHTS).write_bytes(CONTENTS[name])
    status, line = sample(model, capsys)
    assert status == 2
    assert str(model) in line


def truncated(weights, path):
    path.write_bytes(path.read_bytes()[:-7])


def without_one(weights, path):
    save_file(dict(list(weights.items())[1:]), path)


def with_another(weights, path):
    save_file(weights | {"x": torch.zeros(1)}, path)


def reshaped(weights, path):
    save_file(weights | {"conv_in.weight": weights["conv_in.weight"].flatten()}, path)


def not_finite(weights, path):
    name = next(iter(weights))
    save_file(weights | {name: torch.full_like(weights[name], NAN)}, path)


def nothing(weights, path):
    path.unlink()


def pickled(weights, path):
    path.unlink()
    torch.save(weights, path.with_name("diffusion_pytorch_model.bin"))


def link_outside(weights, path):
    path.rename(path.parents[2] / "outside.safetensors")
    path.symlink_to(path.parents[2] / "outside.safetensors")


def dangling(weights, path):
    path.unlink()
    path.symlink_to("nowhere")


def index_only(weights, path):
    path.rename(path.parents[2] / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "../../outside.safetensors")}
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "damage",
    [truncated, without_one, with_another, reshaped, not_finite, nothing, pickled, link_outside,
     dangling, index_only],
)  # fmt: skip
def test_weights_that_do_not_fit_the_network_are_refused_in_one_line(damage, model, capsys):
    damage(load_file(model / WEIGHTS), model / WEIGHTS)
    status, line = sample(model, capsys)
    assert status == 2
    assert str(model) in line


IMAGE = {"mode": "L", "height": 8, "width": 8, "bit_depth": 8}
TRAINING = [
    {"dataset": []},
    {"dataset": {"image": IMAGE | {"height": 8192}}},
    {"dataset": {"held_out": {"digest": []}}},
    {"dataset": {"held_out": {"num_held_out": 10**12, "num_images": 10**13, "seed": 0}}},
    {"dataset": {"held_out": {"num_held_out": 1, "num_images": 4, "seed": 0, "digest": "x"}}},
    {"config": []},
    {"config": {"class_column": [], "crop": [], "class_conditional": "x"}},
    {"config": {"crop": "none", "resolution": 10**9, "class_column": "../x"}},
    {"metrics": [7], "steps": HUGE, "versions": [], "base": 7},
]  # fmt: skip


@pytest.mark.parametrize("record", TRAINING, ids=lambda record: str(record)[:60])
def test_a_hostile_training_record_is_ignored_or_refused(record, model, tmp_path, capsys):
    """Evaluation reads the held-out images and the format from it; the card shows the rest."""
    (model / "training.json").write_text(json.dumps(record))
    photos = folder_of(tmp_path / "photos", {
        f"{i}.png": encode(np.full((8, 8), i, np.uint8)) for i in range(4)})  # fmt: skip
    with peak_memory_growth() as memory:
        status = main(["evaluate", str(model), str(photos), "--num-timesteps", "2",
                       "--output", str(tmp_path / "evaluation")])  # fmt: skip
        assert status in (0, 2)
        assert main(["push", str(model), "user/name", "--dry-run"]) in (0, 2)
    assert "Traceback" not in capsys.readouterr().err
    assert memory.num_bytes < MAX_BYTES
