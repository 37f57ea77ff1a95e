"""What several test files share: runs of the scripts, prepared datasets, hostile files."""

import contextlib
import gc
import io
import json
import logging
import multiprocessing
import os
import pickle
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train
import utils

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# Scripts ------------------------------------------------------------------------------------------


def call(module, *argv):
    """Run a script's main() in this process -> what subprocess.run would return.

    Signal handlers and logging are afterwards as they were.
    """
    handlers = {number: signal.getsignal(number) for number in utils.SIGNALS}
    log, argv_before = logging.getLogger(), sys.argv
    log_before = log.handlers[:], log.level
    out, err = io.StringIO(), io.StringIO()
    sys.argv = [module.__file__, *map(str, argv)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = utils.exit_status(module.main)
    finally:
        if multiprocessing.active_children():
            gc.collect()  # a loader that is freed ends its workers
            utils.kill_workers()
        sys.argv = argv_before
        log.handlers[:], log.level = log_before
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return SimpleNamespace(returncode=status, stdout=out.getvalue(), stderr=err.getvalue())


@pytest.fixture
def call_main():
    return call


def run_script(name, *args, timeout=120, env=None, **kw):
    """Run a script of the repository from a fresh interpreter; output captured as text."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    env = {**os.environ, **ONE_THREAD, **(env or {})}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=env, check=False, **kw
    )


@pytest.fixture
def start():
    """start(script, *args, env=, patch=) -> subprocess.Popen of a script, in a session of its own.

    `patch` is Python code that runs in the process before the script. What is left of the
    processes and their children is killed at the end of the test.
    """
    processes = []

    def start(script, *args, env=None, patch="", **kw):
        command = [sys.executable, str(ROOT / script), *map(str, args)]
        if patch:
            code = f"import os, runpy, signal, sys, time\n{patch}\nsys.argv.pop(0)\n"
            command[1:1] = ["-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')"]
        env = {**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT), **(env or {})}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(subprocess.Popen(command, env=env, start_new_session=True, **pipes, **kw))
        return processes[-1]

    yield start
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finished(process, timeout=60):
    """Wait for a started process -> what subprocess.run would return."""
    out, err = process.communicate(timeout=timeout)
    return SimpleNamespace(returncode=process.returncode, stdout=out, stderr=err)


def succeeded(process):
    assert process.returncode == 0, process.stderr
    return process


def until(condition, *processes, timeout=60):
    """Wait for `condition()` while all `processes` run."""
    end = time.monotonic() + timeout
    while not condition():
        for process in processes:
            assert process.poll() is None, f"ended too early:\n{process.communicate()[1]}"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def error_line(process, script, status=1):
    """The line "script: error: ..." with which a run ended, checked to be all that it says.

    It is the last line of stderr and the only such line, there is no traceback anywhere, and the
    exit status is `status`.
    """
    output = f"{process.stdout}\n{process.stderr}"
    for sign in ("Traceback", "Logging error", "Exception in thread", "Exception ignored"):
        assert sign not in output, output
    lines = [line for line in re.split(r"[\r\n]+", process.stderr) if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), output
    assert process.stderr.rstrip().endswith(lines[0]), output
    assert process.returncode == status, f"status {process.returncode}: {output}"
    return lines[0]


def snapshot(path):
    """A folder -> {path of a file in it, however deep: its bytes}."""
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


# Data ---------------------------------------------------------------------------------------------


def make_folder(path, lengths, mel_dim=80, max_seq_len=None, seed=0, prefix="utt"):
    """Write a prepared dataset in the original release's layout; return its (tensors, lengths).

    `lengths` lists the frames of each utterance; both results are dicts by file name. The
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
SHORT = [2, 1]  # no frame to predict at the time shifts that the tests use: skipped
VALID = [20, 9, 30, 13, 26]  # in both, the last batch has one utterance
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
    """A folder of two splits: its path, and {name: (frames, length)} of those it uses of each."""
    path = tmp_path_factory.mktemp("corpus")

    def split(name, lengths, **kw):
        tensors, table = make_folder(path / name, lengths, D, SEQ_LEN, **kw)
        return {name: (tensors[name], n) for name, n in table.items() if n > max(SHORT)}

    training = split("train-clean-360", [*TRAIN, *SHORT])
    return SimpleNamespace(path=path, train=training, valid=split("dev-clean", VALID, seed=1))


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
def one(place):
    """{kind of loss: folder of a whole run of one process, without dropout}."""
    kinds = {"padded": [], "masked": ["--mask_padding"]}
    for name, flags in kinds.items():
        succeeded(call(train, *PLAIN, *place(name)[0], *flags))
    return {name: place(name)[1] for name in kinds}


def models(path):
    """A run's folder -> {"epoch_<k>": state dict}."""
    return {
        file.stem.partition("__")[2]: torch.load(file, weights_only=True)
        for file in path.glob("*.model")
    }


def last(path):
    return torch.load(path / "last.ckpt", weights_only=True)


def same(weights, others):
    """Whether two state dicts are bit-identical."""
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


def until_step(step, path, *processes):
    """Wait until a run has logged a step, or an epoch after so many steps."""
    file = path / "metrics.jsonl"

    def is_there():
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return any(json.loads(line)["step"] >= step for line in lines)

    until(is_there, *processes)
