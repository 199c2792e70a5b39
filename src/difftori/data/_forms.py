"""The form in which an entry is stored: uint8 images (height width C), or float32."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import numpy as np
import torch

_CHANNELS = (1, 3, 4)
_MASK_SIDE, _DEPTH_SIDE = 16, 33
"""Smallest sides of an array (height width) that is taken for an image: of bytes or truth values, and of floats."""


@final
@dataclass(frozen=True)
class Form:
    """How the steps of an entry are stored: with this `shape`, as bytes or as float32.

    `channels_last`: the data have the channels first, and are transposed. `scale`: bytes are the data multiplied by it. None:
    float32.
    """

    shape: tuple[int, ...]
    scale: int | None = None
    channels_last: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the stored steps."""
        return torch.float32 if self.scale is None else torch.uint8

    @property
    def rule(self) -> str:
        """What the values of images must be, for messages."""
        if self.scale == 1:
            return (
                "the first steps are images, so all values must be whole numbers from 0 to 255. Fix: correct the value"
            )
        return "the first steps are images from 0 to 1, so all values must be in this range. Fix: correct the value"

    def arranged(self, block: np.ndarray) -> np.ndarray:
        """Return a block (L …) of the data with the channels last."""
        return np.moveaxis(block, 1, -1) if self.channels_last else block

    def misfits(self, block: np.ndarray) -> np.ndarray:
        """Return a mask of the values that images cannot have."""
        if block.dtype == np.uint8:
            return np.zeros(block.shape, bool)
        return ~_whole_bytes(block) if self.scale == 1 else ~_in_unit(block)

    def converted(self, block: np.ndarray) -> np.ndarray:
        """Return the values in the stored dtype."""
        if self.scale is None:
            return np.ascontiguousarray(block, dtype=np.float32)
        block = block if self.scale == 1 else np.rint(block * self.scale)
        return np.ascontiguousarray(block, dtype=np.uint8)


def choose_form(blocks: Iterator[np.ndarray], shape: tuple[int, ...]) -> tuple[list[np.ndarray], Form]:
    """Choose the form of an entry by its first blocks. Returns these blocks, too.

    Bytes of two dimensions or more are images. So are colour images of floats: integers from 0 to 255, or multiples of 1/255
    from 0 to 1. Values of 0.0 and 1.0 only are a mask, and remain float32. Arrays (height width) of bytes, truth values, or
    floats of at least 33 × 33 get a dimension of one channel; channels that come first are put last.
    """
    read: list[np.ndarray] = []
    form = Form(shape)
    for block in blocks:
        read.append(block)
        if len(read) == 1:
            form = _arrangement(block, shape)
        colour = len(form.shape) == 3 and form.shape[2] == 3
        if block.dtype == np.uint8 and len(shape) > 1:
            return read, Form(form.shape, 1, form.channels_last)
        if block.dtype.kind != "f" or not colour or not block.size:
            return read, form
        if _whole_bytes(block).all():
            if block.max() > 1:
                return read, Form(form.shape, 1, form.channels_last)
            continue  # only 0 and 1 so far: a mask, or the dark beginning of something else
        return read, Form(form.shape, 255, form.channels_last) if _holds_255ths(block) else form
    return read, form


def _arrangement(block: np.ndarray, shape: tuple[int, ...]) -> Form:
    if len(shape) == 2:
        least = _MASK_SIDE if block.dtype == np.uint8 or block.dtype.kind == "b" else _DEPTH_SIDE
        return Form((*shape, 1)) if min(shape) >= least else Form(shape)
    if len(shape) == 3 and shape[0] in _CHANNELS and shape[2] not in _CHANNELS:
        return Form((*shape[1:], shape[0]), channels_last=True)
    return Form(shape)


def _whole_bytes(block: np.ndarray) -> np.ndarray:
    """Return a mask of the values that are whole numbers from 0 to 255."""
    return (block >= 0) & (block <= 255) & (block == np.rint(block))


def _holds_255ths(block: np.ndarray) -> bool:
    """Return whether all values are multiples of 1/255 from 0 to 1, up to the rounding of their dtype."""
    if not _in_unit(block).all():
        return False
    scaled = block.astype(np.float64) * 255
    return bool((np.abs(scaled - np.rint(scaled)) < (0.1 if block.dtype.itemsize == 2 else 1e-2)).all())


def _in_unit(block: np.ndarray) -> np.ndarray:
    return (block >= 0) & (block <= 1)
