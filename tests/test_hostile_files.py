"""Special files, secrets, memory and damaged files: one line each, and never a hang."""

import hashlib
import json
import os
import shutil
import time

import numpy as np
import pytest
import tiny_runs
import torch
from checkpoints import save_ours
from image_sets import folder_of
from image_zoo import encode
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny_runs import metrics, run, tiny_images

from ddpm_hf.cli import main, run_command
from ddpm_hf.data import DataError, load_images
from ddpm_hf.diffusion.atomic_files import deleted_folder
from ddpm_hf.sampling import open_drawn
from ddpm_hf.training import CheckpointError, TrainingError
from ddpm_hf.training.checkpoint_record import find_checkpoint
from ddpm_hf.utils.backend_settings import is_out_of_memory
from ddpm_hf.utils.text import without_secrets


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_ours(tmp_path_factory.mktemp("original") / "model")


@pytest.fixture
def model(original, tmp_path):
    return shutil.copytree(original, tmp_path / "model")


@pytest.fixture
def fails_in_one_line(capsys):
    def check(arguments, status=2):
        start = time.monotonic()
        assert main(list(map(str, arguments))) == status
        assert time.monotonic() - start < 20
        error = capsys.readouterr().err
        assert "Traceback" not in error
        assert "ddpm-hf: error: " in error.splitlines()[-1]
        return error.splitlines()[-1]

    return check


def special(path, kind):
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


FILES = [
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
@pytest.mark.parametrize("name", FILES)
def test_a_special_file_in_a_model_is_refused(name, kind, model, fails_in_one_line):
    special(model / name, kind)
    fails_in_one_line(["sample", model, "--output", model.parent / "x"])


@pytest.mark.parametrize("kind", ["fifo", "device"])
@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.parquet"])
def test_special_files_of_images_are_refused(name, kind, tmp_path):
    special(tmp_path / name, kind)
    with pytest.raises(ValueError, match="is not a regular file"):
        open_drawn(tmp_path / name)


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_a_special_recipe_is_refused(kind, tmp_path, fails_in_one_line):
    special(tmp_path / "recipe.yaml", kind)
    fails_in_one_line(["train", tmp_path, "--config", tmp_path / "recipe.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "a: &a [1]\nb: *a\n",
        "a: " + "[" * 50_000,
        "a: 1\n" * 100_000,
        "a: \udcff",
        "- 1",
        "{",
        "7: 1",
    ],
)
def test_a_recipe_that_costs_time_or_is_invalid_is_refused(text, tmp_path, fails_in_one_line):
    (tmp_path / "recipe.yaml").write_text(text, errors="surrogateescape")
    fails_in_one_line(["train", tmp_path, "--config", tmp_path / "recipe.yaml"])


@pytest.mark.parametrize(
    "name", ["metadata.csv", "metadata.jsonl", "dataset.json", "x.png", "a.txt"]
)
def test_a_special_file_in_an_image_folder_is_named(name, tmp_path):
    folder_of(tmp_path / "photos", {"0.png": encode(np.zeros((8, 8), np.uint8))})
    special(tmp_path / "photos" / name, "fifo")
    with pytest.raises(DataError, match=f"{name}' is not a regular file"):
        load_images(str(tmp_path / "photos"))


def test_metadata_with_a_very_long_line_is_not_read_to_its_end(tmp_path):
    folder_of(tmp_path / "photos", {"0.png": encode(np.zeros((8, 8), np.uint8))})
    with (tmp_path / "photos" / "metadata.jsonl").open("w") as file:
        file.write('{"file_name": "' + "x" * 50_000_000)
    start = time.monotonic()
    assert len(load_images(str(tmp_path / "photos"))) == 1
    assert time.monotonic() - start < 10


def of_one_value(name):
    """The tensors, one of them with a shape that could be broadcast."""
    return lambda tensors: tensors | {name: torch.zeros(1)}


LIES = [
    ("unet.safetensors", lambda tensors: {}),
    ("unet.safetensors", of_one_value("conv_in.weight")),
    ("ema.safetensors", lambda tensors: {"x": torch.zeros(1)}),
    ("ema.safetensors", of_one_value("conv_in.weight")),
    ("optimizer.safetensors", of_one_value("x")),
    ("optimizer.safetensors", of_one_value("0.exp_avg")),
    ("optimizer.safetensors", of_one_value("0.step")),
    ("optimizer.safetensors", of_one_value("1000.exp_avg")),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    run(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda folder: special(folder / "state.json", "fifo"),
        lambda folder: special(folder / "another", "folder"),
        lambda folder: (folder / "another.safetensors").write_bytes(b"x"),
        lambda folder: (folder / "ema.safetensors").unlink(),
    ],
    ids=["a pipe", "another folder", "another file", "a missing file"],
)
def test_a_checkpoint_with_other_files_than_its_manifest_is_skipped(change, finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    change(tmp_path / "checkpoints" / "step-00000006")
    assert find_checkpoint(tmp_path / "checkpoints").name == "step-00000004"


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lie"), LIES)
def test_a_checkpoint_whose_manifest_matches_but_lies_is_refused_in_one_line(
    name, lie, finished, tmp_path
):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    newest = tmp_path / "checkpoints" / "step-00000006"
    save_file(lie(load_file(newest / name)), newest / name)
    content = (newest / name).read_bytes()
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["files"][name] = {
        "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()
    }  # fmt: skip
    (newest / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not hold the state of this run") as error:
        run(tmp_path, max_train_steps=8)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "text", ["", "null", "[]", "{", "[" * 100_000, '{"a": ' * 10_000, "\udcff", "7"]
)
def test_damaged_files_of_a_model_are_refused_in_one_line(name, text, model, fails_in_one_line):
    (model / name).write_text(text, errors="surrogateescape")
    fails_in_one_line(["sample", model, "--output", model.parent / "x"])


TOKENS = [
    "hf_" + "a" * 34, "ghp_" + "b" * 36, "gho_" + "c" * 36, "github_pat_" + "d" * 30,
    "glpat-" + "e" * 20, "sk-" + "f" * 40, "api_org_" + "g" * 34, "AKIA" + "A" * 16,
]  # fmt: skip


FORMS = ["{}", "https://user:{}@host/x", "user/{}", "https://h/x?token={}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("token", "form"),
    [*((token, FORMS[0]) for token in TOKENS), *((TOKENS[0], form) for form in FORMS[1:])],
)
def test_no_message_shows_a_secret(token, form, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    name = form.format(token)
    for arguments in (
        ["sample", name, "--output", "x"],
        ["train", ".", "--pretrained", name, "--output-dir", "run"],
        ["evaluate", "a.npz", ".", "--features", name],
        ["train", name],
    ):
        main(arguments)
    printed = capsys.readouterr()
    assert token not in printed.out + printed.err


def test_secrets_of_the_environment_and_of_settings_are_hidden(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-very-own-token")
    text = without_secrets("x a-very-own-token password=hunter2 api_key: 12345 secret=y")
    assert not any(secret in text for secret in ("own-token", "hunter2", "12345", "=y"))


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("CUDA error: out of memory\nCompile with ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    np._core._exceptions._ArrayMemoryError((1,), np.dtype("u1")),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_out_of_memory_error_is_one_line(error, capsys):
    assert is_out_of_memory(error)

    def fail(argv):
        raise error

    assert run_command(fail, []) == 1
    assert capsys.readouterr().err.startswith("ddpm-hf: error: out of memory: ")


@pytest.mark.slow
@pytest.mark.parametrize("error", ERRORS[:2], ids=lambda error: type(error).__name__)
def test_training_that_exhausts_the_memory_is_an_error(error, tmp_path):
    def fail(module, args):
        if module.training:
            raise error

    unet = tiny_runs.tiny_unet()
    unet.register_forward_pre_hook(fail)
    with pytest.raises(TrainingError, match="out of memory"):
        run(tmp_path, unet=unet)


@pytest.mark.slow
@pytest.mark.parametrize("error", [ERRORS[0], MemoryError()], ids=lambda e: type(e).__name__)
def test_images_that_exhaust_the_memory_still_save_the_updates_before(error, tmp_path):
    class Images:
        reads = 0

        def __len__(self):
            return 11

        def __getitem__(self, index):
            self.reads += 1
            if self.reads > 4 * 3:
                raise error
            return tiny_images()[index]

    with pytest.raises(TrainingError, match="before it are saved"):
        run(tmp_path, dataset=Images(), checkpointing_steps=100)
    assert find_checkpoint(tmp_path / "checkpoints") is not None
    assert metrics(tmp_path)


def test_other_runtime_errors_are_not_hidden():
    def fail(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(fail, [])


def test_an_error_of_safetensors_is_one_line(capsys):
    def fail(argv):
        raise SafetensorError("No space left on device")

    assert run_command(fail, []) == 1
    assert capsys.readouterr().err == "ddpm-hf: error: No space left on device\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", ".", "--batch-size", "1000000000"],
        ["train", ".", "--dataloader-num-workers", "1000000000"],
        ["train", ".", "--num-samples", "1000000000"],
        ["train", ".", "--evaluate-num-images", "1000000000"],
        ["sample", "m", "--num-images", "1000000000"],
        ["sample", "m", "--batch-size", "1000000000"],
        ["evaluate", "m", ".", "--num-images", "1000000000"],
        ["evaluate", "m", ".", "--batch-size", "1000000000"],
        ["calibrate", "m", ".", "--num-images", "1000000000"],
        ["calibrate", "m", ".", "--sweep", "--sweep-images", "1000000000"],
        ["sample", "m", "--num-inference-steps", "1000000000"],
        ["evaluate", "m", ".", "--num-inference-steps", "5", "1000000000"],
        ["evaluate", "m", ".", "--num-timesteps", "1000000000"],
        ["edit", "m", "x.png", "--num-images", "1000000000"],
        ["edit", "m", "x.png", "--batch-size", "1000000000"],
        ["edit", "m", "x.png", "--jump-n-sample", "1000000000"],
        ["train", ".", "--resolution", "1000000000"],
        ["train", ".", "--num-train-timesteps", "1000000000"],
        ["train", ".", "--gradient-accumulation-steps", "1000000000"],
        ["train", ".", "--max-train-steps", "1" + "0" * 400],
        ["train", ".", "--ddp-timeout", "1" + "0" * 20],
        ["train", ".", "--num-threads", "1000000000"],
        ["train", ".", "--validation-images", "1000000000"],
        ["train", ".", "--sample-inference-steps", "1000000000"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_numbers_that_no_machine_can_hold_are_refused(arguments, fails_in_one_line):
    assert "must be" in fails_in_one_line(arguments)


def sample(model, output, *more):
    arguments = ["sample", str(model), "--num-images", "5", "--batch-size", "2", "--output"]
    return main([*arguments, str(output), "--num-inference-steps", "2", *more])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
@pytest.mark.parametrize("name", ["x.npz", "grid.png", "folder"])
def test_leftovers_of_a_command_that_was_killed_at_its_end_are_removed(name, model, tmp_path):
    out = tmp_path / "out"
    assert sample(model, out / name) == 0
    leftover = deleted_folder(out / f"{name}.parts")
    leftover.mkdir()
    (leftover / "part-000000.npy").write_text("x")
    assert sample(model, out / name) == 0
    assert not leftover.exists()
    assert not list(out.glob("*.parts"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`timestep_spacing`")
@pytest.mark.parametrize("name", ["x.npz", "x.npy", "x.parquet", "folder"])
def test_a_truncated_output_is_sampled_again(name, model, tmp_path):
    assert sample(model, tmp_path / name) == 0
    file = tmp_path / name
    file = sorted(file.glob("*.png"))[2] if file.is_dir() else file
    content = file.read_bytes()
    file.write_bytes(content[:-30])
    assert sample(model, tmp_path / name) == 0
    assert file.read_bytes() == content


def write_pickle(path):
    class Command:
        def __reduce__(self):
            return os.mkdir, (str(path.parent / "executed"),)

    torch.save({"input_blocks.0.0.weight": Command()}, path)


CONVERSIONS = {
    "text": lambda path: path.write_text("hello"),
    "empty": lambda path: path.write_bytes(b""),
    "zip": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60)),
    "command": write_pickle,
    "number": lambda path: torch.save(7, path),
    "list": lambda path: torch.save([torch.zeros(1)], path),
    "names": lambda path: torch.save({1: torch.zeros(1)}, path),
    "numbers": lambda path: torch.save({"time_embed.0.weight": 7}, path),
    "shapes": lambda path: torch.save({"input_blocks.0.0.weight": torch.zeros(1)}, path),
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_hostile_weights_are_not_converted(name, tmp_path, fails_in_one_line):
    CONVERSIONS[name](tmp_path / "w.pt")
    fails_in_one_line(
        ["convert", tmp_path / "w.pt", "--preset", "iddpm-cifar10", "--output", tmp_path / "o"]
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("option", ["--config", "--class-names"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_special_files_of_a_conversion_are_refused(kind, option, tmp_path, fails_in_one_line):
    torch.save({}, tmp_path / "w.pt")
    special(tmp_path / "x", kind)
    fails_in_one_line(
        ["convert", tmp_path / "w.pt", option, tmp_path / "x", "--output", tmp_path / "o"]
    )
