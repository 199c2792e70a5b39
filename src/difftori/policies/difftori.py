"""DiffTORI for imitation: a policy that is an optimiser over a learned latent model (Wan et al., 2024, Eqs. 7–9)."""

from typing import Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.errors import BoxError
from difftori.interfaces import Policy, PolicyConfig
from difftori.models.nets import mlp
from difftori.planning import EnergyObjective, Plan, Planner
from difftori.solver import Adjoint, Box, Detached, Implicit, Newton, ProjectedGradient, Truncated, Unrolled
from difftori.types import Actions, Chunk, Latents, Metrics, Observations, Plans, Rows, Scalar, States, TaskSpec


class DiffTORIConfig(PolicyConfig):
    """Settings of `DiffTORI`. What was tried on the pendulum stands in docs/table8.md."""

    lr_schedule: Literal["constant", "cosine"] = "cosine"
    epochs: int = Field(300, ge=1)
    latent_dim: int = Field(50, ge=1)
    """Z."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of every network's hidden layers."""
    decision: Literal["step", "chunk"] = "chunk"
    """`step`: one action a step, with latent dynamics between, horizon H. `chunk`: all H actions are one decision, scored
    at once, and the planning horizon is 1, as in the MetaWorld release."""
    init: Literal["prior", "zero", "random"] = "prior"
    """Where the solve starts: a network's guess, trained by behaviour cloning; the middle of the box; anywhere in it."""
    init_noise: float = Field(0.0, ge=0)
    """Gaussian noise on the start in training, in half-widths of the box."""
    adjoint: Literal["unrolled", "truncated", "implicit"] = "unrolled"
    """How the loss reaches the model: exactly through all steps, through the last five, or through the optimum."""
    max_steps: int = Field(10, ge=1)
    """Steps of the solve."""
    curvature: float = Field(1.0, gt=0, le=80)
    """First value of the learned k in f(z, a) − ½k‖a‖² (a in units of the box). Without it f is maximised at corners of
    the box, where nothing can be learned."""
    prior_coef: float = Field(1.0, ge=0)
    """Weight of the prior's own behaviour-cloning loss."""


@final
class DiffTORI(Policy):
    """â(θ; s) = argmax_a Σ_{t<H} γ^t f_θ(z_t, a_t), z_0 = h_θ(s), z_{t+1} = d_θ(z_t, a_t) (Eq. 7), trained on ‖â − a*‖² (Eq. 8).

    Encoder h, dynamics d (residual) and score f are MLPs with ELU, because f must bend for the argmax to be anywhere but
    on the box. Actions are planned in units of the box: [−1, 1] per dimension. The mean squared error runs over rows,
    steps and dimensions.
    """

    name = "difftori"
    Config = DiffTORIConfig

    def __init__(self, config: DiffTORIConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        self.low: Tensor
        self.high: Tensor
        self.register_buffer("low", torch.tensor(spec.low), persistent=False)
        self.register_buffer("high", torch.tensor(spec.high), persistent=False)
        if not (self.low.isfinite().all() and self.high.isfinite().all()):
            raise BoxError(
                f"difftori plans in units of the box [{spec.low}, {spec.high}], which is not finite: give finite bounds"
            )
        chunk = config.decision == "chunk"
        self.steps, self.size = (1, spec.horizon * spec.action_dim) if chunk else (spec.horizon, spec.action_dim)
        z, hidden = config.latent_dim, config.hidden
        self.encoder = mlp((spec.obs_dim, *hidden, z), nn.ELU)
        self.dynamics = None if chunk else mlp((z + self.size, *hidden, z), nn.ELU)
        self.score = mlp((z + self.size, *hidden, 1), nn.ELU)
        _quiet(self.score)  # the solve begins as a pull to the middle
        if self.dynamics is not None:
            # and H steps of the model nearly stand still: no chaos to differentiate through
            nn.init.zeros_(_quiet(self.dynamics).bias)
        # softplus(raw) = curvature
        self.raw_curvature = nn.Parameter(torch.tensor(config.curvature).expm1().log())
        self.prior = mlp((spec.obs_dim, *hidden, spec.horizon * spec.action_dim), nn.ELU)

    def loss(self, batch: Chunk, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """‖â(θ; s) − a*‖² (Eq. 8), differentiated through the solve, and the prior's own cloning loss."""
        target = self._to_unit(batch.actions)
        guess = self.guess(batch.obs, generator)
        start = guess + self.settings.init_noise * _noise_like(guess, generator)
        action_loss = F.mse_loss(self.plan(batch.obs, start, self._adjoint()).actions.reshape(target.shape), target)
        prior_loss = F.mse_loss(guess, target)
        learned = self.settings.prior_coef if self.settings.init == "prior" else 0.0
        loss = action_loss + learned * prior_loss
        return loss, {"action_mse": action_loss.item(), "prior_mse": prior_loss.item()}

    @torch.no_grad()
    def act(self, obs: Observations, *, generator: torch.Generator) -> Plans:
        """The H actions (B H A) of the solve from the prior's guess."""
        plan = self.plan(obs, self.guess(obs, generator), Detached())
        actions = plan.actions.reshape(len(obs), self.spec.horizon, self.spec.action_dim)
        return (self._middle() + self._half() * actions).clamp(self.low, self.high)

    def guess(self, obs: Observations, generator: torch.Generator) -> Plans:
        """Where the solve starts, in units of the box (B H A)."""
        shape = (len(obs), self.spec.horizon, self.spec.action_dim)
        if self.settings.init == "prior":
            return torch.tanh(self.prior(obs)).reshape(shape)
        zeros = obs.new_zeros(shape)
        return zeros if self.settings.init == "zero" else zeros + _noise_like(zeros, generator).clamp(-1, 1)

    def plan(self, obs: Observations, start: Plans, adjoint: Adjoint) -> Plan:
        """Eq. 7 solved from `start` (B H A), in units of the box."""
        first = start.reshape(len(obs), self.steps, self.size)
        objective = EnergyObjective(self._next, self._energy, self.encoder(obs), self.steps, self.size)
        return Planner(self._solver(), adjoint, Box(-1.0, 1.0), self.settings.max_steps, tolerance=0.0).plan(
            objective, first
        )

    def _energy(self, state: States, action: Actions) -> Rows:
        """f(z, a) − ½k‖a‖²."""
        value = self.score(torch.cat((state, action), -1)).squeeze(-1)
        return value - 0.5 * F.softplus(self.raw_curvature) * action.square().sum(-1)

    def _next(self, state: Latents, action: Actions) -> Latents:
        """d(z, a) = z + MLP(z, a)."""
        if self.dynamics is None:
            return state
        return state + self.dynamics(torch.cat((state, action), -1))

    def _solver(self) -> ProjectedGradient:
        if self.settings.adjoint == "implicit":
            return ProjectedGradient(first_step=1.0, polish=1, polish_with=Newton())
        return ProjectedGradient(first_step=1.0)

    def _adjoint(self) -> Adjoint:
        return {"unrolled": Unrolled(), "truncated": Truncated(5), "implicit": Implicit()}[self.settings.adjoint]

    def _middle(self) -> Tensor:
        return (self.low + self.high) / 2

    def _half(self) -> Tensor:
        return (self.high - self.low) / 2

    def _to_unit(self, actions: Plans) -> Plans:
        return (actions - self._middle()) / self._half()


def _quiet(network: nn.Sequential) -> nn.Linear:
    """Give a network a last layer of small weights; that layer."""
    last = network[-1]
    assert isinstance(last, nn.Linear)
    nn.init.normal_(last.weight, std=0.1 / last.in_features**0.5)
    return last


def _noise_like(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)
