"""datasets.py: prepared folders read back without executing anything, and batches drawn fairly."""

import logging
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import Hostile, hostile_files, make_folder

from datasets import (
    BatchSampler,
    LibriSpeech,
    Utterances,
    build_loader,
    collate,
    read_batches,
    warn_of_other_data,
)
from utils import UserError, write_json


def write_lengths(path, lengths, protocol=4):
    (path / "lengths.pkl").write_bytes(pickle.dumps(lengths, protocol))


def rejection(path, **kw):
    """The one-line message with which a folder, or an item of it, is rejected."""
    with pytest.raises(UserError) as caught:
        dataset = LibriSpeech(path, **kw)
        for index in range(len(dataset)):
            dataset[index]
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message.replace(str(path), "")


# A folder -----------------------------------------------------------------------------------------


def test_reads_what_the_original_wrote(tmp_path):
    """With any protocol of pickle, and PyTorch's format of 2019 too."""
    path = tmp_path / "set"
    tensors, lengths = make_folder(path, [12, 1, 7], 5, prefix="a.c")
    for protocol, zipped in ((0, False), (2, True), (4, True)):
        write_lengths(path, lengths, protocol)
        for name, frames in tensors.items():
            torch.save(frames, path / name, _use_new_zipfile_serialization=zipped)
        dataset = LibriSpeech(str(path))
        assert dataset.lengths == lengths and dataset.ids == list(tensors)
        assert (len(dataset), dataset.seq_len, dataset.mel_dim) == (3, 12, 5)
        assert dataset.prepared is None
        for name, (frames, length) in zip(dataset.ids, dataset):
            assert torch.equal(frames, tensors[name]) and frames.dtype == torch.float32
            assert type(length) is int and length == lengths[name]


def test_hostile_files_are_rejected_and_not_run(tmp_path):
    path = tmp_path / "set"
    make_folder(path, [3, 4])
    files, marker = hostile_files(tmp_path)
    pickle.loads(files["pickle"].read_bytes())
    assert marker.exists(), "the attack is real"
    marker.unlink()
    for kind in ("zip", "legacy"):
        shutil.copy(files[kind], path / "utt-001.pt")
        assert "utt-001.pt" in rejection(path)
    for protocol in (0, 2, 4):
        for content in (Hostile(marker), {"utt-000.pt": 3, "utt-001.pt": Hostile(marker)}):
            write_lengths(path, content, protocol)
            assert "lengths.pkl" in rejection(path)
    assert not marker.exists()


def test_lengths_that_are_no_lengths(tmp_path):
    """Other values, and files damaged, cut short or not there."""
    path = tmp_path / "set"
    make_folder(path, [12, 12])
    whole = (path / "lengths.pkl").read_bytes()
    values = [[("a.pt", 3)], None, {"a.pt": "3"}, {"a.pt": 3.0}, {"a.pt": np.int64(3)}, {1: 3}]
    values += [{"a.pt": -1}, {"a.pt": True}, {"a": 3}, {"../set/utt-001.pt": 3}]
    contents = [pickle.dumps(value) for value in values]
    contents += [b"", b"a.pt 3\n", b"Pid\n.", b"\xff" * 40, whole[: len(whole) // 2], whole[:-1]]
    for content in contents:
        (path / "lengths.pkl").write_bytes(content)
        assert "lengths.pkl" in rejection(path), content
    write_lengths(path, {"utt-001.pt": 13})  # more than is stored
    assert "utt-001.pt" in rejection(path)
    write_lengths(path, {})
    rejection(path)
    (path / "lengths.pkl").unlink()
    assert "lengths.pkl" in rejection(path)
    assert "prepare_data.py" in rejection(tmp_path / "nowhere")


def test_tensors_that_do_not_belong_to_the_dataset(tmp_path):
    path = tmp_path / "set"
    make_folder(path, [12, 4, 5], 5)
    file = path / "utt-002.pt"
    whole = file.read_bytes()
    values = [torch.zeros(shape) for shape in ((11, 5), (13, 5), (12, 6), (60,), (1, 12, 5))]
    values += [torch.zeros(12, 5, dtype=torch.float64), torch.zeros(12, 5).to_sparse()]
    values += [[0.0] * 60]
    for value in values:
        torch.save(value, file)
        assert file.name in rejection(path), value
    for content in (b"", b"no tensor", b"PK\x03\x04 and no more", whole[: len(whole) // 2]):
        file.write_bytes(content)
        assert file.name in rejection(path), content
    file.unlink()
    assert file.name in rejection(path)


def test_short_utterances_are_skipped_with_one_warning(tmp_path, caplog):
    path = tmp_path / "set"
    make_folder(path, [1, 4, 2, 3, 12, 1, 2, 3, 1])
    with caplog.at_level(logging.WARNING):
        dataset = LibriSpeech(path, time_shift=3)
        assert dataset.ids == ["utt-001.pt", "utt-004.pt"]
        assert [length for _, length in dataset] == [4, 12]
        assert len(LibriSpeech(path)) == 9
    (warning,) = caplog.messages
    assert re.search(r"\b7\b", warning.replace(str(path), ""))
    assert re.search(r"\b12\b", rejection(path, time_shift=12)), "none is left"


AUDIO = {"source": "audio", "path": "a", "fbank": {"dither": 0.0}, "cmvn": "speaker"}
KALDI = AUDIO | {"source": "kaldi", "fbank": None, "cmvn": "none"}


@pytest.mark.parametrize(
    "trained, prepared, differences",
    [
        (AUDIO, AUDIO | {"cmvn": "utterance"}, {"cmvn"}),
        (AUDIO, AUDIO | {"fbank": {"dither": 1.0}}, {"fbank"}),
        (AUDIO, KALDI, {"source", "cmvn"}),
        (AUDIO, AUDIO | {"norm_vars": True}, set()),  # what it meant before there was the entry
        (AUDIO | {"norm_vars": False}, AUDIO, {"cmvn"}),
        (AUDIO, AUDIO | {"norm_vars": True, "unbiased_vars": True}, {"cmvn"}),
        (AUDIO, AUDIO | {"path": "b", "version": "0.9.9", "max_seq_len": 99}, set()),
        (AUDIO, None, set()),
        (None, AUDIO, set()),
    ],
)
def test_warning_of_data_made_in_another_way(tmp_path, caplog, trained, prepared, differences):
    make_folder(tmp_path / "set", [3])
    if prepared is not None:
        write_json(prepared, tmp_path / "set" / "prepared.json")
    dataset = LibriSpeech(tmp_path / "set")
    assert dataset.prepared == prepared
    warn_of_other_data(trained, dataset)
    found = [re.match(rf"{tmp_path}/set: (\w+) is ", line)[1] for line in caplog.messages]
    assert sorted(found) == sorted(differences)


# Batches read -------------------------------------------------------------------------------------


@pytest.fixture
def two_folders(tmp_path):
    """Two folders as one dataset, and {utterance id: its valid frames}."""
    truth, parts = {}, []
    for name, count in (("first", 15), ("second", 8)):
        lengths = [1 + 5 * i % 12 for i in range(count)]
        tensors, table = make_folder(tmp_path / name, lengths, 5, 12, prefix=name)
        truth |= {file.removesuffix(".pt"): tensors[file][:n] for file, n in table.items()}
        parts.append(LibriSpeech(tmp_path / name))
    return Utterances(parts), truth


def test_collate_cuts_to_the_longest_before_it_travels():
    items = [(torch.randn(50, 4), length, name) for name, length in (("b", 7), ("a", 11), ("c", 1))]
    inputs, lengths, ids = collate(items)
    assert torch.equal(inputs, torch.stack([frames[:11] for frames, _, _ in items]))
    assert inputs.dtype == torch.float32 and lengths.dtype == torch.int64
    assert lengths.tolist() == [7, 11, 1] and ids == ["b", "a", "c"]
    # A view would carry all 50 frames from the loader's worker.
    assert inputs.untyped_storage().nbytes() == 3 * 11 * 4 * 4
    inputs, lengths, ids = collate([])  # a process' share may be empty
    assert inputs.dim() == 3 and lengths.dtype == torch.int64
    assert len(inputs) == len(lengths) == len(ids) == 0


def open_loader(dataset, num_workers, batch_size=4):
    sampler = BatchSampler(dataset.num_frames, batch_size, seed=1)
    return build_loader(dataset, sampler, num_workers, torch.device("cpu"))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loader_gives_every_utterance_of_every_folder_once(two_folders, num_workers):
    dataset, truth = two_folders
    assert len(dataset) == len(dataset.ids) == len(truth) == 23
    assert dataset.num_frames.tolist() == [len(truth[utt_id]) for utt_id in dataset.ids]
    before, seen = torch.get_rng_state(), {}
    for inputs, lengths, ids in read_batches(open_loader(dataset, num_workers)):
        assert inputs.shape == (len(ids), lengths.max(), 5)
        seen |= {utt: x[:n] for utt, x, n in zip(ids, inputs, lengths.tolist())}
    assert seen.keys() == truth.keys()
    assert all(torch.equal(seen[utt_id], frames) for utt_id, frames in truth.items())
    assert torch.equal(torch.get_rng_state(), before), "drew from the numbers of dropout"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_error_while_loading_is_one_line_that_names_the_file(two_folders, num_workers):
    dataset, _ = two_folders
    path = os.path.join(dataset.datasets[1].path, "second-002.pt")

    def message():
        try:
            list(read_batches(open_loader(dataset, num_workers)))
        except UserError as error:
            return str(error)

    os.truncate(path, os.path.getsize(path) // 2)
    assert message() == f"{path}: not a file of plain tensors: is it damaged?"
    os.remove(path)
    line = message()
    assert "loading data failed" in line and path in line and "\n" not in line


class Buggy(torch.utils.data.Dataset):
    num_frames, ids = np.array([1]), ["a"]

    def __len__(self):
        return 1

    def __getitem__(self, index):
        raise RuntimeError("shapes do not match")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bug_while_loading_is_a_traceback(num_workers):
    with pytest.raises(RuntimeError, match=r"in __getitem__|^shapes do not match"):
        list(read_batches(open_loader(Buggy(), num_workers)))


def test_workers_ignore_signals_to_the_process_group_but_a_killed_one_is_noticed(two_folders):
    dataset, _ = two_folders
    before = {*multiprocessing.active_children()}
    batches = read_batches(open_loader(dataset, num_workers=1, batch_size=1))
    next(batches)
    (worker,) = {*multiprocessing.active_children()} - before
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(worker.pid, number)
    next(batches)
    next(batches)
    worker.kill()
    # PyTorch raises where it waits for a batch, or wherever the main process happens to be.
    with pytest.raises((UserError, RuntimeError), match="DataLoader worker"):
        time.sleep(1)
        list(batches)


def test_more_workers_than_cores_are_no_warning(two_folders, recwarn, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    open_loader(two_folders[0], num_workers=8)
    assert not recwarn.list


# The order of batches -----------------------------------------------------------------------------


def librispeech_like(count, seed=0):
    """Frames of `count` utterances: mostly 12-16 s, a tail of shorter ones, cut at 1600."""
    rng = np.random.default_rng(seed)
    full, short = rng.normal(1450, 130, count), rng.uniform(150, 1350, count)
    return np.where(rng.random(count) < 0.65, full, short).clip(100, 1600).astype(int)


def padding_share(batches, lengths):
    padded = sum(len(batch) * lengths[batch].max() for batch in batches)
    return 1 - lengths.sum() / padded


every_order = pytest.mark.parametrize(
    "shuffle, bucketing", [(True, True), (True, False), (False, True), (False, False)]
)


@every_order
def test_only_seed_and_epoch_decide(shuffle, bucketing):
    lengths = librispeech_like(500)

    def draw(seed, epoch):
        sampler = BatchSampler(lengths, 16, shuffle, bucketing, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    first = draw(7, 2)
    assert draw(7, 2) == first
    for other in (draw(7, 3), draw(8, 2)):
        assert (other != first) == shuffle


@every_order
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_utterance_exactly_once_an_epoch(shuffle, bucketing, world_size):
    """Processes divide each batch evenly, and an epoch may begin at any batch. The last batch
    may hold a single utterance, of which most processes have none, yet all take the step."""
    for count, batch_size in ((109, 12), (96, 8), (5, 8), (7, 1)):
        order = librispeech_like(count), batch_size, shuffle, bucketing, 3
        ranks = [BatchSampler(*order, rank, world_size) for rank in range(world_size)]
        alone = BatchSampler(*order)
        for epoch in (0, 6):
            alone.set_epoch(epoch)
            whole = list(alone)
            assert sorted(i for batch in whole for i in batch) == list(range(count))
            assert sum(len(batch) != batch_size for batch in whole) <= 1
            for start in {0, 1, len(whole) // 2, len(whole)}:
                for sampler in ranks:
                    sampler.set_epoch(epoch, start_batch=start)
                    assert len(sampler) == len(whole) == -(-count // batch_size)
                for batch, *parts in zip(whole[start:], *ranks, strict=True):
                    assert sorted(i for part in parts for i in part) == sorted(batch)
                    assert max(map(len, parts)) - min(map(len, parts)) <= 1
                assert list(ranks[-1].whole_batches()) == whole[start:]


def test_bucketing_leaves_little_padding_and_still_shuffles():
    lengths = librispeech_like(20000)
    bucketed, plain = (BatchSampler(lengths, 32, True, way, 0) for way in (True, False))
    epochs = []
    for epoch in (0, 1):
        bucketed.set_epoch(epoch)
        plain.set_epoch(epoch)
        epochs.append(list(bucketed))
        assert padding_share(epochs[-1], lengths) <= 0.03
        assert padding_share(list(plain), lengths) > 0.15
    assert {tuple(sorted(b)) for b in epochs[0]}.isdisjoint(tuple(sorted(b)) for b in epochs[1])
    # Neither short to long nor long to short: neighbouring batches are of unrelated lengths.
    means = np.array([lengths[batch].mean() for batch in epochs[0]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3
