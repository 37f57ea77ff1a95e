"""Long runs of train.py: killed, stopped, out of disk, diverging, spread over processes.

Every run is a process of its own that really is killed, or really finds the disk full. Most are
forked from one interpreter that has paid for `import torch`; torchrun is started for real.
"""

import collections
import contextlib
import gc
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ONE_THREAD, ROOT, make_folder

from load_pretrained import load_pretrained

D, SEQ_LEN, BATCH, EPOCHS = 8, 30, 4, 4
TRAIN = [18, 7, 30, 12, 25, 9, 30, 21, 6, 15, 28, 11, 19, 30, 8, 23, 14, 27, 10, 17, 22]
VALID = [20, 9, 30, 13, 26]  # in both, one utterance is left over for the last batch
BATCHES = 6
STEPS = EPOCHS * BATCHES
SMALL = ["--feature_dim", D, "--rnn_hidden_size", 8, "--rnn_num_layers", 2, "--rnn_residual"]
SMALL += ["--batch_size", BATCH, "--learning_rate", 0.01, "--epochs", EPOCHS, "--device", "cpu"]
DROPOUT = ["--rnn_dropout", 0.3, "--prenet_num_layers", 1, "--prenet_dropout", 0.2]
FULL = [*SMALL, *DROPOUT, "--load_data_workers", 2]
PLAIN = [*SMALL, "--load_data_workers", 0]
no_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")


# Processes ----------------------------------------------------------------------------------------


def _serve():
    """In an interpreter of its own: fork a process for each order; in that process, return it."""
    import PIL.Image
    import tensorboard.backend.event_processing.event_file_loader  # noqa: F401
    import torch._dynamo
    import torch.distributed.run
    import torch.utils.tensorboard  # noqa: F401

    PIL.Image.preinit()
    gc.freeze()  # the forks share it
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            end = time.monotonic() + order["timeout"]
            pid = 0
            while not pid and time.monotonic() < end:
                pid, status = os.waitpid(order["wait"], os.WNOHANG)
                time.sleep(0 if pid else 0.005)
            reply = os.waitstatus_to_exitcode(status) if pid else None
        else:
            reply = os.fork()
            if reply == 0:
                return order
        print(json.dumps(reply), flush=True)
    os._exit(0)


def _run(order):
    """What a forked process does: become a run of the script."""
    os.setsid()
    files = [(0, "/dev/null"), (1, f"{order['output']}.stdout"), (2, f"{order['output']}.stderr")]
    for number, name in files:
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.environ |= order["env"]
    if order["crash"]:
        _crash_at(*order["crash"])
    sys.argv = [order["script"], *order["args"]]
    if order["script"] == "torchrun":
        torch.distributed.run.main()
    else:
        runpy.run_path(str(ROOT / order["script"]), run_name="__main__")


def _crash_at(pattern, number, when):
    """SIGKILL this process before or after it gives a file its final name, the number-th time."""
    replace, count = os.replace, itertools.count(1)

    def crashing_replace(source, target):
        here = re.search(pattern, os.path.basename(target)) and next(count) == number
        if not (here and when == "before"):
            replace(source, target)
        if here:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = crashing_replace


class Server:
    """Starts processes; `wait` and `stderr` as with subprocess."""

    def __init__(self, folder):
        self.folder, self.count, self.pids = folder, itertools.count(), []
        self.server = subprocess.Popen(
            [sys.executable, "-c", "import test_long_runs as t; t._run(t._serve())"],
            env={
                **os.environ,
                **ONE_THREAD,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, **order):
        self.server.stdin.write(json.dumps(order) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *args, script="train.py", env=None, crash=None):
        output = str(self.folder / str(next(self.count)))
        args = [str(arg) for arg in args]
        pid = self.ask(script=script, args=args, output=output, env=env or {}, crash=crash)
        self.pids.append(pid)
        return Process(self, pid, output)

    def run(self, *args, **kw):
        return self.start(*args, **kw).wait()

    def run_all(self, jobs):
        """{name: arguments} -> {name: process}, two at a time."""
        running, processes = [], {}
        for name, args in jobs.items():
            processes[name] = self.start(*args)
            running.append(processes[name])
            if len(running) == 2:
                running.pop(0).wait()
        for process in running:
            process.wait()
        return processes

    def run_ranks(self, *args, world_size=2):
        """The processes of a distributed run, as torchrun would start them."""
        return [process.wait() for process in self.start_ranks(*args, world_size=world_size)]

    def start_ranks(self, *args, world_size=2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": world_size}
        env = {name: str(value) for name, value in env.items()}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world_size)]
        return [self.start(*args, env=env | rank) for rank in ranks]

    def close(self):
        for pid in self.pids:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        self.server.stdin.close()
        self.server.wait()


class Process:
    def __init__(self, server, pid, output):
        self.server, self.pid, self.output = server, pid, output
        self.returncode = None

    def wait(self, timeout=40):
        if self.returncode is None:
            self.returncode = self.server.ask(wait=self.pid, timeout=timeout)
        assert self.returncode is not None, f"still there after {timeout} s: {self.stderr}"
        return self

    @property
    def stderr(self):
        return Path(f"{self.output}.stderr").read_text()


def until(condition, process, timeout=40):
    """Wait for `condition()` while `process` runs."""
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        # A process that is gone before it is waited for stays as a zombie.
        assert status_of(process.pid)[0] != "Z", process.stderr
        time.sleep(0.001)


def children(pid):
    found = []
    for child in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if int(status_of(child)[1]) == pid:
                found.append(int(child))
    return found


def status_of(pid):
    """-> [state, parent, ...]. OSError if there is no such process."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(") ")[1].split()


# What a run leaves --------------------------------------------------------------------------------


def models(path):
    """File name without the experiment's -> state dict."""
    return {
        file.name.partition("__")[2]: torch.load(file, weights_only=True)
        for file in path.glob("*.model")
    }


def last(path):
    return torch.load(path / "last.ckpt", weights_only=True)


def is_finite(value):
    """Whether all floats and tensors within hold finite numbers."""
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    if isinstance(value, dict):
        return all(is_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def same(weights, others):
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def assert_same_models(path, reference):
    """Every epoch's weights, bit for bit."""
    ours, theirs = models(path), models(reference)
    assert ours.keys() == theirs.keys()
    assert [name for name in sorted(ours) if not same(ours[name], theirs[name])] == []


def metrics(path):
    """-> lines of steps, lines of epochs; without the speed, which never repeats."""
    steps, epochs = [], []
    for line in (path / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        entry.pop("frames_per_second", None)
        (epochs if "validation_loss" in entry else steps).append(entry)
    return steps, epochs


def last_step(path):
    """The last step in metrics.jsonl, which may be in the middle of a write, or -1."""
    with contextlib.suppress(OSError):
        lines = (path / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
        return max(
            (json.loads(line)["step"] for line in lines if b"validation" not in line), default=-1
        )
    return -1


def started(path):
    """How often the run was begun or gone on with."""
    logs = [file for file in path.glob("*") if file.name == path.stem]
    return logs[0].read_text().count(" - model: ") if logs else 0


def events(path):
    """(tag, step) -> values, from the bytes of all TensorBoard files, pictures as None."""
    from tensorboard.compat.proto.event_pb2 import Event

    found = collections.defaultdict(list)
    for file in path.glob("*.tb_log/*"):
        content, position = file.read_bytes(), 0
        while position + 12 <= len(content):
            (length,) = struct.unpack("<Q", content[position : position + 8])
            event = Event.FromString(content[position + 12 : position + 12 + length])
            position += 16 + length
            for value in event.summary.value:
                is_number = value.HasField("simple_value")
                found[value.tag, event.step].append(value.simple_value if is_number else None)
    return found


def without_speed(found):
    return {key: values for key, values in found.items() if "frames per second" not in key[0]}


def snapshot(path):
    return {file: file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def epoch_losses(path):
    return [(entry["training_loss"], entry["validation_loss"]) for entry in metrics(path)[1]]


def assert_close_losses(path, reference, tolerance=1e-3):
    ours, theirs = epoch_losses(path), epoch_losses(reference)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs):
        assert mine == pytest.approx(other, rel=tolerance)


def error_of(process, code=1):
    """The one line with which a run ended, checked to be that."""
    stderr = process.stderr
    for sign in ("Traceback", "Logging error", "Exception in thread", "Exception ignored"):
        assert sign not in stderr, stderr
    lines = [line for line in re.split("[\r\n]", stderr) if line.startswith("train.py: error: ")]
    assert len(lines) == 1 and stderr.rstrip().endswith(lines[0]), stderr
    assert process.returncode == code, stderr
    return lines[0]


# Fixtures -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    make_folder(path / "train-clean-360", TRAIN, mel_dim=D, max_seq_len=SEQ_LEN)
    make_folder(path / "dev-clean", VALID, mel_dim=D, max_seq_len=SEQ_LEN, seed=1)
    return path


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    """place(name) -> (flags that make a run of that name, its folder)."""
    logs = tmp_path_factory.mktemp("logs")

    def place(name, store=logs):
        flags = ["--librispeech_path", data, "--store_path", store, "--experiment_name", name]
        return flags, Path(store) / f"{name}.dir"

    return place


@pytest.fixture(scope="module")
def references(server, place):
    """Runs that nothing stops; and one that --max_steps ended in the middle of its second epoch."""
    jobs = {
        "whole": FULL,
        "stopped": [*FULL, "--max_steps", 8],
        "one-padded": PLAIN,
        "one-masked": [*PLAIN, "--mask_padding"],
    }
    done = server.run_all({name: [*flags, *place(name)[0]] for name, flags in jobs.items()})
    for process in done.values():
        assert process.returncode == 0, process.stderr
    return done


@pytest.fixture(scope="module")
def whole(references, place):
    """A run with dropout and workers."""
    return place("whole")[1]


@pytest.fixture(scope="module")
def one(references, place):
    """Loss kind -> a run of one process without dropout."""
    return {kind: place(f"one-{kind}")[1] for kind in ("padded", "masked")}


@pytest.fixture(scope="module")
def stopped(references, place):
    return SimpleNamespace(path=place("stopped")[1], stderr=references["stopped"].stderr)


@pytest.fixture
def copy(stopped, place, tmp_path):
    """A copy of the stopped run, to go on from: (flags, folder)."""
    flags, path = place("stopped", store=tmp_path / "copy")
    shutil.copytree(stopped.path, path)
    return [*FULL, *flags, "--resume"], path


# SIGKILL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(server, place):
    """A run that was killed again and again, and gone on with every time."""
    flags, path = place("killed")
    flags = [*FULL, *flags, "--resume"]

    command = [sys.executable, ROOT / "train.py", *flags]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL) as importing:
        time.sleep(0.5)
        importing.kill()

    def crash(pattern, number, when, save_steps):
        process = server.start(
            *flags, "--save_steps", save_steps, crash=[pattern, number, when]
        ).wait()
        assert process.returncode == -signal.SIGKILL, (pattern, process.stderr)

    def kill(step, save_steps, send):
        before = started(path)
        process = server.start(*flags, "--save_steps", save_steps)
        until(lambda: started(path) > before and last_step(path) >= step, process)
        send(process.pid, signal.SIGKILL)
        assert process.wait().returncode == -signal.SIGKILL, process.stderr

    crash("config.json", 1, "before", 1)  # the folder is new
    crash("last.ckpt", 1, "before", 1)  # there is a model, and no checkpoint
    kill(4, 3, os.kill)  # in an epoch
    crash("tfevents", 1, "before", 1000)  # while it takes out what it will log again
    crash("metrics.jsonl", 1, "after", 1000)
    crash("__epoch_2.model", 1, "after", 2)  # between two epochs
    crash("last.ckpt", 2, "before", 2)  # in the midst of writing it
    kill(17, 1, os.killpg)
    done = server.run(*flags, "--load_data_workers", 1)
    assert done.returncode == 0, done.stderr
    return path


def test_killed_run_has_the_weights_of_an_uninterrupted_one(killed, whole):
    assert_same_models(killed, whole)
    assert same(last(killed)["model"], last(whole)["model"])


def test_killed_run_has_every_line_of_metrics_once(killed, whole):
    steps, epochs = metrics(killed)
    assert [entry["step"] for entry in steps] == list(range(STEPS))
    assert [entry["epoch"] for entry in epochs] == list(range(1, EPOCHS + 1))
    assert (steps, epochs) == metrics(whole)


def test_killed_run_has_nothing_twice_in_tensorboard(killed):
    doubled = {key: values for key, values in events(killed).items() if len(values) > 1}
    assert doubled == {}


def test_killed_run_has_everything_in_tensorboard(killed, whole):
    """Also the steps that were saved, but lay in TensorBoard's queue as the process died."""
    ours, theirs = without_speed(events(killed)), without_speed(events(whole))
    assert {step for tag, step in theirs if tag == "gradient norm"} == set(range(STEPS))
    assert {step for tag, step in theirs if tag.endswith("epoch-wise)")} == set(range(EPOCHS))
    assert sorted(theirs.keys() - ours.keys()) == []
    assert [key for key in sorted(theirs) if ours[key] != theirs[key]] == []


def test_killed_run_leaves_no_temporary_files(killed, whole):
    def names(path):
        names = {file.name.replace(path.stem, "") for file in path.rglob("*")}
        return {name for name in names if "tfevents" not in name or name.endswith(".tmp")}

    assert names(killed) == names(whole)


def test_leftovers_of_a_killed_resume(server, copy, whole):
    """Half a line of metrics, half an event, and the temporary files of everything."""
    flags, path = copy
    with open(path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 2, "step"')
    (log,) = path.glob("*.tb_log/*")
    for number in range(6):  # files come in no order
        log.with_name(f"events.out.tfevents.{number}").touch()
    for file in [*path.glob("*.tb_log/*"), path / "metrics.jsonl", path / "last.ckpt"]:
        Path(f"{file}.tmp").write_bytes(file.read_bytes())
    os.truncate(log, log.stat().st_size - 5)
    done = server.run(*flags)
    assert done.returncode == 0, done.stderr
    assert_same_models(path, whole)
    assert metrics(path) == metrics(whole)
    assert [key for key, values in events(path).items() if len(values) > 1] == []


# Signals ------------------------------------------------------------------------------------------

SIGNALS = [
    # signal, number of workers, whether it reaches the whole process group, how often
    (signal.SIGTERM, 2, False, 1),
    (signal.SIGINT, 2, True, 1),
    (signal.SIGUSR1, 0, False, 1),
    (signal.SIGTERM, 2, True, 2),  # as under torchrun, which hands on what all have got
]


@pytest.fixture(scope="module")
def signalled(server, place):
    """A run that got one signal after the other; -> its folder, what was found after each."""
    flags, path = place("signalled")
    flags = [*FULL, *flags, "--resume"]
    found = []
    for count, (number, workers, group, times) in enumerate(SIGNALS):
        before = started(path)
        process = server.start(*flags, "--load_data_workers", workers)
        until(lambda n=before, k=2 + 5 * count: started(path) > n and last_step(path) >= k, process)
        for _ in range(times):
            (os.killpg if group else os.kill)(process.pid, number)
        found.append((process.wait(), last(path), metrics(path)[0]))
    done = server.run(*flags)
    assert done.returncode == 0, done.stderr
    return path, found


@pytest.mark.parametrize("index", range(len(SIGNALS)))
def test_signal_saves_and_ends_with_its_status(signalled, index):
    process, saved, steps = signalled[1][index]
    assert process.returncode == 128 + SIGNALS[index][0]
    assert "Traceback" not in process.stderr
    assert SIGNALS[index][0].name in process.stderr
    assert saved["state"]["step"] == len(steps) < STEPS, "the step that ended was not saved"


def test_signalled_run_equals_an_uninterrupted_one(signalled, whole):
    path, _ = signalled
    assert_same_models(path, whole)
    assert metrics(path) == metrics(whole)
    assert without_speed(events(path)) == without_speed(events(whole))


def test_killed_worker_ends_the_run_with_one_line(server, place):
    flags, path = place("workers")
    process = server.start(*FULL, *flags, "--epochs", 1000)
    until(lambda: last_step(path) >= 8, process)  # the validation's workers are there as well
    os.kill(min(children(process.pid)), signal.SIGKILL)
    error_of(process.wait())


# What --resume refuses and allows -----------------------------------------------------------------


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def damage(path, kind):
    file = path / "last.ckpt"
    content = file.read_bytes()
    if kind == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "garbage":
        file.write_bytes(bytes(range(256)) * 40)
    elif kind == "hostile":
        torch.save({"model": {}, "flags": {}, "state": Evil(path / "executed")}, file)
    elif kind == "hostile pickle":
        file.write_bytes(pickle.dumps({"model": Evil(path / "executed")}))
    elif kind == "weights":
        shutil.copy(path / "stopped__epoch_1.model", file)
    elif kind == "number":
        torch.save(7, file)
    elif kind == "flipped bit":  # in the middle of a weight
        weight = torch.load(file, weights_only=True)["model"]["rnns.0.weight_hh_l0"]
        at = content.index(weight.numpy().tobytes()) + 401
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif kind == "other state":
        saved = torch.load(file, weights_only=True)
        saved["state"]["epoch"] = "x"
        torch.save(saved, file)


DAMAGES = ["truncated", "empty", "garbage", "hostile", "hostile pickle", "weights", "number"]
DAMAGES += ["flipped bit", "other state"]
OTHER_FLAGS = [
    ["--rnn_hidden_size", 12],
    ["--batch_size", 5],
    ["--time_shift", 2],
    ["--rnn_dropout", 0.1],
    ["--mask_padding"],
    ["--precision", "bf16"],
    ["--train_split", "dev-clean"],
]


@pytest.fixture(scope="module")
def refused(server, place, data, stopped, tmp_path_factory):
    """What --resume said to each of them, and the run's folder before and after."""
    here = tmp_path_factory.mktemp("refused")
    results, commands = {}, {}

    def prepare(name, extra, change=None):
        flags, path = place("stopped", store=here / re.sub(r"\W", "", name))
        shutil.copytree(stopped.path, path)
        if change:
            damage(path, change)
        commands[name] = [*FULL, *flags, "--resume", *extra]
        results[name] = SimpleNamespace(path=path, before=snapshot(path))

    for kind in DAMAGES:
        prepare(kind, [], kind)
    for flag in OTHER_FLAGS:
        prepare(flag[0], flag)
    for name, lengths in (("one more", [*TRAIN, 20]), ("other", [*TRAIN[:-2], 23, 16])):
        other = here / name
        make_folder(other / "train-clean-360", lengths, mel_dim=D, max_seq_len=SEQ_LEN)
        shutil.copytree(data / "dev-clean", other / "dev-clean")
        prepare(name, ["--librispeech_path", other])
    for name, process in server.run_all(commands).items():
        results[name].process = process
    return results


def refusal(refused, name):
    case = refused[name]
    line = error_of(case.process)
    assert case.process.stderr == line + "\n"
    assert snapshot(case.path) == case.before
    return line


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_checkpoint_is_refused(refused, kind):
    assert "last.ckpt" in refusal(refused, kind)


@pytest.mark.parametrize("flag", [flag[0] for flag in OTHER_FLAGS])
def test_other_flags_are_refused(refused, flag):
    assert flag in refusal(refused, flag)


@pytest.mark.parametrize("name", ["one more", "other"])
def test_changed_training_data_are_refused(refused, name):
    """`other` data have as many utterances and frames: the lengths of two have changed."""
    assert "data" in refusal(refused, name)


def test_an_odd_line_of_the_log_is_named(server, place, stopped, tmp_path):
    flags, path = place("stopped", tmp_path)
    shutil.copytree(stopped.path, path)
    with open(path / "metrics.jsonl", "a") as file:
        file.write("garbage\n")
    assert "metrics.jsonl" in error_of(server.run(*FULL, *flags, "--resume"))


def test_one_of_several_processes_without_the_others(server, place):
    flags, path = place("alone")
    message = error_of(server.run(*FULL, *flags, env={"WORLD_SIZE": "2"}))
    assert "WORLD_SIZE" in message and "torchrun" in message
    assert not path.exists()


def test_more_epochs_and_harmless_flags(server, place, whole):
    flags, path = place("longer")
    some = [*FULL, *flags, "--epochs", 2]
    done = server.run(*some)
    assert done.returncode == 0, done.stderr
    others = ["--epochs", EPOCHS, "--load_data_workers", 0, "--save_steps", 4]
    done = server.run(*some, *others, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_models(path, whole)
    assert metrics(path) == metrics(whole)
    before = models(path), metrics(path), events(path)
    done = server.run(*some, *others, "--resume")
    assert done.returncode == 0, done.stderr
    assert metrics(path) == before[1], "going on with what is done must change nothing"
    assert events(path) == before[2]


def test_existing_run_is_refused_without_resume(server, place, whole):
    flags, path = place("whole")
    before = snapshot(path)
    done = server.run(*FULL, *flags)
    assert "--resume" in error_of(done)
    assert done.stderr.count("\n") == 1
    assert snapshot(path) == before


def test_last_checkpoint_is_a_model(whole):
    model = load_pretrained(str(whole / "last.ckpt"))
    assert same(model.state_dict(), models(whole)[f"epoch_{EPOCHS}.model"])
    assert model.rnn_residual
    assert model.prenet is not None


# --keep_epochs ------------------------------------------------------------------------------------


def test_all_epochs_are_kept(whole):
    assert sorted(models(whole)) == [f"epoch_{k}.model" for k in range(EPOCHS + 1)]


def test_keep_epochs_keeps_the_newest_and_the_best(server, data, tmp_path):
    """Learned: the next frame has the other sign. In the validation data it never has."""
    for split, factor in (("train-clean-360", -1.0), ("dev-clean", 1.0)):
        tensors, _ = make_folder(
            tmp_path / split, [SEQ_LEN] * 8, mel_dim=D, max_seq_len=SEQ_LEN, prefix=split
        )
        for name, frames in tensors.items():
            signs = factor ** torch.arange(SEQ_LEN)[:, None]
            torch.save(signs.expand_as(frames).contiguous(), tmp_path / split / name)
    flags = ["--librispeech_path", tmp_path, "--store_path", tmp_path, "--experiment_name", "keep"]
    flags = [*PLAIN, *flags, "--keep_epochs", 2]
    path = tmp_path / "keep.dir"
    assert server.run(*flags, "--epochs", 3).returncode == 0
    assert sorted(models(path)) == [f"epoch_{k}.model" for k in (1, 2, 3)]
    assert server.run(*flags, "--epochs", 6, "--resume").returncode == 0
    validation = [loss for _, loss in epoch_losses(path)]
    assert min(validation) == validation[0]
    assert sorted(models(path)) == [f"epoch_{k}.model" for k in (1, 5, 6)]
    # Without a checkpoint to go on from, the models must not be taken for nothing.
    (path / "last.ckpt").unlink()
    before = snapshot(path)
    assert "last.ckpt" in error_of(server.run(*flags, "--epochs", 7, "--resume"))
    assert snapshot(path) == before


# A full disk --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
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


def leave_room(disk, size):
    """Fill the disk but for `size` bytes."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    if size is not None:
        status = os.statvfs(disk)
        with open(filler, "wb") as file:
            file.write(bytes(max(status.f_bavail * status.f_frsize - size, 0)))


def test_full_disk_ends_the_run_with_one_line(server, place, whole, small_disk):
    flags, path = place("full", store=small_disk)
    flags = [*FULL, *flags, "--save_steps", 2, "--resume"]
    step = 0
    # What fails is a folder, the log, TensorBoard's file, a model, a checkpoint, a line of metrics.
    for room in (0, 4096, 8192, 12288, 100_000, 0, 20_000):
        leave_room(small_disk, room)
        process = server.start(*flags)
        process.wait(30)
        assert "No space left on device" in error_of(process), room
        if (path / "last.ckpt").exists():
            saved = last(path)
            assert saved["state"]["step"] >= step
            step = saved["state"]["step"]
        else:
            shutil.rmtree(path, ignore_errors=True)
    assert step > 0, "no run got so far"
    leave_room(small_disk, None)
    done = server.run(*flags)
    assert done.returncode == 0, done.stderr
    assert_same_models(path, whole)
    assert metrics(path) == metrics(whole)
    assert [key for key, values in events(path).items() if len(values) > 1] == []
    assert list(path.glob("*.tmp")) == []


# Divergence ---------------------------------------------------------------------------------------

OPTIMIZERS = ["adam", "sgd", "rmsprop"]


@pytest.fixture(scope="module")
def bad_data(data, tmp_path_factory):
    """kind -> folders whose training set has a value that is not finite, in one utterance or all.

    `target`: in the last frame, which is a target only, so that the gradient would be finite.
    """
    folders = {}
    for kind in ("input", "target", "all"):
        path = folders[kind] = tmp_path_factory.mktemp("bad") / kind
        shutil.copytree(data, path)
        for number, length in enumerate(TRAIN):
            file = path / "train-clean-360" / f"utt-{number:03d}.pt"
            frames = torch.load(file, weights_only=True)
            if kind == "input" and number == 3:
                frames[length // 2, 0] = math.nan
            elif kind == "all" or kind == "target" and number == 3:
                frames[length - 1, 0] = math.inf
            torch.save(frames, file)
    return folders


@pytest.fixture(scope="module")
def diverging(server, place, bad_data):
    """Runs on bad data, or with a learning rate beyond all bounds."""
    jobs = {"input-adam": ["--librispeech_path", bad_data["input"], "--epochs", 2]}
    for optimizer in OPTIMIZERS:
        flags = ["--optimizer", optimizer, "--librispeech_path"]
        jobs[f"target-{optimizer}"] = [*flags, bad_data["target"], "--epochs", 2]
        jobs[f"all-{optimizer}"] = [*flags, bad_data["all"], "--save_steps", 1]
        flags = ["--optimizer", optimizer, "--save_steps", 1, "--epochs", 20]
        jobs[f"rate-{optimizer}"] = [*flags, "--learning_rate", 1e38]
    jobs = {name: [*PLAIN, *place(name)[0], *flags] for name, flags in jobs.items()}
    return SimpleNamespace(jobs=jobs, processes=server.run_all(jobs))


def bad_steps(path):
    return [entry["step"] for entry in metrics(path)[0] if entry["training_loss"] is None]


@pytest.mark.parametrize("name", ["input-adam", *(f"target-{name}" for name in OPTIMIZERS)])
def test_bad_batch_is_skipped(diverging, place, name):
    path = place(name)[1]
    assert diverging.processes[name].returncode == 0, diverging.processes[name].stderr
    bad, steps = bad_steps(path), range(2 * BATCHES)
    assert len(bad) == 2, "one in every epoch"
    assert [entry["step"] for entry in metrics(path)[0]] == list(steps)
    counted = [events(path)["skipped steps", step] for step in steps]
    assert counted == [[sum(b <= step for b in bad)] for step in steps]
    assert all(math.isfinite(loss) for losses in epoch_losses(path) for loss in losses)
    assert all(is_finite(model) for model in models(path).values())
    assert is_finite(last(path)["model"]) and is_finite(last(path)["optimizer"])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_skipped_step_leaves_no_trace(server, diverging, place, optimizer):
    """Neither in the weights nor in the optimizer."""
    bad = bad_steps(place(f"target-{optimizer}")[1])[1]
    jobs = {}
    for step in (bad, bad + 1):
        flags, _ = place(f"{optimizer}-{step}")
        jobs[step] = [*diverging.jobs[f"target-{optimizer}"], *flags[-2:], "--max_steps", step]
    for process in server.run_all(jobs).values():
        assert process.returncode == 0, process.stderr
    before, after = (last(place(f"{optimizer}-{step}")[1]) for step in jobs)
    assert same(before["model"], after["model"])
    states = [saved["optimizer"]["state"].values() for saved in (before, after)]
    for old, new in zip(*states):
        assert same(*({k: torch.as_tensor(v) for k, v in state.items()} for state in (old, new)))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_twenty_bad_steps_in_a_row_end_the_run(diverging, place, optimizer):
    path, done = place(f"all-{optimizer}")[1], diverging.processes[f"all-{optimizer}"]
    assert "20 steps in a row" in error_of(done)
    steps, epochs = metrics(path)
    assert len(steps) == 20
    assert steps[-1]["skipped_steps"] == 20
    assert events(path)["skipped steps", 19] == [20]
    start = models(path)["epoch_0.model"]
    assert is_finite(start)
    assert all(same(model, start) for model in models(path).values())
    assert same(last(path)["model"], start)
    # No utterance was learned from: 0 would pass for a perfect model.
    assert {entry["training_loss"] for entry in epochs} == {None}
    assert not re.search(r"Training Loss: 0\.0", done.stderr)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_divergence_saves_no_nan(diverging, place, optimizer):
    path = place(f"rate-{optimizer}")[1]
    line = error_of(diverging.processes[f"rate-{optimizer}"])
    assert "in a row" in line or "finite" in line
    assert is_finite(last(path)["model"])
    assert all(is_finite(model) for model in models(path).values())


# Several processes --------------------------------------------------------------------------------

SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(file):
    if os.path.exists(os.environ["SLOW_IF"]):
        time.sleep(0.7)
    fsync(file)
os.fsync = slow
"""


def ranks_of(launcher):
    """Rank -> process id."""
    found = {}
    for pid in children(launcher.pid):
        with contextlib.suppress(OSError):
            rank = re.search(rb"(?:^|\0)RANK=(\d)", Path(f"/proc/{pid}/environ").read_bytes())
            if rank:
                found[int(rank[1])] = pid
    return found


@pytest.fixture
def torchrun(server):
    """torchrun with two processes, of which nothing stays behind."""
    launchers = []

    def start(*args, env=None):
        command = ["--standalone", "--nproc_per_node=2", ROOT / "train.py", *args]
        launchers.append(server.start(*command, script="torchrun", env=env))
        return launchers[-1]

    yield start
    for launcher in launchers:
        for pid in ranks_of(launcher).values():
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)


def assert_one_set_of_files(path, reference):
    def names(path):
        return sorted(file.name.replace(path.stem, "") for file in path.iterdir())

    assert names(path) == names(reference)
    assert len(list(path.glob("*.tb_log/*"))) == 1
    steps, epochs = metrics(path)
    assert [entry["step"] for entry in steps] == list(range(STEPS))
    assert [entry["epoch"] for entry in epochs] == list(range(1, EPOCHS + 1))


def test_torchrun_follows_one_process(torchrun, place, one):
    flags, path = place("two-padded")
    launcher = torchrun(*PLAIN, *flags, "--load_data_workers", 1)
    assert launcher.wait(60).returncode == 0, launcher.stderr
    assert launcher.stderr.count("INFO - Epoch: 1 ") == 1, launcher.stderr
    assert_close_losses(path, one["padded"])
    assert_one_set_of_files(path, one["padded"])
    for name, model in models(path).items():
        reference = models(one["padded"])[name]
        assert model.keys() == reference.keys()  # no "module."
        for key in model:
            assert torch.allclose(model[key], reference[key], atol=1e-4)


def test_torchrun_and_sigterm(server, torchrun, place, one, tmp_path):
    """With a slow disk, so that torchrun's own SIGTERM to the ranks comes while rank 0 saves."""
    flags, path = place("term")
    flags = [*PLAIN, *flags, "--load_data_workers", 1]
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK)
    env = {"PYTHONPATH": str(tmp_path), "SLOW_IF": str(tmp_path / "slow")}
    launcher = torchrun(*flags, env=env)
    until(lambda: last_step(path) >= 2, launcher)
    (tmp_path / "slow").touch()
    os.kill(ranks_of(launcher)[0], signal.SIGTERM)
    assert launcher.wait(60).returncode != 0
    assert last(path)["state"]["step"] == len(metrics(path)[0]) < STEPS, launcher.stderr
    done = server.run(*flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert_close_losses(path, one["padded"])


def test_torchrun_with_one_rank_killed(server, torchrun, place, one):
    flags, path = place("one-killed")
    flags = [*PLAIN, *flags, "--load_data_workers", 1, "--save_steps", 1]
    launcher = torchrun(*flags)
    until(lambda: last_step(path) >= 8, launcher)
    os.kill(ranks_of(launcher)[1], signal.SIGKILL)
    assert launcher.wait(60).returncode != 0
    assert 0 < last(path)["state"]["step"] < STEPS, launcher.stderr
    done = server.run(*flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert_close_losses(path, one["padded"])
    assert all(len(values) == 1 for values in events(path).values())


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_ends_the_others(server, place, victim):
    """Also where there is no torchrun to tell them."""
    flags, path = place(f"killed-{victim}")
    processes = server.start_ranks(*PLAIN, *flags)
    until(lambda: last_step(path) >= 2, processes[0])
    os.kill(processes[victim].pid, signal.SIGKILL)
    error_of(processes[1 - victim].wait())
    assert is_finite(last(path)["model"])


def test_processes_with_masked_padding_follow_one(server, place, one):
    """With parts of batches, too."""
    flags, path = place("two-masked")
    for process in server.run_ranks(*PLAIN, *flags, "--mask_padding", "--accumulate_steps", 4):
        assert process.returncode == 0, process.stderr
    assert_close_losses(path, one["masked"])
    assert_one_set_of_files(path, one["masked"])


def test_any_number_of_processes_goes_on_after_a_signal_to_one(server, place, one):
    """Three at first, and then two, of which the last gets the signal; and one to the end."""
    flags, path = place("fewer")
    for count, world_size in enumerate((3, 2)):
        processes = server.start_ranks(*PLAIN, *flags, "--resume", world_size=world_size)
        until(
            lambda n=count, k=2 + 8 * count: started(path) > n and last_step(path) >= k,
            processes[0],
        )
        os.kill(processes[-1].pid, signal.SIGUSR1)
        for process in processes:
            assert process.wait().returncode == 128 + signal.SIGUSR1, process.stderr
            assert "Traceback" not in process.stderr
        assert last(path)["state"]["step"] == len(metrics(path)[0]) < STEPS
    done = server.run(*PLAIN, *flags, "--resume")
    assert done.returncode == 0, done.stderr
    assert_close_losses(path, one["padded"])
    assert [entry["step"] for entry in metrics(path)[0]] == list(range(STEPS))
    assert all(len(values) == 1 for values in events(path).values())


def test_two_processes_go_on_from_one(server, place, one):
    flags, path = place("more")
    assert server.run(*PLAIN, *flags, "--max_steps", 8).returncode == 0
    for process in server.run_ranks(*PLAIN, *flags, "--resume"):
        assert process.returncode == 0, process.stderr
    assert_close_losses(path, one["padded"])


def test_two_processes_resume_exactly(server, place):
    """With dropout, which differs from process to process."""
    paths = []
    for name, stops in (("two-whole", [None]), ("two-stopped", [8, None])):
        flags, path = place(name)
        flags = [*FULL, *flags, "--epochs", 2, "--load_data_workers", 1]
        paths.append(path)
        for stop in stops:
            limit = ["--max_steps", stop] if stop else []
            for process in server.run_ranks(*flags, *limit, "--resume"):
                assert process.returncode == 0, process.stderr
    assert_same_models(*paths)
    assert metrics(paths[0]) == metrics(paths[1])


# --accumulate_steps, --precision, --max_steps -----------------------------------------------------


@pytest.fixture(scope="module")
def variants(server, place, bad_data):
    jobs = {
        "bf16": ["--precision", "bf16"],
        "fp16": ["--precision", "fp16"],
        "fp16-bad": ["--precision", "fp16", "--librispeech_path", bad_data["all"]],
    }
    for kind, parts in itertools.product(("padded", "masked"), (1, 4)):
        flags = ["--batch_size", 6, "--epochs", 1, "--accumulate_steps", parts]
        jobs[f"{kind}-{parts}"] = [*flags, *(["--mask_padding"] if kind == "masked" else [])]
    return server.run_all({name: [*PLAIN, *place(name)[0], *jobs[name]] for name in jobs})


@pytest.mark.parametrize("kind", ["padded", "masked"])
def test_accumulated_batches_equal_whole_ones(variants, place, kind):
    """Batches of 6 and 3, whose parts differ in frames."""
    paths = []
    for name in (f"{kind}-1", f"{kind}-4"):
        assert variants[name].returncode == 0, variants[name].stderr
        paths.append(place(name)[1])
    whole, parts = (models(path)["epoch_1.model"] for path in paths)
    for name in whole:
        assert torch.allclose(whole[name], parts[name], atol=1e-5, rtol=0)
    assert_close_losses(*paths, tolerance=1e-5)


def test_bf16_on_a_cpu(variants, place, one):
    path = place("bf16")[1]
    assert variants["bf16"].returncode == 0, variants["bf16"].stderr
    assert_close_losses(path, one["padded"], tolerance=0.03)
    assert epoch_losses(path) != epoch_losses(one["padded"])
    assert {weight.dtype for weight in last(path)["model"].values()} == {torch.float32}


def test_fp16_on_a_cpu_works_or_is_refused(variants, place, one):
    if variants["fp16"].returncode:
        assert "fp16" in error_of(variants["fp16"])
        return
    path = place("fp16")[1]
    assert_close_losses(path, one["padded"], tolerance=0.03)
    assert is_finite(last(path)["model"])


def test_fp16_skips_a_bad_target(variants, place):
    """A loss that is not finite with a gradient that is, which the scaler does not see."""
    line, path = error_of(variants["fp16-bad"]), place("fp16-bad")[1]
    assert "20 steps in a row" in line or "fp16" in line
    if (path / "last.ckpt").exists():
        assert same(last(path)["model"], models(path)["epoch_0.model"])


def test_max_steps_ends_cleanly(stopped, whole):
    assert last(stopped.path)["state"]["step"] == 8
    assert sorted(models(stopped.path)) == ["epoch_0.model", "epoch_1.model"]
    assert same(models(stopped.path)["epoch_1.model"], models(whole)["epoch_1.model"])
    steps, epochs = metrics(stopped.path)
    assert steps == metrics(whole)[0][:8]
    assert [(entry["epoch"], entry["step"]) for entry in epochs] == [(1, 6), (2, 8)]
    number = r"(\d\.\d{5})"
    line = re.search(rf"Epoch: 2 Training Loss: {number} Validation Loss: {number}", stopped.stderr)
    losses = epochs[1]["training_loss"], epochs[1]["validation_loss"]
    assert (float(line[1]), float(line[2])) == pytest.approx(losses, abs=1e-5)


def test_max_steps_and_resume(server, copy, whole):
    """Stopped in an epoch, again at the same step, at an epoch's end, there again, and then not."""
    flags, path = copy
    for limit in (8, 12, 12, 5):
        before = metrics(path), events(path), last(path)["state"]["step"]
        done = server.run(*flags, "--max_steps", limit)
        assert done.returncode == 0, done.stderr
        assert last(path)["state"]["step"] == max(limit, before[2])
        if limit <= before[2]:
            assert metrics(path) == before[0], f"--max_steps {limit} after step {before[2]}"
            assert without_speed(events(path)) == without_speed(before[1])
    done = server.run(*flags)
    assert done.returncode == 0, done.stderr
    assert_same_models(path, whole)
    assert metrics(path) == metrics(whole)
    assert without_speed(events(path)) == without_speed(events(whole))


# CUDA ---------------------------------------------------------------------------------------------


@no_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_resume_on_cuda(server, place, one, precision):
    paths = []
    for name, stops in (("whole", []), ("stopped", [8, 13])):
        flags, path = place(f"cuda-{precision}-{name}")
        paths.append(path)
        for stop in [*stops, None]:
            limit = ["--max_steps", stop] if stop else []
            args = ["--device", "cuda", "--precision", precision, "--resume", *limit]
            done = server.run(*PLAIN, *flags, *args)
            assert done.returncode == 0, done.stderr
    assert_close_losses(*paths)
    assert_close_losses(paths[0], one["padded"], tolerance=0.05)
    assert [entry["step"] for entry in metrics(paths[1])[0]] == list(range(STEPS))


@no_cuda
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bad_batch_is_skipped_on_cuda(server, place, bad_data, optimizer):
    flags, path = place(f"cuda-bad-{optimizer}")
    flags += ["--device", "cuda", "--librispeech_path", bad_data["target"], "--epochs", 2]
    done = server.run(*PLAIN, *flags, "--optimizer", optimizer)
    assert done.returncode == 0, done.stderr
    assert metrics(path)[0][-1]["skipped_steps"] == 2
    assert is_finite(last(path)["model"])
