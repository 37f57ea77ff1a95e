"""The three steps as a user runs them: dumps -> folders -> a trained model -> features."""

import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_script
from torch import nn

WIDTH, HIDDEN, LAYERS, SHIFT, SEQ_LEN, EPOCHS = 20, 12, 2, 2, 40, 2
GRU_PARTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def python(name, *argv, cwd):
    done = run_script(name, *argv, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def write_dump(path, count, seed):
    """Smooth random walks, 10 to 60 frames: something for the model to predict."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for number in range(count):
            x = np.cumsum(rng.normal(0, 0.3, (int(rng.integers(10, 60)), WIDTH)), axis=0)
            file.write(f"spk{seed}-{number:03d}\n")
            file.writelines(" ".join(f"{v:.4f}" for v in row) + "\n" for row in x)
            file.write(".\n")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One run of all steps, in a folder of its own, for the tests below to look at."""
    here = tmp_path_factory.mktemp("work")
    data = Path("librispeech_data") / "preprocessed"  # train.py's default
    printed = {}
    for split, count, seed in (("train-clean-360", 24, 1), ("dev-clean", 7, 2)):
        write_dump(here / f"{split}.txt", count, seed)
        flags = ["--librispeech_from_kaldi", f"{split}.txt", "--max_seq_len", SEQ_LEN]
        printed[split] = python("prepare_data.py", *flags, "--save_dir", data / split, cwd=here)
    flags = ["--feature_dim", WIDTH, "--rnn_hidden_size", HIDDEN, "--rnn_num_layers", LAYERS]
    flags += ["--rnn_residual", "--epochs", EPOCHS, "--batch_size", 5, "--time_shift", SHIFT]
    flags += ["--learning_rate", "0.01", "--device", "cpu"]
    printed["train"] = python("train.py", *flags, cwd=here)
    model = Path("logs") / "foo.dir" / f"foo__epoch_{EPOCHS}.model"
    flags = ["--checkpoint", model, "--data_dir", data / "dev-clean", "--save_dir", "features"]
    printed["extract"] = python("extract_features.py", *flags, "--device", "cpu", cwd=here)
    printed["load"] = python("load_pretrained.py", model, cwd=here)
    return here, here / data, here / model, printed


def epoch_lines(text):
    number = r"([0-9.]+(?:e[+-]?\d+)?)"
    pattern = rf"Epoch: (\d+) Training Loss: {number} Validation Loss: {number}"
    return [(int(k), float(a), float(b)) for k, a, b in re.findall(pattern, text)]


@torch.no_grad()
def network(path, x):
    """The paper's network by hand for x (T, D): predicted (T, D) and the last layer (T, H)."""
    weights = torch.load(path, weights_only=True)
    for i in range(LAYERS):
        rnn = nn.GRU(x.shape[1], HIDDEN, batch_first=True)
        prefix = f"rnns.{i}."
        rnn.load_state_dict(
            {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
        )
        y = rnn(x[None])[0][0]
        x = x + y if x.shape == y.shape else y
    return x @ weights["postnet.layer.weight"][:, :, 0].T + weights["postnet.layer.bias"], x


def test_prepared_folders(work):
    _, data, _, _ = work
    for split, count in (("train-clean-360", 24), ("dev-clean", 7)):
        lengths = pickle.loads((data / split / "lengths.pkl").read_bytes())
        assert len(lengths) == count
        assert {path.name for path in (data / split).glob("*.pt")} == set(lengths)


def test_checkpoints_and_config(work):
    _, _, model, _ = work
    names = sorted(path.name for path in model.parent.glob("*.model"))
    # As the original: number 0 is the untrained model.
    assert names == [f"foo__epoch_{k}.model" for k in range(EPOCHS + 1)]
    weights = torch.load(model, weights_only=True)
    assert set(weights) == {
        *(f"rnns.{i}.{kind}_l0" for i in range(LAYERS) for kind in GRU_PARTS),
        "postnet.layer.weight",
        "postnet.layer.bias",
    }
    config = json.loads((model.parent / "config.json").read_text())
    asked = {"rnn_residual": True, "rnn_hidden_size": HIDDEN, "time_shift": SHIFT, "epochs": EPOCHS}
    assert {name: config[name] for name in asked} == asked
    assert list(model.parent.parent.rglob("events.out.tfevents.*"))


def test_epoch_lines_on_the_console_and_in_the_log(work):
    _, _, model, printed = work
    lines = epoch_lines(printed["train"].stdout + printed["train"].stderr)
    assert [number for number, _, _ in lines] == list(range(1, EPOCHS + 1))
    assert all(math.isfinite(a) and math.isfinite(b) for _, a, b in lines)
    assert lines[-1][2] < lines[0][2], "the validation loss did not fall"
    files = [path for path in model.parent.iterdir() if path.is_file()]
    logs = [path for path in files if epoch_lines(path.read_text(errors="replace")) == lines]
    assert len(logs) == 1, files


def test_validation_loss_is_the_originals(work):
    """Mean absolute error over all SEQ_LEN - n positions, padding included, padded for real."""
    _, data, model, printed = work
    lengths = pickle.loads((data / "dev-clean" / "lengths.pkl").read_bytes())
    losses = []
    for name, length in lengths.items():
        x = torch.load(data / "dev-clean" / name, weights_only=True)
        predicted, _ = network(model, x[: length - SHIFT])
        bias = torch.load(model, weights_only=True)["postnet.layer.bias"]
        padded = torch.cat([predicted, bias.repeat(SEQ_LEN - length, 1)])
        losses.append((padded - x[SHIFT:]).abs().mean().item())
    printed_loss = epoch_lines(printed["train"].stdout + printed["train"].stderr)[-1][2]
    assert printed_loss == pytest.approx(np.mean(losses), abs=2e-5)


def test_features(work):
    here, data, model, _ = work
    lengths = pickle.loads((data / "dev-clean" / "lengths.pkl").read_bytes())
    assert {path.name for path in (here / "features").glob("*.pt")} == set(lengths)
    for name, length in lengths.items():
        x = torch.load(data / "dev-clean" / name, weights_only=True)[:length]
        features = torch.load(here / "features" / name, weights_only=True)
        assert features.shape == (length, HIDDEN)
        assert torch.allclose(features, network(model, x)[1], atol=1e-5)


def test_summary(work):
    _, _, model, printed = work
    weights = torch.load(model, weights_only=True)
    text = printed["load"].stdout.replace(",", "").lower()
    for word in ("gru", str(HIDDEN), str(sum(value.numel() for value in weights.values()))):
        assert word in text
