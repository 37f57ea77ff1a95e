"""load_pretrained.py against the packed reference, saved under the original's names, and against
files that are no model."""

import json
import pickle

import pytest
import safetensors.torch
import torch
from conftest import error_line, hostile_files
from reference import PackedAPC
from test_fbank import PREPARED
from torch import nn

import load_pretrained as script
from apc_model import APCModel
from load_pretrained import load_pretrained, model_flags
from utils import RNNConfig, UserError

SCRIPT = "load_pretrained.py"
MEL, HIDDEN, LAYERS = 11, 16, 3


def save_model(path, config=None, **shape):
    """Write a model's weights, and config.json next to them if there is one -> the reference."""
    torch.manual_seed(0)
    shape = {"mel_dim": MEL, "hidden": HIDDEN, "layers": LAYERS} | shape
    return save(PackedAPC(**shape), path, config)


def save(model, path, config):
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)  # an OrderedDict with metadata, as the original's
    if config is not None:
        (path.parent / "config.json").write_text(json.dumps(config))
    return model.eval()


def save_transformer(path, config=None):
    """The same of a Transformer of two blocks -> the model."""
    return save(APCModel(MEL, None, RNNConfig(MEL, 64, 2, 0.0, False, "transformer")), path, config)


@torch.no_grad()
def assert_same_outputs(model, reference, mel_dim=MEL):
    """On valid frames: what lies beyond is for test_apc_model."""
    inputs = torch.randn(3, 20, mel_dim, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([13, 20, 1])
    predicted, reps = model(inputs, lengths)
    expected, expected_reps = reference(inputs, lengths)
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(predicted[b, :n], expected[b, :n], rtol=0, atol=1e-5)
        torch.testing.assert_close(reps[:, b, :n], expected_reps[:, b, :n], rtol=0, atol=1e-5)


def rejection(path, **kw):
    """The one-line message that names the file."""
    with pytest.raises((UserError, OSError)) as caught:
        load_pretrained(path, **kw)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


# Recognition --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, shape",
    [
        ("3 GRU yes none 16 11", {"residual": True}),
        ("1 GRU no none 16 11", {"layers": 1}),
        ("3 GRU yes none 11 11", {"hidden": MEL, "residual": True}),  # the first layer is, too
        ("1 LSTM no none 11 11", {"rnn_type": "lstm", "layers": 1, "hidden": MEL}),
        ("3 LSTM yes 2 16 11", {"rnn_type": "lstm", "prenet_layers": 2, "residual": True}),
        ("11 GRU no 1 4 11", {"layers": 11, "hidden": 4, "prenet_layers": 1}),  # rnns.10: the last
    ],
    ids=str,
)
def test_the_weights_show_what_the_network_is(tmp_path, call_main, words, shape):
    reference = save_model(tmp_path / "w.model", **shape)
    model = load_pretrained(tmp_path / "w.model", residual=bool(reference.residual))
    assert not any(module.training for module in model.modules())
    assert_same_outputs(model, reference)
    flag = "--residual" if reference.residual else "--no_residual"
    done = call_main(script, tmp_path / "w.model", flag)
    assert done.returncode == 0 and done.stderr == ""
    words += f" {sum(weight.numel() for weight in reference.parameters()):,}"
    assert {*words.split()} <= {*done.stdout.split()}, done.stdout


def test_a_transformer_is_recognised_and_never_asks_for_residual(tmp_path, call_main):
    saved = save_transformer(tmp_path / "w.pt")
    for residual in (None, True):
        model = load_pretrained(tmp_path / "w.pt", residual=residual)
        assert (model.rnn_type, model.num_layers, model.rnn_residual) == ("transformer", 2, False)
        assert_same_outputs(model, saved)
    done = call_main(script, tmp_path / "w.pt")
    assert "2 Transformer" in done.stdout and "residual" not in done.stdout
    for flag in ("--to_s3prl", "--to_onnx"):
        line = error_line(call_main(script, tmp_path / "w.pt", flag, tmp_path / "out"), SCRIPT)
        assert f"{flag} needs a model of GRU or LSTM layers" in line
    torch.save(saved.state_dict() | {"embedding.weight": torch.zeros(60, MEL)}, tmp_path / "w.pt")
    assert "multiple of 64" in rejection(tmp_path / "w.pt")


def theirs(weights):
    """The same weights as s3prl, VQ-APC and NPC save them."""
    renamed = {
        name.replace("rnns.", "rnn_layers.").replace("postnet.layer.", "postnet."): weight
        for name, weight in weights.items()
    }
    return renamed | {"postnet.weight": renamed["postnet.weight"][:, :, 0].clone()}


def test_weights_are_recognised_by_their_names_in_every_format(tmp_path):
    """Of DataParallel and torch.compile, too; whether they are residual remains to be said."""
    reference = save_model(tmp_path / "w.pt", residual=True)
    both = reference.state_dict(), theirs(reference.state_dict())
    prefixes = ("", "module.", "_orig_mod.", "module._orig_mod.")
    named = [{prefix + name: w[name] for name in w} for w in both for prefix in prefixes]
    npc = [{"model": weights, "optimizer": {}, "global_step": 7} for weights in both]
    for content in named + npc:
        for legacy in (False, True):
            torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
            assert_same_outputs(load_pretrained(tmp_path / "w.pt", residual=True), reference)
        assert "--residual" in rejection(tmp_path / "w.pt")
    for content in named:
        safetensors.torch.save_file(content, tmp_path / "w.safetensors")
        model = load_pretrained(str(tmp_path / "w.safetensors"), torch.device("cpu"), residual=True)
        assert_same_outputs(model, reference)


def test_weights_of_any_precision_and_layout_become_float32(tmp_path):
    reference = save_model(tmp_path / "w.pt", residual=True)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        stored = {name: weight.to(dtype) for name, weight in reference.state_dict().items()}
        reference.load_state_dict(stored)  # rounded
        safetensors.torch.save_file(stored, tmp_path / "w.safetensors")
        for name, weight in stored.items():
            if weight.dim() == 2:
                stored[name] = weight.T.contiguous().T
        assert not stored["rnns.0.weight_hh_l0"].is_contiguous()
        torch.save(stored, tmp_path / "w.pt")
        for name in ("w.pt", "w.safetensors"):
            model = load_pretrained(tmp_path / name, residual=True)
            assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
            assert_same_outputs(model, reference)


# config.json --------------------------------------------------------------------------------------


def test_residual_comes_from_the_argument_then_config_then_the_name_or_is_asked_for(tmp_path):
    released = "bs32-rhl3-rhs512-rd0-adam-ts3.pt", "bs32-rhl3-rhs512-rd0-adam-res-ts3.pt"
    yes, no = {"rnn_residual": True}, {"rnn_residual": False}
    of_foo, of_apc = {"experiment_name": "foo"}, {"experiment_name": "foo", "state_dict": "apc.pt"}
    cases = [
        # the file's name, config.json, the argument; which of them is right
        ("foo__epoch_3.model", yes | of_foo, None, True),
        ("foo__epoch_3.model", no | of_foo, None, False),
        ("apc.pt", yes | of_apc, None, True),
        (released[1], None, None, True),
        (released[0], None, None, False),
        (released[1], no, None, False),
        (released[0], yes | of_foo, None, False),  # another model's
        (released[1], yes, False, False),
        (released[0], no, True, True),
        ("foo__epoch_3.model", None, None, "asked for"),
        ("foo__epoch_3.model", yes | of_apc, None, "asked for"),
        ("my-res-net.pt", None, None, "asked for"),
    ]
    for number, (name, config, argument, expected) in enumerate(cases):
        path = tmp_path / str(number) / name
        reference = save_model(path, config, residual=expected is True)
        if expected == "asked for":
            message = rejection(path, residual=argument)
            assert "--residual" in message and "--no_residual" in message
        else:
            assert_same_outputs(load_pretrained(path, residual=argument), reference)


def test_config_of_a_linked_model_is_next_to_the_link_or_to_its_target(tmp_path):
    """Next to the link in Hugging Face's cache, where the target has neither name nor config."""
    snapshots, blobs, run = tmp_path / "snapshots/main", tmp_path / "blobs", tmp_path / "foo.dir"
    config = {"rnn_residual": True, "state_dict": "apc.pt", "time_shift": 5}
    save_model(snapshots / "apc.pt", config)
    blobs.mkdir()
    for name, blob in (("apc.pt", "6a1c"), ("config.json", "77fe")):
        (snapshots / name).rename(blobs / blob)
        (snapshots / name).symlink_to(f"../../blobs/{blob}")
    assert load_pretrained(snapshots / "apc.pt").config["time_shift"] == 5

    config = {"rnn_residual": True, "experiment_name": "foo", "time_shift": 3}
    save_model(run / "foo__epoch_3.model", config)
    (run / "best.model").symlink_to("foo__epoch_3.model")
    (snapshots / "best.model").symlink_to(run / "foo__epoch_3.model")  # next to another's config
    for link in (run / "best.model", snapshots / "best.model"):
        assert load_pretrained(link).config["time_shift"] == 3


def test_a_model_carries_what_is_known_of_its_training(tmp_path, call_main):
    """Dropout is for fine-tuning: load_pretrained() gives models in eval mode."""
    data = {"source": "audio", "fbank": PREPARED | {"num_mel_bins": MEL}, "cmvn": "speaker"}
    config = {"rnn_residual": True, "time_shift": 5, "rnn_dropout": 0.2, "prenet_dropout": 0.1}
    config |= {"data": [data | {"norm_vars": False}]}
    reference = save_model(tmp_path / "w.pt", config, prenet_layers=1, residual=True)
    model = load_pretrained(tmp_path / "w.pt")
    assert model.config.items() >= config.items()
    assert (model.rnn_dropout.p, model.prenet.dropout.p) == (0.2, 0.1)
    assert_same_outputs(model, reference)
    flags = {**config, "data": None}
    torch.save(
        {"model": model.state_dict(), "flags": flags, "data": [data]}, tmp_path / "last.ckpt"
    )
    assert load_pretrained(tmp_path / "last.ckpt").rnn_dropout.p == 0.2
    shown = call_main(script, tmp_path / "w.pt").stdout
    for words in ("n: 5", "mean (--cmvn speaker)", "the original's, but num_mel_bins 11"):
        assert words in shown
    (tmp_path / "config.json").unlink()
    model = load_pretrained(tmp_path / "w.pt", residual=True)
    assert "time_shift" not in model.config and model.rnn_dropout.p == 0
    shown = call_main(script, tmp_path / "w.pt", "--residual").stdout
    assert shown.count("unknown") == 3, shown


def test_flags_of_a_model_include_whether_it_is_residual(tmp_path):
    """For --init_checkpoint: what the file says counts, and the flag only where it says nothing."""
    save_model(tmp_path / "w.pt", {"rnn_residual": True}, prenet_layers=2)
    expected = {"feature_dim": MEL, "prenet_num_layers": 2, "rnn_type": "gru"}
    expected |= {"rnn_num_layers": LAYERS, "rnn_hidden_size": HIDDEN, "rnn_residual": True}
    assert model_flags(load_pretrained(tmp_path / "w.pt", unknown_residual=False)) == expected
    (tmp_path / "config.json").unlink()
    for unknown in (True, False):
        model = load_pretrained(tmp_path / "w.pt", unknown_residual=unknown)
        assert model_flags(model) == model.config == expected | {"rnn_residual": unknown}


@pytest.mark.parametrize("key, value", [("rnn_hidden_size", 512), ("rnn_type", "lstm")])
def test_a_config_that_contradicts_the_weights_is_rejected(tmp_path, key, value):
    save_model(tmp_path / "w.pt", {"rnn_residual": True, key: value})
    message = rejection(tmp_path / "w.pt")
    assert f"config.json says that {key} is {value}" in message


# Rejections ---------------------------------------------------------------------------------------


def test_code_in_a_file_does_not_run(tmp_path):
    files, marker = hostile_files(tmp_path)
    pickle.loads(files["pickle"].read_bytes())
    assert marker.exists(), "the attack does nothing"
    marker.unlink()
    for path in files.values():
        rejection(path, residual=True)
    assert not marker.exists()


def test_files_that_are_no_checkpoint_or_a_damaged_one(tmp_path):
    weights = save_model(tmp_path / "w.pt").state_dict()
    whole = (tmp_path / "w.pt").read_bytes()
    at = whole.index(weights["postnet.layer.bias"].numpy().tobytes())
    flipped = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]  # see the checksum
    contents = {"text": b"Dear reader, this is no checkpoint.\n" * 10, "empty": b""}
    for name, content in (contents | {"cut": whole[:-900], "flipped": flipped}).items():
        for file in (name, f"{name}.safetensors"):
            (tmp_path / file).write_bytes(content)
            rejection(tmp_path / file, residual=True)
    for name in ("nowhere.pt", "nowhere.safetensors", "."):
        rejection(tmp_path / name, residual=True)
    linear, tensor = nn.Linear(3, 3), torch.zeros(2)  # the former pickled as a whole
    for content in ({}, {1: tensor}, {"model": [tensor]}, tensor, 7, linear.state_dict(), linear):
        torch.save(content, tmp_path / "other.pt")
        rejection(tmp_path / "other.pt", residual=True)


def test_the_message_names_the_key_that_holds_the_weights(tmp_path):
    weights = save_model(tmp_path / "w.pt").state_dict()
    lightning = {"epoch": 3, "pytorch-lightning_version": "2.5", "state_dict": weights}
    for key, content in {"state_dict": lightning, "ema": {"ema": weights, "step": 9}}.items():
        torch.save(content, tmp_path / "w.pt")
        assert f"[{key!r}]" in rejection(tmp_path / "w.pt", residual=True)
    torch.save({f"net.{name}": weights[name] for name in weights}, tmp_path / "w.pt")
    assert "found net.rnns.0." in rejection(tmp_path / "w.pt", residual=True)


@pytest.mark.parametrize(
    "name, wrong",
    [
        # a weight or the start of several; what is put there instead: a shape, a value, or nothing
        ("rnns.1.bias_hh_l0", [None]),
        ("prenet.layers.0.", [None]),
        ("rnns.0.weight_ih_l0_reverse", [(48, 11)]),
        ("rnns.1.weight_ih_l0", [(48, 17), (64, 16)]),  # the latter is an LSTM's
        ("prenet.layers.1.weight", [None, (16, 11)]),
        ("postnet.layer.weight", [None, (11, 16), (11, 16, 3)]),
        ("postnet.layer.bias", [(12,), "text", torch.zeros(MEL).to_sparse()]),
        ("vq_layers.2.vq_logits.weight", [(128, 16)]),
    ],
)
def test_a_weight_that_is_missing_too_many_or_wrong_is_named(tmp_path, name, wrong):
    weights = save_model(tmp_path / "w.pt", prenet_layers=2).state_dict()
    for weight in wrong:
        edited = {key: value for key, value in weights.items() if not key.startswith(name)}
        if weight is not None:
            edited[name] = torch.zeros(weight) if isinstance(weight, tuple) else weight
        torch.save(edited, tmp_path / "w.pt")
        named = "VQ-APC" if "vq_" in name else name.rstrip(".")
        assert named in rejection(tmp_path / "w.pt", residual=True)


def test_the_script_rejects_in_one_line(tmp_path, call_main):
    save_model(tmp_path / "w.pt")
    assert "--no_residual" in error_line(call_main(script, tmp_path / "w.pt"), SCRIPT)
    done = call_main(script, tmp_path / "w.pt", "--residual", "--no_residual")
    assert "not allowed" in error_line(done, SCRIPT, 2)
