"""Audio files to samples: find them and their speakers, check that they are whole, decode them.

    for recording in find_audio("LibriSpeech/dev-clean"):
        for samples in read_blocks(recording, 16000):  # float32, 16-bit range, mono
            ...

What a file is follows from its content, not from its name. libsndfile decodes it, but reads a file
that was cut short without complaint: that is checked here. soundfile and soxr are imported where
they are needed.
"""

import argparse
import functools
import os
import re
import shlex
import struct
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from formats import kaldi
from formats.fbank import FULL_SCALE, fbank_blocks
from utils import BadUtterance, UserError, check_utt_id, not_negative

DECODED = ".wav .flac .sph .nist .aiff .aif .aifc .au .snd .w64 .rf64 .caf .mp3 .ogg .oga .opus"
UNKNOWN = ".shn .m4a .mp4 .aac .wma .webm .amr .ape .mka"  # audio too: refused, not left out
AUDIO_ENDINGS = frozenset(f"{DECODED} {UNKNOWN}".split())
# libsndfile's names of the formats whose length can be checked.
FORMATS = ["WAV", "WAVEX", "RF64", "W64", "AIFF", "AU", "NIST", "CAF", "FLAC", "MP3", "OGG"]
BLOCK_SIZE = 1 << 20  # samples at a time
LOUDEST = 8  # times full scale, of floating-point samples; decoders overshoot, but not so far


class Recording(NamedTuple):
    """Where an utterance's samples are."""

    utt_id: str
    path: str
    speaker: str | None = None  # None if that is not known
    channel: int | None = None  # of several, from 0
    start: float = 0.0  # seconds
    end: float | None = None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags on audio and speakers that prepare_data.py and extract_features.py share."""
    add = parser.add_argument_group("speakers and audio").add_argument
    default = "the one in a data directory or beside feats.scp, or the first folder below DIR"
    add("--utt2spk", metavar="FILE", help=f"Kaldi's, for CMVN by speaker (default: {default})")
    add("--ids_from_paths", action="store_true", help="ids are paths below DIR, joined with '-'")
    add("--resample", action="store_true", help="convert other sampling rates, by soxr")
    add("--channel", type=not_negative, metavar="K", help="which of several, from 0")


# Finding files and speakers -----------------------------------------------------------------------


def find_audio(
    root: str | os.PathLike, ids_from_paths: bool = False
) -> tuple[list[Recording], list[str]]:
    """List a folder's audio files, a Kaldi data directory's utterances, or one file.

    Links to folders are followed. A speaker is the first folder below the root, or what utt2spk
    says in a data directory (a folder with wav.scp).

    Args:
        root: the folder or file.
        ids_from_paths: make ids of the paths below root, joined with "-", instead of the files'
            names; without endings either way.

    Returns:
        The recordings, sorted by id, and "path: why" of everything that was left out.

    Raises:
        UserError: nothing at root, no audio there, two files with one id, an id that cannot be a
            file name.
        OSError: a folder that cannot be read.
    """
    root = os.fspath(root)
    if os.path.isfile(os.path.join(root, "wav.scp")):
        if ids_from_paths:
            raise UserError(f"{root}: --ids_from_paths: a Kaldi data directory has ids of its own")
        return [Recording(*row) for row in kaldi.read_data_dir(root)], []
    if not os.path.exists(root):
        raise UserError(f"{root}: no such file or folder")
    left_out = []
    paths = _walk(root, left_out) if os.path.isdir(root) else [root]
    found = {}
    for path in paths:
        below = os.path.relpath(path, root).split(os.sep)
        name = "-".join(below) if ids_from_paths and path != root else os.path.basename(path)
        utt_id, ending = os.path.splitext(name)
        if ending.lower() not in AUDIO_ENDINGS:
            left_out.append(f"{path}: {ending or 'no ending'}")
            continue
        check_utt_id(utt_id, path)
        if utt_id in found:
            way_out = "rename one" if ids_from_paths else "--ids_from_paths tells them apart"
            raise UserError(
                f"{found[utt_id].path} and {path}: two files with the utterance id {utt_id}: "
                f"{way_out}"
            )
        found[utt_id] = Recording(utt_id, path, below[0] if len(below) > 1 else None)
    if not found:
        raise UserError(
            f"{root}: no audio file: expected names that end in one of {DECODED}"
            f"{f' (left out: {count_left_out(left_out)})' if left_out else ''}"
        )
    return sorted(found.values()), left_out


def _walk(folder, left_out, above=()):
    """Yield the paths of a folder's files; note what is hidden, and links that lead back."""
    above = (*above, os.path.realpath(folder))
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            left_out.append(f"{entry.path}: hidden")
        elif not entry.is_dir():
            yield entry.path
        elif entry.is_symlink() and os.path.realpath(entry.path) in above:
            left_out.append(f"{entry.path}: a link to a folder around it")
        else:
            yield from _walk(entry.path, left_out, above)


def count_left_out(left_out: list[str]) -> str:
    """find_audio's second list -> "12 .txt, 1 hidden"."""
    reasons = [line.rpartition(": ")[2] for line in left_out]
    return ", ".join(f"{reasons.count(reason)} {reason}" for reason in sorted({*reasons}))


def speakers_of(recordings: list[Recording]) -> dict[str, str]:
    """-> dict utterance id -> speaker; UserError if one is not known."""
    for recording in recordings:
        if recording.speaker is None:
            raise UserError(
                f"{recording.path}: utterance {recording.utt_id}: its speaker, to normalise over, "
                "is not known: give --utt2spk FILE, put it into a folder named after its speaker, "
                "or use --cmvn utterance"
            )
    return {recording.utt_id: recording.speaker for recording in recordings}


# Whether a file is whole --------------------------------------------------------------------------


class Chunks(NamedTuple):
    """How a file made of chunks is laid out: sizes in bytes."""

    start: int  # of the first chunk
    name_size: int  # of a chunk's name
    size_size: int  # of its size
    order: str  # of the bytes of that
    align: int  # what chunks are padded to
    samples: bytes  # the first bytes of the name of the chunk that holds them


CHUNKS = {  # by a file's first bytes
    b"RIFF": Chunks(12, 4, 4, "little", 2, b"data"),
    b"RIFX": Chunks(12, 4, 4, "big", 2, b"data"),
    b"RF64": Chunks(12, 4, 4, "little", 2, b"data"),
    b"FORM": Chunks(12, 4, 4, "big", 2, b"SSND"),  # AIFF
    b"caff": Chunks(8, 4, 8, "big", 1, b"data"),
    b"riff": Chunks(40, 16, 8, "little", 8, b"data"),  # Wave64, whose sizes count a chunk's head
}
KILOBITS = {  # of MPEG layer III by version: 1, 2 (and 2.5)
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}


def check_is_whole(file: BinaryIO, path: str) -> float:
    """Refuse a file that holds less than its header says, which libsndfile would simply read.

    FLAC is left to its decoder, which notices.

    Args:
        file: at its start.
        path: for messages.

    Returns:
        The fewest seconds that decoding must give, where libsndfile may give less (MP3, Ogg).

    Raises:
        BadUtterance: it is truncated, or of a kind that libsndfile cannot decode.
    """
    magic = file.read(12)
    file_size = os.fstat(file.fileno()).st_size
    stated, held, unit, least = None, 0, "bytes of samples", 0
    if magic[:4] in CHUNKS:
        stated, held = _chunk_size(file, magic[:4], file_size, path)
    elif magic[:4] in (b".snd", b"dns."):  # AU: where the samples start, how many bytes
        order = ">" if magic[:4] == b".snd" else "<"
        start, stated = struct.unpack(f"{order}II", magic[4:].ljust(8, b"\0"))
        held = file_size - start
    elif magic.startswith(b"NIST_1A"):
        stated, held = _sphere_size(file, file_size, path)
        unit = "samples"
    elif magic.startswith(b"OggS"):
        least = _ogg_seconds(file, file_size, path)
    elif magic[:4] == b"ajkg":
        raise _undecodable(path, "Shorten", "sph2pipe -f wav")
    elif magic[4:8] == b"ftyp":
        raise _undecodable(path, "MPEG-4 audio", "ffmpeg -i")
    elif magic.startswith(b"ID3") or magic[:1] == b"\xff" and magic[1:2] >= b"\xe0":
        stated, held, least = _mpeg_frames(file, magic, file_size, path)
        unit = "MPEG frames"
    command = f"sox --ignore-length {shlex.quote(path)} OUT.wav"
    if stated == 0 < held:
        raise BadUtterance(
            f"{path}: its header says 0 {unit}, and {held} follow, as when it was written to a "
            f"pipe: rewrite it with: {command}"
        )
    if stated is not None and held < stated:
        hint = f" (if it was written to a pipe: {command})" if stated > 2**31 - 2**16 else ""
        raise BadUtterance(f"{path}: truncated: {held} of the {stated} {unit} in its header{hint}")
    return least


def _undecodable(path, kind, command):
    command += f" {shlex.quote(path)} OUT.wav"
    return BadUtterance(f"{path}: {kind} is not supported: convert it with: {command}")


def _chunk_size(file, magic, file_size, path):
    """-> bytes of samples by the header, bytes that are there."""
    layout = CHUNKS[magic]
    start, size_64 = layout.start, None
    while True:
        file.seek(start)
        head = file.read(layout.name_size + layout.size_size)
        if len(head) < layout.name_size + layout.size_size:
            raise BadUtterance(f"{path}: truncated: ends within its header")
        size = int.from_bytes(head[layout.name_size :], layout.order)
        if magic == b"riff":
            size = max(size - len(head), 0)
        start += len(head)
        if head.startswith(layout.samples):
            # RF64, for files over 4 GiB, has the size elsewhere.
            return size_64 if magic == b"RF64" and size_64 else size, file_size - start
        if head.startswith(b"ds64"):  # sizes of the file, of the samples
            size_64 = int.from_bytes(file.read(16)[8:], "little")
        start += size + -size % layout.align


def _sphere_size(file, file_size, path):
    """-> samples by the header, samples that are there."""
    file.seek(0)
    head = file.read(1 << 14)
    found = re.match(rb"NIST_1A\s+(\d{1,9})\s", head)
    fields = dict(re.findall(rb"\n(\w+) -\w+ (\S+)", head[: int(found[1])])) if found else {}
    if b"shorten" in fields.get(b"sample_coding", b""):
        raise _undecodable(path, "Shorten", "sph2pipe -f wav")
    try:
        sample_size = int(fields[b"sample_n_bytes"]) * int(fields.get(b"channel_count", 1))
        return int(fields[b"sample_count"]), (file_size - int(found[1])) // sample_size
    except (KeyError, ValueError, ZeroDivisionError):
        raise BadUtterance(
            f"{path}: a SPHERE file whose header lacks sample_count or sample_n_bytes: truncated?"
        ) from None


def _ogg_seconds(file, file_size, path):
    """-> the fewest seconds that decoding must give, by the last page, which must be there."""
    file.seek(28)
    head = file.read(16)
    file.seek(max(0, file_size - (1 << 16)))  # a page is smaller
    page = file.read().rpartition(b"OggS")[2]  # from here: version, flags, position, ...
    num_packets = page[22] if len(page) > 22 else 255
    if len(page) < 23 + num_packets + sum(page[23 : 23 + num_packets]) or not page[1] & 4:
        raise BadUtterance(f"{path}: truncated: the stream's last page is missing")
    position = struct.unpack("<q", page[2:10])[0]
    rates = {b"OpusHead": 48000, b"\1vorbis": struct.unpack("<I", head[12:])[0]}
    rate = next((rate for name, rate in rates.items() if head.startswith(name)), 0)
    return position / rate - 0.1 if rate else 0.0  # 0.1: what decoders skip at the start


def _mpeg_frames(file, magic, file_size, path):
    """-> frames by the MP3's header (None without one), frames there, fewest seconds to decode.

    Without a header (Xing, Info) libsndfile takes all frames to be as long as the first, and stops
    where that would end the file. So they are counted.
    """
    start, found, stated, seconds = 0, 0, None, 0.0
    while magic[:3] == b"ID3":  # 10 bytes and a size of four times 7 bits
        file.seek(start + 6)
        start += 10 + functools.reduce(lambda size, byte: size << 7 | byte & 127, file.read(4), 0)
        file.seek(start)
        magic = file.read(3)
    while True:
        file.seek(start)
        head = file.read(4)
        if len(head) < 4 or head[0] != 0xFF or head[1] & 0xE6 != 0xE2:  # layer III
            break
        version, kilobits, rate = head[1] >> 3 & 3, head[2] >> 4, head[2] >> 2 & 3
        if version == 1 or kilobits in (0, 15) or rate == 3:
            break
        rate = (44100, 48000, 32000)[rate] >> {3: 0, 2: 1, 0: 2}[version]
        samples = 1152 if version == 3 else 576
        size = samples * 125 * KILOBITS[version == 3][kilobits - 1] // rate + (head[2] >> 1 & 1)
        if start + size > file_size:
            raise BadUtterance(
                f"{path}: truncated: {file_size - start} of the {size} bytes of its last frame"
            )
        if found == 0:
            tag = re.search(rb"(?:Xing|Info)\0\0\0(.)(.{4})", file.read(200), re.DOTALL)
            if tag and tag[1][0] & 1:
                stated, found = struct.unpack(">I", tag[2])[0], -1  # the frame of the tag
        start, found, seconds = start + size, found + 1, samples / rate
    return stated, found, (found - 4) * seconds  # decoders trim what encoders add


# Decoding -----------------------------------------------------------------------------------------


def read_blocks(
    recording: Recording, sample_rate: float, resample: bool = False, channel: int | None = None
) -> Iterator[np.ndarray]:
    """Read a recording's samples in blocks of a minute or so, float32 (samples,) in 16-bit range:
    16-bit files give exactly their integers, floating-point ones 32768 times what they hold.

    Args:
        recording: a whole file or a stretch of it.
        sample_rate: expected, Hz.
        resample: convert other rates (soxr, high quality).
        channel: which of several channels to read, from 0; None: the recording's, if it says.

    Raises:
        BadUtterance: another sampling rate, several channels, a file that cannot be decoded or is
            truncated, samples that are NaN, infinite or out of range.
    """
    import soundfile

    path = recording.path
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise BadUtterance(f"{path}: not a regular file")
        with open(path, "rb") as file:
            least = check_is_whole(file, path)
        with soundfile.SoundFile(os.fsencode(path)) as file:  # a name need not be UTF-8
            if channel is None:
                channel = 0 if file.channels == 1 else recording.channel
            problems = {}  # by the flag that helps
            if file.samplerate != sample_rate and not resample:
                found = f"sampling rate {file.samplerate} Hz, expected {sample_rate:g} Hz"
                problems["--resample"] = found
            if channel is None:
                problems["--channel K, from 0"] = f"{file.channels} channels, expected 1"
            if problems:
                found, flags = "; ".join(problems.values()), " and ".join(problems)
                raise BadUtterance(f"{path}: {found}: convert with {flags}")
            blocks = _decode(file, recording, channel, least)
            if file.samplerate != sample_rate:
                blocks = _resample(blocks, file.samplerate, sample_rate)
            yield from blocks
    except soundfile.SoundFileError as error:
        # libsndfile's text may name the file again and may run over several lines
        reason = " ".join(getattr(error, "error_string", str(error)).split())
        raise BadUtterance(
            f"{path}: cannot be decoded: damaged, truncated, or of a format that libsndfile does "
            f"not know and ffmpeg may convert: {reason}"
        ) from None
    except OSError as error:
        raise BadUtterance(f"{path}: {error.strerror or error}") from None


def _decode(file, recording, channel, least):
    """An open SoundFile -> blocks of one channel's samples, in 16-bit range."""
    path = recording.path
    if file.format not in FORMATS:
        raise _undecodable(path, f"{file.format} (whose length cannot be checked)", "sox")
    # A FLAC written to a pipe does not say how long it is, so that no cut could be noticed.
    if file.frames >= 2**36 - 1:
        raise BadUtterance(
            f"{path}: its header does not say how long it is: "
            f"rewrite it with: sox {shlex.quote(path)} OUT.flac"
        )
    if channel >= file.channels:
        raise BadUtterance(f"{path}: has no channel {channel}, only {file.channels} (from 0)")
    is_mp3, is_float = file.format == "MP3", file.subtype in ("FLOAT", "DOUBLE")
    rate, end = file.samplerate, file.frames
    start = int(recording.start * rate)
    # MP3's length is an estimate, which may be above what there is.
    expected = max(int(least * rate), 0 if is_mp3 else end)
    if recording.end is not None:  # as Kaldi's extract-segments, which allows for rounding too
        end = int(recording.end * rate)
        if start >= file.frames or end > file.frames + rate // 2:
            raise BadUtterance(
                f"{path}: utterance {recording.utt_id}: from {recording.start:g} to "
                f"{recording.end:g} s, but the file has {file.frames / rate:g} s"
            )
        expected = end = min(end, file.frames)
    if is_mp3:  # seeking is not exact there, which soundfile does after every read too
        file.seekable = lambda: False
        while file.tell() < start and len(file.read(min(BLOCK_SIZE, start - file.tell()))):
            pass
    else:
        file.seek(start)
    done = start
    while done < end:
        wanted = min(BLOCK_SIZE, end - done)
        samples = file.read(wanted, dtype="float32", always_2d=True)[:, channel]
        done += len(samples)
        with np.errstate(over="ignore"):
            samples = samples * np.float32(FULL_SCALE)
        if not np.isfinite(samples).all():
            raise BadUtterance(f"{path}: holds samples that are NaN or infinite")
        if is_float and (loudest := np.abs(samples).max(initial=0) / FULL_SCALE) > LOUDEST:
            raise BadUtterance(
                f"{path}: holds floating-point samples up to {loudest:g}, expected -1 to 1: "
                "rewrite it as 16-bit integers, or divided by 32768"
            )
        yield samples
        if len(samples) < wanted:  # there may be more, but after a gap
            break
    if done < expected:
        hint = f"; try: ffmpeg -i {shlex.quote(path)} OUT.flac" if is_mp3 else ""
        raise BadUtterance(f"{path}: truncated or damaged: {done} of {expected} samples{hint}")


def _resample(blocks, rate, target):
    """Samples in blocks, at `rate` Hz -> the same at `target` Hz."""
    try:
        import soxr
    except ModuleNotFoundError:
        raise UserError("--resample needs soxr: pip install -r requirements.txt") from None
    stream = soxr.ResampleStream(rate, target, 1, dtype="float32", quality="HQ")
    for samples in blocks:
        yield stream.resample_chunk(samples)
    yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


# Files to log-Mel frames --------------------------------------------------------------------------


def read_fbank_blocks(recording: Recording, settings: dict, **options) -> Iterator[np.ndarray]:
    """A recording's log-Mel frames, block by block; `options` are read_blocks()'."""
    blocks = read_blocks(recording, settings["sample_rate"], **options)
    return fbank_blocks(blocks, settings, name=recording.path)


def read_fbank(recording: Recording, settings: dict, **options) -> np.ndarray:
    """All of a recording's log-Mel frames, float32 (T, num_mel_bins)."""
    return np.concatenate([*read_fbank_blocks(recording, settings, **options)])


def audio_jobs(recordings: list[Recording], settings: dict, **options) -> Iterator[tuple]:
    """Recordings -> (how many so far, job of some), as kaldi.read_kaldi's jobs, whose utterances
    have blocks of frames."""
    for start in range(0, len(recordings), 4):
        some = recordings[start : start + 4]
        yield start + len(some), functools.partial(_read_files, some, settings, options)


def _read_files(recordings, settings, options) -> Iterable[tuple]:
    for recording in recordings:
        blocks = read_fbank_blocks(recording, settings, **options)
        yield recording.utt_id, blocks, recording.path
