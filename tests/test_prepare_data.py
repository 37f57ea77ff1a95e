"""prepare_data.py: one folder whatever the source, in the original's layout, and after any kill."""

import contextlib
import gzip
import itertools
import json
import os
import pickle
import pickletools
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import kaldiio
import numpy as np
import pytest
import soundfile
import soxr
import torch
from conftest import run_script, speech
from processes import ROOT, children, error_line, snapshot, status_of, until

import prepare_data
import utils
from formats import kaldi
from formats.fbank import CMVN_KINDS, fbank, fbank_settings

RATE = 16000
MAX_SEQ_LEN = 60  # frames of a tensor: fewer than some utterances have, more than others
SCRIPT = "prepare_data.py"

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


def save_speech(folder, utterances=SPEECH, ending="wav"):
    """In a folder of its speaker each."""
    for utt in utterances:
        path = folder / utt.split("-")[0] / f"{utt}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
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
    for utt in SPEECH:  # LibriSpeech's tree
        path = root / "flac" / "/".join(utt.split("-")[:2]) / f"{utt}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, SPEECH[utt], RATE)
    # Old corpora have names in Latin-1: those of folders are no ids.
    (root / "flac" / "84").rename(root / "flac" / os.fsdecode(b"Andr\xe9"))
    write(root / "utt2spk", "".join(f"{utt} {utt.split('-')[0]}\n" for utt in SPEECH))
    kaldiio.save_ark(str(root / "feats.ark"), FRAMES, scp=str(root / "feats.scp"))
    few = {utt: FRAMES[utt] for utt in FEW}
    kaldiio.save_ark(str(root / "few.ark"), few, scp=str(root / "few.scp"))
    write(save_speech(root / "few_and_bad", FEW) / "103" / "103-0.wav", b"no audio")
    return {
        "flac": root / "flac",
        "wav": save_speech(root / "wav"),
        "ark": root / "feats.ark",
        "scp": root / "feats.scp",
        "dump.gz": write(root / "dump.gz", gzip.compress(dump(FRAMES).encode())),
        "few": save_speech(root / "few", FEW),
        "few_and_bad": root / "few_and_bad",
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
    # What they are for, a crash of the machine, cannot be tested here; they wait for every disk.
    monkeypatch.setattr(os, "sync", lambda: None)
    monkeypatch.setattr(os, "fsync", lambda file: None)
    return lambda *args, **kw: call_main(prepare_data, *arguments(*args, **kw))


@pytest.fixture
def prepare(run):
    """The same, which must succeed -> what it printed."""

    def call(*args, **kw):
        done = run(*args, **kw)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return call


@pytest.fixture
def refused(run):
    """The same, which must fail -> its error line."""

    def call(source, save_dir, *options, **kw):
        message = error_line(run(source, save_dir, *options, **kw), SCRIPT)
        assert len(message) < 700 and message.isprintable()
        return message

    return call


def contents(folder, *but):
    return {path.name: data for path, data in snapshot(folder).items() if path.name not in but}


def read_folder(folder, *others):
    """A set, as the original reads it -> {utterance id: (array, length)}, in lengths.pkl's order.

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


# The set ------------------------------------------------------------------------------------------


def test_folder_has_the_original_layout(tmp_path, prepare):
    rng = np.random.default_rng(0)
    sizes = {"utt-2": 30, "u.3": 1, "grüße": 19, "utt-1": 20, "utt-0": 21}
    utterances = {u: rng.normal(0, 3, (n, 4)).astype(np.float32) for u, n in sizes.items()}
    source, folder = write(tmp_path / "feats", dump(utterances)), tmp_path / "new" / "train"
    printed = prepare(source, folder, max_seq_len=20)
    assert_holds(folder, utterances, 20)
    announced, result = printed.splitlines()
    for words in (str(source), "text dump", "CMVN: none", "20 frames", "1 process", str(folder)):
        assert words in announced
    for words in (
        "5 utterances, 91 frames",
        "0.00 h",
        "mel_dim 4",
        "11 frames beyond",
        "0 utterances",
    ):
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
        # To the byte: the statistics are of all frames, before truncation, in every case.
        ours, first = (contents(tmp_path / n, "prepared.json") for n in (name, "flac"))
        assert ours == first
    if cmvn != "none":
        prepare(sources["scp"], tmp_path / "vars", "--cmvn", cmvn, "--norm_vars")
        expected = normalised(FRAMES, GROUPS[cmvn], norm_vars=True)
        assert_holds(tmp_path / "vars", expected, atol=1e-5)


def test_utt2spk(tmp_path, prepare, refused, sources):
    speakers = {utt: "xyz"[number % 2] for number, utt in enumerate(SPEECH)}
    lines = [f"{utt} {speaker}\n" for utt, speaker in speakers.items()]
    utt2spk = write(tmp_path / "utt2spk", "".join([*lines, "another-utterance x\n"]))
    less = write(tmp_path / "less", "".join(lines[:2] + lines[3:]))
    for name in ("wav", "ark"):
        source, options = sources[name], ["--cmvn", "speaker", "--utt2spk"]
        printed = prepare(source, tmp_path / name, *options, utt2spk)
        assert "6 utterances, 2 speakers" in printed
        assert_holds(tmp_path / name, normalised(FRAMES, speakers.get), atol=1e-5)
        message = refused(source, tmp_path / f"{name}-less", *options, less)
        assert f"{list(SPEECH)[2]}: has no speaker in utt2spk" in message
    for content in ("".join(lines) + "\n", b"\xef\xbb\xbf" + "".join(lines).encode()):
        prepare(
            sources["ark"], tmp_path / "again", *options, write(utt2spk, content), "--overwrite"
        )
        assert contents(tmp_path / "again", "prepared.json") == contents(
            tmp_path / "ark", "prepared.json"
        )


def test_a_speaker_is_never_guessed(tmp_path, refused, sources):
    flat = write(tmp_path / "flat" / "84-1.wav", b"not even read").parent
    ark = write(tmp_path / "kaldi" / "feats.ark", sources["ark"].read_bytes())
    for source, place in [(flat, flat / "84-1.wav"), (ark, ark), ("-", "-")]:
        message = refused(source, tmp_path / "out", "--cmvn", "speaker")
        assert f"error: {place}: " in message
        assert "--utt2spk" in message and "--cmvn utterance" in message
        assert not (tmp_path / "out").exists()


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, prepare, sources, monkeypatch):
    monkeypatch.setattr(kaldi, "BLOCK_SIZE", 1)  # a job an utterance
    ids = [f"s{i % 3}-{i}" for i in np.random.default_rng(0).permutation(100)]
    many = {utt: FRAMES["84-1-0000"][:5] + number for number, utt in enumerate(ids)}
    kaldi_dump, flac = write(tmp_path / "many", dump(many)), sources["flac"]
    write(tmp_path / "utt2spk", "".join(f"{utt} {utt[:2]}\n" for utt in ids))
    for source, cmvn in [(kaldi_dump, "none"), (kaldi_dump, "speaker"), (flac, "global")]:
        folders = [tmp_path / f"{source.name}-{cmvn}-{number}" for number in (1, 3)]
        for folder, num_workers in zip(folders, (1, 3)):
            prepare(source, folder, "--cmvn", cmvn, num_workers=num_workers)
        assert contents(folders[0]) == contents(folders[1])
    # In the dump's order whoever was done first, so that a training run can be repeated.
    assert_holds(tmp_path / "many-none-3", many)


def test_standard_input_and_the_default_workers(tmp_path):
    flags = ["--librispeech_from_kaldi", "-", "--save_dir", tmp_path / "out"]
    done = run_script(SCRIPT, *flags, input=dump(FRAMES))
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    assert_holds(tmp_path / "out", FRAMES, 1600)


def test_prepared_json_tells_how_a_folder_was_made(tmp_path, prepare, sources):
    prepared = {}
    for name, source, *options in [
        ("audio", "wav"),
        ("global", "wav", "--cmvn", "global"),
        ("plain", "wav", "--cmvn", "none"),
        ("dither", "wav", "--cmvn", "none", "--dither", "1"),
        ("kaldi", "ark", "--cmvn", "utterance", "--norm_vars"),
        ("s3prl", "few", "--as_s3prl"),
    ]:
        prepare(sources[source], tmp_path / name, *options)
        text = (tmp_path / name / "prepared.json").read_text()
        assert text.count("\n") > 5, "to be read by people, too"
        prepared[name] = json.loads(text)
        wanted = {"mel_dim": 80, "max_seq_len": MAX_SEQ_LEN, "version": utils.__version__}
        wanted |= {"path": str(sources[source]), "utt2spk": None}
        assert prepared[name].items() >= wanted.items()
        assert prepared[name]["source"] == ("kaldi" if name == "kaldi" else "audio")
    cmvn = [value["cmvn"] for value in prepared.values()]
    assert cmvn == ["speaker", "global", "none", "none", "utterance", "utterance"]
    norm_vars = [name for name, value in prepared.items() if value["norm_vars"] is not False]
    assert norm_vars == ["kaldi", "s3prl"]
    assert [name for name in prepared if "unbiased_vars" in prepared[name]] == ["s3prl"]
    assert prepared["kaldi"]["fbank"] is None
    fbank = prepared["audio"]["fbank"]
    wanted = {"sample_rate": 16000, "frame_length_ms": 25, "frame_shift_ms": 10, "dither": 0}
    wanted |= {"window_type": "hamming", "num_mel_bins": 80, "use_energy": False, "low_freq": 20}
    assert fbank.items() >= (wanted | {"htk_compat": True, "preemph_coeff": 0.97}).items()
    assert prepared["dither"]["fbank"] == fbank | {"dither": 1}
    assert prepared["s3prl"]["fbank"] == fbank | {"full_scale": 1, "htk_compat": False}
    without, with_it = (read_folder(tmp_path / name) for name in ("plain", "dither"))
    differences = [np.abs(with_it[utt][0] - without[utt][0]).mean() for utt in without]
    assert min(differences) > 0 and max(differences) < 0.5
    # Normalising new speech for a model that was trained on it needs the corpus' statistics.
    together = np.concatenate(list(FRAMES.values())).astype(np.float64)
    sums, squares = prepared["global"]["cmvn_stats"]
    assert sums[-1] == len(together)
    np.testing.assert_allclose(sums[:-1], together.sum(axis=0))
    np.testing.assert_allclose(squares[:-1], np.square(together).sum(axis=0))


def test_another_sampling_rate(tmp_path, prepare):
    samples = speech(0.5, rate=48000)
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "a.wav", samples, 48000)
    options = ["--cmvn", "none", "--num_mel_bins", 40]
    prepare(tmp_path / "in", tmp_path / "out", *options, "--sample_rate", 48000)
    settings = fbank_settings({"sample_rate": 48000, "num_mel_bins": 40})
    assert_holds(tmp_path / "out", {"a": fbank(samples.astype(np.float32), settings)})
    prepared = json.loads((tmp_path / "out" / "prepared.json").read_text())
    assert prepared["mel_dim"] == prepared["fbank"]["num_mel_bins"] == 40

    stereo = np.stack([np.zeros_like(samples), samples], axis=1)
    soundfile.write(tmp_path / "in" / "a.wav", stereo, 48000)
    prepare(tmp_path / "in", tmp_path / "16k", *options, "--resample", "--channel", 1)
    half = fbank(
        soxr.resample(samples.astype(np.float32), 48000, 16000),
        fbank_settings({"num_mel_bins": 40}),
    )
    assert_holds(tmp_path / "16k", {"a": half}, atol=1e-3)


# Long utterances ----------------------------------------------------------------------------------


def test_what_is_beyond_max_seq_len_becomes_further_utterances(tmp_path, prepare, refused, sources):
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
    assert "a_00001 occurs twice" in refused(ids, tmp_path / "out", "--long_utterances", "split")


def test_a_long_recording_goes_through_in_little_memory(tmp_path):
    """Twelve minutes take no more than two do, and less than its samples alone."""
    peaks = []
    for minutes in (2, 12):
        path, out = tmp_path / f"{minutes}" / "a.flac", tmp_path / f"out-{minutes}"
        path.parent.mkdir()
        with soundfile.SoundFile(path, "w", RATE, 1) as file:
            for _ in range(minutes):
                file.write(np.tile(SPEECH["84-1-0000"][:8000], 120))
        code = "import prepare_data, resource, sys; prepare_data.main(sys.argv[1:]); "
        code += "print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        argv = ["--librispeech_from_audio", path, "--save_dir", out, "--num_workers", 1]
        argv += ["--cmvn", "utterance", "--long_utterances", "split"]
        command = [sys.executable, "-c", code, *map(str, argv)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
        peaks.append(int(done.stdout.split()[-1]) << 10)
        lengths = pickle.loads((out / "lengths.pkl").read_bytes())
        assert sum(lengths.values()) == minutes * 6000 - 2 and "a_00001.pt" in lengths
    assert peaks[1] - peaks[0] < 10e6 < 12 * 60 * RATE * 2


# Bad input ----------------------------------------------------------------------------------------


def test_bad_flags(tmp_path, run, sources):
    for source, *options in [
        ("ark", "--max_seq_len", "0"),
        ("ark", "--max_seq_len", "-1"),
        ("ark", "--max_seq_len", "many"),
        ("ark", "--max_seq_len", 10**7 + 1),
        ("ark", "--num_workers", "0"),
        ("ark", "--num_workers", "1025"),
        *[("ark", f"--{name}") for name in ("resample", "ids_from_paths")],
        ("ark", "--channel", 0),
        ("ark", "--num_mel_bins", 40),
        ("wav", "--num_mel_bins", 0),
        ("wav", "--channel", "-1"),
        ("wav", "--long_utterances", "drop"),
        ("ark", "--utt2spk", "utt2spk"),
        ("wav", "--utt2spk", "utt2spk", "--cmvn", "utterance"),
        ("wav", "--cmvn", "everything"),
        ("wav", "--librispeech_from_kaldi", sources["ark"]),
        *[("wav", "--dither", value) for value in ("-1", "nan", "inf")],
        ("wav", "--sample_rate", "0"),
        ("ark", "--norm_vars"),
        ("wav", "--norm_vars", "--cmvn", "none"),
        ("ark", "--as_s3prl"),
        ("wav", "--as_s3prl", "--cmvn", "speaker"),
        ("wav", "--as_s3prl", "--sample_rate", 8000),
    ]:
        done = run(sources[source], tmp_path / "out", *options)
        assert options[0] in error_line(done, SCRIPT, status=2)
        assert not (tmp_path / "out").exists()


def test_bad_features_are_refused_by_line_and_utterance(tmp_path, refused):
    ark, scp = tmp_path / "feats.ark", tmp_path / "feats.scp"
    matrices = {"utA": np.ones((3, 2), np.float32), "utB": np.ones((3, 3), np.float32)}
    kaldiio.save_ark(str(ark), matrices, scp=str(scp))
    first, num_workers = scp.read_text().split("\n")[0], itertools.cycle((1, 3))
    for name, content, reason in [
        ("a.txt", "utA\n1 2\n.\nutB\n1 2\n.\nutA\n3 4\n.\n", "a.txt:7: utterance utA: .*twice"),
        ("b.txt", "utA\n1 2 3\n.\nutB\n1 2\n.\n", "b.txt:4: utterance utB: .* 3 .*found 2"),
        ("c.txt", "utA\n" + "1 2\n" * 70 + "1 x\n.\n", "c.txt:72: utterance utA: "),
        ("d.txt", "utA\n1 2\n.\n../utB\n1 2\n.\n", "d.txt:4: .*'../utB'"),
        ("e.ark", ark.read_bytes(), r"e.ark: byte \d+: utterance utB: .* 2 .*found 3"),
        ("f.ark", ark.read_bytes()[:-1], r"f.ark: byte \d+: utterance utB: .*truncated"),
        ("g.scp", scp.read_text(), "g.scp:2: utterance utB: .* 2 .*found 3"),
        ("h.scp", f"{first}\n{first}\n", "h.scp:2: utterance utA: .*twice"),
    ]:
        source = write(tmp_path / name, content)
        message = refused(source, tmp_path / "out", num_workers=next(num_workers))
        assert re.search(reason, message), message
        assert not (tmp_path / "out" / "lengths.pkl").exists()
    assert not (tmp_path / "utB.pt").exists(), "an id left the folder"


def test_bad_matrices_are_refused_or_skipped(tmp_path, prepare, refused):
    """Of each kind of source; what damages the framing is fatal in any case."""
    good = {utt: FRAMES[utt] for utt in FEW}
    bad = {"empty": np.zeros((0, 80), np.float32), "nan": np.full((3, 80), np.nan, np.float32)}
    mixed = {FEW[0]: good[FEW[0]], **bad, FEW[1]: good[FEW[1]], FEW[2]: good[FEW[2]]}
    kaldiio.save_ark(str(tmp_path / "a.ark"), mixed, scp=str(tmp_path / "a.scp"))
    kaldiio.save_ark(str(tmp_path / "text.ark"), mixed, text=True)
    text = (tmp_path / "text.ark").read_text()
    write(tmp_path / "text.ark", re.sub(r"empty .*\n", "empty  [\n]\n", text))
    write(tmp_path / "dump", dump(mixed))
    for name in ("a.ark", "a.scp", "text.ark", "dump"):
        out = tmp_path / f"{name}-out"
        assert "utterance empty: " in refused(tmp_path / name, out)
        printed = prepare(tmp_path / name, out, "--skip_bad", num_workers=2)
        assert "3 utterances" in printed and "2 utterances were skipped" in printed
        assert_holds(out, good, others=["skipped.txt"], atol=1e-5)
        lines = (out / "skipped.txt").read_text().splitlines()
        assert len(lines) == 2
        assert "utterance empty: " in lines[0] and "utterance nan: " in lines[1]
    cut = write(tmp_path / "cut.ark", (tmp_path / "a.ark").read_bytes()[:-1])
    assert "truncated" in refused(cut, tmp_path / "out", "--skip_bad")
    stats = {"84": np.vstack([np.r_[np.ones(80) * 5, 40.0], np.r_[np.ones(80) * 9, 0.0]])}
    for text in (False, True):
        kaldiio.save_ark(str(tmp_path / "cmvn.ark"), stats, text=text)
        message = refused(tmp_path / "cmvn.ark", tmp_path / "out", "--skip_bad")
        assert "utterance 84: " in message and "CMVN statistics" in message


def spoil(folder):
    """Write audio files that cannot be used -> {start of the name: what is wrong with it}."""
    folder.mkdir()
    soundfile.write(folder / "cut.flac", SPEECH["84-1-0000"], RATE)
    os.truncate(folder / "cut.flac", 5000)
    soundfile.write(folder / "rate.wav", SPEECH["84-1-0000"], 8000)
    soundfile.write(folder / "stereo.wav", np.ones((9000, 2), np.int16), RATE)
    soundfile.write(folder / "short.wav", np.ones(399, np.int16), RATE)
    soundfile.write(folder / "nan.wav", np.full(900, np.nan), RATE, subtype="FLOAT")
    write(folder / "text.wav", "no sound at all\n" * 40)
    write(folder / "empty.flac", "")
    (folder / "link.wav").symlink_to("nowhere.wav")
    os.mkfifo(folder / "pipe.wav")  # not waited for
    return {
        "cut.flac": "decoded|truncated",
        "rate.wav": "8000 .*16000 .*--resample",
        "stereo.wav": "2 channels.*--channel",
        "short.wav": "399 samples.*400",
        "nan.wav": "NaN",
        "text.wav": "decoded",
        "empty.flac": "decoded",
        "link.wav": "No such file",
        "pipe.wav": "not a regular file",
    }


def test_bad_audio_is_refused_by_name_or_skipped(tmp_path, prepare, refused):
    source, out = save_speech(tmp_path / "in"), tmp_path / "out"
    bad = spoil(tmp_path / "in" / ".bad")  # hidden: not looked into
    (source / "sub").mkdir()
    others = ("prepared.json", "skipped.txt", "left_out.txt")
    for path in sorted((source / ".bad").iterdir()):
        name = next(name for name in bad if path.name.startswith(name))
        path.rename(source / "sub" / path.name)
        message = refused(source, out)
        assert f"sub/{name}" in message and re.search(bad[name], message), message
        assert not (out / "lengths.pkl").exists()
        (source / "sub" / path.name).rename(path)
    prepare(source, out, "--skip_bad")  # there is nothing to skip
    assert_holds(out, normalised(FRAMES, GROUPS["speaker"]), atol=1e-5, others=["left_out.txt"])
    assert (out / "left_out.txt").read_text() == f"{source}/.bad: hidden\n"
    whole = contents(out, *others)

    (source / ".bad").rename(source / "bad")
    printed = prepare(source, out, "--skip_bad", "--overwrite", num_workers=3)
    assert f"{len(bad)} files were skipped" in printed
    lines = (out / "skipped.txt").read_text().splitlines()
    assert len(lines) == len(bad)
    for name, reason in bad.items():
        (line,) = [line for line in lines if f"bad/{name}" in line]
        assert re.search(reason, line), line
    # What is left is as if there had been nothing else: no bad file is in any statistics.
    assert contents(out, *others) == whole
    # A good file is never dropped for its name.
    twice = write(source / "bad" / "103-4-0000.flac", b"")
    assert "two files" in refused(source, tmp_path / "twice", "--skip_bad")
    twice.unlink()

    (source / "bad").rename(source / ".bad")
    prepare(source, out, "--skip_bad", "--overwrite")
    assert contents(out, *others) == whole
    assert not (out / "skipped.txt").exists(), "the list outlives its run"


def test_all_audio_bad_is_an_error(tmp_path, refused):
    for name in ("a.wav", "b.flac"):
        write(tmp_path / "in" / "speaker" / name, b"nothing")
    for options in ([], ["--skip_bad"]):
        assert "a.wav" in refused(tmp_path / "in", tmp_path / "out", *options)
        assert not (tmp_path / "out" / "lengths.pkl").exists()


# The folder ---------------------------------------------------------------------------------------


def test_what_is_wrong_at_the_start_costs_no_finished_set(tmp_path, refused, sources):
    old = write(tmp_path / "old" / "lengths.pkl", "finished").parent
    write(old / "utt.pt", "frames")
    before = contents(old)
    (tmp_path / "folder").mkdir()
    for source, *options, reason in [
        (tmp_path / "missing.xz", "missing.xz"),
        (write(tmp_path / "empty", ""), "empty"),
        (write(tmp_path / "binary", bytes(99)), "binary"),
        (write(tmp_path / "nan", "utA\n1 nan\n.\n"), "nan:2"),
        (tmp_path / "folder", "no audio file"),
        (sources["wav"], "--sample_rate", 8000, "16000 Hz, expected 8000"),
        (sources["few_and_bad"], "103-0.wav"),
        (sources["wav"], "--utt2spk", tmp_path / "gone", "gone"),
        (sources["wav"], "--utt2spk", write(tmp_path / "utt2spk", "a\n"), "utt2spk:1"),
    ]:
        assert reason in refused(source, old, *options, "--overwrite")
        assert contents(old) == before, reason
    occupied = write(tmp_path / "occupied", "not a folder")
    for folder in (occupied, occupied / "below"):
        assert "occupied" in refused(sources["ark"], folder)
    assert occupied.read_text() == "not a folder"


def test_a_finished_set_needs_overwrite_and_is_replaced_whole(tmp_path, prepare, refused, sources):
    out = tmp_path / "out"
    prepare(sources["wav"], out)
    before = contents(out)
    message = refused(sources["few"], out)
    assert f"{out}: holds a finished set" in message and "--overwrite" in message
    assert contents(out) == before
    prepare(sources["few_scp"], out, "--overwrite", max_seq_len=9)
    assert_holds(out, {utt: FRAMES[utt] for utt in FEW}, 9)


def test_a_failed_run_may_be_begun_again_with_other_settings(tmp_path, prepare, refused, sources):
    out, bad = tmp_path / "out", write(tmp_path / "bad", "stale\n1 2\n.\nx\n1 2\n.\ny\n1 nan\n.\n")
    prepare(sources["few"], tmp_path / "whole")
    for options in ([], ["--overwrite"]):  # the second time, what is there is a finished set
        assert "bad:8" in refused(bad, out, *options, "--cmvn", "global", max_seq_len=9)
        assert (out / "stale.pt").exists() and not (out / "lengths.pkl").exists()
        prepare(sources["few"], out)
        assert contents(out) == contents(tmp_path / "whole")


def test_what_the_script_did_not_write_is_never_lost(tmp_path, prepare, refused, sources):
    source, bad = sources["few"], write(tmp_path / "bad", "stale\n1 2\n.\nx\n1 nan\n.\n")
    # Tensors of somebody else, whatever stands beside them.
    about = [None, "{}", '{"fbank": 3}', "[]", "{", ""]
    for number, prepared in enumerate(about):
        out = write(tmp_path / str(number) / "model.pt", "weights").parent
        if prepared is not None:
            write(out / "prepared.json", prepared)
        before = contents(out)
        assert str(out) in refused(source, out)
        assert contents(out) == before
    assert "model.pt" in refused(source, tmp_path / "0")

    # In an unfinished set, which is otherwise begun again.
    out, mine = tmp_path / "out", {"notes.txt": b"mine", "old-lengths.pkl": b"mine"}
    refused(bad, out)
    for name in mine:
        write(out / name, mine[name])
        before = contents(out)
        message = refused(source, out)
        assert str(out) in message and name in message and "--overwrite" in message
        assert contents(out) == before
        (out / name).unlink()

    # Beside a new set, and where one is overwritten.
    out = tmp_path / "new"
    for name in mine:
        write(out / name, mine[name])
    for options in ([], ["--overwrite"]):
        prepare(source, out, *options)
        assert contents(out).items() >= mine.items()
    read_folder(out, *mine)


# Ended too early ----------------------------------------------------------------------------------


def test_lengths_pkl_comes_last(tmp_path, prepare, sources, monkeypatch):
    """When all else is on the disk: a crash of the machine leaves nothing that looks finished."""
    events, replace = [], os.replace

    def recording(old, new):
        events.append(os.path.basename(new))
        replace(old, new)

    monkeypatch.setattr(os, "replace", recording)
    monkeypatch.setattr(os, "sync", lambda: events.append("sync"))
    prepare(sources["few_and_bad"], tmp_path / "out", "--skip_bad")
    tensors = [f"{utt}.pt" for utt in FEW]
    assert events[:7] == ["prepared.json", *tensors, *tensors]
    assert events[7:] == ["skipped.txt", "prepared.json", "sync", "lengths.pkl"]


@pytest.mark.parametrize(
    "name, options",
    [("few_and_bad", ["--skip_bad"]), ("few_scp", []), ("few_scp", ["--overwrite"])],
)
def test_killed_at_any_change_of_the_folder(tmp_path, server, prepare, sources, name, options):
    """Begun again, without --overwrite, it equals a run that nothing interrupted."""
    source, old, whole = sources[name], tmp_path / "old", tmp_path / "whole"
    again = [option for option in options if option != "--overwrite"]
    prepare(source, whole, *again)
    expected, before = contents(whole), {}
    if "--overwrite" in options:
        prepare(sources["wav"], old)
        before = contents(old)
    for number in itertools.count(1):
        out = tmp_path / str(number)
        if before:
            shutil.copytree(old, out)
        argv = arguments(source, out, *options)
        process = server.run(SCRIPT, *argv, crash=("", number, "before"))
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr
        if contents(out) != before:
            assert not (out / "lengths.pkl").exists()
            prepare(source, out, *again)
            assert contents(out) == expected, number
    assert number > 2 * len(FEW) and contents(out) == expected


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_the_main_process(tmp_path, server, prepare, sources, signum):
    """Else they stay for ever, and write beside the run that begins again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("these tests run where Ctrl-C is ignored")
    pipe, out = tmp_path / "pipe", tmp_path / "out"
    os.mkfifo(pipe)  # what comes out of it does not end
    process = server.start(SCRIPT, *arguments(pipe, out, max_seq_len=50, num_workers=2))

    def feed():
        with contextlib.suppress(BrokenPipeError), open(pipe, "wb") as file:
            for number in itertools.count():
                file.write(f"killed-{number}\n".encode() + b"1.25 1.25\n" * 4000 + b".\n")

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    until(lambda: len(list(out.glob("*.pt"))) >= 5, process)
    workers = children(process.pid)
    assert len(workers) == 2
    if signum == signal.SIGKILL:
        os.kill(process.pid, signum)
    else:  # Ctrl-C goes to all
        os.killpg(process.pid, signum)
    process.wait()
    assert process.returncode == (130 if signum == signal.SIGINT else -signum)
    assert "Traceback" not in process.stderr
    end = time.monotonic() + 5
    while any(map(is_running, workers)):
        assert time.monotonic() < end, "workers are still there"
        time.sleep(0.01)
    feeder.join(10)
    assert not (out / "lengths.pkl").exists()
    for path in out.glob("*.pt"):  # whole, if they are there
        assert torch.equal(torch.load(path), torch.full((50, 2), 1.25))
    prepare(sources["few_scp"], out)
    assert_holds(out, {utt: FRAMES[utt] for utt in FEW})


def is_running(pid):
    try:
        return status_of(pid)[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_and_a_full_disk_are_one_line(tmp_path, server, prepare, sources):
    for name, num_workers, fault, reason in [
        ("killed", 2, {"crash": (r"\.pt$", 2, "before")}, "worker process was killed"),
        ("full", 1, {"file_limit": 3000}, r"103-4-0000\.pt: File too large"),
        ("full-2", 2, {"file_limit": 3000}, r"103-4-0000\.pt: File too large"),
    ]:
        out = tmp_path / name
        argv = arguments(sources["few"], out, num_workers=num_workers)
        message = error_line(server.run(SCRIPT, *argv, **fault), SCRIPT)
        assert re.search(reason, message), message
        assert not (out / "lengths.pkl").exists()
        prepare(sources["few"], out)
