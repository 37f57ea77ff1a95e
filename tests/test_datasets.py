"""datasets.py: prepared folders read back without executing anything, and batches drawn fairly."""

import logging
import os
import pickle
import re

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datasets import BatchSampler, LibriSpeech, collate
from utils import UserError

# ------------------------------------------------------------------------------ helpers


def write_folder(path, lengths, width=5, seq_len=12, protocol=3, legacy=False):
    """The original's layout, by hand: {id: frames} -> folder, {file name: (seq_len, width)}."""
    path.mkdir()
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for utt, length in lengths.items():
        tensor = torch.zeros(seq_len, width)
        tensor[:length] = torch.randn(length, width, generator=generator)
        torch.save(tensor, path / f"{utt}.pt", _use_new_zipfile_serialization=not legacy)
        tensors[f"{utt}.pt"] = tensor
    write_lengths(path, {f"{utt}.pt": length for utt, length in lengths.items()}, protocol)
    return tensors


def write_lengths(path, lengths, protocol=3):
    with open(path / "lengths.pkl", "wb") as file:
        pickle.dump(lengths, file, protocol=protocol)


def refusal(path, **kw):
    """The one-line message with which a folder, or an item of it, is refused."""
    with pytest.raises(UserError) as caught:
        dataset = LibriSpeech(path, **kw)
        for index in range(len(dataset)):
            dataset[index]
    message = str(caught.value)
    assert message.strip()
    assert "\n" not in message
    return message


class Call:
    """Pickles as the call function(*args)."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def attacks(marker):
    """{name: object whose unpickling would create the file `marker`}."""
    return {
        "os.system": Call(os.system, f"echo > '{marker}'"),
        "eval": Call(eval, f"open({str(marker)!r}, 'w').close()"),
        "exec": Call(exec, f"open({str(marker)!r}, 'w').close()"),
        "open": Call(open, str(marker), "w"),
        "mkdir": Call(os.mkdir, str(marker)),
    }


# ------------------------------------------------------------------------------ folders


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("protocol", range(6))
def test_reads_what_the_original_wrote(tmp_path, protocol, legacy):
    lengths = {"103-1-0000": 12, "b": 1, "a.c": 7}
    tensors = write_folder(tmp_path / "set", lengths, protocol=protocol, legacy=legacy)
    dataset = LibriSpeech(tmp_path / "set")
    assert len(dataset) == 3
    assert sorted(dataset.ids) == sorted(tensors)
    assert dict(dataset.lengths) == {f"{utt}.pt": length for utt, length in lengths.items()}
    assert (dataset.seq_len, dataset.mel_dim) == (12, 5)
    assert str(dataset.path) == str(tmp_path / "set")
    for index, name in enumerate(dataset.ids):
        tensor, length = dataset[index]
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensors[name])
        assert type(length) is int
        assert length == lengths[name.removesuffix(".pt")]


def test_path_may_be_text(tmp_path):
    write_folder(tmp_path / "set", {"a": 3})
    assert LibriSpeech(str(tmp_path / "set")).ids == ["a.pt"]


def test_unfinished_or_missing_folder(tmp_path):
    write_folder(tmp_path / "set", {"a": 3})
    (tmp_path / "set" / "lengths.pkl").unlink()
    assert str(tmp_path / "set") in refusal(tmp_path / "set")
    assert str(tmp_path / "nowhere") in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", attacks(""))
def test_hostile_lengths_are_refused_and_not_run(tmp_path, name, protocol):
    write_folder(tmp_path / "set", {"a": 3})
    # The attack is real: plain unpickling falls for it.
    control = tmp_path / "control"
    pickle.loads(pickle.dumps(attacks(control)[name], protocol=protocol))
    assert control.exists()

    marker = tmp_path / "marker"
    for hostile in (attacks(marker)[name], {"a.pt": 3, "b.pt": attacks(marker)[name]}):
        write_lengths(tmp_path / "set", hostile, protocol)
        assert "lengths.pkl" in refusal(tmp_path / "set")
        assert not marker.exists()


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["os.system", "eval"])
def test_hostile_tensor_is_refused_and_not_run(tmp_path, name, legacy):
    write_folder(tmp_path / "set", {"a": 3, "b": 4})
    marker = tmp_path / "marker"
    torch.save(
        {"x": torch.zeros(2), "code": attacks(marker)[name]},
        tmp_path / "set" / "b.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    assert "b.pt" in refusal(tmp_path / "set")
    assert not marker.exists()


NO_LENGTHS = {
    "list": [("a.pt", 3)],
    "number": 3,
    "none": None,
    "text-values": {"a.pt": "3"},
    "float-values": {"a.pt": 3.0},
    "none-values": {"a.pt": None},
    "int-keys": {1: 3},
    "nested": {"a.pt": {"length": 3}},
    "numpy": {"a.pt": np.int64(3)},
    "longer-than-stored": {"a.pt": 13},
}


@pytest.mark.parametrize("name", NO_LENGTHS)
def test_lengths_that_are_no_lengths(tmp_path, name):
    write_folder(tmp_path / "set", {"a": 3})
    write_lengths(tmp_path / "set", NO_LENGTHS[name])
    message = refusal(tmp_path / "set")
    assert "lengths.pkl" in message or "a.pt" in message


@pytest.mark.parametrize("content", [b"", b"a.pt 3\n", b"\x80\x04", b"Pid\n.", b"\xff" * 40])
def test_damaged_lengths(tmp_path, content):
    write_folder(tmp_path / "set", {"a": 3})
    (tmp_path / "set" / "lengths.pkl").write_bytes(content)
    assert "lengths.pkl" in refusal(tmp_path / "set")


def test_truncated_lengths(tmp_path):
    write_folder(tmp_path / "set", {f"utt-{i}": 3 for i in range(20)})
    whole = (tmp_path / "set" / "lengths.pkl").read_bytes()
    for keep in (1, len(whole) // 2, len(whole) - 1):
        (tmp_path / "set" / "lengths.pkl").write_bytes(whole[:keep])
        assert "lengths.pkl" in refusal(tmp_path / "set")


def test_listed_tensor_is_missing(tmp_path):
    write_folder(tmp_path / "set", {"a": 3, "b": 4, "c": 5})
    (tmp_path / "set" / "b.pt").unlink()
    assert "b.pt" in refusal(tmp_path / "set")


BAD_TENSORS = {
    "shorter": torch.zeros(11, 5),
    "longer": torch.zeros(13, 5),
    "wider": torch.zeros(12, 6),
    "flat": torch.zeros(60),
    "batch": torch.zeros(1, 12, 5),
    "double": torch.zeros(12, 5, dtype=torch.float64),
    "int": torch.zeros(12, 5, dtype=torch.int64),
    "dict": {"x": torch.zeros(12, 5)},
    "list": [0.0] * 60,
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensor_names_its_file(tmp_path, name):
    write_folder(tmp_path / "set", {"a": 3, "b": 4, "c": 5})
    torch.save(BAD_TENSORS[name], tmp_path / "set" / "c.pt")
    # Which of two shapes is the odd one can only be told by majority; with two, either.
    assert re.search(r"\b[abc]\.pt", refusal(tmp_path / "set"))


@pytest.mark.parametrize("content", [b"", b"no tensor", b"PK\x03\x04 and no more"])
def test_damaged_tensor_names_its_file(tmp_path, content):
    write_folder(tmp_path / "set", {"a": 3, "b": 4})
    (tmp_path / "set" / "b.pt").write_bytes(content)
    assert "b.pt" in refusal(tmp_path / "set")


def test_truncated_tensor_names_its_file(tmp_path):
    for legacy in (False, True):
        folder = tmp_path / str(legacy)
        write_folder(folder, {"a": 3, "b": 4}, legacy=legacy)
        whole = (folder / "b.pt").read_bytes()
        (folder / "b.pt").write_bytes(whole[: len(whole) // 2])
        assert "b.pt" in refusal(folder)


def test_short_utterances_are_left_out_with_one_warning(tmp_path, caplog):
    lengths = {f"short-{i}": i % 3 + 1 for i in range(7)} | {"d": 4, "e": 12}
    write_folder(tmp_path / "set", lengths)
    with caplog.at_level(logging.WARNING):
        dataset = LibriSpeech(tmp_path / "set", time_shift=3)
    assert sorted(dataset.ids) == ["d.pt", "e.pt"]
    assert len(dataset) == 2
    assert sorted(length for _, length in (dataset[0], dataset[1])) == [4, 12]
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    message = warnings[0].getMessage().replace(str(tmp_path), "")
    assert re.search(r"\b7\b", message), message


def test_no_warning_where_none_is_left_out(tmp_path, caplog):
    write_folder(tmp_path / "set", {"a": 4, "b": 12})
    with caplog.at_level(logging.WARNING):
        assert len(LibriSpeech(tmp_path / "set", time_shift=3)) == 2
        assert len(LibriSpeech(tmp_path / "set")) == 2
    assert not caplog.records


def test_all_too_short_is_an_error(tmp_path):
    write_folder(tmp_path / "set", {"a": 4, "b": 2})
    message = refusal(tmp_path / "set", time_shift=4)
    assert str(tmp_path / "set") in message
    assert re.search(r"\b4\b", message.replace(str(tmp_path), "")), message


def test_empty_set_is_an_error(tmp_path):
    write_folder(tmp_path / "set", {})
    assert str(tmp_path / "set") in refusal(tmp_path / "set")


# ------------------------------------------------------------------------------ collate


def test_collate_cuts_to_the_longest_before_it_travels():
    items = [(torch.randn(50, 4), 7), (torch.randn(50, 4), 11), (torch.randn(50, 4), 1)]
    inputs, lengths = collate(items)
    assert torch.equal(inputs, torch.stack([tensor[:11] for tensor, _ in items]))
    assert inputs.dtype == torch.float32
    assert lengths.dtype == torch.int64
    assert lengths.tolist() == [7, 11, 1]
    # A view would carry all 50 frames from the loader's worker.
    assert inputs.untyped_storage().nbytes() == 3 * 11 * 4 * 4


def test_collate_one_full_utterance():
    tensor = torch.randn(6, 4)
    inputs, lengths = collate([(tensor, 6)])
    assert torch.equal(inputs, tensor[None])
    assert lengths.tolist() == [6]


def test_loader_gives_every_utterance_once(tmp_path):
    frames = {f"u{i}": 1 + i % 12 for i in range(23)}
    tensors = write_folder(tmp_path / "set", frames)
    dataset = LibriSpeech(tmp_path / "set")
    lengths = [dataset.lengths[name] for name in dataset.ids]
    sampler = BatchSampler(lengths, batch_size=4, shuffle=True, bucketing=True, seed=1)
    seen = []
    for inputs, batch_lengths in DataLoader(dataset, batch_sampler=sampler, collate_fn=collate):
        assert inputs.shape[1] == batch_lengths.max()
        seen += [x[:n] for x, n in zip(inputs, batch_lengths.tolist(), strict=True)]
    truth = [tensors[f"{utt}.pt"][:n] for utt, n in frames.items()]

    def order(x):
        return x.flatten().tolist()

    assert len(seen) == 23
    for a, b in zip(sorted(seen, key=order), sorted(truth, key=order), strict=True):
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------ batches


def librispeech_like(count, seed=0):
    """Frames of `count` utterances: mostly 12-16 s, a tail of shorter ones, cut at 1600."""
    rng = np.random.default_rng(seed)
    full = rng.normal(1450, 130, count)
    short = rng.uniform(150, 1350, count)
    lengths = np.where(rng.random(count) < 0.65, full, short)
    return np.clip(lengths, 100, 1600).astype(int).tolist()


def padding_share(batches, lengths):
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    return 1 - sum(lengths[i] for batch in batches for i in batch) / padded


KINDS = [(s, b) for s in (True, False) for b in (True, False)]


@pytest.mark.parametrize("shuffle, bucketing", KINDS)
@pytest.mark.parametrize("count, batch_size", [(103, 8), (96, 8), (5, 8), (1, 8), (7, 1)])
def test_every_utterance_exactly_once_an_epoch(count, batch_size, shuffle, bucketing):
    lengths = librispeech_like(count)
    sampler = BatchSampler(lengths, batch_size, shuffle, bucketing, 3)
    for epoch in (0, 1, 5):
        sampler.set_epoch(epoch)
        batches = [list(batch) for batch in sampler]
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert len(batches) == -(-count // batch_size)
        assert sum(len(batch) != batch_size for batch in batches) <= 1


@pytest.mark.parametrize("bucketing", [True, False])
def test_seed_and_epoch_alone_decide(bucketing):
    lengths = librispeech_like(500)

    def draw(seed, epoch):
        sampler = BatchSampler(lengths, 16, True, bucketing, seed)
        sampler.set_epoch(epoch)
        return [list(batch) for batch in sampler]

    torch.manual_seed(1)
    np.random.seed(1)
    first = draw(7, 2)
    torch.manual_seed(2)
    np.random.seed(2)
    before = torch.random.get_rng_state()
    assert draw(7, 2) == first
    assert torch.equal(torch.random.get_rng_state(), before), "drew from the global generator"
    assert draw(7, 3) != first
    assert draw(8, 2) != first
    assert draw(8, 2) != draw(7, 3)


@pytest.mark.parametrize("shuffle, bucketing", KINDS)
def test_iterating_twice_repeats_the_epoch(shuffle, bucketing):
    sampler = BatchSampler(librispeech_like(50), 8, shuffle, bucketing, 0)
    sampler.set_epoch(4)
    assert list(sampler) == list(sampler)


@pytest.mark.parametrize("shuffle, bucketing", KINDS)
@pytest.mark.parametrize("rank, world_size", [(0, 1), (1, 2)])
def test_start_batch_gives_the_tail_of_the_epoch(shuffle, bucketing, rank, world_size):
    sampler = BatchSampler(librispeech_like(203), 8, shuffle, bucketing, 3, rank, world_size)
    sampler.set_epoch(6)
    whole = list(sampler)
    for start in (0, 1, 13, len(whole) - 1, len(whole)):
        sampler.set_epoch(6, start_batch=start)
        assert list(sampler) == whole[start:]
    sampler.set_epoch(6)
    assert list(sampler) == whole


def test_bucketing_leaves_little_padding_and_still_shuffles():
    lengths = librispeech_like(20000)
    bucketed = BatchSampler(lengths, 32, True, True, 0)
    plain = BatchSampler(lengths, 32, True, False, 0)
    epochs = []
    for epoch in (0, 1):
        bucketed.set_epoch(epoch)
        plain.set_epoch(epoch)
        epochs.append([list(batch) for batch in bucketed])
        assert padding_share(epochs[-1], lengths) <= 0.03
        assert padding_share(list(plain), lengths) > 0.15
    assert epochs[0] != epochs[1]
    # Neither short to long nor long to short: neighbouring batches are of unrelated lengths.
    means = np.array([np.mean([lengths[i] for i in batch]) for batch in epochs[0]])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.3


def test_without_bucketing_it_is_a_plain_permutation_in_batches():
    lengths = librispeech_like(101)
    sampler = BatchSampler(lengths, 8, True, False, 5)
    batches = [list(batch) for batch in sampler]
    assert [len(batch) for batch in batches] == [8] * 12 + [5]
    flat = [i for batch in batches for i in batch]
    assert sorted(flat) == list(range(101))
    assert flat != list(range(101))
    # The lengths have no part in it.
    other = BatchSampler([9] * 101, 8, True, False, 5)
    assert [list(batch) for batch in other] == batches


def test_without_shuffling_or_bucketing_the_order_stays():
    sampler = BatchSampler(librispeech_like(11), 4, False, False, 5)
    for epoch in (0, 3):
        sampler.set_epoch(epoch)
        assert [list(b) for b in sampler] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


def test_without_shuffling_bucketed_epochs_are_alike():
    sampler = BatchSampler(librispeech_like(200), 8, False, True, 5)
    sampler.set_epoch(0)
    first = list(sampler)
    sampler.set_epoch(1)
    assert list(sampler) == first


@pytest.mark.parametrize("shuffle, bucketing", KINDS)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_each_batch_out(shuffle, bucketing, world_size):
    # The last batch holds one utterance: some ranks have none of it, yet all take the step.
    lengths = librispeech_like(12 * 9 + 1)
    alone = BatchSampler(lengths, 12, shuffle, bucketing, 2)
    ranks = [
        BatchSampler(lengths, 12, shuffle, bucketing, 2, r, world_size) for r in range(world_size)
    ]
    for epoch in (0, 1):
        for sampler in (alone, *ranks):
            sampler.set_epoch(epoch)
        whole = [list(batch) for batch in alone]
        parts = [[list(batch) for batch in sampler] for sampler in ranks]
        assert {len(part) for part in parts} == {len(whole)}
        for position, batch in enumerate(whole):
            shares = [part[position] for part in parts]
            assert sorted(i for share in shares for i in share) == sorted(batch)
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
