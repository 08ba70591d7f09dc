"""HTML site of the documentation, in runs/site, readable without a network.

python docs/make_site.py      # needs the extra site; `make site` installs it
"""

import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
SITE, REFERENCE = ROOT / "runs" / "site", ROOT / "runs" / "reference"
INDEX = "docs/README.md"
CONFIG: dict[str, Any] = {
    "project": "ddpm_hf",
    "root_doc": "README",
    "include_patterns": [
        "*.md", "docs/*.md", "training/*.md", "training/*/*.md", "runs/reference/*.md",
    ],
    "extensions": ["myst_parser", "sphinx-mathjax-offline"],
    "myst_enable_extensions": ["dollarmath"],
    "myst_heading_anchors": 3,
    "mathjax3_config": {"chtml": {"scale": 0.88}},  # the longest formulas fit
    "highlight_language": "none",
    "html_theme": "furo",
    "html_title": "ddpm_hf",
    "html_copy_source": False,
}  # fmt: skip


def contents() -> str:
    """Table of contents of the site: the pages of the index under its bold headings."""
    parts = [toctree("ddpm_hf", ["docs/README", "README.zh"])]
    index = (ROOT / INDEX).read_text(encoding="utf-8")
    for caption, links in re.findall(r"\*\*(.*?)\*\*\n\n(.*?)(?:\n\n|\Z)", index, re.DOTALL):
        pages = [f"docs/{name}" for name in re.findall(r"\]\(([\w.]+)\.md\)", links)]
        parts.append(toctree(caption, pages))
    reference = ["runs/reference/python", "runs/reference/commands"]
    project = ["training/README", "training/faces16/README", "model_card", "CONTRIBUTING"]
    parts.append(toctree("Reference", reference))
    return "\n".join([*parts, toctree("Project", [*project, "CHANGELOG", "SECURITY"])])


def toctree(caption: str, pages: list[str]) -> str:
    """A hidden entry of the table of contents."""
    return "\n".join(["", "```{toctree}", ":hidden:", f":caption: {caption}", "", *pages, "```"])


def adapt(app: Sphinx, name: str, source: list[str]) -> None:
    """Add the table of contents to the first page; link the README of a folder, if it has one."""
    folder = (ROOT / name).parent

    def linked(link: re.Match[str]) -> str:
        path = folder / link[2]
        if (path / "README.md").is_file():
            return f"[{link[1]}]({link[2].rstrip('/')}/README.md)"
        return link[1] if path.is_dir() else link[0]

    source[0] = re.sub(r"\[([^]]+)\]\(([\w./]+)\)", linked, source[0])
    if name == CONFIG["root_doc"]:
        source[0] += contents()


def main() -> int:
    """Write the site; returns the exit status, 1 after a warning, such as that of a broken link."""
    runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["main"](REFERENCE)
    app = Sphinx(ROOT, None, SITE, SITE / ".doctrees", "html", CONFIG, None, warningiserror=True)
    app.connect("source-read", adapt)
    app.build()
    shutil.copy(SITE / "README.html", SITE / "index.html")
    print(f"{SITE / 'index.html'}")
    return app.statuscode


if __name__ == "__main__":
    sys.exit(main())
