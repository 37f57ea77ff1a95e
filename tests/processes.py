"""Processes that tests start, kill and watch: real runs of the scripts, each in its own process.

They are forked from one server, which has paid for `import torch` and the like, so that hundreds of
short runs are affordable. A process that is forked shares nothing else with the others.
"""

import atexit
import contextlib
import gc
import itertools
import json
import os
import re
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

# In the tests' process ----------------------------------------------------------------------------


class Server:
    """Starts processes, whose output goes to files in `folder`."""

    def __init__(self, folder):
        self.folder, self.processes = Path(folder), []
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, **order):
        self.server.stdin.write(json.dumps(order, default=str) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, script, *args, cwd=None, **options):
        """Run a script of the repository, or torchrun; the options are those of become()."""
        output = self.folder / str(len(self.processes))
        for stream in ("stdout", "stderr"):
            Path(f"{output}.{stream}").touch()
        order = dict(script=script, args=args, output=output, cwd=cwd or self.folder)
        self.processes.append(Process(self, self.ask(**order, **options), output))
        return self.processes[-1]

    def run(self, script, *args, **kw):
        return self.start(script, *args, **kw).wait()

    def run_all(self, script, jobs):
        """{name: arguments} -> {name: finished process}, two at a time."""
        processes = {}
        for name, args in jobs.items():
            comes_true(lambda: sum(p.returncode is None for p in processes.values()) < 2)
            processes[name] = self.start(script, *args)
        for process in processes.values():
            process.wait()
        return processes

    def start_ranks(self, script, *args, world_size=2, env=None, **kw):
        """The processes of a distributed run, as torchrun would start them."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {**(env or {}), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env["WORLD_SIZE"] = world_size
        return [
            self.start(script, *args, env=env | {"RANK": rank, "LOCAL_RANK": rank}, **kw)
            for rank in range(world_size)
        ]

    def run_ranks(self, script, *args, **kw):
        """The same, finished. When one fails the others are killed, as torchrun does."""
        processes = self.start_ranks(script, *args, **kw)

        def is_over():
            codes = [process.returncode for process in processes]
            return any(codes) or None not in codes

        comes_true(is_over)
        for process in processes:
            process.kill()
        return [process.wait() for process in processes]

    def close(self):
        for process in self.processes:
            process.kill()
        self.server.stdin.close()
        self.server.wait()


class Process:
    """A process under way or ended, with the attributes of what subprocess.run returns."""

    def __init__(self, server, pid, output):
        self.server, self.pid, self.output = server, pid, output
        self._returncode = None

    @property
    def returncode(self):
        """None while it runs; negative for the signal that killed it."""
        if self._returncode is None:
            self._returncode = self.server.ask(poll=self.pid)
        return self._returncode

    @property
    def stdout(self):
        return Path(f"{self.output}.stdout").read_text(errors="replace")

    @property
    def stderr(self):
        return Path(f"{self.output}.stderr").read_text(errors="replace")

    def wait(self, timeout=40):
        if not comes_true(lambda: self.returncode is not None, timeout):
            self.kill()
            raise AssertionError(f"still running after {timeout} s:\n{self.stderr}")
        return self

    def kill(self):
        """SIGKILL, also for all that it has started, in whatever session; nothing if it ended."""

        def kill(pid):
            below = children(pid)
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
            for child in below:
                kill(child)

        if self.returncode is None:
            kill(self.pid)


def comes_true(condition, timeout=60):
    """Wait for `condition()` -> whether it came true in time."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.003)
    return True


def error_line(process, script, status=1):
    """The line "script: error: ..." with which a run ended, checked to be all that it says.

    It is the last line of stderr and the only such line, there is no traceback anywhere, and the
    exit status is `status`. `process` may also be a result of subprocess.run or of call_main.
    """
    output = f"{process.stdout}\n{process.stderr}"
    for sign in ("Traceback", "Logging error", "Exception in thread", "Exception ignored"):
        assert sign not in output, output
    lines = [line for line in re.split(r"[\r\n]+", process.stderr) if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith(f"{script}: error: "), output
    assert process.stderr.rstrip().endswith(lines[0]), output
    assert process.returncode == status, f"status {process.returncode}: {output}"
    return lines[0]


def until(condition, process, timeout=40):
    """Wait for `condition()` while `process` runs."""
    comes_true(lambda: condition() or process.returncode is not None, timeout)
    if not condition():
        what = "ended too early" if process.returncode is not None else "waited for in vain"
        process.kill()
        raise AssertionError(f"{what}:\n{process.stderr}")


def children(pid):
    """Ids of the processes that `pid` has started, the oldest first."""
    found = []
    for child in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(status_of(child)[1]) == pid:
                found.append(int(child))
    return sorted(found)


def status_of(pid):
    """-> [state, parent, ...] as text. OSError if there is no such process."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1].split()


def snapshot(path):
    """A folder -> {path of a file in it, however deep: its bytes}."""
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def leave_room(disk, size):
    """Fill a disk up to its last `size` bytes; None takes the filling away again."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    if size is not None:
        status = os.statvfs(disk)
        filler.write_bytes(bytes(max(status.f_bavail * status.f_frsize - size, 0)))


# In the server and the processes that it forks ----------------------------------------------------


def serve():
    """Fork a process for each order on stdin; in that process, return the order."""
    import kaldi_native_fbank  # noqa: F401
    import kaldiio  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import PIL.Image
    import soundfile  # noqa: F401
    import torch._dynamo  # which torch's optimizers import when the first one is made
    import torch.distributed.run
    import torch.utils.tensorboard  # noqa: F401

    PIL.Image.preinit()
    gc.freeze()  # else each process would copy it all as it looks for garbage
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if reply == 0:
                return order
        print(json.dumps(reply), flush=True)
    os._exit(0)


def become(
    script,
    args,
    output,
    cwd,
    env=None,
    crash=None,
    file_limit=None,
    slow_disk=0,
    cores=1,
    record=None,
):
    """Turn this process into a run of a script.

    Args:
        env: variables beyond those of the tests.
        crash: (pattern, number, "before" or "after"): SIGKILL the process when it renames something
            to a name that matches the pattern, or removes it, for that time.
        file_limit: bytes that a file may have, as with a quota.
        slow_disk: seconds that each os.fsync takes.
        cores: how many PyTorch is to use.
        record: the file that receives what the model was fed, if the process ends by itself: a list
            of (training, inputs, lengths).
    """
    import torch.distributed.run

    os.setsid()
    for number, name in enumerate(("/dev/null", f"{output}.stdout", f"{output}.stderr")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.chdir(cwd)
    os.environ |= {name: str(value) for name, value in (env or {}).items()}
    if crash:
        crash_at(*crash)
    if file_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if slow_disk:
        fsync = os.fsync
        os.fsync = lambda file: (time.sleep(slow_disk), fsync(file))
    torch.set_num_threads(cores)
    if record:
        record_forward(record)
    sys.argv = [script, *map(str, args)]
    try:
        if script == "torchrun":
            torch.distributed.run.main()
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    end(status)


def end(status):
    """Do what Python does as it exits, except for freeing its objects, which takes 0.4 s here."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def crash_at(pattern, number, when):
    """SIGKILL this process before or after it renames or removes a file for the number-th time."""
    count = itertools.count(1)

    def crashing(function):
        def call(*args, **kw):
            name = os.path.basename(os.fsdecode(args[-1]))
            here = re.search(pattern, name) and next(count) == number
            if not (here and when == "before"):
                function(*args, **kw)
            if here:
                os.kill(os.getpid(), signal.SIGKILL)

        return call

    os.replace, os.remove = crashing(os.replace), crashing(os.remove)


def record_forward(file):
    """Save at the end what APCModel was fed: a list of (training, inputs, lengths)."""
    import torch

    from apc_model import APCModel

    calls, forward = [], APCModel.forward

    def recording(self, inputs, lengths):
        calls.append((self.training, inputs.detach().clone(), lengths.detach().clone()))
        return forward(self, inputs, lengths)

    APCModel.forward = recording
    atexit.register(lambda: torch.save(calls, file))


if __name__ == "__main__":
    become(**serve())
