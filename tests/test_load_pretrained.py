"""load_pretrained.py against the packed reference, saved under the original's names, and against
files that are no model."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import hostile_files
from processes import ONE_THREAD, ROOT, error_line
from reference import PackedAPC
from test_fbank import PREPARED
from torch import nn

import load_pretrained as script
from load_pretrained import load_pretrained
from utils import UserError

MEL, HIDDEN, LAYERS = 11, 16, 3


def save_model(path, config=None, **shape):
    """Write a model's weights, and config.json beside them if there is one -> the reference."""
    torch.manual_seed(0)
    model = PackedAPC(**({"mel_dim": MEL, "hidden": HIDDEN, "layers": LAYERS} | shape))
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)  # an OrderedDict with metadata, as the original's
    if config is not None:
        config = config if isinstance(config, str) else json.dumps(config)
        (path.parent / "config.json").write_text(config)
    return model.eval()


@torch.no_grad()
def assert_same_outputs(model, reference, mel_dim=MEL):
    """On real frames: what lies beyond is for test_apc_model."""
    inputs = torch.randn(3, 20, mel_dim, generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([13, 20, 1])
    (predicted, reps), (expected, expected_reps) = (
        model(inputs, lengths),
        reference(inputs, lengths),
    )
    for b, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(predicted[b, :n], expected[b, :n], rtol=0, atol=1e-5)
        torch.testing.assert_close(reps[:, b, :n], expected_reps[:, b, :n], rtol=0, atol=1e-5)


def refusal(path, **kw):
    """The one-line message that names the file."""
    with pytest.raises((UserError, OSError)) as caught:
        load_pretrained(path, **kw)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message
    return message


def test_importing_and_loading_needs_no_reader_of_other_formats(tmp_path):
    save_model(tmp_path / "w.pt")
    code = (
        "import sys, load_pretrained; load_pretrained.load_pretrained(sys.argv[1], residual=True);"
        "others = {'simdjson', 'kaldiio', 'soundfile', 'kaldi_native_fbank', 'safetensors'};"
        "print(others & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code, tmp_path / "w.pt"]
    env = {**ONE_THREAD, "PYTHONPATH": str(ROOT)}
    assert subprocess.check_output(command, env=env, text=True).strip() == "set()"


# Recognition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"layers": 1},
        {"layers": 5, "hidden": 8, "mel_dim": 80},
        {"hidden": MEL},  # the residual connection reaches the first layer, too
        {"rnn_type": "lstm"},
        {"rnn_type": "lstm", "layers": 1, "hidden": MEL},
        {"prenet_layers": 1},
        {"prenet_layers": 3, "layers": 2, "rnn_type": "lstm"},
        {"layers": 11, "hidden": 4},  # rnns.10 comes after rnns.9
    ],
    ids=str,
)
def test_the_weights_tell_the_network(tmp_path, shape, residual):
    reference = save_model(tmp_path / "w.model", **shape, residual=residual)
    model = load_pretrained(tmp_path / "w.model", residual=residual)
    assert not any(module.training for module in model.modules())
    assert model.mel_dim == shape.get("mel_dim", MEL) and model.rnn_residual is residual
    loaded, saved = model.state_dict(), reference.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert_same_outputs(model, reference, model.mel_dim)


def theirs(weights):
    """The same weights as s3prl, VQ-APC and NPC save them."""
    renamed = {
        name.replace("rnns.", "rnn_layers.").replace("postnet.layer.", "postnet."): weight
        for name, weight in weights.items()
    }
    return renamed | {"postnet.weight": renamed["postnet.weight"][:, :, 0].clone()}


def test_weights_are_told_by_their_names_in_every_format(tmp_path):
    """Of DataParallel and torch.compile, too; whether they are residual is still to be said."""
    reference = save_model(tmp_path / "w.pt", residual=True)
    both = reference.state_dict(), theirs(reference.state_dict())
    prefixes = ("", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.")
    named = [{prefix + name: w[name] for name in w} for w in both for prefix in prefixes]
    npc = [{"model": weights, "optimizer": {}, "global_step": 7} for weights in both]
    for content in named + npc:
        for legacy in (False, True):
            torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
            assert_same_outputs(load_pretrained(tmp_path / "w.pt", residual=True), reference)
        assert "--residual" in refusal(tmp_path / "w.pt")
    for content in named:
        safetensors.torch.save_file(content, tmp_path / "w.safetensors")
        model = load_pretrained(str(tmp_path / "w.safetensors"), torch.device("cpu"), residual=True)
        assert_same_outputs(model, reference)


def test_vq_apc_is_refused_by_name(tmp_path):
    weights = theirs(save_model(tmp_path / "w.pt").state_dict())
    weights["vq_layers.2.vq_logits.weight"] = torch.zeros(128, HIDDEN)
    for content in (weights, {"model": weights}):
        torch.save(content, tmp_path / "w.pt")
        assert "VQ-APC" in refusal(tmp_path / "w.pt", residual=True)


def test_whether_it_is_residual_is_told_by_argument_then_config_then_name_or_asked_for(tmp_path):
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
        (released[0], yes, None, True),
        (released[0], yes | of_foo, None, False),  # another model's
        (released[1], yes, False, False),
        (released[0], no, True, True),
        ("foo__epoch_3.model", None, None, "asked for"),
        ("foo__epoch_3.model", yes | of_apc, None, "asked for"),
        ("my-res-net.pt", None, None, "asked for"),
        ("apc.pt", {"rnn_residual": "maybe"}, None, "asked for"),
    ]
    for number, (name, config, argument, expected) in enumerate(cases):
        path = tmp_path / str(number) / name
        reference = save_model(path, config, residual=expected is True)
        if expected == "asked for":
            message = refusal(path, residual=argument)
            assert "--residual" in message and "--no_residual" in message
        else:
            assert_same_outputs(load_pretrained(path, residual=argument), reference)
    (tmp_path / "link.pt").symlink_to(tmp_path / "0" / "foo__epoch_3.model")
    assert load_pretrained(tmp_path / "link.pt").rnn_residual is True


def test_a_config_that_is_none_or_anothers_is_refused(tmp_path):
    cases = {
        "[]": "JSON object",
        "no json": "not JSON",
        "": "not JSON",
        '{"rnn_hidden_size": 512, "rnn_residual": true}': "rnn_hidden_size is 512",
        '{"rnn_type": "lstm", "rnn_residual": true}': "rnn_type is lstm",
    }
    for config, reason in cases.items():
        save_model(tmp_path / "w.pt", config)
        with pytest.raises(UserError, match=f"config.json: .*{reason}"):
            load_pretrained(tmp_path / "w.pt")


# Refusals -----------------------------------------------------------------------------------------


def test_code_in_a_file_does_not_run(tmp_path):
    files, marker = hostile_files(tmp_path)
    pickle.loads(files["pickle"].read_bytes())
    assert marker.exists(), "the attack does nothing"
    marker.unlink()
    for path in files.values():
        refusal(path, residual=True)
    assert not marker.exists()


def test_files_that_are_no_checkpoint_or_a_damaged_one(tmp_path):
    contents = {
        "text": b"Dear reader, this is no checkpoint.\n" * 10,
        "empty": b"",
        "zip-header": b"PK\x03\x04",
        "binary": bytes(range(256)) * 40,
        "json": b'{"rnn_residual": true}',
    }
    for legacy in (False, True):
        weights = save_model(tmp_path / "w.pt").state_dict()
        torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        whole = (tmp_path / "w.pt").read_bytes()
        contents |= {f"cut-{legacy}-{share}": whole[: len(whole) * share // 10] for share in (3, 9)}
        if not legacy:  # a bit of a weight, which a checksum guards
            at = whole.index(weights["postnet.layer.bias"].numpy().tobytes())
            contents["flipped"] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]
    for name, content in contents.items():
        for path in (tmp_path / name, tmp_path / f"{name}.safetensors"):
            path.write_bytes(content)
            refusal(path, residual=True)
    for name in ("nowhere.pt", "nowhere.safetensors"):
        refusal(tmp_path / name, residual=True)
    (tmp_path / "folder.safetensors").mkdir()
    for path in (tmp_path, tmp_path / "folder.safetensors"):
        refusal(path, residual=True)


def test_files_with_something_else(tmp_path):
    contents = [
        {},
        {"a": torch.zeros(2)},
        torch.zeros(3),
        [torch.zeros(3)],
        7,
        None,
        {1: torch.zeros(2)},
        {"model": [torch.zeros(2)]},
        nn.Linear(3, 3).state_dict(),
        nn.Linear(3, 3),  # a whole pickled object
    ]
    for content in contents:
        torch.save(content, tmp_path / "other.pt")
        refusal(tmp_path / "other.pt", residual=True)


@pytest.mark.parametrize(
    "name, wrong",
    [
        # a weight or the start of several; what is put there instead: a shape, a value, or nothing
        ("rnns.1.bias_hh_l0", [None]),
        ("rnns.0.weight_ih_l0", [None]),
        ("rnns.1.", [None]),
        ("prenet.layers.0.", [None]),
        ("rnns.0.weight_ih_l1", [(48, 16)]),
        ("rnns.0.weight_ih_l0_reverse", [(48, 11)]),
        ("classifier.weight", [(3, 16)]),
        ("rnns.1.weight_ih_l0", [(48, 17), (64, 16)]),  # the latter is an LSTM's
        ("rnns.2.weight_hh_l0", [None, (45, 15)]),
        ("prenet.layers.1.weight", [None, (16, 11)]),
        ("postnet.layer.weight", [None, (11, 16), (11, 16, 3)]),
        ("postnet.layer.bias", [(12,), "text", [0.0], torch.zeros(MEL, dtype=torch.complex64)]),
        ("postnet.layer.bias", [torch.zeros(MEL).to_sparse()]),
        ("rnns.0.weight_hh_l0", [torch.zeros(1).expand(3 * 2**20, 2**20)]),  # 12 TiB, if believed
    ],
)
def test_a_weight_that_is_missing_too_many_or_wrong_is_named(tmp_path, name, wrong):
    weights = save_model(tmp_path / "w.pt", prenet_layers=2).state_dict()
    for weight in wrong:
        edited = {key: value for key, value in weights.items() if not key.startswith(name)}
        if weight is not None:
            edited[name] = torch.zeros(weight) if isinstance(weight, tuple) else weight
        torch.save(edited, tmp_path / "w.pt")
        assert name.rstrip(".") in refusal(tmp_path / "w.pt", residual=True)


@pytest.mark.parametrize(
    "key, values",
    [
        ("data", [3, "audio", {"source": "audio"}, [{}], [[]]]),
        ("cmvn", [None, "speakers", ["speaker"]]),
        ("norm_vars", [None, "yes", 1]),
        ("unbiased_vars", [0]),
        ("fbank", [None, 3, [], {"bins": 80}, {"dither": "1"}, {"eps": float("nan")}]),
        ("fbank", [{"eps": 10**400}]),
        ("cmvn_stats", [None, "sums", [[1.0], [1.0, 2.0]], np.ones((2, MEL)).tolist()]),
        ("cmvn_stats", [np.zeros((2, MEL + 1)).tolist(), [[1.0] * 12, [float("nan")] * 12]]),
        ("rnn_dropout", ["some", [0.1]]),
    ],
)
def test_a_config_that_somebody_edited_ends_in_one_line(tmp_path, call_main, key, values):
    for value in values:
        fbank = PREPARED | {"num_mel_bins": MEL}
        data = {"source": "audio", "fbank": fbank, "cmvn": "speaker"}
        if key == "cmvn_stats":
            data["cmvn"] = "global"
        config = {"rnn_residual": True, "data": [data]}
        (config if key in ("data", "rnn_dropout") else data)[key] = value
        save_model(tmp_path / "w.pt", config)
        done = call_main(script, tmp_path / "w.pt", "--to_s3prl", tmp_path / "out")
        assert "config.json" in error_line(done, "load_pretrained.py"), value
        assert not (tmp_path / "out").exists()


# The script ---------------------------------------------------------------------------------------


def test_the_script_says_what_a_model_is(tmp_path, call_main):
    shapes = {
        "23 37 4 GRU none": {"layers": 4},
        "23 37 5 LSTM 2": {"layers": 5, "rnn_type": "lstm", "prenet_layers": 2},
    }
    for words, shape in shapes.items():
        reference = save_model(tmp_path / "w.pt", mel_dim=23, hidden=37, **shape)
        count = f"{sum(p.numel() for p in reference.parameters()):,}"
        for flag, answer in (("--residual", "yes"), ("--no_residual", "no")):
            done = call_main(script, tmp_path / "w.pt", flag)
            assert done.returncode == 0 and done.stderr == ""
            assert {*words.split(), count, answer} <= set(done.stdout.split()), done.stdout


def test_the_script_refuses_in_one_line(tmp_path, call_main):
    save_model(tmp_path / "w.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    for args, word in (
        (["w.pt"], "--no_residual"),
        (["text.pt", "--residual"], "text.pt"),
        (["nowhere.pt"], "nowhere.pt"),
    ):
        done = call_main(script, tmp_path / args[0], *args[1:])
        assert word in error_line(done, "load_pretrained.py")
    done = call_main(script, tmp_path / "w.pt", "--residual", "--no_residual")
    error_line(done, "load_pretrained.py", status=2)
