# SPDX-License-Identifier: Apache-2.0
"""Speech data: known answers of the tones, LJSpeech's layout, and how it can be wrong."""

import logging

import numpy as np
import pytest

from attnjax import audio
from attnjax.data import speech
from attnjax.errors import RecipeError

RATE = 22_050


@pytest.fixture(scope="module")
def tones():
    return speech.SyntheticSpeech(size=8)


def test_tones_are_a_function_of_seed_and_index(tones):
    first, again = tones[3], speech.SyntheticSpeech(size=8)[3]
    assert set(first) == {"phonemes", "mel", "frames", "duration", "pitch", "energy"}
    for name, value in first.items():
        np.testing.assert_array_equal(value, again[name])
    other = speech.SyntheticSpeech("test", size=8)[3]
    assert not np.array_equal(first["mel"], other["mel"])
    assert (first["mel"].shape, first["mel"].dtype) == ((64, 80), np.float32)
    assert first["phonemes"].shape == (10,) and tones.vocab_size == 16


def test_durations_and_pitch_of_tones_follow_from_the_phonemes(tones):
    for index in range(8):
        made = tones[index]
        phonemes = made["phonemes"][made["phonemes"] > 0]
        assert phonemes[-1] == speech.END and phonemes[:-1].min() > speech.UNKNOWN
        letters = phonemes[:-1] - speech.UNKNOWN - 1
        expected = tones.durations[letters] + np.append(letters[1:] % 2 == 0, 0)
        np.testing.assert_array_equal(made["duration"][: len(letters)], expected)
        assert made["frames"] == expected.sum() == made["duration"].sum()
        pitch = np.log1p(tones.hertz[letters])
        np.testing.assert_allclose(made["pitch"][: len(letters)], pitch, rtol=1e-6)
        assert (made["energy"][: len(letters)] > 0).all()
        assert not made["mel"][made["frames"] :].any()
        for name in ("duration", "pitch", "energy"):
            assert not made[name][len(letters) :].any()


def test_pitch_is_heard_in_the_tones(tones):
    """What is measured in the wave is what the phonemes say."""
    letters = np.array([1, 4, 7])
    samples = tones._speak(letters, np.full(3, 30))
    found = audio.pitch(samples, tones.mel)[:90].reshape(3, 30)
    np.testing.assert_allclose(np.median(found, axis=1), tones.hertz[letters], rtol=5e-3)


def utterance(frames):
    time = np.arange(frames * 256) / RATE
    return 0.3 * np.sin(2 * np.pi * 220 * time)


@pytest.fixture
def folder(tmp_path):
    """Four utterances: two of training, one of each held-out split."""
    (tmp_path / "wavs").mkdir()
    lines = ["LJ001-0001|No.|No.", "LJ003-0001|“Caf\u00e9”|“Caf\u00e9”", "LJ004-0001|2 to|Two to"]
    lines += ["LJ004-0002|Æ, no|Æ, no"]
    (tmp_path / "metadata.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number, line in enumerate(lines):
        path = tmp_path / "wavs" / f"{line.split('|')[0]}.wav"
        speech.write_wave(path, utterance(10 + number), RATE)
    words = ";;; a comment\nTWO  T UW1\nTO  T AH0\nTO(1)  T UW1\nNO  N OW1\n"
    (tmp_path / "words.txt").write_text(words)
    aligned = "LJ004-0001|T UW1 sil T AH0|3 2 0 4 3\nLJ004-0002|N OW1|8 7\n"
    aligned += "LJ001-0001|N OW1|4 6\nLJ003-0001|K|11\n"
    (tmp_path / "aligned.txt").write_text(aligned)
    return tmp_path


def symbols(source, made):
    names = {number: symbol for symbol, number in source.symbols.items()}
    return [names.get(int(i), f"<{i}>") for i in made["phonemes"] if i]


def test_texts_become_characters(folder):
    source = speech.LjSpeech(str(folder), length=12, frames=20)
    assert len(source) == 2 and source.vocab_size == 4 + len(speech.CHARACTERS)
    made = source[0]
    assert set(made) == {"phonemes", "mel", "frames"}
    assert symbols(source, made) == [*"two to", "<2>"]
    assert symbols(source, source[1]) == ["<3>", *", no", "<2>"]
    assert made["frames"] == 13 and made["mel"].shape == (20, 80)
    expected = audio.log_mel(utterance(12).astype(np.float32), source.mel)
    difference = np.abs(made["mel"][:13] - expected)
    assert difference.mean() < 0.02  # 16 bits are heard where there is no sound
    assert source.locate(0).endswith("LJ004-0001.wav")
    held = speech.LjSpeech(str(folder), "dev", length=12, frames=20)
    assert symbols(held, held[0]) == [*'"cafe"', "<2>"]


def test_texts_become_phonemes(folder):
    source = speech.LjSpeech(str(folder), frames=20, dictionary=str(folder / "words.txt"))
    assert symbols(source, source[0]) == ["T", "UW1", "|", "T", "AH0", "<2>"]
    held = speech.LjSpeech(str(folder), "test", frames=20, dictionary=str(folder / "words.txt"))
    assert held.symbols == source.symbols
    assert symbols(held, held[0]) == ["N", "OW1", ".", "<2>"]


def test_alignments_give_durations_pitch_and_energy(folder):
    source = speech.LjSpeech(str(folder), frames=20, alignments=str(folder / "aligned.txt"))
    made = source[0]
    assert symbols(source, made) == ["T", "UW1", "sil", "T", "AH0", "<2>"]
    np.testing.assert_array_equal(made["duration"][:6], [3, 2, 0, 4, 3, 0])
    assert made["frames"] == 12
    np.testing.assert_allclose(made["pitch"][[1, 3]], np.log1p(220), rtol=2e-3)
    assert made["pitch"][2] == made["pitch"][5] == made["energy"][5] == 0
    energy = audio.energy(utterance(12).astype(np.float32), source.mel)
    np.testing.assert_allclose(made["energy"][1], np.log1p(energy[3:5].mean()), rtol=1e-2)
    # Durations may exceed the wave by a rounding, here 15 frames of a wave of 14.
    assert source[1]["frames"] == 15


def test_what_is_too_long_is_left_out_and_said(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert len(speech.LjSpeech(str(folder), frames=13)) == 1
    assert "1 utterances of train do not fit" in caplog.text
    with pytest.raises(RecipeError, match="no utterance of split 'train' that fits"):
        speech.LjSpeech(str(folder), frames=5)


@pytest.mark.parametrize(
    ("file", "content", "options", "message"),
    [
        ("metadata.csv", "LJ004-0001 no bars", {}, "metadata.csv:1: expected id.text.normalised"),
        ("metadata.csv", "LJ004-0001|a|a\nLJ004-0001|b|b", {}, "csv:2: LJ004-0001 is there twice"),
        ("metadata.csv", "LJ009-0001|a|a", {}, "LJ009-0001.wav: no such file"),
        ("words.txt", "TWO", {"dictionary": "words.txt"}, "words.txt:1: no phonemes after 'TWO'"),
        ("words.txt", "", {"dictionary": "words.txt"}, "words.txt: no word in it"),
        ("aligned.txt", "LJ004-0001|T UW1|3", {"alignments": "aligned.txt"}, "txt:1: expected id"),
        ("aligned.txt", "LJ004-0001|T|3", {"alignments": "aligned.txt"}, "no line for LJ004-0002"),
        ("x", "", {"alignments": "a", "dictionary": "b"}, "only one of them"),
        ("x", "", {"split": "valid"}, "source.split='valid'"),
        ("x", "", {"rate": 8_000}, "rate=8000"),
        ("x", "", {"dictionary": "nowhere.txt"}, "nowhere.txt cannot be read"),
    ],
)
def test_wrong_layouts_are_refused(folder, file, content, options, message):
    (folder / file).write_text(content)
    for name in {"dictionary", "alignments"} & set(options):
        options = {**options, name: str(folder / options[name])}
    with pytest.raises(RecipeError, match=message):
        speech.LjSpeech(str(folder), **options)


def test_wrong_files_are_refused_when_they_are_read(folder):
    path = folder / "wavs" / "LJ004-0001.wav"
    source = speech.LjSpeech(str(folder), frames=20)
    speech.write_wave(path, utterance(12), 16_000)
    with pytest.raises(ValueError, match=r"LJ004-0001\.wav has 1 channels of 16 bits at 16000 Hz"):
        source[0]
    path.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"LJ004-0001\.wav is no WAV file"):
        source[0]
    speech.write_wave(path, utterance(1), RATE)
    with pytest.raises(ValueError, match="256 samples are not enough"):
        source[0]
    source = speech.LjSpeech(str(folder), frames=20, alignments=str(folder / "aligned.txt"))
    speech.write_wave(path, utterance(4), RATE)
    with pytest.raises(ValueError, match="durations are 12 frames, the wave has 5"):
        source[0]


def test_tones_that_do_not_fit_are_refused():
    with pytest.raises(RecipeError, match="frames=20 at least 54"):
        speech.SyntheticSpeech(frames=20)


def test_statistics_leave_padding_out(tones):
    mean, deviation = speech.mel_statistics(tones[i] for i in range(3))
    frames = np.concatenate([tones[i]["mel"][: tones[i]["frames"]] for i in range(3)])
    np.testing.assert_allclose(mean, frames.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(deviation, frames.std(axis=0), rtol=1e-4)
