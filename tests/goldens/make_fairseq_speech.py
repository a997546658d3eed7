# SPDX-License-Identifier: Apache-2.0
"""Write fairseq_speech.npz: what fairseq's FastSpeech 2 and Transformer-TTS say on formula weights.

Run:  python tests/goldens/make_fairseq_speech.py --reference=DIR

DIR is a checkout of fairseq; torch and the packages that it imports are needed. Weights are
functions of names and shapes, so that they need not be stored, and the test needs neither. In
Transformer-TTS, BatchNorm is replaced by GroupNorm, as in our model.
"""

import argparse
import math
import pathlib
import sys
import zlib

import numpy as np

GOLDENS = pathlib.Path(__file__).with_name("fairseq_speech.npz")
SIZES = dict(vocab_size=12, length=7, frames=20, mels=8, width=32, num_heads=2)
FAST = SIZES | dict(depths=(2, 1), hidden=24, kernel=5, variance={
    "width": 16, "bins": 8, "pitch": (3.0, 6.0), "energy": (0.0, 4.0)})  # fmt: skip
STEPWISE = SIZES | dict(depths=(1, 2), hidden=48, frames_per_step=4)
GROUPS = 32


def inputs() -> dict[str, np.ndarray]:
    """Return one utterance without padding: seven phonemes of 20 frames."""
    place = np.arange(7)[None]
    frame = np.arange(20)[None, :, None]
    return {
        "phonemes": (2 + 3 * place % 10).astype(np.int32),
        "duration": np.array([[3, 1, 4, 2, 5, 0, 5]], np.int32),
        "pitch": (4.5 + np.sin(place)).astype(np.float32),
        "energy": (2 + 2.2 * np.cos(place)).astype(np.float32),
        "mel": np.sin(frame * (1 + np.arange(8)) / 7).astype(np.float32),
        "frames": np.array([20], np.int32),
    }


def formula(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return pseudo-random float32 values that depend on the name and the shape alone.

    Norm weights lie around 1; matrices are scaled so that activations keep their size.
    """
    uniform = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if len(shape) == 1:
        values = 0.3 * uniform if name.endswith("bias") else 1 + 0.2 * uniform
    elif "embed" in name:
        values = uniform
    else:
        values = uniform * math.sqrt(3 / math.prod(shape[1:]))
    return values.astype(np.float32)


def import_reference(folder: str):
    """Import fairseq's models on a Python whose dataclasses refuse its mutable defaults."""
    import dataclasses

    import torch

    original = dataclasses.dataclass

    def dataclass(cls=None, /, **options):
        def decorate(cls):
            is_theirs = cls.__module__.startswith(("fairseq", "hydra"))
            return original(cls, **options | ({"unsafe_hash": True} if is_theirs else {}))

        return decorate if cls is None else decorate(cls)

    dataclasses.dataclass = dataclass
    sys.path.insert(0, folder)
    from fairseq.models.text_to_speech import fastspeech2, tts_transformer

    torch.nn.BatchNorm1d = lambda width: torch.nn.GroupNorm(math.gcd(GROUPS, width), width)
    return torch, fastspeech2, tts_transformer


class Symbols:
    """What the models ask of a dictionary."""

    def __len__(self):
        return SIZES["vocab_size"]

    def pad(self):
        return 1


def fill(torch, module, prefix):
    """Set all parameters by the formula, and switch dropout off."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            value = formula(prefix + name, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(value))
    return module.eval()


def main() -> None:
    """Run both models and store what they return."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", required=True)
    torch, fastspeech2, tts_transformer = import_reference(parser.parse_args().reference)
    shared = dict(
        encoder_embed_dim=32, decoder_embed_dim=32, encoder_attention_heads=2, dropout=0.0,
        decoder_attention_heads=2, output_frame_dim=8, max_source_positions=64,
        max_target_positions=64,
    )  # fmt: skip
    given = {name: torch.from_numpy(value) for name, value in inputs().items()}
    tokens = given["phonemes"].long()

    args = argparse.Namespace(
        **shared, n_frames_per_step=1, encoder_layers=2, decoder_layers=1, fft_hidden_dim=24,
        fft_kernel_size=5, var_pred_n_bins=8, var_pred_hidden_dim=16, pitch_min=3.0, pitch_max=6.0,
        energy_min=0.0, energy_max=4.0,
    )  # fmt: skip
    fastspeech2.base_architecture(args)
    model = fill(torch, fastspeech2.FastSpeech2Encoder(args, Symbols(), None), "encoder.")
    with torch.no_grad():
        mel, _, _, log_duration, pitch, energy = model(
            tokens, durations=given["duration"].long(), pitches=given["pitch"],
            energies=given["energy"],
        )  # fmt: skip
    found = {"fast_mel": mel, "fast_log_duration": log_duration, "fast_pitch": pitch}
    found |= {"fast_energy": energy}

    args = argparse.Namespace(
        **shared, n_frames_per_step=4, encoder_transformer_layers=1, decoder_transformer_layers=2,
        encoder_ffn_embed_dim=48, decoder_ffn_embed_dim=48, encoder_normalize_before=True,
        decoder_normalize_before=True, prenet_dim=16, prenet_dropout=0.0, postnet_conv_dim=32,
    )  # fmt: skip
    tts_transformer.base_architecture(args)
    encoder = tts_transformer.TTSTransformerEncoder(args, Symbols(), None)
    decoder = tts_transformer.TTSTransformerDecoder(args, Symbols())
    encoder, decoder = fill(torch, encoder, "encoder."), fill(torch, decoder, "decoder.")
    groups = given["mel"].reshape(1, 5, 32)
    before = torch.cat([torch.zeros(1, 1, 32), groups[:, :-1]], dim=1)
    with torch.no_grad():
        fine, end, extra = decoder(
            before, encoder_out=encoder(tokens), target_lengths=torch.tensor([5])
        )
    found |= {"step_mel": fine, "step_coarse": extra["feature_out"], "step_end": end}
    np.savez_compressed(GOLDENS, **{name: value.numpy() for name, value in found.items()})


if __name__ == "__main__":
    main()
