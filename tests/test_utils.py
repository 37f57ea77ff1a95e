"""utils.py: files that are whole or not there, processes that may die, errors in one line."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, error_line

from utils import (
    UserError,
    atomic_write,
    load,
    lock_folder,
    progress_bar,
    read_json,
    run_jobs,
    save,
    set_numerics,
    write_json,
)

# Files --------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with atomic_write(path) as file:
        file.write(b"first")
        assert not path.exists()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write(b"second")
        file.flush()
        raise KeyboardInterrupt
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"first"
    with atomic_write(path, sync=False) as file:
        file.write(b"third")
    assert [*tmp_path.iterdir()] == [path] and path.read_bytes() == b"third"


def test_a_full_disk_leaves_the_former_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_json({"a": 1}, path)

    def fsync(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    for write in (write_json, save):
        with pytest.raises(UserError, match=rf"^{path}: No space left on device"):
            write({"a": "b"}, path)
    assert [*tmp_path.iterdir()] == [path] and read_json(path) == {"a": 1}


def test_json_is_an_object_or_rejected(tmp_path):
    path = tmp_path / "file.json"
    assert read_json(path) is None
    value = {"a": [1, 2.5, None, True], "b": {"c": "é"}}
    write_json(value, path)
    assert read_json(path) == json.loads(path.read_text()) == value
    for content in (b"", b"[1]", b"null", b"\xff{}", b"[" * 100_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^{path}: ") as caught:
            read_json(path)
        assert "\n" not in str(caught.value)


def test_a_damaged_tensor_is_noticed_where_it_matters(tmp_path):
    """The checksums of a file of tensors are compared when that is asked for."""
    path = tmp_path / "file"
    save({"a": torch.arange(1000.0)}, path)
    assert torch.equal(load(path, verify=True)["a"], torch.arange(1000.0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: .*damaged"):
        load(path, verify=True)


def lock_and_wait(path, locked):
    lock = lock_folder(path)
    locked.set()
    time.sleep(60)
    lock.release()


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    context = multiprocessing.get_context("fork")
    locked = context.Event()
    process = context.Process(target=lock_and_wait, args=(tmp_path, locked))
    process.start()
    assert locked.wait(20)
    with pytest.raises(UserError, match=f"^{tmp_path}: in use by another process"):
        lock_folder(tmp_path)
    process.kill()
    process.join()
    lock_folder(tmp_path).release()


# Jobs ---------------------------------------------------------------------------------------------


def work(job):
    """A number's square, after a while that is shorter for later ones; or what a text asks for."""
    if job == "fail":
        raise UserError("file:3: expected a number")
    if job == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.02 / (job + 1))
    return job * job, os.getpid()


@pytest.mark.parametrize("num_workers", [1, 3])
def test_results_come_in_the_order_of_the_jobs(num_workers):
    results = list(run_jobs(iter(range(40)), work, num_workers))
    assert [square for square, _ in results] == [number * number for number in range(40)]
    workers = {pid for _, pid in results}
    assert workers == {os.getpid()} if num_workers == 1 else os.getpid() not in workers


def test_few_jobs_are_in_flight_at_once():
    started = []
    results = run_jobs((started.append(i) or i for i in range(1000)), work, 2)
    next(results)
    assert len(started) <= 20
    results.close()


@pytest.mark.parametrize(
    "job, num_workers, message",
    [("fail", 1, "^file:3: "), ("fail", 2, "^file:3: "), ("die", 2, "process was killed")],
)
def test_a_job_that_fails_and_a_worker_that_is_killed(job, num_workers, message):
    """One error, and no process is left."""
    with pytest.raises(UserError, match=message):
        list(run_jobs([0, 1, job, *range(100)], work, num_workers))
    assert not multiprocessing.active_children()


# Devices and logs ---------------------------------------------------------------------------------


def test_tensorfloat_32_is_off_unless_asked_for():
    def precisions():
        backends = torch.backends.cuda.matmul, torch.backends.cudnn.rnn, torch.backends.cudnn.conv
        return {backend.fp32_precision for backend in backends}

    set_numerics(tf32=True)
    assert precisions() == {"tf32"}
    set_numerics()
    assert precisions() == {"ieee"}


@pytest.mark.parametrize("is_terminal, seconds", [(True, 0.1), (False, 30)])
def test_a_progress_bar_in_a_log_file_is_updated_every_30_seconds(
    is_terminal, seconds, monkeypatch
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    assert progress_bar(range(3), disable=False).mininterval == seconds


# A script's end -----------------------------------------------------------------------------------


def test_how_a_script_ends(call_main):
    """Its status, and what it says last."""

    def main(action):
        return SimpleNamespace(__file__="/somewhere/script.py", main=action)

    def stop(error):
        raise error

    for error in (
        UserError("dump:3: two\nlines  of text"),
        OSError(2, "No such file or directory", "dump:3"),
        UserError("dump:3: \udcff"),
        MemoryError("dump:3"),
    ):
        line = error_line(call_main(main(lambda error=error: stop(error))), "script.py")
        assert "dump:3" in line and line.isprintable()
    assert "MemoryError" in error_line(call_main(main(lambda: stop(MemoryError()))), "script.py")
    for status, expected in ((None, 0), (0, 0), (143, 143)):
        result = call_main(main(lambda status=status: sys.exit(status)))
        assert (result.returncode, result.stderr) == (expected, "")
    result = call_main(main(lambda: stop(KeyboardInterrupt())))
    assert (result.returncode, result.stderr) == (130, "")
    line = error_line(call_main(main(lambda: stop(torch.OutOfMemoryError("x")))), "script.py")
    assert "--batch_size" in line and "--accumulate_steps" in line
    for bug in (ZeroDivisionError, RuntimeError):  # a bug keeps its traceback
        with pytest.raises(bug):
            call_main(main(lambda bug=bug: stop(bug())))


def test_a_script_ends_though_its_worker_ignores_sigterm():
    code = """
import multiprocessing, time, utils
def work():
    utils.ignore_signals()
    time.sleep(600)
def main():
    multiprocessing.get_context("fork").Process(target=work, daemon=True).start()
    time.sleep(1)
utils.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0


def test_a_bug_next_to_a_loaders_workers_is_a_traceback_and_the_end():
    code = """
import torch, utils
def main():
    data = torch.utils.data.TensorDataset(torch.zeros(100))
    options = {"num_workers": 1, "persistent_workers": True}
    loader = torch.utils.data.DataLoader(data, worker_init_fn=utils.ignore_signals, **options)
    for _ in loader:
        raise RuntimeError("a bug")
utils.run_main(main)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, timeout=60, check=False, capture_output=True)
    assert done.returncode == 1
    assert done.stderr.startswith(b"Traceback") and done.stderr.endswith(b"RuntimeError: a bug\n")
