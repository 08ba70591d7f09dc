"""Texts of the page in English and Chinese."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

LANGUAGES = ("en", "zh")


@cache
def texts(language: str) -> dict[str, str]:
    """All texts of a language by key."""
    path = files("ddpm_hf.app") / "texts" / f"{language}.json"
    table: dict[str, str] = json.loads(path.read_text("utf-8"))
    return table


def language_of(request: Any) -> str:
    """The first of our languages that the browser of a `gradio.Request` accepts."""
    header = "" if request is None else str(request.headers.get("accept-language", ""))
    wanted = (part.split(";")[0].strip()[:2].lower() for part in header.split(","))
    return next((language for language in wanted if language in LANGUAGES), LANGUAGES[0])


def static_file(name: str) -> str:
    """Text of a style sheet or script of the page."""
    return (files("ddpm_hf.app") / "static" / name).read_text("utf-8")
