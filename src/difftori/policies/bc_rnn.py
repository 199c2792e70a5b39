"""Behaviour cloning with a recurrent network and a Gaussian mixture: BC-RNN-GMM of robomimic."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from difftori.interfaces import Policy, PolicyConfig
from difftori.models.images import Images
from difftori.models.nets import noise_like
from difftori.models.window_encoder import WindowEncoder
from difftori.types import Plans, Scalar, Scalars, TaskSpec, Window, WindowObs

LOW_NOISE = 1e-4
"""Standard deviation of every mode at inference with `low_noise`, in units of the training data's range."""


class BCRNNGMMConfig(PolicyConfig):
    """Settings of `BCRNNGMM`. robomimic trains for 600 epochs of 500 updates: `--updates 300000`."""

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {
        "image": {},
        "state": {"hidden": 400, "batch_size": 100},
        "small": {"hidden": 128, "lr": 1e-3, "batch_size": 64},
    }
    preset: str = "image"
    """Preset of settings. `image`: robomimic's for images, the paper's base policy. `state`: robomimic's for states. `small`: for a CPU."""
    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    batch_size: int = Field(default=16, ge=1)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    hidden: int = Field(default=1000, ge=1)
    """Number of units of each recurrent layer."""
    layers: int = Field(default=2, ge=1)
    """Number of recurrent layers."""
    modes: int = Field(default=5, ge=1)
    """Number of Gaussians of the mixture."""
    min_std: float = Field(default=1e-4, gt=0)
    """Value added to each standard deviation, in units of the training data's range."""
    low_noise: bool = True
    """At inference, use a standard deviation of 1e-4 instead of the learned one, so that the action is close to the mean of the
    sampled mode."""
    images: Images = Images()
    """Image encoder."""


@final
@dataclass(frozen=True)
class Mixture:
    """A Gaussian mixture Σ_m π_m N(µ_m, diag σ_m²) for each step: `logits` (B H M), `means` and `stds` (B H M A)."""

    logits: Float[Tensor, "B H M"]
    means: Float[Tensor, "B H M A"]
    stds: Float[Tensor, "B H M A"]

    def log_prob(self, actions: Plans) -> Float[Tensor, "B H"]:
        """Return log Σ_m π_m Π_a N(a; µ_ma, σ_ma²)."""
        away = (actions.unsqueeze(-2) - self.means) / self.stds
        inside = (-0.5 * away.square() - self.stds.log() - 0.5 * math.log(2 * math.pi)).sum(-1)
        return (self.logits.log_softmax(-1) + inside).logsumexp(-1)

    def sample(self, generator: torch.Generator) -> Plans:
        """Sample actions (B H A). The random number that chooses the mode is shared by all steps of a row, so that a plan stays in one mode
        as far as their weights are alike.
        """
        rows, _, modes = self.logits.shape
        uniform = torch.rand((rows, 1, modes), generator=generator, dtype=self.logits.dtype, device=self.logits.device)
        # The argmax of logits plus Gumbel noise is a sample from softmax(logits).
        chosen = (self.logits - (-uniform.clamp_min(torch.finfo(uniform.dtype).tiny).log()).log()).argmax(-1)
        index = chosen[..., None, None].expand(-1, -1, 1, self.means.shape[-1])
        mean, std = (values.gather(-2, index).squeeze(-2) for values in (self.means, self.stds))
        return mean + std * noise_like(mean, generator)


@final
class BCRNNGMM(Policy):
    """A mixture of Gaussians over each step's action from an LSTM over the observations, trained on −log p(a*).

        h_t = LSTM(features of o_t, h_{t−1});   (logits, µ, σ)_t = linear(h_t);   µ through tanh, σ = softplus + `min_std`

    The loss is the mean over rows and all H steps of the window. The LSTM starts from zeros at the oldest observation. Steps
    after the present one (H > O) repeat the last observation.
    Source: Mandlekar et al. (2021), "What Matters in Learning from Offline Human Demonstrations", and robomimic's code.

    Differs from robomimic: there, the hidden state is carried from step to step and reset to zeros every 10 steps, so that
    an action depends on 1 to 10 observations. Policies here are functions of the last O observations: every executed action
    depends on O of them, at O times the computation. Windows are padded before an episode's first step by repeating it,
    because inference starts in this way. Actions are normalised by their range; in robomimic by hand to [−1, 1].
    """

    name = "bc-rnn-gmm"
    Config = BCRNNGMMConfig
    WINDOW = (10, 10, 1)
    STOCHASTIC = True

    def __init__(self, config: BCRNNGMMConfig, spec: TaskSpec):
        super().__init__(config, spec)
        self.settings = config
        self.frame = WindowEncoder(replace(spec, n_obs_steps=1), config.images)
        self.lstm = nn.LSTM(self.frame.width, config.hidden, config.layers, batch_first=True)
        self.head = nn.Linear(config.hidden, config.modes * (2 * spec.action_dim + 1))

    def predict(self, obs: WindowObs, crops: torch.Generator | None = None) -> Mixture:
        """Return the mixture of each of the H steps. `crops`: see `WindowEncoder`."""
        rows, seen, steps = next(iter(obs.values())).shape[0], self.spec.n_obs_steps, self.spec.horizon
        features = self.frame({name: values.flatten(0, 1).unsqueeze(1) for name, values in obs.items()}, crops)
        features = features.unflatten(0, (rows, seen))
        if steps > seen:  # ONNX cannot expand to no steps
            features = torch.cat((features, features[:, -1:].expand(-1, steps - seen, -1)), 1)
        hidden, _ = self.lstm(features)
        modes, size = self.settings.modes, self.spec.action_dim
        logits, means, raw = self.head(hidden).split((modes, modes * size, modes * size), -1)
        stds = F.softplus(raw) + self.settings.min_std
        return Mixture(logits, means.tanh().unflatten(-1, (modes, size)), stds.unflatten(-1, (modes, size)))

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the negative log-likelihood, summed over action dimensions, mean over rows and steps.

        `generator` only samples the image crops.
        """
        mixture = self.predict(batch.obs, generator)
        loss = -mixture.log_prob(batch.actions).mean()
        return loss, {"log_likelihood": -loss, "std": mixture.stds.detach().mean()}

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """Sample actions (B H A). With `low_noise`, they are the mean of one sampled mode of each row plus noise of σ = 1e-4."""
        mixture = self.predict(obs)
        if self.settings.low_noise:
            mixture = replace(mixture, stds=torch.full_like(mixture.stds, LOW_NOISE))
        return mixture.sample(generator)
