"""prepare_data.py: one dataset whatever the source, in the original's layout, or none at all."""

import contextlib
import gzip
import itertools
import json
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

import kaldiio
import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import error_line, run_script, speech

import prepare_data
import utils
from formats import kaldi
from formats.fbank import CMVN_KINDS, fbank, fbank_settings

RATE = 16000
MAX_SEQ_LEN = 60  # frames of a tensor: fewer than some utterances have, more than others
SCRIPT = "prepare_data.py"
ROOT = Path(prepare_data.__file__).parent

# Sources ------------------------------------------------------------------------------------------

SPEECH = {
    f"{speaker}-{chapter}-{number:04d}": speech(seconds, number + 10 * chapter)
    for speaker, chapter, number, seconds in [
        *[(103, 4, 0, 0.3), (103, 4, 1, 1.5), (1089, 7, 3, 0.8)],
        *[(84, 1, 0, 0.5), (84, 1, 1, 1.1), (84, 2, 0, 0.9)],
    ]
}
FRAMES = {
    utt: fbank(samples.astype(np.float32), fbank_settings()) for utt, samples in SPEECH.items()
}
FEW = ("103-4-0000", "84-1-0000", "84-1-0001")
GROUPS = {
    "speaker": lambda utt: utt.split("-")[0],
    "utterance": lambda utt: utt,
    "global": lambda utt: "",
}


def normalised(frames, group_of, norm_vars=False):
    """CMVN by numpy: {id: frames} -> the same; utterances of one group together."""
    result = {}
    for utt in frames:
        same = [frames[other] for other in frames if group_of(other) == group_of(utt)]
        together = np.concatenate(same).astype(np.float64)
        result[utt] = frames[utt] - together.mean(axis=0)
        if norm_vars:
            result[utt] /= together.std(axis=0)
    return result


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def save_speech(folder, utterances=SPEECH, extension="wav"):
    """In LibriSpeech's tree."""
    for utt in utterances:
        path = write(folder / "/".join(utt.split("-")[:2]) / f"{utt}.{extension}", b"")
        soundfile.write(path, SPEECH[utt], RATE)
    return folder


def dump(utterances):
    return "".join(
        f"{utt}\n" + "".join(" ".join(map(repr, row)) + "\n" for row in frames.tolist()) + ".\n"
        for utt, frames in utterances.items()
    )


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """{name: path} of the same speech, and of less of it."""
    root = tmp_path_factory.mktemp("sources")
    save_speech(root / "flac", extension="flac")
    # Old corpora have folder names in Latin-1, which are no ids.
    (root / "flac" / "84").rename(root / "flac" / os.fsdecode(b"Andr\xe9"))
    write(root / "utt2spk", "".join(f"{utt} {utt.split('-')[0]}\n" for utt in SPEECH))
    kaldiio.save_ark(str(root / "feats.ark"), FRAMES, scp=str(root / "feats.scp"))
    few = {utt: FRAMES[utt] for utt in FEW}
    kaldiio.save_ark(str(root / "few.ark"), few, scp=str(root / "few.scp"))
    return {
        "flac": root / "flac",
        "wav": save_speech(root / "wav"),
        "ark": root / "feats.ark",
        "scp": root / "feats.scp",
        "dump.gz": write(root / "dump.gz", gzip.compress(dump(FRAMES).encode())),
        "few": save_speech(root / "few", FEW),
        "few_scp": root / "few.scp",
    }


# Runs and what they leave -------------------------------------------------------------------------


def arguments(source, save_dir, *options, max_seq_len=MAX_SEQ_LEN, num_workers=1):
    """A folder is a source of audio, anything else one of Kaldi's features."""
    kind = "audio" if os.path.isdir(source) else "kaldi"
    flags = [f"--librispeech_from_{kind}", source, "--save_dir", save_dir]
    return [*flags, "--max_seq_len", max_seq_len, "--num_workers", num_workers, *options]


@pytest.fixture
def run(monkeypatch, call_main):
    """Run prepare_data.py in this process as the script would -> what it ended with."""
    monkeypatch.setattr(os, "fsync", lambda file: None)  # which waits for every disk
    return lambda *args, **kw: call_main(prepare_data, *arguments(*args, **kw))


@pytest.fixture
def prepare(run):
    """The same, which must succeed -> what it printed."""

    def call(*args, **kw):
        done = run(*args, **kw)
        assert done.returncode == 0, done.stderr
        assert not Path(f"{args[1]}.partial").exists()
        return done.stdout

    return call


@pytest.fixture
def error_of(run):
    """The same, which must fail -> its error line."""

    def call(source, save_dir, *options, **kw):
        message = error_line(run(source, save_dir, *options, **kw), SCRIPT)
        assert len(message) < 700 and message.isprintable()
        assert not Path(f"{save_dir}.partial").exists()
        return message

    return call


def contents(folder, *but):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in but}


def read_folder(folder, *others):
    """A dataset, as the original reads it -> {utterance id: (array, length)}, in its order.

    There is nothing else in it but prepared.json and `others`.
    """
    lengths = pickle.loads((folder / "lengths.pkl").read_bytes())
    assert sorted(os.listdir(folder)) == sorted([*lengths, "lengths.pkl", "prepared.json", *others])
    return {
        name.removesuffix(".pt"): (torch.load(folder / name).numpy(), length)
        for name, length in lengths.items()
    }


def assert_holds(folder, utterances, max_seq_len=MAX_SEQ_LEN, atol=0.0, others=()):
    """The folder holds these utterances ({id: frames}) cut and padded, and no other file."""
    found = read_folder(folder, *others)
    assert list(found) == list(utterances)
    for utt, frames in utterances.items():
        tensor, length = found[utt]
        expected = np.zeros((max_seq_len, frames.shape[1]), np.float32)
        expected[: len(frames)] = frames[:max_seq_len]
        assert type(length) is int and length == min(len(frames), max_seq_len)
        assert tensor.dtype == np.float32 and tensor.shape == expected.shape
        np.testing.assert_allclose(tensor, expected, rtol=0, atol=atol, err_msg=utt)
        assert not tensor[length:].any(), "the padding must be zeros"


# The dataset --------------------------------------------------------------------------------------


def test_folder_has_the_original_layout(tmp_path, prepare):
    rng = np.random.default_rng(0)
    sizes = {"utt-2": 30, "u.3": 1, "grüße": 19, "utt-1": 20, "utt-0": 21}
    utterances = {u: rng.normal(0, 3, (n, 4)).astype(np.float32) for u, n in sizes.items()}
    source, folder = write(tmp_path / "feats", dump(utterances)), tmp_path / "new" / "train"
    *announced, result = prepare(source, folder, max_seq_len=20).splitlines()
    assert_holds(folder, utterances, 20)
    for words in (f"{source} (text dump) -> {folder}", "CMVN: none", "20 frames", "processes: 1"):
        assert words in "\n".join(announced)
    for words in ("5 utterances, 91 frames (0.00 h", "mel_dim 4", "11 frames beyond"):
        assert words in result
    for utt in utterances:
        tensor = torch.load(folder / f"{utt}.pt", weights_only=True)
        assert type(tensor) is torch.Tensor and tensor.untyped_storage().nbytes() == 20 * 4 * 4
    raw = (folder / "lengths.pkl").read_bytes()
    assert type(pickle.loads(raw)) is dict
    # The original ran on Pythons that know no pickle protocol above 4.
    assert max(arg for op, arg, _ in pickletools.genops(raw) if op.name == "PROTO") <= 4


@pytest.mark.parametrize("cmvn", CMVN_KINDS)
def test_every_source_gives_the_same_normalised_tensors(tmp_path, prepare, sources, cmvn):
    expected = FRAMES if cmvn == "none" else normalised(FRAMES, GROUPS[cmvn])
    for name in ("flac", "wav", "ark", "scp", "dump.gz"):
        is_default = cmvn == ("speaker" if os.path.isdir(sources[name]) else "none")
        options = [] if is_default else ["--cmvn", cmvn]
        prepare(sources[name], tmp_path / name, *options)
        assert_holds(tmp_path / name, expected, atol=0 if cmvn == "none" else 1e-5)
        # Byte for byte: the statistics are of all frames, before truncation, in every case.
        ours, first = (contents(tmp_path / n, "prepared.json") for n in (name, "flac"))
        assert ours == first
    if cmvn != "none":
        prepare(sources["scp"], tmp_path / "vars", "--cmvn", cmvn, "--norm_vars")
        expected = normalised(FRAMES, GROUPS[cmvn], norm_vars=True)
        assert_holds(tmp_path / "vars", expected, atol=1e-5)


def test_utt2spk(tmp_path, prepare, error_of, sources):
    speakers = {utt: "xyz"[number % 2] for number, utt in enumerate(SPEECH)}
    lines = [f"{utt} {speaker}\n" for utt, speaker in speakers.items()]
    utt2spk = write(tmp_path / "utt2spk", "".join([*lines, "another-utterance x\n"]))
    less = write(tmp_path / "less", "".join(lines[:2] + lines[3:]))
    for name in ("wav", "ark"):
        source, options = sources[name], ["--cmvn", "speaker", "--utt2spk"]
        printed = prepare(source, tmp_path / name, *options, utt2spk)
        assert "speakers: 2 (x, y), 3" in printed and "6 utterances, 2 speakers (" in printed
        assert_holds(tmp_path / name, normalised(FRAMES, speakers.get), atol=1e-5)
        message = error_of(source, tmp_path / f"{name}-less", *options, less)
        reason = "(has no speaker in utt2spk|is not in .*less)"
        assert re.search(f"utterance {list(SPEECH)[2]}.* {reason}", message)


def test_a_speaker_is_never_guessed(tmp_path, error_of, sources):
    flat = write(tmp_path / "flat" / "84-1.wav", b"not even read").parent
    ark = write(tmp_path / "kaldi" / "feats.ark", sources["ark"].read_bytes())
    parts = write(tmp_path / "parts" / "dev-clean" / "84" / "1" / "84-1.wav", b"").parents[3]
    for source, place in [(flat, flat / "84-1.wav"), (ark, ark), ("-", "-"), (parts, parts)]:
        message = error_of(source, tmp_path / "out", "--cmvn", "speaker")
        assert f"error: {place}: " in message
        assert "use --utt2spk FILE or --cmvn utterance" in message
        assert not (tmp_path / "out").exists()


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, prepare, monkeypatch):
    monkeypatch.setattr(kaldi, "BLOCK_SIZE", 1)  # a job for each utterance
    ids = [f"s{i % 3}-{i}" for i in np.random.default_rng(0).permutation(100)]
    many = {utt: FRAMES["84-1-0000"][:5] + number for number, utt in enumerate(ids)}
    write(tmp_path / "utt2spk", "".join(f"{utt} {utt[:2]}\n" for utt in ids))
    for number in range(6):
        path = write(tmp_path / "silence" / f"{number}.wav", b"")
        soundfile.write(path, np.zeros(8000, np.int16), RATE)
    for name, source, *options in [
        ("none", write(tmp_path / "many", dump(many)), "--cmvn", "none"),
        ("speaker", tmp_path / "many", "--cmvn", "speaker"),
        ("global", tmp_path / "silence", "--cmvn", "global"),
        ("dither", tmp_path / "silence", "--cmvn", "none", "--dither", 1),
    ]:
        folders = [tmp_path / f"{name}-{num_workers}" for num_workers in (1, 3)]
        for folder, num_workers in zip(folders, (1, 3)):
            prepare(source, folder, *options, num_workers=num_workers)
        assert contents(folders[0]) == contents(folders[1])
    # In the dump's order whoever was done first, so that a training run can be repeated.
    assert_holds(tmp_path / "none-3", many)
    dithered = read_folder(tmp_path / "dither-3").values()
    assert len({tensor.tobytes() for tensor, _ in dithered}) == 6, "utterances share their noise"


def test_standard_input_and_the_default_workers(tmp_path):
    flags = ["--kaldi", "-", "--save_dir", tmp_path / "out"]
    done = run_script(SCRIPT, *flags, input=dump(FRAMES))
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert_holds(tmp_path / "out", FRAMES, 1600)


def test_prepared_json_says_how_a_folder_was_made(tmp_path, prepare, sources):
    settings = json.loads(json.dumps(fbank_settings()))
    s3prls = settings | {"full_scale": 1, "htk_compat": False}
    for name, source, options, expected in [
        ("audio", "few", [], {"cmvn": "speaker", "norm_vars": False, "fbank": settings}),
        ("global", "wav", ["--cmvn", "global"], {"cmvn": "global", "norm_vars": False}),
        ("dither", "few", ["--dither", "1"], {"fbank": settings | {"dither": 1}}),
        ("kaldi", "few_scp", ["--cmvn", "global", "--norm_vars"], {"norm_vars": True}),
        ("s3prl", "few", ["--as_s3prl"], {"cmvn": "utterance", "fbank": s3prls}),
    ]:
        prepare(sources[source], tmp_path / name, *options)
        prepared = json.loads((tmp_path / name / "prepared.json").read_text())
        expected |= {"mel_dim": 80, "max_seq_len": MAX_SEQ_LEN, "version": utils.__version__}
        expected |= {"path": str(sources[source]), "utt2spk": None}
        expected |= {"source": "kaldi", "fbank": None} if name == "kaldi" else {"source": "audio"}
        assert prepared.items() >= expected.items()
        assert prepared["unbiased_vars"] == (name == "s3prl")
        assert ("cmvn_stats" in prepared) == (name in ("global", "kaldi"))
        if name == "global":  # normalising new speech for a model takes the corpus' statistics
            together = np.concatenate(list(FRAMES.values())).astype(np.float64)
            sums, squares = prepared["cmvn_stats"]
            assert sums[-1] == len(together)
            np.testing.assert_allclose(sums[:-1], together.sum(axis=0))
            np.testing.assert_allclose(squares[:-1], np.square(together).sum(axis=0))
    assert int(utils.__version__.split(".")[0]) >= 2, "CMVN has changed its meaning after 1.0.0"


def test_another_sampling_rate(tmp_path, prepare):
    samples = speech(0.5, rate=48000)
    write(tmp_path / "in" / "a.wav", b"")
    soundfile.write(tmp_path / "in" / "a.wav", np.stack([0 * samples, samples], axis=1), 48000)
    options = ["--cmvn", "none", "--num_mel_bins", 40, "--channel", 1]
    whole = samples.astype(np.float32)
    for name, option, rate in [
        ("48k", ("--sample_rate", 48000), 48000),
        ("16k", ["--resample"], RATE),
    ]:
        prepare(tmp_path / "in", tmp_path / name, *options, *option)
        settings = fbank_settings({"sample_rate": rate, "num_mel_bins": 40})
        frames = fbank(soxr.resample(whole, 48000, rate), settings)
        assert_holds(tmp_path / name, {"a": frames}, atol=1e-3)


def test_long_utterances_are_split(tmp_path, prepare, error_of, sources):
    whole = normalised(FRAMES, GROUPS["speaker"])
    split = {}
    for utt, frames in whole.items():
        for number, start in enumerate(range(0, len(frames), MAX_SEQ_LEN)):
            split[f"{utt}_{number:05d}" if number else utt] = frames[start : start + MAX_SEQ_LEN]
    assert len(split) > len(whole)
    for name in ("flac", "scp"):
        options = ["--cmvn", "speaker", "--long_utterances", "split"]
        printed = prepare(sources[name], tmp_path / name, *options)
        assert f"{len(split)} utterances" in printed and " 0 frames beyond" in printed
        assert_holds(tmp_path / name, split, atol=1e-5)
    ids = write(tmp_path / "ids", dump({"a": FRAMES["84-1-0001"], "a_00001": FRAMES["84-1-0000"]}))
    assert "a_00001 occurs twice" in error_of(ids, tmp_path / "out", "--long_utterances", "split")


def test_a_long_recording_goes_through_in_little_memory(tmp_path):
    """Eight minutes take no more than two do, and less than its samples do."""
    peaks = []
    for minutes in (2, 8):
        path, out = tmp_path / f"{minutes}" / "a.flac", tmp_path / f"out-{minutes}"
        path.parent.mkdir()
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(np.tile(SPEECH["84-1-0000"][:8000], 120))
        code = "import prepare_data, resource, sys; prepare_data.main(sys.argv[1:]); "
        code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        options = ["--cmvn", "utterance", "--long_utterances", "split"]
        argv = arguments(path.parent, out, *options, max_seq_len=1600)
        command = [sys.executable, "-c", code, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(done.stdout.split()[-1]) << 10)
        lengths = pickle.loads((out / "lengths.pkl").read_bytes())
        assert sum(lengths.values()) == minutes * 6000 - 2 and "a_00001.pt" in lengths
    assert peaks[1] - peaks[0] < 10e6 < 8 * 60 * RATE * 2


# Bad input ----------------------------------------------------------------------------------------


def test_bad_flags(tmp_path, run, call_main, sources):
    for source, *options in [
        ("ark", "--max_seq_len", "0"),
        ("ark", "--resample"),
        ("ark", "--channel", 0),
        ("ark", "--num_mel_bins", 40),
        ("wav", "--channel", "-1"),
        ("ark", "--utt2spk", "utt2spk"),
        ("wav", "--utt2spk", "utt2spk", "--cmvn", "utterance"),
        ("wav", "--librispeech_from_kaldi", sources["ark"]),
        *[("wav", "--dither", value) for value in ("-1", "nan", "inf")],
        ("ark", "--norm_vars"),
        ("wav", "--norm_vars", "--cmvn", "none"),
        ("ark", "--as_s3prl"),
        ("wav", "--as_s3prl", "--cmvn", "speaker"),
        ("wav", "--as_s3prl", "--sample_rate", 8000),
    ]:
        done = run(sources[source], tmp_path / "out", *options)
        assert options[0] in error_line(done, SCRIPT, status=2)
        assert not (tmp_path / "out").exists()
    message = error_line(call_main(prepare_data, "--save_dir", tmp_path / "out"), SCRIPT, status=2)
    assert "--kaldi" in message and "--audio is required" in message


def test_utterances_that_do_not_fit_together_are_rejected(tmp_path, error_of):
    ark, scp = tmp_path / "feats.ark", tmp_path / "feats.scp"
    matrices = {"utA": np.ones((3, 2), np.float32), "utB": np.ones((3, 3), np.float32)}
    kaldiio.save_ark(str(ark), matrices, scp=str(scp))
    first = scp.read_text().split("\n")[0]
    for name, content, reason in [
        ("a.txt", "utA\n1 2\n.\nutB\n1 2\n.\nutA\n3 4\n.\n", "a.txt:7: utterance utA: .*twice"),
        ("b.txt", "utA\n1 2 3\n.\nutB\n1 2\n.\n", "b.txt:4: utterance utB: .* 3 .*found 2"),
        ("c.ark", ark.read_bytes(), "c.ark: utterance utB: .* 2 .*found 3"),
        ("d.scp", f"{first}\n{first}\n", "d.scp:2: utterance utA: .*twice"),
    ]:
        source = write(tmp_path / name, content)
        message = error_of(source, tmp_path / "out")
        assert re.search(reason, message), message
        assert not (tmp_path / "out").exists()


def test_bad_matrices_are_rejected_or_skipped(tmp_path, prepare, error_of):
    """From each kind of source; what damages the framing is fatal in any case."""
    good = {utt: FRAMES[utt] for utt in FEW}
    bad = {"empty": np.zeros((0, 80), np.float32), "nan": np.full((3, 80), np.nan, np.float32)}
    mixed = {FEW[0]: good[FEW[0]], **bad, FEW[1]: good[FEW[1]], FEW[2]: good[FEW[2]]}
    kaldiio.save_ark(str(tmp_path / "a.ark"), mixed, scp=str(tmp_path / "a.scp"))
    write(tmp_path / "dump", dump(mixed))
    for name in ("a.ark", "a.scp", "dump"):
        out = tmp_path / f"{name}-out"
        message = error_of(tmp_path / name, out)
        assert "utterance empty: " in message and "--skip_bad skips such" in message
        printed = prepare(tmp_path / name, out, "--skip_bad", num_workers=2)
        assert "3 utterances" in printed and "skipped utterances: 2, listed in" in printed
        assert_holds(out, good, others=["skipped.txt"], atol=1e-5)
        lines = (out / "skipped.txt").read_text().splitlines()
        assert [re.search(r"utterance (\w+): ", line)[1] for line in lines] == ["empty", "nan"]
    cut = write(tmp_path / "cut.ark", (tmp_path / "a.ark").read_bytes()[:-1])
    assert "truncated" in error_of(cut, tmp_path / "out", "--skip_bad")


def test_what_is_no_matrix_is_skipped_where_the_rest_can_be_read(tmp_path, prepare):
    good = {utt: FRAMES[utt] for utt in FEW}
    kaldiio.save_ark(str(tmp_path / "a.ark"), good, scp=str(tmp_path / "a.scp"))
    scp = (tmp_path / "a.scp").read_text()
    sources = {
        "dump": "ragged\n1 2\n1\n.\n" + dump(good) + "word\n1 b\n.\nunderscore\n1_0 2\n.\n",
        "b.scp": f"text {write(tmp_path / 'x.txt', 'abc')}\n{scp}cut {tmp_path / 'a.ark'}:99\n",
    }
    for name, text in sources.items():
        out = tmp_path / f"{name}-out"
        prepare(write(tmp_path / name, text), out, "--skip_bad", num_workers=2)
        assert_holds(out, good, others=["skipped.txt"], atol=1e-5)
        found = re.findall(r"utterance (\w+): ", (out / "skipped.txt").read_text())
        assert found == (["ragged", "word", "underscore"] if name == "dump" else ["text", "cut"])


def test_bad_audio_is_rejected_by_name_or_skipped(tmp_path, prepare, error_of):
    source, out, bad = save_speech(tmp_path / "in"), tmp_path / "out", tmp_path / "in" / "bad"
    whole = normalised(FRAMES, GROUPS["speaker"])
    write(source / ".hidden" / "x.wav", b"")
    bad.mkdir()
    soundfile.write(bad / "cut.flac", SPEECH["84-1-0000"], RATE)
    os.truncate(bad / "cut.flac", 5000)
    soundfile.write(bad / "rate.wav", SPEECH["84-1-0000"], 8000)
    soundfile.write(bad / "short.wav", np.ones(399, np.int16), RATE)
    (bad / "link.wav").symlink_to("nowhere.wav")
    reasons = {
        "cut.flac": "decoded",
        "rate.wav": "8000 .*16000 .*--resample",
        "short.wav": "399 samples.*400",
        "link.wav": "No such file",
    }
    for name, reason in reasons.items():
        message = error_of(source, out, "--pattern", f"bad/{name}")
        assert f"bad/{name}" in message and re.search(f"{reason}.*--skip_bad", message), message
    printed = prepare(source, out, "--skip_bad", num_workers=3)
    assert "skipped utterances: 4, listed in skipped.txt" in printed
    assert "ignored files (1 hidden): 1, listed in left_out.txt" in printed
    assert (out / "left_out.txt").read_text() == f"{source}/.hidden: hidden\n"
    lines = (out / "skipped.txt").read_text().splitlines()
    assert len(lines) == 4
    for name, reason in reasons.items():
        assert any(re.search(f"bad/{name}: .*{reason}", line) for line in lines), name
    # The rest is as if there had been nothing else: no bad file is in any statistics.
    assert_holds(out, whole, atol=1e-5, others=["left_out.txt", "skipped.txt"])
    # A good file is never dropped for its name, and no dataset is made of nothing.
    write(bad / "103-4-0000.flac", b"")
    assert "two files" in error_of(source, tmp_path / "twice", "--skip_bad")
    message = error_of(bad, tmp_path / "none", "--cmvn", "none", "--skip_bad")
    assert "every utterance was skipped" in message


def test_a_data_directory_with_bad_segments(tmp_path, prepare, error_of, sources):
    source, out = tmp_path / "in", tmp_path / "out"
    write(source / "wav.scp", f"rec {sources['wav']}/84/1/84-1-0001.wav\n")
    write(source / "segments", "a rec 0 1\nb rec 1 0\nc rec 1.0 1.01\nd rec 7 8\n")
    assert "segments:2: utterance b: " in error_of(source, out, "--cmvn", "none")
    prepare(source, out, "--cmvn", "none", "--skip_bad")
    frames = fbank(SPEECH["84-1-0001"][:RATE].astype(np.float32), fbank_settings())
    assert_holds(out, {"a": frames}, others=["skipped.txt"])
    lines = (out / "skipped.txt").read_text().splitlines()
    assert [re.search(r"utterance (\w)", line)[1] for line in lines] == ["b", "c", "d"]


def test_wavs_of_another_length_than_stated_are_read_and_listed(tmp_path, run):
    """Recorders write headers of a few hundred bytes too much, or only once at the start."""
    source, out = save_speech(tmp_path / "in"), tmp_path / "out"
    paths = [source / "103" / "4" / f"103-4-000{number}.wav" for number in (0, 1)]
    for path, change in zip(paths, (726, -5000)):
        content = path.read_bytes()
        stated = len(content) - 44 + change
        path.write_bytes(content[:40] + stated.to_bytes(4, "little") + content[44:])
    done = run(source, out, "--cmvn", "none", num_workers=2)
    assert done.returncode == 0, done.stderr
    lines = (out / "truncated.txt").read_text().splitlines()
    assert [f"WARNING: {line}" for line in lines] == re.findall("WARNING.*", done.stderr)
    for line, path, seconds in zip(lines, paths, ("0.30", "1.34")):
        stated = int.from_bytes(path.read_bytes()[40:44], "little")
        held = path.stat().st_size - 44
        text = f"states {stated} bytes of samples, but the file holds {held}: {seconds} s were read"
        assert line == f"{path}: its header {text}"
    assert re.search("shorter or longer than .*: 2, listed in truncated.txt", done.stdout)
    short = fbank(SPEECH["103-4-0001"][:-2500].astype(np.float32), fbank_settings())
    expected = FRAMES | {"103-4-0001": short}
    assert_holds(out, expected, others=["truncated.txt"])


# The folder ---------------------------------------------------------------------------------------


def test_what_is_wrong_costs_no_finished_dataset(tmp_path, prepare, error_of, sources):
    old = tmp_path / "old"
    prepare(sources["few"], old)
    before = contents(old)
    for source, *options, reason in [
        (tmp_path / "missing.xz", "missing.xz"),
        (write(tmp_path / "binary", bytes(99)), "binary"),
        (write(tmp_path / "nan", "utA\n1 2\n.\nutB\n1 nan\n.\n"), "nan:5"),
        (sources["wav"], "--sample_rate", 8000, "16000 Hz, expected 8000"),
        (sources["wav"], "--utt2spk", tmp_path / "gone", "gone"),
    ]:
        assert reason in error_of(source, old, *options, "--overwrite")
        assert contents(old) == before, reason
    occupied = write(tmp_path / "occupied", "not a folder")
    assert "occupied" in error_of(sources["ark"], occupied)
    assert occupied.read_text() == "not a folder"


def test_a_finished_dataset_is_replaced_only_with_overwrite(tmp_path, prepare, error_of, sources):
    out = tmp_path / "out"
    prepare(sources["wav"], out)
    before = contents(out)
    message = error_of(sources["few"], out)
    assert f"{out}: this folder holds a finished dataset" in message and "--overwrite" in message
    assert contents(out) == before
    write(out / ".DS_Store", "")  # never in the way
    prepare(sources["few_scp"], out, "--overwrite", max_seq_len=9)
    assert_holds(out, {utt: FRAMES[utt] for utt in FEW}, 9)


@pytest.mark.parametrize("name", ["model.pt", "features.json", "sub/notes.txt"])
@pytest.mark.parametrize("is_finished", [False, True])
def test_what_is_not_of_a_dataset_is_never_deleted(
    tmp_path, prepare, error_of, sources, name, is_finished
):
    out = tmp_path / "out"
    if is_finished:
        prepare(sources["few"], out)
    write(out / name, "mine")
    before = sorted(out.rglob("*"))
    for options in ([], ["--overwrite"]):
        message = error_of(sources["few"], out, *options)
        assert f"holds {name.split('/')[0]}, " in message and "--overwrite" not in message
        assert sorted(out.rglob("*")) == before and (out / name).read_text() == "mine"


def test_an_empty_folder_and_a_link_to_one_are_filled(tmp_path, prepare, sources):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to("disk/out")
    for options in ([], ["--overwrite"]):
        prepare(sources["few_scp"], tmp_path / "link", *options)
        assert (tmp_path / "link").is_symlink()
        assert_holds(tmp_path / "disk" / "out", {utt: FRAMES[utt] for utt in FEW})


@pytest.fixture
def endless(tmp_path):
    """Start a run whose source never ends -> the process and its folder."""
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)

    def feed():
        with contextlib.suppress(BrokenPipeError), open(pipe, "wb") as file:
            for number in itertools.count():
                file.write(f"endless-{number}\n".encode() + b"1.25 1.25\n" * 4000 + b".\n")

    threading.Thread(target=feed, daemon=True).start()
    argv = [sys.executable, ROOT / SCRIPT, *arguments(pipe, out, max_seq_len=50, num_workers=2)]
    process = subprocess.Popen(
        list(map(str, argv)), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    end = time.monotonic() + 60
    while len(list(tmp_path.glob("out.partial/*.pt"))) < 5:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.02)
    yield process, out
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_a_second_run_into_the_same_folder_is_rejected(endless, run, sources):
    process, out = endless
    message = error_line(run(sources["few_scp"], out), SCRIPT)
    assert f"{out}.partial: in use by another process" in message
    assert process.poll() is None and len(list(Path(f"{out}.partial").glob("*.pt"))) >= 5


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_main_process(endless, prepare, sources, signum):
    """Else they stay for ever, and write into the folder of the run that replaces theirs."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("these tests run where Ctrl-C is ignored")
    process, out = endless
    send = os.kill if signum == signal.SIGKILL else os.killpg  # Ctrl-C goes to all
    send(process.pid, signum)
    assert process.wait(30) == (130 if signum == signal.SIGINT else -signum)
    end = time.monotonic() + 10
    with pytest.raises(ProcessLookupError):  # until the last of its group is gone
        while time.monotonic() < end:
            os.killpg(process.pid, 0)
            time.sleep(0.01)
    assert "Traceback" not in process.stderr.read()
    assert Path(f"{out}.partial").exists() == (signum == signal.SIGKILL)
    assert not out.exists()
    prepare(sources["few_scp"], out)
    assert_holds(out, {utt: FRAMES[utt] for utt in FEW})


def test_a_killed_worker_and_a_full_disk_are_one_line(tmp_path, error_of, sources, monkeypatch):
    def killed(value, path, sync):
        os.kill(os.getpid(), signal.SIGKILL)

    def full(value, path, sync):
        raise OSError(28, "No space left on device", path)

    for fault, num_workers, reason in [
        (killed, 2, "a worker process was killed"),
        (full, 1, "103-4-0000.pt: No space left on device"),
        (full, 2, "103-4-0000.pt: No space left on device"),
    ]:
        monkeypatch.setattr(prepare_data, "save", fault)
        options = ["--skip_bad"]  # which is not about this
        message = error_of(sources["few"], tmp_path / "out", *options, num_workers=num_workers)
        assert re.search(reason, message), message


def test_workers_may_be_spawned_where_there_is_no_fork(tmp_path, sources):
    """As on Windows and macOS, and without the modules that Windows lacks."""
    code = """
import multiprocessing, sys
for name in ("fcntl", "resource", "pwd"):
    sys.modules[name] = None
import prepare_data
if __name__ == "__main__":
    sys.platform = "darwin"
    multiprocessing.set_start_method("spawn")
    prepare_data.main()
"""
    script, out = write(tmp_path / "script.py", code), tmp_path / "out"
    argv = [sys.executable, script, *arguments(sources["few"], out, num_workers=2)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(list(map(str, argv)), env=env, check=True)
    assert len(read_folder(out)) == len(FEW)
