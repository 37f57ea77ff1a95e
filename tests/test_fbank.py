"""formats/fbank.py against fbank and CMVN written out in numpy."""

import json
import math

import kaldi_native_fbank
import numpy as np
import pytest
import torch
from conftest import speech

from formats.fbank import CMVN, cmvn_stats, fbank, fbank_blocks, fbank_settings
from utils import UserError

RATE = 16000

# The original's flags, Kaldi's defaults for the rest.
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


# Settings -----------------------------------------------------------------------------------------


def test_settings_are_the_originals_and_no_option_is_left_to_the_library():
    """Also fails when a new version of the library brings a new option."""
    settings = fbank_settings()
    assert settings == PREPARED == fbank_settings(PREPARED)
    assert all(type(settings[name]) is type(value) for name, value in PREPARED.items())
    changes = {"dither": 1.0, "num_mel_bins": 40, "sample_rate": 8000}
    assert fbank_settings(changes) == settings | changes


def test_every_setting_reaches_the_library(monkeypatch):
    """But full_scale and dither, which are applied before."""
    seen = []

    def reject(options):
        seen.append(options.as_dict())
        raise ValueError("seen")

    monkeypatch.setattr(kaldi_native_fbank, "OnlineFbank", reject)
    change = {bool: lambda x: not x, int: lambda x: x + 1, float: lambda x: x + 1, str: str.upper}
    settings = {name: change[type(value)](value) for name, value in PREPARED.items()}
    with pytest.raises(UserError, match="seen"):
        fbank(np.zeros(RATE, np.float32), fbank_settings(settings))
    options = seen[0].pop("frame_opts") | seen[0].pop("mel_opts") | seen[0]
    settings["samp_freq"] = settings.pop("sample_rate")
    settings["num_bins"] = settings.pop("num_mel_bins")
    assert settings.pop("full_scale") == 32769
    assert options == pytest.approx(settings | {"dither": 0.0})  # they are float32


@pytest.mark.parametrize(
    "name, values, reason",
    [
        ("num_bins", [80], "num_bins: no such"),
        ("num_mel_bins", [80.0, True, None, "80", 500, 10**20], "num_mel_bins"),
        ("sample_rate", ["16000", float("nan"), float("-inf")], "sample_rate"),
        ("use_energy", [1], "use_energy"),
        ("low_freq", [9000], "low-freq 9000"),
        ("window_type", [3, "bartlett"], "window.type"),
        ("frame_length_ms", [0, -25], "less than a sample"),
        ("frame_shift_ms", [0.01], "less than a sample"),
    ],
)
def test_settings_out_of_range_are_a_value_error(name, values, reason):
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


def test_any_layout_type_and_blocks_of_the_samples_give_the_same_frames():
    settings = fbank_settings()
    for count in (400, 559, 560, 32000):
        samples = speech(2)[:count].astype(np.float32)
        frames = fbank(samples, settings)
        assert frames.shape == (1 + (count - 400) // 160, 80)
        assert np.array_equal(frames, fbank(np.repeat(samples, 2)[::2], settings))
        assert np.array_equal(frames, fbank(samples.astype(np.int16), settings))
        for size in (100, 1600, 12345):  # a block may be shorter than a window
            blocks = np.split(samples, range(size, count, size))
            parts = list(fbank_blocks(blocks, settings))
            assert max(map(len, parts)) <= size // 160 + 1
            assert np.array_equal(np.concatenate(parts), frames)


def test_dither_adds_noise_of_one_16_bit_step_that_depends_on_the_utterance_only():
    silence, settings = np.zeros(RATE, np.float32), fbank_settings({"dither": 1.0})
    frames = fbank(silence, settings, utt_id="a")
    noise = np.random.default_rng(0).standard_normal(RATE)
    assert abs(frames.mean() - reference_fbank(noise).mean()) < 0.05
    assert not np.array_equal(frames, fbank(silence, settings, utt_id="b"))
    again = fbank_blocks(np.split(silence, [100, 5000]), settings, utt_id="a")
    assert np.array_equal(frames, np.concatenate([*again]))


def test_what_cannot_be_computed_is_an_error_that_names_it():
    settings, loud = fbank_settings(), speech().astype(np.float32) * 1e30
    for count in (0, 399):
        message = rf"a\.wav: its {count} samples are fewer than one window"
        with pytest.raises(UserError, match=message):
            fbank(np.zeros(count, np.float32), settings, name="a.wav")
    with pytest.raises(UserError, match=r"a\.wav: .*NaN or infinite"):
        fbank(loud, settings, name="a.wav")


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
        ({}, kaldi_apply_cmvn(wide, wide[:40], norm_vars=False)),
        ({"norm_vars": True}, kaldi_apply_cmvn(wide, wide[:40], norm_vars=True)),
        ({"norm_vars": True, "unbiased": True}, ((torchs - torchs.mean(0)) / torchs.std(0))[:40]),
    ]:
        normalised = CMVN("speaker", **options).apply(frames[:40], stats)
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
            cmvn = CMVN("speaker", norm_vars=True, unbiased=unbiased)
            normalised = cmvn.apply(frames, stats)
            one = cmvn.apply(frames[:1], cmvn_stats(frames[:1]))
        assert normalised[:, 2].std() > 0.5
        normalised[:, 2] = 0
        assert not normalised.any() and not one.any()


def test_cmvn_groups():
    utt2spk, frames = {"a": "anna"}, np.ones((3, 2), np.float32)
    for kind, group in [("speaker", "anna"), ("utterance", "a"), ("global", "all"), ("none", "a")]:
        assert CMVN(kind).group("a", "feats:1", utt2spk) == group
    with pytest.raises(UserError, match="feats:1: utterance b has no speaker in utt2spk"):
        CMVN("speaker").group("b", "feats:1", utt2spk)
    assert CMVN("none").apply(frames, None) is frames


@pytest.mark.parametrize(
    "prepared, expected",
    [
        ({"cmvn": "speaker", "norm_vars": False}, CMVN("speaker")),
        ({"cmvn": "utterance", "norm_vars": True}, CMVN("utterance", norm_vars=True)),
        ({"cmvn": "speaker"}, CMVN("speaker", norm_vars=True)),  # before there was norm_vars
        ({"cmvn": "global", "norm_vars": True, "unbiased_vars": True}, CMVN("global", True, True)),
        ({}, CMVN("none")),
    ],
)
def test_cmvn_of_prepared_json(prepared, expected):
    assert CMVN.from_prepared(prepared) == expected
