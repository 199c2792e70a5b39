"""Reads columns of numbers from parquet files: lists of one length. Pickled objects are refused."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftori.data.formats._source import need
from difftori.errors import DataError

_FAULTS = (OSError, ValueError, RuntimeError, TypeError, KeyError, NotImplementedError, MemoryError)


def read_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[list[Any]]:
    """Iterate over these columns as Arrow arrays, in this order, `rows` rows at a time.

    Raises DataError if the file cannot be read or lacks a column.
    """
    parquet = need("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path}: no column {missing[0]!r}; there are {', '.join(file.schema_arrow.names)}. Fix: create the data set again"
                )
            for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
                yield [batch.column(name) for name in columns]
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(
            f"{path}: no readable parquet file ({error}); it is truncated or damaged. Fix: restore it"
        ) from error


def has_column(path: Path, name: str) -> bool:
    """Return whether the file has this column. Raises DataError if it cannot be read."""
    parquet = need("pyarrow.parquet")
    try:
        return name in parquet.read_schema(path).names
    except _FAULTS as error:
        raise DataError(
            f"{path}: no readable parquet file ({error}); it is truncated or damaged. Fix: restore it"
        ) from error


def as_numbers(column: Any, shape: tuple[int, ...], place: str) -> np.ndarray:
    """Convert an Arrow array of nested lists to numbers (B …), each of this `shape`.

    Raises DataError for values that are not numbers, missing values, and lists of a different length.
    """
    pa = need("pyarrow")
    count, sizes = len(column), []
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    while (
        pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type)
    ):
        lengths = set(need("pyarrow.compute").list_value_length(column).unique().to_pylist())
        if len(lengths) > 1 or None in lengths:
            raise DataError(
                f"{place} contains lists of the lengths {sorted(lengths, key=str)}; all must have one length"
            )
        sizes.append(lengths.pop() if lengths else 0)
        column = column.flatten()
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{place} holds {kind}; only plain numbers are read, pickled objects never. Fix: omit this key")
    if column.null_count:
        raise DataError(
            f"{place} lacks {column.null_count} of {len(column)} values. Fix: create the data set again without gaps"
        )
    if (tuple(sizes) or shape) != shape or len(column) != count * int(np.prod(shape, dtype=np.int64)):
        raise DataError(
            f"{place} has steps of shape {tuple(sizes)}, but meta/info.json has {shape}. Fix: create the data set again"
        )
    return column.to_numpy(zero_copy_only=False).reshape(count, *shape)
