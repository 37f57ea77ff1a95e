"""extract_features.py: what it writes is what the model says of each utterance alone."""

import os
import re

import pytest
import torch
from conftest import make_folder, run_script

import extract_features
from apc_model import APCModel
from utils import PrenetConfig, RNNConfig

MEL, HIDDEN, SEQ_LEN = 7, 10, 25
FRAMES = [25, 1, 13, 24, 2, 13, 8]


def write_folder(path, width=MEL):
    """A prepared folder; give {file name: its real frames (T, width)}."""
    tensors, lengths = make_folder(path, FRAMES, width, SEQ_LEN)
    return {name: tensors[name][:length] for name, length in lengths.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "dev"
    return path, write_folder(path)


def build(path, prenet_layers=0, residual=True, rnn_type="gru", layers=3):
    """Save a model's weights; give {frames (T, D)} -> (layers, T, H) by its forward, alone."""
    torch.manual_seed(4)
    prenet = PrenetConfig(MEL, HIDDEN, prenet_layers, 0.5) if prenet_layers else None
    first = HIDDEN if prenet_layers else MEL
    # Dropout is for training: here it would show.
    model = APCModel(MEL, prenet, RNNConfig(first, HIDDEN, layers, 0.5, residual, rnn_type)).eval()
    torch.save(model.state_dict(), path)

    @torch.no_grad()
    def alone(frames):
        return model.forward(frames[None], torch.tensor([len(frames)]))[1][:, 0]

    return alone


@pytest.fixture
def extract(call_main):
    """Run extract_features.py's main as the script would: (status, stderr)."""

    def call(checkpoint, data_dir, save_dir, *options, device="cpu"):
        argv = ["--checkpoint", checkpoint, "--data_dir", data_dir, "--save_dir", save_dir]
        argv += ["--device", device, *options]
        done = call_main(extract_features, *argv)
        return done.returncode, done.stderr

    return call


def error_line(stderr, parser=False):
    assert "Traceback" not in stderr
    lines = [line for line in re.split(r"[\r\n]+", stderr) if line.strip()]
    assert lines and lines[-1].startswith("extract_features.py: error: "), stderr
    assert parser or sum("rror:" in line for line in lines) == 1, stderr
    return lines[-1].removeprefix("extract_features.py: error: ")


def features(save_dir):
    """{file name: tensor} of a folder of features; every .pt in it is whole."""
    out = {}
    for name in os.listdir(save_dir):
        assert name.endswith(".pt") or "tmp" not in name, f"left behind: {name}"
        if name.endswith(".pt"):
            tensor = torch.load(save_dir / name, weights_only=True)
            assert tensor.dtype == torch.float32
            assert not tensor.requires_grad
            assert tensor.untyped_storage().nbytes() == tensor.numel() * 4
            out[name] = tensor
    return out


def assert_close(got, frames, truth):
    assert sorted(got) == sorted(frames)
    for name, x in frames.items():
        expected = truth(x)
        assert got[name].shape == expected.shape
        assert torch.allclose(got[name], expected, atol=1e-5), name


# ------------------------------------------------------------------------------ good runs


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_features_do_not_depend_on_the_batch(tmp_path, extract, folder, batch_size):
    data, frames = folder
    alone = build(tmp_path / "m.pt")
    status, stderr = extract(
        tmp_path / "m.pt", data, tmp_path / "out", "--residual", "--batch_size", batch_size
    )
    assert status == 0, stderr
    got = features(tmp_path / "out")
    assert_close(got, frames, lambda x: alone(x)[-1])
    assert [tuple(got[name].shape) for name in sorted(got)] == [(n, HIDDEN) for n in FRAMES]


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"prenet_layers": 2, "residual": False},
        {"prenet_layers": 1, "rnn_type": "lstm", "layers": 2},
        {"layers": 1, "residual": False},
    ],
    ids=str,
)
def test_layers(tmp_path, extract, folder, model):
    data, frames = folder
    alone = build(tmp_path / "m.pt", **model)
    count = model.get("layers", 3) + bool(model.get("prenet_layers"))
    flag = "--residual" if model.get("residual", True) else "--no_residual"
    run = [tmp_path / "m.pt", data]

    status, stderr = extract(*run, tmp_path / "all", flag, "--layer", "all")
    assert status == 0, stderr
    got = features(tmp_path / "all")
    assert_close(got, frames, alone)
    assert [tuple(got[name].shape) for name in sorted(got)] == [(count, n, HIDDEN) for n in FRAMES]

    status, stderr = extract(*run, tmp_path / "first", flag, "--layer", 0)
    assert status == 0, stderr
    assert_close(features(tmp_path / "first"), frames, lambda x: alone(x)[0])

    status, stderr = extract(*run, tmp_path / "last", flag, "--layer", count - 1)
    assert status == 0, stderr
    assert_close(features(tmp_path / "last"), frames, lambda x: alone(x)[-1])


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("layer", ["4", "99", "top", "", "1.5", "-9"])
def test_a_layer_that_is_none_gets_the_valid_choices(tmp_path, extract, folder, layer):
    build(tmp_path / "m.pt", prenet_layers=1)  # layers 0 (prenet), 1, 2, 3
    status, stderr = extract(
        tmp_path / "m.pt", folder[0], tmp_path / "out", "--residual", f"--layer={layer}"
    )
    assert status not in (0, None)
    message = error_line(stderr, parser=True)
    assert "all" in message
    if layer.isdigit():  # whether text is a layer the parser knows before it sees the model
        assert re.search(r"\b0\b.*\b3\b", message), message
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_another_width_is_refused(tmp_path, extract):
    build(tmp_path / "m.pt")
    write_folder(tmp_path / "wide", MEL + 4)
    status, stderr = extract(tmp_path / "m.pt", tmp_path / "wide", tmp_path / "out", "--residual")
    assert status not in (0, None)
    message = error_line(stderr).replace(str(tmp_path), "")
    assert re.search(rf"\b{MEL}\b", message)
    assert re.search(rf"\b{MEL + 4}\b", message)
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_missing_inputs_are_named(tmp_path, extract, folder):
    build(tmp_path / "m.pt")
    cases = {
        "nowhere.pt": (tmp_path / "nowhere.pt", folder[0]),
        "no-data": (tmp_path / "m.pt", tmp_path / "no-data"),
        "unfinished": (tmp_path / "m.pt", tmp_path / "unfinished"),
    }
    (tmp_path / "unfinished").mkdir()
    for name, (checkpoint, data) in cases.items():
        status, stderr = extract(checkpoint, data, tmp_path / "out", "--residual")
        assert status not in (0, None)
        assert name in error_line(stderr)


def test_residual_is_asked_for(tmp_path, extract, folder):
    build(tmp_path / "m.pt")
    status, stderr = extract(tmp_path / "m.pt", folder[0], tmp_path / "out")
    assert status not in (0, None)
    message = error_line(stderr)
    assert "--residual" in message
    assert "--no_residual" in message
    status, stderr = extract(
        tmp_path / "m.pt", folder[0], tmp_path / "out", "--residual", "--no_residual"
    )
    assert status == 2


@pytest.mark.parametrize("batch_size", ["0", "-4", "many"])
def test_impossible_batch_size(tmp_path, extract, folder, batch_size):
    build(tmp_path / "m.pt")
    status, stderr = extract(
        tmp_path / "m.pt", folder[0], tmp_path / "out", "--residual", f"--batch_size={batch_size}"
    )
    assert status == 2
    assert "--batch_size" in error_line(stderr, parser=True)


def test_save_dir_that_is_a_file(tmp_path, extract, folder):
    build(tmp_path / "m.pt")
    (tmp_path / "occupied").write_text("mine")
    status, stderr = extract(tmp_path / "m.pt", folder[0], tmp_path / "occupied", "--residual")
    assert status not in (0, None)
    assert "occupied" in error_line(stderr)
    assert (tmp_path / "occupied").read_text() == "mine"


def test_features_never_land_on_their_source(tmp_path, extract):
    """The names are the same: written into the prepared folder they would destroy it."""
    build(tmp_path / "m.pt")
    data = tmp_path / "data"
    write_folder(data)
    before = {path.name: path.read_bytes() for path in data.iterdir()}
    status, stderr = extract(tmp_path / "m.pt", data, data, "--residual")
    assert status not in (0, None)
    error_line(stderr)
    assert {path.name: path.read_bytes() for path in data.iterdir()} == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tmp_path, extract, folder):
    build(tmp_path / "m.pt")
    status, stderr = extract(
        tmp_path / "m.pt", folder[0], tmp_path / "out", "--residual", device="cuda"
    )
    assert status not in (0, None)
    assert "cuda" in error_line(stderr)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_on_a_gpu(tmp_path, extract, folder):
    data, frames = folder
    alone = build(tmp_path / "m.pt")
    status, stderr = extract(tmp_path / "m.pt", data, tmp_path / "out", "--residual", device="cuda")
    assert status == 0, stderr
    for name, tensor in features(tmp_path / "out").items():
        assert tensor.device.type == "cpu"
        # TF32 and other kernels: not the CPU's digits.
        assert torch.allclose(tensor, alone(frames[name])[-1], atol=5e-3)


def test_a_failed_run_leaves_whole_files_only(tmp_path):
    build(tmp_path / "m.pt")
    data = tmp_path / "data"
    frames = write_folder(data)
    bad = data / "utt-005.pt"
    bad.write_bytes(bad.read_bytes()[:700])
    # A process of its own: the loader's workers end with it.
    argv = ["--checkpoint", tmp_path / "m.pt", "--data_dir", data, "--save_dir", tmp_path / "out"]
    argv += ["--residual", "--batch_size", 1, "--device", "cpu"]
    done = run_script("extract_features.py", *argv)
    assert done.returncode not in (0, None)
    assert bad.name in error_line(done.stderr)
    if (tmp_path / "out").exists():
        for name, tensor in features(tmp_path / "out").items():
            assert tensor.shape == (len(frames[name]), HIDDEN)
