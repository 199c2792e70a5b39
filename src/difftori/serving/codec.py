"""Messages of openpi's wire protocol: msgpack, with a map of four entries for each numpy array. Nothing in a message is executed.

An array is `{b"__ndarray__": True, b"data": its bytes, b"dtype": such as "<f4", b"shape": [2, 3]}`, a numpy number
`{b"__npgeneric__": True, b"data": the number, b"dtype": …}`. Only real numbers and booleans are sent and read.
"""

import math
from typing import Any

import numpy as np

from difftori.errors import MissingExtraError, ServingError

_ARRAY, _NUMBER, _DATA, _DTYPE, _SHAPE = b"__ndarray__", b"__npgeneric__", b"data", b"dtype", b"shape"
_KINDS = "biuf"
_DTYPES = {
    f"{order}{kind}{size}"
    for kind, sizes in {"b": (1,), "i": (1, 2, 4, 8), "u": (1, 2, 4, 8), "f": (2, 4, 8)}.items()
    for size in sizes
    for order in "<>|="
}
_DIMENSIONS = 16


def pack(value: Any) -> bytes:
    """Encode a tree of dictionaries, lists, texts, numbers and numpy arrays.

    Raises ServingError for anything else, arrays of objects included, and MissingExtraError without msgpack.
    """
    try:
        import msgpack
    except ImportError as error:
        raise missing_extra(error) from error
    try:
        return bytes(msgpack.packb(value, default=_encoded) or b"")
    except (TypeError, ValueError, OverflowError) as error:
        raise ServingError(f"cannot be sent: {error}. Fix: send arrays of numbers") from error


def unpack(message: bytes) -> Any:
    """Decode a message; arrays are writable copies in native byte order.

    Raises ServingError if the message is not exactly one value of this protocol, and MissingExtraError without msgpack.
    """
    try:
        import msgpack
    except ImportError as error:
        raise missing_extra(error) from error
    try:
        return msgpack.unpackb(message, object_hook=_decoded, ext_hook=_no_extension)
    # what msgpack raises is of many types, RecursionError among them for deep nesting
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ServingError(f"malformed message: {reason[:200]}. Fix: send msgpack as openpi-client does") from error


def missing_extra(error: ImportError) -> MissingExtraError:
    """The error for a package of the extra `serve` that is not installed."""
    return MissingExtraError(
        f"serving: the package {error.name!r} is not installed. Fix: pip install 'difftori[serve]'"
    )


def _encoded(value: Any) -> dict[bytes, Any]:
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind not in _KINDS or value.dtype.str not in _DTYPES:
            raise TypeError(f"an array of type {value.dtype}")
        if isinstance(value, np.generic):
            return {_NUMBER: True, _DATA: value.item(), _DTYPE: value.dtype.str}
        return {_ARRAY: True, _DATA: value.tobytes(), _DTYPE: value.dtype.str, _SHAPE: value.shape}
    raise TypeError(f"a {type(value).__name__}")


def _decoded(entries: dict[Any, Any]) -> Any:
    if _ARRAY in entries:
        return _array(entries)
    return _number(entries) if _NUMBER in entries else entries


def _array(entries: dict[Any, Any]) -> np.ndarray:
    dtype = _dtype(entries)
    shape: Any = entries.get(_SHAPE)
    data: Any = entries.get(_DATA)
    if not isinstance(data, bytes) or not isinstance(shape, list) or len(shape) > _DIMENSIONS:
        raise ValueError("an array without its bytes, or without a list as its shape")
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError("an array with a shape that is not a list of lengths")
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array with {len(data)} bytes, which does not fit its shape and type")
    if dtype.kind == "b":
        return np.frombuffer(data, np.uint8).reshape(shape).astype(bool)
    return np.frombuffer(data, dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _number(entries: dict[Any, Any]) -> np.generic:
    dtype = _dtype(entries)
    value: Any = entries.get(_DATA)
    wanted = {"b": bool, "f": float}.get(dtype.kind, int)
    if type(value) is not wanted:
        raise ValueError(f"a number of type {dtype} that is a {type(value).__name__}")
    if dtype.kind in "iu" and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
        raise ValueError(f"a number beyond its type {dtype}")
    with np.errstate(over="ignore"):
        return dtype.newbyteorder("=").type(value)


def _dtype(entries: dict[Any, Any]) -> np.dtype:
    name = entries.get(_DTYPE)
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"an array of type {str(name)[:20]!r}, not one of real numbers")
    return np.dtype(name)


def _no_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"extension type {code}")
