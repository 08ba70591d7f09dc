"""Fonts for names in pictures, chosen by the characters that they have."""

import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import ImageFont

SIZE = 14  # pixels
# A noncharacter, drawn as the box or question mark of a missing character.
_MISSING = "\U0010ffff"


@functools.cache
def font_with(characters: str) -> Any | None:
    """A font that has all characters; None if no installed font has them.

    The font of Pillow comes first, then those of matplotlib and of the system.

    Args:
        characters: characters to draw.
    """
    return next((font for font in _fonts() if has_characters(font, characters)), None)


def default_font() -> Any:
    """The font of Pillow."""
    return ImageFont.load_default(size=SIZE)


def has_characters(font: Any, characters: str) -> bool:
    """Whether the font has a glyph for each character, other than that of a missing one."""
    missing = _glyph(font, _MISSING)
    return all(_glyph(font, character) != missing for character in characters)


def _glyph(font: Any, character: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(character)
    return mask.size, bytes(mask)


def _fonts() -> Iterator[Any]:
    yield default_font()
    for path in (*_matplotlib_fonts(), *_system_fonts()):
        try:
            yield ImageFont.truetype(path, SIZE)
        except OSError:  # a bitmap font of another size
            continue


def _matplotlib_fonts() -> Iterator[Path]:
    spec = importlib.util.find_spec("matplotlib")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        yield from Path(folder, "mpl-data", "fonts", "ttf").glob("DejaVuSans.ttf")


def _system_fonts() -> Iterator[Path]:
    """Font files of the system, without "last resort" fonts, which draw one sign for a script."""
    home = Path.home()
    folders = {
        "win32": [Path(os.environ.get("WINDIR", "C:/Windows"), "Fonts")],
        "darwin": [Path("/System/Library/Fonts"), Path("/Library/Fonts"), home / "Library/Fonts"],
    }.get(
        sys.platform,
        [
            Path("/usr/share/fonts"),
            Path("/usr/local/share/fonts"),
            home / ".local/share/fonts",
            home / ".fonts",
        ],
    )
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            is_font = path.suffix.lower() in (".ttf", ".otf", ".ttc")
            if is_font and "lastresort" not in path.name.lower():
                yield path
