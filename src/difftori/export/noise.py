"""Random numbers of an exported function: they become inputs, so that the file computes the same as the original."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from difftori.errors import ExportError
from difftori.export.programs import Program, Tensors
from difftori.types import Count

Kind: TypeAlias = Literal["normal", "uniform"]
"""Standard normal numbers, or numbers from 0 to 1."""


@dataclass(frozen=True)
class Draw:
    """Random numbers that the function draws: the shape of one row, and which dimension the rows are, or None for one draw for all rows."""

    kind: Kind
    shape: tuple[int, ...]
    rows: int | None

    @property
    def input(self) -> str:
        """The name of the input that they are taken from."""
        return self.kind if self.rows is not None else f"{self.kind}_shared"


_KINDS: dict[Any, Kind] = {torch.randn: "normal", torch.rand: "uniform"}


class _Drawing(TorchFunctionMode):
    """Calls `draw(kind, shape)` in place of torch's functions with a generator."""

    def __init__(self, draw: Callable[[Kind, tuple[Count, ...]], Tensor]):
        super().__init__()
        self._draw = draw

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (kwargs or {}).get("generator") is None:
            return func(*args, **(kwargs or {}))
        if func not in _KINDS:
            raise ExportError(f"random numbers of torch.{func.__name__} cannot be exported")
        shape = args[0] if isinstance(args[0], tuple | list) else args
        return self._draw(_KINDS[func], tuple(shape))


def draws_of(program: Program) -> list[Draw]:
    """The random numbers that the function draws, in order. Their rows are found by two calls of different numbers of rows.

    Raises ExportError for random numbers that cannot become inputs.
    """
    draws: list[Draw] = []
    for (kind, two), (other, three) in zip(_calls(program, 2), _calls(program, 3), strict=True):
        places = [i for i, sizes in enumerate(zip(two, three, strict=True)) if sizes == (2, 3)]
        if kind != other or len(places) > 1:
            raise ExportError(f"{program.name}: random numbers of shape {two} cannot be exported")
        shape = tuple(size for i, size in enumerate(two) if i not in places)
        draws.append(Draw(kind, shape, places[0] if places else None))
    return draws


def _calls(program: Program, rows: int) -> list[tuple[Kind, tuple[int, ...]]]:
    """The kinds and shapes of the random numbers that one call draws."""
    calls: list[tuple[Kind, tuple[int, ...]]] = []

    def draw(kind: Kind, shape: tuple[Count, ...]) -> Tensor:
        calls.append((kind, tuple(int(size) for size in shape)))
        return torch.randn(shape) if kind == "normal" else torch.rand(shape)

    inputs = program.example(rows, torch.Generator())
    with _Drawing(draw):
        program.function(inputs, torch.Generator())
    return calls


def noise_inputs(draws: Sequence[Draw]) -> dict[str, int]:
    """The inputs for random numbers, and how many numbers each has (for every row)."""
    sizes: dict[str, int] = {}
    for draw in draws:
        sizes[draw.input] = sizes.get(draw.input, 0) + int(torch.Size(draw.shape).numel())
    return sizes


def noise(draws: Sequence[Draw], rows: int, generator: torch.Generator) -> Tensors:
    """Random numbers for all these inputs."""
    made: Tensors = {}
    for name, count in noise_inputs(draws).items():
        sample = torch.randn if name.startswith("normal") else torch.rand
        made[name] = sample((count,) if name.endswith("shared") else (rows, count), generator=generator)
    return made


def supplied(program: Program, draws: Sequence[Draw], inputs: Tensors) -> Tensors:
    """Call the function with the random numbers that `inputs` contains."""
    taken = dict.fromkeys(noise_inputs(draws), 0)
    left = list(draws)

    def draw(kind: str, shape: tuple[Count, ...]) -> Tensor:
        own = left.pop(0)
        begin, count = taken[own.input], int(torch.Size(own.shape).numel())
        taken[own.input] += count
        part = inputs[own.input][..., begin : begin + count].unflatten(-1, own.shape or (1,))
        part = part if own.shape else part.squeeze(-1)
        return part if own.rows is None else part.movedim(0, own.rows)

    with _Drawing(draw):
        return program.function(inputs, torch.Generator())
