"""prepare_data.py from archives and audio: one folder whatever the source, and after any kill."""

import contextlib
import gc
import gzip
import io
import json
import lzma
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import kaldi_native_fbank
import kaldiio
import numpy as np
import pytest
import soundfile
import torch
from conftest import ONE_THREAD, ROOT, make_folder, run_script
from test_audio import reference_fbank

import checkpoint
import extract_features
import kaldi_io
import prepare_data
import utils
from apc_model import APCModel
from utils import RNNConfig, UserError

SCRIPT = str(ROOT / "prepare_data.py")
RATE = 16000
MAX_SEQ_LEN = 20


# ------------------------------------------------------------------------------ helpers


@pytest.fixture
def prepare(monkeypatch, call_main):
    """Run prepare_data.py in this process as the script would."""
    # What they are for, a crash of the machine, cannot be tested here; they wait for every disk.
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def call(source, save_dir, *options, max_seq_len=MAX_SEQ_LEN, num_workers=1):
        argv = arguments(source, save_dir, *options, max_seq_len=max_seq_len)
        done = call_main(prepare_data, *argv, "--num_workers", num_workers)
        return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)

    return call


def arguments(source, save_dir, *options, max_seq_len=MAX_SEQ_LEN):
    """A folder is a source of audio, anything else one of Kaldi features."""
    kind = "audio" if os.path.isdir(source) else "kaldi"
    argv = [f"--librispeech_from_{kind}", source, "--save_dir", save_dir]
    return [str(a) for a in [*argv, "--max_seq_len", max_seq_len, *options]]


@pytest.fixture
def refused(tmp_path, prepare):
    """Run on a source that must be refused; give the message: one line, without a path to it."""

    def call(source, *options, name=None, save_dir=tmp_path / "refused", **kw):
        done = prepare(source, save_dir, *options, **kw)
        assert done.status == 1, f"accepted: {done.err}"
        message = error_line(done.err)
        assert (name or os.path.basename(source)) in message
        assert not (save_dir / "lengths.pkl").exists()
        return message

    return call


def error_line(stderr):
    """The one line that a failed run ends with; fails where it is more than one, or a traceback."""
    assert "Traceback" not in stderr
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    assert lines and lines[-1].startswith("prepare_data.py: error: "), stderr
    assert sum("rror:" in line for line in lines) == 1, stderr
    message = lines[-1].removeprefix("prepare_data.py: error: ")
    assert len(message) < 600 and message.isprintable()
    return message


def contents(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def read_folder(folder, *others):
    """A finished folder -> {utterance id: (tensor as an array, length)}, in lengths.pkl's order.

    There is nothing else in it but prepared.json and `others`.
    """
    folder = Path(folder)
    lengths = pickle.loads((folder / "lengths.pkl").read_bytes())
    assert sorted(os.listdir(folder)) == sorted([*lengths, "lengths.pkl", "prepared.json", *others])
    found = {}
    for name, length in lengths.items():
        tensor = torch.load(folder / name, weights_only=True)
        assert tensor.dtype == torch.float32 and type(length) is int
        found[name.removesuffix(".pt")] = tensor.numpy(), length
    return found


def assert_holds(folder, utterances, max_seq_len=MAX_SEQ_LEN, order=True, atol=0.0, others=()):
    """The folder holds these utterances ({id: frames}) cut and padded, and no other file."""
    found = read_folder(folder, *others)
    assert (list(found) if order else sorted(found)) == (
        list(utterances) if order else sorted(utterances)
    )
    for utt_id, frames in utterances.items():
        tensor, length = found[utt_id]
        expected = np.zeros((max_seq_len, frames.shape[1]), np.float32)
        expected[: len(frames)] = frames[:max_seq_len]
        assert length == min(len(frames), max_seq_len)
        assert tensor.shape == expected.shape
        if atol:
            np.testing.assert_allclose(tensor, expected, rtol=0, atol=atol, err_msg=utt_id)
            assert not tensor[length:].any(), "the padding must be zeros"
        else:
            assert np.array_equal(tensor, expected), utt_id


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# ------------------------------------------------------------------------------ the same features


def exact(frames, width=5, seed=0):
    """Random multiples of 1/16: six digits, copy-feats' own, hold them exactly."""
    return np.random.default_rng(seed).integers(-128, 128, (frames, width)).astype(np.float32) / 16


UTTERANCES = {
    f"{speaker}-{number}": exact(frames, seed=number)
    for number, (speaker, frames) in enumerate(
        [("b", 7), ("a", 30), ("b", 1), ("grüße", 20), ("a", 21), ("c.d_e", 19)]
    )
}


def dump(utterances):
    return "".join(
        f"{utt}\n" + "".join(" ".join(map(repr, row)) + "\n" for row in frames.tolist()) + ".\n"
        for utt, frames in utterances.items()
    ).encode()


def copy_feats_text(utterances):
    """What `copy-feats ark:… ark,t:` writes, character by character."""
    return "".join(
        f"{utt}  [" + "".join("\n  " + "".join(f"{x:g} " for x in row) for row in frames) + "]\n"
        for utt, frames in utterances.items()
    ).encode()


def by_kaldiio(utterances, **kwargs):
    file = io.BytesIO()
    kaldiio.save_ark(file, utterances, **kwargs)
    return file.getvalue()


def doubles(utterances):
    return {utt: frames.astype(np.float64) for utt, frames in utterances.items()}


FORMATS = {
    "dump": dump,
    "copy-feats": copy_feats_text,
    "kaldiio-text": lambda utterances: by_kaldiio(utterances, text=True),
    "float": by_kaldiio,
    "double": lambda utterances: by_kaldiio(doubles(utterances)),
}


@pytest.mark.parametrize("ending", ["", ".gz", ".xz"])
@pytest.mark.parametrize("kind", FORMATS)
def test_features_in_any_format_give_the_same_folder(tmp_path, prepare, kind, ending):
    compress = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress}[ending]
    content = compress(FORMATS[kind](UTTERANCES))
    # Whatever its name: first bytes tell, and only .scp means something.
    for number, name in enumerate(["feats.ark", "feats.txt", "feats"]):
        done = prepare(write(tmp_path / f"{name}{ending}", content), tmp_path / str(number))
        assert done.status == 0, done.err
        assert_holds(tmp_path / str(number), UTTERANCES)
    # In the bytes of every file, too.
    assert prepare(write(tmp_path / "plain", dump(UTTERANCES)), tmp_path / "dump").status == 0
    ours, theirs = contents(tmp_path / "0"), contents(tmp_path / "dump")
    del ours["prepared.json"], theirs["prepared.json"]
    assert ours == theirs


@pytest.mark.parametrize("block_size", [1, 50, 333])
@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_of_any_size(tmp_path, prepare, monkeypatch, kind, block_size):
    monkeypatch.setattr(kaldi_io, "BLOCK_SIZE", block_size)
    done = prepare(write(tmp_path / "feats", FORMATS[kind](UTTERANCES)), tmp_path / "out")
    assert done.status == 0, done.err
    assert_holds(tmp_path / "out", UTTERANCES)


@pytest.mark.parametrize(
    "text",
    [
        "u1 [\n1.5 2\n3 4 ]\nu2 [\n5 6 ]\n",
        "u1  [\n  1.5 2 \n  3 4 \n]\nu2  [\n  5 6\n ]\n",
        "u1\t[ \r\n 1.5 2\r\n 3 4 ]\r\nu2 [\r\n 5 6 ]\r\n",
        "u1 [\n1.5\t2\n3  4 ] \n\nu2 [\n5 6]",
    ],
    ids=["plain", "bracket-alone", "crlf", "loose"],
)
def test_other_layouts_of_a_text_archive(tmp_path, prepare, text):
    done = prepare(write(tmp_path / "t.ark", text), tmp_path / "out")
    assert done.status == 0, done.err
    assert_holds(tmp_path / "out", {"u1": np.float32([[1.5, 2], [3, 4]]), "u2": [[5, 6]] @ EYE})


EYE = np.eye(2, dtype=np.float32)


def compressible(method):
    """Two utterances; methods 4, 6 and 7 fix the range of the values."""
    low, high = {4: (-32000, 32000), 6: (0, 255), 7: (0, 1)}.get(method, (-9, 9))
    rng = np.random.default_rng(method)
    lengths = {"a-long": 33, "b-short": 5, "c-long": 12}
    return {u: rng.uniform(low, high, (n, 6)).astype(np.float32) for u, n in lengths.items()}


@pytest.mark.parametrize("method", range(1, 8))
def test_compressed_archives_are_what_kaldiio_reads(tmp_path, prepare, method):
    ark, scp = str(tmp_path / "c.ark"), str(tmp_path / "c.scp")
    kaldiio.save_ark(ark, compressible(method), scp=scp, compression_method=method)
    truth = {utt: np.float32(frames) for utt, frames in kaldiio.load_ark(ark)}
    assert {utt: len(frames) for utt, frames in truth.items()} == {
        utt: len(frames) for utt, frames in compressible(method).items()
    }
    for source in (ark, scp):
        done = prepare(source, tmp_path / source[-3:])
        assert done.status == 0, done.err
        assert_holds(tmp_path / source[-3:], truth)


def test_scp(tmp_path, prepare, monkeypatch):
    """Two archives and files of one matrix, in no order, over several of the reader's jobs."""
    utterances = {f"s{i % 3}-{i:03d}": exact(1 + i % 25, seed=i) for i in range(100)}
    ids = list(utterances)
    lines = {}
    folder = tmp_path / "two words"
    folder.mkdir()
    for name, part in (("a.ark", ids[:50]), ("b:1.ark", ids[50:90])):
        scp = str(tmp_path / "part.scp")
        kaldiio.save_ark(str(folder / name), {utt: utterances[utt] for utt in part}, scp=scp)
        lines |= {line.split()[0]: line for line in Path(scp).read_text().splitlines()}
    for utt in ids[90:]:
        kaldiio.save_mat(str(folder / f"{utt}.mat"), utterances[utt].astype(np.float64))
        lines[utt] = f"{utt} {folder}/{utt}.mat"
    np.random.default_rng(0).shuffle(ids)
    scp = write(tmp_path / "feats.scp", "".join(lines[utt] + "\n" for utt in ids))
    for num_workers in (1, 2):
        out = tmp_path / str(num_workers)
        done = prepare(scp, out, num_workers=num_workers)
        assert done.status == 0, done.err
        assert_holds(out, {utt: utterances[utt] for utt in ids})
    # As in Kaldi, a relative path starts where the program does.
    monkeypatch.chdir(folder)
    text = "".join(lines[utt].replace(f"{folder}/", "") + "\n" for utt in ids)
    assert prepare(write(scp, text), tmp_path / "relative").status == 0
    assert_holds(tmp_path / "relative", {utt: utterances[utt] for utt in ids})


def test_standard_input(tmp_path):
    argv = [sys.executable, SCRIPT, *arguments("-", tmp_path / "out"), "--num_workers", "1"]
    env = {**os.environ, **ONE_THREAD}
    # Large enough to come in several parts.
    utterances = {f"u-{i}": exact(200, 40, seed=i) for i in range(10)}
    done = subprocess.run(
        argv, input=by_kaldiio(utterances), capture_output=True, env=env, timeout=60
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"Warning" not in done.stderr, done.stderr.decode()
    assert_holds(tmp_path / "out", utterances)


@pytest.mark.parametrize("kind", [*FORMATS, "float.gz", "dump.xz"])
def test_a_slow_pipe(tmp_path, prepare, monkeypatch, kind):
    """What comes first through a pipe may be a few bytes: too few to know the kind from."""
    content = FORMATS[kind.split(".")[0]](UTTERANCES)
    if "." in kind:
        content = {"gz": gzip, "xz": lzma}[kind[-2:]].compress(content)
    end, far_end = os.pipe()

    def feed():
        with contextlib.suppress(BrokenPipeError), os.fdopen(far_end, "wb", buffering=0) as file:
            for part in (content[:1], content[1:3], content[3:5], content[5:]):
                time.sleep(0.02)
                file.write(part)

    feeder = threading.Thread(target=feed, daemon=True)
    with open(end, "rb") as file:
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=file))
        feeder.start()
        done = prepare("-", tmp_path / "out")
    feeder.join(10)
    assert done.status == 0, done.err
    assert_holds(tmp_path / "out", UTTERANCES)


# ------------------------------------------------------------------------------ bad archives


def run_all(path):
    """Every utterance of a source: [(id, frames)]."""
    _, _, jobs = kaldi_io.read_kaldi(str(path))
    return [(utt.utt_id, utt.frames) for _, job in jobs for utt in job()]


SMALL = {"utA": exact(3, 2, 1), "utB": exact(2, 2, 2), "utC": exact(4, 2, 3)}
SMALL_KINDS = {
    "float": lambda: by_kaldiio(SMALL),
    "double": lambda: by_kaldiio(doubles(SMALL)),
    **{
        f"CM{'' if method == 2 else method}": lambda method=method: by_kaldiio(
            SMALL, compression_method=method
        )
        for method in (2, 3, 5)
    },
    "text": lambda: copy_feats_text(SMALL),
    "dump": lambda: dump(SMALL),
}


@pytest.mark.parametrize("kind", SMALL_KINDS)
def test_an_archive_cut_anywhere(tmp_path, kind):
    """Between two utterances it is a shorter archive; at any other byte it is refused."""
    whole = SMALL_KINDS[kind]()
    truth = run_all(write(tmp_path / "whole", whole))
    starts = [whole.index(utt.encode()) for utt in SMALL]
    for size in range(len(whole)):
        source = write(tmp_path / "cut", whole[:size])
        if size in starts[1:]:
            found = run_all(source)
            assert len(found) == starts.index(size)
            for (utt, frames), (true_utt, true_frames) in zip(found, truth):
                assert utt == true_utt and np.array_equal(frames, true_frames)
        elif kind in ("text", "dump") and size + 1 in [*starts[1:], len(whole)]:
            assert len(run_all(source)) >= 1  # a last line without its end
        else:
            with pytest.raises(UserError, match=r"/cut\b") as caught:
                run_all(source)
            message = str(caught.value)
            assert "\n" not in message and len(message) < 500
            utt = [utt for utt, start in zip(SMALL, starts) if start <= size][-1]
            if size > whole.index(utt.encode()) + 8 and len(starts) > 1:
                assert utt in message, (size, message)


def test_cut_archives_by_the_script(tmp_path, refused, prepare):
    whole = by_kaldiio(SMALL)
    second, third = whole.index(b"utB"), whole.index(b"utC")
    for size in [0, 2, 5, 9, 14, second - 1, second + 1, second + 6, third - 3, len(whole) - 1]:
        message = refused(write(tmp_path / "cut.ark", whole[:size]))
        if second + 4 <= size < third:
            assert "utB" in message
    done = prepare(write(tmp_path / "cut.ark", whole[:third]), tmp_path / "out")
    assert done.status == 0, done.err
    assert_holds(tmp_path / "out", {utt: SMALL[utt] for utt in ("utA", "utB")})


@pytest.mark.parametrize("kind", ["float", "double", "CM", "CM3", "CM5"])
def test_every_damaged_byte_of_a_header(tmp_path, kind):
    """A UserError or frames (nobody can tell every damage), and never anything else."""
    whole = SMALL_KINDS[kind]()
    start = whole.index(b"utB")
    end = start + len("utB \0BCM3 ") + 16
    for position in range(start, end):
        for value in (0, 1, 4, 32, 66, 127, 128, 255, whole[position] + 1 & 255):
            damaged = bytearray(whole)
            damaged[position] = value
            try:
                found = run_all(write(tmp_path / "d.ark", bytes(damaged)))
            except UserError as error:
                assert "d.ark" in str(error) and "\n" not in str(error)
            else:
                assert all(f.ndim == 2 and f.size and np.isfinite(f).all() for _, f in found)


@pytest.mark.parametrize("method", [2, 3, 5])
def test_bytes_named_in_a_compressed_archive_are_right(tmp_path, refused, method):
    whole = by_kaldiio(SMALL, compression_method=method)
    start = whole.index(b"utC")
    message = refused(write(tmp_path / "c.ark", whole[:-1]))
    assert "utC" in message and re.search(rf"byte {start}\b", message), (start, message)


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def foreign_payloads(marker):
    audio = (RATE, np.arange(800, dtype=np.int16))
    return {
        "float-vector": by_kaldiio({"utX": np.ones(8, np.float32)}),
        "double-vector": by_kaldiio({"utX": np.ones(8)}),
        "int-vector": by_kaldiio({"utX": np.ones(8, np.int32)}),
        "numpy": by_kaldiio({"utX": exact(4)}, write_function="numpy"),
        "numpy-of-objects": by_kaldiio(
            {"utX": np.array([[Code(marker)] * 2] * 3, dtype=object)}, write_function="numpy"
        ),
        "pickle": by_kaldiio({"utX": exact(4)}, write_function="pickle"),
        "pickle-with-code": by_kaldiio({"utX": Code(marker)}, write_function="pickle"),
        "text-pickle": b"utX PKLcos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.",
        "audio": by_kaldiio({"utX": audio}, write_function="soundfile"),
        "flac": by_kaldiio(
            {"utX": audio}, write_function="soundfile", write_kwargs={"format": "flac"}
        ),
        "wav": by_kaldiio({"utX": audio}),
    }


@pytest.mark.parametrize("kind", list(foreign_payloads("")))
def test_archives_of_anything_but_matrices_are_refused(tmp_path, refused, kind):
    marker = tmp_path / "marker"
    payload = foreign_payloads(marker)[kind]
    refused(write(tmp_path / "first.ark", payload))
    whole = by_kaldiio(SMALL)
    assert "utX" in refused(write(tmp_path / "later.ark", whole + payload))
    scp = write(tmp_path / "feats.scp", f"utX {tmp_path}/later.ark:{len(whole) + 4}\n")
    assert "feats.scp:1: utterance utX" in refused(scp)
    assert not marker.exists()


def bad_matrices():
    nan, infinite, late = exact(3), exact(3).astype(np.float64), exact(40)
    nan[1, 2], infinite[2, 0], late[35, 1] = np.nan, -np.inf, np.nan
    return {
        "nan": (nan, "frame 1"),
        "infinity": (infinite, "frame 2"),
        "nan-beyond-max_seq_len": (late, "frame 35"),
        "beyond-float32": (np.full((2, 5), 1e39), "finite"),
        "no-frames": (np.zeros((0, 5), np.float32), "shape"),
        "no-columns": (np.zeros((5, 0), np.float32), "shape"),
        "nothing": (np.zeros((0, 0)), "shape"),
        "other-width": (exact(3, 6), "6"),
    }


@pytest.mark.parametrize("kind", bad_matrices())
def test_bad_matrices_are_refused(tmp_path, refused, kind):
    matrix, reason = bad_matrices()[kind]
    ark, scp = str(tmp_path / "feats.ark"), str(tmp_path / "feats.scp")
    kaldiio.save_ark(ark, {"utA": exact(3), "utX": matrix, "utZ": exact(4)}, scp=scp)
    for options in ([], ["--cmvn", "speaker"]):
        message = refused(ark, *options)
        assert "utX" in message and reason in message, message
        message = refused(scp, *options)
        assert "feats.scp:2: utterance utX" in message and reason in message, message


@pytest.mark.parametrize("utt", ["../utt", "..", ".", ".utt", "sub/utt", "/tmp/utt", "x" * 300])
def test_ids_that_would_leave_the_folder_are_refused(tmp_path, refused, utt):
    (tmp_path / "sub").mkdir()
    ark, scp = str(tmp_path / "feats.ark"), str(tmp_path / "feats.scp")
    kaldiio.save_ark(ark, {"good": exact(3), utt: exact(3)}, scp=scp)
    before = sorted(path for path in tmp_path.rglob("*") if "refused" not in path.parts)
    assert utt[:40] in refused(ark).replace(ark, "")
    message = refused(scp)
    assert "feats.scp:2:" in message and utt[:40] in message.replace(scp, "")
    text = write(tmp_path / "text.ark", copy_feats_text({"good": exact(3), utt: exact(3)}))
    assert "text.ark:5:" in refused(text)
    text.unlink()
    after = sorted(path for path in tmp_path.rglob("*") if "refused" not in path.parts)
    assert after == before


@pytest.mark.parametrize("utt", ["a\u2028b", "a\x85b", "a\x7fb", "a\u202eb"])
def test_ids_that_no_console_can_show_are_refused(tmp_path, refused, utt):
    """Line breaks of Unicode among them, which would cut a message in two."""
    for kind in (dump, copy_feats_text, by_kaldiio):
        message = refused(write(tmp_path / "feats", kind({"good": exact(3), utt: exact(3)})))
        assert re.search(r"feats:(5|6| byte \d+)\b", message), message


def test_repeated_ids_are_refused(tmp_path, refused):
    whole = by_kaldiio(SMALL)
    again = by_kaldiio({"utB": exact(1, 2)})
    ark = write(tmp_path / "feats.ark", whole + again)
    assert "utB" in refused(ark) and f"byte {len(whole)}" in refused(ark)
    offset = whole.index(b"utB") + 4
    scp = write(tmp_path / "feats.scp", f"utB {ark}:{offset}\nutB {ark}:{offset}\n")
    assert "feats.scp:2: utterance utB" in refused(scp)
    assert "utB" in refused(ark, "--cmvn", "utterance")


BAD_TEXT = {  # name: (text archive, the lines that may be blamed, utterance)
    "ragged": ("utA  [\n  1 2 \n  3 4 5 ]\n", [3], "utA"),
    "ragged-short": ("utA [\n 1 2 ]\nutB  [\n  1 2 \n  3 \n  4 5 ]\n", [5], "utB"),
    "width-changes": ("utA [\n 1 2 ]\nutB [\n 1 2 3 ]\n", [3, 4], "utB"),
    "no-bracket-at-end": ("utA [\n 1 2 ]\nutB [\n 1 2\n 3 4\n", [3, 5, 6], "utB"),
    "only-an-opening": ("utA [\n 1 2 ]\nutB [", [3, 4], "utB"),
    "no-inner-bracket": ("utA [\n 1 2\n 3 4\nutB [\n 5 6 ]\n", [4], "utA"),
    "word": ("utA [\n 1 2\n 1 x ]\n", [3], "utA"),
    "word-on-the-last-line": ("utA [\n 1 2 ]\nutB [\n 1 2\n 1 2.2.2 ]\n", [5], "utB"),
    "number-with-comma": ("utA [\n 1,5 2 ]\n", [2], "utA"),
    "hexadecimal": ("utA [\n 1 0x10 ]\n", [2], "utA"),
    "bracket-within": ("utA [\n 1 ] 2\n 3 4 ]\n", [2], "utA"),
    "two-utterances-on-a-line": ("utA [\n 1 2 ] utB [\n 3 4 ]\n", [2], "utA"),
    "nan": ("utA [\n 1 2\n nan 2 ]\n", [3], "utA"),
    "infinity": ("utA [\n 1 2 ]\nutB [\n 1 2\n 1 -inf ]\n", [5], "utB"),
    "beyond-float32": ("utA [\n 1 1e39 ]\n", [2], "utA"),
    "empty-line": ("utA [\n 1 2\n\n 3 4 ]\n", [3], "utA"),
    "vector": ("utA  [ 1 2 3 ]\n", [1], "utA"),
    "vector-later": ("utA [\n 1 2 ]\nutB  [ 1 2 ]\n", [3], "utB"),
    "no-bracket-after-id": ("utA [\n 1 2 ]\nutB\n 1 2 ]\n", [3], "utB"),
    "no-frames": ("utA [\n 1 2 ]\nutB [ ]\nutC [\n 1 2 ]\n", [3, 4], "utB"),
    "no-frames-on-a-line": ("utA [\n 1 2 ]\nutB [\n]\n", [3, 4], "utB"),
    "frames-without-id": ("utA [\n 1 2 ]\n 3 4 ]\n", [3], None),
    "repeated": ("utA [\n 1 2 ]\nutB [\n 1 2 ]\nutA [\n 1 2 ]\n", [5], "utA"),
    "dump-after-it": ("utA [\n 1 2 ]\nutB\n1 2\n.\n", [3], "utB"),
}


@pytest.mark.parametrize("block_size", [1 << 22, 5])
@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_text_archives(tmp_path, refused, monkeypatch, name, block_size):
    monkeypatch.setattr(kaldi_io, "BLOCK_SIZE", block_size)
    text, lines, utt = BAD_TEXT[name]
    message = refused(write(tmp_path / "bad.ark", text))
    blamed = re.search(r"bad\.ark:(\d+)\b", message)
    assert blamed and int(blamed[1]) in lines, message
    assert utt is None or re.search(rf"\b{utt}\b", message), message


@pytest.mark.parametrize("seed", range(8))
def test_random_bytes_are_refused(tmp_path, refused, seed):
    rubbish = np.random.default_rng(seed).bytes(3000)
    starts = [b"", b"utA ", b"utA \0B", b"utA \0BFM ", b"utA \0BCM ", b"utA [\n", b"utA\n", b"\n"]
    for name in ("feats.ark", "feats.scp", "feats"):
        refused(write(tmp_path / name, starts[seed] + rubbish))
    refused(write(tmp_path / "later.ark", by_kaldiio(SMALL) + starts[seed] + rubbish))


@pytest.mark.parametrize("size", [2**31 - 1, -1, -2, 70000, 1 << 20])
@pytest.mark.parametrize("kind", [b"FM", b"DM", b"CM", b"CM2", b"CM3"])
def test_sizes_that_cannot_be(tmp_path, refused, kind, size):
    size = int(size).to_bytes(4, "little", signed=True)
    if kind.startswith(b"C"):
        head = kind + b" " + np.float32([0, 1]).tobytes() + size + size
    else:
        head = kind + b" \4" + size + b"\4" + size
    message = refused(write(tmp_path / "d.ark", b"utA \0B" + head + bytes(100)))
    assert "utA" in message


# ------------------------------------------------------------------------------ bad .scp


def one_ark(tmp_path):
    """feats.ark -> (its path, the offset of utB's matrix, its size)."""
    whole = by_kaldiio(SMALL)
    return write(tmp_path / "feats.ark", whole), whole.index(b"utB") + 4, len(whole)


@pytest.mark.parametrize(
    "target",
    [
        *["touch {0} |", "touch {0}|", "touch {0} | ", "touch {0} |\t \t", "touch {0} |  \r"],
        *["| touch {0}", "  |touch {0}", "\t| touch {0}", "touch {0}; cat {1} |", "|touch {0}|"],
        *["touch {0} |:15", "touch {0} | [0:1]", "touch {0}; cat {1} | :0", "| touch {0}:15"],
        *["$(touch {0})", "`touch {0}`", "{1}; touch {0}", "{1} && touch {0}", "<(touch {0})"],
    ],
)
def test_a_pipe_in_an_scp_never_runs(tmp_path, refused, target):
    marker, (ark, offset, _) = tmp_path / "marker", one_ark(tmp_path)
    target = target.format(marker, ark)
    scp = write(tmp_path / "feats.scp", f"utA {ark}:{offset}\nutX {target}\n")
    message = refused(scp)
    assert "feats.scp:2" in message and "utX" in message
    if target.strip().endswith("|") or target.strip().startswith("|"):
        assert "pipe" in message
    assert not marker.exists()
    refused(f"touch {marker} |", name="touch")  # nor given as the source itself
    assert not marker.exists()


def test_bad_offsets(tmp_path, refused):
    ark, offset, size = one_ark(tmp_path)
    offsets = [size, size + 1, 10**17, 10**30, offset - 4, offset + 1, offset + 20, size - 1, 0]
    for bad in [*offsets, -5, "", "x", "1.5", "1e3", "0x10", " 4", "٣"]:
        scp = write(tmp_path / "feats.scp", f"utA {ark}:{offset}\nutX {ark}:{bad}\n")
        message = refused(scp)
        assert "feats.scp:2: utterance utX" in message, message
    for bad in range(size):  # every other byte of the archive
        if bad in [by_start + 4 for by_start in map(ark.read_bytes().index, (b"utA", b"utB"))]:
            continue
        if bad != ark.read_bytes().index(b"utC") + 4:
            with pytest.raises(UserError, match="utX"):
                run_all(write(tmp_path / "feats.scp", f"utX {ark}:{bad}\n"))


def test_a_compressed_scp_with_names_that_are_no_text(tmp_path, prepare, refused):
    utterances, path = {"utA": exact(3, seed=1)}, os.fsencode(tmp_path) + b"/\xff.ark"
    Path(os.fsdecode(path)).write_bytes(by_kaldiio(utterances))
    scp = write(tmp_path / "feats.scp.gz", gzip.compress(b"utA " + path + b":4\n"))
    assert prepare(scp, tmp_path / "out").status == 0
    assert_holds(tmp_path / "out", utterances)
    assert "UTF-8" in refused(write(tmp_path / "feats.scp", b"ut\xff " + path + b":4\n"))


def test_bad_lines_of_an_scp(tmp_path, refused):
    ark, offset, _ = one_ark(tmp_path)
    good = f"utA {ark}:{offset}\n"
    for bad in [
        *[f"utX {ark}:{offset}[0:1]", f"utX {ark}:{offset}[0:1,0:1]", f"utX {ark}[0:1]"],
        *["utX", "utX ", "utX\t\t", f"utX {ark}", f"utX {tmp_path}", f"utX {tmp_path}/gone.ark:15"],
        *["utX -", "utX -:4", f"utX ark:{ark}", f"utX {ark}\0:15", "utX [0:1]", "utX :15"],
    ]:
        message = refused(write(tmp_path / "feats.scp", good + bad + "\n"))
        assert "feats.scp:2" in message and "utX" in message, message
        if "gone" in bad:
            assert "gone.ark" in message
    for empty in (b"", b"\n\n", b"  \n", gzip.compress(b"")):
        refused(write(tmp_path / "feats.scp", empty))
    refused(write(tmp_path / "feats.scp", by_kaldiio(SMALL)))
    refused(write(tmp_path / "feats.scp", dump(SMALL)))


def test_the_archive_of_an_scp_is_truncated(tmp_path, refused):
    ark, scp = tmp_path / "feats.ark", tmp_path / "feats.scp"
    kaldiio.save_ark(str(ark), SMALL, scp=str(scp))
    whole = ark.read_bytes()
    for size in range(whole.index(b"utB") + 1, len(whole)):
        ark.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"feats\.scp:[23]: utterance ut[BC]: .*feats\.ark"):
            run_all(scp)
    assert "utC" in refused(scp, name="feats.ark")
    ark.unlink()
    assert "feats.scp:1: utterance utA" in refused(scp, name="feats.ark")


# ------------------------------------------------------------------------------ audio


AUDIO_LEN = 60  # frames of a tensor: shorter than some utterances, longer than others


def noise(seconds, seed):
    """int16 (samples,): coloured noise of changing loudness."""
    rng = np.random.default_rng(seed)
    white = rng.standard_normal(int(seconds * RATE))
    coloured = np.convolve(white, rng.standard_normal(12), "same")
    loudness = 300 * (1.5 + np.sin(np.arange(len(white)) / 900 + seed))
    return np.clip(coloured * loudness, -32768, 32767).astype(np.int16)


SPEECH = {
    f"{speaker}-{chapter}-{number:04d}": noise(seconds, number + 10 * chapter)
    for speaker, chapter, number, seconds in [
        *[(84, 1, 0, 0.5), (84, 1, 1, 1.1), (84, 2, 0, 0.9), (103, 4, 0, 0.3), (103, 4, 1, 1.5)],
        *[(1089, 7, 3, 0.8)],
    ]
}


def save_speech(folder, speech, ending="wav", tree=False):
    """Files as in LibriSpeech's tree, or all in one folder."""
    for utt_id, samples in speech.items():
        path = folder / ("/".join(utt_id.split("-")[:2]) if tree else "") / f"{utt_id}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, RATE, subtype="PCM_16")
    return folder


@pytest.fixture(scope="module")
def flac_tree(tmp_path_factory):
    root = tmp_path_factory.mktemp("flac") / "LibriSpeech"
    save_speech(root / "dev-clean", SPEECH, "flac", tree=True)
    write(root / "dev-clean" / "84" / "1" / "84-1.trans.txt", "84-1-0000 SOME WORDS\n")
    write(root / "SPEAKERS.TXT", "84 | F | dev-clean\n")
    return root


@pytest.fixture(scope="module")
def wav_folder(tmp_path_factory):
    return save_speech(tmp_path_factory.mktemp("wav"), SPEECH)


def kaldi_fbank(samples, dither=0.0):
    """kaldi-native-fbank with the options of the original's command and Kaldi's own, by hand."""
    options = kaldi_native_fbank.FbankOptions()
    options.frame_opts.samp_freq = RATE
    options.frame_opts.frame_length_ms = 25
    options.frame_opts.frame_shift_ms = 10
    options.frame_opts.dither = dither
    options.frame_opts.preemph_coeff = 0.97
    options.frame_opts.remove_dc_offset = True
    options.frame_opts.window_type = "hamming"
    options.frame_opts.round_to_power_of_two = True
    options.frame_opts.snip_edges = True
    options.mel_opts.num_bins = 80
    options.mel_opts.low_freq = 20
    options.mel_opts.high_freq = 0
    options.use_energy = False
    options.htk_compat = True
    extractor = kaldi_native_fbank.OnlineFbank(options)
    extractor.accept_waveform(RATE, samples.astype(np.float32).tolist())
    extractor.input_finished()
    return np.array([extractor.get_frame(i) for i in range(extractor.num_frames_ready)])


FRAMES = {utt_id: kaldi_fbank(samples) for utt_id, samples in sorted(SPEECH.items())}


def normalised(frames, speaker_of):
    """CMVN by numpy: {id: float32 (T, D)} -> the same; utterances of one speaker together."""
    result = {}
    for utt_id in frames:
        same = [frames[other] for other in frames if speaker_of(other) == speaker_of(utt_id)]
        everything = np.concatenate(same).astype(np.float64)
        result[utt_id] = (frames[utt_id] - everything.mean(axis=0)) / everything.std(axis=0)
    return result


GROUPS = {
    "speaker": lambda utt_id: utt_id.split("-")[0],
    "utterance": lambda utt_id: utt_id,
    "global": lambda utt_id: "",
}


def truth(cmvn):
    return normalised(FRAMES, GROUPS[cmvn]) if cmvn != "none" else FRAMES


@pytest.mark.parametrize("cmvn", ["speaker", "utterance", "global", "none", None])
def test_audio_to_tensors(tmp_path, prepare, flac_tree, wav_folder, cmvn):
    options = ["--cmvn", cmvn] if cmvn else []
    for name, source in (("flac", flac_tree), ("wav", wav_folder)):
        done = prepare(source, tmp_path / name, *options, max_seq_len=AUDIO_LEN)
        assert done.status == 0, done.err
        # With no option it is the speaker's.
        expected = truth(cmvn or "speaker")
        assert_holds(tmp_path / name, expected, AUDIO_LEN, atol=0 if cmvn == "none" else 1e-5)
    flac, wav = contents(tmp_path / "flac"), contents(tmp_path / "wav")
    del flac["prepared.json"], wav["prepared.json"]
    assert flac == wav
    # The truth itself is not all from the library under test.
    for utt_id, samples in SPEECH.items():
        np.testing.assert_allclose(reference_fbank(samples), FRAMES[utt_id], atol=2e-3)


def test_whole_speakers_have_mean_0_and_variance_1(tmp_path, prepare, wav_folder):
    assert prepare(wav_folder, tmp_path / "out", max_seq_len=500).status == 0
    found = read_folder(tmp_path / "out")
    for speaker in {utt_id.split("-")[0] for utt_id in found}:
        own = [t[:n] for utt_id, (t, n) in found.items() if utt_id.split("-")[0] == speaker]
        everything = np.concatenate(own).astype(np.float64)
        assert np.abs(everything.mean(axis=0)).max() < 1e-6
        assert np.abs(everything.std(axis=0) - 1).max() < 1e-6


@pytest.mark.parametrize("cmvn", ["speaker", "utterance", "global"])
@pytest.mark.parametrize("kind", ["scp", "ark", "dump"])
def test_cmvn_of_kaldi_features(tmp_path, prepare, kind, cmvn):
    source = tmp_path / f"feats.{kind}"
    if kind == "dump":
        # Statistics are of float32 frames: repr keeps them whole.
        write(source, dump(FRAMES))
    else:
        kaldiio.save_ark(str(tmp_path / "feats.ark"), FRAMES, scp=str(tmp_path / "feats.scp"))
    done = prepare(source, tmp_path / "out", "--cmvn", cmvn, max_seq_len=AUDIO_LEN, num_workers=2)
    assert done.status == 0, done.err
    assert_holds(tmp_path / "out", truth(cmvn), AUDIO_LEN, atol=1e-5)


def test_audio_and_its_features_in_an_archive_give_the_same(tmp_path, prepare, wav_folder):
    source = write(tmp_path / "feats.ark", by_kaldiio(FRAMES))
    for cmvn in ("speaker", "utterance", "global", "none"):
        results = []
        for path in (source, wav_folder):
            out = tmp_path / f"{cmvn}-{path.name}"
            assert prepare(path, out, "--cmvn", cmvn, max_seq_len=AUDIO_LEN).status == 0
            results.append(contents(out))
            del results[-1]["prepared.json"]
        assert results[0] == results[1]


def test_cmvn_none_is_the_default_for_kaldi(tmp_path, prepare):
    assert prepare(write(tmp_path / "feats.ark", by_kaldiio(FRAMES)), tmp_path / "out").status == 0
    assert_holds(tmp_path / "out", FRAMES)
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["cmvn"] == "none"


def test_utt2spk_overrides_the_ids(tmp_path, prepare, refused, wav_folder):
    ids = sorted(SPEECH)
    speakers = {utt_id: "xyz"[number % 2] for number, utt_id in enumerate(ids)}
    lines = [f"{utt_id} {speaker}\n" for utt_id, speaker in speakers.items()]
    utt2spk = write(tmp_path / "utt2spk", "".join([*lines, "another-utterance x\n"]))
    ark = write(tmp_path / "feats.ark", by_kaldiio(FRAMES))
    expected = normalised(FRAMES, speakers.get)
    for number, options in enumerate([(wav_folder,), (ark, "--cmvn", "speaker")]):
        source, *options = options
        out = tmp_path / f"out{number}"
        done = prepare(source, out, *options, "--utt2spk", utt2spk, max_seq_len=AUDIO_LEN)
        assert done.status == 0, done.err
        assert_holds(out, expected, AUDIO_LEN, atol=1e-5)

        write(tmp_path / "less", "".join(lines[:2] + lines[3:]))
        for num_workers in (1, 2):
            save_dir = tmp_path / f"refused{number}{num_workers}"
            message = refused(
                *(source, *options, "--utt2spk", tmp_path / "less"),
                **{"name": "utt2spk", "save_dir": save_dir, "num_workers": num_workers},
            )
            assert ids[2] in message


@pytest.mark.parametrize(
    "content, where",
    [
        ("84-1-0000\n", ":1"),
        ("84-1-0000 x\n84-1-0001 x y\n", ":2"),
        (b"84-1-0000 x\n\xff\xfe\xfa \x80\n", ""),
        (np.random.default_rng(0).bytes(500), ""),
        (None, ""),
    ],
    ids=["one-column", "three-columns", "not-utf8", "random", "missing"],
)
def test_bad_utt2spk(tmp_path, refused, wav_folder, content, where):
    path = tmp_path / "utt2spk"
    if content is not None:
        write(path, content)
    assert f"utt2spk{where}" in refused(wav_folder, "--utt2spk", path, name="utt2spk")


def test_flags_that_contradict(tmp_path, prepare, wav_folder):
    ark = write(tmp_path / "feats.ark", by_kaldiio(FRAMES))
    utt2spk = write(tmp_path / "utt2spk", "")
    for source, *options in [
        (wav_folder, "--cmvn", "utterance", "--utt2spk", utt2spk),
        (ark, "--utt2spk", utt2spk),
        (ark, "--skip_bad"),
        (wav_folder, "--resume", "--overwrite"),
        (wav_folder, "--librispeech_from_kaldi", ark),
        (wav_folder, "--cmvn", "everything"),
        (wav_folder, "--dither", "-1"),
        (wav_folder, "--dither", "nan"),
        (wav_folder, "--dither", "inf"),
        (wav_folder, "--sample_rate", "0"),
        ("-", "--resume"),
    ]:
        done = prepare(source, tmp_path / "out", *options)
        assert done.status == 2, options
        assert "Traceback" not in done.err and "error: " in done.err
        assert not (tmp_path / "out").exists()


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, prepare, flac_tree):
    for cmvn in ("speaker", "global"):
        results = []
        for num_workers in (1, 3):
            out = tmp_path / f"{cmvn}{num_workers}"
            done = prepare(
                *(flac_tree, out, "--cmvn", cmvn),
                **{"num_workers": num_workers, "max_seq_len": AUDIO_LEN},
            )
            assert done.status == 0, done.err
            results.append(contents(out))
        assert results[0] == results[1]


def test_prepared_json_tells_how_a_folder_was_made(tmp_path, prepare, wav_folder):
    ark = write(tmp_path / "feats.ark", by_kaldiio(FRAMES))
    runs = {
        "audio": (wav_folder,),
        "global": (wav_folder, "--cmvn", "global"),
        "dither": (wav_folder, "--cmvn", "none", "--dither", "1"),
        "kaldi": (ark, "--cmvn", "utterance"),
    }
    prepared = {}
    for name, (source, *options) in runs.items():
        done = prepare(source, tmp_path / name, *options, max_seq_len=AUDIO_LEN)
        assert done.status == 0, done.err
        text = (tmp_path / name / "prepared.json").read_text()
        prepared[name] = json.loads(text)
        assert text.count("\n") > 5, "to be read by people, too"
        assert prepared[name]["mel_dim"] == 80
        assert prepared[name]["max_seq_len"] == AUDIO_LEN
        assert prepared[name]["version"] == utils.__version__
        assert prepared[name]["source"] == ("kaldi" if name == "kaldi" else "audio")
    cmvn = {name: value["cmvn"] for name, value in prepared.items()}
    assert cmvn == {"audio": "speaker", "global": "global", "dither": "none", "kaldi": "utterance"}
    assert not prepared["kaldi"]["fbank"]
    fbank = prepared["audio"]["fbank"]
    wanted = {"sample_rate": 16000, "frame_length_ms": 25, "frame_shift_ms": 10, "dither": 0}
    wanted |= {"window_type": "hamming", "num_mel_bins": 80, "use_energy": False, "low_freq": 20}
    assert fbank.items() >= (wanted | {"htk_compat": True, "preemph_coeff": 0.97}).items()
    assert prepared["dither"]["fbank"] == fbank | {"dither": 1}
    # Normalising new speech for a model that was trained on it needs the corpus' statistics.
    everything = np.concatenate(list(FRAMES.values())).astype(np.float64)
    sums, squares = prepared["global"]["cmvn_stats"]
    assert sums[-1] == len(everything)
    np.testing.assert_allclose(sums[:-1], everything.sum(axis=0))
    np.testing.assert_allclose(squares[:-1], np.square(everything).sum(axis=0))


def test_dither_adds_a_little_noise(tmp_path, prepare, wav_folder):
    for name, dither in (("without", 0), ("with", 1)):
        done = prepare(wav_folder, tmp_path / name, "--cmvn", "none", "--dither", dither)
        assert done.status == 0, done.err
    without, with_it = read_folder(tmp_path / "without"), read_folder(tmp_path / "with")
    differences = [np.abs(with_it[utt][0] - without[utt][0]).mean() for utt in without]
    assert 0 < max(differences) < 0.5


def test_another_sampling_rate(tmp_path, prepare):
    """At 48 kHz: the same windows in ms, and mel filters up to 24 kHz."""
    samples = noise(1.0, 5)
    soundfile.write(tmp_path / "a.wav", samples, 48000)
    write(tmp_path / "in" / "a.wav", (tmp_path / "a.wav").read_bytes())
    done = prepare(tmp_path / "in", tmp_path / "out", "--cmvn", "none", "--sample_rate", 48000)
    assert done.status == 0, done.err
    expected = reference_fbank(samples, rate=48000)
    assert_holds(tmp_path / "out", {"a": expected}, atol=1e-2)


# ------------------------------------------------------------------------------ bad audio


GOOD_WAV = io.BytesIO()
soundfile.write(GOOD_WAV, SPEECH["84-1-0000"], RATE, format="WAV", subtype="PCM_16")
GOOD_FLAC = io.BytesIO()
soundfile.write(GOOD_FLAC, SPEECH["84-1-0000"], RATE, format="FLAC", subtype="PCM_16")


def sound(samples, rate=RATE, ending="wav", **kwargs):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=ending.upper(), **kwargs)
    return file.getvalue()


BAD_AUDIO = {  # file name: (bytes, what the message must match)
    "84-9-rate.wav": (sound(SPEECH["84-1-0000"], 8000), "8000.*16000.*sox"),
    "84-9-rate.flac": (sound(SPEECH["84-1-0000"], 44100, "flac"), "44100.*16000.*sox"),
    "84-9-stereo.wav": (sound(np.ones((9000, 2), np.int16)), "2 channels"),
    "84-9-cut.flac": (GOOD_FLAC.getvalue()[:-2000], "decoded|truncated"),
    "84-9-cut.wav": (GOOD_WAV.getvalue()[:-2000], "truncated"),
    "84-9-text.wav": (b"no sound at all\n" * 40, "decoded"),
    "84-9-zeros.flac": (bytes(5000), "decoded"),
    "84-9-empty.wav": (b"", "decoded|truncated"),
    "84-9-short.wav": (sound(np.ones(399, np.int16)), "399 samples.*400"),
    "84-9-none.flac": (sound(np.ones(0, np.int16), ending="flac"), "samples|length|decoded"),
    "84-9-nan.wav": (sound(np.full(900, np.nan), subtype="FLOAT"), "NaN"),
    "84-9-huge.wav": (sound(np.full(900, 1e35), subtype="FLOAT"), "infinite"),
    "84-9-loud.wav": (sound(np.full(900, 1e30), subtype="FLOAT"), "84-9-loud"),
}
# Two bad files above have one id: their endings tell them apart in the tests only.
BAD_AUDIO = {
    f"{Path(name).stem}-{Path(name).suffix[1:]}{Path(name).suffix}": value
    for name, value in BAD_AUDIO.items()
}


@pytest.mark.parametrize("name", BAD_AUDIO)
def test_bad_audio_is_refused_by_name(tmp_path, refused, prepare, wav_folder, name):
    content, reason = BAD_AUDIO[name]
    source = tmp_path / "in"
    save_speech(source, SPEECH)
    bad = write(source / "sub" / name, content)
    message = refused(source, name=f"sub/{name}", max_seq_len=AUDIO_LEN)
    assert re.search(reason, message), message
    # Mended or taken away, the rest of the work is done.
    bad.unlink()
    done = prepare(source, tmp_path / "refused", "--resume", max_seq_len=AUDIO_LEN)
    assert done.status == 0, done.err
    assert_holds(tmp_path / "refused", truth("speaker"), AUDIO_LEN, atol=1e-5)


def test_overwriting_by_audio_of_another_rate_leaves_the_old_set(tmp_path, prepare, wav_folder):
    assert prepare(wav_folder, tmp_path / "out", max_seq_len=AUDIO_LEN).status == 0
    before = contents(tmp_path / "out")
    done = prepare(wav_folder, tmp_path / "out", "--overwrite", "--sample_rate", 8000)
    assert done.status == 1 and "8000" in error_line(done.err)
    assert contents(tmp_path / "out") == before


def test_a_pipe_with_the_name_of_audio_is_not_waited_for(tmp_path, refused):
    os.mkfifo(save_speech(tmp_path / "in", FEW) / "pipe.wav")
    assert "pipe.wav" in refused(tmp_path / "in")


@pytest.mark.parametrize("num_workers", [1, 3])
def test_skip_bad_lists_what_it_leaves_out(tmp_path, prepare, num_workers):
    source = save_speech(tmp_path / "in", SPEECH)
    for name, (content, _) in BAD_AUDIO.items():
        write(source / "sub" / name, content)
    save_speech(source / "twice", {"84-1-0000": noise(1, 99)}, "flac")
    save_speech(source / "dot", {" .hidden": noise(1, 98)}, "flac")
    options = {"max_seq_len": AUDIO_LEN, "num_workers": num_workers}
    done = prepare(source, tmp_path / "out", "--skip_bad", **options)
    assert done.status == 0, done.err
    lines = (tmp_path / "out" / "skipped.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(BAD_AUDIO) + 1
    for name, (_, reason) in BAD_AUDIO.items():
        (line,) = [line for line in lines if name in line]
        assert re.search(reason, line), line
    (line,) = [line for line in lines if "84-1-0000" in line]
    assert "two files" in line
    assert re.search(rf"\b{len(lines)} files\b", done.out), done.out
    assert re.search(rf"\b{len(SPEECH) + 1} utterances\b", done.out), done.out
    # What is left is as if there had been nothing else: no bad file is in any statistics.
    clean = save_speech(tmp_path / "clean", SPEECH)
    save_speech(clean, {" .hidden": noise(1, 98)})
    kept = read_folder(tmp_path / "out", "skipped.txt")
    first = "dot" if np.array_equal(SPEECH["84-1-0000"], noise(1, 99)) else "84-1-0000"
    assert first in kept
    done = prepare(clean, tmp_path / "reference", **options)
    assert done.status == 0, done.err
    for utt_id, (tensor, length) in read_folder(tmp_path / "reference").items():
        assert np.array_equal(kept[utt_id][0], tensor) and kept[utt_id][1] == length


def test_skip_bad_with_nothing_bad(tmp_path, prepare, wav_folder):
    assert prepare(wav_folder, tmp_path / "out", "--skip_bad", max_seq_len=AUDIO_LEN).status == 0
    others = ["skipped.txt"] if (tmp_path / "out" / "skipped.txt").exists() else []
    assert_holds(tmp_path / "out", truth("speaker"), AUDIO_LEN, atol=1e-5, others=others)
    assert not others or not (tmp_path / "out" / "skipped.txt").read_text()


def test_a_list_of_skipped_files_does_not_outlive_its_run(tmp_path, prepare):
    source = save_speech(tmp_path / "in", SPEECH)
    bad = write(source / "bad.wav", b"")
    assert prepare(source, tmp_path / "out", "--skip_bad").status == 0
    assert "bad.wav" in (tmp_path / "out" / "skipped.txt").read_text()
    bad.unlink()
    assert prepare(source, tmp_path / "out", "--skip_bad", "--overwrite").status == 0
    skipped = tmp_path / "out" / "skipped.txt"
    assert not skipped.exists() or not skipped.read_text()


def test_all_bad_is_an_error(tmp_path, refused):
    for name in ("a.wav", "b.flac"):
        write(tmp_path / "in" / name, b"nothing")
    for options in ([], ["--skip_bad"]):
        message = refused(tmp_path / "in", *options)
        assert "a.wav" in message


def test_folders_without_audio(tmp_path, refused):
    (tmp_path / "in").mkdir()
    for options in ([], ["--skip_bad"]):
        refused(tmp_path / "in", *options)
    write(tmp_path / "in" / "sub" / "notes.txt", "nothing")
    write(tmp_path / "in" / "a.mp3", b"ID3")
    refused(tmp_path / "in")


def test_two_files_with_one_id(tmp_path, refused):
    save_speech(tmp_path / "in" / "one", {"84-1": noise(0.3, 1)})
    save_speech(tmp_path / "in" / "two", {"84-1": noise(0.3, 2)}, "flac")
    message = refused(tmp_path / "in")
    assert "one/84-1.wav" in message and "two/84-1.flac" in message


def test_a_link_to_nowhere(tmp_path, refused, prepare):
    source = save_speech(tmp_path / "in", SPEECH)
    (source / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    refused(source, name="gone.wav", max_seq_len=AUDIO_LEN)
    done = prepare(source, tmp_path / "out", "--skip_bad", max_seq_len=AUDIO_LEN)
    assert done.status == 0, done.err
    assert "gone.wav" in (tmp_path / "out" / "skipped.txt").read_text()
    others = ["skipped.txt"]
    assert_holds(tmp_path / "out", truth("speaker"), AUDIO_LEN, atol=1e-5, others=others)


def test_names_that_are_not_utf8(tmp_path, refused, prepare):
    """Old corpora have file names in Latin-1."""
    source = save_speech(tmp_path / "in", SPEECH)
    try:
        Path(os.fsdecode(os.fsencode(source) + b"/caf\xe9.wav")).write_bytes(GOOD_WAV.getvalue())
    except OSError:
        pytest.skip("this file system takes no such name")
    done = prepare(source, tmp_path / "refused", max_seq_len=AUDIO_LEN)
    assert done.status == 1
    assert "Traceback" not in done.err and "caf" in done.err.splitlines()[-1]
    # The name of a folder is no id, and shows only in messages.
    folder = Path(os.fsdecode(os.fsencode(source) + b"/r\xf4le"))
    write(folder / "84-1-0009.wav", sound(noise(0.3, 3)))
    write(folder / "84-1-0010.wav", b"")
    done = prepare(source, tmp_path / "out", "--skip_bad", max_seq_len=AUDIO_LEN)
    assert done.status == 0, done.err
    skipped = (tmp_path / "out" / "skipped.txt").read_bytes()
    assert b"caf" in skipped and b"84-1-0010.wav" in skipped
    assert "84-1-0009" in read_folder(tmp_path / "out", "skipped.txt")


def test_errors_of_worker_processes_are_one_line(tmp_path):
    source = save_speech(tmp_path / "in", SPEECH)
    write(source / "103-4-bad.wav", GOOD_WAV.getvalue()[:-10])
    done = run_script("prepare_data.py", *arguments(source, tmp_path / "out"), "--num_workers=3")
    assert done.returncode == 1
    assert "103-4-bad.wav" in error_line(done.stderr)
    assert not (tmp_path / "out" / "lengths.pkl").exists()


# ------------------------------------------------------------------------------ interrupted


def quiet():
    """What this fork prints goes nowhere; and it copies no memory only to look for garbage."""
    gc.disable()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def killed(argv, calls):
    """Run prepare_data.py in a fork that kills itself before its `calls`-th change of a name.

    Returns whether it came to that: otherwise it ended well.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            quiet()
            count = 0

            def dying(function):
                def call(*args):
                    nonlocal count
                    count += 1
                    if count == calls:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args)

                return call

            os.replace, os.remove = dying(os.replace), dying(os.remove)
            prepare_data.main([*argv, "--num_workers", "1"])
            status = 0
        finally:
            os._exit(status)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


FEW = {utt_id: SPEECH[utt_id][:9000] for utt_id in ("84-1-0000", "84-1-0001", "103-4-0001")}
INTERRUPTED = {  # name: (source, options)
    "audio-speaker": ("wav", []),
    "audio-skip_bad": ("bad", ["--skip_bad", "--cmvn", "global"]),
    "kaldi-none": ("scp", []),
    "kaldi-speaker": ("scp", ["--cmvn", "speaker"]),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    save_speech(root / "wav", FEW)
    save_speech(root / "bad", FEW)
    write(root / "bad" / "103-0.wav", b"no audio")
    frames = {utt_id: FRAMES[utt_id] for utt_id in sorted(FEW)}
    kaldiio.save_ark(str(root / "feats.ark"), frames, scp=str(root / "feats.scp"))
    rows = {utt_id: [" ".join(map(str, row)) for row in frames[utt_id]] for utt_id in frames}
    dump = "".join(f"{utt_id}\n" + "\n".join(lines) + "\n.\n" for utt_id, lines in rows.items())
    write(root / "dump.txt", dump)
    found = {"wav": root / "wav", "bad": root / "bad", "scp": root / "feats.scp"}
    return found | {"dump": root / "dump.txt"}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_killed_at_any_change_of_the_folder(tmp_path, prepare, sources, name):
    kind, options = INTERRUPTED[name]
    source = sources[kind]
    whole = tmp_path / "whole"
    assert prepare(source, whole, *options).status == 0
    expected = contents(whole)
    others = ["skipped.txt"] if "--skip_bad" in options else []
    assert len(read_folder(whole, *others)) == len(FEW)
    calls, wrong = 1, {}
    while killed(arguments(source, tmp_path / str(calls), *options), calls):
        out = tmp_path / str(calls)
        before = sorted(os.listdir(out))
        done = prepare(source, out, *options, "--resume")
        if done.status != 0:
            wrong[calls] = before, error_line(done.err)
        elif contents(out) != expected:
            wrong[calls] = before, sorted(os.listdir(out))
        calls += 1
    assert not wrong, f"killed at the n-th change; (what was there then, what is wrong): {wrong}"
    assert calls > len(FEW) + 2, "it was not killed"
    assert contents(tmp_path / str(calls)) == expected


@pytest.mark.parametrize("name", INTERRUPTED)
def test_killed_again_and_again(tmp_path, prepare, sources, name):
    kind, options = INTERRUPTED[name]
    source = sources[kind]
    assert prepare(source, tmp_path / "whole", *options).status == 0
    argv = arguments(source, tmp_path / "out", *options, "--resume")
    runs, calls = 0, 8 if name == "kaldi-speaker" else 4
    while killed(argv, calls + runs // 8):  # what was done before must count
        runs += 1
    assert 2 <= runs < 60
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("damage", [b"", bytes(3000)], ids=["empty", "zeros"])
@pytest.mark.parametrize("name", ["audio-speaker", "kaldi-none", "kaldi-speaker"])
def test_after_a_crash_of_the_machine(tmp_path, prepare, sources, name, damage):
    """Files that no disk was asked to keep may come back empty: made again, or refused by name."""
    kind, options = INTERRUPTED[name]
    assert prepare(sources[kind], tmp_path / "whole", *options).status == 0
    for calls, number in [(4, 0), (4, -1), (7, 0), (7, -1)]:
        out = tmp_path / f"{calls}{number}"
        killed(arguments(sources[kind], out, *options), calls)
        (out / "lengths.pkl").unlink(missing_ok=True)
        spoiled = [*sorted(out.glob("*.pt")), *sorted(out.glob("*-*.raw"))][number]
        spoiled.write_bytes(damage)
        done = prepare(sources[kind], out, *options, "--resume")
        if done.status != 0:
            assert spoiled.stem in error_line(done.err)
            assert not (out / "lengths.pkl").exists()
            assert prepare(sources[kind], out, *options, "--resume").status == 0
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("name", ["audio-speaker", "kaldi-none", "kaldi-speaker"])
def test_what_is_lost_between_two_runs_is_noticed(tmp_path, prepare, sources, name):
    """Who clears away a damaged file finds it made again, or is told; never a set with holes."""
    kind, options = INTERRUPTED[name]
    assert prepare(sources[kind], tmp_path / "whole", *options).status == 0
    for calls in (4, 7):
        out = tmp_path / str(calls)
        killed(arguments(sources[kind], out, *options), calls)
        (out / "lengths.pkl").unlink(missing_ok=True)
        lost = sorted([*out.glob("*-*.raw"), *out.glob("*.pt")])[-1].stem
        for path in out.glob(f"{lost}.*"):
            path.unlink()
        done = prepare(sources[kind], out, *options, "--resume")
        if done.status != 0:
            assert lost in error_line(done.err)
            assert not (out / "lengths.pkl").exists()
            assert prepare(sources[kind], out, *options, "--resume").status == 0
        assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("content", ["[]", "3", '"x"', "{", "", "{}", '{"fbank": 3}'])
def test_a_prepared_json_of_somebody_else(tmp_path, prepare, sources, content):
    write(tmp_path / "out" / "prepared.json", content)
    done = prepare(sources["wav"], tmp_path / "out", "--resume")
    assert done.status == 1
    assert str(tmp_path / "out") in error_line(done.err)


def test_without_resume_it_starts_again(tmp_path, prepare, sources):
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert prepare(sources["wav"], whole).status == 0
    for calls in (3, 8):
        assert killed(arguments(sources["wav"], out, "--cmvn", "none", max_seq_len=9), calls)
        done = prepare(sources["wav"], out)
        assert done.status == 0, done.err
        assert contents(out) == contents(whole)
        (out / "lengths.pkl").unlink()


def test_what_was_done_is_not_done_again(tmp_path, prepare):
    """The files of finished utterances are spoiled meanwhile: nobody reads them again."""
    source = save_speech(tmp_path / "in", FEW)
    assert prepare(source, tmp_path / "whole").status == 0
    assert killed(arguments(source, tmp_path / "out"), 4)  # prepared.json and two utterances
    kept = {path: path.stat() for path in (tmp_path / "out").glob("*.raw")}
    assert len(kept) == 2
    for path in kept:
        write(source / f"{path.stem}.wav", b"spoiled")
    # Nor while the rest is made: kill it when that is done.
    assert killed(arguments(source, tmp_path / "out", "--resume"), len(FEW))
    for path, before in kept.items():
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    done = prepare(source, tmp_path / "out", "--resume")
    assert done.status == 0, done.err
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_finished_tensors_of_kaldi_features_stay(tmp_path, prepare, sources):
    out = tmp_path / "out"
    assert killed(arguments(sources["scp"], out), 4)
    kept = {path: path.stat() for path in out.glob("*.pt")}
    assert len(kept) == 2
    assert prepare(sources["scp"], out, "--resume").status == 0
    for path, before in kept.items():
        after = path.stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


RESUMED_OTHERWISE = [
    ("wav", [], ["--cmvn", "global"], "cmvn"),
    ("wav", [], ["--dither", "0.5"], "dither"),
    ("wav", [], ["--sample_rate", "8000"], "sample_rate"),
    ("wav", [], ["--max_seq_len", "21"], "max_seq_len"),
    ("scp", [], ["--cmvn", "speaker"], "cmvn"),
    ("scp", ["--cmvn", "speaker"], ["--cmvn", "utterance"], "cmvn"),
    ("scp", [], ["--max_seq_len", "19"], "max_seq_len"),
    ("wav", [], ["--utt2spk", "UTT2SPK"], "utt2spk"),
    ("wav", ["--utt2spk", "UTT2SPK"], [], "utt2spk"),
]


@pytest.mark.parametrize("calls", [4, 8], ids=["first-pass", "second-pass"])
@pytest.mark.parametrize("kind, options, other, setting", RESUMED_OTHERWISE)
def test_resume_with_other_settings_is_refused(
    tmp_path, refused, prepare, sources, kind, options, other, setting, calls
):
    if kind == "scp" and not options:
        calls = 4  # there is one pass
    utt2spk = write(tmp_path / "utt2spk", "".join(f"{utt_id} x\n" for utt_id in FEW))
    options, other = ([str(utt2spk) if o == "UTT2SPK" else o for o in x] for x in (options, other))
    out, source = tmp_path / "out", sources[kind]
    assert killed(arguments(source, out, *options), calls)
    before = contents(out)
    done = prepare(source, out, *other, "--resume")
    assert done.status == 1, "accepted"
    message = error_line(done.err)
    assert setting in message and str(out) in message
    assert contents(out) == before
    done = prepare(source, out, *options, "--resume")  # and nothing is lost by it
    assert done.status == 0, done.err
    assert prepare(source, tmp_path / "whole", *options).status == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_resume_from_another_source_is_refused(tmp_path, prepare, sources):
    assert killed(arguments(sources["wav"], tmp_path / "out"), 4)
    other = save_speech(tmp_path / "other", FEW)
    for source in (other, sources["scp"]):
        done = prepare(source, tmp_path / "out", "--resume")
        assert done.status == 1
        assert str(tmp_path / "out") in error_line(done.err)


def test_resume_of_nothing_starts(tmp_path, prepare, sources):
    assert prepare(sources["wav"], tmp_path / "whole").status == 0
    (tmp_path / "empty").mkdir()
    for name in ("empty", "not-there"):
        done = prepare(sources["wav"], tmp_path / name, "--resume")
        assert done.status == 0, done.err
        assert contents(tmp_path / name) == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["wav", "scp"])
def test_resume_of_a_finished_set_says_so(tmp_path, prepare, sources, kind):
    out = tmp_path / "out"
    assert prepare(sources[kind], out).status == 0
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    done = prepare(sources[kind], out, "--resume")
    assert done.status == 0, done.err
    assert "finished" in done.out + done.err
    after = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in out.iterdir()}
    assert after == before


def test_resume_after_a_file_went_away(tmp_path, prepare):
    """The result is that of a run on what is there now; nothing of the other stays."""
    source = save_speech(tmp_path / "in", FEW)
    assert killed(arguments(source, tmp_path / "out"), 4)
    gone = next((tmp_path / "out").glob("*.raw")).stem
    (source / f"{gone}.wav").unlink()
    done = prepare(source, tmp_path / "out", "--resume")
    assert done.status == 0, done.err
    assert prepare(source, tmp_path / "whole").status == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_resume_mends_a_failed_run(tmp_path, prepare, refused):
    source = save_speech(tmp_path / "in", FEW)
    last = source / f"{sorted(FEW)[-1]}.wav"
    good = last.read_bytes()
    last.write_bytes(good[:-100])
    refused(source, name=last.name)
    refused(source, "--resume", name=last.name)
    last.write_bytes(good)
    done = prepare(source, tmp_path / "refused", "--resume")
    assert done.status == 0, done.err
    assert prepare(source, tmp_path / "whole").status == 0
    assert contents(tmp_path / "refused") == contents(tmp_path / "whole")


@pytest.fixture(scope="module")
def hour(tmp_path_factory):
    """Not quite: 60 files of 4 s, of four speakers."""
    speech = {f"s{i % 4}-{i:03d}": noise(4, i) for i in range(60)}
    return save_speech(tmp_path_factory.mktemp("hour"), speech)


@contextlib.contextmanager
def slow_process(source, save_dir, pattern, count):
    """prepare_data.py as a process with two workers, which has written `count` of the files."""
    argv = [*arguments(source, save_dir), "--num_workers", "2"]
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            quiet()
            save = checkpoint.save

            def slow_save(*args, **kwargs):  # so that there is a middle to be killed in
                time.sleep(0.02)
                save(*args, **kwargs)

            checkpoint.save = slow_save
            prepare_data.main(argv)
        finally:
            os._exit(1)
    try:
        deadline = time.monotonic() + 60
        while len(list(save_dir.glob(pattern))) < count:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "ended by itself"
            assert time.monotonic() < deadline, "wrote nothing"
            time.sleep(0.005)
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # the workers, too
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)


@pytest.mark.parametrize("pattern", ["*-*.raw", "*.pt"], ids=["first-pass", "second-pass"])
def test_sigkill_of_a_real_process(tmp_path, prepare, hour, pattern):
    out = tmp_path / "out"
    with slow_process(hour, out, pattern, 5):
        pass
    kept = {path: path.stat() for path in out.glob("*.pt")}
    raw = list(out.glob("*-*.raw"))
    assert not (out / "lengths.pkl").exists()
    assert 5 <= len(raw) < 60 if pattern != "*.pt" else 5 <= len(kept) < 60
    done = prepare(hour, out, "--resume", num_workers=2)
    assert done.status == 0, done.err
    for path, before in kept.items():
        # One may have been written before the kill whose .raw was not yet taken away.
        after = path.stat()
        same = (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
        assert same or path.with_suffix(".raw") in raw
    assert prepare(hour, tmp_path / "whole", num_workers=2).status == 0
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="needs Linux' /proc")
def test_workers_end_with_their_killed_parent(tmp_path, hour):
    """Else they stay for ever, and write beside the run that resumes."""
    with slow_process(hour, tmp_path / "out", "*-*.raw", 3) as pid:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert len(children) >= 2
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        deadline = time.monotonic() + 5
        while left := [pid for pid in children if is_running(pid)]:
            assert time.monotonic() < deadline, f"{len(left)} workers are still there"
            time.sleep(0.05)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


# ------------------------------------------------------------------------------ another kind


FBANK = {"sample_rate": 16000.0, "window_type": "hamming", "num_mel_bins": 8, "dither": 0.0}
AUDIO_KIND = {"source": "audio", "path": "a", "fbank": FBANK, "cmvn": "speaker", "mel_dim": 8}
AUDIO_KIND |= {"max_seq_len": 30, "version": utils.__version__}
KALDI_KIND = AUDIO_KIND | {"source": "kaldi", "fbank": None, "cmvn": "none"}


@pytest.fixture
def extract(tmp_path, call_main):
    """Run extract_features.py on a folder of one kind, with a model trained on another: stderr."""

    def call(config, prepared):
        torch.manual_seed(0)
        run = tmp_path / "run"
        run.mkdir()
        model = APCModel(8, None, RNNConfig(8, 6, 1, 0.0, False))
        torch.save(model.state_dict(), run / "m__epoch_1.model")
        if config is not None:
            write(run / "config.json", json.dumps(config))
        make_folder(tmp_path / "data", [30, 20], 8)
        if prepared is not None:
            write(tmp_path / "data" / "prepared.json", json.dumps(prepared))
        argv = ["--checkpoint", run / "m__epoch_1.model", "--data_dir", tmp_path / "data"]
        argv += ["--save_dir", tmp_path / "out", "--device", "cpu", "--load_data_workers", 0]
        argv += ["--no_residual"]
        done = call_main(extract_features, *argv)
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / "out").glob("*.pt"))) == 2
        return done.stderr

    return call


@pytest.mark.parametrize(
    "trained_on, fed",
    [
        (AUDIO_KIND, AUDIO_KIND | {"cmvn": "utterance"}),
        (AUDIO_KIND, AUDIO_KIND | {"cmvn": "none"}),
        (AUDIO_KIND, AUDIO_KIND | {"fbank": FBANK | {"window_type": "povey"}}),
        (AUDIO_KIND, AUDIO_KIND | {"fbank": FBANK | {"sample_rate": 8000.0}}),
        (AUDIO_KIND, KALDI_KIND),
        (KALDI_KIND, AUDIO_KIND),
        (KALDI_KIND, KALDI_KIND | {"cmvn": "global"}),
    ],
    ids=["utterance", "none", "window", "rate", "to-kaldi", "to-audio", "kaldi-global"],
)
def test_extracting_from_another_kind_of_data_warns(extract, trained_on, fed):
    stderr = extract({"rnn_residual": False, "data": [trained_on, trained_on]}, fed)
    warnings = [line for line in stderr.splitlines() if "warning" in line.lower()]
    assert warnings and "Traceback" not in stderr, stderr
    for name in ("source", "fbank", "cmvn"):
        named = any(re.search(rf"\b{name}\b", line) for line in warnings)
        assert named == (trained_on[name] != fed[name]), warnings


@pytest.mark.parametrize(
    "config, fed",
    [
        ({"data": [AUDIO_KIND]}, AUDIO_KIND),
        ({"data": [AUDIO_KIND, AUDIO_KIND]}, AUDIO_KIND | {"path": "b", "version": "0.9.9"}),
        ({"data": [KALDI_KIND]}, KALDI_KIND | {"max_seq_len": 99}),
        ({"data": [AUDIO_KIND]}, None),
        ({"data": [None, None]}, AUDIO_KIND),
        ({"data": []}, AUDIO_KIND),
        ({"rnn_num_layers": 1}, KALDI_KIND),
        (None, AUDIO_KIND),
        (None, None),
    ],
    ids=["same", "same-kind", "same-kaldi", "legacy-folder", "legacy-data", "-", "--", "none", "0"],
)
def test_extracting_from_the_same_or_an_unknown_kind_does_not_warn(extract, config, fed):
    stderr = extract(config and {"rnn_residual": False, **config}, fed)
    assert "warning" not in stderr.lower(), stderr


# ------------------------------------------------------------------------------ shards


SHARDED = {
    "wav-speaker": ("wav", ()),
    "wav-utterance": ("wav", ("--cmvn", "utterance")),
    "dump": ("dump", ()),
}


@pytest.mark.parametrize("name", SHARDED)
def test_shards_join_to_the_whole(tmp_path, prepare, monkeypatch, sources, name):
    kind, options = SHARDED[name]
    monkeypatch.setattr(kaldi_io, "BLOCK_SIZE", 1)  # or the dump would be one job
    assert prepare(sources[kind], tmp_path / "whole", *options).status == 0
    for number in (3, 1, 2):
        assert not (tmp_path / "out" / "lengths.pkl").exists()
        done = prepare(sources[kind], tmp_path / "out", *options, "--shard", f"{number}/3")
        assert done.status == 0, done.err
    whole, out = contents(tmp_path / "whole"), contents(tmp_path / "out")
    lengths = [pickle.loads(found.pop("lengths.pkl")) for found in (whole, out)]
    assert lengths[0] == lengths[1]
    assert out == whole
    again = prepare(sources[kind], tmp_path / "out", *options, "--shard", "1/3", "--resume")
    assert again.status == 0 and "finished" in again.out


@pytest.mark.parametrize("other", [("--max_seq_len", "9"), ("--cmvn", "none")], ids=" ".join)
def test_shards_of_other_settings_do_not_join(tmp_path, prepare, refused, sources, other):
    out = tmp_path / "refused"
    assert prepare(sources["wav"], out, "--shard", "1/2").status == 0
    message = refused(sources["wav"], "--shard", "2/2", *other, name="shard-2-of-2")
    assert other[0].strip("-") in message
    assert sorted(os.listdir(out)) == ["shard-1-of-2", "shard-2-of-2"]
    for folder in out.iterdir():
        assert read_folder(folder)


def test_shards_of_nothing(tmp_path, refused):
    write(tmp_path / "audio" / "a.wav", b"no sound")
    assert "no utterance" in refused(
        tmp_path / "audio", "--skip_bad", "--shard", "1/1", name="refused"
    )


@pytest.mark.parametrize("text", ["0/2", "3/2", "2", "1/0", "-1/2"])
def test_a_shard_is_one_of_n(tmp_path, prepare, sources, text):
    done = prepare(sources["wav"], tmp_path / "out", f"--shard={text}")
    assert done.status == 2 and "--shard" in done.err
