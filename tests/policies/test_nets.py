"""The shared layers."""

import pytest
import torch
from torch import nn

from difftori.errors import ShapeError
from difftori.models.nets import mlp


def test_layers_stand_in_order_and_the_last_is_bare():
    kinds = [type(layer) for layer in mlp((3, 5, 7, 2), nn.ELU)]
    assert kinds == [nn.Linear, nn.ELU, nn.Linear, nn.ELU, nn.Linear]
    kinds = [type(layer) for layer in mlp((3, 5, 2), nn.Mish, layer_norm=True)]
    assert kinds == [nn.Linear, nn.LayerNorm, nn.Mish, nn.Linear]


def test_leading_dimensions_are_kept():
    assert mlp((3, 4, 2))(torch.zeros(6, 5, 3)).shape == (6, 5, 2)
    assert [type(layer) for layer in mlp((3, 2))] == [nn.Linear]


@pytest.mark.parametrize("sizes", [(3,), (3, 0, 2), ()])
def test_sizes_that_make_no_network_are_refused(sizes):
    with pytest.raises(ShapeError, match="input and an output"):
        mlp(sizes)
