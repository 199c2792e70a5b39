"""The problems on which planners are compared: planning in a fitted latent model, and the imitation release's chunk score.

The sizes are the paper's: latent 50, reward and dynamics MLPs 512-512 with ELU, twin critics Linear-LayerNorm-Tanh-
Linear-ELU-Linear of width 512, a policy prior, γ = .99.
"""

from abc import abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.solver_networks import (
    ACTIONS,
    CHUNK,
    CHUNK_CONTEXT,
    DISCOUNT,
    ChunkScore,
    Teacher,
    cached,
    fit_chunk_score,
    fit_world_model,
    world_model,
)
from difftori.models.world_model import WorldModel
from difftori.objectives import ReturnObjective
from difftori.solver import Box, Objective
from difftori.types import Latents, Points, Rows

Start = Literal["cold", "prior"]


class Problem(Objective):
    """B problems that can be evaluated at other contexts. `x0` (B n) is the start of solves."""

    x0: Points

    @property
    @abstractmethod
    def context(self) -> Float[Tensor, "B C"]:
        """The tensor to differentiate solutions with respect to, row by row."""

    @property
    @abstractmethod
    def box(self) -> Box:
        """Bounds of the variables."""

    @abstractmethod
    def at(self, context: Float[Tensor, "B C"]) -> "Problem":
        """The same problems at another context."""

    @abstractmethod
    def weights(self) -> list[nn.Parameter]:
        """The other parameters that training would update."""


@dataclass(frozen=True)
class LatentProblem(Problem):
    """B planning problems over x = (a_0, …, a_{H−1}) in [−1, 1]^{H·A}, one per row. The cost is minus the predicted return.

    `z0` (B Z): encoded states. `x0` (B H·A): initial actions. `clamp`: clamp the actions inside the cost as the release
    does, so that a coordinate outside the box has no gradient.
    """

    model: WorldModel
    horizon: int
    clamp: bool
    z0: Latents
    x0: Points

    def cost(self, x: Points) -> Rows:
        """Minus the predicted return of each row."""
        return self.cost_from(x, self.z0)

    def cost_from(self, x: Points, context: Latents) -> Rows:
        """The cost from other states, for a baseline that maps over the rows itself."""
        model, x = self.model, x.clamp(-1.0, 1.0) if self.clamp else x
        return ReturnObjective(model.next, model.reward, model.value, context, self.horizon, ACTIONS, DISCOUNT).cost(x)

    def select(self, rows: Tensor) -> "LatentProblem":
        """Some of the rows."""
        return replace(self, z0=self.z0[rows], x0=self.x0[rows])

    @property
    def context(self) -> Latents:
        """The tensor to differentiate solutions with respect to, row by row: z0."""
        return self.z0

    def at(self, context: Latents) -> "LatentProblem":
        """The same problems at another context."""
        return replace(self, z0=context)

    @property
    def box(self) -> Box:
        """[−1, 1] for each action."""
        return Box(-1.0, 1.0)

    def weights(self) -> list[nn.Parameter]:
        """The parameters of every network, which training would update."""
        return list(self.model.parameters())


@dataclass(frozen=True)
class ImitationProblem(Problem):
    """B chunks of 4 steps × 4 dimensions to refine, (B 16), each scored by f. `x0` is the proposal of a base policy."""

    score: ChunkScore
    z0: Float[Tensor, "B Z"]
    x0: Points

    def cost(self, x: Points) -> Rows:
        """Minus the score of each row."""
        return self.cost_from(x, self.z0)

    def cost_from(self, x: Points, context: Float[Tensor, "B Z"]) -> Rows:
        """The cost with other contexts."""
        return -self.score(x, context)

    def select(self, rows: Tensor) -> "ImitationProblem":
        """Some of the rows."""
        return replace(self, z0=self.z0[rows], x0=self.x0[rows])

    @property
    def context(self) -> Float[Tensor, "B Z"]:
        """The tensor to differentiate solutions with respect to, row by row: z0."""
        return self.z0

    def at(self, context: Float[Tensor, "B Z"]) -> "ImitationProblem":
        """The same problems at another context."""
        return replace(self, z0=context)

    @property
    def box(self) -> Box:
        """[−1, 1] for each normalised action."""
        return Box(-1.0, 1.0)

    def weights(self) -> list[nn.Parameter]:
        """The parameters of f, which training would update."""
        return list(self.score.parameters())


def latent_problem(
    horizon: int,
    batch: int,
    dtype: torch.dtype,
    seed: int,
    *,
    cache: Path,
    start: Start = "cold",
    clamp: bool = False,
    fit_steps: int = 500,
) -> LatentProblem:
    """B planning problems of H steps: networks of this seed (fitted once, then read from `cache`) and new states.

    `start`: "cold" starts at zero actions, "prior" at the rollout of the prior. float64 uses the same networks as float32,
    so both precisions solve the same problem.
    """

    def fit() -> dict[str, Tensor]:
        return fit_world_model(seed, steps=fit_steps).state_dict()

    model = world_model()
    model.load_state_dict(cached(cache, f"latent-seed{seed}-steps{fit_steps}", fit))
    model = model.to(dtype).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    teacher = Teacher(generator)
    generator.manual_seed(seed + 1_000_003)
    z0 = teacher.states(batch).to(dtype)
    with torch.no_grad():
        still = z0.new_zeros(batch, horizon, ACTIONS)
        x0 = (model.rollout(z0, noise=still) if start == "prior" else still).flatten(1)
    return LatentProblem(model=model, horizon=horizon, clamp=clamp, z0=z0, x0=x0)


def imitation_problem(
    batch: int, dtype: torch.dtype = torch.float32, seed: int = 0, *, cache: Path, fit_steps: int = 400
) -> ImitationProblem:
    """B chunks to refine. They start at the expert's chunk plus noise of .3, like the proposal of a reasonable base policy."""

    def fit() -> dict[str, Tensor]:
        score, expert = fit_chunk_score(seed, steps=fit_steps)
        return {"expert": expert, **score.state_dict()}

    tensors = dict(cached(cache, f"chunk-seed{seed}-steps{fit_steps}", fit))
    expert = tensors.pop("expert")
    score = ChunkScore()
    score.load_state_dict(tensors)
    generator = torch.Generator().manual_seed(seed + 1_000_003)
    z0 = torch.randn(batch, CHUNK_CONTEXT, generator=generator)
    x0 = torch.tanh(z0 @ expert.T) + 0.3 * torch.randn(batch, CHUNK, generator=generator)
    return ImitationProblem(
        score=score.to(dtype).eval().requires_grad_(False), z0=z0.to(dtype), x0=x0.clamp(-1.0, 1.0).to(dtype)
    )
