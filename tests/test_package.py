"""Wheel, sdist, imports of the commands, and launcher configurations."""

import json
import os
import re
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.version import Version
from PIL import Image
from processes import run_forked, run_process

import ddpm_hf

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
LAUNCHERS = sorted((ROOT / "training" / "accelerate").glob("*.yaml"))
# Runs in the process of a launch.
PROBE = """
import json
from accelerate import Accelerator
accelerator = Accelerator()
result = [accelerator.device.type, accelerator.mixed_precision]
open("result.json", "w").write(json.dumps(result))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Run a command that must succeed, and return its standard output."""
    done = run_process(list(map(str, command)), cwd=cwd, env=os.environ | environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folder with an sdist and the wheel built from it, as for a release."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """Folder of a new environment with the wheel and the dependencies of this environment."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index")
    run(*pip, "--no-deps", *built.glob("*.whl"), cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # Path files inside these folders are not read, which excludes the editable install.
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(others))
    return folder / "bin"


@pytest.mark.slow
def test_the_wheel_contains_the_package_only(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    sources = (path for path in (SOURCE / "ddpm_hf").rglob("*") if path.is_file())
    expected = {str(path.relative_to(SOURCE)) for path in sources if path.suffix != ".pyc"}
    assert names == expected
    assert {"ddpm_hf/py.typed", "ddpm_hf/hub/card_template.md"} <= names


@pytest.mark.slow
def test_the_sdist_contains_tests_and_build_files(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    needed = {"pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"}
    assert needed | {"src/ddpm_hf/py.typed", "tests/conftest.py", "training/train.py"} <= names
    assert not [
        name for name in names if "__pycache__" in name or name.startswith((".venv", "runs"))
    ]


@pytest.mark.slow
def test_an_index_accepts_the_metadata(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (file,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(file), validate=True)
    assert metadata.name == "ddpm-hf"
    assert metadata.version == Version(ddpm_hf.__version__)
    assert metadata.license_expression == "Apache-2.0"
    assert set(metadata.provides_extra) == {"app", "heic", "eval", "dev", "site", "all"}
    # Relative links do not work on an index.
    links = re.findall(r"\]\(([^)]*)\)", metadata.description)
    assert links
    assert [link for link in links if not link.startswith(("https://", "#"))] == []
    assert "docs/samples.png" not in metadata.description
    required = {r.name.lower() for r in metadata.requires_dist if r.marker is None}
    hub = {"diffusers", "transformers", "accelerate", "torch", "datasets", "huggingface-hub"}
    others = {"filelock", "numpy", "pillow", "psutil", "pyarrow", "pyyaml", "safetensors", "tqdm"}
    assert required == hub | others


@pytest.mark.slow
def test_the_installed_wheel_trains_and_samples(installed, tmp_path):
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    where = "import ddpm_hf; print(ddpm_hf.__file__)"
    home = run(installed / "python", "-c", where, cwd=tmp_path).strip()
    assert Path(home).is_relative_to(installed.parent)
    train = "train photos --output-dir run --max-train-steps 2 --batch-size 4 --num-samples 2"
    options = "--sample-steps 2 --sample-inference-steps 2 --num-train-timesteps 10"
    run(installed / "ddpm-hf", *train.split(), *options.split(), cwd=tmp_path)
    assert Image.open(tmp_path / "run" / "model" / "samples.png").mode == "RGB"
    assert (tmp_path / "run" / "model" / "README.md").read_text().startswith("---")


# Prints the modules of sys.argv[1] that are loaded after each command.
COMMANDS_AND_IMPORTS = """
import sys
from contextlib import redirect_stdout, suppress
from io import StringIO
from ddpm_hf.cli import main

def loaded_by(*argv):
    with redirect_stdout(StringIO()), suppress(SystemExit):
        assert main(argv) == 0
    return sorted(sys.modules.keys() & set(sys.argv[1].split()))

for name in ("", "app", "push", "sample", "calibrate", "ema", "evaluate", "train"):
    argv = f"{name} --help".strip()
    print(argv, *loaded_by(*argv.split()))

from diffusers import UNet2DModel
from ddpm_hf import GaussianDDPMPipeline, GaussianDDPMScheduler
levels = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
unet = UNet2DModel(8, 1, 1, block_out_channels=(8, 8), norm_num_groups=4, **levels)
GaussianDDPMPipeline(unet, GaussianDDPMScheduler(num_train_timesteps=2)).save_pretrained("model")
before = sys.modules.keys() & set(sys.argv[1].split())
print("sample", *sorted({*loaded_by("sample", "model", "--num-images", "1")} - before))
"""
HEAVY = (
    "torch diffusers transformers datasets gradio pandas pyarrow sklearn matplotlib tensorboard "
    "ddpm_hf.data"
)


@pytest.mark.slow
def test_commands_import_heavy_libraries_only_when_needed(tmp_path):
    output = run(sys.executable, "-c", COMMANDS_AND_IMPORTS, HEAVY, cwd=tmp_path)
    assert output.splitlines() == [
        "--help",
        "app --help transformers",
        "push --help transformers",  # for its HfArgumentParser
        "sample --help transformers",
        "calibrate --help transformers",
        "ema --help transformers",
        "evaluate --help transformers",
        "train --help transformers",
        "sample",  # nothing besides the imports of diffusers and of the lines above
    ]


def test_the_constraints_satisfy_all_requirements():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    pinned = {pin.name.lower().replace("_", "-"): pin for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    direct = [
        *project["dependencies"],
        *(r for name in ("app", "heic", "eval", "dev", "site") for r in extras[name]),
    ]
    for requirement in map(Requirement, direct):
        (pin,) = pinned[requirement.name.lower()].specifier
        assert pin.operator == "=="
        assert requirement.specifier.contains(pin.version), requirement


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_loads_each_launcher_configuration(path):
    config = load_config_from_file(str(path))
    assert config.num_machines == (2 if path.stem == "multi_node" else 1)
    assert config.mixed_precision == ("no" if path.stem == "cpu" else "bf16")


@pytest.mark.slow
def test_the_cpu_configuration_uses_the_cpu(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    file = ROOT / "training" / "accelerate" / "cpu.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", file, "probe.py"]
    done = run_forked(launcher, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "result.json").read_text()) == ["cpu", "no"]
