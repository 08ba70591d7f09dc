"""Outputs of `ddpm-hf sample`: file formats, records, resume and several processes."""

import json
import signal
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from processes import LIMIT_S, forked_ranks
from tiny_runs import tiny_unet

from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
from ddpm_hf.cli import main
from ddpm_hf.sampling import draw_images, draw_to, open_drawn

pytestmark = pytest.mark.slow

N = 10
OPTIONS = ["--num-images", str(N), "--num-inference-steps", "2", "--batch-size", "4"]
NAMES = ("x.npz", "x.npy", "x.parquet", "folder")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a model with grey images, the classes cat and dog, and the null class."""
    unet = tiny_unet(num_class_embeds=3)
    image = {"mode": "L", "height": 8, "width": 8, "bit_depth": 8}
    facts = {"format_version": 1, "image": image, "class_names": ["cat", "dog"]}
    unet.register_to_config(_ddpm_hf=facts)
    scheduler = GaussianDDPMScheduler(
        num_train_timesteps=20, beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing"
    )
    folder = tmp_path_factory.mktemp("models") / "pets"
    GaussianDDPMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pixels(model):
    """Images of the command with `OPTIONS`, (N, 8, 8, 1) uint8."""
    pipeline = GaussianDDPMPipeline.from_pretrained(model)
    call = {"num_inference_steps": 2, "batch_size": 4, "progress": False}
    images = draw_images(pipeline, N, class_labels=[0, 1], **call)
    return (np.stack(images) * 255).round().astype(np.uint8)


def sample(model, output, *more, status=0):
    assert main(["sample", str(model), "--output", str(output), *OPTIONS, *more]) == status


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_open_drawn_reads_images_classes_and_options(model, pixels, tmp_path, name):
    sample(model, tmp_path / name)
    drawn = open_drawn(tmp_path / name)
    np.testing.assert_array_equal(np.concatenate(list(drawn.batches(3))), pixels)
    assert drawn.labels.tolist() == [i % 2 for i in range(N)]
    assert drawn.class_names == ("cat", "dog")
    assert drawn.options["num_inference_steps"] == 2
    assert names_in(tmp_path) == sorted([name, f"{name}.json"])
    about = json.loads((tmp_path / f"{name}.json").read_text())
    assert about["model"] == {"name": "pets", "revision": None}


def test_other_programs_read_npz_parquet_and_image_files(model, pixels, tmp_path):
    for name in NAMES:
        sample(model, tmp_path / name)
    with np.load(tmp_path / "x.npz") as arrays:  # as guided-diffusion's evaluator does
        np.testing.assert_array_equal(arrays["arr_0"], pixels)
        assert arrays["arr_1"].tolist() == [i % 2 for i in range(N)]
    cache = {"split": "train", "cache_dir": str(tmp_path / "cache")}
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "x.parquet"), **cache)
    assert rows.features["label"].names == ["cat", "dog"]
    read = np.stack([np.asarray(image) for image in rows["image"]])
    np.testing.assert_array_equal(read[..., None], pixels)
    sample(model, tmp_path / "null.parquet", "--class-labels", "2", status=2)  # the null class
    sample(model, tmp_path / "null.parquet", "--guidance-scale", "0")
    rows = datasets.load_dataset("parquet", data_files=str(tmp_path / "null.parquet"), **cache)
    assert "label" not in rows.features
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == [f"{i:05d}.png" for i in range(N)]
    read = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_array_equal(read[..., None], pixels)


@pytest.mark.parametrize("name", [*NAMES, "grid.png"])
def test_incomplete_images_are_resumed_and_complete_ones_kept(model, tmp_path, name, capsys):
    sample(model, tmp_path / "uninterrupted" / name)
    pipeline = GaussianDDPMPipeline.from_pretrained(model)
    parts = tmp_path / f"{name}.parts"
    dtype = "float32" if name in ("x.npy", "grid.png") else "uint8"
    call = {"num_inference_steps": 2, "batch_size": 4, "dtype": dtype, "progress": False}
    draw_to(pipeline, parts, N, **call)
    (parts / "part-000001.npy").unlink()
    # The pixels of the first batch are changed, and must be in the output.
    changed = np.load(parts / "part-000000.npy")
    changed[:] = 0
    np.save(parts / "part-000000.npy", changed)
    sample(model, tmp_path / name)
    assert not parts.exists()
    if name == "grid.png":
        return
    drawn, full = open_drawn(tmp_path / name), open_drawn(tmp_path / "uninterrupted" / name)
    assert not drawn.read(range(4)).any()
    np.testing.assert_array_equal(drawn.read(range(4, N)), full.read(range(4, N)))
    before = (tmp_path / name).stat().st_mtime_ns
    capsys.readouterr()
    sample(model, tmp_path / name)
    assert "sampled before" in capsys.readouterr().out
    assert (tmp_path / name).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--seed", "1"], "--seed 0 instead of 1"),
        (["--eta", "0"], "--eta unset instead of 0.0"),
        (["--scheduler", "DDIM"], "--scheduler GaussianDDPMScheduler instead of DDIMScheduler"),
        (["--class-labels", "dog"], "--class-labels [0, 1] instead of [1]"),
    ],
)
@pytest.mark.parametrize("is_complete", [True, False], ids=["complete", "incomplete"])
def test_images_with_other_options_raise_an_error_with_both_values_and_the_fix(
    model, tmp_path, capsys, more, difference, is_complete
):
    output = tmp_path / "x.npz"
    if is_complete:
        sample(model, output)
    else:
        pipeline = GaussianDDPMPipeline.from_pretrained(model)
        call = {"num_inference_steps": 2, "batch_size": 4, "progress": False}
        draw_to(pipeline, tmp_path / "x.npz.parts", N, **call)
    sample(model, output, *more, status=2)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert difference in line
    assert "pass --overwrite to replace them, or choose another --output" in line
    sample(model, output, "--overwrite", *more)
    assert names_in(tmp_path) == ["x.npz", "x.npz.json"]
    sample(model, output, *more)  # complete already


def test_overwrite_keeps_other_files_in_the_folder(model, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    sample(model, folder)
    sample(model, folder, "--num-images", "3", "--seed", "1", "--overwrite")
    assert names_in(folder) == ["00000.png", "00001.png", "00002.png", "notes.txt"]


def test_settings_of_optimize_are_recorded_and_reused(model, tmp_path, capsys):
    output = tmp_path / "x.npz"
    sample(model, output, "--optimize")
    speed = open_drawn(output).options["speed"]
    assert (speed["dtype"], speed["num_threads"]) == ("float32", torch.get_num_threads())
    about = json.loads((tmp_path / "x.npz.json").read_text())
    assert about["optimized"]["deviation"] == 0  # few calls: the network is not changed
    capsys.readouterr()
    sample(model, output, "--optimize")
    assert "sampled before" in capsys.readouterr().out
    sample(model, output, status=2)
    assert "instead of unset" in capsys.readouterr().err


@pytest.mark.parametrize("options", [(), ("--optimize",)])
def test_images_with_a_damaged_record_are_sampled_again(model, pixels, tmp_path, options):
    parts = tmp_path / "x.npz.parts"
    parts.mkdir()
    (parts / "options.json").write_text('{"settings": {')
    sample(model, tmp_path / "x.npz", *options)
    images = open_drawn(tmp_path / "x.npz")
    np.testing.assert_array_equal(images.read(range(N)), pixels)


def test_files_of_other_programs_are_kept(model, tmp_path, capsys):
    (tmp_path / "pets.json").write_text('{"mine": 1}')
    (tmp_path / "x.npz").mkdir()
    (tmp_path / "file").touch()
    sample(model, tmp_path / "pets", status=2)
    sample(model, tmp_path / "x.npz", "--overwrite", status=2)
    sample(model, tmp_path / "file", "--overwrite", status=2)
    errors = capsys.readouterr().err
    assert "pets.json is not a record of sampled images" in errors
    assert "x.npz is a folder, but the output is a file" in errors
    assert "file is a file, but the output is a folder" in errors
    assert names_in(tmp_path) == ["file", "pets.json", "x.npz"]


def test_overwrite_deletes_numbered_image_files_only(model, tmp_path):
    photos = ["1st.png", "20240101.png", "2024-01-01.png"]
    ours = ["00000.png", "00099.png"]
    for name in (*photos, *ours):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / name).touch()
    sample(model, tmp_path / "x", "--overwrite", "--num-images", "1")
    assert names_in(tmp_path / "x") == sorted([*photos, "00000.png"])


def test_two_killed_and_restarted_processes_sample_the_images_of_one(model, tmp_path, capsys):
    command = ["sample", str(model), "--num-images", "99", "--batch-size", "4"]
    assert main([*command, "--output", str(tmp_path / "one.npz")]) == 0
    output, parts = tmp_path / "two.npz", tmp_path / "two.npz.parts"
    command += ["--output", str(output)]
    two = ["-m", "ddpm_hf", *command]
    with forked_ranks(two) as processes:
        start = time.monotonic()
        while len(list(parts.glob("part-*"))) < 3:
            assert all(process.poll() is None for process in processes)
            assert time.monotonic() - start < LIMIT_S
            time.sleep(0.01)
        for process in processes:
            process.send_signal(signal.SIGSTOP)
        # Another command gets an error with the process id, and leaves the two processes alone.
        assert main([*command, "--seed", "1", "--overwrite"]) == 2
        assert f"in use by process {processes[0].pid}; wait" in capsys.readouterr().err
        assert all(process.poll() is None for process in processes)
    assert 3 <= len(list(parts.glob("part-*"))) < 25
    assert not output.exists()
    with forked_ranks(two) as processes:
        printed = [process.communicate(timeout=LIMIT_S)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert sum("99 images in" in text for text in printed) == 1  # printed by the main process only
    assert output.read_bytes() == (tmp_path / "one.npz").read_bytes()
    assert names_in(tmp_path) == ["one.npz", "one.npz.json", "two.npz", "two.npz.json"]
