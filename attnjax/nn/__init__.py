# SPDX-License-Identifier: Apache-2.0
"""Linen blocks that two or more systems share."""

from attnjax.nn.attend import attend
from attnjax.nn.attention import MultiHeadAttention
from attnjax.nn.blocks import EncoderBlock, Mlp, drop_path, gelu
from attnjax.nn.embed import ConvStem, PatchEmbed, TokenEmbed, TokensToToken
from attnjax.nn.norm import LayerNorm, RMSNorm
from attnjax.nn.vision import band_filter, interpolate_positions

__all__ = [
    "ConvStem",
    "EncoderBlock",
    "LayerNorm",
    "Mlp",
    "MultiHeadAttention",
    "PatchEmbed",
    "RMSNorm",
    "TokenEmbed",
    "TokensToToken",
    "attend",
    "band_filter",
    "drop_path",
    "gelu",
    "interpolate_positions",
]
