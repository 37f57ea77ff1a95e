"""Audio files to samples: find them and their speakers, decode and resample them.

    recordings, ignored = find_audio("LibriSpeech/dev-clean")
    for samples in read_blocks(recordings[0], 16000):  # float32, 16-bit range, mono
        ...

libsndfile decodes; it recognises a file by its content, not by its name. Files are read as
leniently as Kaldi reads them: a WAV whose header states another length than the file has is read as
far as it goes, with a warning. soundfile and soxr are imported where they are needed.
"""

import fnmatch
import logging
import os
import re
import shlex
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

import numpy as np

from formats import kaldi
from formats.fbank import FULL_SCALE, fbank_blocks
from utils import BadUtterance, UserError, not_negative

DECODED = ".wav .flac .sph .nist .aiff .aif .aifc .au .snd .w64 .rf64 .caf .mp3 .ogg .oga .opus"
UNKNOWN = ".shn .m4a .mp4 .aac .wma .webm .amr .ape .mka"  # audio too: rejected, not ignored
AUDIO_EXTENSIONS = frozenset(f"{DECODED} {UNKNOWN}".split())
# Folders that corpora have above those of their speakers: parts, or kinds of files.
NO_SPEAKER = re.compile(
    r"(train|dev|test|valid|validation|validated|eval)([-_](clean|other|all|sub|\d+))*"
    r"|audio|wavs?|wav48\w*|flac|mp3|clips|podcast|youtube|audiobook|dr\d",
    re.IGNORECASE,
)
BLOCK_SIZE = 1 << 20  # samples at a time
LOUDEST = 8  # times full scale, of floating-point samples; decoders overshoot, but not so far
UNKNOWN_LENGTH = 2**36 - 2  # samples, or more: a FLAC that was written to a pipe
FLAGS = ("ids_from_paths", "pattern", "resample", "channel")  # of add_flags(), for audio only


class Recording(NamedTuple):
    """Where an utterance's samples are."""

    utt_id: str
    path: str
    speaker: str | None = None  # None if that is not known
    channel: int | None = None  # of several, from 0
    start: float = 0.0  # seconds
    end: float | None = None

    def where(self) -> str:
        """What messages call it."""
        is_whole = self.start == 0 and self.end is None
        return self.path if is_whole else f"{self.path}: utterance {self.utt_id}"


def add_flags(parser) -> None:
    """The input flags that prepare_data.py and extract_features.py share, to a parser or group."""
    add = parser.add_argument
    add(
        "--utt2spk",
        metavar="FILE",
        help="Kaldi's list of utterances and their speakers (default: the one in a data directory "
        "or next to feats.scp; else the first folder below the input is the speaker)",
    )
    add(
        "--ids_from_paths",
        action="store_true",
        help="make ids of paths below the input, joined by '-' (default: file names)",
    )
    add(
        "--pattern",
        metavar="GLOB",
        help="read only audio files whose path below the input matches GLOB",
    )
    add("--resample", action="store_true", help="convert files at another sampling rate, by soxr")
    add(
        "--channel",
        type=not_negative,
        metavar="K",
        help="channel to read, from 0, where no data directory names it (default: the only one)",
    )
    add("--skip_bad", action="store_true", help="skip bad utterances and list them in skipped.txt")


# Finding files and speakers -----------------------------------------------------------------------


def find_audio(
    root: str | os.PathLike,
    ids_from_paths: bool = False,
    pattern: str | None = None,
    bad: list[str] | None = None,
) -> tuple[list[Recording], list[str]]:
    """List a folder's audio files, a Kaldi data directory's utterances, or one file.

    Args:
        root: the file or folder; links below it are followed. The first folder below it is the
            speaker. A folder with wav.scp is a data directory, whose tables say all.
        ids_from_paths: make ids of the paths below root, joined with "-"; else of the file names.
            The extension is left off, and spaces become "_".
        pattern: take only files whose path below root matches, as fnmatch does.
        bad: for messages on what cannot be used, which is skipped; None: raise them.

    Returns:
        The recordings, sorted by id, and "path: why" of everything that was ignored.

    Raises:
        UserError: nothing at root, no audio there, two files with one id, an id that cannot be a
            file name.
        OSError: a folder that cannot be read.
    """
    root = os.fspath(root)
    if os.path.isfile(os.path.join(root, "wav.scp")):
        if ids_from_paths or pattern:
            raise UserError(
                f"{root}: --ids_from_paths and --pattern do not apply to a Kaldi data directory"
            )
        return [Recording(*row) for row in kaldi.read_data_dir(root, bad)], []
    if not os.path.exists(root):
        raise UserError(f"{root}: no such file or folder")
    ignored, found = [], {}
    for path, parts in _audio_files(root, pattern, ignored, bad):
        utt_id = make_utt_id("-".join(parts) if ids_from_paths else parts[-1])
        with kaldi.collect(bad):
            kaldi.check_utt_id(utt_id, path)
            if utt_id in found:
                raise _same_id(utt_id, path, found[utt_id].path, ids_from_paths)
            found[utt_id] = Recording(utt_id, path, parts[0] if len(parts) > 1 else None)
    if num_renamed := sum(" " in os.path.basename(one.path) for one in found.values()):
        logging.warning("%s: spaces in %d file names are '_' in their ids", root, num_renamed)
    if not found and not bad:
        raise UserError(
            f"{root}: no audio files: expected names with one of the extensions {DECODED}"
            f"{f' (ignored: {count_left_out(ignored)})' if ignored else ''}"
        )
    return sorted(found.values()), ignored


def make_utt_id(name: str) -> str:
    """A file's name -> its utterance id: without the extension, in NFC, spaces as "_"."""
    return re.sub(r"\s", "_", unicodedata.normalize("NFC", os.path.splitext(name)[0]))


def _audio_files(root, pattern, ignored, bad):
    """Yield the path of each audio file, and the parts of its path below root."""
    for path in _walk(root, ignored, bad) if os.path.isdir(root) else [root]:
        below = os.path.basename(path) if path == root else os.path.relpath(path, root)
        parts = below.split(os.sep)
        extension = os.path.splitext(path)[1]
        if extension.lower() not in AUDIO_EXTENSIONS:
            ignored.append(f"{path}: {extension or 'no extension'}")
        elif pattern and not fnmatch.fnmatchcase("/".join(parts), pattern):
            ignored.append(f"{path}: --pattern does not match")
        else:
            yield path, parts


def _walk(folder, ignored, bad, above=()):
    """Yield the paths of a folder's files; note what is hidden, and links that lead back."""
    above = (*above, os.path.realpath(folder))
    entries = []
    with kaldi.collect(bad):
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith("."):
            ignored.append(f"{entry.path}: hidden")
        elif not entry.is_dir():
            yield entry.path
        elif entry.is_symlink() and os.path.realpath(entry.path) in above:
            ignored.append(f"{entry.path}: a link to a folder above it")
        else:
            yield from _walk(entry.path, ignored, bad, above)


def _same_id(utt_id, path, other, ids_from_paths):
    stem, extension = os.path.splitext(path)
    way_out = "rename one" if ids_from_paths else "tell them apart with --ids_from_paths"
    if os.path.splitext(other)[0] == stem:
        way_out = f"read only one kind of file with --pattern '*{extension}'"
    return UserError(f"{other} and {path}: two files with the utterance id {utt_id}: {way_out}")


def count_left_out(ignored: list[str]) -> str:
    """find_audio's second list -> "12 .txt, 1 hidden"."""
    counts = Counter(line.rpartition(": ")[2] for line in ignored)
    return ", ".join(f"{number} {reason}" for reason, number in sorted(counts.items()))


def speakers_of(
    recordings: list[Recording],
    root: str | os.PathLike,
    utt2spk: str | None = None,
    ways_out: str = "--utt2spk FILE",
) -> dict[str, str]:
    """Who speaks in each recording -> dict utterance id -> speaker.

    Args:
        recordings: of find_audio(root).
        root: the folder they were found in.
        utt2spk: a file that says it; None: the recordings' own speakers.
        ways_out: the script's flags that help where speakers are not known, for messages.

    Raises:
        UserError: a recording without a speaker; first folders that are no speakers, but the parts
            of a corpus.
    """
    if utt2spk is not None:
        speakers = kaldi.read_utt2spk(utt2spk)
        recordings = [one._replace(speaker=speakers.get(one.utt_id)) for one in recordings]
    elif os.path.isfile(os.path.join(root, "wav.scp")):
        utt2spk = os.path.join(root, "utt2spk")
    else:
        _check_folders(recordings, root, ways_out)
    for recording in recordings:
        if recording.speaker is None:
            unknown = "not known: put each speaker's files into a folder of their own"
            if utt2spk is not None:
                unknown = f"not in {utt2spk}: add it there"
            raise UserError(
                f"{recording.path}: the speaker of utterance {recording.utt_id}, over whom to "
                f"normalise, is {unknown}, or use {ways_out}"
            )
    return {recording.utt_id: recording.speaker for recording in recordings}


def _check_folders(recordings, root, ways_out):
    """Check whether the first folders below root are speakers' folders."""
    folders = sorted({recording.speaker for recording in recordings} - {None})
    suspects = [folder for folder in folders if NO_SPEAKER.fullmatch(folder)]
    below = [os.path.relpath(recording.path, root) for recording in recordings]
    if len(folders) == 1 and any(path.count(os.sep) > 2 for path in below):
        suspects = folders
    if suspects:
        raise UserError(
            f"{root}: the first folders below it ({', '.join(suspects[:3])}) would be taken for "
            "speakers, but look like parts of a corpus: give the folder that holds the speakers' "
            f"folders, such as {os.path.join(root, suspects[0])}, or use {ways_out}"
        )
    if len(folders) == 1 and len(recordings) > 1:
        logging.warning(
            "%s: all utterances are taken to be of one speaker, %s: if they are not, use %s",
            root,
            folders[0],
            ways_out,
        )


def describe_speakers(speakers: Iterable[str]) -> str:
    """The speaker of each utterance -> "40 (1272, 1462, 1673, ...), 67.6 utterances each"."""
    counts = Counter(speakers)
    names = ", ".join(sorted(counts)[:3]) + ", ..." * (len(counts) > 3)
    names = names.encode("utf-8", "replace").decode()  # folders' names need not be text
    return f"{len(counts)} ({names}), {counts.total() / len(counts):.3g} utterances each"


# Decoding -----------------------------------------------------------------------------------------


def wav_sizes(path: str) -> tuple[int, int] | None:
    """The bytes of samples that a WAV's header states, and those that the file holds.

    None if they agree, or if the file is no WAV.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        if not re.match(rb"RIFF....WAVE", file.read(12), re.DOTALL):
            return None
        while (head := file.read(8))[:4] != b"data":
            if len(head) < 8:
                return None
            file.seek(_chunk_size(head), os.SEEK_CUR)
        stated, held = int.from_bytes(head[4:], "little"), size - file.tell()
        file.seek(_chunk_size(head), os.SEEK_CUR)
        head = file.read(8)
        is_chunk = re.match(rb"[ -~]{4}", head) and file.tell() + _chunk_size(head) <= size + 1
        if stated == held or stated < held and (is_chunk or len(head) < 8):
            return None
    return stated, held


def _chunk_size(head):
    size = int.from_bytes(head[4:], "little")
    return size + size % 2  # chunks start at even bytes


def _open(path, notes):
    """Open an audio file; append a note if its header states another length than it has."""
    import soundfile

    sizes = wav_sizes(path)
    # On POSIX a file's name need not be text.
    file = soundfile.SoundFile(path if sys.platform == "win32" else os.fsencode(path))
    # Else soundfile seeks after every read, which is inexact in an MP3, and fails in a FLAC that
    # does not say how long it is.
    file.seekable = lambda: False
    if sizes is None:
        return file
    stated, held = sizes
    text = f"{path}: its header states {stated} bytes of samples, but the file holds {held}"
    if file.frames == stated == 0:
        command = f"sox --ignore-length {shlex.quote(path)} OUT.wav"
        raise BadUtterance(f"{text}, as if written to a pipe: rewrite it with: {command}")
    if notes is not None:
        notes.append(f"{text}: {file.frames / file.samplerate:.2f} s were read")
    return file


def read_blocks(
    recording: Recording,
    sample_rate: float,
    resample: bool = False,
    channel: int | None = None,
    notes: list[str] | None = None,
    files: dict | None = None,
) -> Iterator[np.ndarray]:
    """Read a recording's samples in blocks of a minute or so, float32 (samples,) in 16-bit range:
    16-bit files give exactly their integers, floating-point ones 32768 times what they hold.

    Args:
        recording: a whole file or a segment of it.
        sample_rate: expected, Hz.
        resample: convert other rates (soxr, high quality).
        channel: which of several channels to read, from 0, where the recording does not say.
        notes: for warnings, one line each: a WAV's header states another length than it has.
        files: path -> open file, for recordings that are read one after another: files are added
            and stay open, so that the segments of one are read in one pass.

    Raises:
        BadUtterance: another sampling rate, several channels, a file that cannot be decoded,
            samples that are NaN, infinite or out of range.
    """
    import soundfile

    path, files = recording.path, {} if files is None else files
    try:
        file = files.get(path)
        is_past = file is not None and file.tell() > int(recording.start * file.samplerate)
        if file is None or file.format == "MP3" and is_past:  # which is only read forward
            file = files[path] = _open(path, notes)
        channel = recording.channel if recording.channel is not None else channel
        blocks = _decode(file, recording, _check(file, recording, sample_rate, resample, channel))
        if file.samplerate != sample_rate:
            blocks = resample_blocks(blocks, file.samplerate, sample_rate)
        yield from blocks
    except soundfile.SoundFileError as error:
        raise BadUtterance(f"{path}: {_why_undecodable(path, error)}") from None
    except OSError as error:
        hint = "" if os.path.isabs(path) else f" (relative paths start from {os.getcwd()})"
        raise BadUtterance(f"{path}: {error.strerror or error}{hint}") from None


def _check(file, recording, sample_rate, resample, channel):
    """Check an open SoundFile's sampling rate and channels -> the channel to read."""
    where, problems = recording.where(), []
    if file.samplerate != sample_rate and not resample:
        rates = f"{file.samplerate} Hz, expected {sample_rate:g} Hz"
        problems.append(f"its sampling rate is {rates}: convert with --resample")
    if channel is None and file.channels > 1:
        channels = f"{file.channels} channels, expected 1"
        problems.append(f"it has {channels}: convert with --channel K, from 0")
    if problems:
        raise BadUtterance(f"{where}: {'; '.join(problems)}")
    if (channel or 0) >= file.channels:
        raise BadUtterance(f"{where}: no channel {channel}: it has {file.channels}, from 0 on")
    return channel or 0


def _decode(file, recording, channel):
    """An open SoundFile -> blocks of one channel's samples, in 16-bit range."""
    where, rate, end = recording.where(), file.samplerate, file.frames
    is_float = file.subtype in ("FLOAT", "DOUBLE")
    start = done = int(recording.start * rate)
    if recording.end is not None:  # as Kaldi's extract-segments, which allows for rounding too
        end = int(recording.end * rate)
        if start >= file.frames or end > file.frames + rate // 2:
            raise BadUtterance(
                f"{where}: expected samples from {recording.start:g} to {recording.end:g} s, but "
                f"the file has {file.frames / rate:g} s"
            )
        end = min(end, file.frames)
    if file.format != "MP3":
        file.seek(start)
    while file.tell() < start and len(file.read(min(BLOCK_SIZE, start - file.tell()))):
        pass
    while done < end:
        wanted = min(BLOCK_SIZE, end - done)
        samples = file.read(wanted, dtype="float32", always_2d=True)[:, channel]
        done += len(samples)
        with np.errstate(over="ignore"):
            samples = samples * np.float32(FULL_SCALE)
        if not np.isfinite(samples).all():
            raise BadUtterance(f"{where}: it holds samples that are NaN or infinite")
        if is_float and (loudest := np.abs(samples).max(initial=0) / FULL_SCALE) > LOUDEST:
            raise BadUtterance(
                f"{where}: it holds floating-point samples up to {loudest:g}, expected -1 to 1: "
                "rewrite it as 16-bit integers, or divided by 32768"
            )
        yield samples
        if len(samples) < wanted:
            break
    # An Ogg's decoder skips what is damaged; an MP3's length is an estimate.
    if done < end < UNKNOWN_LENGTH and file.format != "MP3":
        raise BadUtterance(f"{where}: damaged: decoding ended after {done} of {end} samples")


def _why_undecodable(path, error):
    """What libsndfile's error on a file means, and what helps."""
    with open(path, "rb") as file:
        head = file.read(1024)
    if not head:
        return "the file is empty (0 bytes): copy it again"
    if head.startswith(b"ajkg") or head.startswith(b"NIST") and b"shorten" in head:
        command = f"sph2pipe -f wav {shlex.quote(path)} OUT.wav"
        return f"Shorten is not supported: convert it with: {command}"
    # libsndfile's text may name the file again and may run over several lines
    reason = " ".join(getattr(error, "error_string", str(error)).split())
    return (
        "it cannot be decoded, because it is damaged, of unknown length or in a format that "
        f"libsndfile does not know ({reason}): try to convert it with: "
        f"ffmpeg -i {shlex.quote(path)} OUT.wav"
    )


def resample_blocks(
    blocks: Iterable[np.ndarray], rate: float, target: float
) -> Iterator[np.ndarray]:
    """float32 samples in blocks, at `rate` Hz -> the same at `target` Hz."""
    import soxr

    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    for samples in blocks:
        yield stream.resample_chunk(samples)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


# Files to log-Mel frames --------------------------------------------------------------------------


def read_fbank_blocks(recording: Recording, settings: dict, **options) -> Iterator[np.ndarray]:
    """A recording's log-Mel frames, block by block; `options` are read_blocks()'."""
    blocks = read_blocks(recording, settings["sample_rate"], **options)
    return fbank_blocks(blocks, settings, recording.where(), recording.utt_id)


def read_fbank(recording: Recording, settings: dict, **options) -> np.ndarray:
    """All of a recording's log-Mel frames, float32 (T, num_mel_bins)."""
    return np.concatenate([*read_fbank_blocks(recording, settings, **options)])


def audio_jobs(recordings: list[Recording], settings: dict, **options) -> Iterator[tuple]:
    """Recordings -> (how many so far, job) for each file, as kaldi.read_kaldi's; but a job is
    called with a list for warnings (read_blocks' notes). `options` are read_blocks()' others."""
    by_file = {}
    for recording in recordings:
        by_file.setdefault(recording.path, []).append(recording)
    done = 0
    for segments in by_file.values():
        segments.sort(key=lambda recording: recording.start)
        done += len(segments)
        yield done, partial(_read_segments, segments, settings, options)


def _read_segments(recordings, settings, options, notes):
    files = {}
    for recording in recordings:
        read = partial(read_fbank_blocks, recording, settings, notes=notes, files=files, **options)
        yield recording.utt_id, recording.where(), read
