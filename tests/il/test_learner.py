"""Updates of imitation through recordings: the same numbers as without. The package is walked, so new policies are tested too."""

import math
from dataclasses import replace

import pytest
import torch

from difftori.errors import NonFiniteError
from difftori.il.learner import Learner
from difftori.policies.normalized import NormalizedPolicy
from difftori.registry import find_policies
from difftori.runs.checkpoint import weights_digest
from tests.support.devices import rerun
from tests.support.specs import CLOUDS, ROWS, SMALL, VECTORS, build, demonstrations, with_base

SETTINGS = {"warmup": 2, "lr": 2.0**-10, "lr_schedule": "constant"}
"""A recorded learning rate is a float32 tensor, which these are exactly."""


def spec_of(name):
    return {"bc-pointnet": CLOUDS, "dp3": CLOUDS, "lstm": ROWS, "mpc": ROWS}.get(name, VECTORS)


def close(first, second):
    """The same weights up to the rounding of an EMA share in float32."""
    for ours, theirs in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def learn(name, *, recorded, updates=8, spoil=(), **settings):
    """Train on batches of two sizes, the last of each epoch smaller. `spoil`: updates whose actions are NaN."""
    torch.manual_seed(0)
    policy = build(find_policies()[name], spec_of(name), **{**SMALL.get(name, {}), **SETTINGS, **settings})
    replays = []

    def record(run, generators):
        """A replay sees the learning rate and everything else that is not a tensor as they were."""
        groups = learner.optimizer.param_groups
        repeat, outputs = rerun(run, generators)
        kept = [dict(group) for group in groups]

        def replay():
            replays.append(1)
            for group, old in zip(groups, kept, strict=True):
                group.update(old)
            repeat()

        return replay, outputs

    learner = Learner(policy, policy.policy.config, epochs=4, recorder=record if recorded else None)
    if recorded:
        learner._guard.waits = lambda device: False  # as on a GPU
    draw, rows = torch.Generator().manual_seed(1), []
    for update in range(updates):
        batch = with_base(policy, demonstrations(policy.spec, 3 if update % 3 == 2 else 6))
        if update in spoil:
            batch = replace(batch, actions=batch.actions * math.nan)
        learner.update(batch, draw)
        if update % 3 == 2:
            rows.append(learner.close_epoch())
    return learner, rows, len(replays)


@pytest.mark.parametrize("name", sorted({*find_policies()} - {"mpc"}))
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_recorded_updates_are_the_updates(name, ema):
    plain, rows, _ = learn(name, recorded=False, ema=ema)
    recorded, recorded_rows, replays = learn(name, recorded=True, ema=ema)
    assert replays == 6  # of 8: both sizes are recorded at their second update
    assert weights_digest(recorded.policy) == weights_digest(plain.policy)
    close(recorded.acting.policy, plain.acting.policy)
    assert recorded_rows == rows
    assert isinstance(recorded.optimizer.param_groups[0]["lr"], float)


def test_recorded_updates_pass_over_nan():
    plain, rows, _ = learn("residual", recorded=False, spoil=(0, 4, 5), ema=0.9)
    recorded, recorded_rows, _ = learn("residual", recorded=True, spoil=(0, 4, 5), ema=0.9)
    assert plain.skipped == recorded.skipped == 3
    assert [row["train/skipped"] for row in rows] == [1, 2]
    assert weights_digest(recorded.policy) == weights_digest(plain.policy)
    close(recorded.acting.policy, plain.acting.policy)
    assert recorded_rows == rows


def test_repeated_nan_ends_recorded_training_by_name():
    with pytest.raises(NonFiniteError, match=r"10 updates in a row .* gradients of .*weight"):
        learn("residual", recorded=True, updates=12, spoil=range(12))


def test_a_metric_that_is_not_finite_is_reported():
    learner, _, _ = learn("residual", recorded=False, updates=2)
    run = learner._learning.loss
    learner._learning.loss = lambda batch, *, generator: (
        run(batch, generator=generator)[0],
        {"odd": torch.tensor(math.nan)},
    )
    learner.update(with_base(learner._learning, demonstrations(VECTORS, 6)), torch.Generator())
    assert learner.close_epoch()["train/non_finite"] == pytest.approx(1 / 3)


def test_an_optimizer_that_cannot_skip_on_a_gpu_is_not_recorded():
    learner, _, _ = learn("mpc", recorded=False, updates=1)
    assert not learner._records(torch.device("cuda"))
    learner, _, _ = learn("residual", recorded=False, updates=1)
    assert learner._records(torch.device("cuda"))


class Odd(torch.nn.Module):
    """In place of a policy: gradients that are transposed, shared or expanded, and a loss and a metric of shape (1,)."""

    def __init__(self, chosen=None):
        super().__init__()
        self.a, self.b, self.c = (torch.nn.Parameter(torch.zeros(3, 2)) for _ in range(3))
        self.d, self.chosen, self.name = torch.nn.Parameter(torch.zeros(4)), chosen, "odd"

    def trainable(self, epoch):
        return self.parameters() if self.chosen is None else [getattr(self, name) for name in self.chosen]

    def loss(self, batch, *, generator):
        wanted = torch.tensor([[1.0, -1.0, 1.0], [1.0, 1.0, -1.0]])
        value = (self.a.t() * wanted).sum() + ((self.b + self.c) * wanted.t()).sum() + self.d.sum()
        return value.reshape(1), {"value": value.detach().reshape(1)}


@pytest.fixture
def odd():
    def make(**options):
        policy = Odd(**options)
        whole = NormalizedPolicy(build(find_policies()["bc"], VECTORS).policy)
        whole.policy, whole.loss = policy, policy.loss
        settings = find_policies()["residual"].Config(lr=0.5, clip_norm=1.0, lr_schedule="constant")
        return Learner(whole, settings, epochs=1)

    return make


@pytest.mark.usefixtures("unchecked")
def test_gradients_of_any_memory_layout_are_those_of_the_loss(odd):
    learner = odd()
    learner.update(demonstrations(VECTORS, 2), torch.Generator())
    wanted = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])
    network = learner.policy
    assert all(torch.equal(p.sign(), -wanted) for p in (network.a, network.b, network.c))
    assert (network.d < 0).all()
    norm = 22.0**0.5  # of 22 numbers of size 1, clipped to 1
    assert all(torch.allclose(p.grad.abs(), torch.full_like(p, 1 / norm), rtol=1e-4) for p in network.parameters())
    assert learner.close_epoch()["train/grad_norm"] == pytest.approx(norm)
    whole = learner._learning.loss
    learner._learning.loss = lambda batch, *, generator: (math.nan * whole(batch, generator=generator)[0], {})
    learner.update(demonstrations(VECTORS, 2), torch.Generator())
    assert learner.skipped == 1


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("chosen", [(), ("d",)])
def test_an_epoch_may_train_nothing_or_a_part(odd, chosen):
    learner = odd(chosen=chosen)
    learner.update(demonstrations(VECTORS, 2), torch.Generator())
    assert {name for name, p in learner.policy.named_parameters() if p.any()} == set(chosen)
