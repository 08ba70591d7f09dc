"""The model card says what was recorded, nothing else, and nothing that should stay at home."""

import html
import json
import re
import sys
from pathlib import Path

import pytest
import yaml
from checkpoints import image_facts_of, save_ours, tiny_pipeline, tiny_unet
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
)
from golden import make_card
from huggingface_hub import ModelCard
from processes import run_process

from ddpm_hf.hub.card import (
    card_facts,
    card_to_share,
    check_metadata,
    render_model_card,
    write_model_card,
    write_results,
)
from ddpm_hf.hub.card_merge import merged, renewed, with_metadata
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
    "computation": {"mixed_precision": "no", "num_threads": 1},
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
        r"| computed with | mixed\_precision no, num\_threads 1 |",
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
    assert "ask the owner before you reuse" in text
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
    facts["versions"] = facts["computation"] = {text: text}
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


def fresh_card(**facts):
    return render_model_card(FULL | facts, "user/x")


def test_a_card_that_nobody_touched_becomes_the_new_one():
    old, new = fresh_card(steps=247, metrics=[]), fresh_card(steps=450, metrics=[])
    assert renewed(None, new) == renewed(new, new) == renewed(old, new) == new
    assert renewed(old.replace("\n", "\r\n"), new) == new


def test_a_licence_and_words_that_a_person_added_stay_while_the_training_goes_on():
    card = fresh_card(steps=247, license=None)
    card = card.replace("---\n", "---\nlicense: mit  # ours\nlanguage: de\n", 1)
    card = card.replace("<!-- ddpm-hf training", "Trained at night.\n\n<!-- ddpm-hf training", 1)
    card += "\n## Thanks\n\nTo the butterflies.\n"
    once = renewed(card, fresh_card(steps=450, license=None))
    twice = renewed(once, fresh_card(steps=900, license=None))
    for text, steps in ((once, 450), (twice, 900)):
        assert f"| optimizer updates | {steps} |" in text
        assert "247" not in text
        assert "license: mit  # ours\nlanguage: de\n" in text
        assert "Trained at night.\n" in text
        assert text.count("To the butterflies.") == 1
        assert metadata(text)["license"] == "mit"
        assert metadata(text)["datasets"] == ["user/butterflies"]


def test_a_generated_part_that_a_person_changed_is_theirs_and_an_emptied_one_comes_back():
    card = fresh_card(steps=247)
    changed = card.replace("| optimizer updates | 247 |", "| optimizer updates | about 250 |")
    text = renewed(changed, fresh_card(steps=450, model_name="moths"))
    assert "about 250" in text
    assert "# moths" in text
    emptied = re.sub(r"(<!-- ddpm-hf training \w+ -->\n).*?(<!-- /)", r"\1\2", card, flags=re.S)
    assert renewed(emptied, fresh_card(steps=450)) == fresh_card(steps=450)


def test_what_a_person_removed_stays_away():
    card = fresh_card(metrics=[])
    without = re.sub(r"<!-- ddpm-hf limits.*?<!-- /ddpm-hf -->\n", "", card, flags=re.S)
    without = without.replace("base_model: google/ddpm-cifar10-32\n", "")
    text = renewed(without, fresh_card(steps=450))
    assert "## Limits" not in text
    assert "base_model" not in metadata(text)
    assert "model-index" in metadata(text)  # new since then


def test_a_key_that_is_no_longer_true_goes_unless_a_person_changed_it():
    card = fresh_card()
    plain = fresh_card(metrics=[], base_model=None)
    assert "model-index" not in metadata(renewed(card, plain))
    changed = card.replace("name: butterflies-64", "name: my butterflies")
    assert metadata(renewed(changed, plain))["model-index"][0]["name"] == "my butterflies"


def test_a_card_that_is_all_a_persons_is_left_to_the_byte():
    for card in ("# Mine\r\n", "---\na: [\n---\n# Broken\n", "", "---\nlicense: mit\n---\n"):
        assert renewed(card, fresh_card()) == card


def test_broken_metadata_of_a_person_is_not_lost():
    card = fresh_card(steps=247).replace("license: apache-2.0", "license: [")
    text = renewed(card, fresh_card(steps=450))
    assert "license: [\n" in text
    assert "| optimizer updates | 450 |" in text


def test_words_on_the_hub_win_over_others_unless_they_came_from_here():
    old, new = fresh_card(steps=1), fresh_card(steps=2)
    here, there = "# By hand, here\n", "# By hand, there\n"
    assert merged(None, None, new).text == merged(None, old, new).text == new
    assert merged(old, there, new).text == merged(here, there, new).text == there
    assert merged(here, there, new).is_theirs
    first = merged(here, None, new).text
    assert first.startswith(here)
    better = merged("# Better, here\n", first, new)
    assert better.text.startswith("# Better, here\n")
    assert not better.is_theirs
    assert merged(None, better.text, new).text == better.text
    edited = better.text.replace("Better", "Best")
    assert merged("# Other words\n", edited, new).text == edited


def test_words_on_the_hub_stay_and_the_facts_around_them_are_renewed():
    remote = fresh_card(steps=247).replace("## Citation", "By Jane.\n\n## Citation")
    card = merged(fresh_card(steps=450), remote, fresh_card(steps=450))
    assert "By Jane." in card.text
    assert "| optimizer updates | 450 |" in card.text


def test_a_licence_that_is_given_is_set_and_stays():
    for card in (fresh_card(license=None), fresh_card(license="mit"), "# Mine\n"):
        text = with_metadata(card, "license", "apache-2.0")
        assert metadata(text)["license"] == "apache-2.0"
        assert metadata(renewed(text, fresh_card(license="mit")))["license"] == "apache-2.0"


def test_writing_the_card_again_follows_the_facts_but_leaves_a_persons_card_alone(tmp_path):
    folder = save_ours(tmp_path / "model")
    write_model_card(folder, "user/x")
    (folder / "training.json").write_text(json.dumps({"steps": 777}))
    card = write_model_card(folder, "user/x").read_text()
    assert "| optimizer updates | 777 |" in card
    assert card == card_to_share(folder, "user/x").text
    (folder / "README.md").write_text("# Mine\n")
    write_model_card(folder, "user/x")
    assert (folder / "README.md").read_text() == "# Mine\n"
    assert card_to_share(folder, "user/x").text.startswith("# Mine\n")


# ----------------------------------------------------------------------------------------------
# What the facts are


def test_settings_that_were_not_set_are_left_out():
    text = render_model_card({"config": {"resolution": None, "seed": 0}})
    assert "| `seed` | 0 |" in text
    assert "resolution" not in text


def test_what_was_left_out_of_the_images_is_counted_by_kind():
    dataset = {"name": "photos", "num_images": 3, "left_out": {".heic": 40, ".mp4": 1}}
    text = render_model_card({"dataset": dataset})
    assert "Data: photos (3 images; 41 left out: .heic 40, .mp4 1)." in text


def test_a_fine_tuned_model_tells_what_its_base_was_trained_on_and_for_how_long():
    base = {"dataset": FULL["dataset"], "steps": 247, "base_model": "user/first"}
    text = render_model_card({"base_model": "user/second", "base": base})
    assert "Base: user/second, itself fine-tuned from user/first." in text
    assert "Smithsonian butterflies" in text
    assert "Its training: 247 optimizer updates." in text
    unknown = render_model_card({"base_model": "user/second"})
    assert "Its data: not recorded. Its training: not recorded." in unknown


def test_parameters_of_variants_and_shards_are_counted_once(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size="40KB")
    pipeline.save_pretrained(tmp_path, variant="fp16")
    number = sum(p.numel() for p in pipeline.unet.parameters())
    assert card_facts(tmp_path)["unet"]["num_parameters"] == number


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(DDPMScheduler, 400), (DDIMScheduler, 50), (EulerDiscreteScheduler, 50),
     (DPMSolverMultistepScheduler, 25)],
)  # fmt: skip
def test_the_code_in_the_card_asks_for_as_many_steps_as_the_scheduler_can_make(
    tmp_path, kind, steps
):
    folder = save_ours(tmp_path, scheduler=kind(400, beta_schedule="squaredcos_cap_v2"))
    assert f"num_inference_steps={steps})" in render_model_card(card_facts(folder))


def test_results_of_an_evaluation_come_into_the_card_and_its_index(tmp_path):
    folder = save_ours(tmp_path / "model")
    (folder / "training.json").write_text(json.dumps({"dataset": {"name": "digits"}}))
    card = write_model_card(folder)
    card.write_text("---\nlicense: mit\n" + card.read_text()[4:] + "\nBy Jane.\n")
    write_results(folder, [{"name": "FID", "value": 13.0, "type": "fid", "how": "outdated"}])
    other = {"name": "moths", "hub_id": "user/moths", "split": "test"}
    write_results(
        folder,
        [
            {"name": "FID", "value": 12.5, "type": "fid", "how": "10,000 images"},
            {"name": "FID", "value": 40, "type": "fid", "dataset": other},
        ],
    )
    loaded = ModelCard.load(card)
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in loaded.data.eval_results}
    assert results == {("digits", "fid"): 12.5, ("moths", "fid"): 40}
    assert loaded.data.license == "mit"
    assert "| FID | 12.5 | 10,000 images |" in loaded.text
    assert "| FID | 40 | on moths |" in loaded.text
    assert "By Jane." in loaded.text
    assert "outdated" not in loaded.text
    for bad in ({"name": "FID"}, {"name": "FID", "value": float("nan")}, {"value": 1.0}):
        with pytest.raises(ValueError, match="a name and a finite value"):
            write_results(folder, [bad])


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
    assert make_card.render() == make_card.CARD.read_text()
    assert "(docs/samples.png)" in make_card.CARD.read_text()
    assert (PROJECT / "docs/samples.png").is_file()
