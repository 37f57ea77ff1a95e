"""Speech files to log-Mel frames, as the original's authors made theirs with Kaldi, and CMVN.

    samples = read_audio("84-121123-0000.flac", sample_rate=16000)    # (samples,), 16-bit range
    frames = fbank(samples, FbankConfig(), name="84-121123-0000")     # (T, D), 100 frames a second
    normalised = apply_cmvn(frames, cmvn_stats(frames))               # mean 0, variance 1

T frames, D mel_dim. Only the functions that need kaldi-native-fbank and soundfile import them: who
prepares Kaldi's files needs neither.
"""

from __future__ import annotations

import functools
import math
import os
import shlex
import struct
from dataclasses import asdict, dataclass, fields

import numpy as np

from kaldi_io import check_utt_id
from utils import UserError

AUDIO_ENDINGS = (".flac", ".wav")
FULL_SCALE = 32768.0  # soundfile scales samples to [-1, 1); Kaldi takes 16-bit integers as they are


@dataclass(frozen=True)
class FbankConfig:
    """Every option of the log-Mel features; plain values, so `asdict` of it goes into JSON and
    `FbankConfig(**that)` comes back.

    The defaults are the original's command, `compute-fbank-feats --window-type=hamming
    --use-energy=false --dither=1 --num-mel-bins=80 --htk-compat=true` with Kaldi's own defaults for
    the rest, except that dither is 0: it adds random noise, and runs would not repeat.
    kaldi-native-fbank has other defaults (another window, 23 bins, dither for samples within
    [-1, 1]), therefore nothing is left to them.
    """

    # frames
    full_scale: float = FULL_SCALE  # of the samples; torchaudio, and with it s3prl, has 1
    sample_rate: float = 16000.0  # Hz
    frame_length_ms: float = 25.0
    frame_shift_ms: float = 10.0
    dither: float = 0.0  # standard deviation of the added noise, in steps of 16-bit samples
    preemph_coeff: float = 0.97
    remove_dc_offset: bool = True  # subtract each window's mean
    window_type: str = "hamming"
    blackman_coeff: float = 0.42  # read for window_type "blackman" alone
    round_to_power_of_two: bool = True  # FFT length: 512 for 400 samples
    snip_edges: bool = True  # only windows that lie wholly within the utterance
    # mel filters
    num_mel_bins: int = 80
    low_freq: float = 20.0  # Hz
    high_freq: float = 0.0  # Hz; 0 and below: counted from half the sampling rate
    vtln_low: float = 100.0  # Hz; vocal tract length warping, which is not used
    vtln_high: float = -500.0
    debug_mel: bool = False
    htk_mode: bool = False
    is_librosa: bool = False  # the next three are read for librosa's filters alone
    norm: str = "slaney"
    use_slaney_mel_scale: bool = True
    floor_to_int_bin: bool = False
    # energies
    use_power: bool = True  # power, not magnitude, spectrum
    use_log_fbank: bool = True
    use_log_floor: bool = True  # log(max(energy, eps)); else log(energy + eps)
    eps: float = float(np.finfo(np.float32).eps)  # keeps the log of digital silence finite: -15.9
    use_energy: bool = False  # an additional dimension; the next three are read with it alone
    energy_floor: float = 0.0
    raw_energy: bool = True
    htk_compat: bool = True

    def __post_init__(self):
        """Settings may come from a file: ValueError if one is of another kind, or means nothing."""
        for field in fields(self):
            value, kind = getattr(self, field.name), type(field.default)
            kinds = (float, int) if kind is float else (kind,)
            if type(value) not in kinds or kind is float and not math.isfinite(value):
                raise ValueError(f"{field.name} {value!r}")
        if min(self.frame_length_ms, self.frame_shift_ms) * self.sample_rate < 1000:
            raise ValueError("frames or their shift of less than a sample")


def find_audio(root: str | os.PathLike, skipped: list[str] | None = None) -> list[tuple[str, str]]:
    """List every .flac and .wav file (endings in any case) below a folder, or one file by itself.

    Hidden files and folders are left out, and links to folders are not followed.

    Args:
        root: the folder or file.
        skipped: takes messages about files whose names cannot be used, instead of an error.

    Returns:
        (utterance id, path) sorted by id; the id is the file's name without its ending.

    Raises:
        UserError: nothing at root, no audio there, or one id twice, an id that is no file name.
        OSError: a folder that cannot be read.
    """
    root = os.fspath(root)
    if os.path.isfile(root):
        paths = [root]
    elif os.path.isdir(root):
        paths = list(_walk(root))
    else:
        raise UserError(f"{root}: no such file or folder")
    found = {}
    for path in sorted(paths):
        utt_id, ending = os.path.splitext(os.path.basename(path))
        if ending.lower() not in AUDIO_ENDINGS:
            continue
        try:
            if os.path.exists(path) and not os.path.isfile(path):
                raise UserError(f"{path}: not a regular file")
            check_utt_id(utt_id, path)
            if utt_id in found:
                raise UserError(
                    f"{found[utt_id]} and {path}: two files with the utterance id {utt_id}"
                )
        except UserError as error:
            if skipped is None:
                raise
            skipped.append(str(error))
            continue
        found[utt_id] = path
    if not found:
        endings = " or ".join(AUDIO_ENDINGS)
        if os.path.isfile(root):
            raise UserError(f"{root}: not a {endings} file")
        raise UserError(f"{root}: no {endings} file in it (links to folders are not followed)")
    return sorted(found.items())


def _walk(root):
    def fail(error):  # os.walk would pass over an unreadable folder, and its speech with it
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def read_audio(path: str | os.PathLike, sample_rate: float) -> np.ndarray:
    """Read a mono file's samples, float32 (samples,) in 16-bit range: 16-bit files give exactly
    their integers, floating-point ones 32768 times what they hold.

    Raises:
        UserError: the file's name and what is wrong: another sampling rate than sample_rate (Hz),
            several channels, not decodable, truncated, NaN or infinity.
        OSError: a file that cannot be opened.
    """
    import soundfile

    path = os.fspath(path)
    name = shlex.quote(path)
    _check_wav_is_whole(path)
    try:
        with soundfile.SoundFile(os.fsencode(path)) as file:  # a name need not be UTF-8
            if file.samplerate != sample_rate:
                raise UserError(
                    f"{path}: sampling rate {file.samplerate} Hz, expected {sample_rate:g} Hz; "
                    f"resample with: sox {name} -r {sample_rate:g} OUT.wav"
                )
            if file.channels != 1:
                raise UserError(
                    f"{path}: {file.channels} channels, expected 1; "
                    f"take the first with: sox {name} OUT.wav remix 1"
                )
            # A FLAC written to a pipe does not know its length: then no cut could be noticed.
            if file.frames >= 2**36 - 1:
                raise UserError(
                    f"{path}: its header does not say how long it is; "
                    f"write it anew with: sox {name} OUT.flac"
                )
            expected = file.frames
            samples = file.read(expected, dtype="float32")
    except (soundfile.SoundFileError, MemoryError) as error:
        # libsndfile's text may name the file again and may run over several lines
        reason = getattr(error, "error_string", "its header claims more samples than fit in memory")
        reason = " ".join(reason.split())
        raise UserError(f"{path}: cannot be decoded, damaged or truncated: {reason}") from None
    if len(samples) != expected:
        raise UserError(f"{path}: truncated: {len(samples)} of {expected} samples")
    with np.errstate(over="ignore"):
        samples *= FULL_SCALE
    if not np.isfinite(samples).all():
        raise UserError(f"{path}: holds samples that are NaN or infinite")
    return samples


def _check_wav_is_whole(path):
    """Refuse a WAV that holds fewer bytes of samples than its header says. libsndfile reads such a
    file without a word, and states as its length what is left of it."""
    with open(path, "rb") as file:
        form = file.read(12)[:4]
        if form not in (b"RIFF", b"RIFX", b"RF64"):
            return  # not a WAV, whatever its name: libsndfile will say
        file_size = os.fstat(file.fileno()).st_size
        data_size_64 = None
        while len(header := file.read(8)) == 8:
            size = struct.unpack(">I" if form == b"RIFX" else "<I", header[4:])[0]
            if header[:4] == b"data":
                if form == b"RF64" and data_size_64 is not None:
                    size = data_size_64
                held = file_size - file.tell()
                if held < size:
                    raise UserError(
                        f"{path}: truncated: {held} of the {size} bytes of samples in its header "
                        f"(if it is whole, and was written to a pipe: "
                        f"sox --ignore-length {shlex.quote(path)} OUT.wav)"
                    )
                return
            start = file.tell()
            if header[:4] == b"ds64":  # RF64, for files over 4 GiB: sizes of the file, of the data
                data_size_64 = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))[1]
            file.seek(start + size + size % 2)  # chunks begin at even positions
    raise UserError(f"{path}: truncated: ends within its header")


def fbank(samples: np.ndarray, config: FbankConfig, name: str = "audio") -> np.ndarray:
    """Log-Mel energies of one utterance.

    Args:
        samples: float32 (samples,) in 16-bit range, as read_audio gives them.
        config: the options. With dither 0 the result repeats exactly.
        name: what error messages call the utterance: its file.

    Returns:
        float32 (T, num_mel_bins), natural logarithm;
        T = 1 + (samples - window) // shift, with 400 and 160 samples at 16 kHz.

    Raises:
        UserError: fewer samples than one window; energies beyond float32; options that do not fit
            each other, such as more mel bins than the window's spectrum can fill.
    """
    import kaldi_native_fbank

    window = int(config.sample_rate * config.frame_length_ms / 1000)
    if len(samples) < window:
        raise UserError(
            f"{name}: {len(samples)} samples are fewer than one window "
            f"({window} samples, {config.frame_length_ms:g} ms)"
        )
    try:
        extractor = kaldi_native_fbank.OnlineFbank(_fbank_options(config))
        # Given the array, it would take 40 % more time: the binding reads single items, and a
        # memoryview makes Python floats of them faster than numpy does its scalars.
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        if config.full_scale != FULL_SCALE:
            samples = samples * np.float32(config.full_scale / FULL_SCALE)
        extractor.accept_waveform(config.sample_rate, memoryview(samples))
        extractor.input_finished()
    except ValueError as error:
        raise UserError(f"fbank options: {error}") from None
    except RuntimeError as error:
        raise UserError(f"{name}: no log-Mel energies: {' '.join(str(error).split())}") from None
    # There is no call for all frames at once. The rows belong to the extractor: np.array copies.
    frames = np.array([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])
    if not np.isfinite(frames).all():
        raise UserError(f"{name}: log-Mel energies that are NaN or infinite (samples too large)")
    return frames


def read_fbank(path: str | os.PathLike, config: FbankConfig) -> np.ndarray:
    """A file's log-Mel frames, float32 (T, num_mel_bins): read_audio(), then fbank(); their errors
    name the file.
    """
    return fbank(read_audio(path, config.sample_rate), config, name=path)


@functools.cache
def _fbank_options(config):
    """Write every field of config into the option group that has it."""
    import kaldi_native_fbank

    options = kaldi_native_fbank.FbankOptions()
    renamed = {"sample_rate": "samp_freq", "num_mel_bins": "num_bins"}
    for field, value in asdict(config).items():
        if field == "full_scale":  # ours alone
            continue
        name = renamed.get(field, field)
        group = next(g for g in (options.frame_opts, options.mel_opts, options) if hasattr(g, name))
        setattr(group, name, value)
    return options


def speaker_of(utt_id, where, cmvn, utt2spk):
    """Whose statistics normalise an utterance; None for its own."""
    if cmvn == "global":
        return ""
    if cmvn != "speaker":
        return None
    if utt2spk is None:
        return utt_id.split("-")[0]
    if utt_id not in utt2spk:
        raise UserError(f"{where}: utterance {utt_id}: has no speaker in --utt2spk")
    return utt2spk[utt_id]


def cmvn_stats(frames: np.ndarray) -> np.ndarray:
    """Statistics of frames (T, D) for mean and variance normalisation, in Kaldi's layout: float64
    (2, D + 1), row 0 the sums and, last, T; row 1 the sums of squares and, last, 0. Statistics of
    several utterances add up to those of all their frames."""
    frames = np.asarray(frames, dtype=np.float64)
    stats = np.zeros((2, frames.shape[1] + 1))
    stats[0, :-1] = frames.sum(axis=0)
    stats[0, -1] = len(frames)
    stats[1, :-1] = np.square(frames).sum(axis=0)
    return stats


def apply_cmvn(frames: np.ndarray, stats: np.ndarray) -> np.ndarray:
    """Normalise frames (T, D) to float32 (T, D) with the mean 0 and the variance 1 over all frames
    that went into stats (2, D + 1). A dimension that is constant there becomes 0.

    Raises:
        ValueError: statistics of no frames, or of another width than the frames'.
    """
    count = stats[0, -1]
    if count < 1 or stats.shape != (2, frames.shape[1] + 1):
        raise ValueError(
            f"CMVN statistics {stats.shape} of {count:g} frames for frames {frames.shape}"
        )
    mean = stats[0, :-1] / count
    mean_square = stats[1, :-1] / count
    variance = mean_square - np.square(mean)
    # The difference of two nearly equal numbers: below this it is rounding, not variance.
    varies = variance > 1e-10 * mean_square
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
    return ((frames - mean) * scale).astype(np.float32)
