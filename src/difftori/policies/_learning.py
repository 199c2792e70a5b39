"""Training settings of Diffusion Policy's authors, shared by several policies."""

from typing import Literal

from pydantic import Field

from difftori.interfaces import PolicyConfig


class ChiLearning(PolicyConfig):
    """Training settings of Chi et al. (2023), for their own policies and for those that they compare with."""

    optimizer: Literal["adam", "adamw", "rmsprop"] = "adamw"
    lr: float = Field(default=1e-4, gt=0, allow_inf_nan=False)
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    warmup: int = Field(default=500, ge=0)
    weight_decay: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    beta1: float = Field(default=0.95, ge=0, lt=1)
    clip_norm: float = Field(default=0.0, ge=0, allow_inf_nan=False)
