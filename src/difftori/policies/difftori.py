"""DiffTORI for imitation: a policy defined by trajectory optimisation over a learned latent model (Wan et al., 2024, Eqs. 7–9)."""

import logging
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori import presets
from difftori.errors import ConfigError
from difftori.models.action_score import ActionScore, Remainder
from difftori.models.images import Images
from difftori.models.nets import mlp, nan_where_broken, noise_like, small_init_, softplus_inverse
from difftori.models.window_encoder import WindowEncoder
from difftori.planning import EnergyObjective, Plan, Planner
from difftori.policies.refiner import Refiner, RefinerConfig
from difftori.solver import (
    Adjoint,
    Box,
    Detached,
    GradientDescent,
    Implicit,
    Newton,
    ProjectedGradient,
    Solver,
    Truncated,
    Unrolled,
)
from difftori.steering import Steering
from difftori.types import (
    Actions,
    Latents,
    PartPlans,
    Plans,
    Rows,
    Samples,
    Scalar,
    Scalars,
    States,
    TaskSpec,
    Window,
    WindowObs,
)

DEFAULT_NOISE = 1.0
"""Default σ of the noise on the start of the solve, if the start is a deterministic function of the state (docs/imitation-studies.md)."""
_log = logging.getLogger(__name__)


class DiffTORIConfig(RefinerConfig):
    """Settings of `DiffTORI`. docs/table8.md and docs/imitation-studies.md report the experiments behind the defaults."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "fast": {},
        "reference": {
            "solver": "reference",
            "max_steps": 100,
            "inward": False,
            "base_noise": 0.0,
            "cvae_dim": 64,
            "lr": 1e-4,
            "optimizer": "adam",
            "lr_schedule": "constant",
            "batch_size": 128,
            "epochs": 1010,
            "act_latent": "sample",
            "encoder_layers": (),
            "latent_norm": False,
        },
        "pendulum": {
            "solver": "spectral",
            "init": "prior",
            "latent_dim": 50,
            "latent_norm": False,
            "max_steps": 10,
            "anchor": "middle",
            "curvature": 1.0,
            "inward": False,
            "optimizer": "adam",
            "epochs": 300,
            "batch_size": 32,
            "base_noise": 0.0,
        },
    }
    preset: str = "fast"
    """Preset of settings. `fast`: short solves, differentiated exactly. `reference`: the authors' release. `pendulum`: Table 8,
    without a base policy."""
    optimizer: Literal["adam", "adamw", "rmsprop"] = "adamw"
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    epochs: int = Field(default=300, ge=1)
    batch_size: int = Field(default=64, ge=1)
    latent_dim: int = Field(default=64, ge=1)
    """Size Z of the latent state."""
    latent_norm: bool = True
    """Apply layer normalisation to the latent state."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of the dynamics, score and prior networks."""
    encoder_layers: tuple[int, ...] | None = None
    """Widths of the hidden layers of the encoder after the encoders of clouds and images (default: those of `--hidden`). Empty: no
    layers, so that the features are the latent state."""
    score_hidden: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Widths of the hidden layers of the score f (default: those of `--hidden`). One layer trains in two thirds of the time."""
    decision: Literal["step", "chunk"] = "chunk"
    """Action model. `step`: one action per step, with latent dynamics between steps. `chunk`: all planned actions are one vector,
    scored at once, without dynamics, as in the MetaWorld release."""
    plan_horizon: int | None = Field(default=None, ge=1)
    """Number H of planned actions, from the present step on (default: the number of executed actions)."""
    init: Literal["base", "prior", "zero", "random"] = "base"
    """Start of the solve. `base`: the base policy's actions. `prior`: the output of a network trained by behaviour cloning. `zero`: the
    centre of the action box. `random`: a uniform sample from it."""
    base_noise: float | None = Field(default=None, ge=0)
    """Standard deviation σ of Gaussian noise on the start of the solve in training, in half-widths of the training data's range
    (default: 1 for one start per state, so that the score does not memorise one action per state; 0 for a random start and for several
    samples of a stochastic base, because noise hides which of several good ways the base policy took)."""
    anchor: Literal["none", "middle", "base"] = "none"
    """Add −½k‖a − c‖² to the score, with learned k. `middle`: c is the centre of the action box. `base`: c is the base policy's
    actions."""
    curvature: float = Field(default=1.0, gt=0, le=80)
    """Initial value of the curvature k of `--anchor`. Without curvature, the score is maximised at corners of the box."""
    cvae_dim: int = Field(default=0, ge=0)
    """Size of the latent sample z̃ of the variational autoencoder, for observations with several good answers (Appendix D). 0: no
    latent sample. The release has 64."""
    kl_coef: float = Field(default=0.05, ge=0)
    """Weight β of the KL term of Eq. 9, relative to the squared error summed over all planned numbers."""
    act_latent: Literal["zero", "sample"] = "zero"
    """Latent sample z̃ at inference: the mean of its prior (`zero`), or a sample from it (`sample`)."""
    act_samples: int = Field(default=1, ge=1)
    """Number of solves at inference, from samples of z̃ (`--act-latent sample`) or random starts (`--init random`). The plan with the
    greatest gain in the objective over the start (random starts: over zero) is used."""
    solver: Literal["gradient", "spectral", "reference"] = "gradient"
    """Solver. `gradient`: gradient steps of one learned length. `spectral`: spectral step lengths for each row. `reference`: the
    release's Levenberg–Marquardt, row by row."""
    step_size: float = Field(default=0.5, gt=0)
    """Initial length of a gradient step. The length is learned."""
    adjoint: Literal["unrolled", "truncated", "implicit"] = "unrolled"
    """Gradient of the solve: through all steps (`unrolled`), through the last five (`truncated`), or by the implicit function
    theorem at the optimum (`implicit`)."""
    max_steps: int = Field(default=5, ge=1)
    """Number of steps of the solve. Two or three measured as good, and train faster (docs/imitation-studies.md). The release has 100."""
    inward: bool = True
    """Let the loss's gradient pass through an active bound if it moves the action inside (`Box`). Experts' actions are often on
    bounds, where the gradient would otherwise be zero."""
    prior_coef: float = Field(default=1.0, ge=0)
    """Weight of the behaviour-cloning loss of the prior network (`--init prior`)."""
    images: Images = Images()
    """Image encoder."""


@final
class DiffTORI(Refiner):
    """â(θ; s) = argmax_a Σ_{t<H} γ^t f_θ(z_t, a_t), z_0 = h_θ(s), z_{t+1} = d_θ(z_t, a_t) (Eq. 7), trained on ‖â − a*‖² + β KL (Eq. 9).

    The solve starts at the base policy's actions and refines those from the present step on. No base is used if `init` and
    `anchor` do not require one. z_t = [z^s_t, z̃]: the encoded observations, and a latent sample that selects one of several
    good answers (Appendix D). Encoder h, dynamics d (residual) and score f are MLPs with ELU: f must be curved for the argmax
    to be inside the box, [−1, 1] per dimension. The mean squared error is over rows, steps and dimensions.

    Differs from the paper: no latent sample by default (`cvae_dim` 0), because with large noise on the start it was measured
    to be harmful where demonstrations agree; the KL term is added, where Eq. 9 prints a minus sign; γ = 1.
    """

    name = "difftori-il"
    Config = DiffTORIConfig
    OR_ELSE = ", or --init prior, zero or random (and --anchor none or middle)"

    def __init__(self, config: DiffTORIConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        self.STEERABLE = "cost and constraint" if config.solver == "gradient" else "none"
        self.uses_base = "base" in (config.init, config.anchor)
        self.stochastic = config.init == "random" or (config.act_latent == "sample" and config.cvae_dim > 0)
        if config.act_samples > 1 and not self.stochastic:
            _log.warning("act_samples has no effect. Fix: --act-latent sample with --cvae-dim, or --init random")
        room = spec.horizon - spec.n_obs_steps + 1
        self.planned = spec.n_action_steps if config.plan_horizon is None else config.plan_horizon
        if not spec.n_action_steps <= self.planned <= room:
            fix = f"Fix: give at least the {spec.n_action_steps} executed actions, and at most the {room} predicted from the present on"
            raise ConfigError([f"settings.plan_horizon: {self.planned} is out of range. {fix}"])
        chunk = config.decision == "chunk"
        self.steps, self.size = (1, self.planned * spec.action_dim) if chunk else (self.planned, spec.action_dim)
        self.window = WindowEncoder(spec, config.images)
        self.encoder, self.state_dim = _encoder(config, self.window.width)
        self.known, hidden = self.state_dim + config.cvae_dim, config.hidden
        self.dynamics = None if chunk else mlp((self.known + self.size, *hidden, self.state_dim), nn.ELU)
        self.score = ActionScore(self.known, self.size, config.score_hidden or hidden)
        small_init_(self.score)  # initially the solve hardly changes its start, or moves it to the anchor
        if self.dynamics is not None:
            # initially, H steps of the model hardly change the state, so that the gradient does not explode
            nn.init.zeros_(small_init_(self.dynamics).bias)
        # the learned value is softplus(raw)
        self.raw_curvature = nn.Parameter(softplus_inverse(config.curvature))
        self.raw_step_size = nn.Parameter(softplus_inverse(config.step_size))
        outputs = self.planned * spec.action_dim
        self.prior = mlp((self.window.width, *hidden, outputs), nn.ELU) if config.init == "prior" else None
        widths = (self.state_dim + outputs, 256, 256, 2 * config.cvae_dim)
        self.posterior = mlp(widths) if config.cvae_dim else None

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return ‖â(θ; s) − a*‖² + β·KL(N(μ, σ²) ‖ N(0, I)) (Eq. 9), differentiated through the solve, plus the prior's loss."""
        target = batch.actions[:, : self.planned]  # a*
        base = self.planned_base(self.choose_base(batch, generator)) if self.uses_base else None
        guess = self.guess(batch.obs, base, generator, crops=generator)
        start = guess + self.noise(batch) * noise_like(guess, generator)  # x_0
        state = self.encode(batch.obs, generator)  # z^s = h(s)
        sample, divergence = self._posterior(state, target, generator)  # z̃ ~ N(μ, σ²)
        plan = self.plan(state, sample, start, base, self._adjoint())
        error = F.mse_loss(plan.actions.reshape(target.shape), target)  # ‖â − a*‖²
        loss = error + self.settings.kl_coef * divergence / target[0].numel()  # per dimension, as the squared error
        metrics = {"action_mse": error, "start_mse": F.mse_loss(guess, target)}
        metrics["unsolved"] = 1.0 - plan.solution.finite.float().mean()
        if self.posterior is not None:
            metrics["kl"] = divergence
        if self.prior is not None:  # the learned start x_0 also imitates a* directly
            loss = loss + self.settings.prior_coef * F.mse_loss(guess, target)
        return loss, metrics

    def plan(
        self,
        state: Latents,
        sample: Samples,
        start: PartPlans,
        base: PartPlans | None,
        adjoint: Adjoint,
        *,
        history: bool = False,
    ) -> Plan:
        """Solve Eq. 7 from `start` (B P A). `history`: record every iterate."""
        first = start.reshape(state.shape[0], self.steps, self.size)
        return self._planner(adjoint).plan(self.objective(state, sample, base), first, history=history)

    def steered_plan(
        self, state: Latents, sample: Samples, start: PartPlans, base: PartPlans | None, steering: Steering, rows: int
    ) -> Plan:
        """Solve Eq. 7 with the added cost and constraints. There are several samples for each of `rows` observations."""
        objective = self.objective(state, sample, base)
        first = start.reshape(state.shape[0], self.steps, self.size)
        alpha = F.softplus(self.raw_step_size.detach())
        return steering.proximal_plan(objective, first, alpha, self.settings.max_steps, rows, self.spec.action_dim)

    def objective(self, state: Latents, sample: Samples, base: PartPlans | None) -> EnergyObjective:
        """Return the objective of Eq. 7 for the states z^s (B Z) and latent samples z̃ (B W)."""
        known, anchor = torch.cat([state, sample], -1), []
        if self.settings.anchor == "base" and base is not None:
            anchor = [base.flatten(1)]
        if self.dynamics is not None:
            return EnergyObjective(self._next, self._energy, torch.cat([known, *anchor], -1), self.steps, self.size)
        score = self.score.remainder()
        prepared = torch.cat([self.score.prepare(known), *anchor], -1)
        if self.settings.anchor == "none":
            return EnergyObjective(None, score.value, prepared, 1, self.size, cost_and_grad=score.cost_and_grad)
        functions = partial(self._anchored, score), partial(self._anchored_and_grad, score)
        return EnergyObjective(None, functions[0], prepared, 1, self.size, cost_and_grad=functions[1])

    @torch.no_grad()
    def act(
        self,
        obs: WindowObs,
        base: Plans | None = None,
        *,
        generator: torch.Generator,
        steering: Steering | None = None,
    ) -> PartPlans:
        """Return the planned actions (B P A): of `act_samples` solves those with the greatest gain in the objective.

        `steering`: a cost and constraints of normalised actions that are added to the objective.
        """
        planned = None if base is None else self.planned_base(base)
        state = self.encode(obs)
        rows, samples = state.shape[0], self.settings.act_samples if self.stochastic else 1

        def again(values: Tensor) -> Tensor:
            return values.repeat(samples, *(1,) * (values.ndim - 1))

        starts = samples if self.settings.init == "random" else 1
        start = torch.cat([self.guess(obs, planned, generator) for _ in range(starts)])
        start = start if starts == samples else again(start)
        sample = state.new_zeros(samples, rows, self.settings.cvae_dim)
        if self.settings.act_latent == "sample" and sample.numel():
            sample = noise_like(sample, generator)
        known, centre = (again(state), sample.flatten(0, 1)), None if planned is None else again(planned)
        inputs = *known, start, centre
        plan = self.plan(*inputs, Detached()) if steering is None else self.steered_plan(*inputs, steering, rows)
        if samples == 1:
            return nan_where_broken(plan.actions.reshape(rows, self.planned, -1), state)
        # Training leaves the score of each z̃ free up to a constant, so the gain over an action that all share is compared.
        shared = start if starts == 1 else torch.zeros_like(start)
        gain = plan.value + self.objective(*known, centre).cost(shared.flatten(1))
        best = gain.reshape(samples, rows).nan_to_num(-torch.inf).argmax(0)
        chosen = plan.actions.reshape(samples, rows, self.planned, -1)[best, torch.arange(rows, device=best.device)]
        return nan_where_broken(chosen, state)

    def noise(self, batch: Window) -> float:
        """Return σ of the noise on the start in training. It is 0 by default if the start is stochastic: random, or several base samples."""
        if self.settings.base_noise is not None:
            return self.settings.base_noise
        several = batch.base is not None and batch.base.shape[1] > 1
        varies = several if self.settings.init == "base" else self.settings.init == "random"
        return 0.0 if varies else DEFAULT_NOISE

    def guess(
        self,
        obs: WindowObs,
        base: PartPlans | None,
        generator: torch.Generator,
        crops: torch.Generator | None = None,
    ) -> PartPlans:
        """Return the start of the solve (B P A), P actions from the present step on. `crops`: see `encode`."""
        if self.settings.init == "base":
            assert base is not None
            return base
        rows = next(iter(obs.values())).shape[0]
        zeros = self.raw_step_size.new_zeros(rows, self.planned, self.spec.action_dim)
        if self.prior is not None:
            return torch.tanh(self.prior(self.window(obs, crops))).reshape(zeros.shape)
        if self.settings.init == "zero":
            return zeros
        return 2 * torch.rand(zeros.shape, generator=generator, dtype=zeros.dtype, device=zeros.device) - 1

    def encode(self, obs: WindowObs, crops: torch.Generator | None = None) -> Latents:
        """Return z^s = h(s). `crops` samples the image crops in training; None uses the centre crop."""
        return self.encoder(self.window(obs, crops))

    def _energy(self, state: States, action: Actions) -> Rows:
        """Return f(z, a) − ½k‖a − c‖². The remaining steps of c are appended to z, the current step first."""
        value = self.score(torch.cat((state[..., : self.known], action), -1)).squeeze(-1)
        return value if self.settings.anchor == "none" else value - self._pull(state[..., self.known :], action)[0]

    def _anchored(self, score: Remainder, state: States, action: Actions) -> Rows:
        """Return the same for all planned actions at once. c is appended to the score's `prepare` of z."""
        prepared, anchor = score.split(state)
        return score.value(prepared, action) - self._pull(anchor, action)[0]

    def _anchored_and_grad(self, score: Remainder, state: States, action: Actions) -> tuple[Rows, Actions]:
        """Return minus the same, and its gradient with respect to the actions."""
        prepared, anchor = score.split(state)
        cost, grad = score.cost_and_grad(prepared, action)
        pull, slope = self._pull(anchor, action)
        return cost + pull, grad + slope

    def _pull(self, anchor: Tensor, action: Actions) -> tuple[Rows, Actions]:
        """Return ½k‖a − c‖² and its gradient. c is the centre of the box or the first numbers of `anchor`."""
        away = action if self.settings.anchor == "middle" else action - anchor[..., : self.size]
        stiff = F.softplus(self.raw_curvature) * away
        return 0.5 * (stiff * away).sum(-1), stiff

    def _next(self, state: States, action: Actions) -> States:
        """Return d(z, a) = z^s + MLP(z, a); z̃ is unchanged."""
        assert self.dynamics is not None
        seen = state[..., : self.state_dim] + self.dynamics(torch.cat((state[..., : self.known], action), -1))
        centre = state[..., self.known :]
        left = (centre[..., self.size :], torch.zeros_like(centre[..., : self.size]))
        return torch.cat((seen, state[..., self.state_dim : self.known], *left), -1)

    def _posterior(self, state: Latents, target: PartPlans, generator: torch.Generator) -> tuple[Samples, Scalar]:
        """Sample z̃ from the posterior N(μ, σ²) given the state and the expert's actions. Also return the KL to N(0, I), mean over rows."""
        if self.posterior is None:
            return state.new_zeros(state.shape[0], 0), state.new_zeros(())
        mean, log_variance = self.posterior(torch.cat((state, target.flatten(1)), -1)).chunk(2, -1)
        log_variance = log_variance.clamp(-20, 10)
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
        return mean + (0.5 * log_variance).exp() * noise_like(mean, generator), divergence

    def _planner(self, adjoint: Adjoint) -> Planner:
        box = Box(-1.0, 1.0, inward=self.settings.inward)
        if self.settings.solver == "reference":
            release = replace(presets.reference_il(box=box), max_steps=self.settings.max_steps)
            return release.acting() if isinstance(adjoint, Detached) else release
        keep: Literal["best", "last"] = "last" if self.settings.solver == "gradient" else "best"
        return Planner(self._solver(), adjoint, box, self.settings.max_steps, tolerance=0.0, keep=keep)

    def _solver(self) -> Solver:
        if self.settings.solver == "gradient":
            return GradientDescent(F.softplus(self.raw_step_size))
        if self.settings.adjoint == "implicit":
            return ProjectedGradient(first_step=1.0, polish=1, polish_with=Newton())
        # With the anchor's curvature the solve nearly converges, and constant step lengths are as good and cheaper.
        return ProjectedGradient(first_step=1.0, exact_unrolling=self.settings.anchor == "none")

    def _adjoint(self) -> Adjoint:
        return {"unrolled": Unrolled(), "truncated": Truncated(5), "implicit": Implicit(linear="dense")}[
            self.settings.adjoint
        ]

    def planned_base(self, base: Plans) -> PartPlans:
        """Return the planned part of the base policy's actions."""
        return base[:, : self.planned].clamp(-1, 1)


def _encoder(config: DiffTORIConfig, features: int) -> tuple[nn.Module, int]:
    """Return the encoder h after the window encoder, and the size of its output."""
    layers = config.hidden if config.encoder_layers is None else config.encoder_layers
    if not layers:
        return nn.Identity(), features
    network = mlp((features, *layers, config.latent_dim), nn.ELU)
    whole = nn.Sequential(network, nn.LayerNorm(config.latent_dim)) if config.latent_norm else network
    return whole, config.latent_dim
