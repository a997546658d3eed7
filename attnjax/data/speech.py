# SPDX-License-Identifier: Apache-2.0
"""Speech: LJSpeech as it lies on disk, and tones with known durations, pitch and energy.

Examples hold `phonemes [s]` int32 (0 is padding, and the last is the end, 2), `mel [t, bands]`
float32 (raw log-mel frames) and `frames` int32, how many of them there are; where durations are
known, also `duration [s]` int32 in frames, `pitch [s]`, log(hertz + 1), and `energy [s]`, log(norm
of the magnitudes + 1), means over each phoneme. The end has no duration. Features are those of CAB
(arXiv 2210.07661), which are fairseq's, but for pitch (see `attnjax.audio.pitch`).
"""

import logging
import os
import pathlib
import re
import unicodedata
import wave
from collections.abc import Iterable, Sequence

import numpy as np

from attnjax import audio
from attnjax.data.records import check_on_error
from attnjax.data.sources import check_split
from attnjax.data.synthetic import stream
from attnjax.errors import RecipeError

PADDING, BEGIN, END, UNKNOWN = range(4)

CHARACTERS = " !\"'(),-.:;?[]abcdefghijklmnopqrstuvwxyz"
"""What texts are made of where no dictionary is given; other characters become `UNKNOWN`."""

WORD_BOUNDARY = "|"

_SPLITS = {"test": ("LJ001", "LJ002"), "dev": ("LJ003",)}
"""Chapters of held-out splits, as in FastSpeech; all others are "train"."""

_HEADER = 44  # bytes of a WAV file before its samples

_FOLDED = str.maketrans("\u201c\u201d\u2018\u2019\u2013\u2014", "\"\"''--")
_WORD = re.compile(r"[A-Za-z']+|[^A-Za-z'\s]")

_log = logging.getLogger(__name__)


class LjSpeech:
    """LJSpeech: `root/metadata.csv`, lines of id|text|normalised text, and `root/wavs/<id>.wav`.

    Texts become characters; or phonemes, by a dictionary; or, with alignments, the phonemes and
    durations of these, which FastSpeech 2 needs. Utterances that are too long for a batch are left
    out.

    Args:
      root: folder of the data set.
      split: "train", "dev" or "test".
      length: s, most phonemes, the end included.
      frames: t, most frames.
      dictionary: file of lines "WORD  P1 P2 ...", as CMUdict; other words are spelled.
      alignments: file of lines id|phonemes|durations in frames, both separated by spaces, from the
        first sample on; it replaces texts.
      rate: samples per second of the files.
      on_error: "raise", or "skip" to replace utterances that cannot be read.

    Attributes:
      vocab_size: number of symbols, the special ones included.

    Raises:
      RecipeError: a file is missing or a line is wrong (file and line are named), or nothing is
        left.
    """

    def __init__(
        self,
        root: str,
        split: str = "train",
        length: int = 256,
        frames: int = 1_200,
        dictionary: str = "",
        alignments: str = "",
        rate: int = 22_050,
        on_error: str = "raise",
    ):
        check_split(split, ("train", *_SPLITS))
        if dictionary and alignments:
            raise RecipeError("source.dictionary and source.alignments: only one of them")
        if length < 2 or frames < 1 or rate < 16_000:
            raise RecipeError(
                f"source: length={length} must be at least 2, frames={frames} at least 1 and "
                f"rate={rate} at least 16000"
            )
        self.on_error, self.mel = check_on_error(on_error), audio.Mel(rate=rate)
        self._folder, self._length, self._frames = _expand(root), length, frames
        texts = _metadata(self._folder / "metadata.csv")
        aligned = _alignments(_expand(alignments)) if alignments else {}
        words = _dictionary(_expand(dictionary)) if dictionary else {}
        if alignments:
            symbols = sorted({symbol for phonemes, _ in aligned.values() for symbol in phonemes})
        elif dictionary:
            symbols = sorted({WORD_BOUNDARY, *CHARACTERS, *(p for w in words.values() for p in w)})
        else:
            symbols = list(CHARACTERS)
        self.symbols = {symbol: UNKNOWN + 1 + i for i, symbol in enumerate(symbols)}
        self.vocab_size = UNKNOWN + 1 + len(symbols)
        self._utterances, left_out = [], 0
        for name, text in texts.items():
            if _split_of(name) != split:
                continue
            durations = None
            if alignments:
                if name not in aligned:
                    raise RecipeError(f"source.alignments={alignments!r}: no line for {name}")
                phonemes, durations = aligned[name]
            else:
                phonemes = spell(text, words) if words else list(normalise(text))
            fits = len(phonemes) < length and self._estimate(name, durations) <= frames
            left_out += not fits
            if fits:
                self._utterances.append((name, phonemes, durations))
        if left_out:
            _log.warning("%d utterances of %s do not fit and are left out", left_out, split)
        if not self._utterances:
            raise RecipeError(f"source.root={root!r}: no utterance of split {split!r} that fits")

    def _estimate(self, name, durations):
        """Return how many frames an utterance has, from the size of its file."""
        if durations is not None:
            return sum(durations)
        path = self._path(name)
        if not path.is_file():
            raise RecipeError(f"{path}: no such file, but metadata.csv has {name}")
        return audio.frame_count((path.stat().st_size - _HEADER) // 2, self.mel.hop)

    def _path(self, name):
        return self._folder / "wavs" / f"{name}.wav"

    def __len__(self) -> int:
        return len(self._utterances)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        name, phonemes, durations = self._utterances[index]
        samples = read_wave(self._path(name), self.mel.rate)
        ids = [self.symbols.get(symbol, UNKNOWN) for symbol in phonemes]
        return example(samples, ids, durations, self.mel, self._length, self._frames)

    def locate(self, index: int) -> str:
        """Return the path of an utterance."""
        return str(self._path(self._utterances[index][0]))


class SyntheticSpeech:
    """Tones with two formants for every phoneme: all that FastSpeech 2 predicts is known.

    A phoneme of the alphabet has a duration, a fundamental frequency, formants and a loudness of
    its own. Before a phoneme of an even number it lasts one frame longer: durations need context.
    Example i is a function of (seed, i); the alphabet is one of the seed alone.

    Args:
      split: "train" or "test", never sharing an example.
      seed: a different data set for every value.
      size: examples.
      length: s, phonemes, the end included.
      frames: t, most frames; long enough for every example.
      alphabet: number of phonemes.
      bands: of a frame.

    Attributes:
      vocab_size: number of symbols, the special ones included.
    """

    LONGEST, SHORTEST = 5, 2
    """Frames of a phoneme, without what its neighbour adds."""

    def __init__(
        self,
        split: str = "train",
        seed: int = 0,
        size: int = 4_096,
        length: int = 10,
        frames: int = 64,
        alphabet: int = 12,
        bands: int = 80,
    ):
        self._stream, self._seed, self._size = stream(split, seed, size)
        longest = (length - 1) * (self.LONGEST + 1)
        if length < 5 or alphabet < 2 or bands < 1 or frames < longest:
            raise RecipeError(
                f"source: length={length} must be at least 5, alphabet={alphabet} at least 2 and "
                f"frames={frames} at least {longest}, the longest example"
            )
        self._length, self._frames, self._alphabet = length, frames, alphabet
        self.mel = audio.Mel(bands=bands)
        self.vocab_size = UNKNOWN + 1 + alphabet
        rng = np.random.default_rng((self._seed, 2))
        self.durations = rng.integers(self.SHORTEST, self.LONGEST + 1, alphabet)
        self.hertz = rng.permutation(np.geomspace(110, 330, alphabet))
        self._loudness = rng.permutation(np.linspace(0.1, 0.4, alphabet))
        self._formants = np.stack(
            [rng.permutation(np.geomspace(*ends, alphabet)) for ends in ((300, 900), (1000, 3000))]
        )

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self._seed, self._stream, index))
        letters = rng.integers(self._alphabet, size=rng.integers(4, self._length))
        durations = self.durations[letters] + np.append(letters[1:] % 2 == 0, False)
        samples, hertz = self._speak(letters, durations), self.hertz[letters]
        phonemes = UNKNOWN + 1 + letters
        return example(samples, phonemes, durations, self.mel, self._length, self._frames, hertz)

    def _speak(self, letters, durations):
        """Return harmonics of each phoneme's pitch, shaped by its formants; phases go on."""
        rate, hop = self.mel.rate, self.mel.hop
        per_sample = lambda values: np.repeat(values, durations * hop)
        phase = 2 * np.pi / rate * np.cumsum(per_sample(self.hertz[letters]))
        turn = np.exp(1j * phase).astype(np.complex64)
        turned, samples = np.ones_like(turn), np.zeros(len(phase), np.float32)
        for number in range(1, 25):
            turned *= turn  # e^(i number phase)
            hertz = number * self.hertz[letters]
            distance = (hertz - self._formants[:, letters]) / 150
            loudness = self._loudness[letters] * (1 / (1 + distance**2)).sum(axis=0)
            loudness = (loudness * (hertz < rate / 2) / 4).astype(np.float32)
            samples += per_sample(loudness) * turned.imag
        return samples


def example(
    samples: np.ndarray,
    phonemes: Sequence[int],
    durations: Sequence[int] | None,
    mel: audio.Mel,
    length: int,
    frames: int,
    hertz: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Return an example (see the module) of a wave.

    Args:
      samples: float `[n]`.
      phonemes: token of every phoneme, without the end; fewer than `length`.
      durations: frames of every phoneme, from the first sample on; None: unknown.
      mel: the features.
      length: s.
      frames: t.
      hertz: pitch of every phoneme, where it is known; None: it is measured.

    Raises:
      ValueError: the wave is too short or too long, or durations do not fit.
    """
    phonemes = [*phonemes, END]
    if len(phonemes) > length:
        raise ValueError(f"{len(phonemes)} phonemes do not fit length={length}")
    if len(samples) <= mel.window // 2:
        raise ValueError(f"{len(samples)} samples are not enough for a window of {mel.window}")
    spectrogram = audio.log_mel(samples, mel)
    extra = {}
    if durations is not None:
        durations = np.append(durations, 0).astype(np.int32)
        count = int(durations.sum())
        if len(durations) != len(phonemes) or durations.min() < 0:
            raise ValueError(f"{len(durations) - 1} durations for {len(phonemes) - 1} phonemes")
        if not 1 <= count <= len(spectrogram) + 2:
            raise ValueError(f"durations are {count} frames, the wave has {len(spectrogram)}")
        # Rounded times may end a frame or two after the wave.
        spectrogram = _resize(spectrogram, count)
        energy = _phoneme_means(_resize(audio.energy(samples, mel), count), durations)
        if hertz is None:
            pitch = _voiced(_resize(audio.pitch(samples, mel), count))
            pitch = _phoneme_means(pitch, durations)
        else:
            pitch = np.append(hertz, 0.0)
        extra = {name: np.log1p(x) for name, x in (("pitch", pitch), ("energy", energy))}
        extra = {name: x.astype(np.float32) for name, x in extra.items()} | {"duration": durations}
    count = len(spectrogram)
    if count > frames:
        raise ValueError(f"{count} frames do not fit frames={frames}")
    made = {
        "phonemes": _pad(np.asarray(phonemes, np.int32), length),
        "mel": _pad(spectrogram, frames),
        "frames": np.int32(count),
    }
    return made | {name: _pad(values, length) for name, values in extra.items()}


def mel_statistics(examples: Iterable[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation `[bands]` of the frames of examples."""
    count, total, squares = 0, 0.0, 0.0
    for made in examples:
        frames = made["mel"][: int(made["frames"])].astype(np.float64)
        count += len(frames)
        total, squares = total + frames.sum(axis=0), squares + (frames**2).sum(axis=0)
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-10))


def normalise(text: str) -> str:
    """Return text in small letters, without accents and with plain quotes and dashes."""
    plain = unicodedata.normalize("NFKD", text.translate(_FOLDED))
    plain = "".join(c for c in plain if not unicodedata.combining(c))
    return " ".join(plain.lower().split())


def spell(text: str, words: dict[str, list[str]]) -> list[str]:
    """Return the phonemes of a text: words by a dictionary, others and punctuation by characters.

    Args:
      text: any.
      words: word in small letters -> phonemes.
    """
    symbols: list[str] = []
    for word in _WORD.findall(normalise(text)):
        is_mark = not word[0].isalpha() and word[0] != "'"
        if symbols and not is_mark:
            symbols.append(WORD_BOUNDARY)
        symbols += words.get(word, list(word))
    return symbols


def read_wave(path: str | os.PathLike, rate: int) -> np.ndarray:
    """Read a WAV file of 16-bit samples and one channel.

    Args:
      path: the file.
      rate: samples per second that it must have.

    Returns:
      float32 `[n]` in [-1, 1).

    Raises:
      ValueError: it is no such file.
    """
    try:
        with wave.open(os.fspath(path), "rb") as file:
            found = file.getnchannels(), 8 * file.getsampwidth(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path} is no WAV file: {error}") from error
    if found != (1, 16, rate):
        raise ValueError(
            f"{path} has {found[0]} channels of {found[1]} bits at {found[2]} Hz; expected one of "
            f"16 bits at {rate} Hz"
        )
    return np.frombuffer(content, "<i2").astype(np.float32) / 2**15


def write_wave(path: str | os.PathLike, samples: np.ndarray, rate: int) -> None:
    """Write samples `[n]`, clipped to [-1, 1), as 16-bit WAV."""
    integers = np.clip(np.rint(np.asarray(samples) * 2**15), -(2**15), 2**15 - 1).astype("<i2")
    with wave.open(os.fspath(path), "wb") as file:
        file.setparams((1, 2, rate, len(integers), "NONE", "not compressed"))
        file.writeframes(integers.tobytes())


def _expand(path):
    return pathlib.Path(os.path.expandvars(path)).expanduser()


def _lines(path):
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} cannot be read: {error}") from error


def _metadata(path):
    """Return the text of every id, normalised where there is such a column."""
    texts = {}
    for number, line in enumerate(_lines(path), start=1):
        cells = line.split("|")
        if len(cells) not in (2, 3) or not cells[0] or not cells[-1].strip():
            raise RecipeError(f"{path}:{number}: expected id|text|normalised text, got {line!r}")
        if cells[0] in texts:
            raise RecipeError(f"{path}:{number}: {cells[0]} is there twice")
        texts[cells[0]] = cells[-1]
    return texts


def _alignments(path):
    """Return phonemes and durations of every id."""
    aligned = {}
    for number, line in enumerate(_lines(path), start=1):
        cells = line.split("|")
        parts = [cell.split() for cell in cells[1:]]
        is_fine = len(cells) == 3 and len(parts[0]) == len(parts[1]) > 0
        if not is_fine or not all(word.isdigit() for word in parts[1]):
            raise RecipeError(
                f"{path}:{number}: expected id|phonemes|as many durations, got {line[:80]!r}"
            )
        aligned[cells[0]] = (parts[0], [int(word) for word in parts[1]])
    return aligned


def _dictionary(path):
    """Return phonemes of words; of several pronunciations the first."""
    words: dict[str, list[str]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip() or line.startswith(";;;"):
            continue
        word, *phonemes = line.split()
        if not phonemes:
            raise RecipeError(f"{path}:{number}: no phonemes after {word!r}")
        words.setdefault(re.sub(r"\(\d+\)$", "", word).lower(), phonemes)
    if not words:
        raise RecipeError(f"{path}: no word in it")
    return words


def _split_of(name):
    chapter = name.split("-")[0]
    return next((split for split, held in _SPLITS.items() if chapter in held), "train")


def _pad(values, size):
    return np.pad(values, [(0, size - len(values)), *[(0, 0)] * (values.ndim - 1)])


def _resize(values, count):
    """Cut frames, or repeat the last one."""
    values = values[:count]
    return np.pad(values, [(0, count - len(values)), *[(0, 0)] * (values.ndim - 1)], mode="edge")


def _voiced(pitch):
    """Interpolate where there is no voice; all 0 if there is none at all."""
    (places,) = np.nonzero(pitch)
    return np.interp(np.arange(len(pitch)), places, pitch[places]) if len(places) else pitch


def _phoneme_means(values, durations):
    """Return the mean over the frames of every phoneme, 0 where it has none."""
    sums = np.cumsum(np.append(0.0, values))
    ends = np.cumsum(durations)
    return (sums[ends] - sums[ends - durations]) / np.maximum(durations, 1)
