"""formats/onnx.py: ONNX Runtime with nothing but the file, against the packed reference."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import error_line, snapshot
from test_fbank import PREPARED
from test_load_pretrained import MEL, save_model

import load_pretrained as script
from formats import onnx as our_onnx

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

DATA = {"source": "audio", "fbank": PREPARED | {"num_mel_bins": MEL}, "cmvn": "speaker"}
CONFIG = {"rnn_residual": True, "time_shift": 3, "data": [DATA]}


@pytest.mark.parametrize(
    "shape",
    [
        {"residual": True},
        {"hidden": MEL, "residual": True},  # the first layer too
        {"layers": 11, "hidden": 4},  # 1, 10, 11 ...
        {"prenet_layers": 2, "residual": True},
        {"rnn_type": "lstm", "residual": True},
        {"rnn_type": "lstm", "layers": 11, "hidden": 4, "prenet_layers": 1},
        {"mel_dim": 80, "hidden": 512, "residual": True},
    ],
    ids=str,
)
def test_the_file_streams_as_the_model_does(tmp_path, call_main, shape):
    reference = save_model(tmp_path / "foo.model", {"rnn_residual": False}, **shape)
    flag = "--residual" if reference.residual else "--no_residual"
    done = call_main(script, tmp_path / "foo.model", flag, "--to_onnx", tmp_path / "new/foo.onnx")
    assert done.returncode == 0, done.stderr
    onnx.checker.check_model(tmp_path / "new/foo.onnx", full_check=True)
    session = onnxruntime.InferenceSession(tmp_path / "new/foo.onnx")
    layers, _, hidden = session.get_inputs()[1].shape
    for batch_size, sizes in ((1, [1] * 9), (1, [40]), (2, [1, 30, 2]), (5, [7, 7, 7, 2])):
        inputs = torch.randn(batch_size, sum(sizes), reference.postnet.layer.out_channels)
        state, outputs = np.zeros((layers, batch_size, hidden), np.float32), []
        for chunk in inputs.split(sizes, dim=1):
            *chunk_outputs, state = session.run(None, {"chunk": chunk.numpy(), "state": state})
            outputs.append(chunk_outputs)
        predicted, reps = zip(*outputs)
        with torch.no_grad():
            expected = reference(inputs, torch.full([batch_size], sum(sizes)))
        np.testing.assert_allclose(np.concatenate(predicted, 1), expected[0], rtol=0, atol=1e-5)
        np.testing.assert_allclose(np.concatenate(reps, 2), expected[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("data", [DATA, None])
def test_the_file_says_what_it_reads(tmp_path, call_main, data):
    save_model(tmp_path / "foo.model", CONFIG | {"data": [data]})
    call_main(script, tmp_path / "foo.model", "--to_onnx", tmp_path / "foo.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "foo.onnx")
    about = session.get_modelmeta().custom_metadata_map
    expected = {"mel_dim": MEL, "time_shift": 3, "data": data}
    assert {name: json.loads(value) for name, value in about.items()} == expected


def test_what_cannot_be_written_ends_in_one_line(tmp_path, call_main, monkeypatch):
    weights = save_model(tmp_path / "foo.model", CONFIG).state_dict()
    torch.save(weights | {"postnet.layer.bias": torch.full([MEL], torch.nan)}, tmp_path / "nan.pt")
    needs = "needs {}: pip install -r requirements-onnx.txt"
    before = snapshot(tmp_path)
    for name, change, words in (
        # the file, what is changed beforehand, words of the line
        ("nan.pt", ({}, "nothing", None), "differ from this model's by nan"),
        ("foo.model", (our_onnx.GATES, "gru", [0, 1, 2]), "differ from this model's by"),
        ("foo.model", (sys.modules, "onnx", None), needs.format("onnx")),
        ("foo.model", (sys.modules, "onnxruntime", None), needs.format("onnxruntime")),
    ):
        with monkeypatch.context() as patch:
            patch.setitem(*change)
            argv = [tmp_path / name, "--residual", "--to_onnx", tmp_path / "out"]
            assert words in error_line(call_main(script, *argv), "load_pretrained.py")
        assert snapshot(tmp_path) == before
