"""formats/audio.py against fbank and CMVN written out in numpy, and against broken files."""

import json
import math
import os
import re
import struct
import wave
from pathlib import Path

import kaldi_native_fbank
import numpy as np
import pytest
import soundfile
import torch
from conftest import speech

from formats import audio
from formats.audio import (
    apply_cmvn,
    cmvn_stats,
    fbank,
    fbank_settings,
    find_audio,
    read_audio,
    read_fbank,
    read_fbank_blocks,
)
from utils import UserError

RATE = 16000

# What prepared.json says of the original's features: its flags, Kaldi's defaults for the rest.
PREPARED = json.loads(
    """{"full_scale": 32768.0, "sample_rate": 16000.0, "frame_length_ms": 25.0,
    "frame_shift_ms": 10.0, "dither": 0.0, "preemph_coeff": 0.97, "remove_dc_offset": true,
    "window_type": "hamming", "blackman_coeff": 0.42, "round_to_power_of_two": true,
    "snip_edges": true, "num_mel_bins": 80, "low_freq": 20.0, "high_freq": 0.0, "vtln_low": 100.0,
    "vtln_high": -500.0, "debug_mel": false, "htk_mode": false, "is_librosa": false,
    "norm": "slaney", "use_slaney_mel_scale": true, "floor_to_int_bin": false, "use_power": true,
    "use_log_fbank": true, "use_log_floor": true, "eps": 1.1920928955078125e-07,
    "use_energy": false, "energy_floor": 0.0, "raw_energy": true, "htk_compat": true}"""
)


def reference_fbank(samples, rate=RATE, bins=80, low=20.0, length_ms=25, shift_ms=10):
    """Kaldi's compute-fbank-feats with the original's options, in float64 and frame by frame."""
    samples = np.asarray(samples, np.float64)
    window, shift = rate * length_ms // 1000, rate * shift_ms // 1000
    fft = 2 ** math.ceil(math.log2(window))
    hamming = 0.54 - 0.46 * np.cos(2 * np.pi * np.arange(window) / (window - 1))

    def mel(hertz):
        return 1127 * np.log1p(np.asarray(hertz) / 700)

    edges = np.linspace(mel(low), mel(rate / 2), bins + 2)
    points = mel(np.arange(fft // 2) * rate / fft)  # Kaldi leaves out the last one, rate / 2
    filters = np.zeros((bins, fft // 2))
    for i in range(bins):
        left, centre, right = edges[i : i + 3]
        rising, falling = (points - left) / (centre - left), (right - points) / (right - centre)
        filters[i] = np.maximum(0, np.minimum(rising, falling))
    frames = []
    for start in range(0, len(samples) - window + 1, shift):
        frame = samples[start : start + window]
        frame = frame - frame.mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * hamming, fft)[:-1]) ** 2
        frames.append(np.log(np.maximum(filters @ power, 2.0**-23)))
    return np.array(frames)


def write(path, samples, rate=RATE, **kw):
    soundfile.write(path, samples, rate, **kw)
    return str(path)


# Settings -----------------------------------------------------------------------------------------


def options_by_hand(settings):
    """kaldi-native-fbank's options, each set by itself."""
    options = kaldi_native_fbank.FbankOptions()
    for name, value in settings.items():
        name = {"sample_rate": "samp_freq", "num_mel_bins": "num_bins"}.get(name, name)
        groups = (options.frame_opts, options.mel_opts, options)
        holders = [group for group in groups if hasattr(group, name)]
        assert len(holders) == (name != "full_scale"), "no option has this name, or two have"
        for group in holders:
            setattr(group, name, value)
    return options


def test_settings_are_the_originals_and_nothing_is_left_to_the_library():
    """Also fails when a new version of the library brings a new option."""
    settings = fbank_settings()
    assert settings == PREPARED == fbank_settings(PREPARED)
    assert all(type(settings[name]) is type(value) for name, value in PREPARED.items())
    changes = {"dither": 1.0, "num_mel_bins": 40, "sample_rate": 8000}
    assert fbank_settings(changes) == settings | changes
    assert fbank_settings(json.loads(json.dumps(settings))) == settings


def test_every_setting_reaches_the_library(monkeypatch):
    seen = []

    def refuse(options):
        seen.append(options.as_dict())
        raise ValueError("seen")

    monkeypatch.setattr(kaldi_native_fbank, "OnlineFbank", refuse)
    change = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 1, str: str.upper}
    for name, value in PREPARED.items():
        settings = PREPARED | {name: change[type(value)](value)}
        with pytest.raises(UserError, match="seen"):
            fbank(np.zeros(RATE, np.float32), fbank_settings(settings))
        assert seen.pop() == options_by_hand(settings).as_dict(), name


@pytest.mark.parametrize(
    "name, values, reason",
    [
        ("num_bins", [80], "num_bins: no such"),
        ("num_mel_bins", [80.0, True, None, "80", 500, 10**20], "num_mel_bins"),
        ("sample_rate", ["16000", float("nan"), float("-inf")], "sample_rate"),
        ("eps", [float("nan"), 10**400], "eps"),
        ("dither", [False, [1.0]], "dither"),
        ("use_energy", [1], "use_energy"),
        ("low_freq", [9000], "low-freq 9000"),
        ("window_type", [3, "bartlett"], "window.type"),
        ("frame_length_ms", [0, -25], "less than a sample"),
        ("frame_shift_ms", [0.01], "less than a sample"),
    ],
)
def test_settings_that_mean_nothing_are_a_value_error(name, values, reason):
    for value in values:
        with pytest.raises(ValueError, match=reason):
            fbank(np.zeros(RATE, np.float32), fbank_settings({name: value}))


# Fbank --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate, bins", [(16000, 80), (8000, 40)])
def test_fbank_is_kaldis(rate, bins):
    samples = speech(1.5, rate=rate)
    samples[3000:6000] = 0  # there the energies are at their floor
    settings = fbank_settings({"sample_rate": rate, "num_mel_bins": bins})
    frames = fbank(samples.astype(np.float32), settings)
    expected = reference_fbank(samples, rate, bins)
    assert frames.dtype == np.float32 and frames.shape == expected.shape
    np.testing.assert_allclose(frames, expected, atol=1e-3)
    assert np.abs(frames - expected).mean() < 1e-5


def test_fbank_repeats_and_counts_frames():
    settings = fbank_settings()
    for count in (400, 559, 560, 16000):
        samples = speech()[:count].astype(np.float32)
        frames = fbank(samples, settings)
        assert frames.shape == (1 + (count - 400) // 160, 80)
        assert np.array_equal(frames, fbank(samples, settings))
        # any other layout or type of the same samples
        assert np.array_equal(frames, fbank(np.repeat(samples, 2)[::2], settings))
        assert np.array_equal(frames, fbank(samples.astype(np.int16), settings))


def test_dither_adds_noise_of_one_16_bit_step():
    frames = fbank(np.zeros(RATE, np.float32), fbank_settings({"dither": 1.0}))
    noise = np.random.default_rng(0).standard_normal(RATE)
    assert abs(frames.mean() - reference_fbank(noise).mean()) < 0.05


def test_long_files_go_through_in_blocks(tmp_path, monkeypatch):
    path, settings = write(tmp_path / "a.flac", speech(2)), fbank_settings()
    whole = read_fbank(path, settings)
    for size in (100, 1600, 12345):  # a block may be shorter than a window
        monkeypatch.setattr(audio, "BLOCK_SIZE", size)
        blocks = list(read_fbank_blocks(path, settings))
        assert max(map(len, blocks)) <= size // 160 + 1
        assert np.array_equal(np.concatenate(blocks), whole)


def test_fbank_refuses_by_the_files_name(tmp_path):
    settings, loud = fbank_settings(), speech().astype(np.float32) * 1e30
    with pytest.raises(UserError, match=r"a\.wav: 0 samples are fewer than one window \(400"):
        fbank(np.zeros(0, np.float32), settings, name="a.wav")
    with pytest.raises(UserError, match=r"a\.wav: .*NaN or infinite"):
        fbank(loud, settings, name="a.wav")
    with pytest.raises(UserError, match=r"b\.wav: 399 samples are fewer than one window \(400"):
        read_fbank(write(tmp_path / "b.wav", speech()[:399]), settings)


# Reading files ------------------------------------------------------------------------------------


def test_every_kind_of_file_gives_its_16_bit_integers(tmp_path):
    extremes = np.array([-32768, -32767, -1, 0, 1, 32767], np.int16)
    samples = np.concatenate([extremes, speech()])
    kinds = [{"subtype": name} for name in ("PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE")]
    kinds += [{"format": name} for name in ("FLAC", "RF64", "WAVEX")]
    for kw in [*kinds, {"format": "FLAC", "subtype": "PCM_24"}, {"endian": "BIG"}]:
        read = read_audio(write(tmp_path / "a.wav", samples / 32768, **kw), RATE)
        assert read.dtype == np.float32 and np.array_equal(read, samples), kw


def test_wav_of_another_writer_with_other_chunks_around_the_samples(tmp_path):
    path, samples = tmp_path / "a.wav", speech()[:1001]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", None))
        file.writeframes(samples.tobytes())
    content, chunk = path.read_bytes(), b"LIST" + struct.pack("<I", 5) + b"INFO?\0"  # 5, and a pad
    path.write_bytes(content[:36] + chunk + content[36:] + chunk)
    assert np.array_equal(read_audio(path, RATE), samples)


def refused(path, reason):
    """The message starts with the file's name, is one line, and matches reason."""
    with pytest.raises(UserError, match=reason) as caught:
        read_audio(path, RATE)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_what_sox_can_mend_is_refused_with_its_command(tmp_path):
    path = write(tmp_path / "it's 8k.wav", speech(), 8000)
    reason = r"8000 Hz, expected 16000 Hz; resample with: sox '.*8k\.wav' -r 16000 OUT\.wav"
    refused(path, reason)
    path = write(tmp_path / "a.flac", np.stack([speech()] * 2, axis=1))
    refused(path, r"2 channels, expected 1; .*sox \S*a\.flac OUT\.wav remix 1")
    path = Path(write(tmp_path / "a.wav", speech()))
    content = bytearray(path.read_bytes())
    content[40:44] = b"\xff" * 4  # what ffmpeg writes where it cannot go back
    path.write_bytes(content)
    refused(path, r"sox --ignore-length \S*a\.wav OUT\.wav")


def test_truncated_wav_is_refused(tmp_path):
    for kw in ({}, {"format": "RF64"}, {"endian": "BIG"}, {"format": "WAVEX"}):
        path = Path(write(tmp_path / "a.wav", speech(), **kw))
        whole = path.read_bytes()
        data = whole.index(b"data") + 8
        for size in (16, 40, data - 8, data - 2, data, data + 1, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:size])
            refused(path, "truncated")


def test_truncated_or_damaged_flac_is_refused(tmp_path):
    path = Path(write(tmp_path / "a.flac", speech(4)))
    whole = path.read_bytes()
    blocks = [found.start() for found in re.finditer(rb"\xff\xf8", whole)]  # their first two bytes
    assert len(blocks) > 10
    shares = [int(len(whole) * share) for share in (0.001, 0.01, 0.1, 0.5, 0.999)]
    for size in shares + blocks[1::4]:
        path.write_bytes(whole[:size])
        refused(path, "decoded|truncated")
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes(64) + whole[middle + 64 :])
    refused(path, "decoded|truncated")


def test_flac_whose_header_has_another_length_is_refused(tmp_path):
    path = Path(write(tmp_path / "a.flac", speech()))
    content = bytearray(path.read_bytes())
    for total in (0, 2**36 - 1, 2**36 - 2, RATE + 1):  # the first two: written to a pipe
        content[21] = content[21] & 0xF0 | total >> 32  # 36 bits, after 4 + 4 + 13.5 bytes
        content[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
        path.write_bytes(content)
        unknown = total in (0, 2**36 - 1)
        refused(path, r"how long .* sox \S*a\.flac OUT" if unknown else "decoded|truncated")


def test_files_that_are_no_audio_are_refused(tmp_path):
    for name in ("a.wav", "a.flac"):
        for content in (b"", b"fLaC", b"RIFF", b"hello\n" * 99, bytes(4096)):
            (tmp_path / name).write_bytes(content)
            refused(tmp_path / name, "cannot be decoded|truncated")
    with pytest.raises(FileNotFoundError, match=r"gone\.wav"):
        read_audio(tmp_path / "gone.wav", RATE)


def test_nan_and_infinity_are_refused(tmp_path):
    for bad in (np.nan, np.inf, -np.inf, 1e38):  # the last overflows in 16-bit range
        samples = speech().astype(np.float32) / 32768
        samples[700] = bad
        refused(write(tmp_path / "a.wav", samples, subtype="FLOAT"), "NaN or infinite")


# Finding files ------------------------------------------------------------------------------------


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_find_audio_lists_a_tree_by_id(tmp_path):
    touch(tmp_path, "84/121123/84-121123-0001.flac", "84/121123/84-121123-0000.flac")
    touch(tmp_path, "103/1240/103-1240-0000.FLAC", "z.b.Wav", "84/121123/84-121123.trans.txt")
    touch(tmp_path, ".hidden/x.wav", "._z.wav", ".wav", "a.mp3")
    (tmp_path / "84" / "loop").symlink_to(tmp_path)
    (tmp_path / "84" / "y.wav").symlink_to(tmp_path / "z.b.Wav")
    found = find_audio(tmp_path)
    ids = [utt_id for utt_id, _ in found]
    assert ids == ["103-1240-0000", "84-121123-0000", "84-121123-0001", "y", "z.b"]
    assert all(os.path.isfile(path) for _, path in found)
    assert find_audio(found[0][1]) == found[:1]


def test_find_audio_refuses_what_holds_none(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="gone: no such"):
        find_audio(tmp_path / "gone")
    with pytest.raises(UserError, match=r"no \.flac or \.wav"):
        find_audio(tmp_path)
    touch(tmp_path, "a.mp3", "locked/x.wav")
    with pytest.raises(UserError, match=r"a\.mp3: not a \.flac or \.wav"):
        find_audio(tmp_path / "a.mp3")
    scandir = os.scandir

    def locked(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", locked)  # root may read everything
    with pytest.raises(PermissionError, match="locked"):
        find_audio(tmp_path)


def test_find_audio_refuses_names_that_cannot_be_used_or_skips_them(tmp_path):
    touch(tmp_path, "0/good.wav", "1/x.flac", "1/sub/x.wav", "2/a\\b.wav", "3/y.wav")
    os.mkfifo(tmp_path / "3" / "pipe.wav")  # opened, it would be waited for
    bad = {
        "1": r"1/sub/x\.wav and \S*1/x\.flac: two files .* id x",
        "2": r"a\\b\.wav: utterance id .* cannot be a file name",
        "3": r"pipe\.wav: not a regular file",
    }
    for folder, reason in bad.items():
        with pytest.raises(UserError, match=reason):
            find_audio(tmp_path / folder)
    skipped = []
    assert [utt_id for utt_id, _ in find_audio(tmp_path, skipped)] == ["good", "x", "y"]
    assert all(re.search(reason, line) for reason, line in zip(bad.values(), skipped, strict=True))


# CMVN ---------------------------------------------------------------------------------------------


def kaldi_apply_cmvn(speaker, frames, norm_vars):
    """Kaldi's ApplyCmvn in numpy: each number times a scale and plus an offset."""
    sums, squares = speaker.sum(axis=0), np.square(speaker).sum(axis=0)
    mean, scale = sums / len(speaker), np.ones(speaker.shape[1])
    if norm_vars:
        scale = 1 / np.sqrt(np.maximum(squares / len(speaker) - mean * mean, 1e-20))
    return frames * scale - mean * scale


def test_cmvn_is_kaldis_or_that_of_torch_std():
    """Of two utterances of a speaker, with a small variance on a large mean."""
    rng = np.random.default_rng(0)
    frames = (rng.standard_normal((700, 80)) * rng.uniform(0.1, 4, 80) + 12).astype(np.float32)
    frames[:, 0] = 1000 + 0.1 * rng.standard_normal(700)
    stats = cmvn_stats(frames[:40]) + cmvn_stats(frames[40:])
    wide, torchs = frames.astype(np.float64), torch.from_numpy(frames).double()
    for options, expected in [
        ({"norm_vars": False}, kaldi_apply_cmvn(wide, wide[:40], norm_vars=False)),
        ({"norm_vars": True}, kaldi_apply_cmvn(wide, wide[:40], norm_vars=True)),
        ({"norm_vars": True, "unbiased": True}, ((torchs - torchs.mean(0)) / torchs.std(0))[:40]),
    ]:
        normalised = apply_cmvn(frames[:40], stats, **options)
        assert normalised.dtype == np.float32
        np.testing.assert_allclose(normalised, expected, rtol=0, atol=1e-6, err_msg=options)


def test_cmvn_stats_are_kaldis_and_add_up():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((t, 3)).astype(np.float32) for t in (1, 50, 999)]
    stats, wide = cmvn_stats(parts[1]), parts[1].astype(np.float64)
    expected = [[*wide.sum(axis=0), 50], [*(wide**2).sum(axis=0), 0]]
    assert stats.dtype == np.float64
    np.testing.assert_allclose(stats, expected, rtol=1e-12)
    together = cmvn_stats(np.concatenate(parts))
    np.testing.assert_allclose(sum(map(cmvn_stats, parts)), together, rtol=1e-12)


def test_constant_dimensions_become_zero():
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.standard_normal((1, 80)) * 10, 999, axis=0).astype(np.float32)
    frames[:, 0] = 0
    frames[::2, 1] *= 1 + 1e-6  # rounding is not variance
    frames[:, 2] = np.linspace(-1, 1, 999)
    stats = sum(cmvn_stats(frames[:length]) for length in rng.integers(1, 999, 1000))
    for unbiased in (False, True):
        with np.errstate(divide="raise", invalid="raise"):
            normalised = apply_cmvn(frames, stats, norm_vars=True, unbiased=unbiased)
            one = apply_cmvn(frames[:1], cmvn_stats(frames[:1]), True, unbiased)
        assert normalised[:, 2].std() > 0.5
        normalised[:, 2] = 0
        assert not normalised.any() and not one.any()
