"""extract_features.py: what it writes is what the model computes of each utterance by itself.

In every format, after every kill, from several processes; and of audio what preparing it gives.
"""

import itertools
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys

import kaldiio
import numpy as np
import pytest
import soundfile
import torch
from conftest import ROOT, error_line, make_folder, run_script, snapshot, speech
from test_load_pretrained import HIDDEN, save_model, save_transformer

import extract_features
import load_pretrained
import prepare_data
from apc_model import APCModel
from formats import audio
from formats.fbank import CMVN_KINDS, fbank_settings
from formats.fbank import fbank as compute_fbank
from load_pretrained import FeatureExtractor, layer_chooser
from utils import PrenetConfig, RNNConfig, UserError, lock_folder

SCRIPT = "extract_features.py"
MEL, SEQ_LEN = 7, 25
FRAMES = [25, 1, 13, 24, 2, 13, 8]


# Runs ---------------------------------------------------------------------------------------------


def flags(checkpoint, source, save_dir, *options):
    """The source is a prepared dataset, or audio where "--audio" is among the options."""
    kind = "--audio" if "--audio" in options else "--data_dir"
    argv = ["--checkpoint", checkpoint, kind, source, "--save_dir", save_dir, "--device", "cpu"]
    argv += ["--batch_size", 1, "--load_data_workers", 0]
    return argv + [option for option in options if option != "--audio"]


@pytest.fixture
def extract(call_main, monkeypatch):
    """Run the script in this process, which then reads audio without others."""
    monkeypatch.setattr(extract_features, "num_cores", lambda: 1)
    return lambda *args: call_main(extract_features, *flags(*args))


@pytest.fixture
def features(extract, tmp_path):
    """The same into a new folder, without any warning -> {utterance id: tensor}."""
    outs = (tmp_path / f"features-{number}" for number in itertools.count())

    def call(checkpoint, source, *options):
        out = next(outs)
        assert not warnings_of(extract(checkpoint, source, out, *options))
        return read(out)

    return call


def succeeded(result):
    assert result.returncode == 0, result.stderr
    return result


def rejected(result, *words, status=1):
    message = error_line(result, SCRIPT, status)
    assert all(str(word) in message for word in words), (words, message)


def warnings_of(result):
    return [line for line in succeeded(result).stderr.splitlines() if " - WARNING - " in line]


# Models, data, features ---------------------------------------------------------------------------


def write_model(path, data=None, mel=MEL, residual=True, **shape):
    """Write a model, and `data` in its config.json -> the reference that has its weights."""
    config = {"rnn_residual": residual} | ({} if data is None else {"data": data})
    return save_model(path, config, mel_dim=mel, residual=residual, **shape)


@torch.no_grad()
def all_layers(model, utterances):
    """{utterance id: (T, D)} -> {utterance id: (layers, T, H)}, each by itself."""
    return {
        utt_id: model(torch.as_tensor(frames)[None], torch.tensor([len(frames)]))[1][:, 0]
        for utt_id, frames in utterances.items()
    }


def last_layer(model, utterances):
    return {utt_id: reps[-1] for utt_id, reps in all_layers(model, utterances).items()}


def write_folder(path, frames=FRAMES, seq_len=SEQ_LEN, mel=MEL, **kw):
    """A prepared dataset -> {utterance id: its frames}."""
    tensors, lengths = make_folder(path, frames, mel, seq_len, **kw)
    return {name.removesuffix(".pt"): tensors[name][:length] for name, length in lengths.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dev"
    return path, write_folder(path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "foo.model"
    return path, write_model(path, prenet_layers=1)


@pytest.fixture(scope="module")
def whole(folder, model, tmp_path_factory):
    """The features of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    extract_features.main([*map(str, flags(model[0], folder[0], out))])
    return read(out)


def read(save_dir):
    """{utterance id: tensor} of a finished folder in which nothing else lies."""
    kind = json.loads((save_dir / "features.json").read_text())["format"]
    others = {"features.json", ".lock", "skipped.txt", "truncated.txt"}
    names = {path.name for path in save_dir.iterdir()} - others
    if kind == "ark":
        assert all(re.fullmatch(r"feats(\.\d)?\.ark|feats\.scp", name) for name in names), names
        found = kaldiio.load_scp(str(save_dir / "feats.scp"))
        return {utt_id: torch.from_numpy(np.array(found[utt_id])) for utt_id in found}
    assert all(name.endswith(f".{kind}") for name in names), names
    return {path.stem: read_file(path) for path in map(save_dir.joinpath, names)}


def read_file(path):
    if path.suffix == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    value = torch.load(path, weights_only=True)
    assert value.untyped_storage().nbytes() == value.nbytes, "the rest of its batch is in the file"
    return value


def times(paths):
    return {path: path.stat().st_mtime_ns for path in paths}


def assert_close(got, expected, atol=1e-5):
    """The same utterances, shapes and types, and nearly the same values."""
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def assert_equal(got, expected):
    assert_close(got, expected, atol=0)


# Features -----------------------------------------------------------------------------------------


def test_features_are_the_models_outputs_whatever_the_batch(tmp_path, features, folder):
    for shape in ({"residual": False}, {"prenet_layers": 1, "rnn_type": "lstm", "layers": 2}):
        expected = all_layers(write_model(tmp_path / "foo.model", **shape), folder[1])
        for size in (1, 3, 100):
            options = ["--layer", "all", "--batch_size", size]
            assert_close(features(tmp_path / "foo.model", folder[0], *options), expected)


def test_layers_are_numbered_from_0_and_a_prenets_output_is_named():
    reps = torch.randn(4, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    model = APCModel(3, PrenetConfig(3, 3, 1, 0.0), RNNConfig(3, 3, 3, 0.0, False))
    zero, one, two, three = reps
    chosen = {"last": three, "mean": (zero + one + two + three) / 4, "all": reps, "0": zero}
    chosen |= {"3,1,2,0": torch.stack([three, one, two, zero])}
    for name, expected in chosen.items():
        got = layer_chooser(name, model)(reps)
        assert got.shape == expected.shape and torch.allclose(got, expected), name
    for name in ("4", "top", "", "1.5", "-1", "0,", "0,,1", "0,4", "mean,0", "9" * 5000):
        with pytest.raises(UserError, match=r"last, all, mean, 0 \(the prenet's output\), 1, 2,"):
            layer_chooser(name, model)


def test_formats_hold_the_same_values(features, folder, model, whole):
    half = {utt_id: value.half() for utt_id, value in whole.items()}
    for kind, dtype, expected in (
        ("npy", "float32", whole),
        ("ark", "float32", whole),
        ("pt", "float16", half),
        ("npy", "float16", half),
    ):
        got = features(model[0], folder[0], "--format", kind, "--dtype", dtype)
        assert_equal(got, expected)


def test_an_ark_as_kaldiio_reads_it(tmp_path, extract, model, monkeypatch):
    """Kaldi wants the order of the ids' bytes, which other sorts do not give."""
    data, out = tmp_path / "data", tmp_path / "here" / "my feats" / "a,b:1"
    frames = write_folder(data)
    names = ["b-1", "B-1", "a-1-2", "a-1", "a_1", "é-1", "0"]
    for old, new in zip(frames, names):
        os.rename(data / f"{old}.pt", data / f"{new}.pt")
    table = {f"{name}.pt": length for name, length in zip(names, FRAMES)}
    (data / "lengths.pkl").write_bytes(pickle.dumps(table))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    succeeded(extract(model[0], data, "my feats/a,b:1", "--format", "ark"))
    monkeypatch.chdir(tmp_path)  # paths in the scp do not depend on the current folder
    assert_close(read(out), last_layer(model[1], dict(zip(names, frames.values()))))
    ids = [line.split(b" ")[0] for line in (out / "feats.scp").read_bytes().splitlines()]
    assert ids == sorted(name.encode() for name in names)


def test_long_recordings_go_through_by_themselves(tmp_path, features, monkeypatch):
    """In chunks, so that memory does not grow; batches hold no more frames than fit."""
    monkeypatch.setattr(extract_features, "MAX_FRAMES", 500)
    shapes, forward = [], APCModel.forward

    def recording(self, inputs, lengths):
        shapes.append(inputs.shape[:2])
        return forward(self, inputs, lengths)

    monkeypatch.setattr(APCModel, "forward", recording)
    frames = write_folder(tmp_path / "data", [5000, 70, 90, 200, 501, 240, 10, 130], 5000)
    expected = all_layers(write_model(tmp_path / "foo.model"), frames)
    for layer, choose in {"all": lambda reps: reps, "mean": lambda reps: reps.mean(dim=0)}.items():
        options = ["--layer", layer, "--batch_size", 4]
        got = features(tmp_path / "foo.model", tmp_path / "data", *options)
        assert_close(got, {utt_id: choose(reps) for utt_id, reps in expected.items()})
    assert max(b for b, _ in shapes) > 1 and max(b * t for b, t in shapes) <= 500


def test_bad_utterances_are_named(tmp_path, extract, model, folder, whole):
    """One that is not finite is written; a damaged one ends the run, and what is there is whole."""
    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder[0], data)
    frames = torch.load(data / "utt-000.pt")
    torch.save(frames.index_fill(0, torch.tensor(2), math.nan), data / "utt-000.pt")
    result = succeeded(extract(model[0], data, tmp_path / "nan", "--batch_size", 4))
    (line,) = [line for line in result.stderr.splitlines() if " - ERROR - " in line]
    assert "utt-000" in line
    bad = data / "utt-005.pt"  # four are shorter and come first
    bad.write_bytes(bad.read_bytes()[:700])
    rejected(extract(model[0], data, out), bad)
    shorter = ["utt-001", "utt-002", "utt-004", "utt-006"]
    assert_equal(read(out), {utt_id: whole[utt_id] for utt_id in shorter})


def test_a_transformers_utterances_fit_or_are_named(tmp_path, extract, monkeypatch):
    config = {"rnn_residual": False, "data": [{"source": "kaldi", "max_seq_len": 20}]}
    model = save_transformer(tmp_path / "foo.model", config)
    frames = write_folder(tmp_path / "data", [9, 25, 24, 13], mel=11)
    words = ("utt-001", "25 frames", "--long_utterances split")
    (line,) = warnings_of(extract(tmp_path / "foo.model", tmp_path / "data", tmp_path / "out"))
    assert all(word in line for word in (*words, "at most 20"))
    assert_close(read(tmp_path / "out"), last_layer(model, frames))
    monkeypatch.setattr(load_pretrained, "MAX_FRAMES", 24)
    rejected(extract(tmp_path / "foo.model", tmp_path / "data", tmp_path / "too-long"), *words)


def test_numerical_flags_are_those_of_training(tmp_path, extract, folder, model, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "tf32")
    succeeded(extract(model[0], folder[0], tmp_path / "out"))
    assert torch.backends.cudnn.rnn.fp32_precision == "ieee"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(features, folder, model):
    got = features(model[0], folder[0], "--device", "cuda")  # other kernels
    assert_close(got, last_layer(model[1], folder[1]), 1e-4)


# Rejections ---------------------------------------------------------------------------------------


def test_wrong_flags_are_rejected_by_the_parser(tmp_path, call_main):
    rows = [
        (["--batch_size=0"], "--batch_size"),
        (["--load_data_workers=-1"], "--load_data_workers"),
        (["--residual", "--no_residual"], "--no_residual"),
        (["--utt2spk=x"], "--audio"),
        (["--skip_bad"], "--audio"),
        (["--audio", "x"], "--data_dir"),
        (["--format", "ark", "--resume"], "resume"),
        (["--format", "ark", "--layer", "all"], "--layer all"),
        (["--format", "ark", "--layer", "0,2"], "--layer 0,2"),
        (["--format", "ark", "--dtype", "float16"], "float16"),
    ]
    needed = ["--checkpoint", "foo.model", "--save_dir", tmp_path / "out"]
    for options, word in rows:
        rejected(call_main(extract_features, *needed, "--data_dir", "x", *options), word, status=2)
    rejected(call_main(extract_features, *needed), "--data_dir", "--audio", status=2)
    assert not list(tmp_path.iterdir())


def test_what_is_rejected_leaves_nothing(tmp_path, extract, folder, model):
    checkpoint, data, out = model[0], tmp_path / "data", tmp_path / "out"
    shutil.copytree(folder[0], data)
    shutil.copy(checkpoint, tmp_path / "bare.model")
    make_folder(tmp_path / "larger", FRAMES, MEL + 4)
    write_folder(tmp_path / "spaced", [5], prefix="a\u00a0b")
    before = snapshot(tmp_path)
    for args, words in [
        ((tmp_path / "nowhere.model", data, out), ["nowhere.model"]),
        ((tmp_path / "bare.model", data, out), ["--residual", "--no_residual"]),
        ((checkpoint, tmp_path / "no-data", out), ["no-data"]),
        ((checkpoint, tmp_path / "larger", out), ["larger", f"is {MEL + 4}", f"reads {MEL}"]),
        ((checkpoint, tmp_path / "spaced", out, "--format", "ark"), ["a\\xa0b-000", "spaces"]),
        ((checkpoint, data, out, "--layer", 4), ["--layer 4", "0 (the prenet's output), 1, 2, 3,"]),
        ((checkpoint, data, out, "--device", "mps"), ["--device mps"]),
        ((checkpoint, data, data, "--resume"), [data, "prepared dataset"]),  # with the same names
    ]:
        rejected(extract(*args), *words)
        assert snapshot(tmp_path) == before and not out.exists(), args


# Interruptions ------------------------------------------------------------------------------------

CRASH = """
import itertools, os, signal

count, replace = itertools.count(1), os.replace

def crashing(source, target):
    if target.endswith(".npy") and next(count) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = crashing
"""


def test_a_killed_run_resumes(tmp_path, extract, folder, model, whole, monkeypatch):
    """What has its final name is whole, stays, and does not go through the model again."""
    out, argv = tmp_path / "out", [model[0], folder[0], tmp_path / "out", "--format", "npy"]
    (tmp_path / "sitecustomize.py").write_text(CRASH)
    killed = run_script(SCRIPT, *flags(*argv), env={"PYTHONPATH": str(tmp_path)})
    assert killed.returncode == -signal.SIGKILL
    before = times(out.glob("*.npy"))
    assert len(before) == 3
    for path in before:
        assert torch.equal(read_file(path), whole[path.stem])
    fed, forward = [], APCModel.forward

    def counting(self, inputs, lengths):
        fed.extend(lengths)
        return forward(self, inputs, lengths)

    monkeypatch.setattr(APCModel, "forward", counting)
    succeeded(extract(*argv, "--resume"))
    assert_equal(read(out), whole)
    assert times(before) == before and len(fed) == len(FRAMES) - 3


def test_resume_makes_what_is_missing(tmp_path, extract, model, folder, whole):
    out = tmp_path / "out"
    argv = [model[0], folder[0], out, "--resume"]
    succeeded(extract(*argv))  # of nothing: it starts
    before = times(out.iterdir())
    succeeded(extract(*argv))  # of a finished run: it touches nothing
    assert times(out.iterdir()) == before
    (out / "utt-001.pt").unlink()
    (out / "utt-003.pt").write_bytes(b"")  # as a crash of the machine may leave it
    succeeded(extract(*argv))
    assert_equal(read(out), whole)
    kept = [path for path in before if path.stem not in ("utt-001", "utt-003")]
    assert times(kept) == {path: before[path] for path in kept}


def test_resume_with_other_flags_is_rejected(tmp_path, extract, folder, model):
    """Else half of the features would be of another kind. What counts is what the files hold."""
    checkpoint, data, out = tmp_path / "foo.model", folder[0], tmp_path / "out"
    write_model(checkpoint, prenet_layers=1)
    write_model(tmp_path / "other" / "foo.model", prenet_layers=2)
    succeeded(extract(checkpoint, data, out))
    (out / "utt-003.pt").unlink()
    write_folder(tmp_path / "elsewhere", seed=1)
    before = snapshot(out)
    for args, word in [
        ((checkpoint, data, out, "--layer", 0), "layer"),
        ((checkpoint, data, out, "--dtype", "float16"), "dtype"),
        ((checkpoint, data, out, "--format", "npy"), "format"),
        ((checkpoint, data, out, "--no_residual"), "residual"),
        ((checkpoint, tmp_path / "elsewhere", out), "elsewhere"),
        ((tmp_path / "other" / "foo.model", data, out), "weights"),
    ]:
        rejected(extract(*args, "--resume"), word, "--resume needs the same")
        assert snapshot(out) == before
    write_folder(tmp_path / "prepared")
    of_prepared = checkpoint, tmp_path / "prepared", tmp_path / "of-prepared"
    succeeded(extract(*of_prepared))
    (tmp_path / "prepared" / "prepared.json").write_text('{"cmvn": "utterance"}')
    rejected(extract(*of_prepared, "--resume"), "cmvn was None", "and is 'utterance' now")
    (tmp_path / "link").symlink_to(data)
    succeeded(extract(model[0], tmp_path / "link", out, "--resume"))  # the same by other names
    assert len(read(out)) == len(FRAMES)


def test_other_features_are_neither_lost_nor_taken_for_ours(tmp_path, extract, folder, model):
    argv, about = [model[0], folder[0]], tmp_path / "pt" / "features.json"
    for kind, other in (("pt", "npy"), ("npy", "ark"), ("ark", "ark")):
        out = tmp_path / kind
        succeeded(extract(*argv, out, "--format", kind))
        before = snapshot(out)
        rejected(extract(*argv, out, "--format", other), out)
        assert snapshot(out) == before
    about.write_text("[]")
    rejected(extract(*argv, tmp_path / "pt", "--resume"), about)
    about.unlink()
    rejected(extract(*argv, tmp_path / "pt", "--resume"), "holds files like utt-00")


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path, extract, folder, model):
    lock = lock_folder(tmp_path)
    rejected(extract(model[0], folder[0], tmp_path), tmp_path, "in use by another process")
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    lock.release()


@pytest.mark.parametrize("kind", ["pt", "npy", "ark"])
def test_a_full_disk_ends_the_run_in_one_line(tmp_path, extract, folder, model, kind):
    """Imitated by a limit on files' sizes. What has its final name is whole."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        result = extract(model[0], folder[0], tmp_path, "--format", kind)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    rejected(result, tmp_path, f".{kind}", "File too large")
    assert not (tmp_path / "feats.scp").exists()
    for path in tmp_path.glob("*.[pn]*[ty]"):
        read_file(path)


# Audio --------------------------------------------------------------------------------------------

CUT = 80  # max_seq_len of what the models were trained on
SPEECH = {"84-121-0000": 0.7, "84-121-0001": 0.4, "84-121-0002": 1.3, "1272-5-0000": 0.5}  # seconds


def write_sound(path, samples, rate=16000):
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """A tree like LibriSpeech's, with a .wav in it."""
    root = tmp_path_factory.mktemp("audio") / "dev"
    for seed, (utt_id, seconds) in enumerate(SPEECH.items()):
        ending = "wav" if utt_id.endswith("1") else "flac"
        write_sound(root / utt_id.split("-")[0] / f"{utt_id}.{ending}", speech(seconds, seed))
    return root


@pytest.fixture(scope="module")
def trained(recordings, tmp_path_factory):
    """{name: (a model trained on the recordings cut to CUT frames, the recordings uncut)}.

    All models have the same weights.
    """
    found = {}
    kinds = {cmvn: ["--cmvn", cmvn] for cmvn in CMVN_KINDS}
    kinds |= {"vars": ["--cmvn", "global", "--norm_vars"], "s3prl": ["--as_s3prl"]}
    for name, options in kinds.items():
        here = tmp_path_factory.mktemp(name)
        uncut = prepare(recordings, here / "uncut", *options)
        made = json.loads((uncut / "prepared.json").read_text())
        write_model(here / "foo.model", [made | {"max_seq_len": CUT}], mel=80)
        found[name] = here / "foo.model", uncut
    return found


def prepare(source, save_dir, *options):
    argv = ["--audio", source, "--save_dir", save_dir, "--num_workers", 1, "--max_seq_len", 200]
    prepare_data.main([*map(str, [*argv, *options])])
    return save_dir


def test_audio_gives_what_preparing_it_gives(features, recordings, trained, monkeypatch):
    """A file by itself, too, without its speaker's other speech; and where it is read in blocks.

    From Python the same, of a file and of samples.
    """
    found, wav = {}, recordings / "84" / "84-121-0001.wav"
    for cmvn, (checkpoint, uncut) in trained.items():
        expected = features(checkpoint, uncut, "--batch_size", 3)
        found[cmvn] = features(checkpoint, recordings, "--audio", "--batch_size", 3)
        assert_close(found[cmvn], expected)
        assert len(expected["84-121-0002"]) == 128 > CUT
        if cmvn == "speaker":  # of whom this is all the speech
            expected = features(*trained["utterance"])
        got = features(checkpoint, wav, "--audio")
        assert_close(got, {"84-121-0001": expected["84-121-0001"]})
        extractor, samples = FeatureExtractor(checkpoint), soundfile.read(wav, dtype="int16")[0]
        of_path = extractor(str(wav))
        for x in (of_path, extractor(samples, 16000), extractor(samples / 32768, 16000)):
            assert_close({"84-121-0001": x}, got)
        with monkeypatch.context() as patch:
            patch.setattr(extract_features, "MAX_FRAMES", 50)
            patch.setattr(audio, "BLOCK_SIZE", 3000)
            assert_close(features(checkpoint, recordings, "--audio"), found[cmvn])
            assert_close({"x": extractor(str(wav))}, {"x": of_path})
    for one, other in itertools.combinations(found.values(), 2):  # else one may pass for another
        assert float((one["84-121-0000"] - other["84-121-0000"]).abs().max()) > 1e-3


def test_the_training_datas_fbank_and_variance_are_used(tmp_path):
    for changes, options in (
        ({"frame_shift_ms": 20.0, "num_mel_bins": 40}, {"norm_vars": False}),
        ({"window_type": "povey", "htk_compat": False}, {}),  # from before there was norm_vars
        ({"sample_rate": 8000, "num_mel_bins": 23}, {"norm_vars": True, "unbiased_vars": True}),
    ):
        fbank = fbank_settings(changes)
        data = {"source": "audio", "fbank": fbank, "cmvn": "utterance"} | options
        model = write_model(tmp_path / "foo.model", [data], mel=fbank["num_mel_bins"])
        samples = speech(0.5, rate=int(fbank["sample_rate"]))
        frames = compute_fbank(samples.astype(np.float32), fbank).astype(np.float64)
        frames -= frames.mean(axis=0)
        if options.get("norm_vars", True):
            frames /= frames.std(axis=0, ddof=options.get("unbiased_vars", 0))
        got = FeatureExtractor(tmp_path / "foo.model")(samples, fbank["sample_rate"])
        assert_close({"a": got}, last_layer(model, {"a": frames.astype(np.float32)}), 1e-4)


def test_dither_is_that_of_the_utterance_id(tmp_path, extract):
    """In Python the same as by the script."""
    wav = write_sound(tmp_path / "a b.wav", speech(0.5))
    data = {"source": "audio", "fbank": fbank_settings({"dither": 1.0}), "cmvn": "utterance"}
    write_model(tmp_path / "foo.model", [data], mel=80)
    extractor = FeatureExtractor(tmp_path / "foo.model")
    succeeded(extract(tmp_path / "foo.model", wav, tmp_path / "out", "--audio"))
    got = read(tmp_path / "out")
    assert_close(got, {"a_b": extractor(wav)})
    other = extractor(write_sound(tmp_path / "c.wav", speech(0.5)))
    assert float((got["a_b"] - other).abs().max()) > 1e-3


def test_a_model_of_unknown_features(tmp_path, extract, features, recordings, trained):
    """It gets the original's settings and mean by speaker, and a warning that this is a guess."""
    expected = features(trained["speaker"][0], recordings, "--audio")
    kaldi = {"source": "kaldi", "path": "feats.scp", "fbank": None, "cmvn": "none", "mel_dim": 80}
    for number, data in enumerate(([kaldi | {"cmvn": "speaker"}], [None], None)):
        out = tmp_path / f"{number}"
        write_model(tmp_path / "foo.model", data, mel=80)
        (line,) = warnings_of(extract(tmp_path / "foo.model", recordings, out, "--audio"))
        assert "not known" in line and "original's fbank" in line
        assert_equal(read(out), expected)


def test_flags_on_audio_are_those_of_preparing(tmp_path, extract, features, recordings, trained):
    checkpoint, stereo, table = trained["speaker"][0], tmp_path / "stereo", tmp_path / "utt2spk"
    table.write_text("".join(f"{utt} {who}\n" for utt, who in zip(SPEECH, "abab")))
    for seed, name in enumerate(("anna", "ben")):
        sound = speech(0.5, seed, 48000)
        write_sound(stereo / name / "a.wav", np.stack([0 * sound, sound], axis=1), 48000)
    of_stereo = ["--resample", "--channel", 1, "--ids_from_paths"]
    for source, speakers, *options in [
        (recordings, "2 (a, b), 2 utterances each, 0.0003", "--utt2spk", table),
        (stereo, "2 (anna, ben), 1 utterances each", *of_stereo),
    ]:
        out = tmp_path / f"{source.name}-features"
        announced = succeeded(extract(checkpoint, source, out, "--audio", *options)).stdout
        assert f"speakers: {speakers}" in announced
        uncut = prepare(source, tmp_path / f"{source.name}-uncut", *options)
        assert_close(read(out), features(checkpoint, uncut))
    assert sorted(read(out)) == ["anna-a", "ben-a"]
    result = extract(checkpoint, stereo, out, "--audio", *of_stereo, "--channel", 0, "--resume")
    rejected(result, "channel was 1", "and is 0 now")
    result = extract(checkpoint, stereo / "anna" / "a.wav", tmp_path / "out", "--audio", *options)
    assert "a.wav: treated as one speaker" in succeeded(result).stderr


def test_audio_that_is_rejected_leaves_nothing(tmp_path, extract, recordings, trained):
    """What the message advises is a flag of this script: it has no --cmvn."""
    checkpoint, out, table = trained["speaker"][0], tmp_path / "out", tmp_path / "utt2spk"
    flat = write_sound(tmp_path / "flat" / "a.wav", speech(0.5)).parent
    fast = write_sound(tmp_path / "fast.wav", np.zeros((9000, 2)), 48000)
    write_sound(tmp_path / "splits" / "dev-clean" / "84" / "84-1.wav", speech(0.5))
    table.write_text("84-121-0000 a\n")
    for args, words in [
        ((checkpoint, "", out), ["no such file"]),
        ((checkpoint, flat, out), [flat, "--utt2spk"]),
        ((checkpoint, fast, out), [fast, "--resample", "--channel"]),
        ((checkpoint, tmp_path / "splits", out), ["dev-clean", "--utt2spk"]),
        ((checkpoint, recordings, out, "--utt2spk", table), ["1272-5-0000"]),
        ((trained["none"][0], recordings, out, "--utt2spk", table), [table, "--cmvn none"]),
    ]:
        result = extract(*args, "--audio")
        rejected(result, *words)
        assert not out.exists() and "--cmvn utterance" not in result.stderr, args


def test_skip_bad_lists_what_is_skipped_and_truncated_files_are_read(tmp_path, extract, trained):
    """A WAV that is shorter than its header states, as tablets write them."""
    root, out = tmp_path / "in" / "84", tmp_path / "out"
    good, short = (write_sound(root / f"{name}.wav", speech(0.5)) for name in "ab")
    short.write_bytes(short.read_bytes()[:-600])
    (root / "c.wav").write_text("no audio")
    result = extract(trained["utterance"][0], root.parent, out, "--audio", "--skip_bad")
    last = succeeded(result).stdout.splitlines()[-1]
    assert "2 utterances written" in last and "1 recordings in skipped.txt" in last
    (warning,) = warnings_of(result)
    assert "16000 bytes" in warning and "15400" in warning
    (line,) = (out / "truncated.txt").read_text().splitlines()
    assert line in warning and str(short) in line
    (line,) = (out / "skipped.txt").read_text().splitlines()
    assert str(root / "c.wav") in line
    assert {utt_id: len(x) for utt_id, x in read(out).items()} == {"a": 48, "b": 46}
    rejected(extract(trained["utterance"][0], root, tmp_path / "x", "--audio"), root / "c.wav")


def test_samples_from_python_are_never_misread(tmp_path, recordings, trained):
    checkpoint = trained["utterance"][0]
    extractor, samples = FeatureExtractor(checkpoint, layer=0), speech(0.5)
    for bad, words in [
        ((samples,), "sampling rate of 16000 Hz"),
        ((samples, 8000), "resample=True"),
        ((samples.astype(float), 16000), r"\[-1, 1\]"),
        ((samples * np.nan, 16000), r"\[-1, 1\]"),
        ((samples.astype(np.int64), 16000), "int16"),
        ((np.stack([samples, samples]), 16000), "one channel"),
        ((write_sound(tmp_path / "a.wav", samples, 8000),), "8000 Hz.*resample=True"),
        (("nowhere.wav",), "nowhere.wav"),
        ((write_sound(tmp_path / "b.wav", np.zeros((9000, 2))),), "pass one channel's samples"),
    ]:
        with pytest.raises((UserError, OSError), match=words):
            extractor(*bad)
    resampling = FeatureExtractor(checkpoint, layer="all", resample=True)
    assert_close({"x": resampling(tmp_path / "a.wav")}, {"x": resampling(samples, 8000)})
    assert resampling(samples, 8000).shape == (3, 98, HIDDEN)


COUNT_OPENS = """
import soundfile

open_file = soundfile.SoundFile.__init__

def opening(self, *args, **options):
    with open({log!r}, "a") as log:
        log.write("x")
    open_file(self, *args, **options)

soundfile.SoundFile.__init__ = opening
"""


def test_several_processes_share_the_work_and_write_the_features_of_one(
    tmp_path, features, trained, recordings
):
    """Files are opened no more often, and what was done is said once."""
    log, out = tmp_path / "log", tmp_path / "out"
    (tmp_path / "sitecustomize.py").write_text(COUNT_OPENS.format(log=str(log)))
    argv = flags(trained["speaker"][0], recordings, out, "--audio", "--load_data_workers", 1)
    argv += ["--format", "ark", "--batch_size", 4]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    env = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / SCRIPT), *map(str, argv)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = succeeded(done).stdout.splitlines()
    assert [line for line in lines if "features of" in line] == [lines[-1]]
    assert "features of 4 utterances written" in lines[-1]
    assert_close(read(out), features(trained["speaker"][0], recordings, "--audio"))
    assert len(log.read_text()) == 2 * len(SPEECH)


def test_data_prepared_in_another_way_cause_a_warning(tmp_path, extract):
    """Of the datasets that the model was trained on the first one counts."""
    made = {"source": "audio", "path": "a", "fbank": fbank_settings(), "cmvn": "speaker"}
    write_model(tmp_path / "foo.model", [made, made | {"source": "kaldi"}])
    write_folder(tmp_path / "data", [5])
    (tmp_path / "data" / "prepared.json").write_text(json.dumps(made | {"cmvn": "none"}))
    (line,) = warnings_of(extract(tmp_path / "foo.model", tmp_path / "data", tmp_path / "out"))
    assert "cmvn is" in line and "none" in line and "speaker" in line
    assert list(read(tmp_path / "out")) == ["utt-000"]
