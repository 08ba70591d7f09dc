"""Model cards: rendering of recorded facts, updates of existing cards, detection of secrets."""

import html
import json
import re
import shlex
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
from processes import run_forked

from ddpm_hf.evaluation.calibration_results import StepsRow
from ddpm_hf.hub.card import (
    SharedCard,
    card_to_share,
    write_calibration,
    write_model_card,
    write_results,
)
from ddpm_hf.hub.card_facts import CardFacts, card_facts, recorded_facts
from ddpm_hf.hub.card_rendering import render_model_card
from ddpm_hf.hub.card_update import metadata_of, updated_card, with_license
from ddpm_hf.hub.retry import shorten
from ddpm_hf.hub.secrets import find_leak
from ddpm_hf.run_record import MetricRecord
from ddpm_hf.utils.text import public_name

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


def rendered(facts, repo_id=None):
    return render_model_card(CardFacts.from_dict(facts), repo_id)


def metadata(text):
    return yaml.safe_load(text.split("---\n")[1])


def test_the_metadata_has_the_keys_of_the_hub():
    data = metadata(rendered(FULL, "user/butterflies-64"))
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


def test_the_card_contains_all_facts():
    text = rendered(FULL, "user/butterflies-64")
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


@pytest.mark.parametrize(
    ("numbers", "text", "example"),
    [(range(5, 26), "5 to 25 steps", 10), (range(5, 9), "5 to 8 steps", 8), ([5], "5 steps", 5)],
)
def test_the_card_states_the_numbers_of_steps_with_calibrated_timesteps(numbers, text, example):
    timesteps = {f"{K}": list(range(K))[::-1] for K in numbers}
    card = rendered({"scheduler": {"calibrated_timesteps": {"DDIM": timesteps}}})
    assert f"Calibrated timesteps of DDIM in {text};" in card
    assert f'calibrated_timesteps["DDIM"][{example}]' in card


def test_missing_facts_are_not_recorded():
    text = rendered({})
    data = metadata(text)
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert "Data: not recorded." in text
    assert "No metrics were recorded." in text
    assert "ask the owner before you use" in text
    assert text.count("not recorded |") == 6
    assert "samples.png" not in text


def test_names_of_local_folders_are_not_hub_ids():
    facts = {"dataset": {"name": "photos", "hub_id": "photos"}, "base_model": "model"}
    data = metadata(rendered(facts))
    assert not {"datasets", "base_model"} & set(data)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("user/photos", "user/photos"),
        ("/home/me/photos", "photos"),
        ("private/*.parquet", "*.parquet"),
        ("private/a-[0-9].tar", "a-[0-9].tar"),
        ("https://host/private/a-{0..9}.tar", "a-{0..9}.tar"),
    ],
)
def test_names_of_datasets_contain_no_local_folder(source, name):
    assert public_name(source) == name


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_is_escaped(kind):
    text = HOSTILE[kind]
    harmless = rendered(FULL | {"base": {"base_model": "x"}}, "user/x")
    facts = json.loads(json.dumps(FULL)) | {"model_name": text, "hardware": text}
    facts["dataset"] |= {"name": text, "split": text}
    facts["base"] = {"base_model": text, "dataset": {"name": text}}
    facts["config"] = {text: text}
    facts["versions"] = facts["computation"] = {text: text}
    facts["metrics"] = [{"name": text, "value": 1.0, "how": text}]
    card = rendered(facts, "user/x")
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
    """Text of the rendered Markdown, on one line."""
    return " ".join(html.unescape(re.sub(r"\\(?=[\\`*_\[\]{}#|~!$])", "", text)).split())


def test_facts_are_read_from_the_files_of_the_checkpoint(tmp_path):
    unet = tiny_unet(sample_size=8)
    folder = save_ours(tmp_path / "model", unet=unet, facts=image_facts_of("L", 7, 6))
    (folder / "training.json").write_text(json.dumps({"steps": 5}))
    facts = recorded_facts(folder)
    assert facts["steps"] == 5
    assert facts["unet"]["num_parameters"] == sum(p.numel() for p in unet.parameters())
    assert facts["scheduler"]["num_train_timesteps"] == 20
    assert facts["image"] == {"mode": "L", "height": 7, "width": 6, "bit_depth": 8}
    assert facts["samples"] is False
    json.dumps(facts, allow_nan=False)


def test_the_card_of_a_conditional_model_has_no_code_for_stock_diffusers(tmp_path):
    folder = save_ours(tmp_path / "model", unet=tiny_unet(num_class_embeds=3))
    text = render_model_card(card_facts(folder))
    assert "cannot sample from it" in text
    assert text.count("```python") == 2
    assert text.count("class_labels=[0, 1, 2, 0]") == 2
    assert "3 class embeddings; the names of the classes were not recorded." in text


def test_a_conditional_model_is_titled_tagged_and_described_as_one(tmp_path):
    facts = image_facts_of("L", 8, 8, class_names=("cat", "fox|x", "dog"))
    facts["class_counts"] = [0, 30, 270]
    unet = tiny_unet(sample_size=8, num_class_embeds=4)
    text = render_model_card(card_facts(save_ours(tmp_path / "model", unet=unet, facts=facts)))
    assert "# Class-conditional DDPM\n\nA class-conditional denoising" in text
    assert "nconditional DDPM" not in text
    assert "class-conditional-image-generation" in metadata(text)["tags"]
    assert "unconditional-image-generation" not in metadata(text)["tags"]
    assert metadata(text)["pipeline_tag"] == "unconditional-image-generation"
    rows = [r"| 0 | cat | 0 (not trained) |", r"| 1 | fox\|x | 30 |", r"| 2 | dog | 270 |"]
    assert "The model has 3 classes:\n\n" in text
    assert "\n".join(rows) in text
    assert text.count('class_labels="fox|x", guidance_scale=2.0') == 2
    assert "# Unconditional DDPM\n\nA denoising" in rendered({})


def test_code_for_a_model_without_a_trained_null_class_has_no_guidance():
    facts = {"unet": {"num_class_embeds": 3}, "class_names": ["cat", "dog"]}
    assert "guidance_scale" in rendered(facts)
    assert 'class_labels="cat").images' in rendered(facts | {"has_null_class": False})
    assert "| 0 | cat | not recorded |" in rendered(facts | {"class_counts": [3]})


def test_many_classes_are_folded():
    names = [f"class {i}" for i in range(40)]
    facts = {"unet": {"num_class_embeds": 41}, "class_names": names, "class_counts": [5] * 40}
    folded = re.search(r"40 classes:\n\n<details>(.*?)</details>", rendered(facts), re.DOTALL)[1]
    assert "\n\n| number | class |" in folded
    assert "| 39 | class 39 | 5 |\n" in folded


def test_the_card_installs_the_package_from_a_clone():
    text = rendered({})
    assert "`pip install .`" in text
    assert "pip install ddpm-hf" not in text


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
    done = run_forked(["-c", code])
    assert done.returncode == 0, done.stderr
    ours = "GaussianDDPMPipeline 4"
    assert done.stdout.splitlines() == ["DDPMPipeline 4", ours, ours, ours, ours]


# Updates of an existing card


def card_with(**facts):
    return rendered(FULL | facts, "user/x")


def as_older_version(card):
    """The card with the marks of older versions: hashes, a comment, and a hidden last line."""
    comment = (
        "<!-- Text between these markers is generated and renewed; text outside them stays. -->"
    )
    old_comment = (
        "<!-- What stands between marks such as the next is renewed with the model; what you write "
        "elsewhere, or change, stays. -->"
    )
    assert f"<!-- ddpm-hf intro -->\n{comment}\n" in card
    card = card.replace(f"\n{comment}", "").replace(
        "<!-- ddpm-hf intro", f"{old_comment}\n<!-- ddpm-hf intro"
    )
    card = re.sub(r"<!-- ddpm-hf (\w+) -->", r"<!-- ddpm-hf \1 0123456789ab -->", card)
    return f'{card}\n<!-- ddpm-hf-card 0123456789ab {{"license": "0123456789ab"}} -->\n'


@pytest.mark.slow
@pytest.mark.parametrize("version", [str, as_older_version])
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_an_unedited_card_becomes_the_generated_one(version, line_end):
    new = card_with(steps=450)
    for old in (new, card_with(steps=247, metrics=[], base_model=None, license="mit")):
        card = version(old).replace("\n", line_end)
        assert updated_card(card, new) == new.replace("\n", line_end)
    assert updated_card(None, new) == new


@pytest.mark.slow
@pytest.mark.parametrize("version", [str, as_older_version])
def test_text_outside_the_markers_stays(version):
    card = version(card_with(steps=247))
    card = card.replace("<!-- ddpm-hf training", "Trained at night.\n\n<!-- ddpm-hf training", 1)
    card += "\n## Thanks\n\nTo the butterflies.\n"
    for steps in (450, 900):
        card = updated_card(card, card_with(steps=steps))
        assert f"| optimizer updates | {steps} |" in card
        assert card.count("optimizer updates") == 1
        assert "Trained at night.\n\n<!-- ddpm-hf training -->\n" in card
        assert card.endswith("<!-- /ddpm-hf -->\n\n## Thanks\n\nTo the butterflies.\n")
        assert "0123456789ab" not in card


def test_text_between_the_markers_is_replaced():
    card = card_with(steps=247)
    edited = card.replace("| optimizer updates | 247 |", "| optimizer updates | about 250 |")
    assert updated_card(edited, card_with(steps=450)) == card_with(steps=450)


def test_a_deleted_section_stays_deleted():
    card = re.sub(r"<!-- ddpm-hf limits.*?<!-- /ddpm-hf -->\n", "", card_with(), flags=re.DOTALL)
    assert "## Limitations" not in updated_card(card, card_with(steps=450))


def test_text_after_a_deleted_end_marker_stays():
    head, tail = card_with(steps=247).split("<!-- ddpm-hf training -->")
    tail = tail.replace("<!-- /ddpm-hf -->", "By Jane.", 1)
    card = updated_card(f"{head}<!-- ddpm-hf training -->{tail}", card_with(steps=450))
    assert "By Jane." in card
    assert "| optimizer updates | 247 |" in card
    assert card.count("## Citation") == 1


def test_generated_metadata_is_renewed_or_removed():
    card = card_with().replace("pipeline_tag: unconditional", "pipeline_tag: text")
    data = metadata(updated_card(card, card_with(metrics=[], base_model=None, dataset={})))
    assert set(data) == {"library_name", "license", "pipeline_tag", "tags"}
    assert data["pipeline_tag"] == "unconditional-image-generation"
    plain = card_with(metrics=[], base_model=None, dataset={})
    assert metadata(updated_card(plain, card_with())) == metadata(card_with())


def test_other_metadata_stays_and_tags_are_united():
    front = (
        "---\ntags:\n- butterflies\nlanguage: de\nwidget:\n- src: x.png\ndate: 2026-01-02\n---\n"
    )
    card = front + card_with().split("---\n", 2)[2]
    data = metadata(updated_card(card, card_with()))
    assert data["tags"] == ["butterflies", *metadata(card_with())["tags"]]
    expected = metadata(front) | metadata(card_with())
    assert data == expected | {"tags": data["tags"]}


def test_a_licence_is_replaced_only_by_another_one():
    edited = card_with(license=None).replace("---\n", "---\nlicense: mit\n", 1)
    assert metadata(updated_card(edited, card_with(license=None)))["license"] == "mit"
    assert metadata(updated_card(edited, card_with()))["license"] == "apache-2.0"


@pytest.mark.parametrize("broken", ["license: [", "model-index: 5"])
def test_invalid_metadata_stays_with_a_warning(broken):
    front = f"---\n{broken}\n---\n"
    card = front + card_with(steps=247).split("---\n", 2)[2]
    with pytest.warns(UserWarning, match="metadata was left unchanged"):
        text = updated_card(card, card_with(steps=450))
    assert text.startswith(front)
    assert "| optimizer updates | 450 |" in text


def test_a_card_without_metadata_gets_it():
    card = card_with().split("---\n", 2)[2]
    assert updated_card(card, card_with()) == card_with()


@pytest.mark.parametrize(
    "card", ["# Mine\r\n", "---\na: [\n---\n# Broken\n", "", "---\nlicense: mit  # ours\n---\n"]
)
def test_a_card_without_markers_stays_unchanged(card):
    assert updated_card(card, card_with()) == card


@pytest.mark.parametrize("card", [card_with(license=None), card_with(license="mit"), "# Mine\n"])
def test_the_license_option_sets_the_licence(card):
    text = with_license(card, "apache-2.0")
    assert metadata(text)["license"] == "apache-2.0"
    assert text.endswith(card[-100:])


@pytest.mark.slow
def test_the_card_on_the_hub_is_updated_if_there_is_one(tmp_path):
    folder = save_ours(tmp_path / "model")
    generated = card_to_share(folder, "user/x")
    assert generated.text == render_model_card(card_facts(folder), "user/x")
    assert card_to_share(folder, "user/x", generated.text) == generated

    (folder / "README.md").write_text("# Local\n")
    assert card_to_share(folder, "user/x") == SharedCard("# Local\n", is_from_hub=False)
    theirs = SharedCard("# On the Hub\n", is_from_hub=True)
    assert card_to_share(folder, "user/x", theirs.text) == theirs

    edited = generated.text.replace("<!-- ddpm-hf usage", "By Jane.\n\n<!-- ddpm-hf usage")
    (folder / "training.json").write_text(json.dumps({"steps": 450}))
    card = card_to_share(folder, "user/x", edited)
    assert card.is_from_hub
    assert "By Jane." in card.text
    assert "| optimizer updates | 450 |" in card.text


def test_writing_a_card_updates_a_generated_one_only(tmp_path):
    folder = save_ours(tmp_path / "model")
    write_model_card(folder, "user/x")
    (folder / "training.json").write_text(json.dumps({"steps": 777}))
    card = write_model_card(folder, "user/x").read_text()
    assert "| optimizer updates | 777 |" in card
    assert card == card_to_share(folder, "user/x").text
    (folder / "README.md").write_bytes(b"# Mine \xff\n")
    write_model_card(folder, "user/x")
    assert (folder / "README.md").read_bytes() == b"# Mine \xff\n"


# Facts


def test_an_option_without_a_value_is_not_listed():
    text = rendered({"config": {"resolution": None, "seed": 0}})
    assert "| `seed` | 0 |" in text
    assert "resolution" not in text


def test_left_out_files_are_counted_by_reason():
    dataset = {"name": "photos", "num_images": 3, "left_out": {".heic": 40, ".mp4": 1}}
    text = rendered({"dataset": dataset})
    assert "Data: photos (3 images; 41 left out: .heic 40, .mp4 1)." in text


def test_the_training_of_the_base_model_is_described():
    base = {"dataset": FULL["dataset"], "steps": 247, "base_model": "user/first"}
    text = rendered({"base_model": "user/second", "base": base})
    assert "Base: user/second, itself fine-tuned from user/first." in text
    assert "Smithsonian butterflies" in text
    assert "Its training: 247 optimizer updates." in text
    unknown = rendered({"base_model": "user/second"})
    assert "Its data: not recorded. Its training: not recorded." in unknown


SWEEP = {
    "settings": [
        {
            "scheduler": "DDIM",
            "num_inference_steps": 10,
            "num_network_calls": 10,
            "seconds_per_image": 0.25,
            "figures": {"fd": {"value": 3.0, "interval": [2.0, 4.0], "rank": "best"}},
        }
    ],
    "remarks": ["by 10 images"],
    "for_stock": {"scheduler": "DDIM", "num_inference_steps": 10},
}
STEPS_ROW = {
    "num_inference_steps": 5,
    "bits_per_dim": 6.5,
    "standard_error": 0.04,
    "at_best_timesteps": 5.7,
    "published": 602.4,
}


def sampler(name, value, rank, num_steps=10):
    figure = {"value": value, "interval": [value - 1, value + 1], "rank": rank}
    setting = {"scheduler": name, "num_inference_steps": num_steps, "num_network_calls": num_steps}
    return setting | {"figures": {"fd": figure}}


def test_a_long_sweep_is_folded_except_for_the_best_and_the_recommended_setting():
    settings = [sampler("DDIM", 5 + i / 100, "tie", 10 + i) for i in range(34)]
    settings += [sampler("DDPM", 4.0, "best"), sampler("DDPM", 9.0, "")]
    scheduler = {"recommended": {"scheduler": "DDIM", "num_inference_steps": 12}}
    text = rendered({"calibration": {"sweep": {"settings": settings}}, "scheduler": scheduler})
    table = text.split("### Samplers")[1].split("Recommended:")[0]
    shown, folded = table.split("<details><summary>All 36 settings; 34 tie with the best</summary>")
    assert re.findall(r"\n\| (D.*) \|", shown) == [
        "DDIM | 12 | 12 |  | 5.02 +- 1 | tie", "DDPM | 10 | 10 |  | 4 +- 1 | best"
    ]  # fmt: skip
    assert folded.count("\n| D") == 36
    assert folded.count("</details>") == 1
    assert "<details><summary>All" not in rendered({"calibration": {"sweep": SWEEP}})


def replaced_at(depth, content, wrong):
    """The JSON value with `wrong` in place of all values at this depth."""
    if depth == 0 or not isinstance(content, dict | list):
        return wrong if depth == 0 else content
    if isinstance(content, list):
        return [replaced_at(depth - 1, item, wrong) for item in content]
    return {key: replaced_at(depth - 1, item, wrong) for key, item in content.items()}


@pytest.mark.slow
@pytest.mark.parametrize("depth", range(1, 7))
@pytest.mark.parametrize("wrong", [True, -1.5, "x", [None, 3, {"a": 1}], {"a": {"b": [1]}}])
def test_facts_of_the_wrong_type_are_not_recorded(wrong, depth):
    facts = FULL | {
        "base": {"dataset": FULL["dataset"], "steps": 3},
        "class_names": ["cat"],
        "calibration": {"rows": [STEPS_ROW], "how": "predicted from 64 images", "sweep": SWEEP},
    }
    ModelCard(rendered(replaced_at(depth, facts, wrong)))


def test_a_sweep_is_a_table_with_code_for_the_recommended_sampler():
    scheduler = {"recommended": {"scheduler": "DDIM", "num_inference_steps": 10}}
    text = rendered({"calibration": {"sweep": SWEEP}, "scheduler": scheduler})
    assert "| DDIM | 10 | 10 | 0.25 | 3 +- 1 | best |" in text
    assert "\nBy 10 images.\n" in text
    assert "Recommended: `DDIM`, 10 steps" in text
    assert "pipe.scheduler = DDIMScheduler.from_config(" in text
    unknown = scheduler | {"recommended": {"scheduler": "Euler(); evil", "num_inference_steps": 10}}
    assert "evil" not in rendered({"calibration": {"sweep": SWEEP}, "scheduler": unknown})


def test_parameters_of_variants_and_shards_are_counted_once(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path, max_shard_size="40KB")
    pipeline.save_pretrained(tmp_path, variant="fp16")
    number = sum(p.numel() for p in pipeline.unet.parameters())
    assert card_facts(tmp_path).unet.num_parameters == number


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "steps"),
    [(DDPMScheduler, 400), (DDIMScheduler, 50), (EulerDiscreteScheduler, 50),
     (DPMSolverMultistepScheduler, 25)],
)  # fmt: skip
def test_the_code_in_the_card_uses_the_default_number_of_steps(tmp_path, kind, steps):
    folder = save_ours(tmp_path, scheduler=kind(400, beta_schedule="squaredcos_cap_v2"))
    assert f"num_inference_steps={steps})" in render_model_card(card_facts(folder))


def metric(value, how="10,000 images", name="digits", **dataset):
    return MetricRecord(
        type="fid", name="FID", value=value, how=how, dataset={"name": name, **dataset}, args={}
    )


def test_results_are_written_to_the_card_and_its_model_index(tmp_path):
    folder = save_ours(tmp_path / "model")
    card = write_model_card(folder)
    card.write_text("---\nlicense: mit\n" + card.read_text()[4:] + "\nBy Jane.\n")
    write_results(folder, [metric(13.0, "outdated")])
    other = metric(40, name="moths", hub_id="user/moths", split="test")
    write_results(folder, [metric(12.5), other])
    loaded = ModelCard.load(card)
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in loaded.data.eval_results}
    assert results == {("digits", "fid"): 12.5, ("moths", "fid"): 40}
    assert loaded.data.license == "mit"
    assert "| FID | 12.5 | 10,000 images; on digits |" in loaded.text
    assert "| FID | 40 | 10,000 images; on moths |" in loaded.text
    assert "By Jane." in loaded.text
    assert "outdated" not in loaded.text
    stored = json.loads((folder / "training.json").read_text())["metrics"]
    assert stored == [metric(12.5).to_dict(), other.to_dict()]
    with pytest.raises(ValueError, match="FID must be finite, got nan"):
        write_results(folder, [metric(float("nan"))])


def bound(value, **setup):
    """Bits/dim in the metrics of training.json."""
    setup = {"images": "9 images that training held out", "num_inference_steps": 100} | setup
    name = f"bits/dim of {setup['images']}"
    return {"type": "bits-per-dim", "name": name, "value": value, "args": {"bound": setup}}


def test_several_bits_per_dim_state_why_they_differ():
    calibrated = bound(3, is_calibrated=True, num_inference_steps=50)
    text = rendered({"metrics": [bound(4, is_calibrated=False), calibrated]})
    assert "\nThe bits/dim differ because they were measured in different numbers of steps" in text
    assert "calibrated ones lower the bound" in text
    assert "different images" not in text
    assert "bits/dim differ" not in rendered({"metrics": [bound(4)]})
    unknown = bound(4) | {"args": {}}
    assert "were measured differently: see" in rendered({"metrics": [unknown, bound(4)]})
    assert "with different noise." in rendered({"metrics": [bound(4), bound(4)]})


def test_the_predicted_bits_per_dim_state_why_they_differ_from_measured_ones():
    calibration = {"rows": [{"num_inference_steps": 5, "bits_per_dim": 4.0}], "how": "predicted"}
    assert "measured directly" in rendered({"metrics": [bound(4)], "calibration": calibration})
    assert "measured directly" not in rendered({"calibration": calibration})


def evaluated(dataset, measured=None, **options):
    """A metric of `evaluate` in training.json."""
    args = {"evaluate": {"batch_size": 8, "num_timesteps": 32, "seed": 0, "split": None} | options}
    if measured is not None:
        args["bound"] = {"num_images": measured}
    return {"name": "x", "value": 1.0, "dataset": {"name": dataset}, "args": args}


def commands(*metrics, repo_id=None):
    text = rendered({"metrics": list(metrics)}, repo_id)
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL)
    return block[1].splitlines() if block else []


def test_recorded_commands_can_be_pasted_and_name_only_options_that_mattered():
    bits = evaluated("my photos", 7, metrics=["bits-per-dim"], num_images=9, features="pixels")
    images = {"num_images": 9, "features": "pixels", "decoder": "exact", "per_class": True}
    fd = evaluated("my photos", metrics=["fd"], **images)
    kid = evaluated("my photos", metrics=["kid"], **images)
    first, second = commands(bits, fd, kid, repo_id="user/x")
    assert first == "ddpm-hf evaluate user/x 'my photos' --num-timesteps 32 --num-images 7"
    assert shlex.split(second)[:4] == ["ddpm-hf", "evaluate", "user/x", "my photos"]
    assert second.endswith(" --metrics fd kid --num-images 9 --features pixels")
    assert commands(evaluated("a", metrics=["fd"])) == ["ddpm-hf evaluate . a --metrics fd"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["-x", "a\nb", "```", "<!-- /ddpm-hf -->"])
def test_a_command_does_not_contain_hostile_text(name):
    assert commands(evaluated(name, metrics=["fd"])) == []
    (command,) = commands(evaluated("a", metrics=["fd"], split="--allow-pickle", evil="x"))
    assert command == "ddpm-hf evaluate . a --metrics fd"


def test_a_calibration_without_a_sweep_keeps_the_earlier_sweep(tmp_path):
    folder = save_ours(tmp_path / "model")
    (folder / "training.json").write_text(json.dumps({"calibration": {"sweep": SWEEP}}))
    rows = [
        StepsRow(num_inference_steps=K, bits_per_dim=bits, standard_error=None, published=9.0)
        for K, bits in ((5, 4.0), (1000, 3.0))
    ]
    text = write_calibration(folder, rows, "predicted from 3 images").read_text()
    assert "| 5 | 4.000 (+1.000) | 9.000 (+6.000) |" in text
    assert "predicted from 3 images" in text
    stored = json.loads((folder / "training.json").read_text())["calibration"]
    expected = {"rows": [row.to_dict() for row in rows], "how": "predicted from 3 images"}
    assert stored == {"sweep": SWEEP, **expected}


# Secrets and local paths

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
def test_harmless_text_is_not_a_leak(text):
    assert find_leak(text) is None


@pytest.mark.parametrize("text", SECRETS)
def test_messages_do_not_contain_the_secret(text):
    assert find_leak(text) == "a string with the form of a token or password"
    secret = re.search(r"hf_\w+|github_pat_\w+|secret", text)[0]
    assert secret not in shorten(f"the server said: {text}")


def test_the_token_in_use_is_found_in_any_form(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "a-token-of-another-shape")
    assert (
        find_leak("x = a-token-of-another-shape") == "a string with the form of a token or password"
    )


def test_invalid_metadata_is_refused():
    metadata_of(rendered(FULL))
    metadata_of("# No metadata\n")
    for broken in ("---\na: [\n---\n", "---\n- a\n- list\n---\n"):
        with pytest.raises(ValueError, match="metadata that the Hub would refuse"):
            metadata_of(broken)


def test_the_model_card_of_the_project_is_up_to_date():
    """Update it with `python tests/golden/make_card.py [FOLDER]`."""
    assert make_card.render() == make_card.CARD.read_text()
    assert "(docs/samples.png)" in make_card.CARD.read_text()
    assert (PROJECT / "docs/samples.png").is_file()
