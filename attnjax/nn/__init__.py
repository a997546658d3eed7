# SPDX-License-Identifier: Apache-2.0
"""Linen blocks that two or more systems share."""

from attnjax.nn.attend import attend
from attnjax.nn.attention import MultiHeadAttention
from attnjax.nn.blocks import EncoderBlock, Mlp, drop_path, gelu
from attnjax.nn.diffusion import (
    Downsample,
    LevelEmbed,
    PictureAttention,
    ResidualBlock,
    Upsample,
)
from attnjax.nn.embed import ConvStem, PatchEmbed, TokenEmbed, TokensToToken
from attnjax.nn.experts import ExpertOptions, Experts
from attnjax.nn.norm import GroupNorm, LayerNorm, RMSNorm
from attnjax.nn.text import DecoderLayer, RotaryAttention, SwiGlu, TokenTable, decoder_stack
from attnjax.nn.vision import band_filter, interpolate_positions

__all__ = [
    "ConvStem",
    "DecoderLayer",
    "Downsample",
    "EncoderBlock",
    "ExpertOptions",
    "Experts",
    "GroupNorm",
    "LayerNorm",
    "LevelEmbed",
    "Mlp",
    "MultiHeadAttention",
    "PatchEmbed",
    "PictureAttention",
    "RMSNorm",
    "ResidualBlock",
    "RotaryAttention",
    "SwiGlu",
    "TokenEmbed",
    "TokenTable",
    "TokensToToken",
    "Upsample",
    "attend",
    "band_filter",
    "decoder_stack",
    "drop_path",
    "gelu",
    "interpolate_positions",
]
