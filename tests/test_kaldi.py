"""formats/kaldi.py: dumps, archives and lists give exact frames, or an error of one line."""

import contextlib
import gzip
import io
import lzma
import os
import pickle
import re
import sys
import threading
import time
from types import SimpleNamespace

import kaldiio
import numpy as np
import pytest
from conftest import Hostile

from formats import kaldi
from utils import UserError

# The same utterances in every format --------------------------------------------------------------


def exact(frames, width=5, seed=0):
    """Random multiples of 1/16: six digits, copy-feats' own, hold them exactly."""
    return np.random.default_rng(seed).integers(-128, 128, (frames, width)).astype(np.float32) / 16


def dump(utterances):
    return "".join(
        f"{utt}\n" + "".join(" ".join(map(repr, row)) + "\n" for row in frames.tolist()) + ".\n"
        for utt, frames in utterances.items()
    ).encode()


def copy_feats_text(utterances):
    """What `copy-feats ark:... ark,t:` writes, character by character."""
    return "".join(
        f"{utt}  [" + "".join("\n  " + "".join(f"{x:g} " for x in row) for row in frames) + "]\n"
        for utt, frames in utterances.items()
    ).encode()


def by_kaldiio(utterances, **kwargs):
    file = io.BytesIO()
    kaldiio.save_ark(file, utterances, **kwargs)
    return file.getvalue()


def doubles(utterances):
    return by_kaldiio({utt: frames.astype(np.float64) for utt, frames in utterances.items()})


FORMATS = {  # name: (what read_kaldi calls it, writer)
    "dump": ("text dump", dump),
    "copy-feats": ("text archive", copy_feats_text),
    "kaldiio-text": ("text archive", lambda utterances: by_kaldiio(utterances, text=True)),
    "float": ("binary archive", by_kaldiio),
    "double": ("binary archive", doubles),
}
COMPRESS = {  # in two streams each, as `cat a.gz b.gz` leaves them
    "": bytes,
    ".gz": lambda text: gzip.compress(text[:99]) + gzip.compress(text[99:]),
    ".xz": lambda text: lzma.compress(text[:99]) + lzma.compress(text[99:]),
}
UTTERANCES = {
    utt: exact(frames, seed=frames)
    for utt, frames in {"b-1": 7, "1089": 30, "grüße": 1, "a.b.c": 20, "sp1.1-x_y": 21}.items()
}
SMALL = {"utA": exact(3, 2, 1), "utB": exact(2, 2, 2), "utC": exact(4, 2, 3)}


def write(path, content):
    path.unlink(missing_ok=True)  # to write over a file takes ext4 twenty times as long
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(source):
    """Every utterance of a source: [(id, frames)]."""
    _, _, jobs = kaldi.read_kaldi(str(source))
    found = []
    for _, job in jobs:
        job = pickle.loads(pickle.dumps(job))  # as another process gets it
        for utt_id, _, read_frames in job():
            found.append((utt_id, np.concatenate([*read_frames()])))
    return found


def assert_same(found, utterances):
    assert [utt for utt, _ in found] == list(utterances)
    for utt, frames in found:
        assert frames.dtype == np.float32 and np.array_equal(frames, utterances[utt]), utt


def error_of(source):
    """The message of a source that is rejected: one line that names it, here without its folder."""
    with pytest.raises(UserError) as caught:
        read(source)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 600, message
    assert str(source) in message, message
    return message.replace(f"{source.parent}/", "")


# Good files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 333, kaldi.BLOCK_SIZE])
@pytest.mark.parametrize("extension", COMPRESS)
def test_every_format_holds_the_same_frames(tmp_path, monkeypatch, extension, block_size):
    """Whatever a file is called: its first bytes tell."""
    monkeypatch.setattr(kaldi, "BLOCK_SIZE", block_size)
    for kind, writer in FORMATS.values():
        source = write(tmp_path / "feats.txt", COMPRESS[extension](writer(UTTERANCES)))
        assert_same(read(source), UTTERANCES)
        found, size, jobs = kaldi.read_kaldi(str(source))
        positions = [position for position, _ in jobs]
        assert (found, size) == (kind, source.stat().st_size)
        assert positions == sorted(positions) and positions[-1] == size


def test_white_space_does_not_matter(tmp_path):
    expected = {"u1": np.float32([[1.5, 2], [3, 4]]), "u2": np.float32([[5, 6]])}
    for text in [
        "u1\n  1.5    2\n\t3\t\t4 \t\n.\nu2\n5\t6\n.\n",
        "u1\r\n1.5 2\r\n3 4\r\n.\r\nu2\r\n5 6\r\n.\r\n",
        "\n\nu1 \n1.5 2 \n3 4\n. \n\nu2\t\n5 6\n.\t\n",
        "u1\n1.5 2\n3 4\n.\nu2\n5 6\n.",
        "\ufeffu1\n1.5 2\n3 4\n.\nu2\n5 6\n.\n",  # a byte-order mark, as Windows' editors write
        "\ufeffu1 [\n1.5 2\n3 4 ]\nu2 [\n5 6 ]\n",
        "u1  [\n  1.5 2 \n  3 4 \n]\nu2  [\n  5 6\n ]\n",
        "u1 [ 1.5 2\n 3 4 ]\nu2 [ 5 6\n ]\n",
        "u1\t[ \r\n 1.5 2\r\n 3 4 ]\r\nu2 [\r\n 5 6 ]\r\n",
        "u1 [\n1.5\t2\n3  4 ] \n\nu2 [\n5 6]",
    ]:
        assert_same(read(write(tmp_path / "feats", text)), expected)


NUMBERS = [
    *["+1.5", "-0", ".5", "-.5", "5.", "+5.e0", "1E-3", "1e+05", "00012.50", "-1e-0", "1e-8"],
    *["1e-45", "1e-46", "1.1754943e-38", "1e-400", "3.4028235e38", "-3.40282356e+38", "0.1"],
    *["0.30000000000000004", "3.1415926535897931", "16777217", "9007199254740993"],
    *["18446744073709551615", "123456789012345678901234567890", "0." + "0" * 60 + "1"],
    # By way of a double this rounds down (twice to even); rounded straight to a float, up.
    "1.000000059604644775390625000001",
]


def test_two_frames_of_integers_are_frames(tmp_path):
    """Not CMVN statistics, which look like this: sums and a count, squares and a zero."""
    ((_, frames),) = read(write(tmp_path / "feats", "utA\n10 20 5\n30 40 0\n.\n"))
    assert frames.tolist() == [[10, 20, 5], [30, 40, 0]]


def test_numbers_are_exactly_pythons_floats(tmp_path):
    rng = np.random.default_rng(5)
    values = rng.normal(0, 1, 1000) * 10.0 ** rng.integers(-30, 30, 1000)
    random = [f"{v:.{p}g}" for v, p in zip(values, rng.integers(1, 21, 1000))]
    # A single odd one sends an utterance another way through the parser than none.
    for numbers in [NUMBERS, random, *([number] for number in NUMBERS)]:
        rows = "".join(f"{number} 0.25\n" for number in numbers)
        ((_, frames),) = read(write(tmp_path / "feats", f"utt\n{rows}.\n"))
        expected = np.array([np.float32(float(number)) for number in numbers])
        assert np.array_equal(frames[:, 0], expected) and np.all(frames[:, 1] == 0.25), numbers


def test_standard_input_however_slowly_it_comes(monkeypatch):
    """What comes first through a pipe may be a few bytes: too few to know the format from."""
    contents = [writer(UTTERANCES) for _, writer in FORMATS.values()]
    for content in [*contents, gzip.compress(contents[-1]), lzma.compress(contents[0])]:
        end, far_end = os.pipe()

        def feed(far_end=far_end, content=content):
            with contextlib.suppress(BrokenPipeError), os.fdopen(far_end, "wb", 0) as file:
                for part in (content[:1], content[1:3], content[3:5], content[5:]):
                    time.sleep(0.01)
                    file.write(part)

        feeder = threading.Thread(target=feed, daemon=True)
        with open(end, "rb") as file:
            monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
            feeder.start()
            assert_same(read("-"), UTTERANCES)


def test_scp(tmp_path, monkeypatch):
    """Two archives and files of one matrix, in no order, over several jobs."""
    utterances = {f"s{i % 3}-{i:03d}": exact(1 + i % 25, seed=i) for i in range(100)}
    ids, lines, folder = list(utterances), {}, tmp_path / "two words"
    folder.mkdir()
    for name, part in (("a.ark", ids[:50]), ("b:1.ark", ids[50:90])):
        scp = tmp_path / "part.scp"
        kaldiio.save_ark(str(folder / name), {utt: utterances[utt] for utt in part}, scp=str(scp))
        lines |= {line.split()[0]: line for line in scp.read_text().splitlines()}
    for utt in ids[90:]:
        kaldiio.save_mat(str(folder / f"{utt}.mat"), utterances[utt].astype(np.float64))
        lines[utt] = f"{utt} {folder}/{utt}.mat"
    np.random.default_rng(0).shuffle(ids)
    shuffled = {utt: utterances[utt] for utt in ids}
    text = "".join(lines[utt] + "\n" for utt in ids)
    assert_same(read(write(tmp_path / "feats.scp.xz", lzma.compress(text.encode()))), shuffled)
    monkeypatch.chdir(folder)  # as in Kaldi, a relative path starts where the program does
    assert_same(read(write(tmp_path / "r.scp", text.replace(f"{folder}/", ""))), shuffled)


@pytest.mark.parametrize("is_text", [False, True])
def test_rows_of_an_archive_in_an_scp(tmp_path, is_text):
    """As copy-feats reads them: both ends of a range are in it; it may end a little late."""
    frames, path, scp = exact(20), tmp_path / "a.ark", tmp_path / "feats.scp"
    kaldiio.save_ark(str(path), {"one": exact(4), "two": frames}, text=is_text)
    place = f"{path}:{path.read_bytes().index(b'two ') + 4}"
    for rows, expected in [
        ("", frames),
        ("[3:9]", frames[3:10]),
        ("[0:0]", frames[:1]),
        ("[5:22]", frames[5:]),
    ]:
        assert_same(read(write(scp, f"utt {place}{rows}\n")), {"utt": expected})
    for first, last in [(5, 23), (20, 20), (9, 3)]:
        message = error_of(write(scp, f"utX {place}[{first}:{last}]\n"))
        assert re.search(f"scp:1: utterance utX: .*rows {first} to {last}, found 20 rows", message)


def test_what_is_no_matrix_in_an_scp(tmp_path):
    text, scp = tmp_path / "text.ark", tmp_path / "feats.scp"
    write(scp, f"utX {text}\n")
    for content, reason in [
        ("x 1 2\n", "in brackets"),
        (" [\n" + "1 2\n" * 50000, "in brackets"),  # without its end
        (" [ 1 2\n 3 ]", "frame 1: expected 2 values"),
        (" [ 1 b ]", "expected numbers, found 'b'"),
    ]:
        write(text, content)
        message = error_of(scp)
        assert "utterance utX" in message and reason in message
    write(text, " [\n" + "1 2\n" * 50000 + "]\n")
    assert len(read(scp)[0][1]) == 50000


# Bad text -----------------------------------------------------------------------------------------

BAD_TEXT = [  # (dump or text archive, the line to blame, the utterance at fault or None)
    ("utA\n1 2 3\n1 2\n.\n", 3, "utA"),
    ("utA\n1 2 3\n.\nutB\n1 2 3\n1 2 3 4\n.\n", 6, "utB"),
    ("utA\n1 2\n[3 4]\n.\n", 3, "utA"),
    ("utA\n1,2\n3,4\n.\n", 2, "utA"),
    ("utA\n1 2\n\n1 2\n.\n", 3, "utA"),
    ("utA\n1 2\n.\nutB\n.\nutC\n1 2\n.\n", 5, "utB"),
    ("utA\n1 2\n.\nutB\n1 2\n3 4\n", 7, "utB"),
    ("utA\n1 2\n3 4\nutB\n1 2\n.\n", 4, "utA"),
    ("1 2\n3 4\n.\n", 1, None),
    ("utA\n1 2\n.\n.\n", 4, None),
    ("utA\n1 2\n.\nut B\n1 2\n.\n", 4, "ut B"),
    ("utA\n1 2\n.\nutB\n1 2\nutC\n1 2\n.\n", 6, "utB"),
    ("utA\n1 2\n.\n../utB\n1 2\n.\n", 4, "utB"),
    ("utA  [\n  1 2 \n  3 4 5 ]\n", 3, "utA"),
    ("utA [\n 1 2 ]\nutB [\n 1 2\n 3 4\n", 6, "utB"),
    ("utA [\n 1 2\n 3 4\nutB [\n 5 6 ]\n", 4, "utA"),
    ("utA [\n 1 ] 2\n 3 4 ]\n", 2, "utA"),
    ("utA [\n 1 2 ]\nutB\n 1 2 ]\n", 3, "utB"),
    ("utA [\n 1 2 ]\nutB [ ]\nutC [\n 1 2 ]\n", 3, "utB"),
    ("utA [\n 1 2 ]\n 3 4 ]\n", 3, None),
]
NO_NUMBERS = [
    *["abc", "1,5", "--1", "-", ".", "1e", "1d5", "0x10", "true", "null", '"1"', "{}", "[1]"],
    *["nan", "-Infinity", "1e39", "1e999"],  # the last are more than float32 holds
]


@pytest.mark.parametrize("block_size", [1 << 22, 5])
def test_bad_text_is_rejected_by_line_and_utterance(tmp_path, monkeypatch, block_size):
    monkeypatch.setattr(kaldi, "BLOCK_SIZE", block_size)
    rows = list(BAD_TEXT)
    for word in NO_NUMBERS:
        rows += [(f"utA\n1 2\n{word} 2\n.\n", 3, "utA")]
        rows += [(f"utA\n1 2\n3 4\n5 6\n.\n\nutB\n1 {word}\n.\n", 8, "utB")]
        rows += [(f"utA [\n 1 2\n 3 4 ]\n\nutB [\n {word} 2\n 1 2 ]\n", 6, "utB")]
    for text, line, utt in rows:
        message = error_of(write(tmp_path / "bad feats", text))
        blamed = re.match(r"bad feats:(\d+): ", message)
        assert blamed and int(blamed[1]) == line, (text, message)
        assert utt is None or re.search(rf"\b{utt}\b", message), (text, message)


def test_rubbish_is_rejected(tmp_path):
    contents = [b"", b"\n\n \n", b"a\n1 2\n1 2\0\n.\n", b"utt\xff\n1 2\n.\n", b"a" * 3_000_000]
    starts = [b"", b"utA ", b"utA \0B", b"utA \0BFM ", b"utA \0BCM ", b"utA [\n", b"utA\n", b"\n"]
    rng = np.random.default_rng(0)
    for content in [*contents, *(start + rng.bytes(3000) for start in starts)]:
        for name in ("feats.ark", "feats.scp"):
            error_of(write(tmp_path / name, content))
        if content.strip():
            error_of(write(tmp_path / "later.ark", by_kaldiio(SMALL) + content))


def test_utf_16_is_rejected_with_the_way_out(tmp_path):
    for name in ("feats.txt", "feats.scp"):
        source = write(tmp_path / name, "utA\n1 2\n.\n".encode("utf-16"))
        assert "UTF-16 text: convert it with: iconv" in error_of(source)
    path = write(tmp_path / "utt2spk", "utA a\n".encode("utf-16"))
    with pytest.raises(UserError, match="utt2spk: this is UTF-16 text: convert it with: iconv"):
        kaldi.read_utt2spk(path)


def test_damaged_compression_is_rejected(tmp_path):
    raw = dump({f"u{i}": exact(40, 10, i) for i in range(20)})
    for compress in (gzip.compress, lzma.compress):
        whole = compress(raw)
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0xFF
        contents = [whole[: len(whole) // 2], whole[:-3], whole[:9], bytes(flipped), compress(b"")]
        for content in [*contents, whole + whole[:-3]]:  # the last is cut in its second stream
            error_of(write(tmp_path / "feats", content))


# Bad archives -------------------------------------------------------------------------------------

SMALL_ARCHIVES = {
    "dump": dump(SMALL),
    "text": copy_feats_text(SMALL),
    "float": by_kaldiio(SMALL),
    "double": doubles(SMALL),
    **{f"CM{method}": by_kaldiio(SMALL, compression_method=method) for method in (2, 3, 5)},
}


@pytest.mark.parametrize("kind", SMALL_ARCHIVES)
def test_an_archive_that_was_cut(tmp_path, kind):
    """Between two utterances it is a shorter archive; at any other byte it is rejected. Whole it is
    what kaldiio reads."""
    whole, source, is_text = SMALL_ARCHIVES[kind], tmp_path / "cut", kind in ("dump", "text")
    truth = SMALL
    if not is_text:  # compression loses something
        write(source, whole)
        truth = {utt: np.float32(frames) for utt, frames in kaldiio.load_ark(str(source))}
    starts = [whole.index(utt.encode()) for utt in SMALL]
    ends = [*starts[1:], len(whole)]
    for size in sorted({*ends, *range(0, len(whole), 7)}):
        write(source, whole[:size])
        if size in ends or (is_text and size + 1 in ends):  # which lacks but the last line feed
            complete = sum(end <= size + is_text for end in ends)
            assert_same(read(source), dict(list(truth.items())[:complete]))
            continue
        message = error_of(source)
        utt, start = [pair for pair in zip(SMALL, starts) if pair[1] <= size][-1]
        if size > start + 8:
            assert re.match(rf"cut(:\d+)?: utterance {utt}: ", message), (size, message)


def test_archives_of_anything_but_matrices_are_rejected(tmp_path):
    marker, whole = tmp_path / "marker", by_kaldiio(SMALL)
    objects = np.array([[Hostile(marker)] * 2] * 3, dtype=object)
    for payload in [
        by_kaldiio({"utX": np.ones(8, "float32")}),
        *[by_kaldiio({"utX": x}, write_function="numpy") for x in (exact(4), objects)],
        by_kaldiio({"utX": Hostile(marker)}, write_function="pickle"),
        b"utX \0BDM " + 2 * b"\4\xff\xff\xff\x7f" + bytes(100),  # of 2^62 numbers
        by_kaldiio({"utX": (16000, np.arange(800, dtype=np.int16))}),
    ]:
        error_of(write(tmp_path / "first.ark", payload))
        later = write(tmp_path / "later.ark", whole + payload)
        assert "utX" in error_of(later)
        scp = write(tmp_path / "feats.scp", f"utX {later}:{len(whole) + 4}\n")
        assert "feats.scp:1: utterance utX" in error_of(scp)
        assert not marker.exists()


def test_bad_matrices_are_rejected(tmp_path):
    nan, ark, scp = exact(40), tmp_path / "feats.ark", tmp_path / "feats.scp"
    nan[35, 1] = np.nan
    for utt, matrix, reason in [
        ("utX", nan, "frame 35"),
        ("utX", np.full((2, 5), 1e39), "frame 0: .*float32"),
        ("utX", np.zeros((0, 5), np.float32), "shape"),
        ("../utX", exact(3), "file name"),
    ]:
        kaldiio.save_ark(str(ark), {"utA": exact(3), utt: matrix, "utZ": exact(4)}, scp=str(scp))
        assert re.match(rf"feats\.ark: utterance .*utX.*{reason}", error_of(ark))
        assert re.match(rf"feats\.scp:2: utterance .*utX.*{reason}", error_of(scp))


# Bad lists ----------------------------------------------------------------------------------------


@pytest.fixture
def archive(tmp_path):
    """-> (an archive of SMALL, the offset of utB's matrix)."""
    whole = by_kaldiio(SMALL)
    return write(tmp_path / "feats.ark", whole), whole.index(b"utB") + 4


def test_a_pipe_in_an_scp_never_runs(tmp_path, archive):
    marker, (ark, offset) = tmp_path / "marker", archive
    for target in ["touch {0} |", "touch {0}|", "| touch {0}", "$(touch {0})", "{1}; touch {0}"]:
        target = target.format(marker, ark)
        message = error_of(write(tmp_path / "f.scp", f"utA {ark}:{offset}\nutX {target}\n"))
        assert "f.scp:2: utterance utX: " in message, message
        assert "|" not in target or "pipes are not supported" in message
    with pytest.raises(FileNotFoundError):  # nor is one given as the source itself
        read(f"touch {marker} |")
    assert not marker.exists()


def test_bad_lines_of_an_scp(tmp_path, archive):
    (ark, offset), whole = archive, by_kaldiio(SMALL)
    offsets = [0, offset + 1, len(whole), 10**17, 10**30, -5, "", "x", "1.5", "0x10", "٣"]
    for bad in [
        *[f"utX {ark}:{bad}" for bad in offsets],
        *[f"utX {ark}:{offset}[0:1,0:1]", f"utX {ark}:{offset}[0:]", f"utX {ark}[0:1]"],
        *["utX", "utX ", f"utX {ark}", f"utX {tmp_path}", "utX gone.ark:15"],
        *["utX -", f"utX ark:{ark}", f"utX {ark}\0:15", "utX [0:1]", "utX :15"],
    ]:
        message = error_of(write(tmp_path / "f.scp", f"utA {ark}:{offset}\n{bad}\n"))
        assert "f.scp:2: utterance utX: " in message, message
        assert "gone" not in bad or ("gone.ark" in message and "relative" in message)
    for content in (b"", b"\n\n", by_kaldiio(SMALL), dump(SMALL)):
        error_of(write(tmp_path / "f.scp", content))


# utt2spk ------------------------------------------------------------------------------------------


def test_utt2spk(tmp_path):
    path = write(tmp_path / "utt2spk", b"\xef\xbb\xbf84-1 84\n\n\xe9-2\t spk\xe9\r\nu x\n84-1 84")
    speakers = {os.fsdecode(b"\xe9-2"): os.fsdecode(b"spk\xe9"), "84-1": "84", "u": "x"}
    assert kaldi.read_utt2spk(path) == speakers
    for content, reason in [
        (b"a\n", ":1: expected an utterance and a speaker, found 'a'"),
        (b"a x\nb x y\n", ":2: expected an utterance and a speaker, found 'b x y'"),
        (b"a 1\nb 2\na 2\n", r":3: a has '2' here, and '1' in \S*utt2spk:1"),
        (b"\n \n", ": this table is empty"),
    ]:
        with pytest.raises(UserError, match=f"utt2spk{reason}"):
            kaldi.read_utt2spk(write(path, content))


def test_utt2spk_holds_ids_with_accents_in_both_forms(tmp_path):
    """macOS decomposes file names; what people type is composed."""
    speakers = kaldi.read_utt2spk(write(tmp_path / "utt2spk", "cafe\u0301 a\n"))
    assert speakers["caf\u00e9"] == speakers["cafe\u0301"] == "a"
