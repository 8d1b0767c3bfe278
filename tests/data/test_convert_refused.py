"""Files that are no whole picture: each is refused with the reason, whatever is in it."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from knl.data.pack.convert import MOST_PIXELS, Form, Rejected, convert
from knl.data.synth import make_jpeg

from .sets import AS_IS, RAW, SMALL, encoded
from .test_convert import FORMS, WANTED, near, pixels


def reason(data, form=AS_IS):
    with pytest.raises(Rejected) as caught:
        convert(data, form)
    assert str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@FORMS
@pytest.mark.parametrize("cut", [3, 200, 0.5, -2])
def test_a_truncated_jpeg_is_refused(cut, form):
    data = make_jpeg(3, 0)
    reason(data[: int(cut * len(data)) if isinstance(cut, float) else cut], form)


@FORMS
def test_what_is_no_picture_is_refused(form):
    assert reason(b"", form) == "empty file"
    assert reason(b"<html>not found</html>", form) == "not a picture that Pillow knows"
    assert "pixels" in reason(np.empty((0, 28), np.uint8), form)
    assert "pixels" in reason(np.empty((28, 0), np.uint8), form)


@FORMS
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_bomb_is_refused_by_its_header(kind, form):
    side = 12_000
    assert side**2 > MOST_PIXELS
    if kind == "PNG":
        head = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head
        data += struct.pack(">I", zlib.crc32(head)) + encoded(WANTED, "PNG")[33:]
    else:
        data = bytearray(encoded(WANTED, "JPEG"))
        place = data.index(b"\xff\xc0") + 5
        data[place : place + 4] = struct.pack(">HH", side, side)
        data = bytes(data)
    assert reason(data, form) == f"{side} x {side} pixels: over {MOST_PIXELS}"


def test_strips_neither_take_all_memory_nor_more_than_a_jpeg_can_hold():
    strip = encoded(Image.new("RGB", (70_000, 1), (9, 9, 9)), "PNG")
    assert "65500" in reason(strip, AS_IS) and "65500" in reason(strip, SMALL)
    big = Form(True, 256, 90)  # at full length it would be 14 GB
    assert near(pixels(convert(strip, big), big), 9, 0)


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from([encoded(WANTED, kind) for kind in ("JPEG", "PNG", "GIF", "TIFF", "WEBP")]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
    st.floats(0, 1),
    st.sampled_from([AS_IS, SMALL, RAW]),
)
def test_damaged_files_become_records_or_a_reason(data, changes, share, form):
    data = bytearray(data)
    for place, value in changes:  # headers more than pixels
        data[int(place**3 * len(data))] = value
    try:
        record = convert(bytes(data[: max(1, int(share**0.1 * len(data)))]), form)
    except Rejected as why:
        assert str(why) and "\n" not in str(why)
    else:
        if form.raw:
            assert len(record) == form.side**2 * 3
        else:
            assert min(simplejpeg.decode_jpeg(record).shape) > 0
