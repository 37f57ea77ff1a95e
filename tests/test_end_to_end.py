"""The three steps as a user runs them: dumps -> folders -> a trained model -> features."""

import json
import pickle
import re

import numpy as np
import pytest
import torch
from reference import PackedAPC, evaluate

WIDTH, HIDDEN, LAYERS, SHIFT, SEQ_LEN, EPOCHS = 20, 12, 2, 2, 40, 2
COUNTS = {"train-clean-360": 24, "dev-clean": 7}


def write_dump(path, count, seed):
    """Smooth random walks, 10 to 60 frames: something for the model to predict."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for number in range(count):
            x = np.cumsum(rng.normal(0, 0.3, (int(rng.integers(10, 60)), WIDTH)), axis=0)
            file.write(f"spk{seed}-{number:03d}\n")
            file.writelines(" ".join(f"{v:.4f}" for v in row) + "\n" for row in x)
            file.write(".\n")


def epoch_lines(text):
    pattern = r"Epoch: (\d+) Training Loss: ([\d.]+) Validation Loss: ([\d.]+)"
    return [(int(k), float(a), float(b)) for k, a, b in re.findall(pattern, text)]


def test_from_dumps_to_features(server, tmp_path):
    def run(script, *flags):
        process = server.run(script, *flags, cwd=tmp_path)
        assert process.returncode == 0 and "Traceback" not in process.stderr, process.stderr
        return process.stdout + process.stderr

    data = tmp_path / "librispeech_data" / "preprocessed"  # train.py's default
    for seed, (split, count) in enumerate(COUNTS.items()):
        write_dump(tmp_path / f"{split}.txt", count, seed)
        flags = ["--librispeech_from_kaldi", f"{split}.txt", "--max_seq_len", SEQ_LEN]
        run("prepare_data.py", *flags, "--save_dir", data / split)
        lengths = pickle.loads((data / split / "lengths.pkl").read_bytes())
        assert len(lengths) == count
        assert {path.name for path in (data / split).glob("*.pt")} == set(lengths)

    flags = ["--feature_dim", WIDTH, "--rnn_hidden_size", HIDDEN, "--rnn_num_layers", LAYERS]
    flags += ["--rnn_residual", "--epochs", EPOCHS, "--batch_size", 5, "--time_shift", SHIFT]
    flags += ["--learning_rate", "0.01", "--device", "cpu"]
    lines = epoch_lines(run("train.py", *flags))
    logs = tmp_path / "logs" / "foo.dir"
    assert [number for number, _, _ in lines] == list(range(1, EPOCHS + 1))
    assert lines[-1][2] < lines[0][2], "the validation loss did not fall"
    assert epoch_lines((logs / "foo").read_text()) == lines
    models = sorted(path.name for path in logs.glob("*.model"))
    assert models == [f"foo__epoch_{k}.model" for k in range(EPOCHS + 1)]  # 0 is untrained
    assert json.loads((logs / "config.json").read_text())["time_shift"] == SHIFT
    assert list((logs / "foo.tb_log").glob("events.out.tfevents.*"))

    # By the reference, padded for real: the loss is the original's.
    reference = PackedAPC(WIDTH, HIDDEN, LAYERS, residual=True)
    reference.load_state_dict(torch.load(logs / models[-1], weights_only=True))
    dev = data / "dev-clean"
    frames = torch.stack([torch.load(dev / name, weights_only=True) for name in lengths])
    counts = torch.tensor([*lengths.values()])
    assert lines[-1][2] == pytest.approx(evaluate(reference, [(frames, counts)], SHIFT), abs=2e-5)

    flags = ["--checkpoint", logs / models[-1], "--data_dir", dev, "--save_dir", "features"]
    run("extract_features.py", *flags, "--device", "cpu")
    with torch.no_grad():
        expected = reference(frames, counts)[1][-1]
    assert {path.name for path in (tmp_path / "features").glob("*.pt")} == set(lengths)
    for name, features, length in zip(lengths, expected, counts):
        found = torch.load(tmp_path / "features" / name, weights_only=True)
        torch.testing.assert_close(found, features[:length], rtol=0, atol=1e-5)

    text = run("load_pretrained.py", logs / models[-1]).replace(",", "").lower()
    numel = sum(parameter.numel() for parameter in reference.parameters())
    assert all(word in text for word in ("gru", str(HIDDEN), str(numel)))
