"""Denoising diffusion over plans of actions: the noise schedule, and the samplers that remove the noise.

K noise steps, numbered 0 … K − 1 as in Hugging Face diffusers (compared in tests/models/test_diffusion.py):

    x_k = √ᾱ_k · a + √(1 − ᾱ_k) · ε,   ε ~ N(0, I)                                     (Ho et al., 2020, Eq. 4)

ᾱ is the remaining share of the actions' variance, from nearly 1 at k = 0 to nearly 0 at k = K − 1. A network predicts ε, or
a, from x_k and k. Actions are in [−1, 1].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from difftori.errors import ConfigError
from difftori.models.nets import noise_like
from difftori.types import Plans, RowCounts, Scalar

Prediction: TypeAlias = Literal["epsilon", "sample"]
"""What the network predicts: `epsilon`, the noise ε, or `sample`, the actions without noise."""
Denoiser: TypeAlias = Callable[[Plans, RowCounts], Plans]
"""The network: noisy actions (B H A) and the noise step of each row (B) → prediction (B H A)."""
Guide: TypeAlias = Callable[[Plans, bool], Plans]
"""Changes the estimated actions (B H A) of a denoising step. The second argument tells whether it is the last one."""


def squared_cosine(steps: int) -> Float[Tensor, "k"]:
    """ᾱ_0 … ᾱ_{K−1} = Π (1 − β_k),  β_k = min(1 − f(k + 1) / f(k), 0.999),  f(k) = cos²(π/2 · (k/K + .008) / 1.008), float64.

    Source: Nichol and Dhariwal (2021), Eq. 17; `squaredcos_cap_v2` in diffusers.
    """
    share = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = ((share + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (level[1:] / level[:-1]).clamp(min=1 - 0.999).cumprod(0)


@final
class NoiseSchedule(nn.Module):
    """The noise schedule ᾱ of K `steps` (default: 100) by `squared_cosine`, for a network with this `prediction`.

    It has no parameters and is not saved with a policy's weights: the settings determine `signal`, ᾱ (K).
    """

    def __init__(self, steps: int = 100, prediction: Prediction = "epsilon"):
        super().__init__()
        self.steps = steps
        self.prediction: Prediction = prediction
        self.signal: Tensor
        self.register_buffer("signal", squared_cosine(steps).float(), persistent=False)

    def noised(self, clean: Plans, noise: Plans, step: RowCounts) -> Plans:
        """Add noise: return x_k (B H A), where each row has its own step k (B)."""
        signal = self.signal[step][:, None, None]
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def target(self, clean: Plans, noise: Plans) -> Plans:
        """Return the training target of the network (B H A)."""
        return noise if self.prediction == "epsilon" else clean

    def estimate(self, noisy: Plans, predicted: Plans, step: int) -> tuple[Plans, Plans]:
        """Convert the network's prediction at step k to actions, clipped to [−1, 1], and noise, not clipped."""
        signal = self.at(step)
        if self.prediction == "epsilon":
            return ((noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()).clamp(-1, 1), predicted
        return predicted.clamp(-1, 1), (noisy - signal.sqrt() * predicted) / (1 - signal).sqrt()

    def at(self, step: int) -> Scalar:
        """Return ᾱ_k, or 1 for k < 0, where there is no noise."""
        return self.signal[step] if step >= 0 else torch.ones_like(self.signal[0])


class Sampler(ABC):
    """Selects the noise steps of the denoising process, and computes each from the previous one."""

    STOCHASTIC: ClassVar[bool]
    """Whether the sampler adds random noise."""

    @abstractmethod
    def pairs(self, trained: int) -> list[tuple[int, int]]:
        """Return pairs of a noise step and the next one, noisiest first, of K `trained` steps. The last pair ends at −1, no noise."""

    @abstractmethod
    def back(self, noisy: Plans, clean: Plans, noise: Plans, fresh: Plans, now: Scalar, before: Scalar) -> Plans:
        """Compute x of the next, less noisy step from x_k (`noisy`).

        `clean` and `noise` are from `NoiseSchedule.estimate`, `fresh` is sampled from N(0, I), and `now` and `before` are ᾱ
        at step k and at the next step.
        """


@final
@dataclass(frozen=True)
class DDPM(Sampler):
    """Ancestral sampling in all K steps, x_{k−1} ~ N(μ(x_k, â), σ²), with the posterior variance (Ho et al., 2020, Eq. 7).

        μ = √ᾱ_{k−1} · β / (1 − ᾱ_k) · â + √(1 − β) · (1 − ᾱ_{k−1}) / (1 − ᾱ_k) · x_k,   β = 1 − ᾱ_k / ᾱ_{k−1}
        σ² = β · (1 − ᾱ_{k−1}) / (1 − ᾱ_k)

    Equals `DDPMScheduler` of diffusers with `variance_type="fixed_small"` and `clip_sample=True`.
    """

    STOCHASTIC: ClassVar[bool] = True

    def pairs(self, trained: int) -> list[tuple[int, int]]:
        """Return the pairs of K − 1 → K − 2 → … → 0 → −1."""
        return [(step, step - 1) for step in reversed(range(trained))]

    def back(self, noisy: Plans, clean: Plans, noise: Plans, fresh: Plans, now: Scalar, before: Scalar) -> Plans:
        """Return μ + σ · `fresh`. `noise` is not used. The last step has σ = 0 and μ = â."""
        alpha, ratio = now / before, (1 - before) / (1 - now)
        mean = before.sqrt() * (1 - alpha) / (1 - now) * clean + alpha.sqrt() * ratio * noisy
        return mean + ((1 - alpha) * ratio).sqrt() * fresh


@final
@dataclass(frozen=True)
class DDIM(Sampler):
    """Deterministic sampling in `steps` of K (Song et al., 2021, Eq. 12 with σ = 0): x' = √ᾱ' · â + √(1 − ᾱ') · ε̂.

    The steps are 0, c, 2c, … with c = ⌊K / steps⌋, and the last one ends at the actions without noise. Default: 10 steps.
    Equals `DDIMScheduler` of diffusers with `eta=0`, `timestep_spacing="leading"`, `steps_offset=0`,
    `set_alpha_to_one=True` and `clip_sample=True`.
    """

    steps: int = 10
    STOCHASTIC: ClassVar[bool] = False

    def pairs(self, trained: int) -> list[tuple[int, int]]:
        """Return the pairs of (steps − 1)·c → … → c → 0 → −1.

        Raises ConfigError for more steps than K, and for numbers of steps where rounding c down omits more than the
        noisiest sixth: sampling would start from pure noise at a step where the network expects little noise.
        """
        stride = trained // max(self.steps, 1)
        if self.steps < 1 or self.steps * stride < trained * 5 / 6:
            fitting = ", ".join(str(n) for n in range(1, trained + 1) if trained % n == 0)
            fault = f"settings.inference_steps: {self.steps} steps do not cover the {trained} noise steps of training"
            raise ConfigError([f"{fault}. Fix: choose one of {fitting}"])
        steps = [number * stride for number in reversed(range(self.steps))]
        return [(step, step - stride) if step else (0, -1) for step in steps]

    def back(self, noisy: Plans, clean: Plans, noise: Plans, fresh: Plans, now: Scalar, before: Scalar) -> Plans:
        """Return √ᾱ' · `clean` + √(1 − ᾱ') · `noise`. The other arguments are not used."""
        return before.sqrt() * clean + (1 - before).sqrt() * noise


def denoise(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    sampler: Sampler,
    noise: Plans,
    *,
    generator: torch.Generator,
    guide: Guide | None = None,
) -> Plans:
    """Denoise pure noise (B H A) to actions in [−1, 1]. If the sampler adds noise, it is sampled from `generator`.

    `guide` changes the estimate of the actions in every step, and with it the estimate of the noise, so that both give the same x_k as before.
    """
    pairs = sampler.pairs(schedule.steps)
    x, fresh = noise, torch.zeros_like(noise)
    for step, before in pairs:
        predicted = denoiser(x, torch.full((x.shape[0],), step, device=x.device))
        clean, estimated = schedule.estimate(x, predicted, step)
        if guide is not None:
            guided, signal = guide(clean, before < 0), schedule.at(step)
            estimated = estimated + (signal / (1 - signal)).sqrt() * (clean - guided)
            clean = guided
        if sampler.STOCHASTIC and before >= 0:
            fresh = noise_like(x, generator)
        x = sampler.back(x, clean, estimated, fresh, schedule.at(step), schedule.at(before))
    return x
