"""Reference pages from the docstrings and from the help of the commands.

python docs/make_reference.py              # writes runs/reference/python.md and commands.md
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ddpm_hf
from ddpm_hf.cli import COMMANDS, run_command

FOLDER = Path("runs/reference")


def fenced(text: str, language: str = "") -> str:
    """A code block."""
    return f"```{language}\n{text.rstrip()}\n```"


def methods_of(kind: type) -> Iterator[tuple[str, Any]]:
    """Documented public methods and properties of a class, without those of other packages."""
    for name, member in inspect.getmembers(kind):
        function = member.fget if isinstance(member, property) else inspect.unwrap(member)
        module = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__module__", "")
        if not name.startswith("_") and str(module).startswith("ddpm_hf") and member.__doc__:
            yield name, member


def signature_of(name: str, value: Any) -> str:
    """A call with the parameters of a function, one on a line."""
    try:
        parameters = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):
        return name
    lines = (re.sub(r"\*<class '([\w.]+)'>", r"\1", str(parameter)) for parameter in parameters)
    return "\n".join([f"{name}(", *(f"    {line}," for line in lines), ")"])


def entry(name: str, value: Any, level: int = 2) -> Iterator[str]:
    """Heading, signature and docstring of a public name; of a class, also its methods."""
    yield f"{'#' * level} `{name}`"
    is_called = callable(value) and not isinstance(value, property)
    if is_called and not dataclasses.is_dataclass(value):
        yield fenced(signature_of(name.split(".")[-1], value), "python")
    yield fenced(inspect.getdoc(value) or "")
    if inspect.isclass(value) and not issubclass(value, Exception):
        for method, member in methods_of(value):
            yield from entry(f"{name}.{method}", member, level + 1)


def python_page() -> str:
    """Every public name of the package."""
    entries = (entry(name, getattr(ddpm_hf, name)) for name in sorted(ddpm_hf.__all__))
    return "\n\n".join(["# Python", *(part for parts in entries for part in parts)]) + "\n"


def commands_page() -> str:
    """The help of every command."""
    parts = ["# Commands"]
    for name, command in COMMANDS.items():
        with contextlib.redirect_stdout(io.StringIO()) as text, contextlib.suppress(SystemExit):
            run_command(command.run, ["--help"])
        parts += [f"## `ddpm-hf {name}`", fenced(text.getvalue())]
    return "\n\n".join(parts) + "\n"


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "python.md").write_text(python_page(), encoding="utf-8")
    (folder / "commands.md").write_text(commands_page(), encoding="utf-8")
    print(f"{folder}/python.md, {folder}/commands.md")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the pages")
    main(parser.parse_args().output)
