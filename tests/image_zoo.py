"""Image files in unusual formats, as bytes, with the expected pixels or the expected problem.

The expected pixels are computed from the encoded arrays, not by Pillow's conversions.
"""

import struct
import zlib
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

WHITE = 255


@dataclass(frozen=True)
class ImageCase:
    """A file, and either its mode and pixels (C, H, W) or part of the message about its problem."""

    name: str
    data: bytes | None
    mode: str = ""
    pixels: NDArray[np.generic] | None = None
    problem: str = ""


def encode(
    array: NDArray[np.generic], mode: str | None = None, kind: str = "PNG", **options
) -> bytes:
    """An image file of an array (H, W) or (H, W, C)."""
    image = Image.fromarray(array)
    assert mode is None or image.mode == mode
    return save(image, kind, **options)


def save(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(
    width: int, height: int, depth: int, colour_type: int, rows: bytes, extra: bytes = b""
) -> bytes:
    """A PNG that Pillow cannot write; `rows` include the filter bytes."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(rows, 1))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + pixels + chunk(b"IEND", b"")


def chunk(kind: bytes, content: bytes) -> bytes:
    check = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)


def grey(height: int, width: int, top: int = 251) -> NDArray[np.uint8]:
    """Grey pixels without equal neighbours or symmetry."""
    return (np.arange(height * width) * 37 % top).reshape(height, width).astype(np.uint8)


def colour(height: int, width: int) -> NDArray[np.uint8]:
    return np.stack([grey(height, width), grey(height, width, 199), grey(height, width, 97)], -1)


GREY = grey(6, 9)
COLOUR = colour(6, 9)
ALPHA = np.where(np.arange(54).reshape(6, 9) % 3 == 0, 0, 128).astype(np.uint8)
OPAQUE = np.full((6, 9), 255, np.uint8)
DEEP = (np.arange(54) * 1213 % 65536).reshape(6, 9).astype(np.uint16)
DEEP[0, :4] = 0, 1000, 32768, 65535


def _planes(array: NDArray[np.generic]) -> NDArray[np.generic]:
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _with_alpha(array: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.concatenate([array.reshape(6, 9, -1), alpha[..., None]], -1)


def _hidden_in_white(array: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.uint8]:
    planes = _planes(_with_alpha(array, alpha)).copy()
    planes[:-1, alpha == 0] = WHITE
    return planes


def _palette(indices: NDArray[np.uint8], colours: list[tuple[int, int, int]]) -> Image.Image:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette([value for rgb in colours for value in rgb])
    return image


def modes() -> list[ImageCase]:
    """All modes in the table of `decoding.py`."""
    bits = GREY > 100
    indices = (GREY % 3).astype(np.uint8)
    three = [(10, 20, 30), (200, 100, 0), (255, 255, 255)]
    greys = [(7, 7, 7), (90, 90, 90), (250, 250, 250)]
    cmyk = np.concatenate([COLOUR, np.zeros((6, 9, 1), np.uint8)], -1)
    red = np.full((6, 9, 3), (255, 0, 0), np.uint8)
    see_through = (indices != 1) * np.uint8(255)
    is_marked = (COLOUR[2, 3] == COLOUR).all(-1)
    rgb_16 = (COLOUR.astype(np.uint16) * 256 + 3).astype(">u2")  # Pillow keeps the upper byte
    rows_16 = b"".join(b"\0" + row.tobytes() for row in rgb_16)
    pgm = b"P5 9 6 65535\n" + DEEP.astype(">u2").tobytes()
    ppm_16 = b"P6 9 6 65535\n" + (COLOUR * np.uint16(257)).astype(">u2").tobytes()
    return [
        ImageCase("1.png", save(Image.fromarray(bits)), "L", _planes(bits * np.uint8(255))),
        ImageCase("L.png", encode(GREY, "L"), "L", _planes(GREY)),
        ImageCase("LA_opaque.png", encode(_with_alpha(GREY, OPAQUE), "LA"), "L", _planes(GREY)),
        ImageCase("LA.png", encode(_with_alpha(GREY, ALPHA)), "LA", _hidden_in_white(GREY, ALPHA)),
        ImageCase(
            "L_marked.png",
            encode(GREY, transparency=int(GREY[2, 3])),
            "LA",
            _hidden_in_white(GREY, (GREY[2, 3] != GREY) * np.uint8(255)),
        ),
        ImageCase("P.png", save(_palette(indices, three)), "RGB", np.array(three).T[:, indices]),
        ImageCase(
            "P_grey.png", save(_palette(indices, greys)), "L", np.array(greys).T[:1, indices]
        ),
        ImageCase(
            "P_marked.png",
            save(_palette(indices, three), transparency=1),
            "RGBA",
            _hidden_in_white(np.array(three, np.uint8)[indices], see_through),
        ),
        ImageCase(
            "P_grey_marked.png",
            save(_palette(indices, greys), transparency=1),
            "LA",
            _hidden_in_white(np.array(greys, np.uint8)[indices][..., 0], see_through),
        ),
        ImageCase("RGB.png", encode(COLOUR, "RGB"), "RGB", _planes(COLOUR)),
        ImageCase("RGB.bmp", encode(COLOUR, kind="BMP"), "RGB", _planes(COLOUR)),
        ImageCase("RGB.webp", encode(COLOUR, kind="WEBP", lossless=True), "RGB", _planes(COLOUR)),
        ImageCase(
            "RGB_marked.png",
            encode(COLOUR, transparency=tuple(map(int, COLOUR[2, 3]))),
            "RGBA",
            _hidden_in_white(COLOUR, ~is_marked * np.uint8(255)),
        ),
        ImageCase("RGBA_opaque.png", encode(_with_alpha(COLOUR, OPAQUE)), "RGB", _planes(COLOUR)),
        ImageCase(
            "RGBA.png", encode(_with_alpha(COLOUR, ALPHA)), "RGBA", _hidden_in_white(COLOUR, ALPHA)
        ),
        ImageCase(
            "RGBA_hidden_red.png",
            encode(_with_alpha(red, np.zeros((6, 9), np.uint8))),
            "RGBA",
            np.stack([np.full((6, 9), WHITE)] * 3 + [np.zeros((6, 9))]),
        ),
        # CMYK without black is the complement of RGB.
        ImageCase(
            "CMYK.tif",
            save(Image.frombytes("CMYK", (9, 6), cmyk.tobytes()), "TIFF"),
            "RGB",
            255 - _planes(COLOUR),
        ),
        ImageCase("I16.png", encode(DEEP, "I;16"), "L", _planes(DEEP)),
        ImageCase("I16.tif", encode(DEEP, kind="TIFF"), "L", _planes(DEEP)),
        ImageCase("I16_big_endian.tif", _big_endian_tiff(DEEP), "L", _planes(DEEP)),
        ImageCase("I16_marked.png", *_deep_with_transparent_colour()),
        ImageCase("I.pgm", pgm, "L", _planes(DEEP)),
        ImageCase("I.tif", encode(DEEP.astype(np.int32), "I", "TIFF"), "L", _planes(DEEP)),
        ImageCase("RGB_16.png", png(9, 6, 16, 2, rows_16), "RGB", _planes(COLOUR)),
        ImageCase("RGB_16.ppm", ppm_16, "RGB", _planes(COLOUR)),
        ImageCase(
            "I_negative.tif",
            encode(DEEP.astype(np.int32) - 1024, kind="TIFF"),
            problem="-1024..64511 are outside 0..65535",
        ),
        ImageCase("F.tif", encode(DEEP.astype(np.float32), "F", "TIFF"), problem="mode F"),
    ]


def _big_endian_tiff(array: NDArray[np.uint16]) -> bytes:
    """One strip of 16-bit grey in Motorola byte order."""
    height, width = array.shape
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = array.nbytes
    entries = b"".join(
        struct.pack(">HHI", tag, 4, 1) + struct.pack(">I", value)
        for tag, value in sorted(tags.items())
    )
    directory = struct.pack(">H", len(tags)) + entries + struct.pack(">I", 0)
    return (
        b"MM\0*" + struct.pack(">I", 8 + array.nbytes) + array.astype(">u2").tobytes() + directory
    )


def _deep_with_transparent_colour() -> tuple[bytes, str, NDArray[np.uint16]]:
    rows = b"".join(b"\0" + row.tobytes() for row in DEEP.astype(">u2"))
    data = png(9, 6, 16, 0, rows, chunk(b"tRNS", struct.pack(">H", 32768)))
    is_marked = DEEP == 32768
    alpha = np.where(is_marked, 0, 65535).astype(np.uint16)
    return data, "LA", np.stack([np.where(is_marked, 65535, DEEP), alpha])


# EXIF orientation: transformation of the stored rows that gives the upright image.
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a, 1),
}


def turned() -> list[ImageCase]:
    """The eight EXIF orientations, and some in other formats."""
    cases = []
    for kind, orientations in {"PNG": TURNS, "TIFF": (1, 3, 6)}.items():
        for orientation in orientations:
            exif = Image.Exif()
            exif[0x0112] = orientation
            data, pixels = encode(GREY, kind=kind, exif=exif), _planes(TURNS[orientation](GREY))
            cases.append(ImageCase(f"exif_{orientation}.{kind.lower()}", data, "L", pixels))
    return cases


def animated() -> list[ImageCase]:
    frames = [Image.fromarray(np.full((6, 9), 50 * i, np.uint8)) for i in range(5)]
    pages = {"save_all": True, "append_images": frames[1:]}
    first = np.zeros((1, 6, 9), np.uint8)
    return [
        ImageCase("frames.gif", save(frames[0], "GIF", **pages), "L", first),
        ImageCase("pages.tif", save(frames[0], "TIFF", **pages), "L", first),
        ImageCase("frames.png", save(frames[0], "PNG", **pages), "L", first),
    ]


def damaged() -> list[ImageCase]:
    whole, photo = encode(colour(40, 40)), encode(colour(64, 64), kind="JPEG")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    return [
        ImageCase("null", None, problem="contains no image"),
        ImageCase("empty.png", b"", problem="empty"),
        ImageCase("text.png", b"<html>404 not found</html>", problem="not an image"),
        ImageCase("zeros.png", bytes(1000), problem="not an image"),
        ImageCase("cut.png", whole[: len(whole) // 2], problem="truncated"),
        ImageCase("cut.jpg", photo[: len(photo) // 2], problem="truncated"),
        ImageCase("header.png", whole[:40], problem="not an image"),
        ImageCase("flipped.png", bytes(flipped), problem="Error"),
        ImageCase(
            "script.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 6\n", problem="not an"
        ),
        ImageCase("bomb.png", bomb(12_000), problem="more than 64,000,000 pixels: 12000x12000"),
        ImageCase("big_bomb.png", bomb(20_000), problem="more than 64,000,000 pixels"),
    ]


def bomb(side: int) -> bytes:
    """A PNG of a few kB that decodes to side * side pixels of one bit."""
    return png(side, side, 1, 0, bytes(side * (1 + side // 8)))


def sizes() -> list[ImageCase]:
    """Images of unusual sizes."""
    shapes = [(1, 1), (1, 256), (256, 1), (3, 5), (129, 64)]
    return [ImageCase(f"{h}x{w}.png", encode(grey(h, w)), "L", grey(h, w)[None]) for h, w in shapes]
