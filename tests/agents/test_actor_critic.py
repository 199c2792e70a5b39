"""n-step transitions by hand, and the Bellman error of agents without a model."""

import pytest
import torch

from difftori.agents.actor_critic import bellman_loss, n_step
from tests.support.agents import PIXELS, STATES, segment

GAMMA = 0.9


def by_hand():
    """Three steps of three rows: whole, terminated at the last step, and an episode of two steps that was truncated."""
    batch = segment(rows=3)
    batch.terminated[2, 1] = True
    batch.mask[2, 2] = 0
    batch.rewards[2, 2] = 0
    batch.obs[3, 2] = batch.obs[2, 2]
    return batch


def test_rewards_are_summed_and_discounted_over_the_recorded_steps():
    batch = by_hand()
    found, r = n_step(batch, GAMMA), batch.rewards
    whole = r[0] + GAMMA * r[1] + GAMMA**2 * r[2]
    torch.testing.assert_close(found.rewards, torch.stack([whole[0], whole[1], r[0, 2] + GAMMA * r[1, 2]]))
    # the third row bootstraps after two steps, not three; the second not at all
    torch.testing.assert_close(found.discounts, torch.tensor([GAMMA**3, 0.0, GAMMA**2]))
    assert torch.equal(found.obs, batch.obs[0])
    assert torch.equal(found.actions, batch.actions[0])
    assert torch.equal(found.next_obs[:2], batch.obs[3, :2])
    assert torch.equal(found.next_obs[2], batch.obs[2, 2])


def test_a_short_episode_that_terminated_has_no_next_value():
    batch = by_hand()
    batch.terminated[1, 2] = True
    assert n_step(batch, GAMMA).discounts[2] == 0


@pytest.mark.parametrize("spec", [STATES, PIXELS], ids=["state", "pixels"])
def test_one_step_is_the_ordinary_transition(spec):
    batch = segment(spec, steps=1)
    found = n_step(batch, GAMMA)
    assert torch.equal(found.rewards, batch.rewards[0])
    assert torch.equal(found.next_obs, batch.obs[1])
    torch.testing.assert_close(found.discounts, torch.full((8,), GAMMA))


def test_the_loss_is_weighted_and_its_priorities_are_the_errors():
    q = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    loss, priorities = bellman_loss(q, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 0.5]))
    assert loss.item() == pytest.approx(((1 + 1) * 1.0 + (1 + 1) * 0.5) / 2)
    assert priorities.tolist() == [1.0, 1.0]
