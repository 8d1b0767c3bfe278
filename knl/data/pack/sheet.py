"""A picture of the pictures of a set, to see at a glance what was packed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image, ImageDraw

from knl.data.packed_set import Meta, Record, open_records
from knl.files import replace_file

_SIDE, _COLUMNS, _ROWS = 112, 10, 6
_CAPTION = 14


def draw_sheet(folder: Path, meta: Meta, path: Path) -> None:
    """Up to 60 pictures of as many classes as that, from the whole of the first split, with the
    names of their classes. Raises OSError where `path` cannot be written."""
    records = open_records(folder, meta, sorted(meta.splits)[0])
    places = np.linspace(0, len(records) - 1, min(len(records), _COLUMNS * _ROWS)).astype(int)
    rows = -(-len(places) // _COLUMNS)
    sheet = Image.new("RGB", (_COLUMNS * _SIDE, rows * (_SIDE + _CAPTION)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, record in enumerate(records.read(places)):
        left, top = number % _COLUMNS * _SIDE, number // _COLUMNS * (_SIDE + _CAPTION)
        caption = record.fault or meta.classes[record.label]
        try:
            picture = None if record.fault else _picture(record, meta)
        except ValueError:
            picture, caption = None, "does not decode"
        if picture is not None:
            picture.thumbnail((_SIDE - 4, _SIDE - 4))
            sheet.paste(picture, (left + 2, top + 2))
        pen.text((left + 2, top + _SIDE), caption[:18], fill="black")
    records.close()
    with replace_file(path) as file:
        sheet.save(file, "PNG")


def _picture(record: Record, meta: Meta) -> Image.Image:
    """Raises ValueError where it is none."""
    if meta.kind == "raw":
        return Image.frombytes("RGB", (meta.side, meta.side), bytes(record.data))
    return Image.fromarray(simplejpeg.decode_jpeg(record.data))
