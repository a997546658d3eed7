# SPDX-License-Identifier: Apache-2.0
"""Metrics as mergeable states: sums and counts that add up exactly over batches and hosts."""

from attnjax.metrics.confusion import ConfusionMatrix
from attnjax.metrics.images import psnr, ssim, to_uint8
from attnjax.metrics.language import BitsPerByte, Perplexity
from attnjax.metrics.mean import Accuracy, Mean, TopK
from attnjax.metrics.points import f_score
from attnjax.metrics.samples import SampleQuality
from attnjax.metrics.speech import mel_cepstral_distortion, mel_spectral_distortion
from attnjax.metrics.state import Metric, compute, merge

__all__ = [
    "Accuracy",
    "BitsPerByte",
    "ConfusionMatrix",
    "Mean",
    "Metric",
    "Perplexity",
    "SampleQuality",
    "TopK",
    "compute",
    "f_score",
    "mel_cepstral_distortion",
    "mel_spectral_distortion",
    "merge",
    "psnr",
    "ssim",
    "to_uint8",
]
