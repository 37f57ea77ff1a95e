"""Kaldi's features: files in, utterances (id, float32 (T, D)) out.

A source is a generator of jobs. A job is a callable that can be sent to another process; called, it
yields `Utterance`s. So the reading is serial and cheap, and the parsing is parallel.

What a file is follows from its ending and its first bytes, never from trying:

    text dump       "utt_id\\n", a line of decimals for each frame, ".\\n"  (the original release)
    text archive    "utt_id  [\\n", a line of decimals for each frame, the last ends with "]"
    binary archive  "utt_id \\0B" and a matrix of floats, doubles, or compressed
    .scp            "utt_id file:offset" on each line
"""

import contextlib
import functools
import gzip
import io
import itertools
import lzma
import math
import os
import re
import struct
import sys
import zlib
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

import numpy as np
import simdjson

from utils import BadUtterance, UserError, check_utt_id, quote

BLOCK_SIZE = 1 << 22  # bytes of text for each job
MAX_UTTERANCE = 1 << 30  # bytes of text; without the end of an utterance in this, it is not a dump
END_OF_UTTERANCE = {
    ".": re.compile(rb"\n[ \t]*\.[ \t\r]*\n"),
    "]": re.compile(rb"\][ \t\r]*\n"),
}
PARSER = simdjson.Parser()  # keeps its memory from one utterance to the next
MATRIX_TYPES = (b"FM", b"DM", b"CM", b"CM2", b"CM3")


class Utterance(NamedTuple):
    utt_id: str
    frames: np.ndarray  # float32 (T, D)
    where: str  # for messages: "file:line"


class _Rejoined(io.RawIOBase):
    """Bytes that were read from a stream, and then the rest of it."""

    def __init__(self, head, rest):
        self.head = head
        self.rest = rest
        self.count = 0  # bytes read

    def readable(self):
        return True

    def read(self, size=-1):
        if size < 0:  # which only a damaged header asks for
            raise ValueError(f"cannot read {size} bytes")
        data, self.head = self.head[:size], self.head[size:]
        if len(data) < size:
            data += self.rest.read(size - len(data))
        self.count += len(data)
        return data

    def readinto(self, buffer):
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def look_ahead(stream: BinaryIO, size: int) -> tuple[bytes, BinaryIO]:
    """-> (the first bytes of a stream, the stream with them), however slowly a pipe gives them."""
    if isinstance(stream, io.BufferedReader) and stream.seekable():  # faster than to rejoin
        start = stream.tell()
        head = stream.read(size)
        stream.seek(start)
        return head, stream
    head = stream.read(size)
    return head, io.BufferedReader(_Rejoined(head, stream))


def open_input(path: str) -> tuple[BinaryIO, BinaryIO]:
    """Open a plain, .xz or .gz file or standard input (`-`) -> (raw, content) binary streams.

    Compression is told from the first bytes. `raw` counts the bytes on disk (`raw.tell()`, for a
    progress bar), `content` reads what is in them.
    """
    if path == "-" and sys.stdin is None:
        raise UserError("standard input is closed")
    raw = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
    magic, content = look_ahead(raw, 6)
    if magic == b"\xfd7zXZ\0":
        return raw, lzma.LZMAFile(content, format=lzma.FORMAT_XZ)
    if magic.startswith(b"\x1f\x8b"):
        return raw, gzip.GzipFile(fileobj=content)
    return raw, content


def read_kaldi(path: str) -> tuple[str, int | None, Iterator]:
    """Kaldi's features of any kind -> (kind, size in bytes or None, generator of (position, job)).

    `position` counts the bytes read so far, of `size`. The kinds are at the top of this module.

    Raises (also from the generator, or from a job):
        UserError: what is wrong, with file:line (text) or file and byte (binary), and utterance.
        OSError: a file that cannot be read.
    """
    name = "standard input" if path == "-" else path
    raw, content = open_input(path)
    size = os.fstat(raw.fileno()).st_size if raw.seekable() else None
    with _damage(name):
        head, content = look_ahead(content, 1024)
    first_line = head.lstrip().split(b"\n")[0]
    is_file = content is raw and path != "-"
    if path.removesuffix(".gz").removesuffix(".xz").endswith(".scp"):
        kind, blocks = "scp", scp_jobs(content, name)
    elif re.match(rb"\S+ \0B", head):
        kind, blocks = "binary archive", ark_jobs(content, name)
    elif b"\0" in head:
        raise UserError(
            f"{name}: binary data, but no Kaldi archive: expected a text dump, an archive or a .scp"
        )
    elif re.match(rb"\S+[ \t]+\[", first_line):
        kind, blocks = "text archive", text_jobs(content, name, "]", is_file)
    else:
        kind, blocks = "text dump", text_jobs(content, name, ".", is_file)

    def jobs():
        done = 0
        with _damage(name):
            for num_bytes, job in blocks:
                done = done + num_bytes if size is None else raw.tell()
                yield done, job
        if not done:
            raise UserError(f"{name}: expected utterances, found an empty file")

    return kind, size, jobs()


@contextlib.contextmanager
def _damage(name):
    """Turn what decompressors raise into a UserError."""
    try:
        yield
    except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{name}: compressed data truncated or damaged: {error}") from None


def text_jobs(stream: BinaryIO, name: str, end_mark: str, is_file: bool) -> Iterator[tuple]:
    """Cut a text dump or archive into blocks of whole utterances -> (bytes, job).

    If the stream is the file of that name, as it is, jobs read their blocks themselves: that is
    faster than to send them to another process.
    """
    end_of_utterance = END_OF_UTTERANCE[end_mark]
    usual_end = b"\n.\n" if end_mark == "." else b"]\n"
    position, line, rest, size = 0, 1, b"", BLOCK_SIZE
    while True:
        new = stream.read(size)
        if b"\0" in new:
            raise UserError(f"{name}: expected text, found binary data: this is not a text dump")
        block = rest + new
        if not new:
            break
        end = block.rfind(usual_end) + len(usual_end)
        if end < len(usual_end):
            end = max((match.end() for match in end_of_utterance.finditer(block)), default=0)
        if not end:
            if len(block) > MAX_UTTERANCE:
                raise UserError(
                    f"{name}:{line}: expected {end_mark!r} at the end of an utterance, found none "
                    f"in {MAX_UTTERANCE >> 20} MiB: is this a dump?"
                )
            # Twice as much each time: an utterance of many blocks is not searched many times.
            rest, size = block, max(BLOCK_SIZE, len(block))
            continue
        where = (line, name, end_mark)
        if is_file:
            yield end, functools.partial(parse_part, position, end, *where)
        else:
            yield end, functools.partial(parse_text, block[:end], *where)
        position += end
        line += block.count(b"\n", 0, end)
        rest, size = block[end:], BLOCK_SIZE
    if block.strip():
        yield len(block), functools.partial(parse_text, block, line, name, end_mark)


def parse_part(
    offset: int, size: int, first_line: int, name: str, end_mark: str
) -> Iterator[Utterance]:
    """parse_text() of the `size` bytes at `offset` of the file `name`."""
    with open(name, "rb") as file:
        file.seek(offset)
        block = file.read(size)
    return parse_text(block, first_line, name, end_mark)


def parse_text(block: bytes, first_line: int, name: str, end_mark: str) -> Iterator[Utterance]:
    """Bytes of a text dump or archive, which start at line `first_line` of it -> utterances.

    Raises:
        UserError: they are not utterances.
    """
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n")
    if not block.endswith(b"\n"):
        block += b"\n"
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
            raise UserError(
                f"{where}: expected an utterance id alone on a line, found {quote(line)}"
            )
        if end_mark == "]" and words[1:] not in ([b"["], [b"[", b"]"]):
            raise UserError(f"{where}: expected an utterance id and '[', found {quote(line)}")
        utt_id = check_utt_id(words[0], where)
        end = END_OF_UTTERANCE[end_mark].search(block, start if end_mark == "]" else line_end)
        body = block[line_end + 1 : end.start() if end else -1]
        if end_mark == "]" and end:  # it may stand on a line of its own
            body = body.rstrip()
        try:
            frames = _parse_frames(body, utt_id, name, number + 1, end_mark, end is not None)
            utterance = Utterance(utt_id, frames, where)
        except BadUtterance as error:
            utterance = error
        yield utterance
        number += block.count(b"\n", start, end.end())
        start = end.end()


def _parse_frames(body, utt_id, name, first_line, end_mark, has_end):
    """The lines of an utterance's frames -> float32 (T, D)."""
    frames = _parse_fast(body) if has_end else None
    if frames is None or (end_mark == "." and frames.shape[1] < 2):
        frames = _parse_slowly(body, utt_id, name, first_line, end_mark, has_end)
    frames, bad = to_float32(frames)
    if bad is not None:
        row, column = bad
        word = body.split(b"\n")[row].split()[column]
        raise BadUtterance(
            f"{name}:{first_line + row}: utterance {utt_id}: expected finite float32 numbers, "
            f"found {quote(word)}"
        )
    refuse_cmvn_stats(frames, f"{name}:{first_line}: utterance {utt_id}")
    return frames


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


def refuse_cmvn_stats(frames: np.ndarray, where: str) -> None:
    """UserError for a matrix of CMVN statistics: sums and, last, a count; sums of squares and 0."""
    if len(frames) == 2 and frames[1, -1] == 0 and frames[0, -1] >= 1 and not frames[0, -1] % 1:
        raise UserError(
            f"{where}: expected frames, found CMVN statistics (of {frames[0, -1]:.0f} frames): "
            "give the features, feats.scp or .ark"
        )


def to_float32(frames: np.ndarray) -> tuple[np.ndarray, tuple | None]:
    """A matrix -> (the same in float32, the index of its first NaN or infinity, if any)."""
    with np.errstate(over="ignore", invalid="ignore"):
        frames = np.ascontiguousarray(frames, dtype=np.float32)
    finite = np.isfinite(frames)
    return frames, None if finite.all() else tuple(np.argwhere(~finite)[0])


def _parse_slowly(body, utt_id, name, first_line, end_mark, has_end):
    """Line by line with float(), for the message that says what is wrong, and where."""
    rows, lines = [], body.split(b"\n") if body.strip() else []
    for line_number, line in enumerate(lines, start=first_line):
        where = f"{name}:{line_number}: utterance {utt_id}"
        words = line.split()
        bad = next((word for word in words if not _is_number(word)), None)
        if bad is not None:
            expected = f"a frame or {end_mark!r}" if len(words) == 1 else "numbers"
            raise UserError(f"{where}: expected {expected}, found {quote(bad)}")
        if not rows and len(words) < 2 and end_mark == ".":
            raise UserError(
                f"{where}: expected a frame of two numbers or more (a single word on a line is an "
                f"utterance id), found {quote(line)}"
            )
        if rows and len(words) != len(rows[0]):
            raise UserError(
                f"{where}: expected {len(rows[0])} numbers, as in the first frame, found "
                f"{len(words)}"
            )
        rows.append([float(word) for word in words])
    where = f"{name}:{first_line + len(rows)}: utterance {utt_id}"
    if not has_end:
        raise UserError(
            f"{where}: expected {end_mark!r} at the end of the utterance, found the end of the "
            "file: is it truncated?"
        )
    if not rows or not rows[0]:
        raise BadUtterance(f"{where}: expected frames, found none before {end_mark!r}")
    return np.array(rows)


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return b"_" not in word  # 1_000 is Python's alone


def ark_jobs(stream: BinaryIO, name: str) -> Iterator[tuple]:
    """A binary archive -> (bytes, job of some utterances)."""
    job, size, position = [], 0, 0
    while head := stream.read(1):
        start = position
        while not head.endswith(b" ") and len(head) <= 256 and (byte := stream.read(1)):
            head += byte
        where = f"{name}: byte {start}"
        utt_id = check_utt_id(head[:-1], where)
        frames, num_bytes = read_matrix(stream, f"{where}: utterance {utt_id}")
        position += len(head) + num_bytes
        job.append((utt_id, frames, where, f"{where}: utterance {utt_id}"))
        size += len(head) + num_bytes
        if size >= BLOCK_SIZE:
            yield size, functools.partial(itertools.starmap, check_matrix, job)
            job, size = [], 0
    if job:
        yield size, functools.partial(itertools.starmap, check_matrix, job)


def check_matrix(
    utt_id: str, frames: np.ndarray, where: str, name: str
) -> Utterance | BadUtterance:
    """A binary archive's matrix -> the utterance; `name` is for messages."""
    if not frames.size:
        return BadUtterance(f"{name}: expected frames, found a matrix of shape {frames.shape}")
    frames, bad = to_float32(frames)
    if bad is not None:
        return BadUtterance(f"{name}: frame {bad[0]}: expected finite float32 numbers")
    refuse_cmvn_stats(frames, name)
    return Utterance(utt_id, frames, where)


def read_matrix(stream: BinaryIO, where: str) -> tuple[np.ndarray, int]:
    """Kaldi's binary matrix at a stream's position -> ((T, D), bytes read)."""
    from kaldiio.matio import read_matrix_or_vector

    # Only this part of kaldiio is safe with files from anywhere: others run pipes and pickles.
    head = stream.read(2)
    while len(head) < 6 and not head.endswith(b" ") and (byte := stream.read(1)):
        head += byte
    if head[:2] != b"\0B" or head[2:-1] not in MATRIX_TYPES:
        kinds = ", ".join(kind.decode() for kind in MATRIX_TYPES)
        raise UserError(f"{where}: expected a binary matrix ({kinds}), found {head!r}")
    try:
        matrix = _Rejoined(head, stream)
        with np.errstate(all="ignore"):  # a damaged header's numbers
            frames = read_matrix_or_vector(matrix)
    except (ValueError, AssertionError, struct.error, MemoryError, OverflowError, TypeError):
        raise UserError(f"{where}: the matrix is truncated or damaged") from None
    if frames.ndim != 2:
        raise UserError(f"{where}: expected frames, found a vector of {frames.size} numbers")
    return frames, matrix.count


def scp_jobs(stream: BinaryIO, name: str) -> Iterator[tuple]:
    """An .scp -> (bytes, job of some lines). Refuses pipes: they would run a command."""
    job, size = [], 0
    for number, line in enumerate(stream, start=1):
        size += len(line)
        where = f"{name}:{number}"
        words = line.split(maxsplit=1)
        if not words:
            continue
        utt_id = check_utt_id(words[0], where)
        target = os.fsdecode(words[1].strip()) if len(words) == 2 else ""
        if target.endswith("|") or target.startswith("|"):
            raise UserError(
                f"{where}: utterance {utt_id}: is a pipe, which would run a command, and is "
                "refused: write an archive with copy-feats and read that"
            )
        found = re.fullmatch(r"(.*?[^\]])(?::(\d{1,18}))?(?:\[(\d{1,9}):(\d{1,9})\])?", target)
        if not found or "\0" in target:
            raise UserError(
                f"{where}: utterance {utt_id}: expected FILE, FILE:OFFSET or, of some rows, "
                f"FILE:OFFSET[FIRST:LAST], found {quote(os.fsencode(target))}"
            )
        rows = found[3] and (int(found[3]), int(found[4]))
        job.append((utt_id, found[1], int(found[2] or 0), rows, where))
        if len(job) == 32:
            yield size, functools.partial(read_scp_lines, job)
            job, size = [], 0
    if job:
        yield size, functools.partial(read_scp_lines, job)


def read_scp_lines(lines: list[tuple]) -> Iterator[Utterance | BadUtterance]:
    """[(utterance id, file, offset, (first row, last row) or None, where)] -> utterances."""
    file, opened = None, None
    try:
        for utt_id, path, offset, rows, where in lines:
            name = f"{where}: utterance {utt_id}: {path!r}"
            if path != opened:
                if file:
                    file.close()
                try:
                    file, opened = open(path, "rb"), path  # noqa: SIM115
                except OSError as error:
                    raise UserError(
                        f"{name}: {error.strerror} (paths are relative to where you are)"
                    ) from None
            size = os.fstat(file.fileno()).st_size
            if offset >= size:
                raise UserError(f"{name}: offset {offset}, but the file has {size} bytes")
            file.seek(offset)
            name = f"{name}: byte {offset}"
            is_binary = file.read(2) == b"\0B"
            file.seek(offset)
            frames = read_matrix(file, name)[0] if is_binary else read_text_matrix(file, name)
            if rows:
                # Kaldi too allows for lengths that were rounded up.
                if not rows[0] <= rows[1] < len(frames) + 3 or rows[0] >= len(frames):
                    raise UserError(f"{name}: rows {rows[0]}:{rows[1]} of {len(frames)}")
                frames = frames[rows[0] : rows[1] + 1]
            yield check_matrix(utt_id, frames, where, name)
    finally:
        if file:
            file.close()


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
        raise UserError(f"{where}: expected rows of numbers, all of one length") from None


# Lists of Kaldi's ---------------------------------------------------------------------------------


def read_table(path: str | os.PathLike, *columns: str, maxsplit: int = -1) -> dict:
    """A table of Kaldi's, "key value ..." a line -> dict key -> (values, "file:line").

    Blank lines and a byte-order mark do no harm.

    Raises:
        UserError: a line of another number of columns; a key twice, with other values.
    """
    table = {}
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}:{number}"
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            # Utterance ids may be file names that are no text.
            words = os.fsdecode(line.strip()).split(maxsplit=maxsplit)
            if not words:
                continue
            if len(words) != len(columns):
                raise UserError(f"{where}: expected {' and '.join(columns)}, found {quote(line)}")
            key, *values = words
            before, where_before = table.setdefault(key, (values, where))
            if before != values:
                raise UserError(
                    f"{where}: {key} has {' '.join(values)!r} here, and {' '.join(before)!r} in "
                    f"{where_before}"
                )
    return table


def read_utt2spk(path: str | os.PathLike) -> dict[str, str]:
    """Kaldi's utt2spk, "utterance speaker" a line -> dict."""
    table = read_table(path, "an utterance", "a speaker")
    return {utt_id: speaker for utt_id, ((speaker,), _) in table.items()}


def read_data_dir(path: str) -> list[tuple]:
    """A data directory: wav.scp; segments, utt2spk, reco2file_and_channel where they are there.

    Returns:
        (utterance id, audio file, speaker or None, channel or None, start, end or None) of each
        utterance, sorted by id; times in seconds.

    Raises:
        UserError: by file and line, what is wrong; a pipe, which would run a command.
    """

    def read(name, *columns):
        file = os.path.join(path, name)
        return read_table(file, *columns) if os.path.exists(file) else {}

    files = read_table(os.path.join(path, "wav.scp"), "a recording", "its file", maxsplit=1)
    speakers = read("utt2spk", "an utterance", "a speaker")
    channels = read("reco2file_and_channel", "a recording", "a file", "a channel")
    segments = read("segments", "an utterance", "a recording", "its start", "its end") or {
        recording: ([recording, "0", "-1"], where) for recording, (_, where) in files.items()
    }
    rows = []
    for utt_id, ((recording, start, end), where) in sorted(segments.items()):
        check_utt_id(utt_id, where)
        if recording not in files:
            raise UserError(f"{where}: utterance {utt_id}: {recording} is not in wav.scp")
        (file,), where_file = files[recording]
        if file.endswith("|"):
            raise UserError(
                f"{where_file}: recording {recording}: is a pipe, which would run a command, and "
                "is refused: run it once, write what comes out to a file, and name that here"
            )
        try:
            start, end = float(start), float(end)
        except ValueError:
            start = end = math.nan
        if not (0 <= start < end < math.inf or 0 <= start < math.inf and end == -1):
            raise UserError(f"{where}: utterance {utt_id}: expected 0 <= start < end, in seconds")
        channel = None
        if recording in channels:
            (_, letter), where = channels[recording]
            if not re.fullmatch("[A-Za-z]", letter):
                raise UserError(f"{where}: expected a channel A, B, ..., found {quote(letter)}")
            channel = ord(letter.upper()) - ord("A")
        (speaker,), _ = speakers.get(utt_id, ((None,), None))
        rows.append((utt_id, file, speaker, channel, start, None if end == -1 else end))
    if not rows:
        raise UserError(f"{path}: no utterance in it")
    return rows
