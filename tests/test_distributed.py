"""train.py in several processes: losses as of one process, signals, kills, exact resumption."""

import os
import signal

import pytest
import torch
from conftest import (
    EPOCHS,
    FULL,
    PLAIN,
    STEPS,
    assert_close_losses,
    last,
    metrics,
    models,
    same,
    until_step,
)
from processes import ROOT, error_line


def all_succeeded(processes):
    for process in processes:
        assert process.returncode == 0, process.stderr


def assert_follows(path, reference):
    """The losses of one process, each step and epoch once, and one set of files."""
    assert_close_losses(path, reference)
    steps, epochs = metrics(path)
    assert [entry["step"] for entry in steps] == list(range(STEPS))
    assert [entry["epoch"] for entry in epochs] == list(range(1, EPOCHS + 1))
    names = [{file.name.replace(p.stem, "") for file in p.iterdir()} for p in (path, reference)]
    assert names[0] == names[1]


def test_torchrun_follows_one_process(server, place, one):
    """The real torchrun, whose processes start workers of their own."""
    flags, path = place("two-padded")
    launch = ["--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    flags += ["--load_data_workers", 1]
    process = server.start("torchrun", *launch, *PLAIN, *flags).wait(120)
    all_succeeded([process])
    assert process.stderr.count("INFO - Epoch: 1 ") == 1, process.stderr
    assert_follows(path, one["padded"])
    assert len(list(path.glob("*.tb_log/*"))) == 1
    ours, theirs = models(path), models(one["padded"])
    for name, model in ours.items():
        assert model.keys() == theirs[name].keys()
        assert all(torch.allclose(model[key], theirs[name][key], atol=1e-4) for key in model)


def test_masked_padding_and_accumulated_steps_follow_one_process(server, place, one):
    flags, path = place("two-masked")
    flags += ["--mask_padding", "--accumulate_steps", 4]
    all_succeeded(server.run_ranks("train.py", *PLAIN, *flags))
    assert_follows(path, one["masked"])


def test_any_number_of_processes_goes_on(server, place, one):
    """One; then three and two, of which the last gets a signal; and one to the end.

    As torchrun does when a process has ended, SIGTERM is sent to the others: the first one saves
    all the same, although the disk is slow.
    """
    flags, path = place("any-number")
    flags = [*PLAIN, *flags, "--resume"]
    all_succeeded([server.run("train.py", *flags, "--max_steps", 4)])
    for world_size, step in ((3, 7), (2, 12)):
        ranks = server.start_ranks("train.py", *flags, world_size=world_size, slow_disk=0.15)
        until_step(step, ranks[0], path)
        os.kill(ranks[-1].pid, signal.SIGUSR1)
        ranks[-1].wait()
        for process in ranks[:-1]:
            os.kill(process.pid, signal.SIGTERM)
        for process in ranks:
            assert process.wait().returncode == 128 + signal.SIGUSR1, process.stderr
            assert "Traceback" not in process.stderr
        assert last(path)["state"]["step"] == len(metrics(path)[0]) < STEPS
    all_succeeded([server.run("train.py", *flags)])
    assert_follows(path, one["padded"])


def test_two_processes_resume_exactly(server, place):
    """With dropout, for which each process draws numbers of its own."""
    paths = []
    for name, limits in (("two-whole", [12]), ("two-stopped", [8, 12])):
        flags, path = place(name)
        paths.append(path)
        for limit in limits:
            flags += ["--load_data_workers", 0, "--resume", "--max_steps", limit]
            all_succeeded(server.run_ranks("train.py", *FULL, *flags))
    stopped, whole = (models(path) for path in paths)
    assert stopped.keys() == whole.keys() == {"epoch_0", "epoch_1", "epoch_2"}
    assert all(same(stopped[name], whole[name]) for name in whole)
    assert metrics(paths[0])[0] == metrics(paths[1])[0]


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_process_ends_the_others(server, place, victim):
    """Also where there is no torchrun to end them."""
    flags, path = place(f"killed-{victim}")
    processes = server.start_ranks("train.py", *PLAIN, *flags)
    until_step(2, processes[0], path)
    os.kill(processes[victim].pid, signal.SIGKILL)
    error_line(processes[1 - victim].wait(), "train.py")
    assert last(path)["state"]["step"] == 0


def test_one_of_several_processes_without_the_others(server, place):
    flags, path = place("alone")
    process = server.run("train.py", *PLAIN, *flags, env={"WORLD_SIZE": 2})
    line = error_line(process, "train.py")
    assert "WORLD_SIZE" in line and "torchrun" in line
    assert not path.exists()
