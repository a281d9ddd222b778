"""Rotary position embedding (arXiv 2104.09864), half-split as LLaMA has it, for decoders and native-size towers.

Letters: T tokens, H heads, K head size, F = K / 2 frequencies.
"""

import math

import torch
from torch import Tensor

from minillava.config import DecoderConfig


def angles(positions_T: Tensor, config: DecoderConfig) -> Tensor:
    """Radians [T, F] of the rotary embedding at these positions, in float32, stretched by `rope_scaling`.

    Linear (arXiv 2306.15595) divides all by `factor`. Llama 3.1 leaves those that turn more often than
    `high_freq_factor` in the old context, divides those below `low_freq_factor`, and blends what is between.
    """
    exponents_F = torch.arange(0, config.head_dim, 2, device=positions_T.device, dtype=torch.float32) / config.head_dim
    radians_F, scaling = 1 / config.rope_theta**exponents_F, config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        radians_F = radians_F / scaling.factor
    elif scaling is not None:
        turns_F = scaling.original_positions * radians_F / (2 * math.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        keep_F = ((turns_F - low) / (high - low)).clamp(0, 1)
        radians_F = (1 - keep_F) * radians_F / scaling.factor + keep_F * radians_F
    return torch.outer(positions_T.float(), radians_F)


def cos_sin(angles_TF: Tensor, dtype: torch.dtype, pairs: bool = False) -> tuple[Tensor, Tensor]:
    """What `rotate` takes, [T, 1, K] for K/2 angles a token. The first half of sin is negated.

    With `pairs` channel i turns by angle i of (angles, angles), and even channels come first. OneVision-Encoder was
    trained so: the two channels of a pair turn by different angles, which is no rotation.
    """
    cos, sin = ((x, x) for x in (angles_TF[:, None].cos(), angles_TF[:, None].sin()))  # of both halves of the channels
    if pairs:
        cos, sin = ((both[..., ::2], both[..., 1::2]) for both in (torch.cat(cos, -1), torch.cat(sin, -1)))
    return torch.cat(cos, -1).to(dtype), torch.cat((-sin[0], sin[1]), -1).to(dtype)


def rotate(x_THK: Tensor, cos_T1K: Tensor, sin_T1K: Tensor) -> Tensor:
    """Rotary embedding in the half-split convention: pairs are (i, i + K/2)."""
    return torch.addcmul(x_THK * cos_T1K, x_THK.roll(x_THK.shape[-1] // 2, -1), sin_T1K)
