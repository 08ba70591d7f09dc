"""Spaces that serve a model: their files, and pushes to a Hub on the loopback interface."""

import ast
from pathlib import Path

import pytest
import yaml
from checkpoints import save_ours
from hub_server import ClientError

pytest.importorskip("gradio")
from ddpm_hf.cli import main
from ddpm_hf.hub.card_update import updated_card, with_space
from ddpm_hf.hub.space import space_files

MODEL, SPACE = "user/digits", "user/digits-page"


def metadata(card):
    return yaml.safe_load(card.split("---")[1])


def test_a_space_has_the_page_its_pins_and_the_package():
    files = {name: content.decode() for name, content in space_files(SPACE, MODEL).items()}
    card = metadata(files["README.md"])
    keys = "title emoji colorFrom colorTo sdk sdk_version app_file pinned license models tags"
    assert set(keys.split()) <= card.keys()
    assert card["sdk"] == "gradio"
    assert card["models"] == [MODEL]
    assert f"https://huggingface.co/{MODEL}" in files["README.md"]
    ast.parse(files["app.py"])
    assert f'load_models(["{MODEL}"]' in files["app.py"]
    pins = dict(line.split("==") for line in files["requirements.txt"].splitlines())
    assert pins["gradio"] == card["sdk_version"]
    assert {"torch", "diffusers", "spaces"} <= pins.keys()
    source = Path(__file__).parents[1] / "src" / "ddpm_hf"
    sources = {p.relative_to(source).as_posix() for p in source.rglob("*.py")}
    shipped = {name.removeprefix("ddpm_hf/") for name in files if name.startswith("ddpm_hf/")}
    assert sources <= shipped
    assert {"app/static/film.js", "app/texts/zh.json", "hub/card_template.md"} <= shipped
    assert not any("__pycache__" in name for name in shipped)


def test_an_existing_card_keeps_its_text_and_gets_the_version_of_gradio():
    card = "---\ntitle: My page\nsdk: gradio\nsdk_version: 5.0.0\n---\nMine.\n"
    renewed = space_files(SPACE, MODEL, card)["README.md"].decode()
    assert metadata(renewed) | {"sdk_version": "x"} == metadata(card) | {"sdk_version": "x"}
    assert metadata(renewed)["sdk_version"] != "5.0.0"
    assert renewed.endswith("Mine.\n")


def test_the_link_to_the_space_is_kept_by_later_cards():
    generated = "---\ntags: [a]\n---\n<!-- ddpm-hf intro -->\nHello\n<!-- /ddpm-hf -->\nText\n"
    card = with_space(generated, SPACE)
    assert card.index("Hello") < card.index(f"spaces/{SPACE}") < card.index("Text")
    assert f"spaces/{SPACE}" in updated_card(card, generated)
    assert with_space(card, SPACE) == card
    assert with_space("Only mine.\n", SPACE).endswith("Only mine.\n")


def test_a_dry_run_names_the_space_in_the_card(tmp_path, capsys):
    folder = save_ours(tmp_path / "model")
    assert main(["push", str(folder), MODEL, "--space", SPACE, "--dry-run"]) == 0
    assert f"https://huggingface.co/spaces/{SPACE}" in capsys.readouterr().out
    assert main(["push", str(folder), MODEL, "--space", "no name", "--dry-run"]) == 2


@pytest.fixture
def push(hub, hub_process, tmp_path):
    """Push a model with a Space."""
    folder = save_ours(tmp_path / "model")
    hub_process.run("from ddpm_hf.hub.push import push")

    def run(**options):
        return hub_process.run(
            "result = str(push(folder, repo_id, waits_s=(0.02,) * 4, **options))",
            folder=folder,
            repo_id=MODEL,
            options={"space": SPACE, **options},
        )

    return run


@pytest.mark.slow
def test_a_push_creates_a_private_space_that_the_card_links(hub, push):
    assert f"Space: {hub.url}/spaces/{SPACE}" in push()
    space, model = hub.repo(SPACE, "space"), hub.repo(MODEL)
    assert space.private
    assert model.private
    call = next(call for call in hub.create_calls if call.get("type") == "space")
    assert call["sdk"] == "gradio"
    assert len(space.history()) == 2  # "initial commit" of the Hub and ours
    assert set(space_files(SPACE, MODEL)) <= space.files().keys()
    assert f"spaces/{SPACE}" in model.files()["README.md"].decode()


@pytest.mark.slow
def test_a_second_push_keeps_the_card_of_the_space_and_removes_old_modules(hub, push):
    push(public=True)
    assert not hub.repo(SPACE, "space").private
    card = hub.repo(SPACE, "space").files()["README.md"].decode()
    edits = {"README.md": card + "Mine.\n", "ddpm_hf/old.py": "x = 1\n", "notes.md": "kept\n"}
    hub.edit(SPACE, edits, kind="space")
    push()
    files = hub.repo(SPACE, "space").files()
    assert files["README.md"].decode().endswith("Mine.\n")
    assert "ddpm_hf/old.py" not in files
    assert "notes.md" in files
    count = len(hub.repo(SPACE, "space").history())
    push()
    assert len(hub.repo(SPACE, "space").history()) == count


@pytest.mark.slow
def test_a_space_with_another_application_is_left_alone(hub, push):
    hub.add_repo(SPACE, {"app.py": "import streamlit\n"}, kind="space")
    with pytest.raises(ClientError, match="contains another application"):
        push()
    assert hub.repo(SPACE, "space").files()["app.py"] == b"import streamlit\n"
