"""formats/s3prl.py and the conversions: against s3prl's APC and its features, restated here."""

import argparse
import json
import math
import os
import re
from functools import partial

import numpy as np
import pytest
import torch
from conftest import Hostile, error_line, snapshot, speech
from test_audio import write
from test_fbank import PREPARED, reference_fbank
from test_load_pretrained import assert_same_outputs, save_model
from torch import nn

import extract_features
import load_pretrained as script
import prepare_data
from load_pretrained import load_pretrained

MEL, HIDDEN, LAYERS = 12, 16, 3
PARAS = {"num_layers": LAYERS, "hidden_size": HIDDEN, "dropout": 0.1, "residual": True}
SOUND = {
    "feat_type": "fbank",
    "feat_dim": MEL,
    "frame_length": 25,
    "frame_shift": 10,
    "decode_wav": False,
    "cmvn": True,
}
SAMPLES = speech(1.2)
SAMPLES[4800:6000] = 0  # there the energies are at their floor


# s3prl, restated ----------------------------------------------------------------------------------


class S3prlAPC(nn.Module):
    """Its APC: built from the keywords in `paras`, of GRU layers and a linear postnet.

    Dropout follows every layer. A residual sum happens from the second layer on, and nowhere else.
    With `vq` it is VQ-APC: each group of the last layer's units is replaced, for the prediction, by
    the row of its codebook that has the largest logit.
    """

    def __init__(self, feat_dim, num_layers, hidden_size, dropout, residual, vq=None):
        super().__init__()
        sizes = [feat_dim] + [hidden_size] * num_layers
        pairs = zip(sizes, sizes[1:])
        self.rnn_layers = nn.ModuleList(nn.GRU(a, b, batch_first=True) for a, b in pairs)
        self.drop = nn.Dropout(dropout)
        self.residual = residual
        self.postnet = nn.Linear(hidden_size, feat_dim)
        self.code_dims = vq["code_dim"] if vq else []
        if vq:
            self.vq_layers = nn.ModuleList()
            for size, dim in zip(vq["codebook_size"], vq["code_dim"]):
                group = nn.Module()
                group.vq_logits = nn.Linear(dim, size)
                group.codebook_CxE = nn.Linear(size, dim, bias=False)
                self.vq_layers.append(group)

    def forward(self, frames, lengths=None):
        """(B, T, D) -> predictions (B, T, D), every layer's outputs (L, B, T, H)."""
        outputs = []
        for number, layer in enumerate(self.rnn_layers):
            out = self.drop(layer(frames)[0])
            frames = out + frames if number > 0 and self.residual else out
            outputs.append(frames)
        if self.code_dims:
            codes = []
            for group, part in zip(self.vq_layers, frames.split(self.code_dims, dim=-1)):
                logits = group.vq_logits(part)
                one_hot = (logits == logits.amax(dim=-1, keepdim=True)).float()
                codes.append(group.codebook_CxE(one_hot))
            frames = torch.cat(codes, dim=-1)
        return self.postnet(frames), torch.stack(outputs)


# torchaudio's, whose Kaldi fbank s3prl calls with what is in `sound`
DEFAULTS = {
    **{"preemphasis_coefficient": 0.97, "low_freq": 20.0, "high_freq": 0.0},
    **{"remove_dc_offset": True, "snip_edges": True, "use_power": True, "use_log_fbank": True},
}


def s3prl_frames(samples, sound):
    """int16 (samples,) at 16 kHz -> (T, D): log-Mel frames with CMVN, all in float32 as there.

    The samples are taken in [-1, 1]: energies are 2^30 times smaller than Kaldi's of 16-bit
    integers, but the floor under them is the same.
    """
    sound = DEFAULTS | sound
    wave = torch.from_numpy(samples) / 32768
    window, shift = (int(16 * sound[name]) for name in ("frame_length", "frame_shift"))
    size = 2 ** (window - 1).bit_length()
    if not sound["snip_edges"]:  # it continues in the mirror
        count, before = (len(wave) + shift // 2) // shift, window // 2 - shift // 2
        end = (count - 1) * shift + window
        wave = torch.cat([wave[:before].flip(0), wave, wave.flip(0)])[:end]
    frames = wave.unfold(0, window, shift)
    if sound["remove_dc_offset"]:
        frames = frames - frames.mean(dim=1, keepdim=True)
    previous = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
    frames = frames - sound["preemphasis_coefficient"] * previous
    spectrum = torch.fft.rfft(frames * torch.hamming_window(window, periodic=False), size).abs()
    if sound["use_power"]:
        spectrum = spectrum**2

    def mel(hertz):
        return 1127 * torch.log1p(torch.as_tensor(hertz) / 700)

    high = sound["high_freq"] + (8000 if sound["high_freq"] <= 0 else 0)
    edges = torch.linspace(mel(sound["low_freq"]), mel(high), sound["feat_dim"] + 2)[:, None]
    points = mel(torch.arange(size // 2) * 16000 / size)  # without the last of the spectrum
    rising = (points - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - points) / (edges[2:] - edges[1:-1])
    frames = spectrum[:, :-1] @ torch.minimum(rising, falling).clamp(min=0).T
    if sound["use_log_fbank"]:
        frames = frames.clamp(min=torch.finfo().eps).log()
    return (frames - frames.mean(0)) / (1e-10 + frames.std(0)) if sound["cmvn"] else frames


@torch.no_grad()
def s3prl_outputs(model, sound, samples):
    """int16 (samples,) -> predictions (T, D), the last layer's outputs (T, H)."""
    frames = s3prl_frames(samples, sound)
    predicted, reps = model(frames[None])
    return predicted[0], reps[-1, 0]


# Helpers ------------------------------------------------------------------------------------------


def s3prl_file(path, paras=None, sound=None, edit=lambda content: None, legacy=False):
    """Write what s3prl saves of a model, after `edit` of it -> the model."""
    paras, sound = PARAS | (paras or {}), SOUND | (sound or {})
    torch.manual_seed(0)
    model = S3prlAPC(sound["feat_dim"], **paras).eval()
    content = {
        "config": {
            "data": {"corpus": {"name": "LibriSpeech"}, "audio": sound},
            "model": {"paras": paras},
        },
        "model": dict(model.state_dict()),
        "Optimizer": {"state": {0: {"step": torch.tensor(1000.0)}}, "param_groups": [{"lr": 1e-4}]},
        "Step": 1000,
        "Args": argparse.Namespace(
            mode=None, pair=(1, 2), nested=argparse.Namespace(device="cuda")
        ),
    }
    edit(content)
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return model


def from_export(path):
    """A file for s3prl -> (its model as s3prl builds it, settings of its features)."""
    content = torch.load(path, weights_only=True)  # as s3prl does with a torch of today
    sound, paras = content["config"]["data"]["audio"], content["config"]["model"]["paras"]
    model = S3prlAPC(sound["feat_dim"], **paras).eval()
    model.load_state_dict(content["model"])
    return model, sound


def trained_on(cmvn, source="audio", options=None, **fbank):
    """config.json's `data` for one training split."""
    made = {"source": source, "path": "LibriSpeech/train-clean-360", "fbank": None, "cmvn": cmvn}
    made |= options or {}
    if source == "audio":
        made["fbank"] = PREPARED | {"num_mel_bins": MEL} | fbank
    if cmvn == "global":
        made["cmvn_stats"] = np.ones((2, fbank.get("num_mel_bins", MEL) + 1)).tolist()
    return [made | {"mel_dim": MEL, "max_seq_len": 1600, "version": "1.0.0"}]


MEAN_ONLY, AS_S3PRL = {"norm_vars": False}, {"norm_vars": True, "unbiased_vars": True}


def our_model(path, data=None, residual=True, **shape):
    """A model as train.py leaves it, with its config.json -> the reference."""
    config = {"rnn_dropout": 0.2, "rnn_residual": residual, "time_shift": 3}
    config["data"] = data or trained_on("speaker")
    return save_model(path, config, **({"mel_dim": MEL} | shape), residual=residual)


def warnings_of(done):
    assert done.returncode == 0, done.stderr
    return "\n".join(line for line in done.stderr.splitlines() if " - WARNING - " in line)


@pytest.fixture
def convert(call_main):
    """load_pretrained.py -> its warnings."""
    return lambda *argv: warnings_of(call_main(script, *argv))


@pytest.fixture
def reject(call_main):
    """load_pretrained.py -> the line with which it ends; warnings may precede it."""
    return lambda *argv: error_line(call_main(script, *argv), "load_pretrained.py")


@pytest.fixture
def extract(monkeypatch, call_main):
    """extract_features.py --audio, of a.wav -> (features, warnings)."""
    monkeypatch.setattr(extract_features, "num_cores", lambda: 1)

    def run(checkpoint, wav, save_dir):
        argv = ["--checkpoint", checkpoint, "--audio", wav, "--save_dir", save_dir]
        warnings = warnings_of(call_main(extract_features, *argv, "--load_data_workers", 0))
        return torch.load(save_dir / "a.pt", weights_only=True), warnings

    return run


# Reading ------------------------------------------------------------------------------------------


def strip(content, name):
    """Leave what s3prl has no defaults for: frames of 25 ms every 10 ms and CMVN are its own.

    Its runner of 2021 has another name for the config.
    """
    weights = {f"module.{key}": value for key, value in content["model"].items()}
    sound = {"feat_type": "fbank", "feat_dim": MEL}
    config = {"data": {"audio": sound}, "model": content["config"]["model"]}
    content.clear()
    content.update({"model": weights, name: config})


@pytest.mark.parametrize(
    "paras",
    [
        {},
        {"residual": False},
        {"num_layers": 1, "residual": False},
        {"hidden_size": MEL, "residual": False},
        {"dropout": 0, "num_layers": 2},  # YAML makes an integer of it
    ],
    ids=str,
)
def test_loaded_model_is_s3prls(tmp_path, paras):
    """Whatever a neighbour's config.json and the file's name say."""
    residual = (PARAS | paras)["residual"]
    config = {"rnn_residual": not residual, "rnn_hidden_size": 512, "rnn_type": "lstm"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / f"bs32-rhl3-rhs512-rd0-adam{'' if residual else '-res'}-ts3.pt"
    for options in (
        {"legacy": True},
        {"legacy": False},
        {"edit": partial(strip, name="config")},
        {"edit": partial(strip, name="Upstream_Config")},
    ):
        theirs = s3prl_file(path, paras, **options)
        ours = load_pretrained(path)
        assert_same_outputs(ours, theirs, MEL)
        assert ours.rnn_residual is residual


@pytest.mark.parametrize(
    "sound",
    [
        {},
        {"frame_shift": 20, "feat_dim": 80},
        {"frame_length": 32, "frame_shift": 8, "cmvn": False},
        {"preemphasis_coefficient": 0.9, "low_freq": 60, "high_freq": -400.0},
        {"snip_edges": False, "remove_dc_offset": False, "dither": 0.0},
        {"use_power": False, "use_log_fbank": False},
    ],
    ids=str,
)
def test_audio_to_features_as_s3prl_does(tmp_path, extract, sound):
    sound = SOUND | {"feat_dim": 40} | sound
    theirs = s3prl_file(tmp_path / "apc.ckpt", sound=sound)
    wav = write(tmp_path / "a.wav", SAMPLES)
    got, warnings = extract(tmp_path / "apc.ckpt", wav, tmp_path / "features")
    assert not warnings, "the file says how its features are made"
    _, expected = s3prl_outputs(theirs, sound, SAMPLES)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


VQ = {"codebook_size": [10], "code_dim": [HIDDEN], "gumbel_temperature": 0.5}


def test_vq_apc_predicts_from_codes_and_its_features_are_not_quantised(tmp_path, reject, call_main):
    theirs = s3prl_file(tmp_path / "vq.ckpt", {"vq": VQ})
    ours = load_pretrained(tmp_path / "vq.ckpt")
    assert_same_outputs(ours, theirs, MEL)
    predicted = theirs(torch.randn(2, 300, MEL))[0]
    assert 1 < len(predicted.flatten(0, 1).unique(dim=0)) <= 10, "the codes are not in use"
    frames = torch.randn(1, 9, MEL)
    assert torch.equal(ours(frames, [7])[0][0, 7:], ours.postnet.layer.bias.expand(2, MEL))
    for flag in ("--to_s3prl", "--to_onnx"):
        assert "(VQ-APC)" in reject(tmp_path / "vq.ckpt", flag, tmp_path / "out")
    done = call_main(script, tmp_path / "vq.ckpt", "--to_state_dict", tmp_path / "bare" / "vq.pt")
    assert done.returncode == 0, done.stderr
    assert_same_outputs(load_pretrained(tmp_path / "bare" / "vq.pt"), theirs, MEL)


def test_other_quantised_models_are_rejected(tmp_path, reject):
    """Several groups of codes; layers after lower ones, as in the original VQ-APC; no config."""

    def drop_first(content):
        weights = content["model"]
        content["model"] = {name: weights[name] for name in weights if "vq_layers.0." not in name}

    groups = {"codebook_size": [10, 10], "code_dim": [6, 10], "gumbel_temperature": 0.5}
    s3prl_file(tmp_path / "groups.ckpt", {"vq": groups})
    s3prl_file(tmp_path / "lower.ckpt", {"vq": groups}, edit=drop_first)
    model = s3prl_file(tmp_path / "vq.ckpt", {"vq": VQ})
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    for name in ("groups.ckpt", "lower.ckpt", "bare.pt"):
        assert "VQ-APC" in reject(tmp_path / name)


# Rejections ---------------------------------------------------------------------------------------


def test_its_flags_are_let_in_but_no_code_in_them(tmp_path, reject):
    """Namespaces, in which s3prl keeps its flags."""
    marker = tmp_path / "marker"

    def attack(content):
        content["Args"].nested = [{"b": argparse.Namespace(hook=Hostile(marker))}]

    s3prl_file(tmp_path / "evil.ckpt", edit=attack)
    reject(tmp_path / "evil.ckpt")
    assert not marker.exists()
    s3prl_file(tmp_path / "apc.ckpt")
    load_pretrained(tmp_path / "apc.ckpt")


MISSING = object()


@pytest.mark.parametrize(
    "keys, value",
    [
        ("config", "apc.yaml"),
        ("config data audio", MISSING),
        ("config data audio feat_type", "mfcc"),
        ("config data audio feat_dim", "eighty"),
        ("config data audio frame_length", "long"),
        ("config data audio vtln_warp", 1.1),  # which is not supported
        ("config model paras", None),
        ("config model paras residual", MISSING),
        ("model rnn_layers.1.bias_hh_l0", MISSING),
        ("model postnet.weight", torch.zeros(MEL)),
    ],
)
def test_what_is_missing_or_invalid_ends_in_one_line(tmp_path, reject, keys, value):
    *path, last = keys.split()

    def edit(content):
        for key in path:
            content = content[key]
        content[last] = value
        if value is MISSING:
            del content[last]

    s3prl_file(tmp_path / "apc.ckpt", edit=edit)
    line = reject(tmp_path / "apc.ckpt", "--to_s3prl", tmp_path / "out.ckpt")
    assert "apc.ckpt" in line and (value is not MISSING or last.split(".")[-1] in line)
    assert os.listdir(tmp_path) == ["apc.ckpt"]


def test_a_first_layer_that_would_be_residual_here_is_rejected(tmp_path, reject):
    s3prl_file(tmp_path / "apc.ckpt", {"hidden_size": MEL})
    assert "another model in s3prl" in reject(tmp_path / "apc.ckpt")


# Writing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape",
    [{}, {"layers": 5, "hidden": 20}, {"hidden": MEL, "residual": False}],
    ids=str,
)
def test_round_trip(tmp_path, convert, monkeypatch, shape):
    """Both outputs at once, into the current folder."""
    reference = our_model(tmp_path / "a" / "foo.model", **shape)
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "b")
    warnings = convert("../a/foo.model", "--to_s3prl", "foo.ckpt", "--to_state_dict", "foo.pt")
    # Its upstream takes the inputs of layers 1 and 2, and the model's outputs.
    assert ("layers 0, 1 and 4" in warnings) == ("layers" in shape)
    assert sorted(os.listdir()) == ["config.json", "foo.ckpt", "foo.pt"]

    theirs, sound = from_export("foo.ckpt")
    assert_same_outputs(reference, theirs, MEL)
    paras = torch.load("foo.ckpt", weights_only=True)["config"]["model"]["paras"]
    # s3prl passes these as keywords: none more, none less.
    assert sound == SOUND and type(sound["feat_dim"]) is int
    assert paras.keys() == PARAS.keys() and paras["dropout"] == 0.2

    for path in ("foo.ckpt", "foo.pt"):
        model, weights = load_pretrained(path), reference.state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        assert model.rnn_residual is reference.residual


@pytest.mark.parametrize("cmvn", [True, False])
def test_s3prl_to_s3prl_loses_nothing(tmp_path, convert, cmvn):
    """Neither directly nor by way of a state dict and its config.json."""
    sound = {"frame_shift": 20, "frame_length": 32, "cmvn": cmvn}
    theirs = s3prl_file(tmp_path / "apc.ckpt", {"dropout": 0.3}, sound)
    assert not convert(tmp_path / "apc.ckpt", "--to_state_dict", tmp_path / "bare" / "apc.pt")
    for path in (tmp_path / "apc.ckpt", tmp_path / "bare" / "apc.pt"):
        assert not convert(path, "--to_s3prl", f"{path}.out")
        after, weights = torch.load(f"{path}.out", weights_only=True), theirs.state_dict()
        assert after["config"]["model"]["paras"] == PARAS | {"dropout": 0.3}
        assert after["config"]["data"]["audio"] == SOUND | sound
        assert after["model"].keys() == weights.keys()
        assert all(torch.equal(after["model"][name], value) for name, value in weights.items())
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    assert config["data"][0]["fbank"].keys() == PREPARED.keys(), "every option in force"


@pytest.mark.parametrize(
    "data, cmvn, words",
    [
        # data of config.json; cmvn for s3prl; words of a warning, if there is one
        (trained_on("speaker"), True, ["by speaker (mean and variance)", "--as_s3prl"]),
        (trained_on("speaker", options=MEAN_ONLY), True, ["by speaker (mean)", "--as_s3prl"]),
        (trained_on("global") * 2, True, ["by global (mean and variance)", "--as_s3prl"]),
        (trained_on("utterance", options=MEAN_ONLY), True, ["by utterance (mean)", "--as_s3prl"]),
        (trained_on("utterance"), True, ["floor", "1 % of their rms", "--as_s3prl"]),
        (trained_on("utterance", options=AS_S3PRL, full_scale=1.0), True, None),
        (trained_on("none"), False, ["floor", "--as_s3prl"]),
        (trained_on("none", "kaldi"), True, ["not known", "variance per utterance"]),
        ([None], True, ["not known", "variance per utterance"]),  # the original's folder
    ],
)
def test_cmvn_follows_from_the_training_data(tmp_path, convert, data, cmvn, words):
    """As config.json has it, or last.ckpt."""
    weights = our_model(tmp_path / "foo.model", data).state_dict()
    saved = {"model": weights, "flags": {"rnn_residual": True}, "data": data, "state": {}}
    torch.save(saved, tmp_path / "last.ckpt")
    for path in (tmp_path / "foo.model", tmp_path / "last.ckpt"):
        warnings = convert(path, "--to_s3prl", f"{path}.out")
        assert from_export(f"{path}.out")[1]["cmvn"] is cmvn
        assert all(word in warnings for word in words) if words else not warnings


def test_what_is_prepared_as_s3prl_does_gives_the_same_there(tmp_path, convert, extract, call_main):
    """The training data; and a model's features of new audio, here and, exported, in s3prl."""
    wav = write(tmp_path / "a.wav", SAMPLES)
    argv = ["--librispeech_from_audio", wav, "--save_dir", tmp_path / "data", "--num_workers", 1]
    assert not warnings_of(call_main(prepare_data, *argv, "--as_s3prl", "--max_seq_len", 200))
    frames = s3prl_frames(SAMPLES, SOUND | {"feat_dim": 80})
    stored = torch.load(tmp_path / "data" / "a.pt", weights_only=True)[: len(frames)]
    torch.testing.assert_close(stored, frames, rtol=0, atol=1e-4)

    made = json.loads((tmp_path / "data" / "prepared.json").read_text())
    our_model(tmp_path / "foo.model", [made], mel_dim=80)
    assert not convert(tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    got, _ = extract(tmp_path / "foo.model", wav, tmp_path / "features")
    _, expected = s3prl_outputs(*from_export(tmp_path / "foo.ckpt"), SAMPLES)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_a_model_of_features_without_cmvn_gives_the_same_in_s3prl(tmp_path, convert, extract):
    """Its weights take in that s3prl's log energies, and predictions, are smaller by a constant."""
    ours = our_model(tmp_path / "foo.model", trained_on("none", num_mel_bins=40), mel_dim=40)
    assert "floor" in convert(tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    noise = np.random.default_rng(1).integers(-500, 501, 19200)
    samples = (speech(1.2) // 2 + noise).astype(np.int16)  # nowhere silent: the floors differ
    got, _ = extract(tmp_path / "foo.model", write(tmp_path / "a.wav", samples), tmp_path / "f")
    predicted, hidden = s3prl_outputs(*from_export(tmp_path / "foo.ckpt"), samples)
    torch.testing.assert_close(got, hidden, rtol=0, atol=1e-4)
    frames = torch.from_numpy(reference_fbank(samples, bins=40)).float()[None]
    expected = ours(frames, torch.tensor([frames.size(1)]))[0][0] - 2 * math.log(32768)
    torch.testing.assert_close(predicted, expected, rtol=0, atol=0.001)


@pytest.mark.parametrize(
    "shape, fbank, expected",
    [
        # a model, its fbank; a word of the message, or what s3prl's config says
        ({"rnn_type": "lstm"}, {}, "LSTM"),
        ({"prenet_layers": 1}, {}, "prenet"),
        ({"hidden": MEL}, {}, "residual"),
        ({"layers": 2}, {}, "fewer than three"),
        ({}, {"window_type": "povey"}, "fbank"),
        ({}, {"snip_edges": False}, "fbank"),
        ({}, {"num_mel_bins": MEL + 1}, "fbank"),
        ({}, {"frame_length_ms": 32.0}, {"frame_length": 32}),
        ({}, {"frame_shift_ms": 8}, {"frame_shift": 8}),
        ({}, {"dither": 1.0, "sample_rate": 16000, "full_scale": 1.0, "htk_compat": False}, {}),
    ],
)
def test_what_s3prl_cannot_express_is_rejected(tmp_path, call_main, shape, fbank, expected):
    data = trained_on("utterance", options=AS_S3PRL, **{"full_scale": 1.0} | fbank)
    our_model(tmp_path / "foo.model", data, **shape)
    done = call_main(script, tmp_path / "foo.model", "--to_s3prl", tmp_path / "foo.ckpt")
    if isinstance(expected, str):
        assert re.search(f"cannot express .*{expected}", error_line(done, "load_pretrained.py"))
        assert sorted(os.listdir(tmp_path)) == ["config.json", "foo.model"]
    else:
        assert done.returncode == 0 and not done.stderr
        assert from_export(tmp_path / "foo.ckpt")[1] == SOUND | expected


# --to_state_dict, and where the outputs go --------------------------------------------------------


def test_state_dict_of_our_own_models(tmp_path, convert):
    """One that s3prl cannot express. Flags are kept, and --residual is remembered."""
    shape = {"rnn_type": "lstm", "prenet_layers": 2, "residual": True}
    config = {"rnn_dropout": 0.2, "time_shift": 3, "data": trained_on("speaker")}
    reference = save_model(tmp_path / "a" / "foo.model", config, mel_dim=MEL, **shape)
    out = tmp_path / "new" / "folder" / "foo.pt"
    convert(tmp_path / "a" / "foo.model", "--residual", "--to_state_dict", out)
    weights, expected = torch.load(out, weights_only=True), reference.state_dict()
    assert list(weights) == list(expected)
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
    assert_same_outputs(load_pretrained(out), reference, MEL)
    after = json.loads((out.parent / "config.json").read_text())
    assert after.items() >= config.items()


@pytest.mark.parametrize(
    "outputs",
    [
        ["--to_s3prl", "mine"],
        ["--to_state_dict", "foo.pt"],  # config.json is there
        ["--to_state_dict", "new/config.json"],
        ["--to_s3prl", "y", "--to_state_dict", "new/../y"],
    ],
    ids=" ".join,
)
def test_nothing_is_overwritten_nor_half_written(tmp_path, reject, monkeypatch, outputs):
    our_model(tmp_path / "foo.model")
    (tmp_path / "mine").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = snapshot(tmp_path)
    assert "choose another name" in reject("foo.model", *outputs)
    assert snapshot(tmp_path) == before and not (tmp_path / "new").exists()
