"""Columns of numbers out of parquet files: lists of one length, and never anything that would have to be unpickled."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from difftori.data.formats._source import need
from difftori.errors import DataError

_FAULTS = (OSError, ValueError, RuntimeError, TypeError, KeyError, NotImplementedError, MemoryError)


def read_batches(path: Path, columns: Sequence[str], rows: int) -> Iterator[list[Any]]:
    """Arrow arrays of these columns, in this order, so many `rows` at a time.

    Raises DataError if the file cannot be read or lacks a column.
    """
    parquet = need("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            missing = [name for name in columns if name not in file.schema_arrow.names]
            if missing:
                raise DataError(
                    f"{path}: no column {missing[0]!r}; there are {', '.join(file.schema_arrow.names)}. Make the data anew"
                )
            for batch in file.iter_batches(batch_size=rows, columns=list(columns)):
                yield [batch.column(name) for name in columns]
    except DataError:
        raise
    except _FAULTS as error:
        raise DataError(f"{path}: no readable parquet ({error}); it is truncated or damaged: restore it") from error


def as_numbers(column: Any, shape: tuple[int, ...], place: str) -> np.ndarray:
    """An Arrow array of nested lists as numbers (B …) of this `shape` each.

    Raises DataError for anything but numbers, for missing values, and for lists of another length.
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
            raise DataError(f"{place} holds lists of the lengths {sorted(lengths, key=str)}; all must have one length")
        sizes.append(lengths.pop() if lengths else 0)
        column = column.flatten()
    kind = column.type
    if not (pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"{place} holds {kind}; only plain numbers are read, and pickled objects never: leave it out")
    if column.null_count:
        raise DataError(f"{place} lacks {column.null_count} of {len(column)} values; make the data anew without gaps")
    if (tuple(sizes) or shape) != shape or len(column) != count * int(np.prod(shape, dtype=np.int64)):
        raise DataError(f"{place} holds steps of shape {tuple(sizes)}, and meta/info.json says {shape}; make it anew")
    return column.to_numpy(zero_copy_only=False).reshape(count, *shape)
