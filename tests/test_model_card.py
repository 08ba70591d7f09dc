"""The model card says what was recorded, nothing else, and nothing that should stay at home."""

import html
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import image_facts_of, save_ours, tiny_unet
from huggingface_hub import ModelCard
from processes import run_process

from ddpm_hf.hub.card import (
    card_facts,
    card_to_share,
    check_metadata,
    mark,
    may_replace,
    origin_of,
    render_model_card,
    write_model_card,
)
from ddpm_hf.hub.retry import shorten
from ddpm_hf.hub.secrets import find_leak

PROJECT = Path(__file__).parents[1]
FULL = {
    "model_name": "butterflies-64",
    "license": "apache-2.0",
    "base_model": "google/ddpm-cifar10-32",
    "dataset": {
        "name": "Smithsonian butterflies",
        "hub_id": "user/butterflies",
        "split": "train",
        "num_images": 1000,
        "num_skipped": 3,
        "image": {"mode": "RGB", "height": 64, "width": 60, "bit_depth": 8},
    },
    "config": {"learning_rate": 1e-4, "batch_size": 16},
    "steps": 12_345,
    "duration_s": 231.4,
    "hardware": "2 CPU cores",
    "versions": {"ddpm_hf": "0.1.0", "torch": "2.13.0"},
    "metrics": [
        {"name": "FID", "value": 12.25, "how": "10,000 samples against train", "type": "fid"},
        {"name": "Broken", "value": float("nan"), "how": "never"},
    ],
    "unet": {"sample_size": 64, "num_parameters": 45_678},
    "scheduler": {"num_train_timesteps": 400, "beta_schedule": "linear"},
    "image": {"mode": "RGB", "height": 64, "width": 60, "bit_depth": 8},
    "samples": True,
}


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_metadata_is_what_the_hub_reads():
    data = metadata(render_model_card(FULL, "user/butterflies-64"))
    assert data["library_name"] == "diffusers"
    assert data["pipeline_tag"] == "unconditional-image-generation"
    assert data["license"] == "apache-2.0"
    assert data["datasets"] == ["user/butterflies"]
    assert data["base_model"] == "google/ddpm-cifar10-32"
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == "butterflies-64"
    assert result["dataset"] == {
        "name": "Smithsonian butterflies",
        "type": "user/butterflies",
        "split": "train",
    }
    assert result["metrics"] == [{"type": "fid", "value": 12.25, "name": "FID"}]


def test_the_text_holds_every_fact():
    text = render_model_card(FULL, "user/butterflies-64")
    for fact in (
        "![Samples of this model](samples.png)",
        "Fine-tuned from google/ddpm-cifar10-32",
        "45,678 parameters",
        "1,000 images",
        "3 unreadable images left out",
        "64x60, RGB, 8 bit",
        "| optimizer updates | 12,345 |",
        "| training time | 231 s |",
        "| `learning_rate` | 0.0001 |",
        "| FID | 12.25 | 10,000 samples against train |",
        "| Broken | no finite value | never |",
        "padded to 64x64",
        "num_inference_steps=400",
        'load("user/butterflies-64")',
    ):
        assert fact in text, fact


def test_what_was_not_recorded_is_said_and_not_made_up():
    text = render_model_card({})
    data = metadata(text)
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert "Data: not recorded." in text
    assert "No measure of quality was recorded." in text
    assert "Licence: not recorded" in text
    assert text.count("not recorded |") == 6
    assert "samples.png" not in text


def test_a_local_folder_is_no_name_for_the_hub():
    facts = {"dataset": {"name": "photos", "hub_id": "photos"}, "base_model": "model"}
    data = metadata(render_model_card(facts))
    assert not {"datasets", "base_model"} & set(data)


HOSTILE = {
    "newline": "x\nlicense: gpl\ngated: auto",
    "fence": "a\n---\nlicense: gpl\n---\n# Title",
    "colon": "key: value",
    "comment": "name # not a comment",
    "quotes": 'it\'s "quoted" and `ticked`',
    "jinja": "{{ 7 * 7 }}{% for x in y %}",
    "script": "<script>alert(1)</script><img src=x onerror=y>",
    "image": "![x](http://evil/x.png) [link](javascript:x)",
    "table": "a | b | c\n|---|---|\n```\ncode",
    "emoji": "mod\u00e8le \U0001f98b \u6a21\u578b \u202e",
    "yaml": "!!python/object/apply:os.system ['id']",
    "long": "word: " * 1700,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_text_stays_text(kind):
    text = HOSTILE[kind]
    harmless = render_model_card(FULL, "user/x")
    facts = json.loads(json.dumps(FULL)) | {"model_name": text, "hardware": text}
    facts["dataset"] |= {"name": text, "split": text}
    facts["config"] = {text: text}
    facts["versions"] = {text: text}
    facts["metrics"] = [{"name": text, "value": 1.0, "how": text}]
    card = render_model_card(facts, "user/x")
    data = ModelCard(card).data.to_dict()
    assert set(data) == set(metadata(harmless))
    (entry,) = data["model-index"]
    (result,) = entry["results"]
    assert entry["name"] == result["dataset"]["name"] == result["metrics"][0]["name"] == text
    assert data["license"] == "apache-2.0"
    body = ModelCard(card).text
    assert visible(text) in visible(body)
    assert body.count("\n#") == harmless.count("\n#")
    assert body.count("```") == harmless.count("```")
    assert "<script" not in body
    assert "<img" not in body
    assert not re.search(r"(?<!\\)!\[x|(?<!\\)\[link", body)


def visible(text):
    """What a reader of the rendered Markdown sees, on one line."""
    return " ".join(html.unescape(re.sub(r"\\(?=[\\`*_\[\]{}#|~!$])", "", text)).split())


def test_the_facts_of_a_checkpoint_come_from_its_files(tmp_path):
    unet = tiny_unet(sample_size=8)
    folder = save_ours(tmp_path / "model", unet=unet, facts=image_facts_of("L", 7, 6))
    (folder / "training.json").write_text(json.dumps({"steps": 5}))
    facts = card_facts(folder)
    assert facts["steps"] == 5
    assert facts["unet"]["num_parameters"] == sum(p.numel() for p in unet.parameters())
    assert facts["scheduler"]["num_train_timesteps"] == 20
    assert facts["image"] == {"mode": "L", "height": 7, "width": 6, "bit_depth": 8}
    assert facts["samples"] is False
    json.dumps(facts, allow_nan=False)


def test_the_card_of_a_conditional_model_shows_no_way_that_fails(tmp_path):
    folder = save_ours(tmp_path / "model", unet=tiny_unet(num_class_embeds=3))
    text = render_model_card(card_facts(folder))
    assert "cannot sample from it" in text
    assert text.count("```python") == 2
    assert text.count("class_labels=[0, 1, 2, 0]") == 2


@pytest.mark.slow
def test_the_code_in_the_cards_runs_in_their_folders(tmp_path):
    plain = save_ours(tmp_path / "plain")
    conditional = save_ours(tmp_path / "conditional", unet=tiny_unet(num_class_embeds=3))
    code = "import os\n"
    for folder in (plain, conditional):
        card = write_model_card(folder).read_text()
        code += f"os.chdir({str(folder)!r})\n"
        for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
            code += f"{block}\nprint(type(pipe).__name__, len(images))\n"
    env = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = run_process([sys.executable, "-c", code], env=env)
    assert done.returncode == 0, done.stderr
    ours = "GaussianDDPMPipeline 4"
    assert done.stdout.splitlines() == ["DDPMPipeline 4", ours, ours, ours, ours]


# ----------------------------------------------------------------------------------------------
# Whose card it is


def test_an_edit_is_noticed_and_a_change_of_line_ends_is_none():
    card = mark(render_model_card(FULL), "generated")
    assert origin_of(None) is None
    assert origin_of(card) == "generated"
    assert origin_of(card.replace("\n", "\r\n")) == "generated"
    assert origin_of(mark("# Mine", "edited")) == "edited"
    for edited in ("# Mine", card.replace("butterflies", "moths"), card + "More.\n", ""):
        assert origin_of(edited) == "person"


def test_only_a_card_that_nobody_touched_is_replaced():
    generated, ours = mark("# A", "generated"), mark("# B", "edited")
    assert may_replace(None, generated)
    assert may_replace(mark("# old", "generated"), generated)
    assert may_replace(mark("# old", "generated"), ours)
    assert may_replace(mark("# old", "edited"), ours)
    assert not may_replace(mark("# old", "edited"), generated)
    assert not may_replace("# by hand", ours)
    assert not may_replace("# by hand", generated)


def test_writing_the_card_again_follows_the_facts_but_leaves_a_persons_card_alone(tmp_path):
    folder = save_ours(tmp_path / "model")
    write_model_card(folder, "user/x")
    (folder / "training.json").write_text(json.dumps({"steps": 777}))
    card = write_model_card(folder, "user/x").read_text()
    assert "| optimizer updates | 777 |" in card
    assert card == card_to_share(folder, "user/x")
    (folder / "README.md").write_text("# Mine\n")
    write_model_card(folder, "user/x")
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert card_to_share(folder, "user/x") == mark("# Mine\n", "edited")


# ----------------------------------------------------------------------------------------------
# What must not be shared

SECRETS = [
    "key hf_" + "a1B2" * 6,
    "github_pat_" + "a" * 30,
    "see https://jane:secret@example.org/data",
    "s3://AKIA:secret@bucket/x",
]
PATHS = [
    "data in /home/jane/photos",
    '"/Users/jane/x.png"',
    "(/tmp/run)",
    "C:\\Users\\jane\\x",
    r'"C:\\Users\\jane"',
    "file:///etc/x",
    "=/scratch/jane/x",
]
HARMLESS = [
    "https://huggingface.co/home/user",
    "user/tmp/x",
    "hf_hub_download(repo)",
    "10:30 and a/b @c",
    "./tmp/x",
    "~/home/x",
    "a ratio of 1/2",
]


@pytest.mark.parametrize("text", SECRETS + PATHS)
def test_a_secret_or_local_path_is_found(text):
    assert find_leak(f"before\n{text}\nafter")


@pytest.mark.parametrize("text", HARMLESS)
def test_a_harmless_text_is_left_alone(text):
    assert find_leak(text) is None


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_not_repeated_in_the_message(text):
    assert find_leak(text) == "what looks like a token or password"
    secret = re.search(r"hf_\w+|github_pat_\w+|secret", text)[0]
    assert secret not in shorten(f"the server said: {text}")


def test_the_token_in_use_is_found_whatever_it_looks_like(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-shape")
    assert find_leak("x = a-token-of-another-shape") == "what looks like a token or password"


def test_a_template_and_a_card_with_broken_metadata_are_told_apart():
    check_metadata(render_model_card(FULL))
    check_metadata("# No metadata at all\n")
    for broken in ("---\na: [\n---\n", "---\n- a\n- list\n---\n"):
        with pytest.raises(ValueError, match="metadata that the Hub would refuse"):
            check_metadata(broken)


def test_the_projects_model_card_is_rendered_from_what_was_measured():
    """Refresh it with `python tests/golden/make_card.py FOLDER`."""
    facts = json.loads((PROJECT / "tests/golden/demo_card.json").read_text())
    card, picture = (PROJECT / "model_card.md").read_text(), "docs/samples.png"
    seen_from_there = card.replace(picture, "samples.png").replace('"runs/demo/model"', '"."')
    assert seen_from_there == render_model_card(facts)
    assert f"({picture})" in card
    assert (PROJECT / picture).is_file()
