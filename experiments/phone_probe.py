"""Frame classification: how well a classifier recognises phones from features, frame by frame.

    python experiments/phone_probe.py --labels corpus/labels.txt --names log-Mel untrained APC \\
        --train_features data/probe features/untrained/probe features/apc/probe \\
        --test_features data/test features/untrained/test features/apc/test
    python experiments/phone_probe.py --labels labels.txt --train_features features \\
        --split_by speaker                             # no --test_features: holds some out

A folder holds <utt_id>.pt, features (T, H), or (layers, T, H) from extract_features.py --layer all;
or it is a prepared folder, whose padding is left out. labels.txt has one utterance per line: its
id, then a label for each frame. Prints the frame error rates in %, each with its standard error, of
one softmax classifier per layer [1, Section 4.1]; with --mlp it has a hidden layer.

[1] Chung, Hsu, Tang, Glass: An Unsupervised Autoregressive Model for Speech Representation
    Learning. Interspeech 2019.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import LibriSpeech, Utterances, is_finished
from utils import HelpFormatter, UserError, load, not_negative, positive, run_main, write_json


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("--labels", required=True, metavar="FILE", help="utterance ids, and a label for each frame")
    folders = {"nargs": "+", "metavar": "DIR"}
    add("--train_features", **folders, required=True, help="folders to compare, a row each")
    add("--test_features", **folders, help="as many folders, to test on")
    add(
        "--split_by", choices=["utterance", "speaker"], default="utterance", help="what to hold out"
    )
    add("--test_fraction", type=float, default=0.2, help="held out if there is no --test_features")
    add = parser.add_argument_group("classifier").add_argument
    add("--mlp", action="store_true", help="one hidden layer of 512 ReLUs instead of a linear one")
    add("--steps", type=positive, default=2000, help="training steps of 512 random frames each")
    add("--seed", type=not_negative, default=0, help="of the split, the weights and the batches")
    add = parser.add_argument_group("output").add_argument
    add("--names", nargs="+", metavar="NAME", help="of the rows (default: the folders' paths)")
    add("--json", metavar="FILE", help="write {name: {layer: [error rate, standard error]}}")
    return parser


# Reading ------------------------------------------------------------------------------------------


def read_labels(path):
    """labels.txt -> dict utterance id -> list of labels, one for each frame."""
    labels = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            utt_id, *frame_labels = line.split() or [""]
            if not frame_labels:
                raise UserError(f"{path}:{number}: expected an utterance id and a label per frame")
            if utt_id in labels:
                raise UserError(f"{path}:{number}: utterance {utt_id}: listed twice")
            labels[utt_id] = frame_labels
    return labels


def read_features(folder):
    """A folder -> dict utterance id -> (layers, T, H) as stored, and the layers' names.

    Raises:
        UserError: no features there, damaged files, or utterances that differ in layers or width.
    """
    if is_finished(folder):
        # A copy, because a view would keep the whole padded tensor in memory.
        utterances = Utterances([LibriSpeech(folder)])
        features = {utt_id: x[:length].clone() for x, length, utt_id in utterances}
    else:
        paths = sorted(Path(folder).glob("*.pt"))
        features = {path.name.removesuffix(".pt"): load(path) for path in paths}
    if not features:
        raise UserError(f"{folder}: no features (.pt) in it")
    first = next(iter(features.values()))
    for utt_id, x in features.items():
        if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() in (2, 3)):
            raise UserError(f"{folder}: utterance {utt_id}: expected a tensor ((layers,) T, H)")
        if x.shape[:-2] != first.shape[:-2] or x.shape[-1] != first.shape[-1]:
            raise UserError(
                f"{folder}: utterance {utt_id}: shape {tuple(x.shape)} does not match "
                f"{tuple(first.shape)} of the first one"
            )
    if first.dim() == 2:
        return {utt_id: x[None] for utt_id, x in features.items()}, ["features"]
    return features, [f"layer {i + 1}" for i in range(len(first))]


def read_labelled(folder, labels):
    """read_features(); UserError unless every frame of every utterance has a label."""
    features, layers = read_features(folder)
    for utt_id, x in features.items():
        if utt_id not in labels:
            raise UserError(f"{folder}: utterance {utt_id}: has no labels")
        if (frames := x.shape[1]) != (count := len(labels[utt_id])):
            raise UserError(f"{folder}: utterance {utt_id}: {frames} frames, but {count} labels")
    return features, layers


def speaker_of(utt_id):
    """What stands before the first "-", as in LibriSpeech."""
    return utt_id.split("-")[0]


def hold_out(ids, split_by, test_fraction, seed):
    """Utterance ids -> (training ids, test ids), drawn at random."""
    groups = {utt_id: speaker_of(utt_id) if split_by == "speaker" else utt_id for utt_id in ids}
    names = np.random.default_rng(seed).permutation(sorted(set(groups.values()))).tolist()
    if len(names) < 2:
        raise UserError(f"only one {split_by}: nothing to hold out for the test")
    held_out = set(names[: max(1, round(test_fraction * len(names)))])
    train = [utt_id for utt_id in ids if groups[utt_id] not in held_out]
    return train, [utt_id for utt_id in ids if groups[utt_id] in held_out]


def read_sets(folder, test_folder, labels, args):
    """-> (features to train on, features to test on, layers' names)."""
    features, layers = read_labelled(folder, labels)
    if test_folder is None:
        sets = hold_out(list(features), args.split_by, args.test_fraction, args.seed)
        return *({utt_id: features[utt_id] for utt_id in ids} for ids in sets), layers
    test_features, test_layers = read_labelled(test_folder, labels)
    if both := features.keys() & test_features.keys():
        raise UserError(f"{test_folder}: utterance {min(both)}: is in {folder} too")
    if test_layers != layers:
        raise UserError(f"{test_folder}: has {test_layers}, but {folder} has {layers}")
    return features, test_features, layers


# The classifier -----------------------------------------------------------------------------------


def fit(x, y, num_classes, steps, seed, hidden_size=0, learning_rate=0.01, batch_size=512):
    """Fit a softmax classifier with Adam; the learning rate falls to 0 along a cosine.

    Args:
        x: (N, H) float32, standardised here by their own mean and standard deviation.
        y: (N,) int64, classes below num_classes.
        hidden_size: 0 for a linear classifier, otherwise the ReLUs of one hidden layer.

    Returns:
        A function from (M, H) to the M most probable classes.
    """
    mean, scale = x.mean(dim=0), 1 / x.std(dim=0).clamp(min=1e-6)
    x = (x - mean) * scale
    torch.manual_seed(seed)
    if hidden_size:
        hidden = nn.Linear(x.size(1), hidden_size)
        model = nn.Sequential(hidden, nn.ReLU(), nn.Linear(hidden_size, num_classes))
    else:
        model = nn.Linear(x.size(1), num_classes)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (batch_size,))
        loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda x: model((x - mean) * scale).detach().argmax(dim=1)


def error_rate(wrong, counts):
    """Errors and examples of each utterance, (U,) -> error rate and its standard error, in %.

    The frames of an utterance are not independent, so the sample is one of utterances.
    """
    rate = wrong.sum() / counts.sum()
    standard_error = np.sqrt(np.square(wrong - rate * counts).sum()) / counts.sum()
    return 100 * float(rate), 100 * float(standard_error)


def probe(train, test, labels, layer, args):
    """Train a classifier on one layer's frames -> its error_rate() on the test set."""
    x, x_test = (torch.cat([u[layer] for u in part.values()]).float() for part in (train, test))
    y, y_test = ([label for utt_id in part for label in labels[utt_id]] for part in (train, test))
    classes = {label: i for i, label in enumerate(sorted({*y, *y_test}))}
    y, y_test = (torch.tensor([classes[label] for label in part]) for part in (y, y_test))
    predict = fit(x, y, len(classes), args.steps, args.seed, hidden_size=512 if args.mlp else 0)
    counts = [len(labels[utt_id]) for utt_id in test]
    wrong = [part.sum().item() for part in (predict(x_test) != y_test).split(counts)]
    return error_rate(np.array(wrong), np.array(counts))


# The table ----------------------------------------------------------------------------------------


def table(corner, rows, cell="{0[0]:.1f} ± {0[1]:.1f}"):
    """{row: {column: value}} -> a Markdown table, in which a value is written as cell.format()."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    for name, row in rows.items():
        lines.append([name, *(cell.format(row[c]) if c in row else "" for c in columns)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row_names(args, folders, parser):
    """The names of the folders in the tables."""
    names = args.names or folders
    if len(names) != len(folders) or len(set(names)) < len(names):
        parser.error(f"--names: expected {len(folders)} different names, found {' '.join(names)}")
    return names


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    names = row_names(args, args.train_features, parser)
    test_folders = args.test_features or [None] * len(names)
    if len(test_folders) != len(names):
        parser.error("--test_features: expected as many folders as --train_features")
    if not 0 < args.test_fraction < 1:
        parser.error(f"--test_fraction {args.test_fraction:g}: expected a number between 0 and 1")
    labels = read_labels(args.labels)
    errors = {}
    for name, folder, test_folder in zip(names, args.train_features, test_folders):
        train, test, layers = read_sets(folder, test_folder, labels, args)
        sizes = [
            f"{len(part)} utterances ({sum(len(labels[utt_id]) for utt_id in part)} frames)"
            for part in (train, test)
        ]
        print(f"{name}: training on {sizes[0]}, testing on {sizes[1]}", file=sys.stderr)
        errors[name] = {
            layer: probe(train, test, labels, i, args) for i, layer in enumerate(layers)
        }
    print(table("frame error rate, %", errors), end="")
    if args.json:
        write_json(errors, args.json)


if __name__ == "__main__":
    run_main(main)
