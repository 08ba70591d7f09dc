"""Loading over HTTP: stock code, travelling code and package; old, private and bad checkpoints."""

import json
import re
import shutil
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
    tiny_scheduler,
    tiny_unet,
)
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from hub_server import OWNER_TOKEN, STRANGER_TOKEN, Blob, ClientError, HubClient
from processes import run_forked

from ddpm_hf import GaussianDDPMPipeline, load
from ddpm_hf.diffusion import checkpoint_limits
from ddpm_hf.hub.card_facts import card_facts
from ddpm_hf.hub.card_rendering import render_model_card
from ddpm_hf.hub.push import push

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Weights mapped at another address change the last bits of sums.
ATOL = 1e-5

# Runs in other processes: classes and samples of a pipeline.
SHOW = """
import torch
def show(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    images = pipe(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images
    return [type(pipe).__name__, type(pipe.scheduler).__name__, images.tolist()]
"""


def draw(pipe):
    generator = torch.Generator().manual_seed(5)
    call = {"batch_size": 2, "num_inference_steps": 4, "output_type": "np"}
    return quiet(pipe)(generator=generator, **call).images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint of this package, with our extension of the configuration."""
    return save_ours(tmp_path_factory.mktemp("made") / "model", unet=tiny_unet(**TWO_LEVELS))


@pytest.fixture(scope="module")
def stock_process(hub_server, tmp_path_factory):
    """A process without the package."""
    with HubClient(hub_server, tmp_path_factory.mktemp("stock"), package=False) as client:
        client.run(SHOW)
        yield client


@pytest.fixture(scope="module")
def offline(hub_server, hub_process):
    """A process that works offline with the cache of `hub_process`."""
    options = {"token": None, "env": {"HF_HUB_OFFLINE": "1"}}
    with HubClient(hub_server, hub_process.log.parent, **options) as client:
        client.run(SHOW + "from ddpm_hf import load")
        yield client


@pytest.fixture
def client(hub, hub_process):
    """A process with the package, as the owner of a token."""
    names = "from ddpm_hf import GaussianDDPMPipeline, load\nfrom diffusers import DDPMPipeline"
    hub_process.run(SHOW + names)
    set_token(hub_process, OWNER_TOKEN)
    yield hub_process
    set_token(hub_process, OWNER_TOKEN)


@pytest.fixture
def stock_client(hub, stock_process):
    set_token(stock_process, OWNER_TOKEN)
    return stock_process


def set_token(client, token):
    """Log in as the owner of this token, or log out."""
    client.run("import os\nos.environ.pop('HF_TOKEN', None)")
    if token:
        client.run("os.environ['HF_TOKEN'] = token", token=token)


def add_with_card(hub, repo, folder):
    """Add a repository; the code in its card: stock diffusers, travelling code, package."""
    card = render_model_card(card_facts(folder), repo)
    hub.add_folder(repo, folder)
    hub.edit(repo, {"README.md": card})
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def images_of(answer):
    return np.array(answer[2])


# ----------------------------------------------------------------------------------------------
# Three ways to load, each by the code in the card


@pytest.mark.slow
def test_stock_diffusers_runs_no_code_and_names_the_option_that_would(
    stock_client, hub, checkpoint, tmp_path
):
    by_stock, with_code, _ = add_with_card(hub, "user/plain", checkpoint)
    marker = tmp_path / "ran"
    hub.edit("user/plain", {"pipeline.py": f"open({str(marker)!r}, 'w')"})
    set_token(stock_client, None)
    answer = stock_client.run(by_stock + "result = show(pipe)")
    sizes = stock_client.run("result = [image.size for image in images]")
    with pytest.raises(ClientError, match="trust_remote_code=True") as caught:
        stock_client.run(re.sub(r"trust_remote_code=True,?", "", with_code))
    assert answer[:2] == ["DDPMPipeline", "DDPMScheduler"]
    assert sizes == [[8, 8]] * 4
    stock = DDPMPipeline.from_pretrained(checkpoint)
    np.testing.assert_allclose(images_of(answer), draw(stock), atol=ATOL)
    assert "pipeline.py" in caught.value.message  # the file to read before consent
    assert not marker.exists()


@pytest.mark.slow
def test_travelling_code_gives_all_features_after_consent(stock_client, hub, checkpoint):
    client, (_, with_code, _) = stock_client, add_with_card(hub, "user/digits", checkpoint)
    answer = client.run(with_code + "result = show(pipe)")
    ours = GaussianDDPMPipeline.from_pretrained(checkpoint)
    assert answer[:2] == ["GaussianDDPMPipeline", "GaussianDDPMScheduler"]
    np.testing.assert_allclose(images_of(answer), draw(ours), atol=ATOL)
    # A copy of a copy has the same files.
    client.run("pipe.push_to_hub('user/copy')")
    again = with_code.replace("user/digits", "user/copy")
    client.run(again + "pipe.push_to_hub('user/copy-of-copy')")
    last = again.replace("user/copy", "user/copy-of-copy")
    answer = client.run(last + "result = show(pipe)")
    np.testing.assert_allclose(images_of(answer), draw(ours), atol=ATOL)
    first, third = (hub.repo(f"user/{name}").files() for name in ("digits", "copy-of-copy"))
    assert b"library_name: diffusers" in third["README.md"]  # the plain card of diffusers
    same = [name for name in first if name not in ("README.md", "training.json")]
    assert {name: third[name] for name in same} == {name: first[name] for name in same}


@pytest.mark.slow
def test_the_package_loads_its_own_classes_and_then_works_offline(client, offline, hub, checkpoint):
    *_, by_package = add_with_card(hub, "user/packaged", checkpoint)
    set_token(client, None)
    answer = client.run(by_package + "result = show(pipe)")
    assert answer[:2] == ["GaussianDDPMPipeline", "GaussianDDPMScheduler"]
    ours = GaussianDDPMPipeline.from_pretrained(checkpoint)
    np.testing.assert_allclose(images_of(answer), draw(ours), atol=ATOL)
    assert hub.count(r"GET .*\.py") == 0
    hub.requests.clear()
    again = offline.run(by_package + "result = show(pipe)")
    with pytest.raises(ClientError, match="HF_HUB_OFFLINE") as caught:
        offline.run("load('user/never-seen')")
    assert again == answer
    assert caught.value.kind == "ValueError"
    assert hub.requests == []


@pytest.mark.slow
def test_two_repositories_in_one_process_run_their_own_code(
    stock_client, hub, checkpoint, tmp_path
):
    hub.add_folder("user/one", checkpoint)
    other = Path(shutil.copytree(checkpoint, tmp_path / "other"))
    code = next(other.glob("ddpm_hf_*"))
    # Another version of the package has another folder name and other behaviour.
    changed = code.rename(other / "ddpm_hf_0123456789ab")
    for path in (other / "pipeline.py", *changed.glob("*.py")):
        path.write_text(path.read_text().replace(code.name, changed.name))
    with (changed / "pipeline.py").open("a") as file:
        file.write("\nGaussianDDPMPipeline.version = 'other'\n")
    hub.add_folder("user/other", other)
    result = stock_client.run(
        "from diffusers import DiffusionPipeline\n"
        "def get(repo): return DiffusionPipeline.from_pretrained(\n"
        "    repo, custom_pipeline=repo, trust_remote_code=True)\n"
        "one, two, three = get('user/one'), get('user/other'), get('user/one')\n"
        "result = [getattr(p, 'version', 'first') for p in (one, two, three)]"
    )
    assert result == ["first", "other", "first"]


# ----------------------------------------------------------------------------------------------
# Repositories of the Hub


@pytest.mark.slow
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "bin"])
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "foldered"])
def test_an_old_repository_samples_like_stock_diffusers(client, hub, tmp_path, flat, pickled):
    # Unique names, because huggingface_hub caches information about a repository.
    repo = f"google/{'flat' if flat else 'foldered'}-{'bin' if pickled else 'safe'}"
    hub.add_folder(repo, save_legacy(tmp_path / "old", flat=flat, pickled=pickled))
    options = {"use_safetensors": not pickled}
    answers = [
        client.run(f"result = show({call}(repo, **options))", repo=repo, options=options)
        for call in ("DDPMPipeline.from_pretrained", "load", "GaussianDDPMPipeline.from_pretrained")
    ]
    stock, ours, by_class = answers
    assert stock[:2] == ["DDPMPipeline", "DDPMScheduler"]
    assert ours[:2] == by_class[:2] == ["GaussianDDPMPipeline", "GaussianDDPMScheduler"]
    np.testing.assert_allclose(images_of(ours), images_of(stock), atol=ATOL)
    np.testing.assert_allclose(images_of(by_class), images_of(stock), atol=ATOL)


@pytest.mark.slow
def test_a_stock_repository_samples_like_stock_diffusers(client, hub, tmp_path):
    hub.add_folder("someone/stock", save_stock(tmp_path / "stock"))
    stock = client.run("result = show(DDPMPipeline.from_pretrained('someone/stock'))")
    ours = client.run("result = show(load('someone/stock'))")
    np.testing.assert_allclose(images_of(ours), images_of(stock), atol=ATOL)


@pytest.mark.slow
def test_pickled_weights_are_refused_with_the_option_that_allows_them(client, hub, tmp_path):
    hub.add_folder("google/pickled", save_legacy(tmp_path / "old"))
    with pytest.raises(ClientError, match=r"can run code.*use_safetensors=False") as caught:
        client.run("load('google/pickled')")
    assert "ValueError" in caught.value.bases
    assert hub.count(r"\.bin") == 0


@pytest.mark.slow
def test_a_revision_loads_its_own_weights(client, hub, tmp_path):
    first, second = (save_ours(tmp_path / n, unet=tiny_unet(seed=i)) for i, n in enumerate("ab"))
    repo = hub.add_folder("user/moving", first)
    old = repo.branches["main"]
    repo.branches["v1"] = old
    hub.edit("user/moving", {WEIGHTS: (second / WEIGHTS).read_bytes()})
    now = client.run("result = show(load('user/moving'))")
    np.testing.assert_allclose(images_of(now), draw(load(second)), atol=ATOL)
    for revision in ("v1", old):
        then = client.run("result = show(load('user/moving', revision=r))", r=revision)
        np.testing.assert_allclose(images_of(then), draw(load(first)), atol=ATOL)
    with pytest.raises(ClientError, match="has no such revision"):
        client.run("load('user/moving', revision='v9')")


@pytest.mark.slow
def test_another_kind_of_pipeline_is_refused_before_its_weights_are_downloaded(client, hub):
    index = {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    files = {"model_index.json": json.dumps(index), WEIGHTS: b"0", "unet/config.json": "{}"}
    hub.add_repo("user/text-to-image", files)
    with pytest.raises(ClientError, match="got a StableDiffusionPipeline"):
        client.run("load('user/text-to-image')")
    assert hub.count("model_index.json") > 0
    assert hub.count("unet/") == hub.count("/objects") == 0


@pytest.mark.slow
def test_a_command_asks_the_hub_once_for_a_repository(client, hub, tmp_path):
    first, second = (save_ours(tmp_path / n, unet=tiny_unet(seed=i)) for i, n in enumerate("ab"))
    hub.add_folder("user/pushed", first)
    client.run("from ddpm_hf.hub.download import downloading_once\nblock = downloading_once()")
    client.run("block.__enter__()\nload('user/pushed')")
    hub.edit("user/pushed", {WEIGHTS: (second / WEIGHTS).read_bytes()})
    hub.requests.clear()
    inside = client.run("result = show(load('user/pushed'))")
    assert hub.requests == []
    after = client.run("block.__exit__(None, None, None)\nresult = show(load('user/pushed'))")
    np.testing.assert_allclose(images_of(inside), draw(load(first)), atol=ATOL)
    np.testing.assert_allclose(images_of(after), draw(load(second)), atol=ATOL)


@pytest.mark.slow
def test_a_private_repository_loads_only_with_the_token_of_its_owner(client, hub, checkpoint):
    hub.add_folder("user/private", checkpoint, private=True)
    set_token(client, None)
    for token in (None, STRANGER_TOKEN):
        with pytest.raises(ClientError, match="not on the Hub, or is private") as caught:
            client.run("load('user/private', token=token)", token=token)
        assert caught.value.kind == "ValueError"
    client.run("load('user/private', token=token)", token=OWNER_TOKEN)
    assert hub.tokens_at_storage == []


DOWNLOAD_FAULTS = {
    "listing 503": dict(pattern=r"GET /api/models/user/\w+/tree", status=503),
    "metadata 503": dict(pattern="HEAD .*unet/config", status=503),
    "small file reset": dict(pattern="GET .*unet/config", kind="reset"),
    "small file 503": dict(pattern="GET .*unet/config", status=503),
    "weights reset": dict(pattern="GET /objects", kind="reset"),
    "weights cut": dict(pattern="GET /objects", kind="cut"),
    "weights 429": dict(pattern="GET /objects", status=429, headers={"Retry-After": "0"}),
    "weights 500": dict(pattern="GET /objects", status=500),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", DOWNLOAD_FAULTS)
def test_a_transient_download_error_is_retried(client, hub, checkpoint, fault):
    repo = "user/" + fault.replace(" ", "_")
    hub.add_folder(repo, checkpoint)
    hub.fault(**DOWNLOAD_FAULTS[fault])
    answer = client.run("result = show(load(repo))", repo=repo)
    assert not any(fault.times for fault in hub.faults), "the fault did not occur"
    np.testing.assert_allclose(images_of(answer), draw(load(checkpoint)), atol=ATOL)


@pytest.mark.slow
def test_an_unreachable_hub_raises_an_error_of_one_line(client, hub, checkpoint):
    hub.fault("user/down", times=99, status=503)
    client.run("from ddpm_hf.hub import download as loading; loading.WAITS_S = (0.01, 0.01)")
    with pytest.raises(ClientError, match="the Hub failed for user/down") as caught:
        client.run("load('user/down')")
    assert caught.value.kind == "HubError"
    assert "OSError" in caught.value.bases
    assert "\n" not in caught.value.message


# ----------------------------------------------------------------------------------------------
# Invalid and malicious checkpoints


def edit_index(folder, **changes):
    index = json.loads((folder / "model_index.json").read_text()) | changes
    (folder / "model_index.json").write_text(json.dumps(index))


def drop_weight(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    weights.pop("conv_in.weight")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def plant_inf(folder):
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / WEIGHTS)
    weights["conv_in.bias"][0] = float("inf")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def link_weights(folder):
    target = folder.parent / "elsewhere.safetensors"
    (folder / WEIGHTS).rename(target)
    (folder / WEIGHTS).symlink_to(target)


def link_unet(folder):
    (folder / "unet").rename(folder.parent / "elsewhere")
    (folder / "unet").symlink_to(folder.parent / "elsewhere")


def edit_config(folder, part, **changes):
    path = folder / part / ("config.json" if part == "unet" else "scheduler_config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def nest_config(folder):
    (folder / "unet/config.json").write_text('{"a":' * 99_999)


def fill_config(folder):
    (folder / "unet/config.json").write_text(json.dumps({"a": "x" * 5_000_000}))


def unet_with(**changes):
    return lambda folder: edit_config(folder, "unet", **changes)


def cut_weights(folder, name=WEIGHTS):
    (folder / name).write_bytes((folder / name).read_bytes()[:1000])


BAD = {
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "broken index": (
        lambda f: (f / "model_index.json").write_text("[1]"),
        "must hold a JSON object",
    ),
    "deep index": (lambda f: (f / "model_index.json").write_text("[" * 99_999), "not valid JSON"),
    "another kind": (lambda f: edit_index(f, _class_name="FluxPipeline"), "got a FluxPipeline"),
    "another unet": (lambda f: edit_index(f, unet=["diffusers", "UNet1DModel"]), "UNet2DModel"),
    "own pipeline": (lambda f: edit_index(f, _class_name=["pipeline", "X"]), "code of its own"),
    "own scheduler": (lambda f: edit_index(f, scheduler=["evil", "X"]), "code of its own"),
    "os.system": (lambda f: edit_index(f, scheduler=["os", "system"]), "code of its own"),
    "odd part": (lambda f: edit_index(f, scheduler="DDPMScheduler"), "code of its own"),
    "null part": (lambda f: edit_index(f, scheduler=None), "code of its own"),
    "empty part": (lambda f: edit_index(f, scheduler=[]), "code of its own"),
    "other noise": (
        lambda f: edit_index(f, scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        "does not sample from a DDPM",
    ),
    "number as text": (
        lambda f: edit_config(f, "scheduler", num_train_timesteps="1000"),
        '"num_train_timesteps" must be an int',
    ),
    "channels as text": (unet_with(in_channels="1"), "invalid for UNet2DModel: TypeError"),
    "no groups": (unet_with(norm_num_groups=0), "invalid for UNet2DModel: ZeroDivision"),
    "odd groups": (unet_with(norm_num_groups=3), "must be divisible by num_groups (3)"),
    "no heads": (unet_with(attention_head_dim=0), "invalid for UNet2DModel: ZeroDivision"),
    "wide heads": (unet_with(attention_head_dim=99), "has no elements"),
    "a million layers": (
        unet_with(layers_per_block=1_000_000),
        "`layers_per_block` must be an int",
    ),
    "a thousand layers": (unet_with(layers_per_block=1000), "`layers_per_block` must be an int"),
    "wide": (unet_with(block_out_channels=[8, 65_536]), "of memory"),
    "wider": (unet_with(block_out_channels=[8, 10**6]), "of memory"),
    "many levels": (
        unet_with(block_out_channels=[8] * 11),
        "`block_out_channels` must be a list of",
    ),
    "many channels": (unet_with(in_channels=10**9), "of memory"),
    "many classes": (unet_with(num_class_embeds=10**10), "of memory"),
    "too large": (unet_with(sample_size=20_000), "`sample_size` must be an int in [1, 8192]"),
    "huge": (unet_with(sample_size=10**9), "`sample_size` must be an int in [1, 8192]"),
    "less than nothing": (unet_with(sample_size=-1), "`sample_size` must be an int in [1, 8192]"),
    "no such block": (unet_with(down_block_types=["X", "Y"]), "X does not exist"),
    "more than memory": (
        unet_with(block_out_channels=[8192, 8192], layers_per_block=16),
        "of memory",
    ),
    "nested config": (nest_config, "not valid JSON"),
    "five megabytes of config": (fill_config, "at most 4,194,304 are read"),
    "many steps": (
        lambda f: edit_config(f, "scheduler", num_train_timesteps=10**12),
        '"num_train_timesteps" must be an int',
    ),
    "bad facts": (
        lambda f: edit_config(f, "unet", _ddpm_hf={**image_facts_of("L", 8, 8), "class_names": 3}),
        "`class_names` must be a list of strings, got 3",
    ),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "cannot be loaded"),
    "no config": (lambda f: (f / "unet/config.json").unlink(), "has no config.json of its network"),
    "clone without git-lfs": (
        lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "is a Git LFS pointer to the weights: run `git lfs pull`",
    ),
    "cut weights": (cut_weights, "cannot be loaded"),
    "missing weight": (drop_weight, "do not fit"),
    "not finite": (plant_inf, "not finite"),
    "linked weights": (link_weights, "is a link"),
    "linked folder": (link_unet, "is a link"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BAD)
def test_an_invalid_checkpoint_raises_an_error_of_one_line(checkpoint, tmp_path, fault):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    damage, expected = BAD[fault]
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut", "another network"])
def test_damaged_averages_of_a_training_checkpoint_raise_an_error_of_one_line(
    checkpoint, tmp_path, damage
):
    from safetensors.torch import save_file

    shutil.copytree(checkpoint, tmp_path / "run" / "model")
    step = tmp_path / "run" / "checkpoints" / "step-2"
    step.mkdir(parents=True)
    averages = step / "ema.safetensors"
    averages.write_bytes((checkpoint / WEIGHTS).read_bytes())
    assert load(step).unet.config.sample_size == 8
    if damage == "cut":
        cut_weights(tmp_path, averages)
    else:
        save_file({"conv_in.bias": torch.zeros(3)}, averages)
    with pytest.raises(ValueError, match="cannot be loaded: ") as caught:
        load(step)
    assert "\n" not in str(caught.value)


def test_from_pretrained_refuses_an_oversized_network_too(checkpoint, tmp_path):
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    edit_config(folder, "unet", layers_per_block=1_000_000)
    with pytest.raises(ValueError, match="`layers_per_block` must be an int in"):
        GaussianDDPMPipeline.from_pretrained(folder)


@pytest.mark.slow
def test_oversized_networks_are_refused_without_time_or_memory(checkpoint, tmp_path):
    """In a process of its own, so that its peak memory is that of the refusals; CPU time."""
    code = """
import json, resource, sys, time
from pathlib import Path
import ddpm_hf.diffusion.pipeline
from ddpm_hf import load
config = Path(sys.argv[1]) / "unet" / "config.json"
good = json.loads(config.read_text())
load(sys.argv[1])
peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
for key, value in (
    ("layers_per_block", 10**6), ("block_out_channels", [10**6] * 2), ("in_channels", 10**9),
    ("num_class_embeds", 10**10), ("block_out_channels", [8192, 8192]),
):
    config.write_text(json.dumps(good | {key: value, "layers_per_block": 16} | {key: value}))
    try:
        load(sys.argv[1])
    except ValueError:
        continue
    raise SystemExit(f"{key}={value} was not refused")
print(time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak)
"""
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    done = run_forked(["-c", code, folder])
    assert done.returncode == 0, done.stderr
    seconds, kilobytes = map(float, done.stdout.split())
    assert seconds < 5  # a second for each of five
    assert kilobytes < 50_000


@pytest.mark.slow
def test_a_large_network_that_fits_into_memory_is_accepted(monkeypatch):
    config = {"block_out_channels": [512, 1024], "layers_per_block": 4}
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    with torch.device("meta"):
        size = sum(p.numel() for p in UNet2DModel(**config, **blocks).parameters())
    monkeypatch.setattr(checkpoint_limits, "memory_bytes", lambda: 4 * size)
    checkpoint_limits.check_unet_config(config | blocks, "config.json", torch.float32)
    monkeypatch.setattr(checkpoint_limits, "memory_bytes", lambda: 4 * size - 1)
    with pytest.raises(ValueError, match=f"a network of {size:,} parameters"):
        checkpoint_limits.check_unet_config(config | blocks, "config.json", torch.float32)
    checkpoint_limits.check_unet_config(config | blocks, "config.json", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("use_safetensors", [True, False])
def test_pickled_weights_are_ignored_if_there_are_safetensors(tmp_path, use_safetensors):
    folder = save_ours(tmp_path / "model")
    (folder / "unet/diffusion_pytorch_model.bin").write_bytes(b"not a pickle")
    assert load(folder, use_safetensors=use_safetensors).unet.config.sample_size == 8


def test_a_tilde_in_a_path_is_expanded(checkpoint, tmp_path, monkeypatch):
    shutil.copytree(checkpoint, tmp_path / "model")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("~/model").unet.config.sample_size == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("why", "expected"),
    [
        ("token", "not on the Hub, or is private"),
        ("answer", "the Hub failed for user/no-answer"),
        ("network", "HF_HUB_OFFLINE is set"),
    ],
)
def test_an_incomplete_copy_in_the_cache_is_not_loaded(
    client, offline, hub, checkpoint, why, expected
):
    repo = f"user/no-{why}"
    hub.add_folder(repo, checkpoint, private=True)
    hub.edit(repo, {"README.md": "a card"})
    client.run(
        "from huggingface_hub import hf_hub_download\nhf_hub_download(repo, 'README.md')", repo=repo
    )
    if why == "answer":
        hub.fault(repo, times=99, status=503)
        client.run("from ddpm_hf.hub import download as loading; loading.WAITS_S = (0.01,)")
    if why == "token":
        set_token(client, None)
    with pytest.raises(ClientError, match=expected):
        (offline if why == "network" else client).run("load(repo)", repo=repo)


AWAY = """
from huggingface_hub import constants
from ddpm_hf import load
load("user/away")
before, constants.ENDPOINT = constants.ENDPOINT, "http://127.0.0.1:9"
try:
    size = load("user/away").unet.config.sample_size
    try:
        load("user/never-loaded")
    except OSError as error:
        result = [size, str(error), error.__cause__ is None]
finally:
    constants.ENDPOINT = before
"""


@pytest.mark.slow
def test_without_a_connection_the_cache_is_read_and_nothing_is_repeated(hub, checkpoint, client):
    hub.add_folder("user/away", checkpoint)
    size, message, is_alone = client.run(AWAY)
    assert size == 8
    assert message.startswith("no connection to http://127.0.0.1:9 for user/never-loaded: ")
    assert message.endswith(", and the cache has no copy")
    assert is_alone


@pytest.mark.slow
def test_our_scheduler_saved_by_a_stock_pipeline_loads_but_must_be_saved_again_to_push(tmp_path):
    scheduler = tiny_scheduler(variance_type="fixed_large")
    DDPMPipeline(tiny_unet(), scheduler).save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match=r"ddpm_hf\.load.*save_pretrained"):
        push(tmp_path / "stock", "user/x", dry_run=True)
    pipe = load(tmp_path / "stock")
    assert pipe.scheduler.to_json_string() == scheduler.to_json_string()
    pipe.save_pretrained(tmp_path / "ours")
    assert type(DDPMPipeline.from_pretrained(tmp_path / "ours").scheduler) is DDPMScheduler
    assert push(tmp_path / "ours", "user/x", dry_run=True).files


def test_a_file_or_an_empty_name_is_refused(checkpoint):
    with pytest.raises(ValueError, match="is a file"):
        load(checkpoint / "model_index.json")
    with pytest.raises(ValueError, match="neither a local folder"):
        load("")


@pytest.mark.parametrize("name", ["no/such/folder", "./nowhere", "/no/folder", "a b/c", "x" * 200])
def test_a_name_that_is_neither_a_folder_nor_a_repository_is_refused(name):
    with pytest.raises(ValueError, match="neither a local folder nor the name of a repository"):
        load(name)


def evil_pickle(path):
    class Evil:
        def __reduce__(self):
            return Path.write_text, (path, "ran")

    import pickle

    return pickle.dumps({"conv_in.weight": Evil()})


@pytest.mark.slow
def test_malicious_code_never_runs_without_consent(client, hub, checkpoint, tmp_path):
    marker = tmp_path / "ran"
    code = f"open({str(marker)!r}, 'w').write('ran')\n"
    files = {
        p.relative_to(checkpoint).as_posix(): p.read_bytes()
        for p in checkpoint.rglob("*")
        if p.is_file()
    }
    index = json.loads(files["model_index.json"])
    no_weights = {name: data for name, data in files.items() if name != WEIGHTS}

    def with_index(**changes):
        return {"model_index.json": json.dumps(index | changes)}

    repos = {
        "pickle": no_weights | {"unet/diffusion_pytorch_model.bin": evil_pickle(marker)},
        "pipeline": files | {"pipeline.py": code} | with_index(_class_name=["pipeline", "X"]),
        "quiet-pipeline": files | {"pipeline.py": code},
        "scheduler": files | {"scheduler/evil.py": code} | with_index(scheduler=["evil", "X"]),
        "unet": files | {"unet/evil.py": code} | with_index(unet=["evil", "X"]),
        "system": files | with_index(scheduler=["os", "system"]),
    }
    for name, content in repos.items():
        hub.add_repo(f"evil/{name}", content)
        for call in (
            "load",
            "GaussianDDPMPipeline.from_pretrained",
            "DDPMPipeline.from_pretrained",
        ):
            for options in ({}, {"use_safetensors": False}):
                try:
                    client.run(f"{call}(repo, **options)", repo=f"evil/{name}", options=options)
                except ClientError as error:
                    refusal = error.kind
                else:
                    refusal = None
                assert not marker.exists(), (name, call, options)
                assert refusal or name == "quiet-pipeline", (name, call, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["../../outside.json", "unet/../../../../outside.json"])
def test_file_names_with_parent_folders_write_only_in_the_cache(client, hub, checkpoint, name):
    repo = hub.add_folder(f"evil/climb{len(name)}", checkpoint)
    repo.commit("main", "climb", {name: Blob(b"{}"), f"unet/{name}": Blob(b"{}")})
    client.run("load(repo)", repo=repo.id)
    assert not list(client.log.parent.parent.rglob("outside.json"))
