"""One picture to one record: what stays as it is, what is converted, what is refused and why."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from knl.data.pack.convert import convert
from knl.data.synth import make_jpeg, make_picture

from .sets import AS_IS, RAW, SMALL, encoded

FORMS = pytest.mark.parametrize("form", [AS_IS, SMALL, RAW], ids=["as is", "small", "raw"])
WANTED = Image.fromarray(make_picture(1, 1, (60, 80)))
# Top left, top right, bottom left, bottom right.
CORNERS = ((250, 10, 10), (10, 250, 10), (10, 10, 250), (240, 240, 20))
_ORIENTATION = 0x0112


def pixels(record, form=AS_IS):
    if form.raw:
        return np.frombuffer(record, np.uint8).reshape(form.side, form.side, 3)
    assert simplejpeg.decode_jpeg_header(record)[2] == "YCbCr"
    return simplejpeg.decode_jpeg(record)


def corners(shown):
    """The colours in the middles of the four quarters."""
    height, width = shown.shape[:2]
    places = [(y, x) for y in (height // 4, -height // 4) for x in (width // 4, -width // 4)]
    return [tuple(int(c) for c in shown[place]) for place in places]


def near(one, other, by):
    return np.abs(np.asarray(one, int) - np.asarray(other, int)).max() <= by


def quarters(width=80, height=64):
    picture = Image.new("RGB", (width, height))
    for number, colour in enumerate(CORNERS):
        left, top = number % 2 * width // 2, number // 2 * height // 2
        picture.paste(colour, (left, top, left + width // 2, top + height // 2))
    return picture


@pytest.mark.parametrize(
    "data",
    [
        make_jpeg(1, 1),
        encoded(WANTED, "JPEG", progressive=True),
        encoded(WANTED, "JPEG", quality=30, subsampling=0),
        encoded(WANTED.convert("L"), "JPEG"),
        encoded(WANTED, "JPEG", exif=b"Exif\0\0" + b"\xff" * 30),
    ],
    ids=["plain", "progressive", "4:4:4", "grey", "damaged EXIF"],
)
def test_a_jpeg_that_all_decoders_show_alike_stays_to_the_byte(data):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert convert(data, AS_IS) == data


@FORMS
@pytest.mark.parametrize("kind", ["adobe", "PNG", "GIF", "BMP", "TIFF", "WEBP", "P", "RGBA", "LA"])
def test_all_else_becomes_three_colours_of_eight_bits(kind, form):
    if kind == "adobe":
        data = encoded(quarters().convert("CMYK"), "JPEG", quality=95)
        assert b"Adobe" in data  # its inks are stored inverted
    elif kind in ("P", "RGBA", "LA"):
        picture = quarters().quantize(8) if kind == "P" else quarters().convert(kind)
        data = encoded(picture, "PNG")
    else:
        data = encoded(quarters(), kind)
    record = convert(data, form)
    assert record != data
    wanted = corners(np.asarray(quarters().convert("L").convert("RGB")))
    assert near(corners(pixels(record, form)), wanted if kind == "LA" else CORNERS, 8)


@FORMS
def test_a_png_of_16_bits_keeps_its_high_ones(form):
    grey = np.repeat(np.array([0x1020, 0xF0FF], np.uint16), 40)[None].repeat(80, axis=0)
    shown = pixels(convert(encoded(Image.fromarray(grey), "PNG"), form), form)
    side = shown.shape[1]
    assert near(shown[:, side // 4], 0x10, 3) and near(shown[:, -side // 4], 0xF0, 3)


def test_a_grey_picture_has_three_equal_colours_as_raw():
    shown = pixels(convert(encoded(WANTED.convert("L"), "JPEG"), RAW), RAW)
    assert np.ptp(shown, axis=2).max() == 0 and np.ptp(shown) > 50


@FORMS
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_turned_picture_is_stored_upright(turn, form):
    upright = quarters()
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,  # shown turned right, so stored turned left
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[turn]) if turn in undo else upright
    exif = Image.Exif()
    exif[_ORIENTATION] = turn
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    record = convert(data, form)
    assert near(corners(pixels(record, form)), CORNERS, 12)
    if not form.raw:
        with Image.open(io.BytesIO(record)) as again:
            assert again.getexif().get(_ORIENTATION, 1) == 1 or record == data
            assert again.width > again.height
    assert (record == data) == (turn == 1 and form is AS_IS)


@pytest.mark.parametrize(("size", "wanted"), [((200, 100), (96, 48)), ((90, 200), (48, 107))])
def test_the_short_side_is_shrunk_and_the_shape_kept(size, wanted):
    shown = pixels(convert(encoded(WANTED.resize(size), "JPEG"), SMALL))
    assert shown.shape[1::-1] == wanted
    reference = np.asarray(WANTED.resize(size).resize(wanted, Image.Resampling.BICUBIC), int)
    assert np.abs(shown - reference).mean() < 6


def test_small_pictures_are_magnified_for_raw_records_alone():
    data = encoded(quarters(20, 16), "PNG")
    assert pixels(convert(data, SMALL)).shape == (16, 20, 3)
    assert near(corners(pixels(convert(data, RAW), RAW)), CORNERS, 4)


def test_raw_records_are_the_middle_square():
    strip = Image.new("RGB", (300, 100), (255, 0, 0))
    strip.paste((0, 0, 255), (100, 0, 200, 100))
    shown = pixels(convert(encoded(strip, "PNG"), RAW), RAW)
    assert near(shown[:, 1:-1], (0, 0, 255), 0) and near(shown, (0, 0, 255), 30)


def test_pixels_of_idx_files_are_taken_as_grey():
    grey = np.arange(24 * 24, dtype=np.uint8).reshape(24, 24)
    assert np.array_equal(pixels(convert(grey, RAW), RAW), grey[:, :, None].repeat(3, axis=2))


@FORMS
def test_a_jpeg_whose_head_pillow_does_not_know_is_taken(form):
    """An APP0 of the word JFIF alone: every decoder shows it, Pillow cannot identify it."""
    whole = make_jpeg(1, 1, (60, 80))
    assert whole[2:4] == b"\xff\xe0"
    length = int.from_bytes(whole[4:6], "big")
    odd = whole[:2] + b"\xff\xe0\x00\x06JFIF" + whole[4 + length :]
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(io.BytesIO(odd))
    record = convert(odd, form)
    assert record == odd if form is AS_IS else record == convert(whole, form)
