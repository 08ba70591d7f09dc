"""Pages of docs/, README and training/README: snippets run, links, figures and formulas exist."""

import faulthandler
import re
import runpy
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from checkpoints import image_facts_of, save_ours, save_stock, tiny_scheduler, tiny_unet
from PIL import Image

import ddpm_hf
import ddpm_hf.training
from ddpm_hf import cli, option_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OTHERS = (ROOT / "CONTRIBUTING.md", ROOT / "training" / "README.md")
TEXTS = [*PAGES, *sorted(ROOT.glob("README*.md")), *OTHERS]
TRANSLATIONS = [page for page in TEXTS if page.name.endswith(".zh.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a test replaces in a snippet, so that it takes seconds and needs no network.
CHEAPER = {
    "max_train_steps=20_000": "max_train_steps=2, resolution=8, num_train_timesteps=10, "
    "output_dir='runs/new', num_samples=0",
    'metrics=["fd", "precision-recall"]': 'metrics=["fd"], features="pixels", num_images=8',
    'validation_split="0.05"': 'validation_split="0.5"',
    "google/ddpm-cifar10-32": "runs/stock",
    "(64, 3, 64, 64)": "(8, 3, 16, 16)",
    "(8, 3, 64, 64)": "(8, 3, 16, 16)",
    "num_inference_steps=100": "num_inference_steps=10",
    "num_inference_steps=50": "num_inference_steps=5",
}
IMAGE_SIZE = 16

run_page = runpy.run_path(str(DOCS / "make.py"))["run_page"]


def each(pages):
    ids = [str(page.relative_to(ROOT)) for page in pages]
    return {"argnames": "page", "argvalues": pages, "ids": ids}


def fences(page):
    """Language and text of each code block."""
    return FENCE.findall(page.read_text(encoding="utf-8"))


def prose(page):
    """The text without code blocks and inline code."""
    return re.sub(r"`[^`\n]*`", "", FENCE.sub("", page.read_text(encoding="utf-8")))


def anchors(page):
    """Addresses of the headings, as GitHub derives them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def save_picture(path, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The files that the pages name: pictures, classes, and tiny models trained on nothing."""
    folder = tmp_path_factory.mktemp("world")
    for i in range(12):
        save_picture(folder / f"photos/{i}.png", i)
        save_picture(folder / f"drawn/{i}.png", 100 + i)
        save_picture(folder / f"pets/{('cat', 'dog')[i % 2]}/{i}.png", 200 + i)
    save_picture(folder / "photo.png", 0)
    mask = Image.new("L", (IMAGE_SIZE, IMAGE_SIZE))
    mask.paste(255, (0, 8, 16, 16))
    mask.save(folder / "mask.png")
    size, scheduler = {"sample_size": IMAGE_SIZE, "in_channels": 3}, {"num_train_timesteps": 100}
    classes = ["cat", "dog"]
    for name, facts, unet in (
        ("photos", None, tiny_unet(**size)),
        ("pets", classes, tiny_unet(**size, num_class_embeds=3)),
    ):
        facts = image_facts_of("RGB", IMAGE_SIZE, IMAGE_SIZE, class_names=facts)
        path = folder / "runs" / name / "model"
        save_ours(path, unet=unet, scheduler=tiny_scheduler(**scheduler), facts=facts)
    for name in ("a", "b", "tuned"):
        shutil.copytree(folder / "runs/photos/model", folder / "runs" / name / "model")
    shutil.copytree(folder / "runs/photos/model", folder / "runs/photos/checkpoints/step-00001000")
    save_stock(folder / "runs/stock", tiny_unet(**size), **scheduler)
    shutil.copytree(ROOT / "training", folder / "training")
    for name in ("lsun_bedroom.pt", "ema_0.9999_200000.pt", "flags.json", "other.png"):
        (folder / name).touch()
    return folder


@pytest.fixture
def working_folder(world, tmp_path, monkeypatch):
    """A copy of the world as working folder; the state of torch and matplotlib is restored."""
    shutil.copytree(world, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        yield tmp_path
    plt.close("all")


def with_python(pages):
    return [page for page in pages if any(language == "python" for language, _ in fences(page))]


# The walkthrough has its own test, and app.md needs a server: test_app_requests.py calls the same.
GUIDES = [
    page
    for page in with_python([*PAGES, ROOT / "README.md"])
    if page not in TRANSLATIONS and page.name not in ("walkthrough.md", "app.md")
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # so few images and steps are remarked on
@pytest.mark.parametrize(**each(GUIDES))
def test_the_python_of_a_page_runs(page, working_folder):
    text = page.read_text(encoding="utf-8")
    for expensive, cheap in CHEAPER.items():
        text = text.replace(expensive, cheap)
    (working_folder / "page.md").write_text(text, encoding="utf-8")
    run_page(working_folder / "page.md")


@pytest.mark.slow
@pytest.mark.timeout(900)  # a minute on a quiet core, ten times as long on a busy one
def test_the_walkthrough_computes_what_it_states(tmp_path, monkeypatch):
    faulthandler.cancel_dump_traceback_later()  # `faulthandler_timeout` is shorter
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng():
        run_page(DOCS / "walkthrough.md")
    plt.close("all")
    figures = {path.name for path in tmp_path.iterdir()}
    shown = set(re.findall(r"\]\((\w+\.png)\)", (DOCS / "walkthrough.md").read_text()))
    assert shown - figures == {"walkthrough_gan.png"}  # made by make_gan_comparison.py
    assert figures <= shown


class Parsed(BaseException):
    """The options of a command are valid, and it would start."""


def commands(page):
    """The `ddpm-hf` command lines of a page; backslash and indentation continue a line."""
    for language, code in fences(page):
        if language in ("shell", ""):
            joined = re.sub(r"\\?\n[ \t]+", " ", code)
            for line in joined.splitlines():
                words = shlex.split(line, comments=True)
                for start in (["ddpm-hf"], ["-m", "ddpm_hf"]):
                    at = [i for i in range(len(words)) if words[i : i + len(start)] == start]
                    if at:
                        yield words[at[0] + len(start) :]


@pytest.mark.slow
@pytest.mark.parametrize(**each([page for page in TEXTS if [*commands(page)]]))
def test_the_commands_of_a_page_have_valid_options(page, working_folder, monkeypatch):
    def stop_after(parse):
        def wrapped(*args, **kwargs):
            parse(*args, **kwargs)
            raise Parsed

        return wrapped

    monkeypatch.setattr(option_parser, "parse_options", stop_after(option_parser.parse_options))
    monkeypatch.setattr(ddpm_hf.training, "parse_config", stop_after(ddpm_hf.training.parse_config))
    for words in commands(page):
        if "COMMAND" in words or "--help" in words:
            continue
        try:
            status = cli.main(words)
        except Parsed:
            continue
        pytest.fail(f"ddpm-hf {shlex.join(words)} ended with status {status}")


@pytest.mark.slow
def test_the_reference_has_every_public_name_and_command(tmp_path):
    runpy.run_path(str(DOCS / "make_reference.py"))["main"](tmp_path)
    python, commands = ((tmp_path / f"{name}.md").read_text() for name in ("python", "commands"))
    assert [name for name in ddpm_hf.__all__ if f"\n## `{name}`\n" not in python] == []
    assert "### `GaussianDDPMScheduler.step`" in python
    assert [name for name in cli.COMMANDS if f"\n## `ddpm-hf {name}`\n" not in commands] == []
    assert commands.count("usage:") == len(cli.COMMANDS)


@pytest.mark.slow
def test_the_site_has_every_page_and_no_broken_link():
    for name in ("furo", "myst_parser", "sphinx"):
        pytest.importorskip(name)
    site = runpy.run_path(str(DOCS / "make_site.py"))
    assert site["main"]() == 0
    pages = {page.relative_to(ROOT).with_suffix(".html") for page in TEXTS}
    assert {page for page in pages if not (site["SITE"] / page).is_file()} == set()


@pytest.mark.parametrize(**each(TRANSLATIONS))
def test_a_translation_has_the_code_formulas_and_figures_of_the_original(page):
    original = page.with_name(page.name.replace(".zh.md", ".md"))
    code = [[fence for fence in fences(path) if fence[0]] for path in (page, original)]
    assert code[0] == code[1]
    texts = [path.read_text(encoding="utf-8") for path in (page, original)]
    for pattern in (r"\\tag\{(\d+)\}", r"\]\(([\w/]+\.png)\)", r"^(#+ (?:\d+\.)?)"):
        found = [re.findall(pattern, FENCE.sub("", text), re.MULTILINE) for text in texts]
        assert found[0] == found[1]


@pytest.mark.parametrize(**each(PAGES))
def test_formulas_are_numbered_in_order_and_references_exist(page):
    text = prose(page)
    tags = [int(tag) for tag in re.findall(r"\\tag\{(\d+)\}", text)]
    assert tags == list(range(1, len(tags) + 1))
    if tags:  # elsewhere an equation is that of a paper
        assert {int(number) for number in re.findall(r"[ \n(]\((\d+)\)", text)} <= set(tags)
    assert text.count("$$") % 2 == 0
    for block in re.findall(r"\$\$(.*?)\$\$", text, re.DOTALL):
        assert block.count("{") == block.count("}"), block
        # GitHub's Markdown removes a backslash before punctuation.
        assert not re.search(r"\\[^a-zA-Z\s]", block), block


@pytest.mark.parametrize(**each(TEXTS))
def test_links_and_figures_of_a_page_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        path = page.parent / file if file else page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path), target


@pytest.mark.parametrize(**each(TEXTS))
def test_fences_are_closed_and_headings_are_nested(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("```") for line in lines) == 2 * len(fences(page))
    levels = [len(mark) for mark in re.findall(r"^(#+) ", prose(page), re.MULTILINE)]
    assert levels[0] == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


@pytest.mark.parametrize(**each(with_python(PAGES)))
def test_a_page_opens_as_a_notebook_with_the_same_code(page):
    cells = jupytext.read(page).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    for language, text in fences(page):
        if language == "python":
            assert text.rstrip() in code


def test_every_page_is_listed_in_the_index():
    linked = set(re.findall(r"\]\((\w+(?:\.zh)?\.md)[)#]", (DOCS / "README.md").read_text("utf-8")))
    assert {page.name for page in PAGES} - {"README.md"} == linked
