"""A prepared folder read back: utterances, batches, and the order in which they come."""

import logging
import os
import pickle

import numpy as np
import torch
from torch.utils import data

import audio
import checkpoint
from utils import UserError


class LibriSpeech(data.Dataset):
    """The utterances of a folder that prepare_data.py (or the original release) wrote.

    The folder holds `<utt_id>.pt`, float32 (seq_len, D), zero-padded at the end, and lengths.pkl, a
    dict {'<utt_id>.pt': frames}. Nothing in these files is ever executed.

    Args:
        path: the folder.
        time_shift: n; utterances of n frames or fewer hold no target and are left out.

    Items: (tensor float32 (seq_len, D), length).

    Attributes:
        ids: file names, in the order of the items.    lengths: dict file name -> frames.
        seq_len: frames of every stored tensor.        mel_dim: D.
        prepared: how the folder was made (prepared.json), or None where nobody wrote it down.

    Raises:
        UserError: the folder is unfinished or damaged, or holds no utterance long enough.
    """

    def __init__(self, path, time_shift=0):
        self.path = path
        self.lengths = read_lengths(path)
        missing = sorted(self.lengths.keys() - set(os.listdir(path)))
        if missing:
            raise UserError(
                f"{path}: {len(missing)} of the {len(self.lengths)} files that lengths.pkl lists "
                f"are missing, the first is {missing[0]}: prepare the folder again"
            )
        self.ids = [name for name, length in self.lengths.items() if length > time_shift]
        left_out = len(self.lengths) - len(self.ids)
        if not self.ids:
            raise UserError(
                f"{path}: none of the {len(self.lengths)} utterances is longer than the time "
                f"shift of {time_shift} frames"
            )
        if left_out:
            logging.warning(
                "%s: %d of %d utterances are no longer than the time shift of %d frames, and are "
                "left out",
                path,
                left_out,
                len(self.lengths),
                time_shift,
            )
        self.prepared = read_prepared(path)
        # Every tensor of a folder has the shape of the first one.
        self.seq_len, self.mel_dim = self._read(self.ids[0]).shape

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        name = self.ids[index]
        frames, length = self._read(name), self.lengths[name]
        if frames.shape != (self.seq_len, self.mel_dim) or length > self.seq_len:
            raise UserError(
                f"{os.path.join(self.path, name)}: expected a tensor of shape "
                f"{(self.seq_len, self.mel_dim)}, like the folder's others, found "
                f"{tuple(frames.shape)} for {length} frames"
            )
        return frames, length

    def _read(self, name):
        path = os.path.join(self.path, name)
        frames = checkpoint.load(path)
        if not (
            checkpoint.is_plain(frames) and frames.dtype == torch.float32 and frames.dim() == 2
        ):
            raise UserError(f"{path}: expected a float32 tensor (frames, mel_dim)")
        return frames


class AudioFiles(data.Dataset):
    """Audio files as log-Mel utterances, computed as they are asked for, and never cut.

    Args:
        files: [(utterance id, path)], as audio.find_audio lists them.
        config: audio.FbankConfig.
        stats: dict utterance id -> the CMVN statistics (audio.cmvn_stats) that normalise it; None
            for no CMVN.
        num_frames: dict utterance id -> frames.

    Items and attributes are those of LibriSpeech, but the tensors are as long as the utterances.
    """

    def __init__(self, files, config, stats, num_frames):
        self.files = files
        self.config = config
        self.stats = stats
        self.ids = [f"{utt_id}.pt" for utt_id, _ in files]
        self.lengths = {f"{utt_id}.pt": num_frames[utt_id] for utt_id, _ in files}
        self.mel_dim = config.num_mel_bins

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        utt_id, path = self.files[index]
        frames = audio.read_fbank(path, self.config)
        if self.stats is not None:
            frames = audio.apply_cmvn(frames, self.stats[utt_id])
        return torch.from_numpy(frames), len(frames)


def frame_counts(dataset):
    """(len(dataset),) int64, the frames of each item."""
    return np.array([dataset.lengths[name] for name in dataset.ids])


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, strings and numbers; whatever would name a function or class is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def is_finished(path):
    """Whether a folder is a prepared set: lengths.pkl is written last."""
    return os.path.exists(os.path.join(path, "lengths.pkl"))


def read_lengths(path):
    """lengths.pkl of the folder `path` -> dict {'<utt_id>.pt': frames}. UserError if it is not."""
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


def read_prepared(path):
    """prepared.json of the folder `path` -> dict, or None: the original release wrote none."""
    return checkpoint.read_json(os.path.join(path, "prepared.json"))


def warn_of_other_data(trained, dataset):
    """Log a warning if a folder was made in another way than what a model was trained on.

    `trained` is the training data's prepared.json, or None where that is not known.
    """
    for key in ("source", "fbank", "cmvn"):
        if trained and dataset.prepared and trained.get(key) != dataset.prepared.get(key):
            logging.warning(
                "%s: %s is %s, but the model is trained on %s",
                dataset.path,
                key,
                dataset.prepared.get(key),
                trained.get(key),
            )


def collate(items):
    """Items -> inputs (B, longest, D) float32, lengths (B,) int64: cut to the longest utterance.

    A process whose share of a batch is empty gets tensors of no utterance.
    """
    if not items:
        return torch.zeros(0, 0, 0), torch.zeros(0, dtype=torch.int64)
    lengths = torch.tensor([length for _, length in items])
    frames = [frames[: lengths.max()] for frames, _ in items]
    return torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths


class BatchSampler(data.Sampler):
    """Batches of indices, whose order follows from (seed, epoch) alone: any epoch can be resumed.

    With `bucketing`, a shuffled epoch is cut into windows of 100 batches, each window is sorted by
    length and cut into batches, and the batches are shuffled: a batch's utterances are about
    equally long, and yet meet others every epoch (in a corpus of more than one window).

    Args:
        lengths: (N,) frames of each utterance.
        batch_size: utterances of one optimizer step, over all processes.
        rank, world_size: this process takes every world_size-th utterance of a batch.
    """

    WINDOW = 100  # batches

    def __init__(
        self, lengths, batch_size, shuffle=True, bucketing=True, seed=0, rank=0, world_size=1
    ):
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.bucketing = bucketing
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.set_epoch(0)

    def set_epoch(self, epoch, start_batch=0):
        """The next iteration yields epoch `epoch`, from batch `start_batch` on."""
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self):
        """Batches of a whole epoch."""
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self):
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
            yield order[start : start + self.batch_size][self.rank :: self.world_size].tolist()
