"""train.py in several processes: losses as of one process, signals, kills, exact resumption."""

import json
import os
import signal
import socket

import pytest
import torch
import torch.distributed.run
from conftest import (
    EPOCHS,
    FULL,
    PLAIN,
    ROOT,
    STEPS,
    assert_close_losses,
    call,
    error_line,
    finished,
    last,
    metrics,
    models,
    same,
    succeeded,
    until_step,
)

import train


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def start_ranks(start):
    """start_ranks(world_size, script, *args) -> its processes, as torchrun would start them."""

    def start_ranks(world_size, *args, **kw):
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        env["WORLD_SIZE"] = str(world_size)
        ranks = map(str, range(world_size))
        return [start(*args, env=env | {"RANK": r, "LOCAL_RANK": r}, **kw) for r in ranks]

    return start_ranks


def assert_follows(path, reference):
    """The losses of one process, each step and epoch once, and one set of files."""
    assert_close_losses(path, reference)
    steps, epochs = metrics(path)
    assert [entry["step"] for entry in steps] == list(range(STEPS))
    assert [entry["epoch"] for entry in epochs] == list(range(1, EPOCHS + 1))
    names = [{file.name.replace(p.stem, "") for file in p.iterdir()} for p in (path, reference)]
    assert names[0] == names[1]


def test_torchrun_follows_one_process(start, place, one):
    """The last batch has one utterance: the second process has none of it."""
    flags, path = place("two-padded")
    launch = ["--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    process = finished(start(torch.distributed.run.__file__, *launch, *PLAIN, *flags))
    assert succeeded(process).stderr.count("INFO - Epoch: 1 ") == 1, process.stderr
    assert_follows(path, one["padded"])
    assert len(list(path.glob("*.tb_log/*"))) == 1
    ours, theirs = models(path), models(one["padded"])
    for name, model in ours.items():
        assert model.keys() == theirs[name].keys()
        assert all(torch.allclose(model[key], theirs[name][key], atol=1e-4) for key in model)


def test_signal_to_one_rank_stops_all_and_one_process_resumes(start_ranks, place, one):
    """With masked padding and accumulated gradients."""
    where, path = place("two-masked")
    flags = [*PLAIN, *where, "--mask_padding", "--accumulate_steps", 2]
    slow = "from apc_model import APCModel\nforward = APCModel.forward\n"
    slow += "APCModel.forward = lambda *a, **k: (time.sleep(0.1), forward(*a, **k))[1]"
    ranks = start_ranks(2, "train.py", *flags, patch=slow)
    until_step(2, path, *ranks)
    os.kill(ranks[-1].pid, signal.SIGUSR1)
    for process in map(finished, ranks):
        assert process.returncode == 128 + signal.SIGUSR1, process.stderr
        assert "Traceback" not in process.stderr
    assert 2 < last(path)["progress"]["step"] == len(metrics(path)[0]) < STEPS
    succeeded(call(train, *flags, "--resume"))
    assert_follows(path, one["masked"])


RUNS = """
import json, os, sys
import torch.distributed
import train

for port, argv in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    train.main(argv)
    torch.distributed.destroy_process_group()
"""


def test_two_processes_resume_exactly(start_ranks, place, tmp_path):
    """With dropout, for which each process draws numbers of its own."""
    (tmp_path / "runs.py").write_text(RUNS)
    paths, runs = [], []
    for name, limits in (("two-whole", [9]), ("two-stopped", [4, 9])):
        where, path = place(name)
        paths.append(path)
        for limit in limits:
            flags = [*where, "--load_data_workers", 0, "--resume", "--max_steps", limit]
            runs.append((free_port(), [str(flag) for flag in (*FULL, *flags)]))
    for process in start_ranks(2, tmp_path / "runs.py", json.dumps(runs)):
        succeeded(finished(process))
    whole, stopped = map(models, paths)
    assert stopped.keys() == whole.keys() == {"epoch_0", "epoch_1"}
    assert all(same(stopped[name], whole[name]) for name in whole)
    assert same(last(paths[0])["model"], last(paths[1])["model"])
    assert metrics(paths[0])[0] == metrics(paths[1])[0]


def test_one_of_several_processes_without_the_others(call_main, monkeypatch, place):
    flags, path = place("without")
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = error_line(call_main(train, *PLAIN, *flags), "train.py")
    assert "WORLD_SIZE" in line and "torchrun" in line
    assert not path.exists()
