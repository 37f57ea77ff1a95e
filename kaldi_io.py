"""Kaldi's features: files in, utterances (id, float32 (T, D)) out.

A source is a generator of jobs. A job is a callable that can be sent to another process; called, it
yields `Utterance`s. So the reading is serial and cheap, and the parsing is parallel.
"""

import functools
import gzip
import lzma
import os
import re
import sys
import warnings
import zlib
from typing import NamedTuple

import numpy as np

from utils import UserError

BLOCK_SIZE = 1 << 22  # bytes of text a job
MAX_UTTERANCE = 1 << 30  # bytes of text; what has no '.' line in this is no dump
END_OF_UTTERANCE = re.compile(rb"\n[ \t]*\.[ \t\r]*\n")


class Utterance(NamedTuple):
    utt_id: str
    frames: np.ndarray  # float32 (T, D)
    where: str  # for messages: "file:line"


def open_input(path):
    """Open a plain, .xz or .gz file or standard input (`-`) -> (raw, text) binary streams.

    The kind is told from the first bytes. `raw` counts the bytes on disk (`raw.tell()`, for a
    progress bar), `text` reads what is in them.
    """
    raw = sys.stdin.buffer if path == "-" else open(path, "rb")  # noqa: SIM115
    magic = raw.peek(6)
    if magic.startswith(b"\xfd7zXZ\0"):
        return raw, lzma.open(raw)
    if magic.startswith(b"\x1f\x8b"):
        return raw, gzip.open(raw)
    return raw, raw


def dump_blocks(stream, name):
    """Cut a text dump into blocks of whole utterances -> (number of the first line, bytes)."""
    line, rest = 1, b""
    size = BLOCK_SIZE
    while True:
        try:
            new = stream.read(size)
        except (EOFError, lzma.LZMAError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(
                f"{name}: the compressed file is truncated or damaged: {error}"
            ) from None
        if b"\0" in new:
            raise UserError(f"{name}: expected text, found binary data: this is no text dump")
        block = rest + new
        if not new:
            break
        end = block.rfind(b"\n.\n") + 3
        if end < 3:
            for match in END_OF_UTTERANCE.finditer(block):
                end = match.end()
        if end < 3:
            if len(block) > MAX_UTTERANCE:
                raise UserError(
                    f"{name}:{line}: expected a line '.' at the end of an utterance, found none in "
                    f"{MAX_UTTERANCE >> 20} MiB: is this a dump?"
                )
            # Twice as much each time: an utterance of many blocks is not searched many times.
            rest, size = block, max(BLOCK_SIZE, len(block))
            continue
        yield line, block[:end]
        line += block.count(b"\n", 0, end)
        rest, size = block[end:], BLOCK_SIZE
    if block.strip():
        yield line, block


def read_dump(path):
    """A text dump -> (size in bytes or None, generator of (bytes read, job)).

    The dump is the original release's: the utterance id on a line, a line of decimals a frame, and
    a line with a single '.' [README, "Data formats"].

    Raises (from the generator or a job): UserError naming file:line and utterance.
    """
    name = "standard input" if path == "-" else path
    raw, text = open_input(path)
    size = os.fstat(raw.fileno()).st_size if raw.seekable() else None

    def jobs():
        done = 0
        for line, block in dump_blocks(text, name):
            done = done + len(block) if size is None else raw.tell()
            yield done, functools.partial(parse_dump, block, line, name)
        if not done:
            raise UserError(f"{name}: expected utterances, found an empty file")

    return size, jobs()


def parse_dump(block, first_line, name):
    """Bytes of a text dump, which start at line `first_line` of it -> utterances.

    Raises:
        UserError: what stands there is no utterance.
    """
    lines = block.replace(b"\r\n", b"\n").split(b"\n")
    start = 0  # of the utterance
    while start < len(lines):
        where = f"{name}:{first_line + start}"
        words = lines[start].split()
        if not words:  # an empty line between utterances
            start += 1
            continue
        if len(words) > 1 or words == [b"."]:
            raise UserError(
                f"{where}: expected an utterance id alone on a line, found {_quote(lines[start])}"
            )
        utt_id = check_utt_id(words[0], where)
        end = start + 1
        while end < len(lines) and lines[end].strip() != b".":
            end += 1
        frames = _parse_frames(
            lines[start + 1 : end], utt_id, name, first_line + start + 1, end < len(lines)
        )
        yield Utterance(utt_id, frames, where)
        start = end + 1


def _parse_frames(lines, utt_id, name, first_line, has_end):
    """The lines of an utterance's frames -> float32 (T, D)."""
    frames = None
    if lines and has_end:
        try:
            # loadtxt's parser gives float()'s values, at several times its speed.
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # of lines without numbers
                frames = np.loadtxt(lines, np.float64, comments=None, ndmin=2, encoding="latin1")
        except (ValueError, UserWarning):
            frames = None
    if frames is None or frames.shape[0] != len(lines) or frames.shape[1] < 2:
        frames = _parse_slowly(lines, utt_id, name, first_line, has_end)
    with np.errstate(over="ignore"):
        frames = frames.astype(np.float32)
    finite = np.isfinite(frames)
    if not finite.all():
        row, column = np.argwhere(~finite)[0]
        found = _quote(lines[row].split()[column])
        raise UserError(
            f"{name}:{first_line + row}: utterance {utt_id}: expected finite float32 numbers, "
            f"found {found}"
        )
    return frames


def _parse_slowly(lines, utt_id, name, first_line, has_end):
    """Line by line with float(), for the message that says what is wrong, and where."""
    rows = []
    for line_number, line in enumerate(lines, start=first_line):
        where = f"{name}:{line_number}: utterance {utt_id}"
        words = line.split()
        width = len(rows[0]) if rows else None
        if not has_end and line_number == first_line + len(lines) - 1 and not words:
            break  # what follows the last line break of a file
        try:
            row = [float(word) for word in words]
        except ValueError:
            if len(words) == 1:
                raise UserError(
                    f"{where}: expected a frame or the '.' that ends the utterance, found "
                    f"{_quote(line)}"
                ) from None
            bad = next(word for word in words if not _is_number(word))
            raise UserError(f"{where}: expected numbers, found {_quote(bad)}") from None
        if width is None and len(row) < 2:
            raise UserError(
                f"{where}: expected a frame of two numbers or more (a single word on a line is an "
                f"utterance id), found {_quote(line)}"
            )
        if width is not None and len(row) != width:
            raise UserError(
                f"{where}: expected {width} numbers, as in the frame before, found {len(row)}"
            )
        rows.append(row)
    where = f"{name}:{first_line + len(rows)}: utterance {utt_id}"
    if not has_end:
        raise UserError(
            f"{where}: expected a '.' that ends the utterance, found the end of the file: "
            "is the file truncated?"
        )
    if not rows:
        raise UserError(f"{where}: expected frames, found none before the '.'")
    return np.array(rows)


def _is_number(word):
    try:
        float(word)
    except ValueError:
        return False
    return True


def _quote(text):
    """Bytes of a file for a one-line message: short and printable."""
    text = text.strip().decode("utf-8", "replace")
    return repr(text if len(text) <= 40 else text[:40] + "...")


def check_utt_id(utt_id, where):
    """An id becomes a file name: UserError, naming `where`, if it would be a bad one.

    Takes str or UTF-8 bytes, returns str.
    """
    try:
        utt_id = utt_id if isinstance(utt_id, str) else utt_id.decode("utf-8")
    except UnicodeDecodeError:
        raise UserError(
            f"{where}: expected an utterance id in UTF-8, found {_quote(utt_id)}"
        ) from None
    if utt_id.startswith(".") or re.search(r"[/\\\0-\x1f]", utt_id) or len(utt_id.encode()) > 240:
        raise UserError(
            f"{where}: utterance id {_quote(utt_id.encode())} cannot be a file name: expected at "
            "most 240 bytes, no '/' or '\\', no '.' in front"
        )
    return utt_id
