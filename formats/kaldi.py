"""Kaldi's features: files in, utterances out.

A source is a generator of (position, job). A job is a callable that can be sent to another process;
called, it yields (utterance id, where, read) for some utterances: `where` is what messages call the
place, "file:line", and read() returns an iterator of blocks of frames, float32 (t, D), or raises
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
MAX_UTTERANCE = 1 << 30  # bytes of text; without the end of an utterance in this, it is not a dump
END_OF_UTTERANCE = {".": rb"\n[ \t]*\.[ \t\r]*\n", "]": rb"\][ \t\r]*\n"}
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
    if path == "-" and sys.stdin is None:
        raise UserError("standard input is closed")
    raw = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
    # Buffered twice, so that peek() waits for a full buffer, however slowly a pipe delivers.
    content = io.BufferedReader(raw)
    magic = content.peek()
    if magic.startswith(b"\xfd7zXZ\0"):
        content = io.BufferedReader(lzma.LZMAFile(content, format=lzma.FORMAT_XZ))  # noqa: SIM115
    elif magic.startswith(b"\x1f\x8b"):
        content = io.BufferedReader(gzip.GzipFile(fileobj=content))
    return raw, content


def check_encoding(head: bytes, name: str) -> None:
    """UserError if a file's first bytes say that it is UTF-16, as Windows' tools write it."""
    if head.startswith(UTF_16_MARKS):
        raise UserError(f"{name}: this is UTF-16 text: convert it with: iconv -f UTF-16 -t UTF-8")


def read_kaldi(path: str) -> tuple[str, int | None, Iterator]:
    """Kaldi's features of any kind -> (kind, size in bytes or None, generator of (position, job)).

    `position` counts the bytes read so far, of `size`. Kinds and jobs: see the top of this module.

    Raises (also from the generator, or from a job):
        UserError: what is wrong, with file:line (text) or file and byte (binary), and utterance.
        OSError: a file that cannot be read.
    """
    name = "standard input" if path == "-" else path
    raw, content = open_input(path)
    size = os.fstat(raw.fileno()).st_size if raw.seekable() else None
    with _damage(name):
        head = content.peek()
    check_encoding(head, name)
    is_file = content.raw is raw and size is not None and path != "-"
    if path.removesuffix(".gz").removesuffix(".xz").endswith(".scp"):
        kind, blocks = "scp", scp_jobs(content, name)
    elif re.match(rb"\S* \0B", head):
        kind, blocks = "binary archive", ark_jobs(content, name)
    elif re.match(rb"\s*\S+[ \t]+\[", head):
        kind, blocks = "text archive", text_jobs(content, name, "]", is_file)
    else:
        kind, blocks = "text dump", text_jobs(content, name, ".", is_file)

    def jobs():
        position = 0
        with _damage(name):
            for position, job in blocks:
                yield position if size is None else raw.tell(), job
        if not position:
            raise UserError(f"{name}: expected utterances, found an empty file")

    return kind, size, jobs()


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


def text_jobs(stream: BinaryIO, name: str, end_mark: str, is_file: bool) -> Iterator[tuple]:
    """Cut a text dump or archive into blocks of whole utterances -> (position, job).

    If `is_file`, jobs read their blocks from the file `name` themselves, which is faster than
    sending them to another process.
    """
    last_end = re.compile(rb".*" + END_OF_UTTERANCE[end_mark], re.DOTALL)
    position, line, rest, size = 0, 1, b"", BLOCK_SIZE
    while new := stream.read(size):
        if b"\0" in new:
            raise UserError(f"{name}: expected a text dump, an archive or a .scp, found other data")
        block = rest + new
        found = last_end.match(block)
        if not found:
            if len(block) > MAX_UTTERANCE:
                raise UserError(
                    f"{name}:{line}: expected {end_mark!r} at the end of an utterance, found none "
                    f"in {MAX_UTTERANCE >> 20} MiB: is this a dump?"
                )
            # Twice as much each time, so that a long utterance is not searched again and again.
            rest, size = block, len(block)
            continue
        end, start = found.end(), position
        position += end
        if is_file:
            yield position, partial(parse_part, start, end, line, name, end_mark)
        else:
            yield position, partial(parse_text, block[:end], line, name, end_mark)
        line += block.count(b"\n", 0, end)
        rest, size = block[end:], BLOCK_SIZE
    if rest.strip():
        rest = rest.rstrip() + b"\n"
        yield position + len(rest), partial(parse_text, rest, line, name, end_mark)


def parse_part(offset: int, size: int, first_line: int, name: str, end_mark: str) -> Iterator:
    """parse_text() of the `size` bytes at `offset` of the file `name`."""
    with open(name, "rb") as file:
        file.seek(offset)
        block = file.read(size)
    return parse_text(block, first_line, name, end_mark)


def parse_text(block: bytes, first_line: int, name: str, end_mark: str) -> Iterator[tuple]:
    """Part of a text dump or archive, from its line `first_line` -> (utterance id, where, read).

    Raises:
        UserError: it does not consist of utterances.
    """
    end_of_utterance = re.compile(END_OF_UTTERANCE[end_mark])
    if first_line == 1:
        block = block.removeprefix(UTF_8_MARK)
    if b"\r" in block:  # which is faster to see than "\r\n"
        block = block.replace(b"\r\n", b"\n")
    start, number = 0, first_line  # of the line that comes next
    while start < len(block):
        line_end = block.index(b"\n", start)
        where = f"{name}:{number}"
        line = block[start:line_end]
        words = line.split(maxsplit=2)
        if not words:  # an empty line between utterances
            start, number = line_end + 1, number + 1
            continue
        if end_mark == "." and (len(words) > 1 or words == [b"."]):
            raise UserError(f"{where}: expected only an utterance id, found {quote(line)}")
        is_vector = b"]" in line and words[2:] != [b"]"]
        if end_mark == "]" and (words[1:2] != [b"["] or is_vector):
            raise UserError(f"{where}: expected an utterance id and '[', found {quote(line)}")
        utt_id = os.fsdecode(words[0])
        end = end_of_utterance.search(block, start)
        if end is None:
            last_line = number + block[start:].rstrip().count(b"\n") + 1
            raise UserError(
                f"{name}:{last_line}: {_name(words[0])}: expected {end_mark!r} at the end of the "
                "utterance, found the end of the file: is it truncated?"
            )
        body = block[line_end + 1 : end.start()]
        is_below = words[2:] in ([], [b"]"])
        if not is_below:  # a text archive's first frame may stand on the line of its '['
            body = words[2] + b"\n" + body
        yield utt_id, where, partial(_parse_utterance, utt_id, body, name, number, is_below)
        number += block.count(b"\n", start, end.end())
        start = end.end()


def _parse_utterance(utt_id, body, name, number, is_below):
    """Lines of frames, the first below line `number` or in it -> blocks, as read() returns."""

    def place(row):
        return f"{name}:{number + is_below + row}: utterance {utt_id}"

    check_utt_id(utt_id, f"{name}:{number}")
    body = body.rstrip()
    frames = _parse_fast(body)
    if frames is None:
        frames = _parse_slowly(body, place)
    if not len(frames):
        raise BadUtterance(f"{place(0)}: expected frames, found none")
    return check_frames(utt_id, frames, f"{name}:{number}", place)


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
    if not frames.all() and re.search(rb"-0[,\]\s]", text):  # an integer, which has no sign
        return None
    return frames.reshape(len(rows), -1)


def _parse_slowly(body, place):
    """Line by line with float(), for the message that says what is wrong, and where."""
    rows = []
    for line in body.split(b"\n") if body else ():
        words = line.split()
        bad = next((word for word in words if not _is_number(word)), None)
        if bad is not None:
            raise UserError(f"{place(len(rows))}: expected numbers, found {quote(bad)}")
        rows.append([float(word) for word in words])
        if len(rows[-1]) != len(rows[0]):
            raise UserError(
                f"{place(len(rows) - 1)}: expected {len(rows[0])} values, as in the first frame, "
                f"found {len(words)}"
            )
    return np.array(rows)


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return b"_" not in word  # 1_000 is a number in Python only


# Archives and lists of places in them -------------------------------------------------------------


class _Counted:
    """A stream that counts the bytes read from it: a pipe has no tell()."""

    def __init__(self, stream):
        self.stream = stream
        self.count = 0

    def read(self, size):
        data = self.stream.read(size)
        self.count += len(data)
        return data


def ark_jobs(stream: BinaryIO, name: str) -> Iterator[tuple]:
    """A binary archive -> (position, job of some utterances)."""
    stream, matrices, start = _Counted(stream), [], 0
    while head := stream.read(1):
        where = f"{name}: byte {stream.count - 1}"
        while not head.endswith(b" ") and len(head) <= 256 and (byte := stream.read(1)):
            head += byte
        utt_id = os.fsdecode(head[:-1])
        frames = read_matrix(stream, f"{where}: {_name(head)}")
        matrices.append((utt_id, where, partial(check_frames, utt_id, frames, where)))
        if stream.count - start >= BLOCK_SIZE:
            yield stream.count, partial(iter, matrices)
            matrices, start = [], stream.count
    if matrices:
        yield stream.count, partial(iter, matrices)


def read_matrix(stream: BinaryIO | _Counted, where: str) -> np.ndarray:
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


def scp_jobs(stream: BinaryIO, name: str) -> Iterator[tuple]:
    """An .scp -> (position, job of some lines). Pipes are rejected: they would run a command."""
    lines, position = [], 0
    for number, line in enumerate(stream, start=1):
        position += len(line)
        where = f"{name}:{number}"
        words = (line.removeprefix(UTF_8_MARK) if number == 1 else line).split(maxsplit=1)
        if not words:
            continue
        utt_id = os.fsdecode(words[0])
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
        rows = found[3] and (int(found[3]), int(found[4]))
        read = partial(read_scp_line, utt_id, found[1], int(found[2] or 0), rows, where)
        lines.append((utt_id, where, read))
        if len(lines) == 32:
            yield position, partial(iter, lines)
            lines = []
    if lines:
        yield position, partial(iter, lines)


def read_scp_line(
    utt_id: str, path: str, offset: int, rows: tuple[int, int] | None, where: str
) -> Iterator[np.ndarray]:
    """The matrix at `offset` of a file, or its rows from the first to the last of `rows`."""
    check_utt_id(utt_id, where)
    name = f"{where}: utterance {utt_id}: {path!r}"
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            is_binary = file.read(2) == b"\0B"
            file.seek(offset)
            read = read_matrix if is_binary else read_text_matrix
            frames = read(file, f"{name}: byte {offset}")
    except OSError as error:
        raise UserError(
            f"{name}: {error.strerror} (relative paths start from the current directory)"
        ) from None
    if rows:
        first, last = rows
        # As in Kaldi, which allows for lengths that were rounded up.
        if not first <= last < len(frames) + 3 or first >= len(frames):
            raise UserError(
                f"{name}: byte {offset}: expected rows {first} to {last}, found {len(frames)} rows"
            )
        frames = frames[first : last + 1]
    return check_frames(utt_id, frames, where)


def read_text_matrix(file: BinaryIO, where: str) -> np.ndarray:
    """A text archive's matrix, " [ ... ]", at a file's position -> (T, D)."""
    text = new = file.read(1 << 16)
    while new and b"]" not in new and text.lstrip().startswith(b"["):
        new = file.read(len(text))
        text += new
    body, end, _ = text.partition(b"]")
    if not body.lstrip().startswith(b"[") or not end:
        raise UserError(f"{where}: expected a matrix, binary or in brackets, found {quote(text)}")
    rows = [line.split() for line in body.replace(b"[", b"", 1).splitlines() if line.strip()]
    try:
        return np.array(rows, dtype=np.float64) if rows else np.zeros((0, 0))
    except ValueError:
        raise UserError(f"{where}: expected rows of numbers, all of the same length") from None


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
        check_encoding(file.peek(), path)
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
    for utt_id, (values, where) in sorted(segments.items()):
        recording = values[0]
        if recording not in files:
            raise UserError(f"{where}: utterance {utt_id}: {recording} is not in wav.scp")
        file = _audio_file(recording, *files[recording])
        channel = None
        if recording in channels:
            channel = _channel(*channels[recording])
        (speaker,), _ = speakers.get(utt_id, ((None,), None))
        with collect(bad):
            check_utt_id(utt_id, where)
            start, end, channel = _segment(utt_id, values[1:], channel, where)
            rows.append((utt_id, file, speaker, channel, start, end))
    return rows


def _audio_file(recording, values, where):
    """A recording's file in wav.scp -> the same, if it can be one."""
    (file,) = values
    if file.endswith("|"):
        raise UserError(
            f"{where}: recording {recording}: pipes are not supported, because they would execute "
            "a command: run it once, write its output to a file, and name that file here"
        )
    if re.search(r"\.ark:\d+$", file):
        raise UserError(
            f"{where}: recording {recording}: audio in archives is not supported ({file!r}): "
            "write the archive's recordings to files, and name those here"
        )
    return file


def _channel(values, where):
    """A line of reco2file_and_channel -> the channel, from 0."""
    name = values[1]
    if re.fullmatch("[A-Za-z]", name):
        return ord(name.upper()) - ord("A")
    if re.fullmatch(r"[1-9]\d{0,3}", name):  # as NIST counts
        return int(name) - 1
    raise UserError(f"{where}: expected a channel A, B, ... or 1, 2, ..., found {quote(name)}")


def _segment(utt_id, values, channel, where):
    """A line of segments -> start, end (None: the recording's), channel (from 0, as in Kaldi)."""
    try:
        start, end = map(float, values[:2])
    except ValueError:
        start = end = math.nan
    if not (0 <= start < end < math.inf or 0 <= start < math.inf and end == -1):
        raise BadUtterance(
            f"{where}: utterance {utt_id}: expected 0 <= start < end, in seconds, found "
            f"{quote(' '.join(values[:2]))}"
        )
    if len(values) == 3:
        if not re.fullmatch(r"\d{1,4}", values[2]):
            raise UserError(
                f"{where}: utterance {utt_id}: expected a channel, from 0, in the fifth column, "
                f"found {quote(values[2])}"
            )
        channel = int(values[2])
    return start, None if end == -1 else end, channel
