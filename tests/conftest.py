"""What several test files share: prepared folders written by hand, and the scripts run for real."""

import atexit
import gc
import json
import os
import pickle
import runpy
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tqdm import tqdm

import utils

ROOT = Path(__file__).resolve().parent.parent
# tqdm shares its lock with forks. A test that kills a fork may kill it while it holds the lock, and
# the next bar here would wait for it for ever: this lock is a process' own.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that a fork could catch holding it

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


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


@pytest.fixture
def call_main(monkeypatch, capsys):
    """Run a script's main in this process as the script would: like subprocess.run's result."""

    def call(module, *argv):
        monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, argv)])
        capsys.readouterr()
        status = 0
        try:
            utils.run(module.main)
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status or 0, stdout=out, stderr=err)

    return call


def run_script(name, *args, timeout=120, env=None, **kw):
    """Run a script of the repository in a process of its own; output captured as text."""
    command = [sys.executable, str(ROOT / name), *map(str, args)]
    env = {**os.environ, **ONE_THREAD, **(env or {})}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env=env, check=False, **kw
    )


def run_forked(name, jobs, folder, timeout=240):
    """Run a script once for each job; every run is a fresh process, forked after `import torch`.

    Only the import is shared, which makes a dozen short runs affordable; two run at a time. A job
    is a list of arguments, or a pair (arguments, file): the file then receives what the model was
    fed, a list of (training, inputs, lengths). Returns results like those of subprocess.run.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [job if isinstance(job, tuple) else (job, None) for job in jobs]
    plan = [[[str(a) for a in args], str(record or "")] for args, record in jobs]
    (folder / "jobs.json").write_text(json.dumps(plan))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    subprocess.run(
        [sys.executable, "-c", "import conftest; conftest._fork_jobs()", name, folder],
        env={**os.environ, **ONE_THREAD, "PYTHONPATH": paths},
        timeout=timeout,
        check=True,
    )
    codes = json.loads((folder / "codes.json").read_text())
    return [
        SimpleNamespace(
            returncode=code,
            stdout=(folder / f"{i}.stdout").read_text(),
            stderr=(folder / f"{i}.stderr").read_text(),
        )
        for i, code in enumerate(codes)
    ]


def _fork_jobs():
    """The far side of run_forked, in its own interpreter."""
    import torch._dynamo  # what torch's optimizers import when the first one is made
    import torch.utils.tensorboard  # noqa: F401  (all of it paid once, before the forks)

    name, folder = sys.argv[1], Path(sys.argv[2])
    jobs = json.loads((folder / "jobs.json").read_text())
    running, codes = {}, [None] * len(jobs)

    def wait():
        pid, status = os.wait()
        codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)

    gc.freeze()  # else each process spends a second on collecting what it inherited as it ends
    for i, (args, record) in enumerate(jobs):
        pid = os.fork()
        if pid == 0:
            for fd, stream in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(folder / f"{i}.{stream}", os.O_WRONLY | os.O_CREAT), fd)
            if record:
                _record_forward(record)
            sys.argv = [name, *args]
            runpy.run_path(str(ROOT / name), run_name="__main__")
            sys.exit(0)
        running[pid] = i
        if len(running) == 2:
            wait()
    while running:
        wait()
    (folder / "codes.json").write_text(json.dumps(codes))


def _record_forward(file):
    from apc_model import APCModel

    calls, forward = [], APCModel.forward

    def recording(self, inputs, lengths):
        calls.append((self.training, inputs.detach().clone(), lengths.detach().clone()))
        return forward(self, inputs, lengths)

    APCModel.forward = recording
    atexit.register(lambda: torch.save(calls, file))
