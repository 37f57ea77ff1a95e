"""audio.py against fbank and CMVN written out in numpy, and against broken files."""

import json
import math
import os
import re
import struct
import wave
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest

import audio
from audio import FbankConfig, apply_cmvn, cmvn_stats, fbank, find_audio, read_audio
from utils import UserError

soundfile = pytest.importorskip("soundfile")
kaldi_native_fbank = pytest.importorskip("kaldi_native_fbank")

RATE = 16000


def speech_like(seconds=1.0, seed=0):
    """int16 (samples,): a gliding, amplitude-modulated harmonic tone with noise and an offset."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * (110 * t + 15 * np.sin(3 * t))
    tone = sum(np.sin(k * phase) / k for k in range(1, 30))
    wave_ = 4000 * tone * (1 + np.sin(9 * t)) + 50 * rng.standard_normal(len(t)) + 200
    return np.clip(wave_, -32768, 32767).astype(np.int16)


def reference_fbank(samples, rate=RATE, bins=80, low=20.0):
    """Kaldi's compute-fbank-feats with the original's options, in float64 and frame by frame."""
    samples = samples.astype(np.float64)
    window, shift = rate * 25 // 1000, rate // 100
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


def write(path, samples, rate=RATE, **kwargs):
    soundfile.write(path, samples, rate, **kwargs)
    return str(path)


# ---- fbank


@pytest.mark.parametrize("rate", [16000, 8000])
def test_fbank_is_kaldis(rate):
    samples = speech_like(1.5)
    bins = 80 if rate == 16000 else 40
    config = FbankConfig(sample_rate=rate, num_mel_bins=bins)
    frames = fbank(samples.astype(np.float32), config)
    expected = reference_fbank(samples, rate, bins)
    assert frames.dtype == np.float32 and frames.shape == expected.shape
    np.testing.assert_allclose(frames, expected, atol=1e-3)
    assert np.abs(frames - expected).mean() < 1e-5


def test_fbank_repeats_and_counts_frames():
    config = FbankConfig()
    for count in (400, 559, 560, 16000):
        samples = speech_like()[:count].astype(np.float32)
        frames = fbank(samples, config)
        assert frames.shape == (1 + (count - 400) // 160, 80)
        assert np.array_equal(frames, fbank(samples, config))
        # any other layout or type of the same samples
        assert np.array_equal(frames, fbank(np.repeat(samples, 2)[::2], config))
        assert np.array_equal(frames, fbank(samples.astype(np.int16), config))


def test_fbank_of_silence_is_the_floor():
    frames = fbank(np.zeros(800, np.float32), FbankConfig())
    np.testing.assert_allclose(frames, math.log(2.0**-23), rtol=1e-6)


def test_dither_adds_noise_of_one_16_bit_step():
    silence = np.zeros(RATE, np.float32)
    frames = fbank(silence, FbankConfig(dither=1.0))
    noise = np.random.default_rng(0).standard_normal(RATE)
    assert abs(frames.mean() - reference_fbank(noise).mean()) < 0.05


def test_no_option_is_left_to_the_library():
    """Also fails when a new version of the library brings a new option."""
    options = kaldi_native_fbank.FbankOptions().as_dict()
    names = [set(options.pop(group)) for group in ("frame_opts", "mel_opts")] + [set(options)]
    assert sum(map(len, names)) == len(set().union(*names)), "a name in two groups is ambiguous"
    renamed = {"sample_rate": "samp_freq", "num_mel_bins": "num_bins"}
    ours = {renamed.get(field.name, field.name) for field in fields(FbankConfig)}
    assert ours - {"full_scale"} == set().union(*names)


def test_options_reach_the_library():
    config = FbankConfig(num_mel_bins=40, window_type="povey", use_energy=True, preemph_coeff=0.5)
    options = audio._fbank_options(config)
    assert options.frame_opts.window_type == "povey"
    assert options.frame_opts.preemph_coeff == 0.5
    assert options.mel_opts.num_bins == 40
    assert options.use_energy
    options = audio._fbank_options(FbankConfig())
    assert options.frame_opts.window_type == "hamming" and options.frame_opts.dither == 0
    assert options.mel_opts.num_bins == 80 and options.htk_compat


def test_config_goes_through_json():
    config = FbankConfig(dither=1.0, num_mel_bins=40)
    assert FbankConfig(**json.loads(json.dumps(asdict(config)))) == config


def test_fbank_refusals_name_the_file():
    config = FbankConfig()
    with pytest.raises(UserError, match=r"a\.wav: 399 samples are fewer than one window \(400"):
        fbank(np.zeros(399, np.float32), config, name="a.wav")
    with pytest.raises(UserError, match="a.wav: 0 samples"):
        fbank(np.zeros(0, np.float32), config, name="a.wav")
    with pytest.raises(UserError, match="a.wav: .*NaN or infinite"):
        fbank(speech_like().astype(np.float32) * 1e30, config, name="a.wav")
    with pytest.raises(UserError, match="fbank options: .*num_mel_bins too large"):
        fbank(np.zeros(800, np.float32), replace(config, num_mel_bins=500))


# ---- reading files


def test_16_bit_files_give_their_integers(tmp_path):
    extremes = np.array([-32768, -32767, -1, 0, 1, 32767], np.int16)
    samples = np.concatenate([extremes, speech_like()])
    for ending in ("flac", "wav"):
        read = read_audio(write(tmp_path / f"a.{ending}", samples), RATE)
        assert read.dtype == np.float32
        assert np.array_equal(read, samples)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"subtype": "PCM_24"},
        {"subtype": "PCM_32"},
        {"subtype": "FLOAT"},
        {"subtype": "DOUBLE"},
        {"format": "RF64"},
        {"format": "WAVEX"},
        {"endian": "BIG"},
        {"format": "FLAC", "subtype": "PCM_24"},
    ],
)
def test_other_kinds_of_files_give_the_same_range(tmp_path, kwargs):
    samples = speech_like()
    path = write(tmp_path / "a.wav", samples / 32768, **kwargs)
    assert np.array_equal(read_audio(path, RATE), samples)


def test_wav_of_the_standard_library_with_chunks_after_the_samples(tmp_path):
    samples = speech_like()[:1001]
    with wave.open(str(tmp_path / "a.wav"), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(samples.tobytes())
    with open(tmp_path / "a.wav", "ab") as file:
        file.write(b"LIST" + struct.pack("<I", 4) + b"INFO")
    assert np.array_equal(read_audio(tmp_path / "a.wav", RATE), samples)


def refused(path, reason):
    """The message starts with the file's name, is one line, and matches reason."""
    with pytest.raises(UserError, match=reason) as caught:
        read_audio(path, RATE)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_another_sampling_rate_is_refused_with_a_command(tmp_path):
    path = write(tmp_path / "it's 8k.wav", speech_like(), 8000)
    reason = r"8000 Hz, expected 16000 Hz; resample with: sox '.*8k\.wav' -r 16000 OUT\.wav"
    refused(path, reason)


def test_several_channels_are_refused_with_a_command(tmp_path):
    stereo = np.stack([speech_like()] * 2, axis=1)
    for ending in ("wav", "flac"):
        path = write(tmp_path / f"a.{ending}", stereo)
        refused(path, rf"2 channels, expected 1; .*sox \S*a\.{ending} OUT\.wav remix 1")


@pytest.mark.parametrize("kwargs", [{}, {"format": "RF64"}, {"endian": "BIG"}, {"format": "WAVEX"}])
def test_truncated_wav_is_refused(tmp_path, kwargs):
    path = write(tmp_path / "a.wav", speech_like(), **kwargs)
    whole = Path(path).read_bytes()
    data = whole.index(b"data") + 8
    for size in (16, 40, data - 8, data - 2, data, data + 1, len(whole) // 2, len(whole) - 1):
        Path(path).write_bytes(whole[:size])
        refused(path, "truncated")


def test_wav_from_a_pipe_is_refused_with_a_command(tmp_path):
    path = write(tmp_path / "a.wav", speech_like())
    content = bytearray(Path(path).read_bytes())
    content[40:44] = b"\xff" * 4  # what ffmpeg writes where it cannot go back
    Path(path).write_bytes(content)
    refused(path, r"sox --ignore-length \S*a\.wav OUT\.wav")


def test_truncated_flac_is_refused(tmp_path):
    path = write(tmp_path / "a.flac", speech_like(4))
    whole = Path(path).read_bytes()
    for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.999):
        Path(path).write_bytes(whole[: int(len(whole) * share)])
        refused(path, "decoded|truncated")


def test_flac_cut_between_two_blocks_is_refused(tmp_path):
    path = write(tmp_path / "a.flac", speech_like(4))
    whole = Path(path).read_bytes()
    starts = [m.start() for m in re.finditer(rb"\xff\xf8", whole)]  # a block's first two bytes
    assert len(starts) > 10
    for start in starts[1::4]:
        Path(path).write_bytes(whole[:start])
        refused(path, "decoded|truncated")


def test_damaged_flac_is_refused(tmp_path):
    path = write(tmp_path / "a.flac", speech_like(4))
    content = bytearray(Path(path).read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    Path(path).write_bytes(content)
    refused(path, "decoded|truncated")


@pytest.mark.parametrize(
    "total, reason",
    [
        (0, "does not say how long"),
        (2**36 - 1, "does not say how long"),
        (2**36 - 2, "decoded|truncated"),
        (RATE + 1, "decoded|truncated"),
    ],
)
def test_flac_whose_header_has_another_length_is_refused(tmp_path, total, reason):
    path = write(tmp_path / "a.flac", speech_like())
    content = bytearray(Path(path).read_bytes())
    content[21] = content[21] & 0xF0 | total >> 32  # 36 bits, after 4 + 4 + 13.5 bytes
    content[22:26] = struct.pack(">I", total & 0xFFFFFFFF)
    Path(path).write_bytes(content)
    refused(path, reason)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
@pytest.mark.parametrize("content", [b"", b"fLaC", b"RIFF", b"hello\n" * 99, bytes(4096)])
def test_files_that_are_no_audio_are_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(str(tmp_path / name), "cannot be decoded|truncated")


def test_nan_and_infinity_are_refused(tmp_path):
    for bad in (np.nan, np.inf, -np.inf):
        samples = speech_like().astype(np.float32) / 32768
        samples[700] = bad
        refused(write(tmp_path / "a.wav", samples, subtype="FLOAT"), "NaN or infinite")


def test_missing_file_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.wav"):
        read_audio(tmp_path / "gone.wav", RATE)


# ---- finding files


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")


def test_find_audio_lists_a_tree_by_id(tmp_path):
    touch(tmp_path, "84/121123/84-121123-0001.flac", "84/121123/84-121123-0000.flac")
    touch(tmp_path, "103/1240/103-1240-0000.FLAC", "z.b.Wav", "84/121123/84-121123.trans.txt")
    touch(tmp_path, ".hidden/x.wav", "._z.wav", ".wav", "a.mp3")
    found = find_audio(tmp_path)
    ids = [utt_id for utt_id, _ in found]
    assert ids == ["103-1240-0000", "84-121123-0000", "84-121123-0001", "z.b"]
    assert all(os.path.isfile(path) for _, path in found)
    assert find_audio(found[0][1]) == found[:1]


def test_find_audio_survives_a_loop_of_links(tmp_path):
    touch(tmp_path, "a/x.wav")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "a" / "y.wav").symlink_to(tmp_path / "a" / "x.wav")
    assert [utt_id for utt_id, _ in find_audio(str(tmp_path))] == ["x", "y"]


def test_find_audio_refusals(tmp_path):
    with pytest.raises(UserError, match="gone: no such"):
        find_audio(tmp_path / "gone")
    with pytest.raises(UserError, match="no .flac or .wav"):
        find_audio(tmp_path)
    touch(tmp_path, "a.mp3")
    with pytest.raises(UserError, match="a.mp3: not a .flac or .wav"):
        find_audio(tmp_path / "a.mp3")
    touch(tmp_path, "one/x.wav", "two/x.flac")
    with pytest.raises(UserError, match=r"one/x\.wav and \S*two/x\.flac: two files .* id x"):
        find_audio(tmp_path)


# ---- CMVN


def test_cmvn_is_numpys():
    rng = np.random.default_rng(0)
    frames = (rng.standard_normal((700, 80)) * rng.uniform(0.1, 4, 80) + 12).astype(np.float32)
    wide = frames.astype(np.float64)
    expected = (wide - wide.mean(axis=0)) / wide.std(axis=0)
    normalised = apply_cmvn(frames, cmvn_stats(frames))
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, expected, rtol=0, atol=2e-6)


def test_cmvn_stats_are_kaldis_and_add_up():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((t, 3)).astype(np.float32) for t in (1, 50, 999)]
    stats = cmvn_stats(parts[1])
    assert stats.dtype == np.float64 and stats.shape == (2, 4)
    assert stats[0, 3] == 50 and stats[1, 3] == 0
    np.testing.assert_allclose(stats[0, :3], parts[1].astype(np.float64).sum(axis=0))
    np.testing.assert_allclose(stats[1, :3], (parts[1].astype(np.float64) ** 2).sum(axis=0))
    together = cmvn_stats(np.concatenate(parts))
    np.testing.assert_allclose(sum(map(cmvn_stats, parts)), together, rtol=1e-12)


def test_constant_dimensions_become_zero():
    rng = np.random.default_rng(0)
    frames = np.repeat(rng.standard_normal((1, 80)) * 10, 999, axis=0).astype(np.float32)
    frames[:, 0] = 0
    frames[::2, 1] *= 1 + 1e-6  # rounding is not variance
    frames[:, 2] = np.linspace(-1, 1, 999)
    stats = sum(cmvn_stats(frames[:length]) for length in rng.integers(1, 999, 1000))
    normalised = apply_cmvn(frames, stats)
    assert normalised[:, 2].std() > 0.5
    normalised[:, 2] = 0
    assert not normalised.any()
    assert not apply_cmvn(frames[:1], cmvn_stats(frames[:1])).any()


def test_cmvn_keeps_a_small_variance_on_a_large_mean():
    frames = (1000 + 0.1 * np.random.default_rng(0).standard_normal((5000, 1))).astype(np.float32)
    normalised = apply_cmvn(frames, cmvn_stats(frames)).astype(np.float64)
    assert abs(normalised.mean()) < 1e-5 and abs(normalised.std() - 1) < 1e-5


def test_cmvn_refuses_statistics_that_do_not_fit():
    frames = np.ones((5, 3), np.float32)
    with pytest.raises(ValueError, match="0 frames"):
        apply_cmvn(frames, np.zeros((2, 4)))
    with pytest.raises(ValueError, match="frames"):
        apply_cmvn(frames, cmvn_stats(frames[:, :2]))
