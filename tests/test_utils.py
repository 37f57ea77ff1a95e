"""utils.py: files that are whole or not there, processes that may die, errors in one line."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, children, error_line, leave_room, snapshot

from utils import (
    UserError,
    atomic_write,
    check_utt_id,
    load,
    lock_folder,
    on_each_core,
    read_json,
    run_jobs,
    save,
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
    assert snapshot(tmp_path) == {path: b"first"}
    with atomic_write(path, sync=False) as file:
        file.write(b"third")
    assert snapshot(tmp_path) == {path: b"third"}


def test_a_full_disk_leaves_the_former_file(small_disk):
    path = small_disk / "file"
    write_json({"a": 1}, path)
    leave_room(small_disk, 10_000)
    for write in (write_json, save):
        with pytest.raises(UserError, match=rf"^{path}: No space left on device"):
            write({"a": "b" * 100_000}, path)
    leave_room(small_disk, None)
    assert snapshot(small_disk) == {path: b'{\n  "a": 1\n}\n'}


def test_json_is_an_object_or_refused(tmp_path):
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


def test_utterance_ids_are_file_names():
    for good in ("103-1240-0000", "a b", "ä.c", b"\xc3\xa4", "x" * 240):
        assert check_utt_id(good, "dump:3") == (good if isinstance(good, str) else "ä")
    for bad in ("", ".", "..", ".hidden", "a/b", "a\\b", "a\nb", "a\0b", "a\u200b", "ä" * 121):
        for utt_id in (bad, bad.encode()):
            with pytest.raises(UserError, match="^dump:3: utterance id .*file name") as caught:
                check_utt_id(utt_id, "dump:3")
            assert str(caught.value).isprintable()
    with pytest.raises(UserError, match="^dump:3: .*UTF-8"):
        check_utt_id(b"\xe4", "dump:3")


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


def test_few_jobs_are_under_way_at_once():
    begun = []
    results = run_jobs((begun.append(i) or i for i in range(1000)), work, 2)
    next(results)
    assert len(begun) <= 20
    results.close()


@pytest.mark.parametrize(
    "job, num_workers, message",
    [("fail", 1, "^file:3: "), ("fail", 2, "^file:3: "), ("die", 2, "process was killed")],
)
def test_a_job_that_fails_and_a_worker_that_is_killed(job, num_workers, message):
    """One error, and no process is left."""
    before = children(os.getpid())
    with pytest.raises(UserError, match=message):
        list(run_jobs([0, 1, job, *range(100)], work, num_workers))
    assert children(os.getpid()) == before


def test_each_core_takes_a_share_of_a_batch():
    """All at once, with gradients; results are in the order of the shares."""
    numbers, names = torch.arange(14.0, requires_grad=True), list("abcdefghijklmn")

    def double(numbers, names):
        barrier.wait(timeout=10)
        return 2 * numbers, names

    cores = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for size, shares in ((14, 3), (11, 2), (7, 1), (0, 1)):  # none of fewer than 4
            barrier, numbers.grad = threading.Barrier(shares), None
            results = on_each_core(double, numbers[:size], names[:size])
            assert [some for _, some in results] == [names[:size][i::shares] for i in range(shares)]
            torch.cat([doubled for doubled, _ in results]).sum().backward()
            assert numbers.grad.sum() == 2 * size
    finally:
        torch.set_num_threads(cores)


def lock(path):
    try:
        return lock_folder(path)
    except UserError as error:
        return str(error)


def test_a_folder_is_one_process_own(tmp_path):
    """Until that ends, in whatever way."""
    with concurrent.futures.ProcessPoolExecutor(1) as pool:
        assert pool.submit(lock, tmp_path).result() is None
        assert lock(tmp_path).startswith(f"{tmp_path}: another process")
        (worker,) = pool._processes
        os.kill(worker, signal.SIGKILL)
    assert lock(tmp_path) is None


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
    with pytest.raises(ZeroDivisionError):  # a bug keeps its traceback
        call_main(main(lambda: 1 / 0))


def test_a_script_ends_though_its_worker_is_deaf_to_sigterm():
    code = """
import multiprocessing, signal, time, utils
def main():
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
utils.run_main(main)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0
