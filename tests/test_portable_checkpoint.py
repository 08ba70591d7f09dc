"""The portable checkpoint: three ways to load it, each in a new process, and how it is saved."""

import importlib
import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    TWO_LEVELS,
    image_facts_of,
    quiet,
    save_legacy,
    save_ours,
    save_stock,
    tiny_pipeline,
    tiny_scheduler,
    tiny_unet,
)
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from processes import run_forked
from safetensors.torch import load_file, save_file

import ddpm_hf
from ddpm_hf.diffusion.pipeline import GaussianDDPMPipeline

PACKAGE = Path(ddpm_hf.__file__).parent / "diffusion"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def draw(pipeline, **call):
    """Two samples with seed 0, (2, H, W, C)."""
    generator = torch.Generator().manual_seed(0)
    return quiet(pipeline)(2, generator, 20, "np", **call).images


def files_of(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


# ----------------------------------------------------------------------------------------------
# Three ways to load, each in a process of its own with an empty cache of downloaded code

PROLOGUE = """
import json, logging, sys
from pathlib import Path
if not {with_package}:
    sys.modules["ddpm_hf"] = None  # from here on `import ddpm_hf` fails
    try:
        import ddpm_hf
    except ImportError:
        pass
    else:
        raise SystemExit("the package can be imported")
import diffusers, numpy, torch
from diffusers.utils import dynamic_modules_utils
dynamic_modules_utils.HF_MODULES_CACHE = {cache!r}
warned = []
class Warned(logging.Handler):
    def emit(self, record):
        warned.append(record.getMessage())
logging.getLogger("diffusers").addHandler(Warned(logging.WARNING))
root, images, facts = Path({root!r}), {{}}, {{}}
def draw(pipeline, **call):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(2, generator, 20, "np", **call).images
"""
EPILOGUE = """
numpy.savez(root / "{name}.npz", **images)
(root / "{name}.json").write_text(json.dumps(facts))
"""

STOCK = """
pipe = diffusers.DiffusionPipeline.from_pretrained(root / "ours")
images["stock"] = draw(pipe)
facts["classes"] = [type(pipe).__name__, type(pipe.scheduler).__name__]
ddim = diffusers.DDIMScheduler.from_pretrained(root / "ours", subfolder="scheduler")
images["betas of DDIM"] = ddim.betas.numpy()
facts["warnings on loading"] = list(warned)
pipe.save_pretrained(root / "saved by stock")
ddim_pipe = diffusers.DDPMPipeline(unet=pipe.unet, scheduler=ddim)
ddim_pipe.save_pretrained(root / "saved by stock with DDIM")
conditional = diffusers.DiffusionPipeline.from_pretrained(root / "classes")
try:
    draw(conditional)
except ValueError as error:
    facts["stock on classes"] = str(error)
try:
    diffusers.DiffusionPipeline.from_pretrained(
        root / "ours", custom_pipeline=str(root / "ours")
    )
except ValueError as error:
    facts["without consent"] = str(error)
facts["code run without consent"] = [name for name in sys.modules if "ddpm_hf_" in name]
"""

TRAVELLING = """
def load(name):
    folder = str(root / name)
    return diffusers.DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=folder, trust_remote_code=True
    )
pipe = load("ours")
images["travelling"] = draw(pipe)
facts["classes"] = [type(pipe).__name__, type(pipe.scheduler).__name__]
images["guided"] = draw(load("classes"), class_labels="b", guidance_scale=2.0)
pipe.save_pretrained(root / "copy")
copy = load("copy")
copy.save_pretrained(root / "copy of a copy")
images["copy of a copy"] = draw(load("copy of a copy"))
copy.scheduler = diffusers.DDIMScheduler.from_config(copy.scheduler.config)
images["DDIM"] = draw(copy)
copy.save_pretrained(root / "with DDIM")
facts["warnings"] = [text for text in warned if "trust_remote_code" not in text]
first, second = load("version 1"), load("version 2")
facts["versions"] = [first.versions(), second.versions(), load("version 1").versions()]
images["version 1"], images["version 2"] = draw(first), draw(second)
"""

PACKAGE_ROUTE = """
from ddpm_hf import GaussianDDPMPipeline
for name in (
    "ours", "copy", "copy of a copy", "saved by stock", "with DDIM", "saved by stock with DDIM",
):
    pipe = GaussianDDPMPipeline.from_pretrained(root / name)
    images[name] = draw(pipe)
    facts[name] = [type(pipe).__module__, type(pipe.scheduler).__name__]
facts["warnings"] = warned
"""


def run_fresh(name, script, root, with_package=False):
    """Run `script` in a process without this package; returns its images and facts."""
    cache = str(root / f"cache of {name}")
    code = PROLOGUE.format(root=str(root), cache=cache, with_package=with_package) + script
    (root / f"{name}.py").write_text(code + EPILOGUE.format(name=name))
    done = run_forked([root / f"{name}.py"], cwd=root)
    assert done.returncode == 0, done.stderr
    return np.load(root / f"{name}.npz"), json.loads((root / f"{name}.json").read_text())


def save_by_another_version(folder, name, monkeypatch, root):
    """Save a checkpoint with the code of another release of the package."""
    package = root / f"release_{name}"
    package.mkdir()
    for source in PACKAGE.glob("*.py"):
        shutil.copy(source, package)
        with (package / source.name).open("a") as file:
            file.write(f'\nVERSION = "{name}"\n')
    with (package / "pipeline.py").open("a") as file:
        base = "denoising_pipeline"
        modules = f"{base}.portable_pipeline.VERSION, {base}.scheduling.VERSION"
        file.write(f"GaussianDDPMPipeline.versions = lambda self: [VERSION, {modules}]\n")
    monkeypatch.syspath_prepend(root)
    release = importlib.import_module(f"release_{name}.pipeline")
    release.GaussianDDPMPipeline(tiny_unet(), tiny_scheduler()).save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of checkpoints, and the results of loading them: `{route: (images, facts)}`."""
    root = tmp_path_factory.mktemp("world")
    # A schedule that stock diffusers does not have, and images smaller than x_t.
    scheduler = tiny_scheduler(beta_schedule="chen_sigmoid")
    facts = image_facts_of("L", 7, 6)
    save_ours(root / "ours", unet=tiny_unet(**TWO_LEVELS), scheduler=scheduler, facts=facts)
    names = image_facts_of("L", 8, 8, class_names=["a", "b"])
    save_ours(root / "classes", unet=tiny_unet(num_class_embeds=3), facts=names)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number in ("1", "2"):
            save_by_another_version(root / f"version {number}", number, monkeypatch, root)
    routes = {
        "stock": run_fresh("stock", STOCK, root),
        "travelling": run_fresh("travelling", TRAVELLING, root),
        "package": run_fresh("package", PACKAGE_ROUTE, root, with_package=True),
    }
    return root, routes


def close_to_stock(got, want):
    # 1e-4: stock's tables are float32 and lose up to 5e-4 relative at small t.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4)


def same(got, want):
    # 1e-5: weights at another address change the order of sums.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_stock_diffusers_samples_the_checkpoint_without_warnings(world):
    _, routes = world
    images, notes = routes["stock"]
    assert notes["classes"] == ["DDPMPipeline", "DDPMScheduler"]
    assert notes["warnings on loading"] == []
    ours, _ = routes["package"]
    # Stock ignores the facts and keeps the padding: the image is rows 0..6, columns 1..6.
    close_to_stock(images["stock"][:, 0:7, 1:7], ours["ours"])
    expected = tiny_scheduler(beta_schedule="chen_sigmoid").betas
    np.testing.assert_allclose(images["betas of DDIM"], expected, rtol=1e-6)


@pytest.mark.slow
def test_travelling_code_gives_our_classes_without_the_package(world):
    _, routes = world
    images, notes = routes["travelling"]
    assert notes["classes"] == ["GaussianDDPMPipeline", "GaussianDDPMScheduler"]
    assert images["guided"].shape == (2, 8, 8, 1)
    same(images["travelling"], routes["package"][0]["ours"])


@pytest.mark.slow
def test_the_package_loads_its_own_classes_from_every_copy(world):
    _, routes = world
    images, notes = routes["package"]
    assert notes["warnings"] == []
    for name in ("ours", "copy", "copy of a copy", "saved by stock"):
        assert notes[name] == ["ddpm_hf.diffusion.pipeline", "GaussianDDPMScheduler"], name
        same(images[name], images["ours"])


@pytest.mark.slow
def test_a_ddim_scheduler_survives_saving_on_every_route(world):
    _, routes = world
    images, notes = routes["package"]
    assert notes["with DDIM"][1] == notes["saved by stock with DDIM"][1] == "DDIMScheduler"
    same(images["with DDIM"], routes["travelling"][0]["DDIM"])
    same(images["saved by stock with DDIM"], images["with DDIM"])
    assert np.abs(images["with DDIM"] - images["ours"]).max() > 0.01


@pytest.mark.slow
def test_a_copy_of_a_copy_has_the_same_bytes(world):
    root, routes = world
    assert routes["travelling"][1]["warnings"] == []
    original = files_of(root / "ours")
    assert files_of(root / "copy") == original
    assert files_of(root / "copy of a copy") == original
    images = routes["travelling"][0]
    same(images["copy of a copy"], images["travelling"])


@pytest.mark.slow
def test_two_versions_of_the_code_run_in_one_process(world):
    _, routes = world
    assert routes["travelling"][1]["versions"] == [["1"] * 3, ["2"] * 3, ["1"] * 3]


@pytest.mark.slow
def test_code_in_the_checkpoint_runs_only_with_consent(world):
    notes = world[1]["stock"][1]
    assert "trust_remote_code=True" in notes["without consent"]
    assert notes["code run without consent"] == []


@pytest.mark.slow
def test_stock_diffusers_raises_for_a_class_conditional_model(world):
    assert "class_labels" in world[1]["stock"][1]["stock on classes"]


# ----------------------------------------------------------------------------------------------
# Saving


def test_the_index_is_that_of_stock_diffusers_and_no_file_has_a_local_path(tmp_path):
    save_ours(tmp_path / "a")
    loaded = GaussianDDPMPipeline.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert json.loads((tmp_path / "b" / "model_index.json").read_text()) == {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": importlib.metadata.version("diffusers"),
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    for name, content in files_of(tmp_path / "b").items():
        assert str(tmp_path).encode() not in content, name


def test_the_travelling_code_is_a_copy_of_the_source_folder(tmp_path):
    folder = save_ours(tmp_path / "model")
    (package,) = folder.glob("ddpm_hf_*")
    travelled = {path.name: path.read_bytes() for path in package.iterdir()}
    assert travelled == {path.name: path.read_bytes() for path in PACKAGE.glob("*.py")}


def test_travelling_files_have_no_import_that_the_loader_follows():
    """The loader looks for a relative import at the root of the repository."""
    for path in PACKAGE.glob("*.py"):
        assert get_relative_imports(path) == [], path.name


def test_from_pipe_converts_to_the_stock_pipeline_and_back():
    ours = tiny_pipeline()
    stock = DDPMPipeline.from_pipe(ours)
    assert type(GaussianDDPMPipeline.from_pipe(stock).scheduler) is type(ours.scheduler)


def test_saving_again_replaces_the_weights_and_keeps_other_files(tmp_path):
    folder = save_ours(tmp_path / "model", unet=tiny_unet(seed=0))
    (folder / "README.md").write_text("by hand")
    (folder / "unet" / "notes.txt").write_text("by hand")
    before = set(files_of(folder))
    save_ours(folder, unet=tiny_unet(seed=1))
    assert set(files_of(folder)) == before
    assert (folder / "README.md").read_text() == "by hand"
    weights = load_file(folder / "unet" / WEIGHTS)
    torch.testing.assert_close(weights, dict(tiny_unet(seed=1).state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_saving_replaces_shards_and_keeps_other_variants(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len([*tmp_path.glob("unet/*-of-*.safetensors")]) > 1
    pipeline.save_pretrained(tmp_path, variant="fp16")
    pipeline.save_pretrained(tmp_path)
    names = {path.name for path in (tmp_path / "unet").iterdir()}
    assert names == {"config.json", WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"}
    for variant in (None, "fp16"):
        again = GaussianDDPMPipeline.from_pretrained(tmp_path, variant=variant)
        same(draw(again), draw(pipeline))


def test_saving_replaces_the_code_of_another_version(tmp_path):
    save_ours(tmp_path)
    (package,) = tmp_path.glob("ddpm_hf_*")
    package.rename(tmp_path / "ddpm_hf_0123456789ab")
    save_ours(tmp_path)
    assert [path.name for path in tmp_path.glob("ddpm_hf_*")] == [package.name]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights_are_not_written(tmp_path, value):
    unet = tiny_unet()
    unet.conv_in.bias.data[3] = value
    with pytest.raises(ValueError, match=r"conv_in\.bias"):
        tiny_pipeline(unet).save_pretrained(tmp_path / "model")
    assert [*tmp_path.iterdir()] == []


def test_an_invalid_save_directory_is_refused(tmp_path):
    pipeline = tiny_pipeline()
    (tmp_path / "file").touch()
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "real")
    for target, message in (
        ("", "`save_directory`.*got an empty string"),
        (tmp_path / "file", "file is a file"),
        (tmp_path / "link", "symbolic links, got .*link;"),
        (tmp_path / "model", "symbolic links, got .*unet;"),
    ):
        with pytest.raises(ValueError, match=message):
            pipeline.save_pretrained(target)
    assert [*(tmp_path / "real").iterdir()] == []


def test_pickled_weights_are_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"`safe_serialization` must be True.*got False"):
        tiny_pipeline().save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


def test_an_unknown_argument_of_save_pretrained_is_refused(tmp_path):
    with pytest.raises(TypeError, match="unknown arguments: `push_to_hubb`"):
        tiny_pipeline().save_pretrained(tmp_path / "model", push_to_hubb=True)


def test_a_linked_file_is_replaced_and_its_target_is_kept(tmp_path):
    save_ours(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / WEIGHTS
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    save_ours(tmp_path / "model", unet=tiny_unet(seed=1))
    assert (tmp_path / "elsewhere").read_bytes() == before
    assert not weights.is_symlink()


@pytest.mark.parametrize("exists", [True, False])
def test_a_full_disk_changes_nothing(tmp_path, exists):
    folder = tmp_path / "model"
    if exists:
        save_ours(folder)
    before = files_of(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))  # the weights have 42 kB
    try:
        with pytest.raises(Exception, match=r"(?i)file too large|os error 27"):
            save_ours(folder, unet=tiny_unet(seed=1, **TWO_LEVELS))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert files_of(tmp_path) == before


def save_and_die(pipeline, folder, at_event):
    """Save a pipeline in a child process that is killed at its n-th visible change of files.

    New files in the hidden folder `.saving-...` are no visible change.

    Returns:
        whether the child finished first.
    """
    child = os.fork()
    if child == 0:
        events = iter(range(at_event - 1))

        def count(event, args):
            changes = event in ("os.rename", "os.remove", "os.rmdir")
            creates = event == "os.mkdir" or (event == "open" and (args[2] or 0) & os.O_CREAT)
            is_new = creates and ".saving-" not in str(args[0]) and not os.path.exists(args[0])
            if (changes or is_new) and next(events, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        pipeline.save_pretrained(folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("exists", [True, False])
def test_a_save_that_is_killed_leaves_only_complete_files(tmp_path, exists):
    """Each file of an old folder is the old or the new one; a new folder is complete or absent."""
    pipeline = tiny_pipeline(tiny_unet(seed=1), tiny_scheduler(clip_sample=False))
    pipeline.save_pretrained(tmp_path / "new")
    new = files_of(tmp_path / "new")
    old = files_of(save_ours(tmp_path / "old"))
    folder = tmp_path / "model"
    states = set()
    for at_event in range(1, 200):
        shutil.rmtree(folder, ignore_errors=True)
        if exists:
            shutil.copytree(tmp_path / "old", folder)
        finished = save_and_die(pipeline, folder, at_event)
        found = files_of(folder) if folder.exists() else {}
        found = {name: data for name, data in found.items() if not name.startswith(".saving-")}
        if exists:
            assert all(found[name] in (old[name], new[name]) for name in old), at_event
        else:
            assert found in ({}, new), at_event
        states.add(tuple(found.get(name) == new[name] for name in new))
        if finished:
            break
    assert finished
    assert found == new
    assert [*tmp_path.glob(".*")] == []
    assert len(states) >= 2  # some kills came before and some after files were replaced
    same(draw(GaussianDDPMPipeline.from_pretrained(folder)), draw(pipeline))


# ----------------------------------------------------------------------------------------------
# Checkpoints of other versions and programs


@pytest.mark.slow
@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("pickled", [True, False])
def test_repositories_of_2022_sample_like_stock_diffusers(tmp_path, flat, pickled):
    """Old attention names, missing scheduler fields, files at the root or in folders."""
    folder = save_legacy(tmp_path, flat=flat, pickled=pickled)
    ours = GaussianDDPMPipeline.from_pretrained(folder, use_safetensors=not pickled)
    assert type(ours.scheduler).__name__ == "GaussianDDPMScheduler"
    stock = DDPMPipeline.from_pretrained(folder)
    close_to_stock(draw(ours), draw(stock))


@pytest.mark.slow
def test_a_stock_pipeline_with_our_scheduler_becomes_portable_when_saved_by_ours(tmp_path):
    DDPMPipeline(unet=tiny_unet(), scheduler=tiny_scheduler()).save_pretrained(tmp_path / "a")
    loaded = GaussianDDPMPipeline.from_pretrained(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    assert files_of(tmp_path / "b") == files_of(save_ours(tmp_path / "c"))


@pytest.mark.slow
@pytest.mark.parametrize("unet", [{}, {"in_channels": 3}])
def test_checkpoints_of_stock_diffusers_sample_like_stock_diffusers(tmp_path, unet):
    folder = save_stock(tmp_path, tiny_unet(**unet))
    ours = GaussianDDPMPipeline.from_pretrained(folder)
    close_to_stock(draw(ours), draw(DiffusionPipeline.from_pretrained(folder)))


@pytest.mark.slow
def test_the_dtype_argument_is_applied(tmp_path):
    pipeline = GaussianDDPMPipeline.from_pretrained(
        save_ours(tmp_path / "model"), dtype=torch.bfloat16
    )
    assert pipeline.unet.dtype == torch.bfloat16
    assert np.isfinite(draw(pipeline)).all()


@pytest.mark.slow
@pytest.mark.parametrize("opened", [GaussianDDPMPipeline.from_pretrained, ddpm_hf.load])
def test_loading_gives_the_same_bits_for_any_alignment_of_weights_in_the_file(tmp_path, opened):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    want = draw(pipeline)
    file = tmp_path / "unet" / WEIGHTS
    weights = load_file(file)
    for length in range(0, 64, 8):  # shifts the weights in the file
        save_file(weights, file, {"format": "pt", "note": "." * length})
        loaded = opened(tmp_path)
        assert {p.data_ptr() % 64 for p in loaded.unet.parameters()} == {0}
        assert np.array_equal(draw(loaded), want)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"use_safetensors": None}, {"use_safetensors": True}])
def test_pickled_weights_are_refused_by_default(tmp_path, options):
    folder = save_legacy(tmp_path, pickled=True)
    with pytest.raises(OSError, match=r"\.bin.*code.*use_safetensors=False"):
        GaussianDDPMPipeline.from_pretrained(folder, **options)


def test_a_damaged_safetensors_file_is_not_reported_as_pickled(tmp_path):
    folder = save_ours(tmp_path / "model")
    (folder / "unet" / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(OSError, match=WEIGHTS):
        GaussianDDPMPipeline.from_pretrained(folder)


def test_a_checkpoint_with_a_missing_weight_is_refused(tmp_path):
    weights = save_ours(tmp_path / "model") / "unet" / WEIGHTS
    tensors = load_file(weights)
    del tensors["conv_in.weight"]
    save_file(tensors, weights)
    with pytest.raises(OSError, match=r"lacks weights: conv_in\.weight"):
        GaussianDDPMPipeline.from_pretrained(tmp_path / "model")


def test_our_schedule_survives_conversion_to_ddim_and_back(tmp_path):
    scheduler = tiny_scheduler(beta_schedule="chen_sigmoid", beta_schedule_params={"tau": 0.7})
    pipeline = tiny_pipeline(scheduler=scheduler)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.save_pretrained(tmp_path / "model")
    loaded = GaussianDDPMPipeline.from_pretrained(tmp_path / "model").scheduler
    assert type(loaded) is DDIMScheduler
    back = type(scheduler).from_config(loaded.config)
    assert back.config["_ddpm_hf"] == scheduler.config["_ddpm_hf"]
    torch.testing.assert_close(back.betas, scheduler.betas, rtol=0, atol=0)


@pytest.mark.slow
def test_weights_in_float8_are_saved_and_checked(tmp_path):
    """Layerwise casting stores weights in float8, for which torch has no isfinite."""
    pipeline = tiny_pipeline()
    pipeline.unet.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    want = draw(pipeline)
    pipeline.save_pretrained(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "unet" / WEIGHTS)
    assert torch.float8_e4m3fn in {weight.dtype for weight in stored.values()}
    loaded = GaussianDDPMPipeline.from_pretrained(tmp_path / "model", dtype=torch.float32)
    np.testing.assert_array_equal(draw(loaded), want)
    convolution = pipeline.unet.mid_block.resnets[0].conv1
    convolution.weight.data[0, 0] = torch.full((3, 3), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"weight mid_block\.resnets\.0\.conv1\.weight .*finite"):
        pipeline.save_pretrained(tmp_path / "damaged")
