"""Samples to log-Mel frames, as the original's authors made theirs with Kaldi, and CMVN.

    settings = fbank_settings()                                     # the original's
    frames = fbank(samples, settings, name="84-121123-0000")        # (T, D), 100 frames a second
    centred = CMVN("utterance").apply(frames, cmvn_stats(frames))   # mean 0

T frames, D mel_dim. kaldi-native-fbank is imported by the functions that need it: loading a model
does not.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator

import numpy as np

from utils import BadUtterance, UserError

CMVN_KINDS = ("speaker", "utterance", "global", "none")  # what log-Mel features are normalised over
FULL_SCALE = 32768.0  # of 16-bit integers, which Kaldi takes as they are

# As s3prl computes them, with torchaudio, from samples in [-1, 1].
S3PRL_FBANK = {"window_type": "hamming", "htk_compat": False, "full_scale": 1.0}

# The original's command is `compute-fbank-feats --window-type=hamming --use-energy=false --dither=1
# --num-mel-bins=80 --htk-compat=true`, with Kaldi's own defaults for the rest. Dither is 0 here, so
# that features are those of the recording only. `full_scale`, the one option that is not
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
KALDI_NAMES = {"sample_rate": "samp_freq", "num_mel_bins": "num_bins"}  # where ours differ


def fbank_settings(changes: dict | None = None) -> dict:
    """Every option of the log-Mel features, by name: the original's, with `changes`.

    The names are kaldi-native-fbank's, without their groups, and sample_rate (Hz) and num_mel_bins
    after Kaldi's flags. The values are plain, so that they can be written to JSON.

    Raises:
        ValueError: an unknown option, or a value of the wrong type or out of range.
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
        is_type = type(value) is expected or (expected is float and type(value) is int)
        if not is_type or expected in (int, float) and not abs(value) < 2**31:  # nor is NaN
            raise ValueError(f"{name} {value!r}"[:80])
        settings[name] = expected(value)
    if min(settings["frame_length_ms"], settings["frame_shift_ms"]) * settings["sample_rate"] < 1e3:
        raise ValueError("frames or their shift of less than a sample")
    return settings


@functools.cache
def _options(settings):
    """The items of fbank_settings() -> kaldi-native-fbank's options. Dither is added elsewhere."""
    import kaldi_native_fbank

    settings = {KALDI_NAMES.get(name, name): value for name, value in settings} | {"dither": 0.0}
    options = kaldi_native_fbank.FbankOptions().as_dict()
    for group in (options["frame_opts"], options["mel_opts"], options):
        group |= {name: settings[name] for name in group.keys() & settings.keys()}
    return kaldi_native_fbank.FbankOptions.from_dict(options)


def _fbank_input(blocks, settings, utt_id):
    """Samples in 16-bit range, block by block -> what fbank is computed from: scaled, dithered."""
    noise = np.random.default_rng([*utt_id.encode("utf-8", "surrogateescape")])
    for samples in blocks:
        samples = np.ascontiguousarray(samples, dtype=np.float32)
        if settings["full_scale"] != FULL_SCALE:
            samples = samples * np.float32(settings["full_scale"] / FULL_SCALE)
        if settings["dither"]:
            added = noise.standard_normal(len(samples), dtype=np.float32)
            samples = samples + np.float32(settings["dither"]) * added
        yield samples


def fbank_blocks(
    blocks: Iterable[np.ndarray], settings: dict, name: str = "audio", utt_id: str = ""
) -> Iterator[np.ndarray]:
    """Log-Mel energies of one utterance, block by block, in memory that does not grow with it.

    Args:
        blocks: its samples, float32 (samples,) each, in 16-bit range, as audio.read_blocks gives.
        settings: fbank_settings().
        name: what error messages call it: its file, say.
        utt_id: the seed of its dither, so that this repeats in any order and process. Dither is
            added to the waveform here; Kaldi adds it to each of the overlapping windows by itself.

    Yields:
        float32 (frames, num_mel_bins), natural logarithm; T frames in all,
        T = 1 + (samples - window) // shift, with 400 and 160 samples at 16 kHz.

    Raises:
        BadUtterance: fewer samples than one window, energies beyond float32.
        UserError: options that contradict each other, such as more mel bins than the window's
            spectrum can fill.
    """
    import kaldi_native_fbank

    rate, num_samples, done = settings["sample_rate"], 0, 0
    try:
        extractor = kaldi_native_fbank.OnlineFbank(_options(tuple(settings.items())))
    except (ValueError, RuntimeError) as error:
        raise UserError(f"fbank options: {' '.join(str(error).split())}") from None
    for samples in itertools.chain(_fbank_input(blocks, settings, utt_id), [None]):
        if samples is None:
            extractor.input_finished()
        else:
            num_samples += len(samples)
            # Given the array, it would take 40 % more time: the binding reads single items, and
            # a memoryview makes Python floats of them faster than numpy does its scalars.
            extractor.accept_waveform(rate, memoryview(samples))
        if ready := range(done, extractor.num_frames_ready):
            # There is no call for many frames. The rows belong to the extractor: np.array copies.
            frames = np.array([extractor.get_frame(i) for i in ready])
            if not np.isfinite(frames).all():
                raise BadUtterance(f"{name}: its log-Mel energies are NaN or infinite")
            extractor.pop(len(ready))
            done = ready.stop
            yield frames
    if not done:
        window = int(rate * settings["frame_length_ms"] / 1000)
        raise BadUtterance(
            f"{name}: its {num_samples} samples are fewer than one window "
            f"({window} samples, {settings['frame_length_ms']:g} ms)"
        )


def fbank(samples: np.ndarray, settings: dict, name: str = "audio", utt_id: str = "") -> np.ndarray:
    """All log-Mel energies of one utterance, float32 (T, num_mel_bins)."""
    return np.concatenate([*fbank_blocks([samples], settings, name, utt_id)])


# CMVN ---------------------------------------------------------------------------------------------


def cmvn_stats(frames: np.ndarray) -> np.ndarray:
    """Statistics of frames (T, D) for mean and variance normalisation, in Kaldi's layout.

    Returns:
        float64 (2, D + 1): row 0 the sums and, last, T; row 1 the sums of squares and, last, 0.
        Statistics of several utterances add up to those of all their frames.
    """
    frames = np.asarray(frames, dtype=np.float64)
    stats = np.zeros((2, frames.shape[1] + 1))
    stats[0, :-1] = frames.sum(axis=0)
    stats[0, -1] = len(frames)
    stats[1, :-1] = np.square(frames).sum(axis=0)
    return stats


@dataclasses.dataclass(frozen=True)
class CMVN:
    """How frames are normalised: over what, and whether the variance as well as the mean."""

    kind: str  # one of CMVN_KINDS
    norm_vars: bool = False  # divide by the standard deviation too, as Kaldi's --norm-vars
    unbiased: bool = False  # estimate the variance with T - 1, as torch.std and so s3prl does

    def __str__(self):
        return f"{self.kind}{' with the variance' * self.norm_vars}{' (unbiased)' * self.unbiased}"

    @classmethod
    def from_prepared(cls, prepared: dict) -> "CMVN":
        """From prepared.json. A file without norm_vars is older than the flag: the variance was
        always normalised then."""
        kind = prepared.get("cmvn", "none")
        norm_vars = prepared.get("norm_vars", kind != "none")
        return cls(kind, norm_vars, prepared.get("unbiased_vars", False))

    def group(self, utt_id: str, where: str, utt2spk: dict[str, str]) -> str:
        """The name of the group of utterances whose statistics normalise this one.

        Args:
            utt_id: the utterance's id.
            where: what an error message calls the place it comes from.
            utt2spk: dict utterance id -> speaker, for "speaker".

        Raises:
            UserError: the utterance has no speaker.
        """
        if self.kind == "global":
            return "all"
        if self.kind != "speaker":
            return utt_id
        if utt_id not in utt2spk:
            raise UserError(f"{where}: utterance {utt_id} has no speaker in utt2spk")
        return utt2spk[utt_id]

    def apply(self, frames: np.ndarray, stats: np.ndarray | None) -> np.ndarray:
        """Normalise frames (T, D) -> float32 (T, D); kind "none" returns them as they are.

        A dimension that is constant becomes 0.

        Args:
            frames: log-Mel frames.
            stats: (2, D + 1), as cmvn_stats() gives them, of the frames of a speaker, say.
        """
        if self.kind == "none":
            return frames
        count = stats[0, -1]
        mean = stats[0, :-1] / count
        if not self.norm_vars:
            return (frames - mean).astype(np.float32)
        mean_square = stats[1, :-1] / count
        variance = mean_square - np.square(mean)
        # The difference of two nearly equal numbers: below this it is rounding, not variance.
        varies = variance > 1e-10 * mean_square
        if self.unbiased:
            variance = variance * count / max(count - 1, 1)
        scale = np.where(varies, 1 / np.sqrt(np.where(varies, variance, 1.0)), 0.0)
        return ((frames - mean) * scale).astype(np.float32)
