"""prepare_data.py: a dump becomes the original's folder exactly, and bad input becomes one line."""

import contextlib
import gzip
import io
import lzma
import os
import pickle
import pickletools
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script

import prepare_data

SCRIPT = ROOT / "prepare_data.py"


# ------------------------------------------------------------------------------ helpers


def dump_text(utterances):
    """{id: rows of decimals as text} -> the dump format's text."""
    return "".join(
        f"{utt}\n" + "".join(" ".join(row) + "\n" for row in rows) + ".\n"
        for utt, rows in utterances.items()
    )


def python_values(rows):
    """The truth for rows of decimals: each one through Python's float(), then to float32."""
    return np.array([[np.float32(float(text)) for text in row] for row in rows], dtype=np.float32)


def random_rows(frames, width, seed=0):
    rng = np.random.default_rng(seed)
    return [[f"{value:.5g}" for value in row] for row in rng.normal(0, 3, (frames, width))]


def padded(values, max_seq_len):
    out = np.zeros((max_seq_len, values.shape[1]), dtype=np.float32)
    out[: len(values)] = values[:max_seq_len]
    return out


def pt_files(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".pt"))


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_as_original(folder):
    """The original's LibriSpeech class, said again: a listing, a pickle, a torch.load an item."""
    ids = [name for name in os.listdir(folder) if name.endswith(".pt")]
    with open(os.path.join(folder, "lengths.pkl"), "rb") as file:
        lengths = pickle.load(file)
    items = {}
    for name in ids:
        items[name] = torch.load(os.path.join(folder, name)), lengths[name]
    return items


def assert_holds(folder, utterances, max_seq_len):
    """The folder holds exactly these utterances ({id: float32 values}) and no other file."""
    items = read_as_original(folder)
    assert sorted(items) == sorted(f"{utt}.pt" for utt in utterances)
    for utt, values in utterances.items():
        tensor, length = items[f"{utt}.pt"]
        assert length == min(len(values), max_seq_len)
        assert tensor.dtype == torch.float32
        assert np.array_equal(tensor.numpy(), padded(values, max_seq_len))
    others = {name for name in os.listdir(folder) if not name.endswith(".pt")}
    assert others <= {"lengths.pkl", "prepared.json"}, f"left behind: {others}"


@pytest.fixture
def prepare(call_main):
    """Run prepare_data.py's main in this process as the script would: (status, stderr)."""

    def call(source, save_dir, *options, max_seq_len=20, num_workers=1):
        argv = ["--librispeech_from_kaldi", source, "--save_dir", save_dir]
        argv += ["--max_seq_len", max_seq_len, "--num_workers", num_workers, *options]
        done = call_main(prepare_data, *argv)
        return done.returncode, done.stderr

    return call


def prepare_process(source, save_dir, *options, max_seq_len=20, num_workers=1, **kw):
    argv = ["--librispeech_from_kaldi", source, "--save_dir", save_dir]
    argv += ["--max_seq_len", max_seq_len, "--num_workers", num_workers, *options]
    return run_script("prepare_data.py", *argv, **kw)


def error_line(stderr, parser=False):
    """The one line that a failed run ends with; fails where it is more than one, or a traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    assert lines and lines[-1].startswith("prepare_data.py: error: "), stderr
    assert parser or sum("rror:" in line for line in lines) == 1, stderr
    message = lines[-1].removeprefix("prepare_data.py: error: ")
    assert message.strip()
    return message


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


GOOD = {"utt-1": random_rows(7, 4, 1), "utt-2": random_rows(30, 4, 2), "u3": random_rows(1, 4, 3)}
GOOD_VALUES = {utt: python_values(rows) for utt, rows in GOOD.items()}


@pytest.fixture
def good_dump(tmp_path):
    return write(tmp_path / "good.txt", dump_text(GOOD))


# ------------------------------------------------------------------------------ good dumps


def test_folder_has_the_original_layout(tmp_path, prepare, good_dump):
    folder = tmp_path / "new" / "train"
    status, stderr = prepare(good_dump, folder)
    assert status == 0, stderr
    assert_holds(folder, GOOD_VALUES, 20)

    for utt in GOOD:
        file = folder / f"{utt}.pt"
        tensor = torch.load(file, weights_only=True)
        assert type(tensor) is torch.Tensor
        assert tensor.shape == (20, 4)
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == 20 * 4 * 4
        assert not tensor.requires_grad
        assert file.stat().st_size < 20 * 4 * 4 + 4096

    raw = (folder / "lengths.pkl").read_bytes()
    lengths = pickle.loads(raw)
    assert type(lengths) is dict
    assert lengths == {"utt-1.pt": 7, "utt-2.pt": 20, "u3.pt": 1}
    assert all(type(name) is str and type(length) is int for name, length in lengths.items())
    # The original ran on Pythons that know no pickle protocol above 4.
    assert max(arg for op, arg, _ in pickletools.genops(raw) if op.name == "PROTO") <= 4


ODD_NUMBERS = [
    *["+1.5", "-0", "0", ".5", "-.5", "5.", "+5.e0", "1e3", "1E-3", "1e+05", "00012.50", "-1e-0"],
    *["1e-45", "1e-46", "-1e-50", "1.1754943e-38", "1e-400", "3.4028235e38", "-3.40282356e+38"],
    *["0.1", "0.30000000000000004", "3.1415926535897931", "-2.7182818284590452", "1e-8"],
    *["16777217", "16777219", "123456789012345678901234567890", "0." + "0" * 60 + "1"],
    # By way of a double this rounds down (twice to even); rounded straight to a float, up.
    *["1.000000059604644775390625000001", "1.00000017881393432617187499999999"],
    *["0." + "123456789" * 30, "7.006492321624085e-46", "7.006492321624086e-46"],
]


def test_every_spelling_of_a_number_is_pythons_float_to_the_bit(tmp_path, prepare):
    rows = [[text, "0.25"] for text in ODD_NUMBERS]
    source = write(tmp_path / "odd.txt", dump_text({"odd": rows}))
    status, stderr = prepare(source, tmp_path / "out", max_seq_len=len(rows))
    assert status == 0, stderr
    tensor = torch.load(tmp_path / "out" / "odd.pt", weights_only=True)
    got, want = tensor.numpy().view(np.uint32), python_values(rows).view(np.uint32)
    wrong = [text for text, a, b in zip(ODD_NUMBERS, got, want, strict=True) if a[0] != b[0]]
    assert not wrong
    assert np.array_equal(got, want)


def test_integers_are_pythons_floats_to_the_bit(tmp_path, prepare):
    """Also where nothing else in the utterance is out of the ordinary: zeros keep their sign."""
    rows = [
        ["-0", "7"],
        ["-0\t", "7"],
        ["0", "-0"],
        ["-12", "9007199254740993"],
        ["18446744073709551615", "-0"],
    ]
    source = write(tmp_path / "whole.txt", dump_text({"whole": rows}))
    status, stderr = prepare(source, tmp_path / "out", max_seq_len=len(rows))
    assert status == 0, stderr
    tensor = torch.load(tmp_path / "out" / "whole.pt", weights_only=True)
    assert np.array_equal(tensor.numpy().view(np.uint32), python_values(rows).view(np.uint32))


def test_random_decimals_of_every_length(tmp_path, prepare):
    rng = np.random.default_rng(5)
    values = rng.normal(0, 1, 4000) * 10.0 ** rng.integers(-30, 30, 4000)
    text = [f"{v:.{p}g}" for v, p in zip(values, rng.integers(1, 21, 4000), strict=True)]
    rows = [text[i : i + 40] for i in range(0, len(text), 40)]
    source = write(tmp_path / "random.txt", dump_text({"random": rows}))
    status, stderr = prepare(source, tmp_path / "out", max_seq_len=100)
    assert status == 0, stderr
    tensor = torch.load(tmp_path / "out" / "random.pt", weights_only=True)
    assert np.array_equal(tensor.numpy(), python_values(rows))


@pytest.mark.parametrize(
    "text",
    [
        "u1\n 1.5 2\n3 4\n.\nu2\n5 6\n.\n",
        "u1\n1.5 2 \n3 4   \n.\nu2\n5 6 \n.\n",
        "u1\n  1.5    2\n\t3\t\t4 \t\n.\nu2\n5\t6\n.\n",
        "u1\r\n1.5 2\r\n3 4\r\n.\r\nu2\r\n5 6\r\n.\r\n",
        "u1 \n1.5 2\n3 4\n. \nu2\t\n5 6\n.\t\n",
        "\n\nu1\n1.5 2\n3 4\n.\n\nu2\n5 6\n.\n",
        "u1\n1.5 2\n3 4\n.\nu2\n5 6\n.",  # no line feed at the end
    ],
    ids=["leading", "trailing", "many", "crlf", "after-id-and-dot", "empty", "no-last-newline"],
)
def test_white_space_does_not_matter(tmp_path, prepare, text):
    status, stderr = prepare(write(tmp_path / "d.txt", text), tmp_path / "out", max_seq_len=5)
    assert status == 0, stderr
    values = {"u1": np.float32([[1.5, 2], [3, 4]]), "u2": np.float32([[5, 6]])}
    assert_holds(tmp_path / "out", values, 5)


@pytest.mark.parametrize("utt", ["103-1240-0000", "1089", "a.b.c", "sp1.1-x_y", "grüße"])
def test_ids_are_kept_as_they_are(tmp_path, prepare, utt):
    source = write(tmp_path / "d.txt", dump_text({utt: [["1", "2"]]}))
    status, stderr = prepare(source, tmp_path / "out", max_seq_len=3)
    assert status == 0, stderr
    assert_holds(tmp_path / "out", {utt: np.float32([[1, 2]])}, 3)


@pytest.mark.parametrize("frames", [1, 9, 10, 11, 400])
def test_padding_and_truncation(tmp_path, prepare, frames):
    rows = random_rows(frames, 3)
    source = write(tmp_path / "d.txt", dump_text({"u": rows}))
    assert prepare(source, tmp_path / "out", max_seq_len=10)[0] == 0
    assert_holds(tmp_path / "out", {"u": python_values(rows)}, 10)


def test_compressed_and_piped_dumps_equal_the_plain_one(tmp_path, prepare, good_dump):
    raw = good_dump.read_bytes()
    half = raw.index(b".\n") + 2
    sources = {
        "xz": write(tmp_path / "d.xz", lzma.compress(raw)),
        "gz": write(tmp_path / "d.gz", gzip.compress(raw)),
        # What `cat a.gz b.gz` leaves.
        "xz2": write(tmp_path / "e.xz", lzma.compress(raw[:half]) + lzma.compress(raw[half:])),
        "gz2": write(tmp_path / "e.gz", gzip.compress(raw[:half]) + gzip.compress(raw[half:])),
    }
    for name, source in sources.items():
        status, stderr = prepare(source, tmp_path / name)
        assert status == 0, (name, stderr)
        assert_holds(tmp_path / name, GOOD_VALUES, 20)

    done = prepare_process("-", tmp_path / "stdin", num_workers=3, input=raw.decode())
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "stdin", GOOD_VALUES, 20)


@pytest.fixture(scope="module")
def large_dump(tmp_path_factory):
    """About 6 MB of 700 short utterances, and what they should become."""
    rng = np.random.default_rng(11)
    rows = random_rows(200, 40, 12)
    lines, values = [" ".join(row) + "\n" for row in rows], python_values(rows)
    text, truth = io.StringIO(), {}
    for number in range(700):
        picks = rng.integers(0, len(rows), int(rng.integers(1, 60)))
        text.write(f"spk{number % 7}-{number:04d}\n")
        text.writelines(lines[i] for i in picks)
        text.write(".\n")
        truth[f"spk{number % 7}-{number:04d}"] = values[picks]
    path = write(tmp_path_factory.mktemp("large") / "large.txt", text.getvalue())
    assert path.stat().st_size > 4e6
    return path, truth


def test_many_utterances_with_one_worker_and_with_three(tmp_path, prepare, large_dump):
    source, truth = large_dump
    assert prepare(source, tmp_path / "one", max_seq_len=30)[0] == 0
    done = prepare_process(source, tmp_path / "three", max_seq_len=30, num_workers=3)
    assert done.returncode == 0, done.stderr
    assert_holds(tmp_path / "one", truth, 30)
    assert_holds(tmp_path / "three", truth, 30)
    # In the dump's order whoever was done first, so that a training run can be repeated.
    for name in ("one", "three"):
        assert list(pickle.loads((tmp_path / name / "lengths.pkl").read_bytes())) == [
            f"{utt}.pt" for utt in truth
        ]


def test_an_utterance_larger_than_any_read_block(tmp_path, prepare):
    rng = np.random.default_rng(13)
    rows = random_rows(100, 80, 14)
    picks = rng.integers(0, 100, 30000)
    lines, values = [" ".join(row) + "\n" for row in rows], python_values(rows)
    text = "long\n" + "".join(lines[i] for i in picks) + ".\nnext\n" + lines[3] + ".\n"
    assert len(text) > 16e6
    source = write(tmp_path / "d.txt", text)
    status, stderr = prepare(source, tmp_path / "out", max_seq_len=30000)
    assert status == 0, stderr
    assert_holds(tmp_path / "out", {"long": values[picks], "next": values[3:4]}, 30000)


# ------------------------------------------------------------------------------ bad dumps

# name: (dump, the lines that may be blamed, the utterance at fault or None)
BAD_TEXT = {
    "ragged-short": ("utA\n1 2 3\n1 2\n.\n", [3], "utA"),
    "ragged-long": ("utA\n1 2 3\n.\nutB\n1 2 3\n1 2 3 4\n.\n", [6], "utB"),
    "ragged-past-max_seq_len": ("utA\n" + "1 2\n" * 25 + "1 2 3\n.\n", [27], "utA"),
    "width-changes": ("utA\n1 2 3\n.\nutB\n1 2\n1 2\n.\n", [4, 5], "utB"),
    "ragged-balanced": ("utA\n1 2 3\n1 2\n1 2 3 4\n.\n", [3], "utA"),
    "brackets": ("utA\n1 2\n[3 4]\n.\n", [3], "utA"),
    "commas": ("utA\n1,2\n3,4\n.\n", [2], "utA"),
    "underscore": ("utA\n1 2\n1 1_0\n.\n", [3], "utA"),
    "word": ("utA\n1 2\n1 abc\n.\n", [3], "utA"),
    "two-points": ("utA\n1 1.2.3\n.\n", [2], "utA"),
    "comma": ("utA\n1 1,5\n.\n", [2], "utA"),
    "two-signs": ("utA\n1 2\n.\nutB\n--1 2\n.\n", [5], "utB"),
    "sign-alone": ("utA\n1 -\n.\n", [2], "utA"),
    "point-alone": ("utA\n1 2\n1 .\n.\n", [3], "utA"),
    "bare-exponent": ("utA\n1 1e\n.\n", [2], "utA"),
    "exponent-alone": ("utA\n1 e5\n.\n", [2], "utA"),
    "fortran-exponent": ("utA\n1 1d5\n.\n", [2], "utA"),
    "c-suffix": ("utA\n1 1.5f\n.\n", [2], "utA"),
    "hexadecimal": ("utA\n1 0x1p3\n.\n", [2], "utA"),
    "inner-sign": ("utA\n1 1-2\n.\n", [2], "utA"),
    "not-a-number-past-max_seq_len": ("utA\n" + "1 2\n" * 25 + "1 x\n.\n", [27], "utA"),
    "empty-line": ("utA\n1 2\n\n1 2\n.\n", [3], "utA"),
    "nan": ("utA\n1 2\n1 nan\n.\n", [3], "utA"),
    "minus-nan": ("utA\n1 2\n1 -NaN\n.\n", [3], "utA"),
    "inf": ("utA\n1 2\n.\nutB\ninf 2\n.\n", [5], "utB"),
    "minus-infinity": ("utA\n1 2\n1 -Infinity\n.\n", [3], "utA"),
    "beyond-float32": ("utA\n1 2\n1 1e39\n.\n", [3], "utA"),
    "just-beyond-float32": ("utA\n1 2\n-3.4028236e38 1\n.\n", [3], "utA"),
    "beyond-double": ("utA\n1 2\n1 1e999\n.\n", [3], "utA"),
    "nan-past-max_seq_len": ("utA\n" + "1 2\n" * 25 + "1 nan\n.\n", [27], "utA"),
    "no-frames": ("utA\n1 2\n.\nutB\n.\nutC\n1 2\n.\n", [4, 5], "utB"),
    "no-frames-at-all": ("utA\n.\n", [1, 2], "utA"),
    "no-last-dot": ("utA\n1 2\n.\nutB\n1 2\n3 4\n", [4, 6, 7], "utB"),
    "id-and-no-more": ("utA\n1 2\n.\nutB\n", [4, 5], "utB"),
    "no-inner-dot": ("utA\n1 2\n3 4\nutB\n1 2\n.\n", [4], "utA"),
    "frames-before-any-id": ("1 2\n3 4\n.\n", [1], None),
    "frames-after-a-dot": ("utA\n1 2\n.\n3 4\n.\n", [4], None),
    "dot-before-any-id": (".\nutA\n1 2\n.\n", [1], None),
    "two-dots": ("utA\n1 2\n.\n.\n", [4], None),
    "repeated-id": ("utA\n1 2\n.\nutB\n1 2\n.\nutA\n3 4\n.\n", [7], "utA"),
    "repeated-at-once": ("utA\n1 2\n.\nutA\n1 2\n.\n", [4], "utA"),
    "id-in-a-folder": ("good\n1 2\n.\nsub/utt\n1 2\n.\n", [4], "sub/utt"),
    "id-absolute": ("/no-such-folder/utt\n1 2\n.\n", [1], "/no-such-folder/utt"),
    "id-above": ("../utt\n1 2\n.\n", [1], "../utt"),
    "id-dots": ("..\n1 2\n.\n", [1], ".."),
    "id-too-long": ("utA\n1 2\n.\n" + "x" * 300 + "\n1 2\n.\n", [4], "xxx"),
    # A row of one number cannot be told from an id.
    "one-mel-bin": ("utA\n1.5\n2.5\n.\n", [2], "utA"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_dump_is_refused_by_file_line_and_utterance(tmp_path, prepare, name):
    text, lines, utt = BAD_TEXT[name]
    source, folder = write(tmp_path / "bad dump.txt", text), tmp_path / "out"
    status, stderr = prepare(source, folder)
    assert status not in (0, None), "accepted"
    message = error_line(stderr)
    blamed = re.search(r"bad dump\.txt:(\d+)\b", message)
    assert blamed, message
    assert int(blamed[1]) in lines, message
    if utt is not None:
        # Outside the file's own name.
        assert re.search(rf"(?<!\w){re.escape(utt)}", message.replace(str(source), "")), message
    assert len(message) < 600
    assert not (folder / "lengths.pkl").exists()
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*utt*")]
    assert not left, "an id left the save folder"


BINARY = {
    "empty": b"",
    "random": np.random.default_rng(0).bytes(5000),
    "nul-in-id": b"a\x00b\n1 2\n.\n",
    "nul-in-row": b"a\n1 2\n1 2\x00\n.\n",
    "not-utf8": b"utt\xff\xfe\n1 2\n.\n",
    # Truncated, too: a header of 3 x 2 floats, then 2.
    "kaldi-binary-ark": b"utt1 \0BFM \x04\x03\0\0\0\x04\x02\0\0\0" + b"\0\0\x80?" * 2,
    "one-endless-line": b"a" * 3_000_000,
    "xz-named-txt": lzma.compress(dump_text(GOOD).encode())[:-4],
}


@pytest.mark.parametrize("name", BINARY)
def test_empty_and_binary_files_are_refused(tmp_path, prepare, name):
    source, folder = write(tmp_path / "strange.txt", BINARY[name]), tmp_path / "out"
    status, stderr = prepare(source, folder)
    assert status not in (0, None), "accepted"
    message = error_line(stderr)
    assert "strange.txt" in message
    assert len(message) < 600, "binary rubbish belongs on no console"
    assert message.isprintable()
    assert not (folder / "lengths.pkl").exists()


def compressed_damage():
    raw = dump_text({f"u{i}": random_rows(40, 10, i) for i in range(20)}).encode()
    for ending, whole in (("xz", lzma.compress(raw)), ("gz", gzip.compress(raw))):
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 0xFF
        yield pytest.param(f"d.{ending}", whole[: len(whole) // 2], id=f"{ending}-half")
        yield pytest.param(f"d.{ending}", whole[:-3], id=f"{ending}-no-end")
        yield pytest.param(f"d.{ending}", whole[:5], id=f"{ending}-header")
        yield pytest.param(f"d.{ending}", bytes(flipped), id=f"{ending}-flipped")
        yield pytest.param(f"d.{ending}", b"", id=f"{ending}-nothing")
        second = bytes(whole[:9]) + b"?" + bytes(whole[10:])  # a damaged header
        yield pytest.param(f"d.{ending}", whole + second, id=f"{ending}-second-stream")
        yield pytest.param(f"d.{ending}", whole + b"more", id=f"{ending}-and-more")
        nothing = {"xz": lzma, "gz": gzip}[ending].compress(b"")
        yield pytest.param(f"d.{ending}", nothing, id=f"{ending}-of-nothing")


@pytest.mark.parametrize("name, content", list(compressed_damage()))
def test_damaged_compressed_files_are_refused(tmp_path, prepare, name, content):
    status, stderr = prepare(write(tmp_path / name, content), tmp_path / "out")
    assert status not in (0, None), "accepted"
    assert name in error_line(stderr)
    assert not (tmp_path / "out" / "lengths.pkl").exists()


def test_missing_file_and_directory_as_source(tmp_path, prepare):
    (tmp_path / "folder").mkdir()
    for name in ("missing.txt", "missing.xz", "missing.gz", "folder", "no/such/dump.txt"):
        status, stderr = prepare(tmp_path / name, tmp_path / "out")
        assert status not in (0, None)
        assert name in error_line(stderr)
        assert not (tmp_path / "out" / "lengths.pkl").exists()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_faults_far_into_a_large_dump_get_their_line(tmp_path, prepare, large_dump, num_workers):
    source, truth = large_dump
    raw = source.read_bytes()
    end = raw.count(b"\n")
    first = next(iter(truth))
    row = b" ".join([b"1"] * 40) + b"\n"
    faults = {
        "width": (b"late\n" + b" ".join([b"1"] * 41) + b"\n.\n", (end + 1, end + 2), "late"),
        "repeated": (first.encode() + b"\n" + row + b".\n", (end + 1,), first),
        "word": (b"late\n" + row * 3 + row[:-2] + b"x\n" + row + b".\n", (end + 5,), "late"),
        "no-dot": (b"late\n" + row * 5, (end + 1, end + 6, end + 7), "late"),
    }
    if num_workers == 3:  # one in a process of its own is enough
        faults = {"word": faults["word"]}
    for name, (tail, lines, utt) in faults.items():
        bad, folder = write(tmp_path / f"{name}.txt", raw + tail), tmp_path / name
        if num_workers == 1:
            status, stderr = prepare(bad, folder)
        else:
            done = prepare_process(bad, folder, num_workers=num_workers)
            status, stderr = done.returncode, done.stderr
        assert status not in (0, None), "accepted"
        message = error_line(stderr)
        blamed = re.search(rf"{name}\.txt:(\d+)\b", message)
        assert blamed and int(blamed[1]) in lines, message
        assert utt in message
        assert not (folder / "lengths.pkl").exists()


def test_a_bad_pipe_as_a_real_process(tmp_path):
    folder = tmp_path / "out"
    done = prepare_process("-", folder, num_workers=2, input="utA\n1 2\n1 x\n.\n")
    assert done.returncode not in (0, None)
    message = error_line(done.stderr)
    assert re.search(r"(stdin\S*|standard input|-):3\b", message), message
    assert "utA" in message
    assert not (folder / "lengths.pkl").exists()


# ------------------------------------------------------------------------------ flags, folders


@pytest.mark.parametrize(
    "options",
    [
        {"max_seq_len": 0},
        {"max_seq_len": -1},
        {"max_seq_len": "many"},
        {"num_workers": 0},
        {"num_workers": -3},
    ],
    ids=str,
)
def test_impossible_numbers_are_refused_by_the_parser(tmp_path, prepare, good_dump, options):
    status, stderr = prepare(good_dump, tmp_path / "out", **options)
    assert status == 2
    assert f"--{next(iter(options))}" in error_line(stderr, parser=True)
    assert not (tmp_path / "out").exists()


def test_save_dir_that_cannot_be_one(tmp_path, prepare, good_dump):
    occupied = write(tmp_path / "occupied", "not a folder")
    for folder in (occupied, occupied / "below"):
        status, stderr = prepare(good_dump, folder)
        assert status not in (0, None)
        assert "occupied" in error_line(stderr)
    assert occupied.read_text() == "not a folder"


def test_finished_folder_is_not_overwritten_unasked(tmp_path, prepare, good_dump):
    folder = tmp_path / "out"
    assert prepare(good_dump, folder)[0] == 0
    before = contents(folder)
    other = write(tmp_path / "other.txt", dump_text({"new": [["1", "2"]]}))
    status, stderr = prepare(other, folder)
    assert status not in (0, None)
    message = error_line(stderr)
    assert str(folder) in message
    assert "--overwrite" in message
    assert contents(folder) == before


def test_overwrite_replaces_the_whole_set(tmp_path, prepare, good_dump):
    folder = tmp_path / "out"
    assert prepare(good_dump, folder)[0] == 0
    other = {"utt-1": [["1", "2"]], "new": [["3", "4"]] * 3}
    source = write(tmp_path / "other.txt", dump_text(other))
    status, stderr = prepare(source, folder, "--overwrite", max_seq_len=9)
    assert status == 0, stderr
    assert_holds(folder, {utt: python_values(rows) for utt, rows in other.items()}, 9)


@pytest.mark.parametrize("bad", ["missing.txt", "folder", "empty.txt"])
def test_overwrite_from_nothing_leaves_the_old_set(tmp_path, prepare, good_dump, bad):
    folder = tmp_path / "out"
    (tmp_path / "folder").mkdir()
    write(tmp_path / "empty.txt", "")
    assert prepare(good_dump, folder)[0] == 0
    before = contents(folder)
    status, stderr = prepare(tmp_path / bad, folder, "--overwrite")
    assert status not in (0, None)
    assert bad in error_line(stderr)
    if bad != "empty.txt":  # that one could be opened
        assert contents(folder) == before
    else:
        assert contents(folder) == before or not (folder / "lengths.pkl").exists()


def test_overwrite_that_fails_midway_never_looks_finished(tmp_path, prepare, good_dump):
    folder = tmp_path / "out"
    assert prepare(good_dump, folder)[0] == 0
    before = contents(folder)
    bad = write(tmp_path / "bad.txt", "utt-1\n9 9\n.\nx\n1 2\n.\ny\n1 nan\n.\n")
    status, stderr = prepare(bad, folder, "--overwrite")
    assert status not in (0, None)
    error_line(stderr)
    # Either the old set stands untouched or nothing claims to be a set; never a mixture.
    assert contents(folder) == before or not (folder / "lengths.pkl").exists()
    assert prepare(good_dump, folder, "--overwrite")[0] == 0
    assert_holds(folder, GOOD_VALUES, 20)


def test_a_good_run_after_a_failed_one_leaves_the_good_set_alone(tmp_path, prepare, good_dump):
    folder = tmp_path / "out"
    rows = "1 2 3 4\n"
    bad = "".join(f"stale-{i}\n{rows}.\n" for i in range(50)) + f"stale-x\n{rows}"
    status, stderr = prepare(write(tmp_path / "bad.txt", bad), folder)
    assert status not in (0, None)
    error_line(stderr)
    status, stderr = prepare(good_dump, folder)  # nothing finished there: no --overwrite needed
    assert status == 0, stderr
    assert_holds(folder, GOOD_VALUES, 20)


def test_other_files_of_the_user_survive(tmp_path, prepare, good_dump):
    folder = tmp_path / "out"
    folder.mkdir()
    write(folder / "notes.txt", "mine")
    assert prepare(good_dump, folder)[0] == 0
    assert prepare(good_dump, folder, "--overwrite")[0] == 0
    assert (folder / "notes.txt").read_text() == "mine"


def test_sigkill_leaves_nothing_that_looks_finished(tmp_path, prepare, good_dump):
    folder = tmp_path / "out"
    argv = ["--librispeech_from_kaldi", "-", "--save_dir", folder, "--max_seq_len", 50]
    run = subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, argv), "--num_workers", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    stop = threading.Event()
    rows = (" ".join(["1.25"] * 4) + "\n") * 2000

    def feed():
        number = 0
        with contextlib.suppress(BrokenPipeError):
            while not stop.is_set():
                run.stdin.write(f"killed-{number}\n{rows}.\n".encode())
                number += 1

    feeder = threading.Thread(target=feed, daemon=True)
    try:
        feeder.start()
        deadline = time.monotonic() + 60
        while not (folder.is_dir() and len(pt_files(folder)) >= 5):
            assert run.poll() is None, "ended by itself"
            assert time.monotonic() < deadline, "wrote nothing"
            time.sleep(0.005)
        os.kill(run.pid, signal.SIGKILL)
        run.wait(10)
    finally:
        stop.set()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)  # workers, too
        run.wait(10)
        feeder.join(10)
    assert not (folder / "lengths.pkl").exists()
    for name in pt_files(folder):
        tensor = torch.load(folder / name, weights_only=True)
        assert tensor.shape == (50, 4)
        assert bool((tensor == 1.25).all())
    assert prepare(good_dump, folder)[0] == 0
    items = read_as_original(folder)
    assert sorted(items) == sorted(f"{utt}.pt" for utt in GOOD)
