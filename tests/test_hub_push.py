"""Pushes over HTTP: a single commit, an allow-list, retries, and edits of the card on the Hub."""

import io
import json
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
from checkpoints import save_ours, tiny_unet
from hub_server import (
    OWNER_TOKEN,
    READER_TOKEN,
    STRANGER_TOKEN,
    ClientError,
    client_environment,
)
from PIL import Image
from processes import LIMIT_S, run_process
from safetensors.torch import load_file, save_file

from ddpm_hf import load
from ddpm_hf.hub.push import push

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
# Our retries are immediate; those of huggingface_hub take one or two seconds each.
SETUP = """
import functools, importlib, time
from pathlib import Path
from ddpm_hf import load
from ddpm_hf.hub.push import push
from ddpm_hf.hub.background_push import BackgroundPusher
WAITS = (0.02,) * 4
push = functools.partial(push, waits_s=WAITS)
def pushed(*args, **options):
    return str(push(*args, **options))
"""


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_ours(tmp_path_factory.mktemp("made") / "model")


@pytest.fixture
def checkpoint(original, tmp_path):
    return Path(shutil.copytree(original, tmp_path / "model"))


@pytest.fixture
def client(hub, hub_process):
    hub_process.run(SETUP)
    return hub_process


def push_from(client, folder, repo_id="user/digits", **options):
    return client.run(
        "result = pushed(folder, repo_id, **options)",
        folder=folder,
        repo_id=repo_id,
        options=options,
    )


def refusal_of(client, folder, repo_id="user/digits", **options):
    """One-line message of the ValueError."""
    with pytest.raises(ClientError) as caught:
        push_from(client, folder, repo_id, **options)
    assert "ValueError" in caught.value.bases, caught.value
    assert "\n" not in caught.value.message
    return caught.value.message


def local_files(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def without_cards(files):
    return {k: v for k, v in files.items() if k not in ("README.md", ".gitattributes")}


# Checks without a connection


def write_facts(folder, **facts):
    (folder / "training.json").write_text(json.dumps(facts))


def plant_nan(folder):
    weights = load_file(folder / WEIGHTS)
    next(iter(weights.values())).view(-1)[0] = float("nan")
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def truncate_weights(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def link_out(folder):
    secret = folder.parent / "secret.txt"
    secret.write_text("secret")
    (folder / "LICENSE").symlink_to(secret)


def rename_class(folder):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"_class_name": "StableDiffusionPipeline"})
    )


BAD_FOLDERS = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no index": (lambda f: (f / "model_index.json").unlink(), "no model_index.json"),
    "another kind": (rename_class, "got a StableDiffusionPipeline"),
    "broken index": (lambda f: (f / "model_index.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "no safetensors weights"),
    "no unet config": (lambda f: (f / "unet/config.json").unlink(), "no unet/config.json"),
    "not finite": (plant_nan, "is not finite"),
    "cut weights": (truncate_weights, "is damaged"),
    "link out": (link_out, "is a link"),
    "token": (lambda f: write_facts(f, hardware=OWNER_TOKEN), "token or password"),
    "password": (
        lambda f: write_facts(f, dataset={"name": "https://me:secret@host/x"}),
        "password",
    ),
    "path": (lambda f: write_facts(f, dataset={"name": "/home/jane/photos"}), "/home/jane/photos"),
    "path in the card": (
        lambda f: (f / "README.md").write_text("see /Users/jane/x.png"),
        "/Users/jane",
    ),
    "bad metadata": (lambda f: (f / "README.md").write_text("---\na: [\n---\n"), "metadata"),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", BAD_FOLDERS)
def test_an_invalid_folder_is_refused_in_one_line(checkpoint, fault):
    spoil, expected = BAD_FOLDERS[fault]
    spoil(checkpoint)
    with pytest.raises(ValueError, match=re.escape(expected)) as caught:
        push(checkpoint, "user/digits", dry_run=True)
    assert "\n" not in str(caught.value)
    assert OWNER_TOKEN not in str(caught.value)


def test_the_parent_of_a_checkpoint_is_refused_with_a_hint(checkpoint):
    with pytest.raises(ValueError, match=r"did you mean .*model\?"):
        push(checkpoint.parent, "user/digits", dry_run=True)


@pytest.mark.parametrize(
    "name", ["", "digits", "a b/c", "a/b/c", "-user/x", "user/x.git", "user/" + "x" * 100]
)
def test_an_invalid_repository_name_is_refused(checkpoint, name):
    with pytest.raises(ValueError, match="not the name of a repository"):
        push(checkpoint, name, dry_run=True)


def add_other_files(folder):
    """Add files of real output folders that must not be uploaded."""
    for name in (
        ".env",
        ".git/config",
        ".cache/huggingface/x",
        "checkpoint-5/optimizer.bin",
        "checkpoint-5/unet/diffusion_pytorch_model.safetensors",
        "logs/events.out.tfevents.1",
        "notes.txt",
        "id_rsa",
        "unet/optimizer.pt",
        "unet/diffusion_pytorch_model.bin",
        "scheduler/secret.json",
        "pipeline.py.bak",
        "evil.py",
        "ddpm_hf_x/deep/a.py",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"API_KEY={OWNER_TOKEN}")


def test_only_files_of_the_allow_list_are_uploaded(checkpoint):
    expected = set(local_files(checkpoint)) | {"README.md", "samples.png", "recipe.yaml"}
    add_other_files(checkpoint)
    (checkpoint / "samples.png").write_bytes(b"png")
    (checkpoint / "recipe.yaml").write_text("max_train_steps: 3\n")
    result = push(checkpoint, "user/digits", dry_run=True)
    assert set(result.files) == expected
    for name in expected:
        assert name in str(result)


@pytest.mark.slow
def test_all_shards_are_uploaded(checkpoint):
    load(checkpoint).save_pretrained(checkpoint, max_shard_size="20KB")
    shards = {p.relative_to(checkpoint).as_posix() for p in (checkpoint / "unet").iterdir()}
    assert len(shards) > 3
    assert shards <= set(push(checkpoint, "user/digits", dry_run=True).files)
    load(checkpoint)


def test_the_origin_of_the_weights_is_not_uploaded(checkpoint):
    config = json.loads((checkpoint / "unet/config.json").read_text())
    config["_name_or_path"] = "/home/jane/secret-project"
    (checkpoint / "unet/config.json").write_text(json.dumps(config))
    assert "unet/config.json" in push(checkpoint, "user/digits", dry_run=True).files


# Over HTTP


@pytest.mark.slow
def test_a_push_is_one_commit_of_the_listed_files(client, hub, checkpoint):
    checkpoint = checkpoint.rename(checkpoint.with_name("d \u00fc \u732b"))
    expected = local_files(checkpoint)
    add_other_files(checkpoint)
    message = push_from(client, checkpoint)
    repo = hub.repo("user/digits")
    assert [commit.title for commit in repo.history()] == ["Upload checkpoint", "initial commit"]
    assert without_cards(repo.files()) == expected
    assert repo.private
    assert hub.create_calls[0]["visibility"] == "private"
    assert "(private)" in message
    assert hub.url in message
    assert hub.tokens_at_storage == []  # the token must not reach the storage server


@pytest.mark.slow
def test_a_second_push_changes_nothing_and_keeps_other_files(client, hub, checkpoint):
    push_from(client, checkpoint)
    hub.edit("user/digits", {"notes/more.txt": "by hand"})
    head = hub.repo("user/digits").branches["main"]
    push_from(client, checkpoint)
    assert hub.repo("user/digits").branches["main"] == head


@pytest.mark.slow
def test_old_weights_and_code_are_deleted_on_the_hub(client, hub, checkpoint):
    push_from(client, checkpoint)
    hub.edit("user/digits", {"unet/diffusion_pytorch_model.safetensors.index.json": "{}"})
    hub.edit("user/digits", {"ddpm_hf_old/pipeline.py": "old", "unet/mine.txt": "keep"})
    push_from(client, checkpoint)
    added = set(hub.repo("user/digits").files()) - set(local_files(checkpoint))
    assert added == {"README.md", ".gitattributes", "unet/mine.txt"}


@pytest.mark.slow
def test_visibility_branch_and_pull_request_are_options(client, hub, checkpoint):
    assert "(public)" in push_from(client, checkpoint, public=True)
    repo = hub.repo("user/digits")
    main = repo.branches["main"]
    write_facts(checkpoint, steps=5)
    push_from(client, checkpoint, revision="next")
    assert b'"steps": 5' in repo.files("next")["training.json"]
    write_facts(checkpoint, steps=6)
    message = push_from(client, checkpoint, create_pr=True)
    assert b'"steps": 6' in repo.files("refs/pr/1")["training.json"]
    assert f"{hub.url}/user/digits/discussions/1" in message
    assert repo.branches["main"] == main


@pytest.mark.slow
def test_a_dry_run_makes_no_connection(client, hub, checkpoint):
    push_from(client, checkpoint, dry_run=True)
    assert hub.requests == []


FAULTS = {
    "create 500": dict(pattern="repos/create", status=500),
    "create 503 three times": dict(pattern="repos/create", status=503, times=3),
    "create reset": dict(pattern="repos/create", kind="reset"),
    "create answer lost": dict(pattern="repos/create", kind="lost"),
    "listing 502": dict(pattern="GET /api/models/user/digits", status=502),
    "card check 503": dict(pattern="validate-yaml", status=503),
    "card check reset": dict(pattern="validate-yaml", kind="reset"),
    "preupload reset": dict(pattern="preupload", kind="reset"),
    "batch 503": dict(pattern="objects/batch", status=503),
    "batch 429": dict(pattern="objects/batch", status=429, headers={"Retry-After": "0"}),
    "upload cut half-way": dict(pattern="PUT /objects", kind="cut"),
    "upload 500": dict(pattern="PUT /objects", status=500),
    "upload answer lost": dict(pattern="PUT /objects", kind="lost"),
    "commit 500": dict(pattern="/commit/main", status=500),
    "commit 503 four times": dict(pattern="/commit/main", status=503, times=4),
    "commit 408": dict(pattern="/commit/main", status=408),
    "commit 409": dict(pattern="/commit/main", status=409),
    "commit 412": dict(pattern="/commit/main", status=412),
    "commit 429": dict(pattern="/commit/main", status=429, headers={"Retry-After": "1"}),
    "commit reset": dict(pattern="/commit/main", kind="reset"),
    "commit answer lost": dict(pattern="/commit/main", kind="lost"),
    "commit slow": dict(pattern="/commit/main", kind="slow", seconds=1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_temporary_fault_ends_in_one_complete_commit(client, hub, checkpoint, name):
    hub.fault(**FAULTS[name])
    push_from(client, checkpoint)
    repo = hub.repo("user/digits")
    assert not any(fault.times for fault in hub.faults), "the fault did not occur"
    assert [commit.title for commit in repo.history()] == ["Upload checkpoint", "initial commit"]
    assert without_cards(repo.files()) == local_files(checkpoint)
    assert repo.private


@pytest.mark.slow
def test_a_push_survives_a_restart_of_the_hub(client, hub, checkpoint):
    hub.fault("PUT /objects", run=hub.restart)
    push_from(client, checkpoint)
    assert without_cards(hub.repo("user/digits").files()) == local_files(checkpoint)


REFUSALS = {
    401: "does not accept the token",
    402: "too large",
    403: "no right to write",
    404: "is not on the Hub",
    413: "too large",
    422: "refuses",
    507: "too large",
}


@pytest.mark.slow
@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_is_one_line_and_nothing_is_committed(client, hub, checkpoint, status):
    headers = {"X-Error-Code": "RepoNotFound"} if status == 404 else {}
    hub.fault("/commit/main", status=status, headers=headers)
    assert REFUSALS[status] in refusal_of(client, checkpoint)
    assert len(hub.repo("user/digits").history()) == 1
    assert hub.count("/commit/main") == 1


@pytest.mark.slow
@pytest.mark.parametrize("fault", [{"status": 503}, {"kind": "reset"}])
def test_a_permanent_failure_raises_a_hub_error(client, hub, checkpoint, fault):
    before = local_files(checkpoint)
    hub.fault("/commit/main", times=99, **fault)
    with pytest.raises(ClientError) as caught:
        push_from(client, checkpoint)
    assert caught.value.kind == "HubError"
    assert "\n" not in caught.value.message
    assert hub.count("/commit/main") == 5  # the first attempt and four retries
    assert len(hub.repo("user/digits").history()) == 1
    assert local_files(checkpoint) == before


@pytest.mark.slow
def test_a_failure_of_the_xet_client_is_one_line(client, hub, checkpoint):
    """The test server has no Xet storage. The client reads the constant at each upload."""
    client.run("import huggingface_hub.constants as c; c.HF_HUB_DISABLE_XET = False")
    try:
        with pytest.raises(ClientError, match="the Hub failed for user/digits") as caught:
            push_from(client, checkpoint)
    finally:
        client.run("c.HF_HUB_DISABLE_XET = True")
    assert caught.value.kind == "HubError"
    assert "\n" not in caught.value.message
    assert len(hub.repo("user/digits").history()) == 1


@pytest.mark.slow
def test_a_cached_copy_which_contains_links_can_be_pushed(client, hub, checkpoint):
    hub.add_folder("user/source", checkpoint)
    push_it = "pushed(huggingface_hub.snapshot_download('user/source'), 'user/mirror')"
    client.run(f"import huggingface_hub; {push_it}")
    files = without_cards(hub.repo("user/mirror").files())
    assert files == without_cards(local_files(checkpoint))


@pytest.mark.slow
def test_a_pull_request_is_not_opened_again_after_a_lost_answer(client, hub, checkpoint):
    push_from(client, checkpoint)
    write_facts(checkpoint, steps=7)
    hub.fault("/commit/main", kind="lost")
    with pytest.raises(ClientError) as caught:
        push_from(client, checkpoint, create_pr=True)
    assert caught.value.kind == "HubError"
    assert hub.repo("user/digits").num_pulls == 1


@pytest.mark.slow
def test_an_invalid_target_is_refused_before_the_upload(client, hub, checkpoint):
    hub.add_repo("user/data", kind="dataset")
    hub.add_repo("user/bert", {"config.json": "{}", "model.safetensors": b"x"})
    hub.add_repo("other/theirs", {"README.md": "hello"})
    assert "is a dataset" in refusal_of(client, checkpoint, "user/data")
    assert "contains other files (config.json, model.safetensors)" in refusal_of(
        client, checkpoint, "user/bert"
    )
    hub.add_repo("user/text", {"model_index.json": '{"_class_name": "StableDiffusionPipeline"}'})
    assert "contains a StableDiffusionPipeline: choose another name" in refusal_of(
        client, checkpoint, "user/text"
    )
    assert "no right to write" in refusal_of(client, checkpoint, "other/theirs")
    assert "no right to write" in refusal_of(client, checkpoint, "other/new")
    assert "is not on the Hub" in refusal_of(client, checkpoint, "user/none", create_pr=True)
    assert "does not accept the token" in refusal_of(client, checkpoint, token="hf_" + "wrong" * 6)
    assert "no right to write" in refusal_of(client, checkpoint, token=READER_TOKEN)
    assert hub.count("PUT|/commit/") == 0


@pytest.mark.slow
def test_other_users_can_open_a_pull_request(client, hub, checkpoint):
    push_from(client, checkpoint, public=True)
    write_facts(checkpoint, steps=8)
    push_from(client, checkpoint, create_pr=True, token=STRANGER_TOKEN)
    assert "refs/pr/1" in hub.repo("user/digits").branches


# The card on the Hub


def card_on_hub(hub, repo_id="user/digits"):
    return hub.repo(repo_id).files()["README.md"].decode()


@pytest.mark.slow
def test_a_generated_card_is_updated(client, hub, checkpoint):
    push_from(client, checkpoint)
    write_facts(checkpoint, steps=1234)
    assert "kept" not in push_from(client, checkpoint)
    assert "| optimizer updates | 1,234 |" in card_on_hub(hub)


@pytest.mark.slow
def test_a_card_without_markers_on_the_hub_survives_concurrent_edits(client, hub, checkpoint):
    push_from(client, checkpoint)
    for i in range(10):
        edited = f"---\nlicense: mit\n---\n# Mine, version {i}\n"
        write_facts(checkpoint, steps=i)
        if i % 2:  # before the push
            hub.edit("user/digits", {"README.md": edited})
        else:  # between the download of the card and the commit
            hub.fault(
                "/commit/main", run=lambda text=edited: hub.edit("user/digits", {"README.md": text})
            )
        message = push_from(client, checkpoint)
        files = hub.repo("user/digits").files()
        assert files["README.md"].decode() == edited
        assert json.loads(files["training.json"]) == {"steps": i}
        assert "kept" in message


@pytest.mark.slow
def test_text_in_a_generated_card_on_the_hub_stays(client, hub, checkpoint):
    write_facts(checkpoint, steps=247)
    push_from(client, checkpoint)
    edited = card_on_hub(hub).replace("<!-- ddpm-hf training", "By Jane.\n\n<!-- ddpm-hf training")
    hub.edit("user/digits", {"README.md": edited})
    for steps, options in ((450, {"license": "mit"}), (900, {})):
        write_facts(checkpoint, steps=steps)
        message = push_from(client, checkpoint, **options)
        card = card_on_hub(hub)
        assert "By Jane." in card
        assert f"| optimizer updates | {steps} |" in card
        assert "license: mit" in card
        assert "kept" in message


@pytest.mark.slow
def test_the_local_card_is_uploaded_only_if_the_hub_has_none(client, hub, checkpoint):
    (checkpoint / "README.md").write_text("# First\n")
    assert "kept" not in push_from(client, checkpoint)
    (checkpoint / "README.md").write_text("# Second\n")
    assert "kept" in push_from(client, checkpoint)
    assert card_on_hub(hub) == "# First\n"
    hub.edit("user/digits", {"README.md": None})
    assert "kept" not in push_from(client, checkpoint)
    assert card_on_hub(hub) == "# Second\n"


def test_a_dry_run_shows_the_card(checkpoint):
    write_facts(checkpoint, steps=1234)
    text = str(push(checkpoint, "user/digits", dry_run=True, license="apache-2.0"))
    assert "| optimizer updates | 1,234 |" in text
    assert "license: apache-2.0" in text
    assert 'load("user/digits")' in text


# `push_to_hub` of the pipeline


@pytest.mark.slow
def test_push_to_hub_uploads_the_portable_form_in_one_commit(client, hub, checkpoint):
    load = "from ddpm_hf import GaussianDDPMPipeline as P; pipe = P.from_pretrained(folder)"
    client.run(load, folder=checkpoint)
    client.run("pipe.push_to_hub('user/own')")
    client.run("pipe.push_to_hub('user/hidden', private=True, commit_message='First')")
    repo, hidden = hub.repo("user/own"), hub.repo("user/hidden")
    assert (repo.private, hidden.private) == (False, True)
    assert hidden.history()[0].title == "First"
    assert without_cards(repo.files()).keys() == local_files(checkpoint).keys()
    assert len(repo.history()) == len(hidden.history()) == 2
    hub.edit("user/own", {"README.md": "# By hand\n"})
    client.run("pipe.push_to_hub('user/own')")
    assert repo.files()["README.md"] == b"# By hand\n"


@pytest.mark.slow
def test_push_to_hub_writes_the_card_of_diffusers_and_keeps_an_existing_one(
    client, hub, checkpoint
):
    load = "from ddpm_hf import GaussianDDPMPipeline as P; pipe = P.from_pretrained(folder)"
    client.run(load, folder=checkpoint)
    for name, call in {
        "push_to_hub": "pipe.push_to_hub('user/card')",
        "save_pretrained": "pipe.save_pretrained('saved', push_to_hub=True, repo_id='user/card')",
    }.items():
        hub.reset()
        client.run(call)
        card = hub.repo("user/card").files()["README.md"].decode()
        assert "library_name: diffusers" in card, name
        assert "ddpm-hf" not in card, name
        push_from(client, checkpoint, "user/card")
        card = hub.repo("user/card").files()["README.md"]
        client.run(call)
        assert hub.repo("user/card").files()["README.md"] == card, name


@pytest.mark.slow
def test_push_to_hub_does_not_overwrite_a_concurrent_edit(client, hub, checkpoint):
    push_from(client, checkpoint, "user/own")
    hub.fault("/commit/main", run=lambda: hub.edit("user/own", {"README.md": "# By hand\n"}))
    client.run(
        "from ddpm_hf import GaussianDDPMPipeline as P\n"
        "pipe = P.from_pretrained(folder); pipe.unet.conv_in.bias.data += 1",
        folder=checkpoint,
    )
    with pytest.raises(ClientError, match="412"):
        client.run("pipe.push_to_hub('user/own')")
    client.run("pipe.push_to_hub('user/own')")
    files = hub.repo("user/own").files()
    assert files["README.md"] == b"# By hand\n"
    assert files[WEIGHTS] != (checkpoint / WEIGHTS).read_bytes()


@pytest.mark.slow
def test_save_pretrained_with_push_uploads_only_the_model(client, hub, checkpoint):
    expected = local_files(checkpoint).keys()
    add_other_files(checkpoint)
    client.run(
        "from ddpm_hf import GaussianDDPMPipeline as P; pipe = P.from_pretrained(folder)\n"
        "pipe.save_pretrained(folder, push_to_hub=True, repo_id='user/saved')",
        folder=checkpoint,
    )
    assert without_cards(hub.repo("user/saved").files()).keys() == expected


# In the background during training

PUSHER = """
pusher = BackgroundPusher("user/digits", waits_s=WAITS)
pusher.check()
"""


def wait_for(hub, pattern, times):
    for _ in range(2000):
        if hub.count(pattern) >= times:
            return
        time.sleep(0.01)
    raise TimeoutError(f"no {times} requests like {pattern}: {hub.requests}")


@pytest.mark.slow
def test_background_pushes_are_serial_and_only_the_newest_waits(client, hub, checkpoint):
    client.run(PUSHER)
    gate = threading.Event()
    hub.fault("/commit/main", run=gate.wait)
    for step in (10, 20, 30, 40):
        write_facts(checkpoint, steps=step)
        client.run("pusher.submit(folder, step)", folder=checkpoint, step=step)
        wait_for(hub, "/commit/main", 1)
    assert hub.repo("user/digits").history()[0].title == "initial commit"
    gate.set()  # all calls of submit returned during the first commit
    assert client.run("result = pusher.finish(20)") is True
    titles = [commit.title for commit in hub.repo("user/digits").history()]
    assert titles == ["Step 40", "Step 10", "initial commit"]
    assert json.loads(hub.repo("user/digits").files()["training.json"]) == {"steps": 40}
    assert not list(checkpoint.parent.glob(".pushing-*"))


@pytest.mark.slow
def test_progress_bars_are_hidden_only_during_a_background_push(client, hub, checkpoint):
    client.run(PUSHER)
    client.run("bars = importlib.import_module('huggingface_hub.utils.tqdm')")
    client.run("bars.HF_HUB_DISABLE_PROGRESS_BARS = None\nbars.enable_progress_bars()")
    gate = threading.Event()
    hub.fault("/commit/main", run=gate.wait)
    client.run("pusher.submit(folder, 1)", folder=checkpoint)
    wait_for(hub, "/commit/main", 1)
    assert client.run("result = bars.are_progress_bars_disabled()") is True
    gate.set()
    assert client.run("result = pusher.finish(20)") is True
    assert client.run("result = bars.are_progress_bars_disabled()") is False


@pytest.mark.slow
def test_changes_of_the_folder_after_submit_are_not_pushed(client, hub, checkpoint):
    expected = local_files(checkpoint)
    client.run(PUSHER)
    gate = threading.Event()
    hub.fault("preupload", run=gate.wait)
    client.run("pusher.submit(folder, 1)", folder=checkpoint)
    shutil.rmtree(checkpoint)
    gate.set()
    assert client.run("result = pusher.finish(20)") is True
    assert without_cards(hub.repo("user/digits").files()) == expected


@pytest.mark.slow
def test_finish_retries_a_failed_push(client, hub, checkpoint):
    client.run(PUSHER)
    hub.fault("/commit/main", status=503, times=5)
    client.run("pusher.submit(folder, 5)", folder=checkpoint)
    wait_for(hub, "/commit/main", 5)
    assert len(hub.repo("user/digits").history()) == 1
    assert client.run("result = pusher.finish(20)") is True
    assert hub.repo("user/digits").history()[0].title == "Step 5"


@pytest.mark.slow
def test_the_message_of_a_failed_push_has_the_command_to_push(client, hub, checkpoint):
    client.run(PUSHER)
    hub.fault("/commit/main", status=503, times=999)
    client.run("pusher.submit(folder, 5)", folder=checkpoint)
    assert client.run("result = pusher.finish(20)") is False
    message = client.run("result = pusher.message")
    assert message.endswith(f"ddpm-hf push {checkpoint} user/digits")
    assert "\n" not in message
    assert not list(checkpoint.parent.glob(".pushing-*"))


@pytest.mark.slow
def test_an_invalid_checkpoint_does_not_stop_training(client, hub, checkpoint):
    client.run(PUSHER)
    plant_nan(checkpoint)
    client.run("pusher.submit(folder, 5)\npusher.submit('/no/such/folder', 6)", folder=checkpoint)
    assert client.run("result = pusher.finish(20)") is False
    assert len(hub.repo("user/digits").history()) == 1


@pytest.mark.slow
def test_the_right_to_write_is_checked_before_training(client, hub):
    client.run(PUSHER)
    assert hub.repo("user/digits").private
    with pytest.raises(ClientError, match="no right to write"):
        client.run("BackgroundPusher('other/x', waits_s=()).check()")
    with pytest.raises(ClientError, match="not the name of a repository"):
        client.run("BackgroundPusher('a/b/c')")


@pytest.mark.slow
def test_a_hub_without_answer_does_not_block_the_exit(hub, checkpoint, tmp_path):
    hub.fault("PUT /objects", kind="slow", seconds=10 * LIMIT_S)
    code = SETUP + PUSHER + f"pusher.submit({str(checkpoint)!r}, 1)\nprint(pusher.finish(1))"
    env = client_environment(hub, tmp_path / "home", OWNER_TOKEN)
    done = run_process([sys.executable, "-c", code], env=env)  # fails after LIMIT_S
    assert done.stdout.strip() == "False", done.stderr


# The command line

CLI = """
import contextlib, io
from ddpm_hf.cli import main
out, err = io.StringIO(), io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
    try:
        status = main([str(a) for a in argv])
    except SystemExit as exit:
        status = exit.code
result = [status, out.getvalue(), err.getvalue()]
"""


@pytest.mark.slow
def test_the_command_has_a_dry_run_and_pushes_to_private_repositories(client, hub, checkpoint):
    status, out, _ = client.run(CLI, argv=["push", str(checkpoint), "user/cli", "--dry-run"])
    assert status == 0
    assert WEIGHTS in out
    assert hub.requests == []
    status, out, _ = client.run(CLI, argv=["push", str(checkpoint), "user/cli"])
    assert (status, hub.repo("user/cli").private) == (0, True)
    assert "Pushed to" in out
    _, out, _ = client.run(CLI, argv=["push", str(checkpoint), "user/cli"])
    assert out.startswith(f"No changes since {hub.url}/user/cli/commit/")
    client.run(CLI, argv=["push", str(checkpoint), "user/open", "--public"])
    assert not hub.repo("user/open").private


@pytest.mark.slow
def test_the_command_reports_invalid_input_in_one_line_with_exit_status_2(client, hub, checkpoint):
    for argv in (
        ["push", str(checkpoint), "a/b/c"],
        ["push", str(checkpoint / "unet"), "user/cli"],
        ["push", str(checkpoint), "other/theirs"],
    ):
        status, out, err = client.run(CLI, argv=argv)
        assert (status, out) == (2, "")
        assert err.count("\n") == 1
        assert "Traceback" not in err
    assert hub.count("PUT|/commit/") == 0


def train_on_the_hub(client, hub, folder, repo_id="user/trained", public=False):
    """`ddpm-hf train` on 12 grey images of the test Hub; returns exit status, stdout and stderr."""
    hub.add_repo("user/data", {f"train/{i}.png": grey_png(i) for i in range(12)}, kind="dataset")
    config = {k: v for k, v in tiny_unet().config.items() if not k.startswith("_")}
    (folder / "unet.json").write_text(json.dumps(config))
    options = {
        "dataset": "user/data",
        "output_dir": folder / "run",
        "unet_config": folder / "unet.json",
        "max_train_steps": 4,
        "batch_size": 4,
        "checkpointing_steps": 2,
        "num_samples": 2,
        "sample_inference_steps": 2,
        "push_to_hub": repo_id,
        "public": public,
    }
    client.run(
        "import ddpm_hf.training.program as program\n"
        "program.BackgroundPusher = functools.partial(BackgroundPusher, waits_s=WAITS)"
    )
    return client.run(CLI, argv=["train", *(f"--{k}={v}" for k, v in options.items())])


def grey_png(value):
    file = io.BytesIO()
    Image.new("L", (8, 8), 20 * value).save(file, "png")
    return file.getvalue()


@pytest.mark.slow
def test_training_on_a_hub_dataset_pushes_the_model(client, hub, tmp_path):
    status, out, err = train_on_the_hub(client, hub, tmp_path)
    assert status == 0, err
    repo = hub.repo("user/trained")
    assert repo.private
    assert repo.history()[0].title == "Step 4"
    assert without_cards(repo.files()) == without_cards(local_files(tmp_path / "run/model"))
    card = repo.files()["README.md"].decode()
    assert "datasets:\n- user/data" in card
    assert "12 images" in card
    assert 'load("user/trained")' in card
    assert "Pushed to" in out
    written = local_files(tmp_path) | repo.files() | {"log": client.log.read_bytes()}
    assert [name for name, data in written.items() if OWNER_TOKEN.encode() in data] == []
    assert client.run("result = load('user/trained').unet.config.sample_size") == 8


@pytest.mark.slow
def test_training_survives_a_failing_hub_and_prints_the_command_to_push(client, hub, tmp_path):
    hub.fault("/commit/main", status=503, times=999)
    status, out, _ = train_on_the_hub(client, hub, tmp_path, public=True)
    assert status == 3
    assert not hub.repo("user/trained").private
    command = f"ddpm-hf push {tmp_path}/run/model user/trained"
    assert command in out
    assert len(hub.repo("user/trained").history()) == 1
    hub.faults.clear()
    assert client.run(CLI, argv=command.split()[1:])[0] == 0
    local = local_files(tmp_path / "run/model")
    assert without_cards(hub.repo("user/trained").files()) == without_cards(local)


@pytest.mark.slow
def test_a_failed_push_is_repeated_by_the_next_run(client, hub, tmp_path):
    hub.fault("/commit/main", status=503, times=999)
    assert train_on_the_hub(client, hub, tmp_path)[0] == 3
    hub.faults.clear()
    status, out, err = train_on_the_hub(client, hub, tmp_path)
    assert status == 0, err
    assert "Pushed to" in out
    local = local_files(tmp_path / "run/model")
    assert without_cards(hub.repo("user/trained").files()) == without_cards(local)


@pytest.mark.slow
def test_push_to_hub_deletes_the_shards_of_an_earlier_upload(client, hub, checkpoint):
    load = "from ddpm_hf import GaussianDDPMPipeline as P; pipe = P.from_pretrained(folder)"
    client.run(load, folder=checkpoint)
    client.run("pipe.save_pretrained('shards', max_shard_size='20KB')")
    client.run("P.from_pretrained('shards').save_pretrained('shards', max_shard_size='20KB')")
    shards = "from pathlib import Path; result = [p.name for p in Path('shards/unet').iterdir()]"
    assert len(client.run(shards)) > 3
    client.run(
        "from huggingface_hub import HfApi; HfApi().create_repo('user/own', exist_ok=True)\n"
        "HfApi().upload_folder(repo_id='user/own', folder_path='shards')"
    )
    assert f"{WEIGHTS}.index.json" in hub.repo("user/own").files()
    client.run("pipe.push_to_hub('user/own')")
    files = hub.repo("user/own").files()
    assert [name for name in files if "safetensors" in name] == [WEIGHTS]


@pytest.mark.slow
def test_training_does_not_start_without_the_right_to_push(client, hub, tmp_path):
    status, _, err = train_on_the_hub(client, hub, tmp_path, "other/trained")
    assert status == 2
    assert "no right to write to other/trained" in err
    assert not (tmp_path / "run/model").exists()
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_missing_token_is_invalid_input(client, hub, checkpoint):
    client.run("import os; token = os.environ.pop('HF_TOKEN')")
    status, _, err = client.run(CLI, argv=["push", str(checkpoint), "user/cli"])
    client.run("os.environ['HF_TOKEN'] = token")
    assert status == 2
    assert "needs a token" in err
    assert err.count("\n") == 1
    assert hub.requests == []


@pytest.mark.slow
def test_no_file_contains_the_token(client, hub, checkpoint):
    push_from(client, checkpoint)
    client.run(PUSHER + "pusher.submit(folder, 1)\npusher.finish(20)", folder=checkpoint)
    client.run(CLI, argv=["push", str(checkpoint), "user/cli"])
    files = local_files(checkpoint) | {"log": client.log.read_bytes()}
    for repo in hub.repos.values():
        files |= {f"{repo.id}/{k}": v for k, v in repo.files().items()}
    assert len(files) > 20
    assert [name for name, data in files.items() if OWNER_TOKEN.encode() in data] == []
