"""Names of classes in pictures: fonts that have their characters, or numbers."""

import warnings

import numpy as np
import pytest
from PIL import ImageFont

from ddpm_hf.pictures import grid_by_row, image_grid
from ddpm_hf.utils import fonts

BLACK = np.zeros((16, 16, 1))


def margin(grid):
    """The left margin with the names, as an array."""
    width = grid.width - image_grid([BLACK]).width
    return np.asarray(grid.crop((0, 0, width, grid.height)).convert("L"))


def named(name, number=0):
    names = [str(i) for i in range(number)] + [name]
    return margin(grid_by_row([BLACK], [number], names))


@pytest.mark.parametrize("name", ["caf\xe9", "M\xfcnchen", "\u0416\u0443\u043a", "\u03b1\u03b2"])
def test_names_in_other_alphabets_are_drawn_by_a_font_that_has_them(name):
    font = fonts.font_with(name)
    assert fonts.has_characters(font, name)
    assert not fonts.has_characters(fonts.default_font(), name)
    # Each character differs from the box of a missing one, and from each other.
    glyphs = {bytes(font.getmask(character)) for character in name}
    assert len(glyphs) == len(set(name))
    assert named(name).min() < 128


def test_names_of_ascii_keep_the_font_of_pillow():
    assert fonts.font_with("cat 1.5") is not None
    assert isinstance(fonts.font_with("cat"), ImageFont.FreeTypeFont)
    assert fonts.font_with("cat").getname() == fonts.default_font().getname()


def test_decomposed_characters_are_drawn_composed():
    assert np.array_equal(named("Mu\u0308nchen"), named("M\xfcnchen"))


def test_names_without_a_font_are_replaced_by_the_number_of_the_class():
    name = "\U0010fffe"  # no font has a noncharacter
    with pytest.warns(UserWarning, match=f"no installed font.*numbers: 3 = {name}"):
        shown = named(name, number=3)
    assert np.array_equal(shown, named("3"))


def test_only_the_names_without_a_font_become_numbers():
    names = ["cat", "\U0010fffe"]
    with pytest.warns(UserWarning, match="numbers: 1 = "):
        grid = grid_by_row([BLACK, BLACK], [1, 0], names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(
            np.asarray(grid), np.asarray(image_grid([BLACK] * 2, 1, ["1", "cat"]))
        )


def test_a_long_name_of_one_word_is_cut_not_dropped():
    assert np.array_equal(named("x" * 40), named("x" * 21 + "..."))
