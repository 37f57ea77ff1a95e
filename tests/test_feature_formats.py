"""extract_features.py: its formats, interruptions, audio as input, several processes."""

import gc
import itertools
import json
import math
import os
import pickle
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, ROOT, make_folder

import extract_features
import prepare_data
from apc_model import APCModel
from utils import PrenetConfig, RNNConfig

MEL, HIDDEN, SEQ_LEN = 7, 16, 25
FRAMES = [25, 1, 13, 24, 2, 13, 8]
FORMATS = ["pt", "npy", "ark"]
every_format = pytest.mark.parametrize("kind", FORMATS)


# Runs ---------------------------------------------------------------------------------------------


def flags(checkpoint, source, save_dir, *options, batch_size=1):
    source_flag = "--audio" if "--audio" in options else "--data_dir"
    options = [option for option in options if option != "--audio"]
    return [
        *("--checkpoint", checkpoint, source_flag, source, "--save_dir", save_dir),
        *("--batch_size", batch_size, "--load_data_workers", 0, "--device", "cpu", *options),
    ]


@pytest.fixture
def extract(monkeypatch, call_main):
    """Run main as the script would, in this process: (status, stderr)."""
    # One process reads the audio: many would only be slow to start.
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)

    def call(*args, **kw):
        done = call_main(extract_features, *flags(*args, **kw))
        return done.returncode, done.stderr

    return call


def done(result):
    status, stderr = result
    assert status == 0, stderr
    return stderr


def refused(result):
    """A run's only line besides warnings and the progress bar."""
    status, stderr = result
    assert status == 1, stderr
    assert "Traceback" not in stderr, stderr
    lines = [line for line in re.split(r"[\r\n]+", stderr) if "error: " in line]
    assert len(lines) == 1 and lines[0].startswith("extract_features.py: error: "), stderr
    return lines[0]


def warnings_of(stderr):
    return [line for line in stderr.splitlines() if " - WARNING - " in line]


class Server:
    """Forks runs of the script from an interpreter that has paid for the imports.

    run(argv) -> exit status of each rank, negative for a signal. `crash`: SIGKILL when the run is
    about to rename, remove or sync a file for that time. `limit`: bytes that a file may have.
    """

    def __init__(self, folder):
        self.stderr = folder / "stderr"
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import test_feature_formats as t; t._serve()"],
            env={
                **os.environ,
                **ONE_THREAD,
                "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, argv, ranks=0, crash=0, limit=None):
        order = {"argv": [*map(str, argv)], "ranks": ranks, "crash": crash, "limit": limit}
        self.process.stdin.write(json.dumps(order | {"stderr": str(self.stderr)}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def one(self, argv, **kw):
        """-> (status, stderr) of a run in one process."""
        (code,) = self.run(argv, **kw)
        return code, self.stderr.read_text()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def _serve():
    import kaldiio  # noqa: F401
    import torch.distributed  # noqa: F401

    gc.freeze()  # else each process takes its time to collect, as it ends, what it inherited
    for line in sys.stdin:
        order = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        pids = []
        for rank in range(order["ranks"] or 1):
            pid = os.fork()
            if pid == 0:
                return _become(order, rank, port)
            pids.append(pid)
        codes = dict.fromkeys(pids)
        while None in codes.values():
            pid, status = os.wait()
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:  # as torchrun does
                for other in [pid for pid in pids if codes[pid] is None]:
                    os.kill(other, signal.SIGKILL)
        print(json.dumps(list(codes.values())), flush=True)
    os._exit(0)


def _become(order, rank, port):
    stderr = os.open(order["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for number, file in ((0, os.open("/dev/null", os.O_RDWR)), (1, stderr), (2, stderr)):
        os.dup2(file, number)
    if order["ranks"]:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"]}
        os.environ |= {key: str(value) for key, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    if order["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["limit"], order["limit"]))
    count = itertools.count(1)

    def crashing(function):
        def call(*args, **kw):
            if next(count) == order["crash"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kw)

        return call

    if order["crash"]:
        os.replace, os.remove = crashing(os.replace), crashing(os.remove)
        os.fsync = crashing(os.fsync)
    sys.argv = ["extract_features.py", *order["argv"]]
    runpy.run_path(str(ROOT / "extract_features.py"), run_name="__main__")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.close()


# Models, data, features ---------------------------------------------------------------------------


def write_model(path, data=None, mel=MEL, prenet=0, rnn_type="gru", layers=3, residual=True):
    """A model with its config.json, whose `data` is a list or None for no such key."""
    torch.manual_seed(4)
    configs = (
        PrenetConfig(mel, HIDDEN, prenet, 0.0) if prenet else None,
        RNNConfig(HIDDEN if prenet else mel, HIDDEN, layers, 0.0, residual, rnn_type),
    )
    model = APCModel(mel, *configs).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), path)
    config = {"rnn_residual": residual} | ({} if data is None else {"data": data})
    (path.parent / "config.json").write_text(json.dumps(config))
    return model


@torch.no_grad()
def all_layers(model, frames):
    """(T, D) -> (layers, T, H), for the utterance alone."""
    frames = torch.as_tensor(frames)
    return model(frames[None], torch.tensor([len(frames)]))[1][:, 0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A prepared folder, its frames by utterance id."""
    path = tmp_path_factory.mktemp("data") / "dev"
    tensors, lengths = make_folder(path, FRAMES, MEL, SEQ_LEN)
    return path, {name[:-3]: tensors[name][:length] for name, length in lengths.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "foo.model"
    return path, write_model(path, prenet=1)


def read(save_dir, kind):
    """{utterance id: tensor} of a finished folder in which nothing else lies."""
    save_dir = Path(save_dir)
    names = {path.name for path in save_dir.iterdir()}
    if kind == "ark":
        assert names == {"feats.ark", "feats.scp", "features.json"}
        return read_scp(save_dir / "feats.scp")
    left = {name for name in names if not name.endswith(f".{kind}")}
    assert left == {"features.json"}
    return {name.removesuffix(f".{kind}"): read_file(save_dir / name) for name in names - left}


def read_file(path):
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)
    return torch.from_numpy(np.load(path, allow_pickle=False))


def read_scp(path):
    import kaldiio

    loaded = kaldiio.load_scp(str(path))
    return {utt_id: torch.from_numpy(np.array(loaded[utt_id])) for utt_id in loaded}


def assert_equal(got, expected):
    assert sorted(got) == sorted(expected)
    assert all(torch.equal(got[utt_id], value) for utt_id, value in expected.items())


def assert_close(got, expected, tolerance=1e-5):
    assert sorted(got) == sorted(expected)
    for utt_id, value in expected.items():
        assert got[utt_id].shape == value.shape, utt_id
        assert float((got[utt_id] - value).abs().max()) <= tolerance, utt_id


# Formats ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4])
def test_formats_hold_the_same_numbers(tmp_path, extract, folder, model, batch_size):
    data, frames = folder
    got = {}
    for kind in FORMATS:
        out = tmp_path / kind
        done(extract(model[0], data, out, "--format", kind, batch_size=batch_size))
        got[kind] = read(out, kind)
        assert {value.dtype for value in got[kind].values()} == {torch.float32}
    assert_close(got["pt"], {name: all_layers(model[1], x)[-1] for name, x in frames.items()})
    assert_equal(got["npy"], got["pt"])
    assert_equal(got["ark"], got["pt"])


@pytest.fixture(scope="module")
def odd_names(tmp_path_factory):
    """Ids whose order depends on who sorts: Kaldi wants that of the bytes (LC_ALL=C)."""
    path = tmp_path_factory.mktemp("odd") / "data"
    tensors, lengths = make_folder(path, [3, 4, 5, 6, 7, 8], MEL)
    names = ["b-1.pt", "B-1.pt", "a-1-2.pt", "a-1.pt", "a_1.pt", "é-1.pt"]
    for old, new in zip(tensors, names):
        os.rename(path / old, path / new)
    table = {new: lengths[old] for old, new in zip(tensors, names)}
    (path / "lengths.pkl").write_bytes(pickle.dumps(table))
    return path, {new[:-3]: tensors[old][: lengths[old]] for old, new in zip(tensors, names)}


def test_ark_as_kaldiio_reads_it(tmp_path, extract, odd_names, model, monkeypatch):
    import kaldiio

    data, frames = odd_names
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done(extract(model[0], data, "my feats/dev", "--format", "ark", batch_size=4))
    out = tmp_path / "here" / "my feats" / "dev"
    monkeypatch.chdir(tmp_path)  # paths in the scp do not depend on where one is
    expected = {name: all_layers(model[1], x)[-1] for name, x in frames.items()}
    assert_close(read(out, "ark"), expected)

    lines = (out / "feats.scp").read_bytes().splitlines()
    ids = [line.split(b" ")[0] for line in lines]
    assert ids == sorted(ids) and len(set(ids)) == len(frames)
    for line in lines:
        path, offset = line.split(b" ", 1)[1].decode().rsplit(":", 1)
        assert path == str(out / "feats.ark") and os.path.isabs(path)
        assert int(offset) < os.path.getsize(path)

    archive = {name: torch.from_numpy(x.copy()) for name, x in kaldiio.load_ark(f"{out}/feats.ark")}
    assert_close(archive, expected)
    with kaldiio.ReadHelper(f"scp:{out}/feats.scp") as reader:
        assert {name for name, _ in reader} == set(frames)


def test_ark_goes_back_into_prepare_data(tmp_path, extract, folder, model):
    """What we write is among what we read."""
    out, again = tmp_path / "out", tmp_path / "again"
    done(extract(model[0], folder[0], out, "--format", "ark"))
    source = ["--librispeech_from_kaldi", out / "feats.scp", "--max_seq_len", SEQ_LEN]
    prepare_data.main([*map(str, [*source, "--save_dir", again, "--num_workers", 1])])
    for utt_id, value in read(out, "ark").items():
        assert torch.equal(torch.load(again / f"{utt_id}.pt")[: len(value)], value)


@pytest.mark.parametrize("kind", ["pt", "npy"])
@pytest.mark.parametrize("layer", ["last", "0,2"])
def test_float16(tmp_path, extract, folder, model, kind, layer):
    got = {}
    for dtype in ("float32", "float16"):
        options = ["--format", kind, "--dtype", dtype, "--layer", layer]
        done(extract(model[0], folder[0], tmp_path / dtype, *options))
        got[dtype] = read(tmp_path / dtype, kind)
    assert {value.dtype for value in got["float16"].values()} == {torch.float16}
    assert_equal(got["float16"], {name: value.half() for name, value in got["float32"].items()})


@pytest.mark.parametrize("kind", ["pt", "npy"])
@pytest.mark.parametrize(
    "layer, choose",
    [
        ("0,2", lambda reps: reps[[0, 2]]),
        ("2,0", lambda reps: reps[[2, 0]]),
        ("3,1,2,0", lambda reps: reps[[3, 1, 2, 0]]),
        ("1", lambda reps: reps[1]),
        ("mean", lambda reps: reps.sum(dim=0) / 4),
        ("all", lambda reps: reps),
        ("last", lambda reps: reps[3]),
    ],
)
def test_layers(tmp_path, extract, folder, model, layer, choose, kind):
    data, frames = folder
    options = ["--layer", layer, "--format", kind]
    done(extract(model[0], data, tmp_path / "out", *options, batch_size=3))
    expected = {name: choose(all_layers(model[1], x)) for name, x in frames.items()}
    assert_close(read(tmp_path / "out", kind), expected)


@pytest.mark.parametrize("layer", ["mean", "0", "last"])
def test_matrices_fit_into_an_ark(tmp_path, extract, folder, model, layer):
    for kind in ("pt", "ark"):
        options = ["--layer", layer, "--format", kind]
        done(extract(model[0], folder[0], tmp_path / kind, *options))
    assert_equal(read(tmp_path / "ark", "ark"), read(tmp_path / "pt", "pt"))


BAD_LAYERS = ["0,", ",", ",1", "0,,1", "0,4", "4,0", "0;2", "0, 2", "0-2", "mean,0", "all,1", "min"]


@pytest.mark.parametrize("layer", BAD_LAYERS)
def test_bad_lists_of_layers_get_the_choices(tmp_path, extract, folder, model, layer):
    message = refused(extract(model[0], folder[0], tmp_path / "out", f"--layer={layer}"))
    for choice in ("all", "mean", "last"):
        assert choice in message
    assert re.search(r"\b0\b.*\b3\b", message), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, word",
    [
        (["--layer", "all"], "layer"),
        (["--layer", "0,2"], "layer"),
        (["--dtype", "float16"], "float16"),
        (["--dtype", "float16", "--layer", "all"], ""),
    ],
    ids=str,
)
def test_what_no_ark_can_hold(tmp_path, extract, folder, model, options, word):
    out = tmp_path / "out"
    message = refused(extract(model[0], folder[0], out, "--format", "ark", *options))
    assert "ark" in message and word in message
    assert not out.exists()


@pytest.mark.parametrize("utt_id", ["a b", "a\u00a0b", "a\u2003b"], ids=ascii)
def test_ids_with_spaces(tmp_path, extract, model, utt_id):
    """A file may have such a name; in Kaldi's files a space ends it."""
    data, out = tmp_path / "data", tmp_path / "out"
    tensors, _ = make_folder(data, [5], MEL)
    os.rename(data / next(iter(tensors)), data / f"{utt_id}.pt")
    (data / "lengths.pkl").write_bytes(pickle.dumps({f"{utt_id}.pt": 5}))
    message = refused(extract(model[0], data, out, "--format", "ark"))
    assert "space" in message
    assert not list(out.glob("feats.*"))
    done(extract(model[0], data, tmp_path / "npy", "--format", "npy"))
    assert list(read(tmp_path / "npy", "npy")) == [utt_id]


@pytest.mark.parametrize("option", [["--format", "mat"], ["--dtype", "float64"]], ids=str)
def test_unknown_choices(tmp_path, extract, folder, model, option):
    status, stderr = extract(model[0], folder[0], tmp_path / "out", *option)
    assert status == 2 and option[1] in stderr


# Interruptions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(server, folder, model, tmp_path_factory):
    """Uninterrupted runs: {format: features}, of the last and of the first layer."""
    found = {}
    for kind, layer in itertools.product(FORMATS, ("last", "0")):
        out = tmp_path_factory.mktemp("whole") / "out"
        argv = flags(model[0], folder[0], out, "--format", kind, "--layer", layer)
        code, stderr = server.one(argv)
        assert code == 0, stderr
        found[kind, layer] = read(out, kind)
    return found


@pytest.fixture(scope="module")
def killed(folder, model, tmp_path_factory):
    """Real processes of the script, one a format, SIGKILLed midway among many utterances.

    Gives {format: (their data, the folder as they left it)}.
    """
    data = tmp_path_factory.mktemp("many") / "data"
    rng = np.random.default_rng(0)
    make_folder(data, rng.integers(5, SEQ_LEN, 400).tolist(), MEL, SEQ_LEN)
    processes = {}
    for kind in ("pt", "ark"):
        out = tmp_path_factory.mktemp(kind) / "out"
        argv = [sys.executable, str(ROOT / "extract_features.py")]
        argv += map(str, flags(model[0], data, out, "--format", kind))
        output = open(out.parent / "output", "w")  # noqa: SIM115
        env = {**os.environ, **ONE_THREAD}
        process = subprocess.Popen(argv, stdout=output, stderr=output, env=env)
        processes[kind] = process, out

    def progress(out, kind):
        if kind == "ark":
            return sum(path.stat().st_size > 2000 for path in out.glob("feats.scp.part"))
        return len(list(out.glob(f"*.{kind}"))) > 20

    try:
        waiting, end = dict(processes), time.monotonic() + 60
        while waiting:
            assert time.monotonic() < end
            for kind, (process, out) in list(waiting.items()):
                assert process.poll() is None, (out.parent / "output").read_text()
                if progress(out, kind):
                    process.kill()
                    process.wait()
                    del waiting[kind]
            time.sleep(0.001)
    finally:
        for process, _ in processes.values():
            process.kill()
            process.wait()
    return {kind: (data, out) for kind, (_, out) in processes.items()}


@pytest.mark.parametrize("kind", ["pt", "ark"])
def test_killed_run_resumes(tmp_path, extract, killed, model, kind, monkeypatch):
    data, out = killed[kind]
    final = [path for path in out.iterdir() if path.suffix == f".{kind}"]
    if kind == "ark":
        assert not final and not (out / "feats.scp").exists()
        at_least = (out / "feats.scp.part").read_bytes().count(b"\n") - 1
    else:
        at_least = len(final)
    assert 0 < at_least < 400
    before = {path: path.stat().st_mtime_ns for path in final}
    there = {path.name: read_file(path) for path in final}

    count, forward = itertools.count(), APCModel.forward

    def counting(self, *args):
        next(count)
        return forward(self, *args)

    monkeypatch.setattr(APCModel, "forward", counting)
    done(extract(model[0], data, out, "--format", kind, "--resume"))
    monkeypatch.undo()
    assert next(count) <= 400 - at_least, "finished utterances went through the model again"
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert all(torch.equal(read_file(out / name), value) for name, value in there.items())

    done(extract(model[0], data, tmp_path / "whole", "--format", kind))
    got = read(out, kind)
    assert_equal(got, read(tmp_path / "whole", kind))
    assert len(got) == 400
    if kind == "ark":
        for name in ("feats.ark", "feats.scp"):
            one, other = [(path / name).read_bytes() for path in (out, tmp_path / "whole")]
            assert one.replace(bytes(out), b"") == other.replace(bytes(tmp_path / "whole"), b"")


@pytest.mark.parametrize("kind, crashes", [("pt", [1, 2, 3, 6, 9]), ("npy", [4]), ("ark", None)])
def test_killed_at_any_step_on_disk(tmp_path, server, folder, model, whole, kind, crashes):
    """Before renaming, removal or sync; what has a final name is whole; --resume does the rest."""
    for crash in crashes or itertools.count(1):
        out = tmp_path / str(crash)
        argv = flags(model[0], folder[0], out, "--format", kind)
        code, stderr = server.one(argv, crash=crash)
        if kind == "ark" and (out / "feats.scp").exists():
            assert_equal(read_scp(out / "feats.scp"), whole[kind, "last"])
        elif kind != "ark" and out.exists():
            for path in out.glob(f"*.{kind}"):
                assert torch.equal(read_file(path), whole[kind, "last"][path.stem])
        if code == 0 and not crashes:
            assert crash > 5, "no run was killed"
            break
        assert code == -signal.SIGKILL, stderr
        before = {path: path.stat().st_mtime_ns for path in out.glob(f"*.{kind}")}
        code, stderr = server.one([*argv, "--resume"])
        assert code == 0, stderr
        assert_equal(read(out, kind), whole[kind, "last"])
        if kind != "ark":
            assert {path: path.stat().st_mtime_ns for path in before} == before


def test_killed_resumes_are_resumed(tmp_path, server, folder, model, whole):
    """An ark's run, killed a little later each time."""
    argv = flags(model[0], folder[0], tmp_path / "out", "--format", "ark", "--resume")
    codes = [server.run(argv, crash=crash)[0] for crash in range(2, 8)]
    assert codes.count(-signal.SIGKILL) > 3 and set(codes) <= {0, -signal.SIGKILL}
    assert server.run(argv) == [0]
    assert_equal(read(tmp_path / "out", "ark"), whole["ark", "last"])


@pytest.fixture(scope="module")
def half_an_ark(server, folder, model, tmp_path_factory):
    """A folder of a run that was killed when all was written but the final names."""
    out = tmp_path_factory.mktemp("half") / "out"
    argv = flags(model[0], folder[0], out, "--format", "ark")
    for crash in itertools.count(1):
        shutil.rmtree(out, ignore_errors=True)
        assert server.run(argv, crash=crash) == [-signal.SIGKILL]
        if (out / "feats.ark.part").exists() and (out / "feats.ark.part").stat().st_size:
            return out


@pytest.mark.parametrize(
    "ark, scp",
    [(0, 0), (9, 0), (0, 9), (0, 1), (300, 0), (1500, 40), (None, None), (None, 0), (0, None)],
    ids=str,
)
def test_ark_cut_anywhere(extract, folder, model, whole, half_an_ark, ark, scp):
    """Bytes that never reached the disk, in the middle of a matrix or of a line, or whole files.

    The scp's lines follow the matrices: more of it than of the ark is not what a kill leaves, but
    what is missing from the ark must still be noticed or made up for.
    """
    out = half_an_ark.parent / f"{ark}-{scp}"
    shutil.copytree(half_an_ark, out)
    for name, cut in (("feats.ark.part", ark), ("feats.scp.part", scp)):
        path = out / name
        if cut is None:
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size - cut)
    if (ark or 0) > 9 or (ark is None and scp is not None):  # matrices that the scp lists are gone
        status, stderr = extract(model[0], folder[0], out, "--format", "ark", "--resume")
        if status:
            refused((status, stderr))
            assert not (out / "feats.scp").exists()
            return
    else:
        done(extract(model[0], folder[0], out, "--format", "ark", "--resume"))
    # The scp's paths are those of the copy only if it was told: compare through the archive.
    got = {utt_id: value for utt_id, value in read_ark(out / "feats.ark").items()}
    assert_equal(got, whole["ark", "last"])
    assert {path.name for path in out.iterdir()} == {"feats.ark", "feats.scp", "features.json"}


def read_ark(path):
    import kaldiio

    return {name: torch.from_numpy(x.copy()) for name, x in kaldiio.load_ark(str(path))}


@pytest.mark.parametrize("step", ["ark-renamed", "scp-written"])
def test_killed_within_the_last_steps(extract, folder, model, whole, half_an_ark, step):
    """The files moved by hand to where they are between the renamings."""
    out = half_an_ark.parent / step
    shutil.copytree(half_an_ark, out)
    os.rename(out / "feats.ark.part", out / "feats.ark")
    if step == "scp-written":
        lines = (out / "feats.scp.part").read_bytes().splitlines(keepends=True)
        (out / "feats.scp").write_bytes(b"".join(sorted(lines)))
    else:
        (out / "feats.scp.tmp").write_bytes(b"utt-000 half a li")
    done(extract(model[0], folder[0], out, "--format", "ark", "--resume"))
    assert_equal(read_ark(out / "feats.ark"), whole["ark", "last"])
    assert {path.name for path in out.iterdir()} == {"feats.ark", "feats.scp", "features.json"}


@every_format
def test_resume_of_a_finished_run_touches_nothing(tmp_path, extract, folder, model, kind):
    out = tmp_path / "out"
    done(extract(model[0], folder[0], out, "--format", kind, "--resume"))  # of nothing: it begins
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.iterdir()}
    done(extract(model[0], folder[0], out, "--format", kind, "--resume"))
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.iterdir()} == before


@pytest.mark.parametrize("lost", [1, 6])
def test_resume_makes_what_is_gone(tmp_path, extract, folder, model, whole, lost):
    out = tmp_path / "out"
    done(extract(model[0], folder[0], out))
    for path in sorted(out.glob("*.pt"))[:lost]:
        path.unlink()
    sorted(out.glob("*.pt"))[-1].write_bytes(b"")  # as a crash of the machine may leave one
    done(extract(model[0], folder[0], out, "--resume"))
    assert_equal(read(out, "pt"), whole["pt", "last"])


@every_format
def test_resume_notices_new_utterances(tmp_path, extract, model, kind):
    """More was prepared meanwhile: written, or told that it is not, but not "were there"."""
    data, out = tmp_path / "data", tmp_path / "out"
    make_folder(data, FRAMES, MEL)
    table = pickle.loads((data / "lengths.pkl").read_bytes())
    (data / "lengths.pkl").write_bytes(pickle.dumps(dict(list(table.items())[:4])))
    done(extract(model[0], data, out, "--format", kind))
    assert len(read(out, kind)) == 4
    (data / "lengths.pkl").write_bytes(pickle.dumps(table))
    status, stderr = extract(model[0], data, out, "--format", kind, "--resume")
    if status:
        refused((status, stderr))
    else:
        assert len(read(out, kind)) == len(FRAMES)


CHANGES = {
    "layer": ["--layer", "0"],
    "dtype": ["--dtype", "float16"],
    "format": ["--format", "npy"],
    "residual": ["--no_residual"],
}


@pytest.mark.parametrize("change", [*CHANGES, "checkpoint", "data"])
def test_resume_with_other_flags_is_refused(tmp_path, extract, folder, model, change):
    """Else half of the features would be of another kind."""
    out = tmp_path / "out"
    done(extract(model[0], folder[0], out, "--residual"))
    sorted(out.glob("*.pt"))[3].unlink()
    before = {path: path.read_bytes() for path in out.iterdir()}
    checkpoint, data = model[0], folder[0]
    if change == "checkpoint":
        checkpoint = tmp_path / "other.model"
        write_model(checkpoint, prenet=1)
    if change == "data":
        data = tmp_path / "other"
        make_folder(data, FRAMES, MEL, SEQ_LEN, seed=1)
    options = CHANGES.get(change, [])
    if change != "residual":
        options = ["--residual", *options]
    message = refused(extract(checkpoint, data, out, "--resume", *options))
    named = {"checkpoint": "other.model", "data": "other"}.get(change, change)
    assert named in message
    assert {path: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize("kind, crashes", [("pt", [2, 5]), ("ark", [2, 3, 6])])
def test_old_features_are_not_taken_for_new(tmp_path, server, folder, model, whole, kind, crashes):
    """Over finished features another layer's are begun, killed, and resumed."""
    old = flags(model[0], folder[0], tmp_path / "old", "--format", kind, "--layer", "0")
    assert server.run(old) == [0]
    for crash in crashes:
        out = tmp_path / str(crash)
        shutil.copytree(tmp_path / "old", out)
        argv = flags(model[0], folder[0], out, "--format", kind)
        code, stderr = server.one(argv, crash=crash)
        if code == 1:  # it may refuse a folder that holds features
            refused((code, stderr))
            assert_equal(read(out, kind), whole[kind, "0"])
            continue
        assert code == -signal.SIGKILL, stderr
        code, stderr = server.one([*argv, "--resume"])
        if code == 1:
            refused((code, stderr))
        else:
            assert_equal(read(out, kind), whole[kind, "last"])


def test_begun_anew_over_finished_features(tmp_path, extract, folder, model, whole):
    """Without --resume: all new, or refused."""
    for kind in FORMATS:
        out = tmp_path / kind
        done(extract(model[0], folder[0], out, "--format", kind, "--layer", "0"))
        status, stderr = extract(model[0], folder[0], out, "--format", kind)
        if status:
            refused((status, stderr))
        else:
            assert_equal(read(out, kind), whole[kind, "last"])


def test_resume_does_not_trust_files_of_unknown_origin(tmp_path, extract, folder, model, whole):
    out = tmp_path / "out"
    out.mkdir()
    torch.save(torch.zeros(3), out / "utt-002.pt")
    status, stderr = extract(model[0], folder[0], out, "--resume")
    if status:
        refused((status, stderr))
        assert torch.equal(torch.load(out / "utt-002.pt"), torch.zeros(3))
    else:
        assert_equal(read(out, "pt"), whole["pt", "last"])


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\0\0"], ids=ascii)
def test_damaged_features_json(tmp_path, extract, folder, model, content):
    out = tmp_path / "out"
    done(extract(model[0], folder[0], out))
    (out / "features.json").write_text(content)
    assert "features.json" in refused(extract(model[0], folder[0], out, "--resume"))


# A full disk --------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 KiB -> (path, function that makes it larger)."""
    path = tmp_path / "disk"
    path.mkdir()

    def mount(*options):
        return subprocess.run(
            ["mount", *options, path], capture_output=True, text=True, check=False
        )

    try:
        mounted = mount("-t", "tmpfs", "-o", "size=64k", "none")
    except FileNotFoundError:
        pytest.skip("no mount command")
    if mounted.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {mounted.stderr.strip()}")
    yield path, lambda: mount("-o", "remount,size=8m")
    subprocess.run(["umount", "-l", path], check=True)


@pytest.fixture(scope="module")
def wide(tmp_path_factory, server, model):
    """More features than the small disk holds -> (data, {format: all of them})."""
    data = tmp_path_factory.mktemp("wide") / "data"
    make_folder(data, list(range(1, 61)), MEL)
    found = {}
    for kind in FORMATS:
        out = tmp_path_factory.mktemp("wide-out") / "out"
        assert server.run(flags(model[0], data, out, "--format", kind)) == [0]
        found[kind] = read(out, kind)
    return data, found


def assert_whole_so_far(out, kind, expected):
    """Every file under a final name is whole, and no half one lies beside it."""
    names = [path.name for path in out.iterdir()]
    assert not [name for name in names if name.endswith(".tmp")]
    if kind == "ark":
        assert "feats.ark" not in names and "feats.scp" not in names
        return
    final = [path for path in out.iterdir() if path.suffix == f".{kind}"]
    assert 0 < len(final) < len(expected)
    assert all(torch.equal(read_file(path), expected[path.stem]) for path in final)


@every_format
def test_full_disk(server, small_disk, wide, model, kind):
    disk, enlarge = small_disk
    data, expected = wide
    argv = flags(model[0], data, disk / "out", "--format", kind)
    message = refused(server.one(argv))
    assert "No space left on device" in message
    assert_whole_so_far(disk / "out", kind, expected[kind])
    enlarge()
    code, stderr = server.one([*argv, "--resume"])
    assert code == 0, stderr
    assert_equal(read(disk / "out", kind), expected[kind])


@every_format
def test_a_file_that_may_not_grow(tmp_path, server, wide, model, kind):
    """Where no small disk can be had: the system's limit on a file's size, as with a quota."""
    data, expected = wide
    argv = flags(model[0], data, tmp_path / "out", "--format", kind)
    message = refused(server.one(argv, limit={"pt": 3500, "npy": 2000, "ark": 60_000}[kind]))
    assert "File too large" in message or "items requested" in message
    assert_whole_so_far(tmp_path / "out", kind, expected[kind])
    code, stderr = server.one([*argv, "--resume"])
    assert code == 0, stderr
    assert_equal(read(tmp_path / "out", kind), expected[kind])


# Several processes --------------------------------------------------------------------------------


def read_ranks(save_dir):
    """An ark's features of several processes, through the scp that lists them all."""
    ids = [line.split(b" ")[0] for line in (save_dir / "feats.scp").read_bytes().splitlines()]
    assert ids == sorted(ids)
    assert not [path for path in save_dir.iterdir() if path.suffix in (".tmp", ".part")]
    return read_scp(save_dir / "feats.scp")


def test_torchrun(tmp_path, folder, model, whole):
    """Started for real; batches of other utterances give other roundings."""
    argv = flags(model[0], folder[0], tmp_path / "out", "--format", "ark", batch_size=4)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*command, str(ROOT / "extract_features.py"), *map(str, argv)],
        env={**os.environ, **ONE_THREAD},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert_close(read_ranks(tmp_path / "out"), whole["ark", "last"], 1e-6)


def test_two_processes_write_the_files_of_one(tmp_path, server, folder, model, whole):
    argv = flags(model[0], folder[0], tmp_path / "out", batch_size=4)
    assert server.run(argv, ranks=2) == [0, 0], server.stderr.read_text()
    assert_close(read(tmp_path / "out", "pt"), whole["pt", "last"], 1e-6)


@pytest.mark.parametrize("kind", ["pt", "ark"])
def test_more_processes_than_utterances(tmp_path, server, model, kind):
    make_folder(tmp_path / "data", [9, 4], MEL)
    argv = flags(model[0], tmp_path / "data", tmp_path / "out", "--format", kind, batch_size=4)
    assert server.run(argv, ranks=3) == [0, 0, 0], server.stderr.read_text()
    argv = flags(model[0], tmp_path / "data", tmp_path / "one", "--format", kind, batch_size=4)
    assert server.run(argv) == [0]
    got = read_ranks(tmp_path / "out") if kind == "ark" else read(tmp_path / "out", kind)
    assert_close(got, read(tmp_path / "one", kind), 1e-6)


@pytest.mark.parametrize("kind, crashes", [("pt", [5]), ("ark", [3, 6])])
def test_killed_processes_resume(tmp_path, server, folder, model, whole, kind, crashes):
    for crash in crashes:
        argv = flags(model[0], folder[0], tmp_path / str(crash), "--format", kind)
        codes = server.run(argv, ranks=2, crash=crash)
        assert -signal.SIGKILL in codes, server.stderr.read_text()
        assert server.run([*argv, "--resume"], ranks=2) == [0, 0], server.stderr.read_text()
        out = tmp_path / str(crash)
        got = read_ranks(out) if kind == "ark" else read(out, kind)
        assert_equal(got, whole[kind, "last"])


def test_resume_on_another_number_of_processes(tmp_path, server, folder, model, whole):
    """Files an utterance do not care; archives a process cannot be divided anew."""
    argv = flags(model[0], folder[0], tmp_path / "pt", "--format", "pt")
    assert server.run(argv, crash=6) == [-signal.SIGKILL]
    assert server.run([*argv, "--resume"], ranks=2) == [0, 0]
    assert_equal(read(tmp_path / "pt", "pt"), whole["pt", "last"])
    argv = flags(model[0], folder[0], tmp_path / "ark", "--format", "ark")
    assert -signal.SIGKILL in server.run(argv, ranks=2, crash=3)
    assert "process" in refused(server.one([*argv, "--resume"]))
    assert not (tmp_path / "ark" / "feats.scp").exists()


# Audio --------------------------------------------------------------------------------------------

RATE = 16000
CUT = 80  # max_seq_len of what the models were trained on
SPEECH = {  # utterance id: seconds
    "84-121-0000": 0.7,
    "84-121-0001": 0.4,
    "84-121-0002": 1.3,  # 128 frames
    "1272-5-0000": 0.5,
}
CMVN = ["speaker", "utterance", "global", "none"]


def sound(seconds, seed=0, rate=RATE):
    """int16 (samples,): noise whose loudness goes up and down."""
    rng = np.random.default_rng(seed)
    t = np.arange(int(seconds * rate)) / rate
    return (rng.standard_normal(len(t)) * (1.2 + np.sin(9 * t + seed)) * 1500).astype(np.int16)


def write_sound(path, samples, rate=RATE, **kw):
    soundfile = pytest.importorskip("soundfile")
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, **kw)
    return path


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """LibriSpeech's kind of tree, with a .wav in it."""
    pytest.importorskip("kaldi_native_fbank")
    root = tmp_path_factory.mktemp("audio") / "dev"
    for seed, (utt_id, seconds) in enumerate(SPEECH.items()):
        ending = "wav" if utt_id.endswith("1") else "flac"
        write_sound(root / utt_id.split("-")[0] / f"{utt_id}.{ending}", sound(seconds, seed))
    return root


def prepare(source, save_dir, *options, max_seq_len=200):
    argv = ["--librispeech_from_audio", source, "--save_dir", save_dir, "--num_workers", 1]
    prepare_data.main([*map(str, [*argv, "--max_seq_len", max_seq_len, *options])])
    return save_dir


@pytest.fixture(scope="module")
def trained(recordings, tmp_path_factory):
    """{cmvn: (a model trained on the recordings cut to CUT frames, the same, prepared uncut)}."""
    found = {}
    for cmvn in CMVN:
        here = tmp_path_factory.mktemp(cmvn)
        cut = prepare(recordings, here / "cut", "--cmvn", cmvn, max_seq_len=CUT)
        made = json.loads((cut / "prepared.json").read_text())
        assert made["max_seq_len"] == CUT
        write_model(here / "model" / "foo.model", [made], mel=80)
        uncut = prepare(recordings, here / "uncut", "--cmvn", cmvn)
        found[cmvn] = here / "model" / "foo.model", uncut
    return found


@pytest.mark.parametrize("cmvn", CMVN)
def test_audio_gives_what_preparing_it_gives(tmp_path, extract, recordings, trained, cmvn):
    checkpoint, uncut = trained[cmvn]
    stderr = done(extract(checkpoint, recordings, tmp_path / "audio", "--audio", batch_size=3))
    assert not warnings_of(stderr)
    done(extract(checkpoint, uncut, tmp_path / "folder", batch_size=3))
    got = read(tmp_path / "audio", "pt")
    assert_close(got, read(tmp_path / "folder", "pt"))
    assert len(got["84-121-0002"]) == 128 > CUT


def test_the_kinds_of_cmvn_differ(tmp_path, extract, recordings, trained):
    """Else the test above would not see one taken for another."""
    got = []
    for cmvn in CMVN:
        done(extract(trained[cmvn][0], recordings, tmp_path / cmvn, "--audio"))
        got.append(read(tmp_path / cmvn, "pt")["84-121-0000"])
    for one, other in itertools.combinations(got, 2):
        assert float((one - other).abs().max()) > 1e-3


@pytest.mark.parametrize("cmvn", CMVN)
def test_a_single_file(tmp_path, extract, recordings, trained, cmvn):
    """Normalised by itself, where its speaker's other speech is not at hand."""
    checkpoint, uncut = trained[cmvn]
    wav = recordings / "84" / "84-121-0001.wav"
    stderr = done(extract(checkpoint, wav, tmp_path / "audio", "--audio"))
    assert not warnings_of(stderr)
    if cmvn == "speaker":
        (tmp_path / "alone").mkdir()
        shutil.copy(wav, tmp_path / "alone")
        uncut = prepare(tmp_path / "alone", tmp_path / "uncut", "--cmvn", cmvn)
    done(extract(checkpoint, uncut, tmp_path / "folder"))
    got, expected = read(tmp_path / "audio", "pt"), read(tmp_path / "folder", "pt")
    assert list(got) == ["84-121-0001"]
    assert_close(got, {"84-121-0001": expected["84-121-0001"]})


def test_global_statistics_are_those_of_training(tmp_path, extract, recordings, trained):
    """Other speech is normalised as the training data were, whatever its own mean is."""
    checkpoint, _ = trained["global"]
    loud = write_sound(tmp_path / "loud" / "x-1.wav", sound(0.5, seed=9) * 4)
    done(extract(checkpoint, loud, tmp_path / "one", "--audio"))
    write_sound(tmp_path / "loud" / "y-1.wav", sound(0.5, seed=8) // 50)
    done(extract(checkpoint, tmp_path / "loud", tmp_path / "two", "--audio"))
    one, two = [read(tmp_path / name, "pt") for name in ("one", "two")]
    assert_close(one, {"x-1": two["x-1"]})


@pytest.mark.parametrize(
    "options",
    [
        {"frame_shift_ms": 20.0},
        {"frame_length_ms": 32.0, "num_mel_bins": 40},
        {"num_mel_bins": 40},
        {"window_type": "povey", "htk_compat": False},
        {"sample_rate": 8000, "num_mel_bins": 23},
    ],
    ids=str,
)
def test_another_fbank_is_honoured(tmp_path, extract, options):
    audio = pytest.importorskip("audio")
    config = audio.FbankConfig(**options)
    made = {"source": "audio", "fbank": asdict(config), "cmvn": "utterance"}
    checkpoint = tmp_path / "model" / "foo.model"
    model = write_model(checkpoint, [made], mel=config.num_mel_bins)
    rate = int(config.sample_rate)
    samples = sound(0.5, rate=rate)
    wav = write_sound(tmp_path / "a.wav", samples, rate)
    stderr = done(extract(checkpoint, wav, tmp_path / "out", "--audio"))
    assert not warnings_of(stderr)
    frames = audio.fbank(samples.astype(np.float32), config).astype(np.float64)
    frames = (frames - frames.mean(axis=0)) / frames.std(axis=0)
    expected = {"a": all_layers(model, frames.astype(np.float32))[-1]}
    assert_close(read(tmp_path / "out", "pt"), expected, 1e-4)
    shift = rate * config.frame_shift_ms / 1000
    window = rate * config.frame_length_ms / 1000
    assert len(expected["a"]) == 1 + (len(samples) - window) // shift


@pytest.mark.parametrize("made", ["kaldi", "kaldi-speaker", "the original's", "no config", "none"])
def test_model_of_unknown_features(tmp_path, extract, recordings, trained, made):
    """The original's settings, CMVN by speaker, and a warning that this is a guess."""
    speaker = trained["speaker"][0]
    checkpoint = tmp_path / "model" / "bs32-rhl3-rhs16-rd0-adam-res-ts3.pt"
    kaldi = {"source": "kaldi", "path": "feats.scp", "fbank": None, "cmvn": "none", "mel_dim": 80}
    data = {
        "kaldi": [kaldi],
        "kaldi-speaker": [kaldi | {"cmvn": "speaker"}],
        "the original's": [None],
        "none": [],
    }.get(made)
    write_model(checkpoint, data, mel=80)
    if made == "no config":
        (checkpoint.parent / "config.json").unlink()
    stderr = done(extract(checkpoint, recordings, tmp_path / "out", "--audio"))
    (line,) = warnings_of(stderr)
    assert "original" in line
    done(extract(speaker, recordings, tmp_path / "known", "--audio"))
    assert_close(read(tmp_path / "out", "pt"), read(tmp_path / "known", "pt"))


def test_last_ckpt_knows_too(tmp_path, extract, recordings, trained):
    """last.ckpt holds the flags of the run; how its data were made is in config.json beside it."""
    checkpoint, _ = trained["none"]
    weights = torch.load(checkpoint, weights_only=True)
    flags = json.loads((checkpoint.parent / "config.json").read_text())
    shutil.copy(checkpoint.parent / "config.json", tmp_path)
    flags.pop("data")
    saved = {"model": weights, "optimizer": {}, "scaler": {}, "state": {"epoch": 3}, "flags": flags}
    torch.save(saved, tmp_path / "last.ckpt")
    stderr = done(extract(tmp_path / "last.ckpt", recordings, tmp_path / "out", "--audio"))
    done(extract(checkpoint, recordings, tmp_path / "known", "--audio"))
    assert not warnings_of(stderr)
    assert_equal(read(tmp_path / "out", "pt"), read(tmp_path / "known", "pt"))


@every_format
def test_audio_into_every_format(tmp_path, extract, recordings, trained, kind):
    checkpoint, _ = trained["speaker"]
    options = ["--audio", "--format", kind, "--layer", "mean"]
    done(extract(checkpoint, recordings, tmp_path / "out", *options))
    done(extract(checkpoint, recordings, tmp_path / "pt", "--audio", "--layer", "mean"))
    assert_equal(read(tmp_path / "out", kind), read(tmp_path / "pt", "pt"))


def test_audio_in_many_processes(tmp_path, server, extract, recordings, trained):
    """As the script runs: a process a core, and workers for the loader."""
    checkpoint, _ = trained["speaker"]
    argv = flags(checkpoint, recordings, tmp_path / "out", "--audio")
    code, stderr = server.one([*argv, "--load_data_workers", 2])
    assert code == 0, stderr
    done(extract(checkpoint, recordings, tmp_path / "one", "--audio"))
    assert_equal(read(tmp_path / "out", "pt"), read(tmp_path / "one", "pt"))


def test_interrupted_audio_resumes(tmp_path, server, extract, recordings, trained):
    checkpoint, _ = trained["speaker"]
    argv = flags(checkpoint, recordings, tmp_path / "out", "--audio")
    assert server.run(argv, crash=4) == [-signal.SIGKILL]
    assert server.run([*argv, "--resume"]) == [0]
    done(extract(checkpoint, recordings, tmp_path / "whole", "--audio"))
    assert_equal(read(tmp_path / "out", "pt"), read(tmp_path / "whole", "pt"))


def test_long_recording_is_not_split(tmp_path, extract, monkeypatch):
    """Three minutes beside short ones, where far fewer frames may go through at once."""
    audio = pytest.importorskip("audio")
    monkeypatch.setattr(extract_features, "MAX_FRAMES", 500)
    made = {"source": "audio", "fbank": asdict(audio.FbankConfig()), "cmvn": "none"}
    checkpoint = tmp_path / "model" / "foo.model"
    model = write_model(checkpoint, [made], mel=80, layers=2)
    samples = {"long": sound(180), **{f"short-{i}": sound(0.1 + 0.5 * i) for i in range(4)}}
    for utt_id, values in samples.items():
        write_sound(tmp_path / "audio" / f"{utt_id}.wav", values)
    argv = [checkpoint, tmp_path / "audio", tmp_path / "out", "--audio", "--layer", "all"]
    done(extract(*argv, batch_size=4))
    config = audio.FbankConfig()
    expected = {
        utt_id: all_layers(model, audio.fbank(values.astype(np.float32), config))
        for utt_id, values in samples.items()
    }
    assert expected["long"].shape == (2, 17998, HIDDEN)
    assert_close(read(tmp_path / "out", "pt"), expected)


def test_utt2spk(tmp_path, extract, recordings, trained):
    checkpoint, _ = trained["speaker"]
    speakers = dict(zip(SPEECH, ["anna", "ben", "anna", "ben"]))
    table = tmp_path / "utt2spk"
    table.write_text("".join(f"{utt} {who}\n" for utt, who in speakers.items()))
    option = ["--utt2spk", table]
    uncut = prepare(recordings, tmp_path / "uncut", "--cmvn", "speaker", *option)
    done(extract(checkpoint, uncut, tmp_path / "folder"))
    stderr = done(extract(checkpoint, recordings, tmp_path / "audio", "--audio", *option))
    assert not warnings_of(stderr)
    got = read(tmp_path / "audio", "pt")
    assert_close(got, read(tmp_path / "folder", "pt"))
    done(extract(checkpoint, recordings, tmp_path / "without", "--audio"))
    other = read(tmp_path / "without", "pt")
    assert not any(torch.allclose(got[utt_id], other[utt_id], atol=1e-3) for utt_id in got)


@pytest.mark.parametrize(
    "content, words",
    [
        ("84-121-0000 a\n84-121-0001 a\n84-121-0002 a\n", ("1272-5-0000", "utt2spk")),
        ("84-121-0000\n", ("bad-table:1",)),
        ("84-121-0000 a\n84-121-0001 a b\n", ("bad-table:2",)),
        (None, ("bad-table",)),
    ],
    ids=str,
)
def test_bad_utt2spk(tmp_path, extract, recordings, trained, content, words):
    table, out = tmp_path / "bad-table", tmp_path / "out"
    if content is not None:
        table.write_text(content)
    option = ["--audio", "--utt2spk", table]
    message = refused(extract(trained["speaker"][0], recordings, out, *option))
    assert all(word in message for word in words), message
    assert not out.exists()


def another_rate(path):
    write_sound(path, sound(0.5, rate=8000), 8000)


def two_channels(path):
    write_sound(path, np.stack([sound(0.5), sound(0.5, 1)], axis=1))


def truncated(path):
    whole = write_sound(path, sound(0.5)).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def text(path):
    path.write_text("no sound at all\n" * 100)


def too_short(path):
    write_sound(path, sound(0.5)[:399])


def empty(path):
    path.write_bytes(b"")


@pytest.mark.parametrize("ending", ["wav", "flac"])
@pytest.mark.parametrize(
    "spoil",
    [another_rate, two_channels, truncated, text, too_short, empty],
    ids=lambda f: f.__name__,
)
def test_bad_audio_is_refused_before_anything_is_written(
    tmp_path, extract, recordings, trained, spoil, ending
):
    root, out = tmp_path / "audio", tmp_path / "out"
    shutil.copytree(recordings, root)
    bad = root / f"zz-last.{ending}"  # when it comes, all others could have been written
    spoil(bad)
    for source in (root, bad):
        message = refused(extract(trained["speaker"][0], source, out, "--audio"))
        assert str(bad) in message
        assert not out.exists()


def test_bad_folders_of_audio(tmp_path, extract, recordings, trained):
    out = tmp_path / "out"
    (tmp_path / "void").mkdir()
    shutil.copytree(recordings, tmp_path / "twice")
    shutil.copy(recordings / "84" / "84-121-0000.flac", tmp_path / "twice" / "1272")
    (tmp_path / "notes.txt").write_text("no audio")
    for name in ("void", "twice", "notes.txt", "nowhere"):
        message = refused(extract(trained["speaker"][0], tmp_path / name, out, "--audio"))
        assert name in message
        assert not out.exists()


def test_audio_of_another_width_than_the_model(tmp_path, extract, recordings):
    """Of unknown making, and with frames that the original's settings do not give."""
    write_model(tmp_path / "model" / "foo.model", mel=40)
    argv = [tmp_path / "model" / "foo.model", recordings, tmp_path / "out", "--audio"]
    message = refused(extract(*argv))
    assert re.search(r"\b80\b", message) and re.search(r"\b40\b", message)
    assert not (tmp_path / "out").exists()


def test_no_source_by_an_empty_name(tmp_path, extract, model):
    assert "expected" not in refused(extract(model[0], "", tmp_path / "out", "--audio"))


def test_speakers_are_for_audio(tmp_path, extract, model, folder):
    status, stderr = extract(model[0], folder[0], tmp_path / "out", "--utt2spk", "x")
    assert status == 2 and "--utt2spk" in stderr


@pytest.mark.parametrize("sources", [[], ["--data_dir", "a", "--audio", "b"]], ids=str)
def test_one_source_is_needed(extract, model, monkeypatch, capsys, sources):
    argv = ["x", "--checkpoint", str(model[0]), "--save_dir", "out", *sources]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        extract_features.main()
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert "--audio" in stderr and "--data_dir" in stderr


GLOBAL = {"source": "audio", "fbank": {"num_mel_bins": 80}, "cmvn": "global"}


@pytest.mark.parametrize(
    "data",
    [
        [{"source": "audio"}],
        [{"source": "audio", "fbank": None, "cmvn": "speaker"}],
        [{"source": "audio", "fbank": {"num_mel_bins": 80, "colour": "red"}, "cmvn": "none"}],
        [{"source": "audio", "fbank": {"num_mel_bins": 80}, "cmvn": "global"}],
        [GLOBAL | {"cmvn_stats": [[1.0], [1.0]]}],
        [GLOBAL | {"cmvn_stats": [[0.0] * 81] * 2}],
        [{"source": "audio", "fbank": {"frame_shift_ms": 0}, "cmvn": "none"}],
        [{"source": "audio", "fbank": {"frame_length_ms": math.inf}, "cmvn": "none"}],
        [{"source": "audio", "fbank": {"sample_rate": "16000"}, "cmvn": "none"}],
        [{"source": "audio", "fbank": {"window_type": None}, "cmvn": "none"}],
        [{"source": "audio", "fbank": {}, "cmvn": "foo"}],
        [{"source": "kaldi", "fbank": "abc", "cmvn": "none"}],
        [{}],
        ["audio"],
        {"source": "audio"},
    ],
    ids=str,
)
def test_senseless_account_of_the_training_data(tmp_path, extract, recordings, data):
    """In a config.json of another version, or changed by hand: a line, not a traceback."""
    write_model(tmp_path / "model" / "foo.model", data, mel=80)
    argv = [tmp_path / "model" / "foo.model", recordings, tmp_path / "out", "--audio"]
    status, stderr = extract(*argv)
    if status:
        refused((status, stderr))
        assert not (tmp_path / "out").exists()
    else:
        assert warnings_of(stderr)
