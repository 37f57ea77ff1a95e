"""Audio files to log-Mel frames, as the original's authors made theirs with Kaldi, and CMVN.

    settings = fbank_settings()                                       # the original's
    samples = read_audio("84-121123-0000.flac", settings["sample_rate"])   # 16-bit range
    frames = fbank(samples, settings, name="84-121123-0000")          # (T, D), 100 frames a second
    normalised = apply_cmvn(frames, cmvn_stats(frames), norm_vars=False)   # mean 0

T frames, D mel_dim. kaldi-native-fbank and soundfile are imported by the functions that need them:
loading a model needs neither.
"""

import functools
import itertools
import os
import shlex
import struct
from collections.abc import Iterable, Iterator

import numpy as np

from utils import UserError, check_utt_id

AUDIO_ENDINGS = (".flac", ".wav")
CMVN_KINDS = ("speaker", "utterance", "global", "none")  # what features are normalised over
BLOCK_SIZE = 1 << 20  # samples at a time
FULL_SCALE = 32768.0  # soundfile scales samples to [-1, 1); Kaldi takes 16-bit integers as they are

# As s3prl computes them, with torchaudio, from samples in [-1, 1].
S3PRL_FBANK = {"window_type": "hamming", "htk_compat": False, "full_scale": 1.0}

# The original's command is `compute-fbank-feats --window-type=hamming --use-energy=false --dither=1
# --num-mel-bins=80 --htk-compat=true`, with Kaldi's own defaults for the rest. Dither is 0 here: it
# adds random noise, and runs would not repeat. `full_scale`, the only option that is not
# kaldi-native-fbank's, is what the largest sample becomes; torchaudio, and with it s3prl, has 1.
ORIGINAL = {
    "full_scale": FULL_SCALE,
    "dither": 0.0,  # standard deviation of the added noise, in steps of 16-bit samples
    "preemph_coeff": 0.97,
    "window_type": "hamming",
    "blackman_coeff": 0.42,
    "num_mel_bins": 80,
    "use_energy": False,
    "htk_compat": True,
}
KALDI_NAMES = {"sample_rate": "samp_freq", "num_mel_bins": "num_bins"}  # where ours are others


def fbank_settings(changes: dict | None = None) -> dict:
    """Every option of the log-Mel features, by name: the original's but for `changes`.

    The names are kaldi-native-fbank's, without their groups, and sample_rate (Hz) and num_mel_bins
    as Kaldi's flags are called. The values are plain: they go into JSON and come back.

    Raises:
        ValueError: no such option, a value of another type, or one that means nothing.
    """
    import kaldi_native_fbank

    defaults = kaldi_native_fbank.FbankOptions().as_dict()
    settings = {"full_scale": FULL_SCALE}
    for group in (defaults.pop("frame_opts"), defaults.pop("mel_opts"), defaults):
        settings |= group
    for name, kaldi_name in KALDI_NAMES.items():
        settings[name] = settings.pop(kaldi_name)
    for name, value in (ORIGINAL | (changes or {})).items():
        if name not in settings:
            raise ValueError(f"{name}: no such fbank option")
        expected = type(settings[name])
        is_number = expected is float and type(value) is int
        is_type = type(value) is expected or is_number
        if not is_type or expected in (int, float) and not abs(value) < 2**31:  # nor is NaN
            raise ValueError(f"{name} {value!r}"[:80])
        settings[name] = expected(value)
    if min(settings["frame_length_ms"], settings["frame_shift_ms"]) * settings["sample_rate"] < 1e3:
        raise ValueError("frames or their shift of less than a sample")
    return settings


@functools.cache
def _options(settings):
    """The items of fbank_settings() -> kaldi-native-fbank's options."""
    import kaldi_native_fbank

    settings = {KALDI_NAMES.get(name, name): value for name, value in settings}
    options = kaldi_native_fbank.FbankOptions().as_dict()
    for group in (options["frame_opts"], options["mel_opts"], options):
        group |= {name: settings[name] for name in group.keys() & settings.keys()}
    return kaldi_native_fbank.FbankOptions.from_dict(options)


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
    def fail(error):  # os.walk would silently skip a folder that it cannot read
        raise error

    for folder, subfolders, names in os.walk(root, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (os.path.join(folder, name) for name in names if not name.startswith("."))


def read_blocks(path: str | os.PathLike, sample_rate: float) -> Iterator[np.ndarray]:
    """Read a mono file's samples in blocks of a minute or so, float32 (samples,) in 16-bit range:
    16-bit files give exactly their integers, floating-point ones 32768 times what they hold.

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
            expected, count = file.frames, 0
            while count < expected:
                samples = file.read(min(BLOCK_SIZE, expected - count), dtype="float32")
                if not len(samples):
                    raise UserError(f"{path}: truncated: {count} of {expected} samples")
                count += len(samples)
                with np.errstate(over="ignore"):
                    samples *= FULL_SCALE
                if not np.isfinite(samples).all():
                    raise UserError(f"{path}: holds samples that are NaN or infinite")
                yield samples
    except soundfile.SoundFileError as error:
        # libsndfile's text may name the file again and may run over several lines
        reason = " ".join(getattr(error, "error_string", str(error)).split())
        raise UserError(f"{path}: cannot be decoded, damaged or truncated: {reason}") from None


def read_audio(path: str | os.PathLike, sample_rate: float) -> np.ndarray:
    """All of a file's samples, float32 (samples,): read_blocks(), joined."""
    return _join(read_blocks(path, sample_rate))


def _join(blocks):
    blocks = list(blocks)
    return blocks[0] if len(blocks) == 1 else np.concatenate(blocks or [np.zeros(0, np.float32)])


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


def fbank_blocks(
    blocks: Iterable[np.ndarray], settings: dict, name: str = "audio"
) -> Iterator[np.ndarray]:
    """Log-Mel energies of one utterance, block by block, in memory that does not grow with it.

    Args:
        blocks: its samples, float32 (samples,) each, in 16-bit range, as read_blocks gives them.
        settings: fbank_settings(). With dither 0 the result repeats exactly.
        name: what error messages call the utterance: its file.

    Yields:
        float32 (frames, num_mel_bins), natural logarithm; T frames in all,
        T = 1 + (samples - window) // shift, with 400 and 160 samples at 16 kHz.

    Raises:
        UserError: fewer samples than one window; energies beyond float32; options that do not fit
            each other, such as more mel bins than the window's spectrum can fill.
    """
    import kaldi_native_fbank

    rate, num_samples, done = settings["sample_rate"], 0, 0
    try:
        extractor = kaldi_native_fbank.OnlineFbank(_options(tuple(settings.items())))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"fbank options: {' '.join(str(error).split())}") from None
    for samples in itertools.chain(blocks, [None]):
        try:
            if samples is None:
                extractor.input_finished()
            else:
                num_samples += len(samples)
                samples = np.ascontiguousarray(samples, dtype=np.float32)
                if settings["full_scale"] != FULL_SCALE:
                    samples = samples * np.float32(settings["full_scale"] / FULL_SCALE)
                # Given the array, it would take 40 % more time: the binding reads single items, and
                # a memoryview makes Python floats of them faster than numpy does its scalars.
                extractor.accept_waveform(rate, memoryview(samples))
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{name}: no log-Mel energies: {reason}") from None
        ready = range(done, extractor.num_frames_ready)
        if ready:
            # There is no call for many frames. The rows belong to the extractor: np.array copies.
            frames = np.array([extractor.get_frame(i) for i in ready])
            if not np.isfinite(frames).all():
                raise UserError(
                    f"{name}: log-Mel energies that are NaN or infinite (samples too large)"
                )
            extractor.pop(len(ready))
            done = ready.stop
            yield frames
    if not done:
        window = int(rate * settings["frame_length_ms"] / 1000)
        raise UserError(
            f"{name}: {num_samples} samples are fewer than one window "
            f"({window} samples, {settings['frame_length_ms']:g} ms)"
        )


def fbank(samples: np.ndarray, settings: dict, name: str = "audio") -> np.ndarray:
    """All log-Mel energies of one utterance, float32 (T, num_mel_bins): fbank_blocks(), joined."""
    return _join(fbank_blocks([samples], settings, name))


def read_fbank_blocks(path: str | os.PathLike, settings: dict) -> Iterator[np.ndarray]:
    """A file's log-Mel frames, block by block; errors name the file."""
    return fbank_blocks(read_blocks(path, settings["sample_rate"]), settings, name=path)


def read_fbank(path: str | os.PathLike, settings: dict) -> np.ndarray:
    """All of a file's log-Mel frames, float32 (T, num_mel_bins); errors name the file."""
    return _join(read_fbank_blocks(path, settings))


def audio_jobs(files: list, settings: dict, skip_bad: bool) -> Iterator[tuple]:
    """[(utterance id, path)] -> (files so far, job of some files): as kaldi.read_kaldi's jobs.

    With skip_bad a job yields, for a file that cannot be used, the error in place of the utterance.
    """
    for start in range(0, len(files), 4):
        some = files[start : start + 4]
        yield (start + len(some), functools.partial(_read_files, some, settings, skip_bad))


def _read_files(files, settings, skip_bad):
    for utt_id, path in files:
        try:
            yield utt_id, read_fbank(path, settings), path
        except (UserError, OSError) as error:
            if not skip_bad:
                raise
            yield error


# CMVN ---------------------------------------------------------------------------------------------


def cmvn_group(utt_id: str, where: str, cmvn: str, utt2spk: dict | None) -> str:
    """The name of the group of utterances over which `cmvn` normalises this one.

    Args:
        utt_id: the utterance's id.
        where: what an error message calls the place it comes from.
        cmvn: one of CMVN_KINDS; with "none" every utterance is a group of its own.
        utt2spk: dict utterance id -> speaker; None: an id's speaker comes before its first "-".
    """
    if cmvn == "global":
        return "all"
    if cmvn != "speaker":
        return utt_id
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


def cmvn_settings(prepared: dict) -> tuple[str, dict]:
    """prepared.json -> its kind of CMVN, and the options of apply_cmvn().

    Folders from before there was norm_vars were normalised by the standard deviation too.
    """
    options = {
        "norm_vars": prepared.get("norm_vars", True),
        "unbiased": prepared.get("unbiased_vars", False),
    }
    return prepared.get("cmvn", "none"), options


def apply_cmvn(
    frames: np.ndarray, stats: np.ndarray, norm_vars: bool, unbiased: bool = False
) -> np.ndarray:
    """Normalise frames (T, D) -> float32 (T, D).

    Args:
        frames: log-Mel frames.
        stats: (2, D + 1), as cmvn_stats() gives them; of the frames of a speaker, say.
        norm_vars: besides subtracting the mean, divide by the standard deviation (Kaldi's
            --norm-vars, off by default there as here). A dimension that is constant becomes 0.
        unbiased: estimate the variance with T - 1 in place of T, as torch.std and so s3prl does.

    Raises:
        ValueError: statistics of no frames, or of another width than the frames'.
    """
    count = stats[0, -1]
    if count < 1 or stats.shape != (2, frames.shape[1] + 1):
        raise ValueError(
            f"CMVN statistics {stats.shape} of {count:g} frames for frames {frames.shape}"
        )
    mean = stats[0, :-1] / count
    if not norm_vars:
        return (frames - mean).astype(np.float32)
    mean_square = stats[1, :-1] / count
    variance = mean_square - np.square(mean)
    # The difference of two nearly equal numbers: below this it is rounding, not variance.
    varies = variance > 1e-10 * mean_square
    if unbiased:
        variance = variance * count / max(count - 1, 1)
    scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
    return ((frames - mean) * scale).astype(np.float32)
