"""DiffTORI for imitation: a policy that is an optimiser over a learned latent model (Wan et al., 2024, Eqs. 7–9)."""

from dataclasses import replace
from typing import Any, ClassVar, Literal, final

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori import presets
from difftori.errors import ConfigError
from difftori.models.images import Images
from difftori.models.nets import mlp, noise_like, small_init_
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
from difftori.types import (
    Actions,
    Latents,
    Metrics,
    PartPlans,
    Plans,
    Rows,
    Samples,
    Scalar,
    States,
    TaskSpec,
    Window,
    WindowObs,
)

DEFAULT_NOISE = 1.0
"""σ of the noise on a start that is always the same for a state (docs/imitation-studies.md)."""


class DiffTORIConfig(RefinerConfig):
    """Settings of `DiffTORI`. What was tried stands in docs/table8.md and docs/imitation-studies.md."""

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
    """`fast`: short solves, differentiated exactly. `reference`: the release's. `pendulum`: Table 8's, without a base."""
    optimizer: Literal["adam", "adamw", "rmsprop"] = "adamw"
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    epochs: int = Field(300, ge=1)
    batch_size: int = Field(64, ge=1)
    latent_dim: int = Field(64, ge=1)
    """Z of the encoded observations."""
    latent_norm: bool = True
    """Normalise the encoded observations (LayerNorm)."""
    hidden: tuple[int, ...] = (256, 256)
    """Widths of the hidden layers of dynamics, score and prior."""
    encoder_layers: tuple[int, ...] | None = None
    """The same of the encoder, behind what is particular to clouds; `hidden` unless given. Empty: none, with Z features."""
    decision: Literal["step", "chunk"] = "chunk"
    """`step`: one action a step, with latent dynamics between, horizon H. `chunk`: all H actions are one decision, scored
    at once, and the planning horizon is 1, as in the MetaWorld release."""
    plan_horizon: int | None = Field(None, ge=1)
    """H, actions that are planned, from the present on; as many as are executed unless given."""
    init: Literal["base", "prior", "zero", "random"] = "base"
    """Where the solve starts: the base's actions; a network's guess, trained by behaviour cloning; the middle of the
    box; anywhere in it."""
    base_noise: float | None = Field(None, ge=0)
    """σ of Gaussian noise on the start in training, in half-widths of the training data's range. Unless given: 1 where the start of a state is
    always the same, because the score would see one action per state and memorise; 0 where it varies by itself, because noise hides
    which of several good ways the base has taken."""
    anchor: Literal["none", "middle", "base"] = "none"
    """−½k‖a − c‖² beside the score, c the middle of the box or the base's actions, k learned."""
    curvature: float = Field(1.0, gt=0, le=80)
    """First value of k. Without curvature the score is maximised at corners of the box."""
    cvae_dim: int = Field(0, ge=0)
    """Size of the latent sample z̃ that tells several good answers apart (Appendix D), 64 in the release; 0: none."""
    kl_coef: float = Field(0.05, ge=0)
    """β of Eq. 9, for the squared error summed over all planned numbers."""
    act_latent: Literal["zero", "sample"] = "zero"
    """z̃ when it acts: the mean of its prior, or drawn from it."""
    act_samples: int = Field(1, ge=1)
    """As many draws of z̃ when it acts, of which the plan of highest objective is kept."""
    solver: Literal["gradient", "spectral", "reference"] = "gradient"
    """`gradient`: gradient steps of one learned length. `spectral`: step lengths of each row's own. `reference`: the
    release's Levenberg–Marquardt, row by row."""
    step_size: float = Field(0.5, gt=0)
    """First length of a gradient step; it is learned."""
    adjoint: Literal["unrolled", "truncated", "implicit"] = "unrolled"
    """How the loss reaches the model: exactly through all steps, through the last five, or through the optimum."""
    max_steps: int = Field(5, ge=1)
    """Steps of the solve; the release has 100."""
    inward: bool = True
    """Let the loss's gradient pass a bound where it would bring the action inside (`Box`); experts' actions often lie on
    bounds, and exactly there nothing would be learned."""
    prior_coef: float = Field(1.0, ge=0)
    """Weight of the prior's own behaviour-cloning loss."""
    images: Images = Images()
    """How images are seen."""


@final
class DiffTORI(Refiner):
    """â(θ; s) = argmax_a Σ_{t<H} γ^t f_θ(z_t, a_t), z_0 = h_θ(s), z_{t+1} = d_θ(z_t, a_t) (Eq. 7), trained on ‖â − a*‖² + β KL (Eq. 9).

    The solve starts at the base's actions and refines those from the present on; no base is used where `init` and
    `anchor` need none. z_t = [z^s_t, z̃]: what was seen, and a sample that stands for the answer meant among several (Appendix D).
    Encoder h, dynamics d (residual) and score f are MLPs with ELU, because f must bend for the argmax to be anywhere but
    on the box, [−1, 1] per dimension. The mean squared error runs over rows, steps and dimensions.

    Differs from paper: no latent sample unless `cvae_dim` is set, because with much noise on the start it was measured
    harmful where demonstrations agree; the KL term is added, where Eq. 9 prints a minus sign; γ = 1.
    """

    name = "difftori-il"
    Config = DiffTORIConfig
    OR_ELSE = ", or --init prior, zero or random (and --anchor none or middle)"

    def __init__(self, config: DiffTORIConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        self.uses_base = "base" in (config.init, config.anchor)
        self.stochastic = config.init == "random" or (config.act_latent == "sample" and config.cvae_dim > 0)
        room = spec.horizon - spec.n_obs_steps + 1
        self.planned = spec.n_action_steps if config.plan_horizon is None else config.plan_horizon
        if not spec.n_action_steps <= self.planned <= room:
            raise ConfigError(
                [
                    f"settings.plan_horizon: {self.planned}: between the {spec.n_action_steps} actions that are executed and the "
                    f"{room} that there are from the present on"
                ]
            )
        chunk = config.decision == "chunk"
        self.steps, self.size = (1, self.planned * spec.action_dim) if chunk else (self.planned, spec.action_dim)
        self.window = WindowEncoder(spec, config.images)
        self.encoder, self.state_dim = _encoder(config, self.window.width)
        self.known, hidden = self.state_dim + config.cvae_dim, config.hidden
        self.dynamics = None if chunk else mlp((self.known + self.size, *hidden, self.state_dim), nn.ELU)
        self.score = mlp((self.known + self.size, *hidden, 1), nn.ELU)
        small_init_(self.score)  # the solve begins as hardly a change, or as a pull to the anchor
        if self.dynamics is not None:
            # and H steps of the model nearly stand still: no chaos to differentiate through
            nn.init.zeros_(small_init_(self.dynamics).bias)
        # softplus(raw) is what is learned
        self.raw_curvature = nn.Parameter(_softplus_inverse(config.curvature))
        self.raw_step_size = nn.Parameter(_softplus_inverse(config.step_size))
        outputs = self.planned * spec.action_dim
        self.prior = mlp((self.window.width, *hidden, outputs), nn.ELU) if config.init == "prior" else None
        self.posterior = None
        if config.cvae_dim:
            self.posterior = mlp((self.state_dim + outputs, 256, 256, 2 * config.cvae_dim))

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """‖â(θ; s) − a*‖² + β·KL(N(μ, σ²) ‖ N(0, I)) (Eq. 9), differentiated through the solve; and the prior's own loss."""
        target = batch.actions[:, : self.planned]  # a*
        base = self.planned_base(self.choose_base(batch, generator)) if self.uses_base else None
        guess = self.guess(batch.obs, base, generator, crops=generator)
        start = guess + self.noise(batch) * noise_like(guess, generator)  # x_0
        state = self.encode(batch.obs, generator)  # z^s = h(s)
        sample, divergence = self._posterior(state, target, generator)  # z̃ ~ N(μ, σ²)
        plan = self.plan(state, sample, start, base, self._adjoint())
        error = F.mse_loss(plan.actions.reshape(target.shape), target)  # ‖â − a*‖²
        loss = error + self.settings.kl_coef * divergence / target[0].numel()
        metrics = {"action_mse": error.item(), "start_mse": F.mse_loss(guess, target).item()}
        metrics["unsolved"] = 1.0 - plan.solution.finite.float().mean().item()
        if self.posterior is not None:
            metrics["kl"] = divergence.item()
        if self.prior is not None:
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
        """Eq. 7 solved from `start` (B P A); `history`: with every iterate."""
        first = start.reshape(len(state), self.steps, self.size)
        return self._planner(adjoint).plan(self.objective(state, sample, base), first, history=history)

    def objective(self, state: Latents, sample: Samples, base: PartPlans | None) -> EnergyObjective:
        """Eq. 7 for the states z^s (B Z) and samples z̃ (B W)."""
        parts = [state, sample]
        if self.settings.anchor == "base" and base is not None:
            parts.append(base.flatten(1))
        return EnergyObjective(self._next, self._energy, torch.cat(parts, -1), self.steps, self.size)

    @torch.no_grad()
    def act(self, obs: WindowObs, base: Plans | None = None, *, generator: torch.Generator) -> PartPlans:
        """The planned actions (B P A): of `act_samples` solves the best by the model."""
        planned = None if base is None else self.planned_base(base)
        start = self.guess(obs, planned, generator)
        state = self.encode(obs)
        rows, samples = len(state), self.settings.act_samples

        def again(values: Tensor) -> Tensor:
            return values.repeat(samples, *(1,) * (values.ndim - 1))

        sample = state.new_zeros(rows * samples, self.settings.cvae_dim)
        if self.settings.act_latent == "sample" and sample.numel():
            sample = noise_like(sample, generator)
        plan = self.plan(again(state), sample, again(start), None if planned is None else again(planned), Detached())
        actions, value = plan.actions.reshape(samples, rows, self.planned, -1), plan.value.reshape(samples, rows)
        return actions[value.nan_to_num(-torch.inf).argmax(0), torch.arange(rows, device=value.device)]

    def noise(self, batch: Window) -> float:
        """σ of the noise on the start in training: none where the start of a state varies, with several samples of the base."""
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
        """Where the solve starts (B P A), P actions from the present on; `crops` as `encode` has it."""
        if self.settings.init == "base":
            assert base is not None
            return base
        rows = len(next(iter(obs.values())))
        zeros = self.raw_step_size.new_zeros(rows, self.planned, self.spec.action_dim)
        if self.prior is not None:
            return torch.tanh(self.prior(self.window(obs, crops))).reshape(zeros.shape)
        if self.settings.init == "zero":
            return zeros
        return 2 * torch.rand(zeros.shape, generator=generator, dtype=zeros.dtype, device=zeros.device) - 1

    def encode(self, obs: WindowObs, crops: torch.Generator | None = None) -> Latents:
        """z^s = h(s); `crops` draws the parts of images that are seen, in training."""
        return self.encoder(self.window(obs, crops))

    def _energy(self, state: States, action: Actions) -> Rows:
        """f(z, a) − ½k‖a − c‖². What is left of c stands behind z, that of this step first."""
        value = self.score(torch.cat((state[..., : self.known], action), -1)).squeeze(-1)
        if self.settings.anchor == "none":
            return value
        away = action if self.settings.anchor == "middle" else action - state[..., self.known :][..., : self.size]
        return value - 0.5 * F.softplus(self.raw_curvature) * away.square().sum(-1)

    def _next(self, state: States, action: Actions) -> States:
        """d(z, a) = z^s + MLP(z, a); z̃ stays what it is."""
        if self.dynamics is None:
            return state
        seen = state[..., : self.state_dim] + self.dynamics(torch.cat((state[..., : self.known], action), -1))
        centre = state[..., self.known :]
        left = (centre[..., self.size :], torch.zeros_like(centre[..., : self.size]))
        return torch.cat((seen, state[..., self.state_dim : self.known], *left), -1)

    def _posterior(self, state: Latents, target: PartPlans, generator: torch.Generator) -> tuple[Samples, Scalar]:
        """A draw of z̃ from N(μ, σ²), which the encoder makes of state and expert's actions; and KL to N(0, I), mean over rows."""
        if self.posterior is None:
            return state.new_zeros(len(state), 0), state.new_zeros(())
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
        return ProjectedGradient(first_step=1.0)

    def _adjoint(self) -> Adjoint:
        return {"unrolled": Unrolled(), "truncated": Truncated(5), "implicit": Implicit(linear="dense")}[
            self.settings.adjoint
        ]

    def planned_base(self, base: Plans) -> PartPlans:
        """The base's actions that are planned."""
        return base[:, : self.planned].clamp(-1, 1)


def _encoder(config: DiffTORIConfig, features: int) -> tuple[nn.Module, int]:
    """h behind the window encoder, and the size of its output."""
    layers = config.hidden if config.encoder_layers is None else config.encoder_layers
    if not layers:
        return nn.Identity(), features
    network = mlp((features, *layers, config.latent_dim), nn.ELU)
    return (
        nn.Sequential(network, nn.LayerNorm(config.latent_dim)) if config.latent_norm else network
    ), config.latent_dim


def _softplus_inverse(value: float) -> Tensor:
    return torch.tensor(value).expm1().log()
