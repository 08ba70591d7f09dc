"""Make the figures of this folder, by the code of pages and by the other programs of this folder.

python docs/make.py                        # all but those below; the guides need `make demo` first
python docs/make.py walkthrough.md         # the figures that the code of a page draws

The pictures and the card of the demo's model are copied from its folder. Longer measurements:
few_images*.png by make_few_images.py, training_quality*.png by tests/benchmarks/bench_quality.py.
"""

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser

FOLDER = Path(__file__).parent
PAGES_WITH_FIGURES = ("walkthrough.md",)
DEMO_MODEL = FOLDER.parent / "runs" / "demo" / "model"
DEMO_PICTURES = ("samples.png", "guidance.png", "few_steps.png", "denoising.png")
CHROMIUM = shutil.which("chromium")


def section_of(text: str, number: int) -> tuple[int, int]:
    """First and last position of the section with the heading `## number.`."""
    start = text.index(f"\n## {number}. ")
    end = text.find("\n## ", start + 1)
    return start, len(text) if end < 0 else end


def run_page(page: Path, section: int | None = None, **names: Any) -> dict[str, Any]:
    """Run the Python of a page in the working folder, to which its figures are written.

    Args:
        page: Markdown file; its code blocks share one namespace.
        section: number of the section to run, instead of the whole page.
        names: variables that exist before the first block.
    Returns:
        the variables after the last block.
    """
    document = Document.parse(str(page), PythonCodeBlockParser())
    document.namespace.update(names, __name__=page.stem)
    start, end = (0, document.end) if section is None else section_of(document.text, section)
    for example in document:
        if start <= example.start < end:
            example.evaluate()
    return document.namespace


@contextlib.contextmanager
def stopwatch(what: str) -> Iterator[None]:
    """Print how long the block took."""
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def copy_demo() -> None:
    """The pictures of the demo, and its card for a reader at the root of the project."""
    for name in DEMO_PICTURES:
        shutil.copyfile(DEMO_MODEL.parent / name, FOLDER / name)
    make_card = FOLDER.parent / "tests" / "golden" / "make_card.py"
    subprocess.run([sys.executable, make_card, DEMO_MODEL], check=True)


def make_all() -> None:
    """Make the figures that take minutes; scripts that need something missing are listed."""
    for page in PAGES_WITH_FIGURES:
        main([page])
    run_script("make_gan_comparison.py")
    if DEMO_MODEL.is_dir():
        copy_demo()
    needs = {
        "make_editing_figures.py": DEMO_MODEL.is_dir(),
        "make_guide_figures.py": DEMO_MODEL.is_dir(),
        "make_app_screenshots.py": DEMO_MODEL.is_dir() and CHROMIUM is not None,
    }
    for script, is_possible in needs.items():
        if is_possible:
            run_script(script, str(DEMO_MODEL))
        else:
            print(f"skipped {script}: it needs the model of `make demo`, and chromium for the app")


def run_script(name: str, *arguments: str) -> None:
    """Run a program of this folder in a process of its own."""
    with stopwatch(name):
        subprocess.run([sys.executable, FOLDER / name, *arguments], check=True)


def main(pages: Sequence[str]) -> None:
    """Make the figures of the pages, or all figures."""
    if not pages:
        make_all()
    for name in pages:
        with stopwatch(name), contextlib.chdir(FOLDER):
            run_page(FOLDER / name)


if __name__ == "__main__":
    main(sys.argv[1:])
