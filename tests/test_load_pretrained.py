"""load_pretrained.py against the packed reference, saved under the original's names, and against
files that are no model."""

import json
import pickle

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import hostile_files
from processes import error_line
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
    predicted, reps = model(inputs, lengths)
    expected, expected_reps = reference(inputs, lengths)
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


# Recognition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize(
    "words, shape",
    [
        ("3 GRU none 16 11", {}),
        ("1 GRU none 16 11", {"layers": 1}),
        ("3 GRU none 11 11", {"hidden": MEL}),  # the first layer is residual, too
        ("1 LSTM none 11 11", {"rnn_type": "lstm", "layers": 1, "hidden": MEL}),
        ("2 LSTM 3 16 80", {"rnn_type": "lstm", "layers": 2, "prenet_layers": 3, "mel_dim": 80}),
        ("11 GRU 1 4 11", {"layers": 11, "hidden": 4, "prenet_layers": 1}),  # rnns.10 after rnns.9
    ],
    ids=str,
)
def test_the_weights_tell_the_network(tmp_path, call_main, words, shape, residual):
    reference = save_model(tmp_path / "w.model", **shape, residual=residual)
    model = load_pretrained(tmp_path / "w.model", residual=residual)
    assert not any(module.training for module in model.modules())
    loaded, saved = model.state_dict(), reference.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], value) for name, value in saved.items())
    assert_same_outputs(model, reference, model.mel_dim)
    done = call_main(script, tmp_path / "w.model", "--residual" if residual else "--no_residual")
    assert done.returncode == 0 and done.stderr == ""
    words += f" {'yes' if residual else 'no'} {sum(w.numel() for w in saved.values()):,}"
    assert {*words.split()} <= {*done.stdout.split()}, done.stdout


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_precision_become_float32(tmp_path, dtype):
    reference = save_model(tmp_path / "w.pt", residual=True)
    stored = {name: weight.to(dtype) for name, weight in reference.state_dict().items()}
    reference.load_state_dict(stored)  # rounded
    torch.save(stored, tmp_path / "w.pt")
    safetensors.torch.save_file(stored, tmp_path / "w.safetensors")
    for name in ("w.pt", "w.safetensors"):
        model = load_pretrained(tmp_path / name, residual=True)
        assert {weight.dtype for weight in model.state_dict().values()} == {torch.float32}
        assert_same_outputs(model, reference)


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
    contents = {"text": b"Dear reader, this is no checkpoint.\n" * 10, "empty": b""}
    contents |= {"zip-header": b"PK\x03\x04", "binary": bytes(range(256)) * 40}
    weights = save_model(tmp_path / "w.pt").state_dict()
    for legacy in (True, False):
        torch.save(weights, tmp_path / "w.pt", _use_new_zipfile_serialization=not legacy)
        whole = (tmp_path / "w.pt").read_bytes()
        contents |= {f"cut-{legacy}-{share}": whole[: len(whole) * share // 10] for share in (3, 9)}
    at = whole.index(weights["postnet.layer.bias"].numpy().tobytes())
    contents["flipped"] = whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :]  # see the checksum
    names = [name + ending for name in contents for ending in ("", ".safetensors")]
    for name in names:
        (tmp_path / name).write_bytes(contents[name.removesuffix(".safetensors")])
    (tmp_path / "folder.safetensors").mkdir()
    for name in (*names, "nowhere.pt", "nowhere.safetensors", "folder.safetensors", "."):
        refusal(tmp_path / name, residual=True)


@pytest.mark.parametrize(
    "content",
    [
        *({}, {"a": torch.zeros(2)}, {1: torch.zeros(2)}, {"model": [torch.zeros(2)]}),
        *(torch.zeros(3), [torch.zeros(3)], 7, None),
        *(nn.Linear(3, 3).state_dict(), nn.Linear(3, 3)),  # the latter a whole pickled object
    ],
    ids=lambda content: repr(content)[:40],
)
def test_files_with_something_else(tmp_path, content):
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
        assert named in refusal(tmp_path / "w.pt", residual=True)


@pytest.mark.parametrize(
    "key, values",
    [
        (None, ["[]", "no json", ""]),
        ("rnn_hidden_size", [512]),
        ("rnn_type", ["lstm"]),
        ("rnn_dropout", ["some", [0.1]]),
        ("data", [3, "audio", {"source": "audio"}, [{}], [[]]]),
        ("cmvn", [None, "speakers", ["speaker"]]),
        ("norm_vars", [None, "yes", 1]),
        ("unbiased_vars", [0]),
        ("fbank", [None, 3, [], {"bins": 80}, {"dither": "1"}, {"eps": float("nan")}]),
        ("fbank", [{"eps": 10**400}]),
        ("cmvn_stats", [None, "sums", [[1.0], [1.0, 2.0]], np.ones((2, MEL)).tolist()]),
        ("cmvn_stats", [np.zeros((2, MEL + 1)).tolist(), [[1.0] * 12, [float("nan")] * 12]]),
    ],
)
def test_a_config_that_is_anothers_or_edited_ends_in_one_line(tmp_path, call_main, key, values):
    for value in values:
        data = {"source": "audio", "fbank": PREPARED | {"num_mel_bins": MEL}, "cmvn": "speaker"}
        if key == "cmvn_stats":
            data["cmvn"] = "global"
        config = {"rnn_residual": True, "data": [data]}
        (config if key == "data" or str(key).startswith("rnn") else data)[key] = value
        save_model(tmp_path / "w.pt", config if key else value)
        done = call_main(script, tmp_path / "w.pt", "--to_s3prl", tmp_path / "out")
        line = error_line(done, "load_pretrained.py")
        assert "config.json" in line and (key is None or "rnn" not in key or key in line), value
        assert not (tmp_path / "out").exists()


def test_the_script_refuses_in_one_line(tmp_path, call_main):
    save_model(tmp_path / "w.pt")
    for argv, word, status in (
        (["w.pt"], "--no_residual", 1),
        (["nowhere.pt"], "nowhere.pt", 1),
        (["w.pt", "--residual", "--no_residual"], "not allowed", 2),
    ):
        done = call_main(script, tmp_path / argv[0], *argv[1:])
        assert word in error_line(done, "load_pretrained.py", status)
