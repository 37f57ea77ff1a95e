"""Kaldi's features: files in, utterances out.

A source is a generator of jobs. A job is a callable that can be sent to another process; called, it
yields (utterance id, where, read) for some utterances: `where` is what messages call the place,
"file:line", and read() returns an iterator of blocks of frames, float32 (t, D), or raises
BadUtterance. So reading is serial and cheap, and parsing is parallel.

A file's extension and its first bytes tell what it is, never trial and error:

    text dump       "utt_id\\n", a line of decimals per frame, ".\\n"   (the original release)
    text archive    "utt_id  [\\n", a line of decimals per frame, the last ends with "]"
    binary archive  "utt_id \\0B" and a matrix of floats, doubles, or compressed
    .scp            "utt_id file:offset" on each line
"""

import contextlib
import gzip
import io
import lzma
import math
import os
import re
import struct
import sys
import unicodedata
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import BinaryIO

import numpy as np
import simdjson

from utils import BadUtterance, UserError

BLOCK_SIZE = 1 << 22  # bytes of text for each job
# The first line of an utterance, and its end, in a text dump and in a text archive.
HEAD = {".": rb"(?!\.\s)(\S+)[ \t]*\n", "]": rb"(\S+)[ \t]+\[[ \t]*\n?"}
END = {".": rb"\n[ \t]*\.[ \t\r]*\n", "]": rb"\][ \t\r]*\n"}
UTF_8_MARK, UTF_16_MARKS = b"\xef\xbb\xbf", (b"\xff\xfe", b"\xfe\xff")
PARSER = simdjson.Parser()  # keeps its memory from one utterance to the next


def quote(text: str | bytes) -> str:
    """Text from a file, for a one-line message: short, printable, in quotes."""
    text = (text if isinstance(text, str) else text.decode("utf-8", "replace")).strip()
    return repr(text if len(text) <= 40 else text[:40] + "...")


def _name(utt_id: bytes) -> str:
    """What messages call an utterance whose id may be anything."""
    return f"utterance {quote(utt_id)[1:-1]}"


def check_utt_id(utt_id: str, where: str) -> None:
    """Check an utterance id, which becomes a file name.

    Raises:
        BadUtterance: naming `where`, if it would be a bad file name.
    """
    if (
        not utt_id
        or utt_id.startswith(".")
        or re.search(r"[/\\]", utt_id)
        or not utt_id.isprintable()  # nor are bytes that are not UTF-8
        or len(utt_id.encode()) > 240
    ):
        raise BadUtterance(
            f"{where}: utterance id {quote(os.fsencode(utt_id))} cannot be a file name: expected "
            "at most 240 bytes of printable UTF-8, without '/' and '\\', not starting with '.'"
        )


@contextlib.contextmanager
def collect(bad: list[str] | None) -> Iterator[None]:
    """Append the message of a BadUtterance or OSError within to `bad`; if that is None, raise."""
    try:
        yield
    except (BadUtterance, OSError) as error:
        if bad is None:
            raise
        bad.append(" ".join(str(error).split()))


def open_input(path: str) -> tuple[BinaryIO, io.BufferedReader]:
    """Open a plain, .xz or .gz file or standard input (`-`) -> (raw, content) binary streams.

    The first bytes tell the compression. `raw` counts the bytes on disk (`raw.tell()`, for a
    progress bar), `content` reads what is in them.
    """
    raw = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
    # Buffered twice, so that peek() waits for a full buffer, however slowly a pipe delivers.
    content = io.BufferedReader(raw)
    magic = content.peek()
    if magic.startswith(b"\xfd7zXZ\0"):
        content = io.BufferedReader(lzma.LZMAFile(content, format=lzma.FORMAT_XZ))  # noqa: SIM115
    elif magic.startswith(b"\x1f\x8b"):
        content = io.BufferedReader(gzip.GzipFile(fileobj=content))
    return raw, content


def _check_encoding(head, name):
    if head.startswith(UTF_16_MARKS):
        raise UserError(f"{name}: this is UTF-16 text: convert it with: iconv -f UTF-16 -t UTF-8")


def read_kaldi(path: str) -> tuple[str, int | None, Iterator]:
    """Kaldi's features of any kind -> (kind, size in bytes or None, generator of (position, job)).

    `position` counts the bytes read so far, of `size`; 0 in a pipe, which has none. Kinds and jobs:
    see the top of this module.

    Raises (also from the generator, or from a job):
        UserError: what is wrong, with the file, the line (text) and the utterance.
        OSError: a file that cannot be read.
    """
    name = "standard input" if path == "-" else path
    raw, content = open_input(path)
    size = os.fstat(raw.fileno()).st_size if raw.seekable() else None
    with _damage(name):
        head = content.peek()
    _check_encoding(head, name)
    is_file = content.raw is raw and size is not None and path != "-"
    if path.removesuffix(".gz").removesuffix(".xz").endswith(".scp"):
        kind, jobs = "scp", scp_jobs(content, name)
    elif re.match(rb"\S* \0B", head):
        kind, jobs = "binary archive", ark_jobs(content, name)
    elif re.match(rb"\s*\S+[ \t]+\[", head):
        kind, jobs = "text archive", text_jobs(content, name, "]", is_file)
    else:
        kind, jobs = "text dump", text_jobs(content, name, ".", is_file)

    def with_positions():
        job = None
        with _damage(name):
            for job in jobs:
                yield 0 if size is None else raw.tell(), job
        if job is None:
            raise UserError(f"{name}: expected utterances, found an empty file")

    return kind, size, with_positions()


@contextlib.contextmanager
def _damage(name):
    """Turn what decompressors raise into a UserError."""
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: compressed data truncated or damaged: {error}") from None


def check_frames(
    utt_id: str, frames: np.ndarray, where: str, place: Callable[[int], str] | None = None
) -> Iterator[np.ndarray]:
    """Values (T, D) as they were read -> the utterance's frames, one block of float32 (T, D).

    `place(row)` is what a message calls a frame's place: file and line, if it has a line.
    """
    check_utt_id(utt_id, where)
    name = f"{where}: utterance {utt_id}"
    if not frames.size:
        raise BadUtterance(f"{name}: expected frames, found a matrix of shape {frames.shape}")
    with np.errstate(over="ignore", invalid="ignore"):
        floats = np.ascontiguousarray(frames, dtype=np.float32)
    finite = np.isfinite(floats)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        at = place(row) if place else f"{name}: frame {row}"
        raise BadUtterance(f"{at}: expected finite float32 values, found {frames[row, column]:g}")
    return iter([floats])


# Text ---------------------------------------------------------------------------------------------


def text_jobs(stream: BinaryIO, name: str, end_mark: str, is_file: bool) -> Iterator[Callable]:
    """Cut a text dump or archive into blocks of whole utterances, each the work of a job.

    If `is_file`, jobs read their blocks from the file `name` again: that takes a quarter less time
    than sending them to another process.
    """
    last_end = re.compile(rb".*" + END[end_mark], re.DOTALL)
    start, line, rest, size = 0, 1, b"", BLOCK_SIZE
    while new := stream.read(size):
        if b"\0" in new:
            raise UserError(f"{name}: expected a text dump, an archive or a .scp, found other data")
        block = rest + new
        found = last_end.match(block)
        if not found:
            # Twice as much each time, so that a long utterance is not searched again and again.
            rest, size = block, len(block)
            continue
        end = found.end()
        if is_file:
            yield partial(parse_part, start, end, line, name, end_mark)
        else:
            yield partial(parse_text, block[:end], line, name, end_mark)
        start, line = start + end, line + block.count(b"\n", 0, end)
        rest, size = block[end:], BLOCK_SIZE
    if rest.strip():
        yield partial(parse_text, rest.rstrip() + b"\n", line, name, end_mark)


def parse_part(offset: int, size: int, first_line: int, name: str, end_mark: str) -> Iterator:
    """parse_text() of the `size` bytes at `offset` of the file `name`."""
    with open(name, "rb") as file:
        file.seek(offset)
        return parse_text(file.read(size), first_line, name, end_mark)


def parse_text(block: bytes, first_line: int, name: str, end_mark: str) -> Iterator[tuple]:
    """Whole utterances of a dump or archive, from line `first_line` -> (utterance id, where, read).

    Raises:
        UserError: it does not consist of utterances.
    """
    head_pattern, end_pattern = re.compile(HEAD[end_mark]), re.compile(END[end_mark])
    if first_line == 1:
        block = block.removeprefix(UTF_8_MARK)
    if b"\r" in block:  # which is faster to see than "\r\n"
        block = block.replace(b"\r\n", b"\n")
    start, number = 0, first_line  # of what comes next
    while start < len(block):
        blank = re.compile(rb"\s*").match(block, start)
        start, number = blank.end(), number + blank[0].count(b"\n")
        where, head = f"{name}:{number}", head_pattern.match(block, start)
        if not head:
            expected = "only an utterance id" if end_mark == "." else "an utterance id and '['"
            line = block[start:].split(b"\n", 1)[0]
            raise UserError(f"{where}: expected {expected}, found {quote(line)}")
        # A dump's utterance of no frames ends with the line feed of its first line.
        end = end_pattern.search(block, head.end() - 1)
        if end is None:
            last_line = number + block[start:].rstrip().count(b"\n") + 1
            raise UserError(
                f"{name}:{last_line}: {_name(head[1])}: expected {end_mark!r} at the end of the "
                "utterance, found the end of the file: is it truncated?"
            )
        utt_id, body = os.fsdecode(head[1]), block[head.end() : end.start()]
        # A text archive's first frame may stand on the line of its '['.
        first_frame = number + head[0].count(b"\n")
        yield utt_id, where, partial(_parse_utterance, utt_id, body, name, where, first_frame)
        number += block.count(b"\n", start, end.end())
        start = end.end()


def _parse_utterance(utt_id, body, name, where, first_frame):
    """Lines of frames, from line `first_frame` on -> blocks, as read() returns."""

    def place(row):
        return f"{name}:{first_frame + row}: utterance {utt_id}"

    check_utt_id(utt_id, where)
    body = body.rstrip()
    frames = _parse_fast(body)
    if frames is None:
        frames = _parse_slowly(body, place)
    if not len(frames):
        raise BadUtterance(f"{place(0)}: expected frames, found none")
    return check_frames(utt_id, frames, where, place)


def _parse_fast(body):
    """Lines of decimals with single spaces between them -> float64 (T, D); None if they are not.

    It gives float()'s values at ten times its speed: with commas and brackets they are JSON.
    """
    if b"[" in body or b"," in body:
        return None
    text = np.frombuffer(body, np.uint8).copy()
    between = (text[:-2] > 32) & (text[1:-1] == 32) & (text[2:] > 32)  # 32 is the space
    text[1:-1] += between * np.uint8(ord(",") - 32)
    text = b"[[" + text.tobytes().replace(b"\n", b"],[") + b"]]"
    try:
        rows = PARSER.parse(text)
        frames = np.frombuffer(rows.as_buffer(of_type="d"))
    except (ValueError, TypeError, RuntimeError):  # no JSON, no numbers, an integer too large
        return None
    widths = set(map(len, rows))
    if len(widths) > 1 or not frames.size:
        return None
    return frames.reshape(len(rows), -1)


def _parse_slowly(body, place):
    """Line by line with float(), for the message that says what is wrong, and where."""
    rows = []
    for line in body.split(b"\n") if body else ():
        row = []
        for word in line.split():
            try:
                row.append(float(word.replace(b"_", b"?")))  # Python ignores a "_" in numbers
            except ValueError:
                where = place(len(rows))
                raise BadUtterance(f"{where}: expected numbers, found {quote(word)}") from None
        rows.append(row)
        if len(row) != len(rows[0]):
            raise BadUtterance(
                f"{place(len(rows) - 1)}: expected {len(rows[0])} values, as in the first frame, "
                f"found {len(row)}"
            )
    return np.array(rows)


# Archives and lists of places in them -------------------------------------------------------------


def ark_jobs(stream: BinaryIO, name: str) -> Iterator[Callable]:
    """A binary archive -> jobs of some utterances each."""
    matrices, size = [], 0
    while head := stream.read(1):
        while not head.endswith(b" ") and len(head) <= 256 and (byte := stream.read(1)):
            head += byte
        utt_id = os.fsdecode(head[:-1])
        frames = read_matrix(stream, f"{name}: {_name(head)}")
        matrices.append((utt_id, name, partial(check_frames, utt_id, frames, name)))
        size += frames.nbytes
        if size >= BLOCK_SIZE:
            yield partial(iter, matrices)
            matrices, size = [], 0
    if matrices:
        yield partial(iter, matrices)


def read_matrix(stream: BinaryIO, where: str) -> np.ndarray:
    """Kaldi's binary matrix at a stream's position -> (T, D)."""
    # Only this part of kaldiio is safe with files from strangers: others run pipes and pickles.
    from kaldiio.matio import read_matrix_or_vector

    try:
        with np.errstate(all="ignore"):  # a damaged header's numbers
            frames = read_matrix_or_vector(stream)
    except (ValueError, AssertionError, struct.error, MemoryError, OverflowError, TypeError):
        raise UserError(
            f"{where}: not a binary matrix (FM, DM, CM, CM2 or CM3), or a truncated or damaged one"
        ) from None
    if frames.ndim != 2:
        raise UserError(f"{where}: expected frames, found a vector of {frames.size} values")
    return frames


def scp_jobs(stream: BinaryIO, name: str) -> Iterator[Callable]:
    """An .scp -> jobs of some lines each. Pipes are rejected: they would run a command."""
    lines = []
    for number, line in enumerate(stream, start=1):
        words = (line.removeprefix(UTF_8_MARK) if number == 1 else line).split(maxsplit=1)
        if not words:
            continue
        utt_id, where = os.fsdecode(words[0]), f"{name}:{number}"
        target = os.fsdecode(words[1].strip()) if len(words) == 2 else ""
        if target.endswith("|") or target.startswith("|"):
            raise UserError(
                f"{where}: {_name(words[0])}: pipes are not supported, because they would execute "
                "a command: write an archive with copy-feats and read that"
            )
        found = re.fullmatch(r"(.*?[^\]])(?::(\d{1,18}))?(?:\[(\d{1,9}):(\d{1,9})\])?", target)
        if not found or "\0" in target:
            raise UserError(
                f"{where}: {_name(words[0])}: expected FILE, FILE:OFFSET or, for some "
                f"rows only, FILE:OFFSET[FIRST:LAST], found {quote(os.fsencode(target))}"
            )
        path, *numbers = found.groups()
        lines.append((utt_id, where, partial(read_scp_line, utt_id, where, path, *numbers)))
        if len(lines) == 32:
            yield partial(iter, lines)
            lines = []
    if lines:
        yield partial(iter, lines)


def read_scp_line(
    utt_id: str, where: str, path: str, offset: str | None, first: str | None, last: str | None
) -> Iterator[np.ndarray]:
    """The frames at `offset` of a file; those from `first` to `last` if these are given."""
    check_utt_id(utt_id, where)
    name = f"{where}: utterance {utt_id}: {path!r}"
    try:
        with open(path, "rb") as file:
            file.seek(int(offset or 0))
            is_binary = file.read(2) == b"\0B"
            file.seek(int(offset or 0))
            frames = (read_matrix if is_binary else read_text_matrix)(file, name)
    except OSError as error:
        raise BadUtterance(
            f"{name}: {error.strerror} (relative paths start from the current directory)"
        ) from None
    except UserError as error:  # no matrix there: other lines do not depend on this one
        raise BadUtterance(str(error)) from None
    if first:
        rows = range(int(first), int(last) + 1)
        # As in Kaldi, which allows for lengths that were rounded up.
        if not rows or rows.start >= len(frames) or rows.stop > len(frames) + 3:
            raise BadUtterance(f"{name}: expected rows {first} to {last}, found {len(frames)} rows")
        frames = frames[rows.start : rows.stop]
    return check_frames(utt_id, frames, where)


def read_text_matrix(file: BinaryIO, where: str) -> np.ndarray:
    """A text archive's matrix, " [ ... ]", at a file's position -> (T, D)."""
    text = b""
    while b"]" not in text and (new := file.read(1 << 16)):
        text += new
    found = re.match(rb"\s*\[([^\[\]]*)\]", text)
    if not found:
        raise UserError(f"{where}: expected a matrix, binary or in brackets, found {quote(text)}")
    body = found[1].strip()
    frames = _parse_fast(body)
    return _parse_slowly(body, lambda row: f"{where}: frame {row}") if frames is None else frames


# Kaldi's tables -----------------------------------------------------------------------------------


def read_table(path: str | os.PathLike, *columns: str, maxsplit: int = -1) -> dict:
    """One of Kaldi's tables, "key value ..." a line -> dict key -> (values, "file:line").

    A column whose name ends with "?" may be missing.

    Raises:
        UserError: an empty table; a line with more or fewer columns; a key given twice with
            different values.
    """
    table = {}
    least = sum(not column.endswith("?") for column in columns)
    with open(path, "rb") as file:
        _check_encoding(file.peek(), path)
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(UTF_8_MARK)
            # Utterance ids may be file names, which need not be text.
            words = os.fsdecode(line.strip()).split(maxsplit=maxsplit)
            if not words:
                continue
            if not least <= len(words) <= len(columns):
                raise UserError(f"{where}: expected {' and '.join(columns)}, found {quote(line)}")
            key, *values = words
            before, where_before = table.setdefault(key, (values, where))
            if before != values:
                raise UserError(
                    f"{where}: {key} has {' '.join(values)!r} here, and {' '.join(before)!r} in "
                    f"{where_before}"
                )
    if not table:
        raise UserError(f"{path}: this table is empty: fill it or remove it")
    return table


def read_utt2spk(path: str | os.PathLike) -> dict[str, str]:
    """Kaldi's utt2spk, "utterance speaker" a line -> dict.

    Ids with accents are there in both forms of Unicode: macOS decomposes file names.
    """
    table = read_table(path, "an utterance", "a speaker")
    speakers = {utt_id: speaker for utt_id, ((speaker,), _) in table.items()}
    return {unicodedata.normalize("NFC", key): value for key, value in speakers.items()} | speakers


def read_data_dir(path: str, bad: list[str] | None = None) -> list[tuple]:
    """A data directory: wav.scp; segments, utt2spk, reco2file_and_channel if there are any.

    Args:
        path: the folder.
        bad: for messages on utterances that cannot be used, which are skipped; None: raise them.

    Returns:
        (utterance id, audio file, speaker or None, channel or None, start, end or None) of each
        utterance, sorted by id; times in seconds, channels from 0.

    Raises:
        UserError: by file and line, what is wrong; a pipe, which would execute a command.
    """

    def read(name, *columns):
        file = os.path.join(path, name)
        return read_table(file, *columns) if os.path.exists(file) else {}

    files = read_table(os.path.join(path, "wav.scp"), "a recording", "its file", maxsplit=1)
    speakers = read("utt2spk", "an utterance", "a speaker")
    channels = read("reco2file_and_channel", "a recording", "a file", "a channel")
    columns = ("an utterance", "a recording", "its start", "its end", "a channel?")
    segments = read("segments", *columns) or {
        recording: ([recording, "0", "-1"], where) for recording, (_, where) in files.items()
    }
    rows = []
    for utt_id, ((recording, *segment), where) in sorted(segments.items()):
        if recording not in files:
            raise UserError(f"{where}: utterance {utt_id}: {recording} is not in wav.scp")
        (file,), where_file = files[recording]
        if file.endswith("|") or re.search(r"\.ark:\d+$", file):
            raise UserError(
                f"{where_file}: recording {recording}: pipes, because they would execute a "
                "command, and archives of audio are not supported: write the audio to files, and "
                f"name those here, found {quote(file)}"
            )
        channel = _channel(*channels[recording]) if recording in channels else None
        (speaker,), _ = speakers.get(utt_id, ((None,), None))
        with collect(bad):
            check_utt_id(utt_id, where)
            start, end, channel = _segment(segment, channel, f"{where}: utterance {utt_id}")
            rows.append((utt_id, file, speaker, channel, start, end))
    return rows


def _channel(values, where):
    """A line of reco2file_and_channel -> the channel, from 0; numbers count from 1, as NIST's."""
    name = values[1]
    if re.fullmatch("[A-Za-z]", name):
        return ord(name.upper()) - ord("A")
    if re.fullmatch(r"[1-9]\d{0,3}", name):
        return int(name) - 1
    raise UserError(f"{where}: expected a channel A, B, ... or 1, 2, ..., found {quote(name)}")


def _segment(values, channel, where):
    """A line of segments -> start, end (None: the recording's), channel (from 0, as in Kaldi)."""
    try:
        start, end = map(float, values[:2])
        channel = int(values[2]) if len(values) > 2 else channel
    except ValueError:
        start = end = math.nan
    is_part = 0 <= start < end < math.inf or 0 <= start < math.inf and end == -1
    if not is_part or (channel is not None and channel < 0):
        raise BadUtterance(
            f"{where}: expected 0 <= start < end, in seconds, and maybe a channel, from 0, found "
            f"{quote(' '.join(values))}"
        )
    return start, None if end == -1 else end, channel
