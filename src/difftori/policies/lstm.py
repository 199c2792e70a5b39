"""The recurrent baseline of Table 8, from Amos et al. (2018), "Differentiable MPC", arXiv 1810.13400."""

from typing import final

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from difftori.interfaces import Policy, PolicyConfig
from difftori.models.nets import mlp
from difftori.types import Plans, Scalar, Scalars, TaskSpec, Window, WindowObs, flat_rows


class LSTMConfig(PolicyConfig):
    """Settings of `LSTMPolicy`.

    From Amos et al.: 256 units everywhere, three-layer embeddings, Adam at 1e-4, batches of 32, no gradient clipping.
    Ours: `epochs`. Their script allows 10,000 for the undamped pendulum and selects the best validation error.
    """

    hidden: int = Field(default=256, ge=1)
    """Number of units of the LSTM cell and of every layer of the embeddings."""
    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    epochs: int = Field(default=500, ge=1)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)


@final
class LSTMPolicy(Policy):
    """Outputs the H controls one after another, each computed from the previous one.

        y_0 = E_s(s);   (h_t, c_t) = LSTMCell(y_t, (h_{t−1}, c_{t−1}));   u_t = D(c_t);   y_{t+1} = E_u(u_t)

    E_s, E_u and D have three linear layers with ReLU between them. The cell starts from zeros. The loss is the mean of
    (u_t − u*_t)² with the policy's own controls fed back (no teacher forcing). The controls are decoded from the cell state c_t
    rather than from h_t, as in the authors' released code; their paper does not specify it.
    Observations are concatenated into one vector per row; actions are (B H A). Both are in the task's units. Actions are clamped
    to the box at inference; in their code the environment clamps.
    """

    name = "lstm"
    Config = LSTMConfig
    NORMALIZES = "nothing"

    def __init__(self, config: LSTMConfig, spec: TaskSpec):
        super().__init__(config, spec)
        width = config.hidden
        self.embed_state = mlp((spec.obs_dim, width, width, width), nn.ReLU)
        self.embed_control = mlp((spec.action_dim, width, width, width), nn.ReLU)
        self.decode = mlp((width, width, width, spec.action_dim), nn.ReLU)
        self.cell = nn.LSTMCell(width, width)

    def predict(self, obs: WindowObs) -> Plans:
        """Return the unclamped controls (B H A), with their graph."""
        entry = self.embed_state(flat_rows(obs))
        memory = None
        controls = []
        for _ in range(self.spec.horizon):
            memory = self.cell(entry, memory)
            controls.append(self.decode(memory[1]))
            entry = self.embed_control(controls[-1])
        return torch.stack(controls, dim=1)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Scalars]:
        """Return the mean squared control error. `generator` is not used."""
        loss = F.mse_loss(self.predict(batch.obs), batch.actions)
        return loss, {"control_mse": loss}

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """Return the controls (B H A). Deterministic; `generator` is not used."""
        return self.predict(obs)
