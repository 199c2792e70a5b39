"""Traces a program with free rows, through the solver and its derivatives."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from difftori.errors import ExportError, first_line
from difftori.export.noise import Draw, noise, noise_inputs, supplied
from difftori.export.programs import Program
from difftori.solver.host_reads import all_steps

_ROWS = 97
"""Rows of the example, or the next number that is no size of the inputs: torch takes equal sizes for the same one."""


def trace(program: Program, draws: Sequence[Draw], names: Sequence[str]) -> tuple[Any, list[str], list[str]]:
    """Trace the function. Returns the exported program, the names of its outputs, and those of the inputs that it uses."""
    from torch.fx.experimental.proxy_tensor import make_fx  # imported here because it takes a second

    sizes = {size for entry in program.inputs.values() for size in entry.shape} | {*noise_inputs(draws).values()}
    count = next(number for number in itertools.count(_ROWS) if number not in sizes)
    example = {**program.example(count, torch.Generator()), **noise(draws, count, torch.Generator())}
    outputs: list[str] = []

    def positional(*values: Tensor) -> list[Tensor]:
        made = supplied(program, draws, dict(zip(names, values, strict=True)))
        outputs[:] = list(made)
        return [value.detach() for value in made.values()]

    try:
        with all_steps(), _without_mkldnn():
            graph = make_fx(positional, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
                *(example[name] for name in names)
            )
        graph.graph.eliminate_dead_code()
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        used = [name for name, node in zip(names, given, strict=True) if node.users]
        dropped = {name.removeprefix("last_") for name in names if name.startswith("last_") and name not in used}
        _keep_outputs(graph, [name not in dropped for name in outputs])
        for name, node in zip(names, given, strict=True):
            if name not in used:
                graph.graph.erase_node(node)
        graph.recompile()
        rows = torch.export.Dim("rows", min=1)
        free = tuple(None if name.endswith("shared") else {0: rows} for name in used)
        exported = torch.export.export(graph, tuple(example[name] for name in used), dynamic_shapes=free)
    except (RuntimeError, ValueError) as error:
        raise ExportError(
            f"{program.name}: it cannot be exported, because it decides by values or by the number of rows: {first_line(error)}. "
            "Fix: choose a solver with a fixed number of steps"
        ) from error
    return exported, [name for name in outputs if name not in dropped], used


@contextmanager
def _without_mkldnn() -> Iterator[None]:
    """Trace operations of torch, not of MKLDNN: other runtimes do not have its recurrent layers."""
    enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = enabled


def _keep_outputs(graph: Any, keep: Sequence[bool]) -> None:
    end = next(node for node in graph.graph.nodes if node.op == "output")
    end.args = ([value for value, kept in zip(end.args[0], keep, strict=True) if kept],)
    graph.graph.eliminate_dead_code()


def described(program: Program, draws: Sequence[Draw], used: Sequence[str]) -> dict[str, Any]:
    """Shape, type and meaning of each input, as plain values."""
    entries = {name: {"shape": ["rows", *entry.shape], "dtype": entry.dtype} for name, entry in program.inputs.items()}
    for name, count in noise_inputs(draws).items():
        law = "standard normal" if name.startswith("normal") else "uniform in [0, 1)"
        entries[name] = {
            "shape": [count] if name.endswith("shared") else ["rows", count],
            "dtype": "float32",
            "random": law,
        }
    return {name: entries[name] for name in used}
