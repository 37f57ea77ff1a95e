"""load_pretrained.py: weights as the original saves them, made by hand, and files that are none."""

import json
import os
import pickle

import pytest
import torch
from torch import nn

import load_pretrained as script
from load_pretrained import load_pretrained
from utils import UserError

RELEASED = "bs32-rhl{layers}-rhs512-rd0-adam{res}-ts3.pt"


# ------------------------------------------------------------------------------ helpers


class ByHand:
    """The paper's network out of torch's own modules, without the code under test.

    .weights: the state dict under the original's names; .run(x, residual): (T, D) ->
    (T, D) predicted, (layers, T, H), for one utterance without padding.
    """

    def __init__(self, mel=11, hidden=16, layers=3, rnn_type="gru", prenet_layers=0, seed=0):
        torch.manual_seed(seed)
        widths = [mel] + [hidden] * prenet_layers
        self.prenet = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        rnn = {"gru": nn.GRU, "lstm": nn.LSTM}[rnn_type]
        first = hidden if prenet_layers else mel
        self.rnns = [
            rnn(first if i == 0 else hidden, hidden, batch_first=True) for i in range(layers)
        ]
        self.postnet = nn.Conv1d(hidden, mel, 1)
        named = {f"prenet.layers.{i}": module for i, module in enumerate(self.prenet)}
        named |= {f"rnns.{i}": module for i, module in enumerate(self.rnns)}
        named["postnet.layer"] = self.postnet
        self.weights = {
            f"{prefix}.{name}": value.detach().clone()
            for prefix, module in named.items()
            for name, value in module.named_parameters()
        }
        self.mel, self.count = mel, sum(value.numel() for value in self.weights.values())

    @torch.no_grad()
    def run(self, x, residual):
        reps = []
        for layer in self.prenet:
            x = torch.relu(layer(x))
        if self.prenet:
            reps.append(x)
        for rnn in self.rnns:
            y = rnn(x[None])[0][0]
            x = x + y if residual and x.shape == y.shape else y
            reps.append(x)
        return self.postnet(x.T[None])[0].T, torch.stack(reps)


def assert_same_network(model, by_hand, residual):
    assert not model.training
    assert all(not module.training for module in model.modules())
    x = torch.randn(9, by_hand.mel, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        predicted, reps = model.forward(x[None], torch.tensor([9]))
    truth_predicted, truth_reps = by_hand.run(x, residual)
    assert torch.allclose(predicted[0], truth_predicted, atol=1e-5)
    assert torch.allclose(reps[:, 0], truth_reps, atol=1e-5)


def refusal(path, **kw):
    with pytest.raises((UserError, OSError)) as caught:
        load_pretrained(path, **kw)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def summary(call_main):
    """Run load_pretrained.py's main as the script would: (status, stdout, stderr)."""

    def call(*argv):
        done = call_main(script, *argv)
        return done.returncode, done.stdout, done.stderr

    return call


class RunsCode:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"echo > '{self.marker}'",)


# ------------------------------------------------------------------------------ recognition


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"layers": 1},
        {"layers": 5, "hidden": 8, "mel": 80},
        {"hidden": 11},  # as wide as the input: the residual reaches the first layer, too
        {"rnn_type": "lstm"},
        {"rnn_type": "lstm", "layers": 1, "hidden": 11},
        {"prenet_layers": 1},
        {"prenet_layers": 3, "layers": 2, "rnn_type": "lstm"},
        {"layers": 11, "hidden": 4},  # rnns.10 comes after rnns.9
    ],
    ids=str,
)
def test_the_weights_tell_the_network(tmp_path, shape, residual):
    by_hand = ByHand(**shape)
    torch.save(by_hand.weights, tmp_path / "w.model")
    model = load_pretrained(tmp_path / "w.model", residual=residual)
    assert_same_network(model, by_hand, residual)
    assert model.mel_dim == by_hand.mel
    assert len(model.rnns) == len(by_hand.rnns)
    assert bool(model.rnn_residual) is residual
    assert (model.prenet is None) == (not by_hand.prenet)
    assert set(model.state_dict()) == set(by_hand.weights)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_prefixes_and_old_formats(tmp_path, prefix, legacy):
    by_hand = ByHand(layers=2, prenet_layers=1)
    weights = {prefix + name: value for name, value in by_hand.weights.items()}
    torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
    assert_same_network(load_pretrained(tmp_path / "w.pt", residual=False), by_hand, False)


def test_path_may_be_text_and_device_is_taken(tmp_path):
    by_hand = ByHand(layers=1)
    torch.save(by_hand.weights, tmp_path / "w.pt")
    for device in ("cpu", torch.device("cpu")):
        model = load_pretrained(str(tmp_path / "w.pt"), device, True)
        assert next(model.parameters()).device.type == "cpu"


def test_an_ordered_dict_of_a_module_will_do(tmp_path):
    """state_dict() gives an OrderedDict with metadata, and that is what the original saved."""
    by_hand = ByHand(layers=2)
    holder = nn.Module()
    holder.rnns = nn.ModuleList(by_hand.rnns)
    holder.postnet = nn.Module()
    holder.postnet.layer = by_hand.postnet
    torch.save(holder.state_dict(), tmp_path / "w.pt")
    assert_same_network(load_pretrained(tmp_path / "w.pt", residual=True), by_hand, True)


def test_the_weights_are_kept_to_the_bit(tmp_path):
    by_hand = ByHand(layers=1)
    torch.save(by_hand.weights, tmp_path / "w.pt")
    loaded = load_pretrained(tmp_path / "w.pt", residual=True).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in by_hand.weights.items())


# ------------------------------------------------------------------------------ residual


@pytest.mark.parametrize("residual", [True, False])
def test_residual_from_the_neighbouring_config(tmp_path, residual):
    by_hand = ByHand()
    torch.save(by_hand.weights, tmp_path / "foo__epoch_3.model")
    flags = {"experiment_name": "foo", "rnn_num_layers": 3, "rnn_residual": residual, "epochs": 4}
    (tmp_path / "config.json").write_text(json.dumps(flags))
    model = load_pretrained(tmp_path / "foo__epoch_3.model")
    assert bool(model.rnn_residual) is residual
    assert_same_network(model, by_hand, residual)


@pytest.mark.parametrize("residual", [True, False])
def test_residual_from_the_released_names(tmp_path, residual):
    by_hand = ByHand(layers=3)
    path = tmp_path / RELEASED.format(layers=3, res="-res" if residual else "")
    torch.save(by_hand.weights, path)
    assert_same_network(load_pretrained(path), by_hand, residual)


def test_config_goes_before_the_name(tmp_path):
    by_hand = ByHand()
    path = tmp_path / RELEASED.format(layers=3, res="-res")
    torch.save(by_hand.weights, path)
    (tmp_path / "config.json").write_text(json.dumps({"rnn_residual": False}))
    assert_same_network(load_pretrained(path), by_hand, False)


@pytest.mark.parametrize("residual", [True, False])
def test_the_argument_goes_before_everything(tmp_path, residual):
    by_hand = ByHand()
    path = tmp_path / RELEASED.format(layers=3, res="" if residual else "-res")
    torch.save(by_hand.weights, path)
    assert_same_network(load_pretrained(path, residual=residual), by_hand, residual)
    (tmp_path / "config.json").write_text(json.dumps({"rnn_residual": not residual}))
    assert_same_network(load_pretrained(path, residual=residual), by_hand, residual)


@pytest.mark.parametrize("name", ["apc.pt", "my-res-net.pt", "foo__epoch_3.model", "result.pt"])
def test_residual_is_asked_for_rather_than_guessed(tmp_path, name):
    torch.save(ByHand().weights, tmp_path / name)
    message = refusal(tmp_path / name)
    assert "--residual" in message
    assert "--no_residual" in message


@pytest.mark.parametrize("config", ["{}", "[]", "no json", "", '{"rnn_residual": "maybe"}'])
def test_a_config_that_does_not_say_is_no_answer(tmp_path, config):
    torch.save(ByHand().weights, tmp_path / "apc.pt")
    (tmp_path / "config.json").write_text(config)
    message = refusal(tmp_path / "apc.pt")
    assert "--residual" in message or "config.json" in message


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "inside", "module"])
def test_code_in_a_checkpoint_does_not_run(tmp_path, kind):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"
    weights = ByHand().weights
    if kind == "pickle":
        path.write_bytes(pickle.dumps(RunsCode(marker)))
        pickle.loads(path.read_bytes())
        assert marker.exists(), "the attack is no attack"
        marker.unlink()
    elif kind == "module":
        torch.save(nn.Linear(2, 2), path)  # a whole pickled object, not its weights
    else:
        hostile = {**weights, "code": RunsCode(marker)} if kind == "inside" else RunsCode(marker)
        torch.save(hostile, path, _use_new_zipfile_serialization=kind != "legacy")
    assert "evil.pt" in refusal(path, residual=True)
    assert not marker.exists()


NO_CHECKPOINTS = {
    "text": b"Dear reader, this is no checkpoint.\n" * 10,
    "empty": b"",
    "zip-header": b"PK\x03\x04",
    "binary": bytes(range(256)) * 40,
    "json": b'{"rnn_residual": true}',
}


@pytest.mark.parametrize("name", NO_CHECKPOINTS)
def test_a_file_that_is_no_checkpoint(tmp_path, name):
    (tmp_path / "no.pt").write_bytes(NO_CHECKPOINTS[name])
    assert "no.pt" in refusal(tmp_path / "no.pt", residual=True)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_truncated_checkpoint(tmp_path, legacy, share):
    path = tmp_path / "cut.pt"
    torch.save(ByHand().weights, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "cut.pt" in refusal(path, residual=True)


def test_missing_file_and_folder(tmp_path):
    assert "nowhere.pt" in refusal(tmp_path / "nowhere.pt", residual=True)
    (tmp_path / "folder").mkdir()
    assert "folder" in refusal(tmp_path / "folder", residual=True)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"a": torch.zeros(2)},
        torch.zeros(3),
        [torch.zeros(3)],
        7,
        None,
        {1: torch.zeros(2)},
        {"rnns.0.weight_ih_l0": "text"},
        nn.Linear(3, 3).state_dict(),
    ],
    ids=["empty", "other", "tensor", "list", "number", "none", "int-key", "text-value", "linear"],
)
def test_a_file_with_something_else(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    assert "other.pt" in refusal(tmp_path / "other.pt", residual=True)


@pytest.mark.parametrize(
    "gone",
    [
        "rnns.1.bias_hh_l0",
        "rnns.0.weight_ih_l0",
        "rnns.2.weight_hh_l0",
        "postnet.layer.bias",
        "postnet.layer.weight",
        "prenet.layers.0.bias",
        "prenet.layers.1.weight",
    ],
)
def test_a_missing_key_is_named(tmp_path, gone):
    weights = ByHand(prenet_layers=2).weights
    del weights[gone]
    torch.save(weights, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", residual=True)
    assert "w.pt" in message
    assert gone in message


@pytest.mark.parametrize("layer", ["rnns.0.", "rnns.1.", "prenet.layers.0."])
def test_a_missing_layer_is_named(tmp_path, layer):
    weights = ByHand(prenet_layers=2).weights
    weights = {name: value for name, value in weights.items() if not name.startswith(layer)}
    torch.save(weights, tmp_path / "w.pt")
    assert layer.rstrip(".") in refusal(tmp_path / "w.pt", residual=True)


@pytest.mark.parametrize(
    "surplus", ["rnns.0.weight_ih_l1", "rnns.0.weight_ih_l0_reverse", "classifier.weight", "step"]
)
def test_a_surplus_key_is_named(tmp_path, surplus):
    torch.save({**ByHand().weights, surplus: torch.zeros(48, 16)}, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", residual=True)
    assert "w.pt" in message
    assert surplus in message


@pytest.mark.parametrize(
    "name, shape",
    [
        ("rnns.1.weight_ih_l0", (48, 17)),
        ("rnns.2.weight_hh_l0", (45, 15)),
        ("rnns.0.bias_ih_l0", (47,)),
        ("rnns.1.bias_hh_l0", (48, 1)),
        ("postnet.layer.weight", (11, 16)),
        ("postnet.layer.weight", (11, 16, 3)),
        ("postnet.layer.bias", (12,)),
        ("prenet.layers.1.weight", (16, 11)),
        ("prenet.layers.0.bias", (11,)),
    ],
)
def test_a_wrong_shape_is_named(tmp_path, name, shape):
    weights = ByHand(mel=11, hidden=16, prenet_layers=2).weights
    weights[name] = torch.zeros(shape)
    torch.save(weights, tmp_path / "w.pt")
    message = refusal(tmp_path / "w.pt", residual=True)
    assert "w.pt" in message
    assert name in message


def test_half_gru_half_lstm_is_refused(tmp_path):
    weights = ByHand(layers=2).weights
    lstm = ByHand(layers=2, rnn_type="lstm").weights
    weights |= {name: value for name, value in lstm.items() if name.startswith("rnns.1.")}
    torch.save(weights, tmp_path / "w.pt")
    assert "rnns." in refusal(tmp_path / "w.pt", residual=True)


# ------------------------------------------------------------------------------ the script


def test_summary_of_a_gru(tmp_path, summary):
    by_hand = ByHand(mel=23, hidden=37, layers=4)
    torch.save(by_hand.weights, tmp_path / "w.pt")
    status, out, err = summary(tmp_path / "w.pt", "--residual")
    assert status == 0, err
    text = out.replace(",", "").replace("_", " ").lower()
    for word in ("gru", "37", "4", "23", "prenet", "residual", str(by_hand.count)):
        assert word in text, out
    assert "lstm" not in text


def test_summary_of_an_lstm_with_prenet(tmp_path, summary):
    by_hand = ByHand(mel=23, hidden=37, layers=5, rnn_type="lstm", prenet_layers=2)
    torch.save(by_hand.weights, tmp_path / "w.pt")
    outs = {}
    for flag in ("--residual", "--no_residual"):
        status, outs[flag], err = summary(tmp_path / "w.pt", flag)
        assert status == 0, err
        text = outs[flag].replace(",", "").replace("_", " ").lower()
        for word in ("lstm", "37", "5", "23", "prenet", "2", str(by_hand.count)):
            assert word in text, outs[flag]
        assert "gru" not in text
    assert outs["--residual"] != outs["--no_residual"]


def test_summary_needs_to_be_told_and_says_how(tmp_path, summary):
    torch.save(ByHand().weights, tmp_path / "w.pt")
    status, out, err = summary(tmp_path / "w.pt")
    assert status not in (0, None)
    (line,) = err.strip().splitlines()
    assert line.startswith("load_pretrained.py: error: ")
    assert "--residual" in line
    assert "--no_residual" in line


def test_script_refuses_in_one_line(tmp_path, summary):
    (tmp_path / "text.pt").write_text("no checkpoint")
    for path in (tmp_path / "text.pt", tmp_path / "nowhere.pt"):
        status, _, err = summary(path, "--residual")
        assert status not in (0, None)
        (line,) = err.strip().splitlines()
        assert line.startswith("load_pretrained.py: error: ")
        assert path.name in line


def test_contradicting_flags_are_refused_by_the_parser(tmp_path, summary):
    torch.save(ByHand().weights, tmp_path / "w.pt")
    status, _, err = summary(tmp_path / "w.pt", "--residual", "--no_residual")
    assert status == 2
    assert "load_pretrained.py: error: " in err
