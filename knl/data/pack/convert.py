"""One source picture to one record, or the reason why not."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

# Larger ones are refused as not being what they say (Pillow's own limit, of which it only warns).
MOST_PIXELS = 1 << 27
_ORIENTATION, _UPRIGHT = 0x0112, (0, 1)  # EXIF
_JPEG = b"\xff\xd8\xff"
_DEEP = ("I;16", "I;16B", "I;16L", "I")  # Pillow's modes of 16-bit grey
_INKS = ("CMYK", "YCCK")  # whose sense decoders do not agree on


class Rejected(Exception):
    """A picture that cannot be taken; says why."""


@dataclass(frozen=True)
class Form:
    """What records are. `side`: pixels of a raw record, of a JPEG's short side; 0 leaves JPEGs as
    they came. `quality`: of JPEGs that have to be encoded."""

    raw: bool
    side: int
    quality: int


def convert(source: bytes | NDArray[Any], form: Form) -> bytes:
    """The record of a picture: bytes of a file, or uint8 [height, width].

    A JPEG that any decoder shows alike stays as it is where no size is wanted; all else becomes
    upright, three colours of 8 bits. Raises Rejected.
    """
    if isinstance(source, bytes) and not form.side and _is_plain_jpeg(source):
        return source
    picture = _open(source)
    if form.side:
        picture = _shrink(picture, form)
    if form.raw:
        return picture.tobytes()
    pixels = np.ascontiguousarray(picture)
    try:
        # 4:2:0, as nearly all pictures of ImageNet have it.
        return simplejpeg.encode_jpeg(pixels, quality=form.quality, colorsubsampling="420")
    except ValueError as error:  # more pixels a side than a JPEG can have
        raise Rejected(f"{picture.width} x {picture.height} pixels: {error}") from None


def _is_plain_jpeg(data: bytes) -> bool:
    """Whether it is a whole JPEG that decodes to red, green and blue without being turned."""
    if not data.startswith(_JPEG):
        return False
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if colours in _INKS or height * width > MOST_PIXELS:
            return False
        simplejpeg.decode_jpeg(data)
    except ValueError:
        return False
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody reads
            with Image.open(io.BytesIO(data)) as picture:
                return picture.getexif().get(_ORIENTATION, 1) in _UPRIGHT
    except OSError:  # Pillow does not know its head, of which decoders need little
        return True


def _open(source: bytes | NDArray[Any]) -> Image.Image:
    """As red, green and blue, upright."""
    if not isinstance(source, bytes):
        if not source.size:
            raise Rejected("a picture of no pixels")
        return Image.fromarray(source).convert("RGB")
    if not source:
        raise Rejected("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of metadata that nobody reads
            picture: Image.Image = Image.open(io.BytesIO(source))
            if picture.width * picture.height > MOST_PIXELS:
                raise Rejected(f"{picture.width} x {picture.height} pixels: over {MOST_PIXELS}")
            picture.load()
            picture = ImageOps.exif_transpose(picture)
            if picture.mode in _DEEP:
                deep = np.asarray(picture).astype(np.int64)
                picture = Image.fromarray((deep.clip(0, 65535) >> 8).astype(np.uint8))
            return picture.convert("RGB")
    except UnidentifiedImageError:
        return _by_libjpeg(source)
    except Exception as error:  # Pillow's decoders raise whatever their formats suggest
        if isinstance(error, (MemoryError, Rejected)):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise Rejected(f"does not decode: {text}") from None


def _by_libjpeg(source: bytes) -> Image.Image:
    """A JPEG with a head of which Pillow wants more than decoding needs."""
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(source)
        if height * width <= MOST_PIXELS:
            return Image.fromarray(simplejpeg.decode_jpeg(source))
    except ValueError:
        pass
    raise Rejected("not a picture that Pillow knows")


def _shrink(picture: Image.Image, form: Form) -> Image.Image:
    """The short side to `side`, of raw records the middle square. JPEGs are not magnified."""
    short = min(picture.size)
    if form.raw:  # cut before it is resized: a strip of a picture could grow beyond all memory
        left, top = ((n - short) // 2 for n in picture.size)
        box = (left, top, left + short, top + short)
        return picture.resize((form.side, form.side), Image.Resampling.BICUBIC, box)
    if short > form.side:
        width, height = (max(form.side, round(n * form.side / short)) for n in picture.size)
        return picture.resize((width, height), Image.Resampling.BICUBIC)
    return picture
