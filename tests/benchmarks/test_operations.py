"""Counts of operations: what is counted, and what acting costs."""

from functools import partial

import pytest
import torch

from benchmarks.operations import count
from tests.support.agents import act, randomised, segment


def test_views_are_not_counted_and_arithmetic_is():
    x, w = torch.ones(3, 4), torch.ones(4, 5)
    operations, reads, gflop = count(lambda: (x.t().t() @ w).relu())
    assert (operations, reads) == (2, 0)
    assert gflop == pytest.approx(2 * 3 * 4 * 5 / 1e9)


def test_values_that_are_read_are_counted():
    assert count(lambda: torch.ones(3).sum().item())[:2] == (3, 1)


def test_the_rewards_of_all_steps_are_one_evaluation():
    """An action with a plan of three steps more costs less than three more rewards in each of the seven evaluations would."""
    obs = segment().obs[0, :1]
    agents = [randomised("difftori", horizon=steps) for steps in (2, 5)]
    short, long = (count(partial(act, agent, obs))[0] for agent in agents)
    layers = 5  # of the reward: three linear maps and two activations; as many again backwards
    dynamics = (long - short) / 3 / 7
    assert dynamics < 4 * layers, f"{short} and {long} operations"


def test_samples_of_mppi_cost_no_further_operations():
    obs = segment().obs[0, :1]
    agents = [randomised("tdmpc", samples=samples) for samples in (8, 64)]
    few, many = (count(partial(act, agent, obs))[0] for agent in agents)
    assert few == many
