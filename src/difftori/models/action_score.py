"""f(z, a), an MLP with ELU that scores actions, and its gradient with respect to the action in closed form."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.models.nets import mlp
from difftori.types import Actions, Rows


class ActionScore(nn.Sequential):
    """f([z, a]) for z (B known) and a (B size), with hidden layers of the widths `hidden`.

    A solve evaluates it at many actions of one z. `prepare` computes the first layer's part of z once, and `remainder` the rest.
    """

    def __init__(self, known: int, size: int, hidden: Sequence[int]):
        super().__init__(*mlp((known + size, *hidden, 1), nn.ELU))
        self.known = known

    def prepare(self, known: Tensor) -> Tensor:
        """The first layer's output (B W) for z and a = 0, before its activation."""
        first = self._linear()[0]
        return F.linear(known, first.weight[:, : self.known], first.bias)

    def remainder(self) -> "Remainder":
        """f as a function of prepared z and actions."""
        first, *middle, last = self._linear()
        weights = [first.weight[:, self.known :], *(layer.weight for layer in middle)]
        return Remainder(weights, [layer.bias for layer in middle], last, -last.weight.t() * weights[-1])

    def _linear(self) -> list[nn.Linear]:
        return [layer for layer in self if isinstance(layer, nn.Linear)]


class Remainder(NamedTuple):
    """f for prepared z (B W) and actions (B size).

    `weights` of the hidden layers, of the first those for the actions; `biases` of all but the first; the `last` layer. `slopes`:
    the last of `weights`, each row multiplied by minus its unit's weight in the last layer.
    """

    weights: list[Tensor]
    biases: list[Tensor]
    last: nn.Linear
    slopes: Tensor

    def split(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The prepared z, and the numbers that were appended to it."""
        width = self.weights[0].shape[0]
        return state[..., :width], state[..., width:]

    def value(self, prepared: Tensor, action: Actions) -> Rows:
        """f (B)."""
        return self.last(self._hidden(prepared, action)[-1]).squeeze(-1)

    def cost_and_grad(self, prepared: Tensor, action: Actions) -> tuple[Rows, Actions]:
        """−f (B), and its gradient with respect to the actions (B size).

        Both can be differentiated as usual, with fewer operations than differentiating f twice.
        """
        *hidden, top = self._hidden(prepared, action)
        grad = _elu_slope(top) @ self.slopes
        for weight, below in zip(reversed(self.weights[:-1]), reversed(hidden), strict=True):
            grad = (grad * _elu_slope(below)) @ weight
        return -self.last(top).squeeze(-1), grad

    def _hidden(self, prepared: Tensor, action: Actions) -> list[Tensor]:
        """The outputs of the hidden layers."""
        hidden = [F.elu(torch.addmm(prepared, action, self.weights[0].t()))]
        for weight, bias in zip(self.weights[1:], self.biases, strict=True):
            hidden.append(F.elu(F.linear(hidden[-1], weight, bias)))
        return hidden


def _elu_slope(output: Tensor) -> Tensor:
    """The derivative of ELU, given its output: 1 above zero, output + 1 = exp(input) below."""
    return (output + 1).clamp_max(1.0)
