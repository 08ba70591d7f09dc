"""Run the pages of this folder, whose code draws their figures.

python docs/make.py                        # all figures; those of editing.md need `make demo`
python docs/make.py walkthrough.md         # the figures of one page
"""

import contextlib
import runpy
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


def main(pages: Sequence[str]) -> None:
    for name in pages or PAGES_WITH_FIGURES:
        with stopwatch(name), contextlib.chdir(FOLDER):
            run_page(FOLDER / name)
    if pages:
        return
    if not DEMO_MODEL.is_dir():
        print(f"skipped the figures of editing.md: no model in {DEMO_MODEL}; run `make demo`")
        return
    script = FOLDER / "make_editing_figures.py"
    with stopwatch(script.name):
        runpy.run_path(str(script))["main"](str(DEMO_MODEL))


if __name__ == "__main__":
    main(sys.argv[1:])
