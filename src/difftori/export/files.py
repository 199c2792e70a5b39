"""Writes and reads exported files: ONNX, and PyTorch's own format."""

import importlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from difftori.errors import ExportError, MissingExtraError
from difftori.export.programs import Tensors

Format: TypeAlias = Literal["onnx", "pt2"]
"""`onnx`: for ONNX Runtime and others. `pt2`: for `torch.export.load`."""
Call: TypeAlias = Callable[[Tensors], Tensors]


def _write_onnx(traced: Any, used: Sequence[str], outputs: Sequence[str], about: dict[str, Any], path: Path) -> None:
    _import_onnx()
    with warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")  # of torch's exporter about itself
        traced = traced.run_decompositions({torch.ops.aten.searchsorted.Tensor: _searchsorted})
        program = torch.onnx.export(
            traced, dynamo=True, input_names=list(used), output_names=list(outputs), verbose=False, optimize=False
        )  # ONNX Runtime optimises; torch's optimiser can write an invalid graph, where a clamp follows several times
    assert program is not None
    program.model.metadata_props["difftori"] = json.dumps(about)
    program.save(path)


def _searchsorted(ends: Tensor, values: Tensor) -> Tensor:
    """`torch.searchsorted` of sorted rows (B K) and values (B M) by bisection: ONNX has no such operator."""
    count, index = ends.shape[-1], torch.zeros_like(values, dtype=torch.long)
    step = 1 << (count.bit_length() - 1)
    while step:
        further = index + step
        below = ends.gather(-1, further.clamp_max(count) - 1) < values
        index = torch.where((further <= count) & below, further, index)
        step >>= 1
    return index


def _read_onnx(path: Path, used: Sequence[str], outputs: Sequence[str]) -> Call:
    runtime = _import_onnx()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only: it warns of constants that it does not fold
    try:
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors share no other class
        raise ExportError(f"ONNX Runtime refuses the file: {error}. Fix: --format pt2") from error

    def call(inputs: Tensors) -> Tensors:
        found = session.run(list(outputs), {name: inputs[name].numpy() for name in used})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, found, strict=True)}

    return call


def _import_onnx() -> Any:
    """Import ONNX Runtime, and what torch needs to write ONNX."""
    try:
        for name in ("onnx", "onnxscript"):
            importlib.import_module(name)
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError(
            f"ONNX needs {error.name}. Fix: pip install 'difftori[onnx]', or use --format pt2"
        ) from error


def _write_pt2(traced: Any, used: Sequence[str], outputs: Sequence[str], about: dict[str, Any], path: Path) -> None:
    torch.export.save(traced, path, extra_files={"about.json": json.dumps(about)})


def _read_pt2(path: Path, used: Sequence[str], outputs: Sequence[str]) -> Call:
    module = torch.export.load(path).module()

    def call(inputs: Tensors) -> Tensors:
        return dict(zip(outputs, module(*(inputs[name] for name in used)), strict=True))

    return call


WRITERS = {"onnx": _write_onnx, "pt2": _write_pt2}
READERS = {"onnx": _read_onnx, "pt2": _read_pt2}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the log lines of torch's exporter about packages that it does not find."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
