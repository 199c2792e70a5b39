"""Denoising diffusion over plans of actions: how noise is added, and the samplers that take it away again.

K steps of noise, counted 0 … K − 1 as in Hugging Face diffusers, with which tests/models/test_diffusion.py compares:

    x_k = √ᾱ_k · a + √(1 − ᾱ_k) · ε,   ε ~ N(0, I)                                     (Ho et al., 2020, Eq. 4)

ᾱ is the share of the actions' variance that is left, from nearly 1 at k = 0 to nearly 0 at k = K − 1. A network is given
x_k and k and says ε, or a. Actions lie in [−1, 1].
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
"""What the network says: the noise ε, or the actions without it."""
Denoiser: TypeAlias = Callable[[Plans, RowCounts], Plans]
"""The network: noisy actions (B H A) and the step of each row (B) → what it says (B H A)."""


def squared_cosine(steps: int) -> Float[Tensor, "k"]:
    """ᾱ_0 … ᾱ_{K−1} = Π (1 − β_k),  β_k = min(1 − f(k + 1) / f(k), 0.999),  f(k) = cos²(π/2 · (k/K + .008) / 1.008), float64.

    Source: Nichol and Dhariwal (2021), Eq. 17; `squaredcos_cap_v2` in diffusers.
    """
    share = torch.arange(steps + 1, dtype=torch.float64) / steps
    level = ((share + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (level[1:] / level[:-1]).clamp(min=1 - 0.999).cumprod(0)


@final
class NoiseSchedule(nn.Module):
    """ᾱ of K `steps` by `squared_cosine`, and what the network is to say.

    Nothing is learned, and nothing is saved with a policy's weights: `signal`, ᾱ (K), follows from the settings.
    """

    def __init__(self, steps: int = 100, prediction: Prediction = "epsilon"):
        super().__init__()
        self.steps = steps
        self.prediction: Prediction = prediction
        self.signal: Tensor
        self.register_buffer("signal", squared_cosine(steps).float(), persistent=False)

    def noised(self, clean: Plans, noise: Plans, step: RowCounts) -> Plans:
        """x_k of each row (B H A), at steps (B) of their own."""
        signal = self.signal[step][:, None, None]
        return signal.sqrt() * clean + (1 - signal).sqrt() * noise

    def target(self, clean: Plans, noise: Plans) -> Plans:
        """What the network should have predicted."""
        return noise if self.prediction == "epsilon" else clean

    def estimate(self, noisy: Plans, predicted: Plans, step: int) -> tuple[Plans, Plans]:
        """The actions that follow from what the network predicted at step k, clipped to [−1, 1], and the noise, not clipped."""
        signal = self.at(step)
        if self.prediction == "epsilon":
            return ((noisy - (1 - signal).sqrt() * predicted) / signal.sqrt()).clamp(-1, 1), predicted
        return predicted.clamp(-1, 1), (noisy - signal.sqrt() * predicted) / (1 - signal).sqrt()

    def at(self, step: int) -> Scalar:
        """ᾱ_k; 1 before the first step, where nothing is noise."""
        return self.signal[step] if step >= 0 else torch.ones_like(self.signal[0])


class Sampler(ABC):
    """Which steps of noise are visited on the way back, and how to go from one to the next."""

    DRAWS: ClassVar[bool]
    """Whether fresh noise is added on the way."""

    @abstractmethod
    def pairs(self, trained: int) -> list[tuple[int, int]]:
        """The steps and the one after each, noisiest first, of K `trained`; the last leads to −1, the actions themselves."""

    @abstractmethod
    def back(self, noisy: Plans, clean: Plans, noise: Plans, fresh: Plans, now: Scalar, before: Scalar) -> Plans:
        """From x_k to the x of the next, less noisy step.

        `clean` and `noise` are `NoiseSchedule.estimate`'s, `fresh` is drawn from N(0, I), and `now` and `before` are ᾱ here
        and there.
        """


@final
@dataclass(frozen=True)
class DDPM(Sampler):
    """Every step, x_{k−1} ~ N(μ(x_k, â), σ²) with the variance of the forward process's posterior (Ho et al., 2020, Eq. 7).

        μ = √ᾱ_{k−1} · β / (1 − ᾱ_k) · â + √(1 − β) · (1 − ᾱ_{k−1}) / (1 − ᾱ_k) · x_k,   β = 1 − ᾱ_k / ᾱ_{k−1}
        σ² = β · (1 − ᾱ_{k−1}) / (1 − ᾱ_k)

    `DDPMScheduler` of diffusers with `variance_type="fixed_small"` and `clip_sample=True`.
    """

    DRAWS: ClassVar[bool] = True

    def pairs(self, trained: int) -> list[tuple[int, int]]:
        """K − 1 → K − 2 → … → 0 → −1."""
        return [(step, step - 1) for step in reversed(range(trained))]

    def back(self, noisy: Plans, clean: Plans, noise: Plans, fresh: Plans, now: Scalar, before: Scalar) -> Plans:
        """μ + σ · `fresh`; `noise` is not looked at. The last step has σ = 0 and μ = â."""
        kept, left = now / before, (1 - before) / (1 - now)
        mean = before.sqrt() * (1 - kept) / (1 - now) * clean + kept.sqrt() * left * noisy
        return mean + ((1 - kept) * left).sqrt() * fresh


@final
@dataclass(frozen=True)
class DDIM(Sampler):
    """`steps` of the K, without fresh noise (Song et al., 2021, Eq. 12 with σ = 0): x' = √ᾱ' · â + √(1 − ᾱ') · ε̂.

    They are 0, c, 2c, … with c = ⌊K / steps⌋, and the last leads to the actions themselves: `DDIMScheduler` of diffusers
    with `eta=0`, `timestep_spacing="leading"`, `steps_offset=0`, `set_alpha_to_one=True` and `clip_sample=True`.
    """

    steps: int = 10
    DRAWS: ClassVar[bool] = False

    def pairs(self, trained: int) -> list[tuple[int, int]]:
        """(steps − 1)·c → … → c → 0 → −1.

        Raises ConfigError for more steps than there are, or so many that rounding c down leaves out more than a sixth of
        the noisiest: sampling would start there from pure noise where the network expects little.
        """
        stride = trained // max(self.steps, 1)
        if self.steps < 1 or self.steps * stride < trained * 5 / 6:
            fitting = ", ".join(str(n) for n in range(1, trained + 1) if trained % n == 0)
            fault = f"settings.inference_steps: {self.steps} do not spread over the {trained} of training"
            raise ConfigError([f"{fault}; take one of {fitting}"])
        steps = [number * stride for number in reversed(range(self.steps))]
        return [(step, step - stride) if step else (0, -1) for step in steps]

    def back(self, noisy: Plans, clean: Plans, noise: Plans, fresh: Plans, now: Scalar, before: Scalar) -> Plans:
        """√ᾱ' · `clean` + √(1 − ᾱ') · `noise`; the others are not looked at."""
        return before.sqrt() * clean + (1 - before).sqrt() * noise


def denoise(
    denoiser: Denoiser, schedule: NoiseSchedule, sampler: Sampler, noise: Plans, *, generator: torch.Generator
) -> Plans:
    """Actions (B H A) in [−1, 1] from pure noise. Fresh noise, where the sampler adds some, comes from `generator`."""
    pairs = sampler.pairs(schedule.steps)
    x, fresh = noise, torch.zeros_like(noise)
    for step, before in pairs:
        predicted = denoiser(x, torch.full((len(x),), step, device=x.device))
        clean, estimated = schedule.estimate(x, predicted, step)
        if sampler.DRAWS and before >= 0:
            fresh = noise_like(x, generator)
        x = sampler.back(x, clean, estimated, fresh, schedule.at(step), schedule.at(before))
    return x
