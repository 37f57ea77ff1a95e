"""The three steps as a user runs them: data -> prepared datasets -> a trained model -> features."""

import json
import pickle
import re
import shutil
import wave

import numpy as np
import pytest
import torch
from conftest import ROOT, call, finished, speech, succeeded
from reference import PackedAPC, evaluate

import extract_features
import load_pretrained
import prepare_data
import train

MEL, HIDDEN, LAYERS, SHIFT, SEQ_LEN, EPOCHS = 20, 12, 2, 2, 40, 2
COUNTS = {"train-clean-360": 24, "dev-clean": 7}


def write_dump(path, count, seed):
    """Smooth random walks, 10 to 60 frames: something for the model to predict."""
    rng = np.random.default_rng(seed)
    with open(path, "w") as file:
        for number in range(count):
            x = np.cumsum(rng.normal(0, 0.3, (int(rng.integers(10, 60)), MEL)), axis=0)
            file.write(f"spk{seed}-{number:03d}\n")
            file.writelines(" ".join(f"{v:.4f}" for v in row) + "\n" for row in x)
            file.write(".\n")


def epoch_lines(text):
    pattern = r"Epoch: (\d+) Training Loss: ([\d.]+) Validation Loss: ([\d.]+)"
    return [(int(k), float(a), float(b)) for k, a, b in re.findall(pattern, text)]


def test_from_dumps_to_features(tmp_path, monkeypatch):
    def run(script, *flags):
        process = succeeded(call(script, *flags))
        return process.stdout + process.stderr

    monkeypatch.chdir(tmp_path)
    data = tmp_path / "librispeech_data" / "preprocessed"  # train.py's default
    for seed, (split, count) in enumerate(COUNTS.items()):
        write_dump(tmp_path / f"{split}.txt", count, seed)
        flags = ["--librispeech_from_kaldi", f"{split}.txt", "--max_seq_len", SEQ_LEN]
        run(prepare_data, *flags, "--save_dir", data / split)
        lengths = pickle.loads((data / split / "lengths.pkl").read_bytes())
        assert len(lengths) == count
        assert {path.name for path in (data / split).glob("*.pt")} == set(lengths)

    flags = ["--feature_dim", MEL, "--rnn_hidden_size", HIDDEN, "--rnn_num_layers", LAYERS]
    flags += ["--rnn_residual", "--epochs", EPOCHS, "--batch_size", 5, "--time_shift", SHIFT]
    flags += ["--learning_rate", "0.01", "--device", "cpu"]
    lines = epoch_lines(run(train, *flags))
    logs = tmp_path / "logs" / "foo.dir"
    assert [number for number, _, _ in lines] == list(range(1, EPOCHS + 1))
    assert lines[-1][2] < lines[0][2], "the validation loss did not fall"
    assert epoch_lines((logs / "foo").read_text()) == lines
    models = sorted(path.name for path in logs.glob("*.model"))
    assert models == [f"foo__epoch_{k}.model" for k in range(EPOCHS + 1)]  # 0 is before training
    assert json.loads((logs / "config.json").read_text())["time_shift"] == SHIFT
    assert list((logs / "foo.tb_log").glob("events.out.tfevents.*"))

    # By the reference, padded for real: the loss is the original's.
    reference = PackedAPC(MEL, HIDDEN, LAYERS, residual=True)
    reference.load_state_dict(torch.load(logs / models[-1], weights_only=True))
    dev = data / "dev-clean"
    frames = torch.stack([torch.load(dev / name, weights_only=True) for name in lengths])
    counts = torch.tensor([*lengths.values()])
    assert lines[-1][2] == pytest.approx(evaluate(reference, [(frames, counts)], SHIFT), abs=2e-5)

    flags = ["--checkpoint", logs / models[-1], "--data_dir", dev, "--save_dir", "features"]
    run(extract_features, *flags, "--device", "cpu")
    with torch.no_grad():
        expected = reference(frames, counts)[1][-1]
    assert {path.name for path in (tmp_path / "features").glob("*.pt")} == set(lengths)
    for name, features, length in zip(lengths, expected, counts):
        found = torch.load(tmp_path / "features" / name, weights_only=True)
        torch.testing.assert_close(found, features[:length], rtol=0, atol=1e-5)

    text = run(load_pretrained, logs / models[-1]).replace(",", "").lower()
    numel = sum(parameter.numel() for parameter in reference.parameters())
    assert all(word in text for word in ("gru", str(HIDDEN), str(numel)))


OTHER_PLATFORM = """
import builtins, multiprocessing, os, signal

ROOT = {root!r}
MISSING = {{
    os: ("fork", "forkpty", "sched_getaffinity", "sync", "setsid", "getpgid", "killpg", "getuid"),
    signal: ("SIGUSR1", "SIGUSR2", "SIGHUP", "pthread_sigmask", "sigwait", "setitimer"),
}}
import_module = builtins.__import__


def import_unless_missing(name, globals=None, *args, **kw):
    importer = (globals or {{}}).get("__file__") or ""
    is_ours = importer.startswith(ROOT) and "site-packages" not in importer
    if is_ours and name in ("fcntl", "resource", "pwd", "grp", "termios"):
        raise ModuleNotFoundError(f"No module named {{name!r}}")
    return import_module(name, globals, *args, **kw)


builtins.__import__ = import_unless_missing
for module, names in MISSING.items():
    for name in names:
        delattr(module, name)
multiprocessing.set_start_method("spawn")
get_context = multiprocessing.get_context
multiprocessing.get_context = lambda _=None: get_context("spawn")  # on Linux we ask for fork
"""
HUB = """
import sys, torch

root, model, audio = sys.argv[1:]
features = torch.hub.load(root, "apc_features", model, residual=False, source="local")
print(*features(audio).shape)
"""


def test_no_script_needs_what_windows_lacks(start, tmp_path):
    """Imitated: without Unix' modules, signals and os functions, and processes by spawn."""
    (tmp_path / "site").mkdir()
    code = OTHER_PLATFORM.format(root=str(ROOT))
    (tmp_path / "site/sitecustomize.py").write_text(code)
    (tmp_path / "hub.py").write_text(HUB)
    (tmp_path / "audio/speaker").mkdir(parents=True)
    for number in range(4):
        with wave.open(str(tmp_path / f"audio/speaker/utt-{number}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(speech(0.5, number).tobytes())
    torch.save(PackedAPC(80, HIDDEN, LAYERS).state_dict(), tmp_path / "model")

    def run(script, *flags):
        env = {"PYTHONPATH": str(tmp_path / "site")}
        return start(script, *flags, cwd=tmp_path, env=env)

    data = ["--audio", "audio", "--cmvn", "utterance", "--max_seq_len", SEQ_LEN]
    succeeded(finished(run("prepare_data.py", *data, "--save_dir", "data/a", "--num_workers", 2)))
    shutil.copytree(tmp_path / "data/a", tmp_path / "data/b")
    flags = ["--librispeech_path", "data", "--train_split", "a", "--valid_split", "b"]
    flags += ["--rnn_hidden_size", 8, "--epochs", 1, "--batch_size", 2, "--device", "cpu"]
    features = ["--checkpoint", "model", "--no_residual", "--audio", "audio", "--save_dir", "out"]
    processes = [
        run("train.py", *flags, "--load_data_workers", 1),
        run("extract_features.py", *features, "--device", "cpu"),
        run(tmp_path / "hub.py", ROOT, "model", "audio/speaker/utt-0.wav"),
    ]
    for process in map(finished, processes):
        assert "Traceback" not in succeeded(process).stderr
    assert process.stdout == f"48 {HIDDEN}\n"
    assert (tmp_path / "logs/foo.dir/foo__epoch_1.model").exists()
    assert len(list((tmp_path / "out").glob("utt-*.pt"))) == 4
