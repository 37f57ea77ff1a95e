"""s3prl's checkpoints, read and written: against its APC and its features, told again here."""

import argparse
import builtins
import functools
import json
import math
import os
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import extract_features
import load_pretrained as script
from apc_model import APCModel
from audio import FbankConfig
from load_pretrained import load_pretrained
from utils import PrenetConfig, RNNConfig, UserError

MEL, HIDDEN = 12, 16
PARAS = {"num_layers": 3, "hidden_size": HIDDEN, "dropout": 0.1, "residual": True}
SOUND = {
    "feat_type": "fbank",
    "feat_dim": MEL,
    "frame_length": 25,
    "frame_shift": 10,
    "decode_wav": False,
    "cmvn": True,
}


# s3prl, told again --------------------------------------------------------------------------------


class S3prlAPC(nn.Module):
    """Its APC: takes what stands in `paras`, has GRUs alone, and a linear postnet.

    Dropout follows every layer. A residual sum happens from the second layer on, and nowhere else.
    """

    def __init__(self, feat_dim, num_layers, hidden_size, dropout, residual):
        super().__init__()
        widths = [feat_dim] + [hidden_size] * num_layers
        pairs = zip(widths, widths[1:])
        self.rnn_layers = nn.ModuleList(nn.GRU(a, b, batch_first=True) for a, b in pairs)
        self.drop = nn.Dropout(dropout)
        self.residual = residual
        self.postnet = nn.Linear(hidden_size, feat_dim)

    def forward(self, frames, lengths):
        """(B, T, D), (B,) -> predictions (B, T, D), every layer's outputs (L, B, T, H)."""
        outputs = []
        for number, layer in enumerate(self.rnn_layers):
            packed = pack_padded_sequence(frames, lengths, batch_first=True, enforce_sorted=False)
            out = pad_packed_sequence(
                layer(packed)[0], batch_first=True, total_length=frames.size(1)
            )[0]
            out = self.drop(out)
            if number > 0 and self.residual:
                out = out + frames
            outputs.append(out)
            frames = out
        return self.postnet(frames), torch.stack(outputs)


def s3prl_features(samples, bins, frame_length=25, frame_shift=10, cmvn=True):
    """Its features: Kaldi's log-Mel energies of samples in [-1, 1], and CMVN by utterance.

    Samples are not scaled to 16-bit range, so energies are 2^30 times smaller than Kaldi's, but the
    floor under them is float32's epsilon all the same.
    """
    samples = np.asarray(samples, np.float64)
    size, shift, nfft = 16 * frame_length, 16 * frame_shift, 1
    while nfft < size:
        nfft *= 2
    window = 0.54 - 0.46 * np.cos(2 * math.pi * np.arange(size) / (size - 1))
    starts = np.arange(0, len(samples) - size + 1, shift)
    frames = samples[starts[:, None] + np.arange(size)]
    frames = frames - frames.mean(axis=1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    power = np.abs(np.fft.rfft(frames * window, nfft)) ** 2
    scale = [1127 * math.log(1 + hertz / 700) for hertz in (20, 8000)]
    corners = np.linspace(*scale, bins + 2)
    at = 1127 * np.log(1 + np.arange(nfft // 2 + 1) * 16000 / nfft / 700)
    up = (at - corners[:-2, None]) / np.diff(corners)[:-1, None]
    down = (corners[2:, None] - at) / np.diff(corners)[1:, None]
    energies = power @ np.minimum(up, down).clip(min=0).T
    features = torch.from_numpy(np.log(np.maximum(energies, 2.0**-23)))
    if cmvn:
        features = (features - features.mean(dim=0)) / (1e-10 + features.std(dim=0))
    return features.float()


def noise(samples=9600, seed=0):
    """Loud and soft noise with digital silence in it: (samples,) float32 that fit 16 bits."""
    rng = np.random.default_rng(seed)
    wave = rng.standard_normal(samples) * np.abs(np.sin(np.arange(samples) / 1500)) * 3000
    wave[samples // 2 : samples * 5 // 8] = 0
    return (wave.astype(np.int16) / 32768).astype(np.float32)


# Helpers ------------------------------------------------------------------------------------------


def s3prl_model(seed=0, feat_dim=MEL, **changes):
    torch.manual_seed(seed)
    return S3prlAPC(feat_dim, **{**PARAS, **changes}).eval()


def s3prl_dict(model, paras=None, sound=None, **more):
    """What s3prl saves of a model, besides `more` keys."""
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    moments = {"step": torch.tensor(1000.0), "exp_avg": torch.zeros(3), "exp_avg_sq": torch.ones(3)}
    group = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False, "params": [0]}
    return {
        "config": {
            "data": {"corpus": {"name": "LibriSpeech"}, "audio": {**SOUND, **(sound or {})}},
            "model": {"paras": {**PARAS, **(paras or {})}},
            "hparas": {"optimizer": {"optimizer": "Adam", "lr": 1e-4}, "epoch": 100},
        },
        "model": weights,
        "Optimizer": {"state": {0: moments}, "param_groups": [group]},
        "Step": 1000,
        "Args": argparse.Namespace(
            upstream="apc", gpu=True, seed=1337, mode=None, lr=1e-4, splits=["a", "b"], pair=(1, 2),
            nested=argparse.Namespace(name="inner", device="cuda"),
        ),
        **more,
    }  # fmt: skip


def save(path, paras=None, sound=None, legacy=False, **more):
    """Write such a file; give the model that it holds."""
    made = {**PARAS, **(paras or {})}
    model = s3prl_model(feat_dim={**SOUND, **(sound or {})}["feat_dim"], **made)
    content = s3prl_dict(model, paras, sound, **more)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return model


def batch(feat_dim=MEL):
    inputs = torch.randn(3, 20, feat_dim, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([13, 20, 1])
    return inputs * (torch.arange(20) < lengths[:, None])[..., None], lengths


@torch.no_grad()
def assert_same_outputs(ours, theirs, feat_dim=MEL):
    inputs, lengths = batch(feat_dim)
    predicted, reps = ours(inputs, lengths)
    expected, expected_reps = theirs(inputs, lengths)
    for b, n in enumerate(lengths.tolist()):  # what lies beyond is nobody's business
        torch.testing.assert_close(predicted[b, :n], expected[b, :n], rtol=0, atol=1e-5)
        torch.testing.assert_close(reps[:, b, :n], expected_reps[:, b, :n], rtol=0, atol=1e-5)


def refusal(path, **kw):
    with pytest.raises(UserError) as caught:
        load_pretrained(path, **kw)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


@pytest.fixture
def convert(call_main):
    """load_pretrained.py -> (status, stderr)."""

    def run(*argv):
        done = call_main(script, *argv)
        return done.returncode, done.stderr

    return run


@pytest.fixture
def extract(monkeypatch, call_main):
    """extract_features.py --audio -> (features, stderr) of the only file."""
    pytest.importorskip("kaldi_native_fbank")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)

    def run(checkpoint, wav, save_dir, *options):
        argv = ["--checkpoint", checkpoint, "--audio", wav, "--save_dir", save_dir]
        argv += ["--device", "cpu", "--load_data_workers", 0, *options]
        done = call_main(extract_features, *argv)
        assert done.returncode == 0, done.stderr
        return torch.load(save_dir / f"{wav.stem}.pt", weights_only=True), done.stderr

    return run


def error_line(err):
    """The one line of a refusal; warnings may precede it."""
    assert "Traceback" not in err
    lines = [line for line in err.strip().splitlines() if " - WARNING - " not in line]
    assert len(lines) == 1, err
    assert lines[0].startswith("load_pretrained.py: error: ")
    return lines[0]


def warnings_of(err):
    return [line for line in err.splitlines() if " - WARNING - " in line]


def write_wav(path, samples):
    soundfile = pytest.importorskip("soundfile")
    soundfile.write(path, samples, 16000, subtype="PCM_16")
    return path


# Reading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "paras",
    [
        {},
        {"residual": False},
        {"num_layers": 1, "residual": False},
        {"num_layers": 1},  # residual, but there is nothing that it could reach
        {"num_layers": 11, "hidden_size": 6},
        {"hidden_size": MEL, "residual": False},
        {"dropout": 0, "num_layers": 2},  # YAML makes an integer of it
    ],
    ids=str,
)
def test_loaded_model_is_s3prls(tmp_path, paras, legacy):
    theirs = save(tmp_path / "apc.ckpt", paras, legacy=legacy)
    ours = load_pretrained(tmp_path / "apc.ckpt")
    assert_same_outputs(ours, theirs)
    assert isinstance(ours, APCModel) and not ours.training
    assert ours.rnn_residual is {**PARAS, **paras}["residual"]
    assert {p.dtype for p in ours.parameters()} == {torch.float32}


def test_dropout_is_for_training_only():
    """The restatement drops after the last layer, too; where nothing trains, nobody can tell."""
    inputs, lengths = batch()
    theirs = s3prl_model(dropout=0.9, residual=False)
    assert torch.equal(theirs(inputs, lengths)[1], theirs(inputs, lengths)[1])
    assert (theirs.train()(inputs, lengths)[1][-1, 1] == 0).float().mean() > 0.8


def test_paper_size(tmp_path):
    theirs = save(tmp_path / "apc_360hr.ckpt", {"hidden_size": 64}, {"feat_dim": 80})
    assert_same_outputs(load_pretrained(tmp_path / "apc_360hr.ckpt"), theirs, 80)


@pytest.mark.parametrize("residual", [True, False])
def test_file_knows_better_than_its_neighbours(tmp_path, residual):
    """The downloads of a folder, with the config.json and the names of other models."""
    (tmp_path / "config.json").write_text(
        json.dumps({"rnn_residual": not residual, "rnn_hidden_size": 512, "rnn_type": "lstm"})
    )
    path = tmp_path / f"bs32-rhl3-rhs512-rd0-adam{'' if residual else '-res'}-ts3.pt"
    theirs = save(path, {"residual": residual})
    assert_same_outputs(load_pretrained(path), theirs)


def test_minimal_file(tmp_path):
    """What s3prl has defaults for may be missing: frames of 25 ms every 10 ms, CMVN."""
    theirs = s3prl_model()
    content = s3prl_dict(theirs)
    content = {key: content[key] for key in ("model", "config")}
    content["config"]["data"] = {"audio": {"feat_type": "fbank", "feat_dim": MEL}}
    content["config"].pop("hparas")
    torch.save(content, tmp_path / "apc.ckpt")
    theirs.load_state_dict(content["model"])
    assert_same_outputs(load_pretrained(tmp_path / "apc.ckpt"), theirs)


def test_summary_of_such_a_file(tmp_path, call_main):
    save(tmp_path / "apc.ckpt")
    done = call_main(script, tmp_path / "apc.ckpt")
    assert done.returncode == 0 and done.stderr == ""
    for word in ("GRU", str(HIDDEN), str(MEL), "yes"):
        assert word in done.stdout


# From audio ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sound",
    [
        {},
        {"frame_shift": 20},
        {"frame_length": 32, "frame_shift": 8},
        {"cmvn": False},
    ],
    ids=str,
)
def test_audio_to_features_as_s3prl_does(tmp_path, extract, sound):
    sound = {"feat_dim": 40, **sound}
    theirs = save(tmp_path / "apc.ckpt", sound=sound)
    wav = write_wav(tmp_path / "a.wav", noise())
    options = {key: sound[key] for key in ("frame_length", "frame_shift", "cmvn") if key in sound}
    frames = s3prl_features(noise(), 40, **options)
    with torch.no_grad():
        expected = theirs(frames[None], torch.tensor([len(frames)]))[1][-1, 0]
    got, err = extract(tmp_path / "apc.ckpt", wav, tmp_path / "out")
    assert not warnings_of(err), "its file says how its features are made"
    assert got.shape == expected.shape
    # The variance over T or T - 1 frames: s3prl takes the latter.
    assert float((got - expected).abs().max()) < 0.02


# Refusals -----------------------------------------------------------------------------------------


class RunsCode:
    """Pickled, it is a call of os.system."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo > '{self.marker}'",)


class Evaluates(RunsCode):
    def __reduce__(self):
        return builtins.eval, (f"open({str(self.marker)!r}, 'w').close()",)


class Reduced:
    """A harmless call of a harmless class, whose arguments or state are not."""

    def __init__(self, function, arguments, state=None):
        self.reduced = (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Subclass(argparse.Namespace):
    """A Namespace by name and nature, but with a hook that a loader would call."""

    def __setstate__(self, state):
        self.__dict__.update(state)
        open(state["marker"], "w").close()


def subclass(marker):
    made = Subclass(name="x")
    made.marker = str(marker)
    return made


HOSTILE = {
    "system": RunsCode,
    "in-a-namespace": lambda marker: argparse.Namespace(name="x", hook=RunsCode(marker)),
    "deep": lambda marker: argparse.Namespace(a=[{"b": argparse.Namespace(c=RunsCode(marker))}]),
    "eval": Evaluates,
    "namespace-subclass": subclass,
    "nested-reduce": lambda marker: Reduced(dict, ([("x", RunsCode(marker))],)),
    "argument-of-a-namespace": lambda m: Reduced(argparse.Namespace, (), {"x": Evaluates(m)}),
    "partial": lambda m: Reduced(functools.partial(os.system, f"echo > '{m}'"), ()),
    "getattr": lambda m: Reduced(getattr, (Reduced(__import__, ("os",)), "system")),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["Args", "model", "config"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_code_is_refused_and_does_not_run(tmp_path, kind, where, legacy):
    marker, path = tmp_path / "marker", tmp_path / "evil.ckpt"
    content = s3prl_dict(s3prl_model())
    if where == "Args":
        content["Args"] = HOSTILE[kind](marker)
    else:
        content[where]["extra"] = HOSTILE[kind](marker)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    refusal(path)
    assert not marker.exists()


@pytest.mark.parametrize("kind", sorted(HOSTILE.keys() - {"getattr"}))
def test_those_attacks_are_attacks(tmp_path, kind):
    pickle.loads(pickle.dumps(HOSTILE[kind](tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


def test_harmless_namespaces_do_not_open_the_door_for_later(tmp_path):
    """What is allowed for one file is not for torch.load in the user's own code."""
    save(tmp_path / "apc.ckpt")
    load_pretrained(tmp_path / "apc.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "apc.ckpt", weights_only=True)


@pytest.mark.parametrize("how", ["paras", "weights", "both"])
def test_vq_apc_is_refused_by_name(tmp_path, how):
    content = s3prl_dict(s3prl_model())
    if how != "weights":
        content["config"]["model"]["paras"]["vq"] = {
            "codebook_size": [128],
            "code_dim": [HIDDEN],
            "gumbel_temperature": {"init": 2.0, "decay": 0.99, "min": 0.5},
        }
    if how != "paras":
        content["model"]["vq_layers.0.vq_logits.weight"] = torch.zeros(128, HIDDEN)
        content["model"]["vq_layers.0.codebook_CxE.weight"] = torch.zeros(HIDDEN, 128)
    torch.save(content, tmp_path / "vq.ckpt")
    assert "vq-apc" in refusal(tmp_path / "vq.ckpt").lower().replace("_", "-")


def test_residual_at_equal_widths_is_refused(tmp_path):
    """There the first layer would be residual here, and is not in s3prl."""
    save(tmp_path / "apc.ckpt", {"hidden_size": MEL})
    assert "residual" in refusal(tmp_path / "apc.ckpt")
    save(tmp_path / "one.ckpt", {"hidden_size": MEL, "num_layers": 1})
    assert "residual" in refusal(tmp_path / "one.ckpt")


@pytest.mark.parametrize(
    "keys",
    [
        ("data",),
        ("data", "audio"),
        ("data", "audio", "feat_type"),
        ("data", "audio", "feat_dim"),
        ("model",),
        ("model", "paras"),
        ("model", "paras", "residual"),
    ],
    ids=".".join,
)
def test_missing_key_is_named(tmp_path, keys):
    content = s3prl_dict(s3prl_model())
    inner = content["config"]
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    torch.save(content, tmp_path / "apc.ckpt")
    assert keys[-1] in refusal(tmp_path / "apc.ckpt")


@pytest.mark.parametrize(
    "keys, value",
    [
        ((), None),
        ((), "apc.yaml"),
        ((), [1, 2]),
        ((), argparse.Namespace(data={}, model={})),
        (("data",), []),
        (("data", "audio"), "fbank"),
        (("data", "audio"), None),
        (("model", "paras"), None),
        (("model", "paras"), [3, 512]),
        (("data", "audio", "feat_type"), "mfcc"),
        (("data", "audio", "feat_dim"), "eighty"),
        (("data", "audio", "frame_length"), "long"),
        (("data", "audio", "frame_shift"), None),
        (("model", "paras", "dropout"), "some"),
        (("model", "paras", "dropout"), None),
    ],
    ids=str,
)
def test_senseless_config_is_refused_in_one_line(tmp_path, convert, keys, value):
    content = s3prl_dict(s3prl_model())
    if keys:
        inner = content["config"]
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
    else:
        content["config"] = value
    torch.save(content, tmp_path / "apc.ckpt")
    status, err = convert(tmp_path / "apc.ckpt")
    assert status == 1
    assert "apc.ckpt" in error_line(err)


@pytest.mark.parametrize(
    "name, weight",
    [
        ("postnet.weight", None),
        ("postnet.bias", None),
        ("rnn_layers.1.bias_hh_l0", None),
        ("rnn_layers.0.weight_hh_l0", None),
        ("postnet.weight", torch.zeros(MEL, HIDDEN, 1)),
        ("postnet.weight", torch.zeros(MEL)),
        ("postnet.weight", torch.zeros(())),
        ("postnet.weight", torch.zeros(MEL + 1, HIDDEN)),
        ("postnet.bias", torch.zeros(MEL + 1)),
        ("rnn_layers.0.weight_ih_l0", torch.zeros(3 * HIDDEN, MEL + 1)),
        ("rnn_layers.2.weight_hh_l0", torch.zeros(3 * HIDDEN, HIDDEN - 1)),
        ("rnn_layers.0.weight_ih_l1", torch.zeros(3 * HIDDEN, HIDDEN)),
        ("decoder.weight", torch.zeros(3)),
        ("postnet.bias", torch.zeros(MEL, dtype=torch.complex64)),
        ("postnet.bias", torch.zeros(MEL).to_sparse()),
        ("rnn_layers.0.weight_hh_l0", torch.zeros(1).expand(3 * 2**20, 2**20)),
        ("rnn_layers.1.bias_ih_l0", "text"),
        ("rnn_layers.1.bias_ih_l0", [0.0] * 3 * HIDDEN),
    ],
    ids=lambda value: value if isinstance(value, str) else str(getattr(value, "shape", value))[:20],
)
def test_wrong_weights_are_refused_in_one_line(tmp_path, convert, name, weight):
    content = s3prl_dict(s3prl_model())
    if weight is None:
        del content["model"][name]
    else:
        content["model"][name] = weight
    torch.save(content, tmp_path / "apc.ckpt")
    status, err = convert(tmp_path / "apc.ckpt")
    assert status == 1
    assert "apc.ckpt" in error_line(err)


@pytest.mark.parametrize("model", [None, [], "weights", {}, {1: torch.zeros(2)}], ids=str)
def test_something_else_than_weights(tmp_path, convert, model):
    content = s3prl_dict(s3prl_model()) | {"model": model}
    torch.save(content, tmp_path / "apc.ckpt")
    status, err = convert(tmp_path / "apc.ckpt")
    assert status == 1
    error_line(err)


# Writing ------------------------------------------------------------------------------------------


def write_model(path, mel=MEL, hidden=HIDDEN, layers=3, residual=True, rnn_type="gru", prenet=0,
                data="speaker", fbank=None, dropout=0.2):  # fmt: skip
    """A model as train.py leaves it, with its config.json; give the model.

    data: the CMVN of audio, or a list for config.json as it is.
    """
    torch.manual_seed(3)
    first = hidden if prenet else mel
    configs = (
        PrenetConfig(mel, hidden, prenet, 0.0) if prenet else None,
        RNNConfig(first, hidden, layers, dropout, residual, rnn_type),
    )
    model = APCModel(mel, *configs).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    flags = {
        "feature_dim": mel,
        "prenet_num_layers": prenet,
        "rnn_num_layers": layers,
        "rnn_hidden_size": hidden,
        "rnn_dropout": dropout,
        "rnn_residual": residual,
        "rnn_type": rnn_type,
        "time_shift": 3,
        "data": trained_on(data, mel, fbank) if isinstance(data, str) else data,
    }
    (path.parent / "config.json").write_text(json.dumps(flags))
    return model


def trained_on(cmvn, mel=MEL, fbank=None, source="audio"):
    """config.json's `data` for one training split."""
    made = {
        "source": source,
        "path": "LibriSpeech/train-clean-360",
        "fbank": None,
        "cmvn": cmvn,
        "mel_dim": mel,
        "max_seq_len": 1600,
        "version": "1.0.0",
    }
    if source == "audio":
        made["fbank"] = vars(FbankConfig(num_mel_bins=mel)) | (fbank or {})
    if cmvn == "global":
        made["cmvn_stats"] = np.ones((2, mel + 1)).tolist()
    return [made]


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"residual": False},
        {"layers": 5, "hidden": 20},
        {"hidden": MEL, "residual": False},
        {"mel": 40, "data": "utterance"},
    ],
    ids=str,
)
def test_round_trip(tmp_path, convert, shape):
    path, out = tmp_path / "a" / "foo.model", tmp_path / "b" / "foo.ckpt"
    out.parent.mkdir()
    model = write_model(path, **shape)
    status, err = convert(path, "--to_s3prl", out)
    assert status == 0, err

    content = torch.load(out, weights_only=True)  # as s3prl does with a torch of today
    sound, paras = content["config"]["data"]["audio"], content["config"]["model"]["paras"]
    # s3prl hands these on as keywords: none more, none less.
    assert set(paras) == set(PARAS)
    assert set(sound) == set(SOUND)
    assert sound["feat_type"] == "fbank" and sound["decode_wav"] is False
    assert sound["feat_dim"] == model.mel_dim
    assert (sound["frame_length"], sound["frame_shift"]) == (25, 10)
    assert paras["num_layers"] == len(model.rnns)
    assert paras["hidden_size"] == model.rnns[0].hidden_size
    assert paras["dropout"] == 0.2
    assert paras["residual"] is model.rnn_residual
    assert type(paras["num_layers"]) is type(paras["hidden_size"]) is type(sound["feat_dim"]) is int

    theirs = S3prlAPC(sound["feat_dim"], **paras).eval()
    theirs.load_state_dict(content["model"], strict=True)
    assert_same_outputs(model, theirs, model.mel_dim)
    weights = model.state_dict()
    for i in range(len(model.rnns)):
        for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
            assert torch.equal(
                content["model"][f"rnn_layers.{i}.{name}"], weights[f"rnns.{i}.{name}"]
            )
    assert torch.equal(content["model"]["postnet.weight"], weights["postnet.layer.weight"][:, :, 0])
    assert torch.equal(content["model"]["postnet.bias"], weights["postnet.layer.bias"])

    again = load_pretrained(out)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in weights.items()
    }
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert again.rnn_residual is model.rnn_residual


def test_s3prl_to_s3prl(tmp_path, convert):
    """Nothing is lost on the way: weights, paras, sound settings, without a warning."""
    sound = {"frame_shift": 20, "frame_length": 32}
    save(tmp_path / "apc.ckpt", {"dropout": 0.3}, sound)
    status, err = convert(tmp_path / "apc.ckpt", "--to_s3prl", tmp_path / "out.ckpt")
    assert status == 0 and not warnings_of(err), err
    before = torch.load(tmp_path / "apc.ckpt", weights_only=False)
    after = torch.load(tmp_path / "out.ckpt", weights_only=True)
    assert after["config"]["model"]["paras"] == before["config"]["model"]["paras"]
    assert after["config"]["data"]["audio"] == before["config"]["data"]["audio"]
    assert after["model"].keys() == before["model"].keys()
    assert all(torch.equal(after["model"][k], v) for k, v in before["model"].items())


CMVN_CASES = {  # training data: (cmvn in s3prl's config, words of a warning, or None for none)
    "audio-speaker": (trained_on("speaker"), True, ("utterance", "speaker")),
    "audio-global": (trained_on("global"), True, ("utterance", "corpus")),
    "audio-utterance": (trained_on("utterance"), True, None),
    "audio-none": (trained_on("none"), False, None),
    "kaldi-none": (trained_on("none", source="kaldi"), True, ("utterance",)),
    "kaldi-speaker": (trained_on("speaker", source="kaldi"), True, ("utterance", "speaker")),
    "the-original's-folder": ([None], True, ("utterance",)),
    "two-splits": (trained_on("speaker") * 2, True, ("utterance", "speaker")),
}


@pytest.mark.parametrize("case", CMVN_CASES)
def test_cmvn_follows_from_the_training_data(tmp_path, convert, case):
    data, cmvn, words = CMVN_CASES[case]
    write_model(tmp_path / "foo.model", data=data)
    status, err = convert(tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    assert status == 0, err
    content = torch.load(tmp_path / "foo.ckpt", weights_only=True)
    assert content["config"]["data"]["audio"]["cmvn"] is cmvn
    warned = warnings_of(err)
    assert bool(warned) == bool(words), err
    for word in words or ():
        assert any(word in line for line in warned), err


def test_without_any_config(tmp_path, convert):
    """The original's released weights: nobody knows how their features were made."""
    model = write_model(tmp_path / "bs32-rhl3-rhs512-rd0-adam-res-ts3.pt")
    (tmp_path / "config.json").unlink()
    path, out = tmp_path / "bs32-rhl3-rhs512-rd0-adam-res-ts3.pt", tmp_path / "out.ckpt"
    status, err = convert(path, "--to_s3prl", out)
    assert status == 0, err
    assert any("utterance" in line for line in warnings_of(err))
    content = torch.load(out, weights_only=True)
    assert content["config"]["data"]["audio"] == {**SOUND, "cmvn": True}
    assert content["config"]["model"]["paras"]["residual"] is True
    assert_same_outputs(load_pretrained(out), model)


def test_last_ckpt_with_the_config_beside_it(tmp_path, convert):
    """train.py keeps the flags in last.ckpt, but what it was trained on in config.json."""
    model = write_model(tmp_path / "foo__epoch_1.model", data="none")
    flags = json.loads((tmp_path / "config.json").read_text())
    flags.pop("data")
    saved = {"model": model.state_dict(), "optimizer": {}, "scaler": {}, "state": {"epoch": 1}}
    torch.save({**saved, "flags": flags}, tmp_path / "last.ckpt")
    status, err = convert(tmp_path / "last.ckpt", "--to_s3prl", tmp_path / "foo.ckpt")
    assert status == 0, err
    content = torch.load(tmp_path / "foo.ckpt", weights_only=True)
    assert content["config"]["data"]["audio"]["cmvn"] is False, err
    assert not warnings_of(err)


@pytest.mark.parametrize("cmvn", ["utterance", "none"])
def test_exported_model_hears_the_same_in_s3prl(tmp_path, convert, extract, cmvn):
    """From a sound file: s3prl's features and its model, against extract_features.py."""
    write_model(tmp_path / "foo.model", mel=40, data=cmvn)
    status, err = convert(tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    assert status == 0, err
    content = torch.load(tmp_path / "foo.ckpt", weights_only=True)
    sound, paras = content["config"]["data"]["audio"], content["config"]["model"]["paras"]
    theirs = S3prlAPC(sound["feat_dim"], **paras).eval()
    theirs.load_state_dict(content["model"])
    samples = noise(19200)
    samples += (np.random.default_rng(1).integers(-500, 501, 19200) / 32768).astype(np.float32)
    wav = write_wav(tmp_path / "a.wav", samples)  # nowhere quiet: the floors differ
    frames = s3prl_features(samples, 40, cmvn=sound["cmvn"])
    with torch.no_grad():
        expected = theirs(frames[None], torch.tensor([len(frames)]))[1][-1, 0]
    got, _ = extract(tmp_path / "foo.model", wav, tmp_path / "out")
    assert got.shape == expected.shape
    assert float((got - expected).abs().max()) < 0.02


@pytest.mark.parametrize(
    "shape, word",
    [
        ({"rnn_type": "lstm"}, "lstm"),
        ({"prenet": 1}, "prenet"),
        ({"prenet": 2, "rnn_type": "lstm", "residual": False}, ""),
        ({"hidden": MEL, "residual": True}, "residual"),
        ({"fbank": {"window_type": "hanning"}}, "fbank"),
        ({"fbank": {"window_type": "povey"}}, "fbank"),
        ({"fbank": {"sample_rate": 8000}}, "fbank"),
        ({"fbank": {"preemph_coeff": 0.0}}, "fbank"),
        ({"fbank": {"remove_dc_offset": False}}, "fbank"),
        ({"fbank": {"snip_edges": False}}, "fbank"),
        ({"fbank": {"low_freq": 0.0}}, "fbank"),
        ({"fbank": {"high_freq": -400.0}}, "fbank"),
        ({"fbank": {"use_power": False}}, "fbank"),
        ({"fbank": {"num_mel_bins": MEL + 1}}, "fbank"),
    ],
    ids=str,
)
def test_what_s3prl_cannot_express_is_refused(tmp_path, convert, shape, word):
    write_model(tmp_path / "foo.model", **shape)
    status, err = convert(tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    assert status == 1
    assert word in error_line(err).lower()
    assert sorted(os.listdir(tmp_path)) == ["config.json", "foo.model"]


@pytest.mark.parametrize(
    "fbank",
    [
        {"num_mel_bins": 40},
        {"frame_length_ms": 32.0, "frame_shift_ms": 8.0},
        {"dither": 1.0},
        {"sample_rate": 16000},
    ],
    ids=str,
)
def test_what_s3prl_can_express_is_not(tmp_path, convert, fbank):
    mel = fbank.get("num_mel_bins", MEL)
    write_model(tmp_path / "foo.model", mel=mel, fbank=fbank, data="utterance")
    status, err = convert(tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    assert status == 0 and not warnings_of(err), err
    sound = torch.load(tmp_path / "foo.ckpt", weights_only=True)["config"]["data"]["audio"]
    assert sound["feat_dim"] == mel
    assert sound["frame_length"] == fbank.get("frame_length_ms", 25)
    assert sound["frame_shift"] == fbank.get("frame_shift_ms", 10)


@pytest.mark.parametrize("layers", [1, 2])
def test_fewer_layers_than_its_upstream_hooks(tmp_path, convert, layers):
    """s3prl's upstream takes the outputs of layers 1, 2 (from 0) and the last: it needs three."""
    write_model(tmp_path / "foo.model", layers=layers)
    status, err = convert(tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    told = warnings_of(err) if status == 0 else [error_line(err)]
    assert any("layers" in line for line in told), "apc_local ends in an IndexError"


@pytest.mark.parametrize("flag", ["--to_s3prl", "--to_state_dict"])
def test_existing_out_is_refused(tmp_path, convert, flag):
    write_model(tmp_path / "a" / "foo.model")
    out = tmp_path / "b" / "mine"
    out.parent.mkdir()
    out.write_text("mine")
    status, err = convert(tmp_path / "a" / "foo.model", flag, out)
    assert status == 1
    assert str(out) in error_line(err)
    assert out.read_text() == "mine" and os.listdir(out.parent) == ["mine"]
    status, err = convert(tmp_path / "a" / "foo.model", flag, tmp_path / "a" / "foo.model")
    assert status == 1
    error_line(err)
    load_pretrained(tmp_path / "a" / "foo.model")


@pytest.mark.parametrize("flag", ["--to_s3prl", "--to_state_dict"])
def test_out_in_a_folder_that_is_not_there(tmp_path, convert, flag):
    write_model(tmp_path / "foo.model")
    status, err = convert(tmp_path / "foo.model", flag, tmp_path / "new" / "folder" / "out")
    assert status == 0, err
    assert load_pretrained(tmp_path / "new" / "folder" / "out", residual=True)


# --to_state_dict ----------------------------------------------------------------------------------


def state_dict_shapes(mel, hidden, layers):
    parts = {"weight_ih": None, "weight_hh": hidden, "bias_ih": 0, "bias_hh": 0}
    shapes = {}
    for i in range(layers):
        for part, width in parts.items():
            width = (hidden if i else mel) if width is None else width
            shapes[f"rnns.{i}.{part}_l0"] = (3 * hidden, width) if width else (3 * hidden,)
    return shapes | {"postnet.layer.weight": (mel, hidden, 1), "postnet.layer.bias": (mel,)}


@pytest.mark.parametrize("residual", [True, False])
def test_state_dict_from_s3prl(tmp_path, convert, residual):
    theirs = save(tmp_path / "apc.ckpt", {"residual": residual})
    out = tmp_path / "new" / "apc.pt"
    out.parent.mkdir()
    status, err = convert(tmp_path / "apc.ckpt", "--to_state_dict", out)
    assert status == 0, err
    assert sorted(os.listdir(out.parent)) == ["apc.pt", "config.json"]
    weights = torch.load(out, weights_only=True)
    assert {name: tuple(value.shape) for name, value in weights.items()} == state_dict_shapes(
        MEL, HIDDEN, 3
    )
    model = load_pretrained(out)  # needs to be told nothing
    assert model.rnn_residual is residual
    assert_same_outputs(model, theirs)
    config = json.loads((out.parent / "config.json").read_text())
    assert config["rnn_residual"] is residual and config["rnn_hidden_size"] == HIDDEN
    assert config["rnn_num_layers"] == 3 and config["feature_dim"] == MEL


def test_state_dict_keeps_how_the_features_were_made(tmp_path, convert, extract):
    sound = {"feat_dim": 40, "frame_shift": 20}
    save(tmp_path / "apc.ckpt", sound=sound)
    out = tmp_path / "new" / "apc.pt"
    out.parent.mkdir()
    status, err = convert(tmp_path / "apc.ckpt", "--to_state_dict", out)
    assert status == 0, err
    wav = write_wav(tmp_path / "a.wav", noise())
    expected, _ = extract(tmp_path / "apc.ckpt", wav, tmp_path / "f1")
    got, err = extract(out, wav, tmp_path / "f2")
    assert not warnings_of(err) and torch.equal(got, expected)
    status, err = convert(out, "--to_s3prl", tmp_path / "back.ckpt")
    assert status == 0 and not warnings_of(err), err
    back = torch.load(tmp_path / "back.ckpt", weights_only=True)
    before = torch.load(tmp_path / "apc.ckpt", weights_only=False)
    assert back["config"]["data"]["audio"] == before["config"]["data"]["audio"]
    assert all(torch.equal(back["model"][k], v) for k, v in before["model"].items())


@pytest.mark.parametrize("shape", [{}, {"rnn_type": "lstm", "prenet": 2}], ids=str)
def test_state_dict_of_our_own_models(tmp_path, convert, shape):
    """Also those that s3prl has not; --residual is then remembered."""
    model = write_model(tmp_path / "a" / "foo.model", **shape)
    (tmp_path / "a" / "config.json").unlink()
    (tmp_path / "b").mkdir()
    out = tmp_path / "b" / "foo.pt"
    status, err = convert(tmp_path / "a" / "foo.model", "--residual", "--to_state_dict", out)
    assert status == 0, err
    weights = torch.load(out, weights_only=True)
    assert list(weights) == list(model.state_dict())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights.items())
    assert_same_outputs(load_pretrained(out), model)


def test_state_dict_keeps_the_flags_of_training(tmp_path, convert):
    write_model(tmp_path / "a" / "foo.model")
    (tmp_path / "b").mkdir()
    before = json.loads((tmp_path / "a" / "config.json").read_text())
    status, err = convert(
        tmp_path / "a" / "foo.model", "--to_state_dict", tmp_path / "b" / "foo.pt"
    )
    assert status == 0, err
    after = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {key: after[key] for key in before} == before


def test_state_dict_never_takes_anothers_config(tmp_path, convert):
    write_model(tmp_path / "a" / "foo.model")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.json").write_text("mine")
    status, err = convert(
        tmp_path / "a" / "foo.model", "--to_state_dict", tmp_path / "b" / "foo.pt"
    )
    assert status == 1
    assert "config.json" in error_line(err)
    assert (tmp_path / "b" / "config.json").read_text() == "mine"
    assert os.listdir(tmp_path / "b") == ["config.json"]


def test_both_outputs_at_once_into_the_current_folder(tmp_path, convert, monkeypatch):
    write_model(tmp_path / "a" / "foo.model", data="utterance")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    status, err = convert(
        tmp_path / "a" / "foo.model", "--to_s3prl", "foo.ckpt", "--to_state_dict", "foo.pt"
    )
    assert status == 0, err
    assert sorted(os.listdir()) == ["config.json", "foo.ckpt", "foo.pt"]
    models = [load_pretrained(path).state_dict() for path in ("foo.ckpt", "foo.pt")]
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


@pytest.mark.parametrize(
    "outputs",
    [
        ["--to_s3prl", "x", "--to_state_dict", "x"],
        ["--to_state_dict", "config.json"],
        ["--to_s3prl", "y", "--to_state_dict", "there/y"],
    ],
    ids=" ".join,
)
def test_outputs_of_one_name_are_refused_before_anything_is_written(
    tmp_path, convert, monkeypatch, outputs
):
    write_model(tmp_path / "a" / "foo.model", data="utterance")
    (tmp_path / "b" / "there").mkdir(parents=True)
    (tmp_path / "b" / "there" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "b")
    status, err = convert(tmp_path / "a" / "foo.model", *outputs)
    assert status == 1
    error_line(err)
    assert os.listdir() == ["there"] and os.listdir("there") == ["config.json"]


def test_prefixes_of_data_parallel(tmp_path):
    theirs = s3prl_model(feat_dim=MEL, **PARAS)
    content = s3prl_dict(theirs)
    content["model"] = {f"module.{name}": weight for name, weight in content["model"].items()}
    torch.save(content, tmp_path / "apc.ckpt")
    assert_same_outputs(load_pretrained(tmp_path / "apc.ckpt"), theirs)
