"""Converts observations of your own loop to those that a policy or agent was trained with: types, units and layouts of images."""

from dataclasses import astuple
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from difftori.errors import NonFiniteError, ShapeError
from difftori.types import EntrySpec

Array: TypeAlias = np.ndarray | Tensor


def as_array(name: str, values: Array) -> np.ndarray:
    """Convert to numpy. Raises NonFiniteError for NaN or Inf, and ShapeError for what is no array of numbers."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    try:
        array = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise ShapeError(f"obs: {name} is no array of numbers ({error}). Fix: give one array") from error
    if array.dtype.kind not in "biuf":
        raise ShapeError(f"obs: {name} has type {array.dtype}. Fix: give numbers")
    if not np.isfinite(array).all():
        raise NonFiniteError(f"obs: NaN or Inf in {name}. Fix: check the sensor")
    return array


def as_recorded(name: str, values: np.ndarray, entry: EntrySpec, *, stacked: bool, parts: str) -> np.ndarray:
    """Convert rows (B …) to the environment's convention: float32, or uint8 images with channels first.

    `stacked`: images are an agent's stacked frames. `parts`: the arrays that were concatenated to it, for the message.
    """
    if entry.dtype != "uint8":
        if len(entry.shape) == 3 and values.shape[1:] == (entry.shape[2], *entry.shape[:2]) != entry.shape:
            values = values.transpose(0, 2, 3, 1)
        if values.shape[1:] != entry.shape:
            made = f", which is {parts}" if parts else ""
            raise ShapeError(f"obs: {name} has shape {values.shape[1:]}, not {entry.shape}{made}. Fix: give that shape")
        with np.errstate(over="ignore"):
            converted = values.astype(np.float32)
        if len(entry.shape) == 3 and _unit_images(entry):
            if values.dtype == np.uint8:
                converted /= 255.0
            elif entry.shape[2] == 3 and values.max() > _BEYOND_UNIT:
                raise ShapeError(
                    f"obs: {name} is {values.dtype} up to {values.max():g}, but was recorded as floating-point numbers in [0, 1]. Fix: "
                    "give these, or uint8"
                )
        if not np.isfinite(converted).all():
            raise NonFiniteError(f"obs: {name} has numbers beyond those of float32. Fix: check the sensor")
        return converted
    if values.dtype != np.uint8:
        if not np.issubdtype(values.dtype, np.floating) or values.min() < 0 or values.max() > 1:
            raise ShapeError(
                f"obs: {name}, an image, is {values.dtype} from {values.min():g} to {values.max():g}. Fix: give uint8 "
                "(images.astype(numpy.uint8) if they are floating-point from 0 to 255), or floating-point numbers in [0, 1]"
            )
        values = np.rint(values * 255.0).astype(np.uint8)
    return _channels_first(name, values, entry.shape, stacked)


_BEYOND_UNIT = 1.5
"""Images with larger numbers are not in [0, 1]; resampling may overshoot a little."""


def _unit_images(entry: EntrySpec) -> bool:
    """Whether the recorded images were floating-point in [0, 1], but no masks of 0 and 1."""
    if entry.moments is None:
        return False
    low, high, mean, std = (np.array(numbers) for numbers in astuple(entry.moments))
    # Numbers from 0 to 1 vary as much only if each is 0 or 1.
    masks = np.allclose(std**2, mean * (1.0 - mean), atol=1e-4)
    return bool((low >= 0.0).all() and (high <= 1.0).all() and not masks)


def _is_frame(frame: int, stack: int) -> bool:
    """Whether an image of `frame` channels is one frame of a stack of `stack` channels. Frames of long stacks are RGB if they can be."""
    return frame == 3 if stack > 4 and stack % 3 == 0 else stack % frame == 0


def _channels_first(name: str, images: np.ndarray, shape: tuple[int, ...], stacked: bool) -> np.ndarray:
    """Convert images of any layout that fits `shape`: (height width C), or (count·C height width) of stacked frames."""
    channels, height, width = shape if stacked else (shape[2], *shape[:2])
    for image in (images, images.transpose(0, 3, 1, 2)):
        if image.shape[2:] == (height, width) and (
            image.shape[1] == channels or (stacked and _is_frame(image.shape[1], channels))
        ):
            return image
    raise ShapeError(f"obs: {name} has shape {images.shape[1:]}, not {shape}. Fix: give images of that size")
