"""The recurrent baseline of Amos et al. (2018), Differentiable MPC, arXiv 1810.13400, which Table 8 compares with."""

from typing import final

import torch
from pydantic import Field
from torch import nn
from torch.nn import functional as F

from difftori.interfaces import Policy, PolicyConfig
from difftori.models.nets import mlp
from difftori.types import Metrics, Plans, Scalar, TaskSpec, Window, WindowObs, flat_rows


class LSTMConfig(PolicyConfig):
    """Settings of `LSTMPolicy`.

    Known from Amos et al.: 256 units everywhere, three-layer embeddings, Adam at 1e-4, batches of 32, no clipping.
    Ours: `epochs`. Their script allows 10,000 for the undamped pendulum and keeps the best validation error.
    """

    hidden: int = Field(256, ge=1)
    """Units of the cell and of every layer of the embeddings."""
    lr: float = Field(1e-4, gt=0, allow_inf_nan=False)
    epochs: int = Field(500, ge=1)
    clip_norm: float = Field(0.0, ge=0, allow_inf_nan=False)


@final
class LSTMPolicy(Policy):
    """Emits the H controls one after another, each computed from the one before.

        y_0 = E_s(s);   (h_t, c_t) = LSTMCell(y_t, (h_{t−1}, c_{t−1}));   u_t = D(c_t);   y_{t+1} = E_u(u_t)

    E_s, E_u and D have three linear layers with ReLU between them, the cell starts from zeros, and the loss is the
    mean of (u_t − u*_t)² with the policy's own controls fed back (no teacher forcing). The controls are read from the
    cell state c_t rather than from h_t: the authors' released code does so, their paper does not say.
    Observations in one row of numbers, actions (B H A), both in the task's units. Actions are clamped to the box when it acts, which
    theirs leaves to the environment.
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
        """The unclamped controls (B H A), with their graph."""
        entry = self.embed_state(flat_rows(obs))
        memory = None
        controls = []
        for _ in range(self.spec.horizon):
            memory = self.cell(entry, memory)
            controls.append(self.decode(memory[1]))
            entry = self.embed_control(controls[-1])
        return torch.stack(controls, dim=1)

    def loss(self, batch: Window, *, generator: torch.Generator) -> tuple[Scalar, Metrics]:
        """Mean squared control error; draws nothing from `generator`."""
        loss = F.mse_loss(self.predict(batch.obs), batch.actions)
        return loss, {"control_mse": loss.item()}

    @torch.no_grad()
    def act(self, obs: WindowObs, *, generator: torch.Generator) -> Plans:
        """The controls (B H A); deterministic, draws nothing from `generator`."""
        return self.predict(obs)
