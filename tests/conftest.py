"""What several test files share: scripts run for real, data and hostile files, training runs.

Processes that are killed or watched are started by `server`, of processes.py.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from processes import ONE_THREAD, ROOT, Server, error_line, until  # noqa: F401

import utils

# Scripts ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """Starts runs of the scripts: see processes.Server."""
    server = Server(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Run a script's main in this process as the script would: like subprocess.run's result."""

    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # an error replaces it
        capsys.readouterr()
        status = utils.exit_status(module.main)
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return call


def run_script(name, *args, timeout=120, env=None, **kw):
    """Run a script of the repository from a fresh interpreter; output captured as text."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    env = {**os.environ, **ONE_THREAD, **(env or {})}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=env, check=False, **kw
    )


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MiB, or the test is skipped. processes.leave_room fills it."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(path)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


# Data ---------------------------------------------------------------------------------------------


def make_folder(path, lengths, mel_dim=80, max_seq_len=None, seed=0, prefix="utt"):
    """Write a prepared folder in the original release's layout; return its (tensors, lengths).

    `lengths` lists the true frames of each utterance; both results are dicts by file name. The
    frames are a first-order autoregression, so that there is something to predict.
    """
    path = Path(path)
    path.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    max_seq_len = max_seq_len or max(lengths)
    tensors, table = {}, {}
    for number, length in enumerate(lengths):
        name = f"{prefix}-{number:03d}.pt"
        frames = torch.zeros(max_seq_len, mel_dim)
        frame = torch.randn(mel_dim, generator=generator)
        for t in range(length):
            frames[t] = frame
            frame = 0.9 * frame + 0.4 * torch.randn(mel_dim, generator=generator)
        torch.save(frames, path / name)
        tensors[name], table[name] = frames, length
    with open(path / "lengths.pkl", "wb") as file:
        pickle.dump(table, file, protocol=4)
    return tensors, table


def speech(seconds=1.0, seed=0, rate=16000):
    """int16 (samples,): harmonics of a gliding pitch, now loud and now soft, noise, an offset."""
    random = np.random.default_rng(seed)
    t = np.arange(round(seconds * rate)) / rate
    phase = 2 * np.pi * (110 * t + 15 * np.sin(3 * t + seed))
    tone = sum(np.sin(k * phase) / k for k in range(1, 30))
    wave = 4000 * tone * (1 + np.sin(9 * t + seed)) + 50 * random.standard_normal(len(t)) + 200
    return np.clip(wave, -32768, 32767).astype(np.int16)


class Hostile:
    """Pickled, this creates the file `marker` when a careless reader loads it."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


def hostile_files(folder):
    """Write files that would run code -> ({format: path}, the file that would appear then).

    The formats are "pickle", "zip" and "legacy", the latter two of torch.save.
    """
    marker = folder / "marker"
    attack = {"model": Hostile(marker)}
    files = {name: folder / f"hostile.{name}" for name in ("pickle", "zip", "legacy")}
    files["pickle"].write_bytes(pickle.dumps(attack))
    torch.save(attack, files["zip"])
    torch.save(attack, files["legacy"], _use_new_zipfile_serialization=False)
    return files, marker


# Runs of train.py ---------------------------------------------------------------------------------

D, SEQ_LEN = 8, 30
TRAIN = [18, 7, 30, 12, 25, 9, 30, 21, 6, 15, 28, 11, 19, 30, 8, 23, 14, 27, 10, 17, 22]
SHORT = [2, 1]  # no frame to predict at the time shifts that the tests use: left out
VALID = [20, 9, 30, 13, 26]  # in both, one utterance is left over for the last batch
BATCHES, EPOCHS = 6, 3
STEPS = EPOCHS * BATCHES
PLAIN = [
    *("--rnn_hidden_size", 8, "--rnn_num_layers", 2, "--rnn_residual"),
    *("--time_shift", 2, "--batch_size", 4, "--learning_rate", 0.01, "--epochs", EPOCHS),
    *("--device", "cpu", "--load_data_workers", 0),
]
FULL = [  # with all that a resumed run could get wrong
    *(*PLAIN, "--load_data_workers", 1, "--rnn_dropout", 0.3),
    *("--prenet_num_layers", 1, "--prenet_dropout", 0.2),
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of two splits: its path, and {name: (frames, length)} of what is used of each."""
    path = tmp_path_factory.mktemp("corpus")

    def split(name, lengths, **kw):
        tensors, table = make_folder(path / name, lengths, D, SEQ_LEN, **kw)
        return {name: (tensors[name], n) for name, n in table.items() if n > max(SHORT)}

    train = split("train-clean-360", [*TRAIN, *SHORT])
    return SimpleNamespace(path=path, train=train, valid=split("dev-clean", VALID, seed=1))


@pytest.fixture(scope="session")
def place(corpus, tmp_path_factory):
    """place(name) -> (flags that make a run of that name, its folder)."""
    logs = tmp_path_factory.mktemp("logs")

    def place(name, store=logs):
        flags = ["--librispeech_path", corpus.path, "--store_path", store]
        flags += ["--experiment_name", name]
        return flags, Path(store) / f"{name}.dir"

    return place


@pytest.fixture(scope="session")
def one(server, place):
    """{kind of loss: folder of a whole run of one process, without dropout}."""
    jobs = {"padded": [], "masked": ["--mask_padding"]}
    jobs = {name: [*PLAIN, *flags, *place(name)[0]] for name, flags in jobs.items()}
    for process in server.run_all("train.py", jobs).values():
        assert process.returncode == 0, process.stderr
    return {name: place(name)[1] for name in jobs}


def models(path):
    """A run's folder -> {"epoch_<k>": state dict}."""
    return {
        file.stem.partition("__")[2]: torch.load(file, weights_only=True)
        for file in path.glob("*.model")
    }


def last(path):
    return torch.load(path / "last.ckpt", weights_only=True)


def same(weights, others):
    """Whether two state dicts are equal to the bit."""
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def metrics(path):
    """-> lines of steps, lines of epochs; without the speed, which never repeats."""
    steps, epochs = [], []
    for line in (path / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entry.pop("frames_per_second", None)
        (epochs if "validation_loss" in entry else steps).append(entry)
    return steps, epochs


def epoch_losses(path):
    return [(entry["training_loss"], entry["validation_loss"]) for entry in metrics(path)[1]]


def assert_close_losses(path, reference, tolerance=1e-3):
    ours, theirs = epoch_losses(path), epoch_losses(reference)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=tolerance)


def until_step(step, process, path):
    """Wait until a run has logged a step, or an epoch after so many steps.

    What it may be going on with does not count.
    """
    file = path / "metrics.jsonl"

    def is_there():
        if " - model: " not in process.stderr or not file.exists():
            return False
        lines = file.read_text().split("\n")[:-1]  # the last one may be under way
        return any(json.loads(line)["step"] >= step for line in lines)

    until(is_there, process)
