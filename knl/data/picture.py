"""One picture from its record to what a network reads: decode, crop, resize, mirror, normalise.

The compiled part (knl/native/picture.cpp) does what comes after libjpeg-turbo, in one pass.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from knl.data.views import View
from knl.native import load_kernels

# Mean and spread of ImageNet's red, green and blue, of 255: what published recipes subtract and
# divide by.
MEAN = 255 * np.array([0.485, 0.456, 0.406], dtype=np.float32)
SPREAD = 255 * np.array([0.229, 0.224, 0.225], dtype=np.float32)
# A picture is decoded smaller only as long as the view of it has so many times the pixels a side
# that are wanted: more than that cannot be told from antialiasing all of it (within a level).
_GAP = 2
_SCALES = (8, 4, 2)
LEAST_SIDE = 4  # knl/native/picture.cpp makes so many rows together


def decode(data: Any, view: View, size: int) -> NDArray[Any]:
    """A JPEG as uint8 [height, width, 3]; smaller by 2, 4 or 8 where `view` of it is much larger
    than `size` pixels a side. Raises ValueError for what is not a whole JPEG."""
    height, width = view.height, view.width
    side = min(view.box[2], view.box[3])
    for scale in _SCALES:
        if side >= scale * _GAP * size:
            return simplejpeg.decode_jpeg(
                data,
                min_height=-(-height // scale),
                min_width=-(-width // scale),
                min_factor=scale,
            )
    return simplejpeg.decode_jpeg(data)


def size_of(data: Any) -> tuple[int, int]:
    """Height and width that a JPEG's header says. Raises ValueError."""
    height, width, *_ = simplejpeg.decode_jpeg_header(data)
    return height, width


def show(picture: NDArray[Any], view: View, out: NDArray[Any]) -> None:
    """Fill `out`, float32 [size, size, 3], with the view of a picture, uint8 [height, width, 3]
    (which may have been decoded smaller), of zero mean and unit spread over ImageNet."""
    rows, columns = picture.shape[:2]
    # A picture whose side the scale does not divide has a part of a pixel more.
    scale = next(s for s in (1, *reversed(_SCALES)) if -(-view.height // s) == rows)
    box = (ctypes.c_double * 4)(*(value / scale for value in view.box))
    colours = view.colours
    factor, shift = _PLAIN if colours is None else _AS_IT_IS
    _kernels().knl_picture_resize(
        picture.ctypes.data, rows, columns, box, len(out), view.flip, factor, shift, out.ctypes.data
    )
    if colours is not None:
        pixels = out.reshape(-1, 3)
        matrix, offset = colours.resolve(pixels.mean(axis=0))
        matrix, offset = matrix / SPREAD[:, None], (offset - MEAN) / SPREAD
        _kernels().knl_picture_colour(
            out.ctypes.data, len(pixels), _floats(matrix), _floats(offset)
        )


def _floats(values: NDArray[Any]) -> Any:
    return (ctypes.c_float * values.size)(*values.ravel().tolist())


_PLAIN = _floats(1 / SPREAD), _floats(-MEAN / SPREAD)
_AS_IT_IS = _floats(np.ones(3)), _floats(np.zeros(3))


@cache
def _kernels() -> ctypes.CDLL:
    kernels = load_kernels()
    pointer, count = ctypes.c_void_p, ctypes.c_int64
    kernels.knl_picture_resize.argtypes = [
        pointer, count, count, pointer, count, ctypes.c_int32, pointer, pointer, pointer,
    ]  # fmt: skip
    kernels.knl_picture_resize.restype = None
    kernels.knl_picture_colour.argtypes = [pointer, count, pointer, pointer]
    kernels.knl_picture_colour.restype = None
    return kernels
