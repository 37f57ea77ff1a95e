"""A prepared dataset read back: utterances, batches, and the order in which they come."""

import logging
import os
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import data

from formats.fbank import CMVN
from utils import UserError, ignore_signals, is_float_tensor, load, read_json

TIMEOUT = 300  # seconds that a batch may take to load


class LibriSpeech(data.Dataset):
    """The utterances of a folder that prepare_data.py (or the original release) wrote.

    The folder holds `<utt_id>.pt`, float32 (seq_len, D), zero-padded at the end, and lengths.pkl, a
    dict {'<utt_id>.pt': frames}. Nothing in these files is ever executed.

    Args:
        path: the folder.
        time_shift: n; utterances of n frames or fewer have no prediction target and are skipped.

    Items: (tensor float32 (seq_len, D), length).

    Attributes:
        ids: file names, in the order of the items.    lengths: dict file name -> frames.
        seq_len: frames of every stored tensor.        mel_dim: D.
        prepared: how the folder was made (prepared.json), or None if that is not known.

    Raises:
        UserError: the folder is unfinished or damaged, or no utterance in it is long enough.
    """

    def __init__(self, path: str | os.PathLike, time_shift: int = 0):
        self.path = path
        self.lengths = read_lengths(path)
        missing = sorted(self.lengths.keys() - set(os.listdir(path)))
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of the {len(self.lengths)} files that lengths.pkl lists "
                f"are missing, the first is {missing[0]}: prepare the folder again"
            )
        self.ids = [name for name, length in self.lengths.items() if length > time_shift]
        skipped = len(self.lengths) - len(self.ids)
        if not self.ids:
            raise UserError(
                f"{path}: none of the {len(self.lengths)} utterances is longer than the time "
                f"shift of {time_shift} frames"
            )
        if skipped:
            logging.warning(
                "%s: %d of %d utterances are skipped: at most %d frames long (the time shift)",
                path,
                skipped,
                len(self.lengths),
                time_shift,
            )
        # The original release wrote no prepared.json.
        self.prepared = read_json(os.path.join(path, "prepared.json"))
        # Every tensor of a folder has the shape of the first one.
        self.seq_len, self.mel_dim = self._read(self.ids[0]).shape

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        name = self.ids[index]
        frames, length = self._read(name), self.lengths[name]
        if frames.shape != (self.seq_len, self.mel_dim) or length > self.seq_len:
            raise UserError(
                f"{os.path.join(self.path, name)}: expected a tensor of shape "
                f"{(self.seq_len, self.mel_dim)}, like the dataset's others, found "
                f"{tuple(frames.shape)} for {length} frames"
            )
        return frames, length

    def read_chunks(self, index: int) -> Iterator[Tensor]:
        """Yield an utterance's frames, some of them (t, D) at a time."""
        frames, length = self[index]
        yield from frames[:length].split(4096)

    def _read(self, name):
        path = os.path.join(self.path, name)
        frames = load(path)
        if not (is_float_tensor(frames) and frames.dtype == torch.float32 and frames.dim() == 2):
            raise UserError(f"{path}: expected a float32 tensor (frames, mel_dim)")
        return frames


class Utterances(data.ConcatDataset):
    """One or several datasets as one. Items: (frames (seq_len, D), length, utterance id).

    Attributes:
        ids: utterance ids.    num_frames: (N,) int64, the frames of each.    mel_dim: D.
    """

    def __init__(self, parts: list):
        super().__init__(parts)
        names = [(part, name) for part in parts for name in part.ids]
        self.ids = [name.removesuffix(".pt") for _, name in names]
        self.num_frames = np.array([part.lengths[name] for part, name in names])
        self.mel_dim = parts[0].mel_dim

    def __getitem__(self, index: int) -> tuple[Tensor, int, str]:
        return *super().__getitem__(index), self.ids[index]


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; rejects whatever would name a function or class."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def is_finished(path: str | os.PathLike) -> bool:
    """Whether a folder is a prepared dataset: lengths.pkl is written last."""
    return os.path.exists(os.path.join(path, "lengths.pkl"))


def read_lengths(path: str | os.PathLike) -> dict[str, int]:
    """lengths.pkl of the folder `path` -> dict {'<utt_id>.pt': frames}.

    Raises:
        UserError: there is none, or it holds anything else.
    """
    file_name = os.path.join(path, "lengths.pkl")
    if not os.path.isdir(path):
        raise UserError(f"{path}: no such folder: make it with prepare_data.py")
    if not is_finished(path):
        raise UserError(f"{path}: no lengths.pkl: prepare_data.py has not finished this folder")
    with open(file_name, "rb") as file:
        try:
            lengths = _PlainUnpickler(file).load()
        except Exception as error:  # a damaged pickle raises almost anything
            why = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"{file_name}: not a plain dict of file names and frames ({why}): prepare the "
                "folder again"
            ) from None
    if not isinstance(lengths, dict):
        raise UserError(f"{file_name}: expected a dict of file names and frames")
    for name, length in lengths.items():
        is_file_name = isinstance(name, str) and os.path.basename(name) == name
        if not (is_file_name and name.endswith(".pt") and type(length) is int and length >= 0):
            raise UserError(
                f"{file_name}: expected '<utt_id>.pt': frames, found {name!r}: {length!r}"
            )
    return lengths


def compared_settings(dataset: LibriSpeech) -> dict:
    """A dataset's prepared.json, of which nothing differs if the data have only moved."""
    return (dataset.prepared or {}) | dict.fromkeys(("path", "utt2spk", "version"))


def warn_of_other_data(trained: dict | None, dataset: LibriSpeech) -> None:
    """Log a warning if a dataset was made in another way than what a model was trained on.

    `trained` is the training data's prepared.json, or None if that is not known.
    """
    if trained is None or dataset.prepared is None:
        return
    here, there = ({**p, "cmvn": CMVN.from_prepared(p)} for p in (dataset.prepared, trained))
    for key in ("source", "fbank", "cmvn"):
        ours, theirs = here.get(key), there.get(key)
        if isinstance(ours, dict) and isinstance(theirs, dict):  # the fbank options that differ
            ours = {option: x for option, x in ours.items() if theirs.get(option) != x}
            theirs = {option: theirs.get(option) for option in ours}
        elif key == "fbank":  # not known of Kaldi's features, whose source differs
            continue
        if ours != theirs:
            text = "%s: %s is %s, but the model was trained on data with %s"
            logging.warning(text, dataset.path, key, ours, theirs)


# Batches ------------------------------------------------------------------------------------------


def collate(items: list) -> tuple[Tensor, Tensor, list[str]]:
    """Items of Utterances -> inputs (B, longest, D) float32, lengths (B,) int64, utterance ids.

    The batch is cut to its longest utterance. A process whose share of a batch is empty gets empty
    tensors (B = 0).
    """
    if not items:
        return torch.zeros(0, 0, 0), torch.zeros(0, dtype=torch.int64), []
    frames, lengths, ids = zip(*items)
    frames = [utterance[: max(lengths)] for utterance in frames]
    inputs = torch.nn.utils.rnn.pad_sequence(frames, batch_first=True)
    return inputs, torch.tensor(lengths), [*ids]


class BatchSampler(data.Sampler):
    """Batches of indices, whose order follows only from (seed, epoch): any epoch can be resumed.

    With `bucketing`, a shuffled epoch is cut into windows of 100 batches, each window is sorted by
    length and cut into batches, and the batches are shuffled: a batch's utterances are of similar
    length, yet different ones every epoch (in a corpus of more than one window).

    Args:
        lengths: (N,) frames of each utterance.
        batch_size: utterances of one optimizer step, over all processes.
        rank, world_size: this process takes every world_size-th utterance of a batch.
    """

    WINDOW = 100  # batches

    def __init__(
        self,
        lengths: np.ndarray,
        batch_size: int,
        shuffle: bool = True,
        bucketing: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.bucketing = bucketing
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """The next iteration yields epoch `epoch`, from batch `start_batch` on."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.whole_batches():
            yield batch[self.rank :: self.world_size]

    def whole_batches(self) -> Iterator[list[int]]:
        """The epoch's batches over all processes."""
        random = np.random.default_rng([self.seed, self.epoch])
        order = np.arange(len(self.lengths))
        if self.shuffle:
            random.shuffle(order)
        if self.bucketing:
            # Without shuffling there is one window: the whole set by length.
            window = self.WINDOW * self.batch_size if self.shuffle else max(1, len(order))
            for start in range(0, len(order), window):
                part = order[start : start + window]
                part[:] = part[np.argsort(self.lengths[part], kind="stable")]
        starts = np.arange(0, len(order), self.batch_size)
        if self.bucketing and self.shuffle:
            random.shuffle(starts)
        for start in starts[self.start_batch :]:
            yield order[start : start + self.batch_size].tolist()


def build_loader(
    dataset: Utterances, batch_sampler: Any, num_workers: int, device: torch.device
) -> data.DataLoader:
    """A DataLoader of (inputs, lengths, ids), as collate() gives them; read it with read_batches().

    Its worker processes stay from one epoch to the next.
    """
    warnings.filterwarnings("ignore", "This DataLoader will create")  # more workers than cores
    return data.DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        collate_fn=collate,
        num_workers=num_workers,
        timeout=TIMEOUT if num_workers else 0,
        persistent_workers=num_workers > 0,
        # Forked next to the threads of a process group, a worker might wait for a lock for ever.
        multiprocessing_context="spawn" if num_workers and "WORLD_SIZE" in os.environ else None,
        pin_memory=device.type == "cuda",
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # or the loader would draw from dropout's random numbers
    )


def read_batches(loader: data.DataLoader) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """Iterate over a loader's batches.

    Raises:
        UserError: an utterance cannot be used, or a worker process was killed or timed out.
    """
    try:
        yield from loader
    except (UserError, OSError, RuntimeError) as error:
        # A worker's error comes as the text of its traceback, which ends with the message.
        message = (str(error).strip().splitlines() or [type(error).__name__])[-1]
        # PyTorch's own errors are bugs, except that a worker is dead or /dev/shm full.
        is_known = "DataLoader" in message or "/torch_" in message
        if isinstance(error, RuntimeError) and not is_known:
            raise
        error = error.with_traceback(None)  # which would hold on to the loader, and so its workers
        name = f"utils.{type(error).__name__}: "
        if isinstance(error, UserError):
            raise UserError(message.removeprefix(name)) from None
        if "timed out" in message:
            message = (
                f"no batch was loaded within {TIMEOUT} s: is the disk too slow, or /dev/shm full? "
                "Try --load_data_workers 0"
            )
        raise UserError(f"loading data failed: {message}") from None
