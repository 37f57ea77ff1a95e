"""How well a linear classifier tells phones from features, frame by frame.

    python benchmarks/phone_probe.py --labels corpus/labels.txt --names log-Mel untrained trained \\
        --train_features data/probe features/untrained/probe features/trained/probe \\
        --test_features data/test features/untrained/test features/trained/test
    python benchmarks/phone_probe.py --labels labels.txt --train_features features \\
        --split_by speaker                             # no --test_features: holds some out

A folder holds <utt_id>.pt, features (T, H), or from extract_features.py --layer all (layers, T, H);
or it is a prepared folder, whose log-Mel frames are cut to their lengths. labels.txt has an
utterance a line, its id and then a label for each frame. Prints a table of frame errors in %, one
softmax classifier each [1, Section 4.1], with --mlp of one hidden layer.

[1] Chung, Hsu, Tang, Glass: An Unsupervised Autoregressive Model for Speech Representation
    Learning. Interspeech 2019.
"""
# ruff: noqa: E402

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, not_negative, positive, run


def fraction(text):
    """An argparse type: a number between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, found {text!r}")
    return value


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--labels", required=True, metavar="FILE", help="utterance id and a label for each frame")
    folders = {"nargs": "+", "metavar": "DIR"}
    add("--train_features", **folders, required=True, help="folders, one classifier a layer each")
    add("--test_features", **folders, help="as many folders, to test on")
    add(
        "--split_by", choices=["utterance", "speaker"], default="utterance", help="what to hold out"
    )
    add("--test_fraction", type=fraction, default=0.2, help="how much, without --test_features")
    add = parser.add_argument_group("classifier").add_argument
    add("--mlp", action="store_true", help="one hidden layer of 512 ReLUs instead of a linear one")
    add("--steps", type=positive, default=2000, help="of 512 frames each, drawn at random")
    add("--seed", type=not_negative, default=0, help="of the split, the weights and the order")
    add = parser.add_argument_group("output").add_argument
    add("--names", nargs="+", metavar="NAME", help="of the folders in the table; default: paths")
    add("--json", metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import numpy as np
import torch
from torch import nn

import checkpoint
from datasets import LibriSpeech

# Reading ------------------------------------------------------------------------------------------


def read_labels(path):
    """labels.txt -> dict utterance id -> list of labels, one a frame."""
    labels = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            utt_id, *of_frames = line.split() or [""]
            if not of_frames:
                raise UserError(f"{path}:{number}: expected an utterance id and a label a frame")
            if utt_id in labels:
                raise UserError(f"{path}:{number}: utterance {utt_id}: was there before")
            labels[utt_id] = of_frames
    return labels


def read_features(folder):
    """A folder -> dict utterance id -> (layers, T, H) as stored, and the layers' names.

    Raises:
        UserError: no features there, damaged files, or utterances of different layers or widths.
    """
    if Path(folder, "lengths.pkl").exists():
        dataset = LibriSpeech(folder)
        items = ((name, *dataset[i]) for i, name in enumerate(dataset.ids))
        # A copy, or the whole padded tensor would stay in memory.
        features = {name.removesuffix(".pt"): frames[:t].clone() for name, frames, t in items}
    else:
        paths = sorted(Path(folder).glob("*.pt"))
        features = {path.name.removesuffix(".pt"): checkpoint.load(path) for path in paths}
    if not features:
        raise UserError(f"{folder}: no features (.pt) in it")
    first = next(iter(features.values()))
    for utt_id, value in features.items():
        is_tensor = isinstance(value, torch.Tensor) and value.is_floating_point()
        if not is_tensor or value.dim() not in (2, 3):
            raise UserError(f"{folder}: utterance {utt_id}: expected a tensor ((layers,) T, H)")
        if value.shape[:-2] != first.shape[:-2] or value.shape[-1] != first.shape[-1]:
            raise UserError(
                f"{folder}: utterance {utt_id}: shape {tuple(value.shape)} does not go with "
                f"{tuple(first.shape)} of the first one"
            )
    if first.dim() == 2:
        return {utt_id: value[None] for utt_id, value in features.items()}, ["as they are"]
    return features, [f"layer {i + 1}" for i in range(len(first))]


def read_labelled(folder, labels):
    """read_features; UserError unless every frame of every utterance has a label."""
    features, layers = read_features(folder)
    for utt_id, value in features.items():
        if utt_id not in labels:
            raise UserError(f"{folder}: utterance {utt_id}: has no labels")
        if value.shape[1] != len(labels[utt_id]):
            raise UserError(
                f"{folder}: utterance {utt_id}: {value.shape[1]} frames, but "
                f"{len(labels[utt_id])} labels"
            )
    return features, layers


def hold_out(ids, split_by, test_fraction, seed):
    """Utterance ids -> (those to train on, those to test on), by a seeded draw."""
    groups = {utt_id: utt_id.split("-")[0] if split_by == "speaker" else utt_id for utt_id in ids}
    names = np.random.default_rng(seed).permutation(sorted(set(groups.values())))
    if len(names) < 2:
        raise UserError(f"only one {split_by}: nothing to hold out for the test")
    held_out = set(names[: max(1, round(test_fraction * len(names)))].tolist())
    parts = [], []
    for utt_id in ids:
        parts[groups[utt_id] in held_out].append(utt_id)
    return parts


def stack(features, ids, layer):
    """-> (N, H) float32, one layer's frames of the utterances, one after another."""
    return torch.cat([features[utt_id][layer] for utt_id in ids]).float()


# The classifier -----------------------------------------------------------------------------------


def fit(x, y, num_classes, steps, seed, hidden_size=0, learning_rate=0.01, batch_size=512):
    """Fit a softmax classifier: Adam on the cross-entropy, its rate falling to 0 along a cosine.

    Args:
        x: (N, H) float32, standardised here by their own mean and deviation.
        y: (N,) int64, classes below num_classes.
        hidden_size: 0 for a linear classifier, otherwise the ReLUs of one hidden layer.

    Returns:
        A function from (M, H) to the M most probable classes.
    """
    mean, scale = x.mean(dim=0), 1 / x.std(dim=0).clamp(min=1e-6)
    x = (x - mean) * scale
    torch.manual_seed(seed)
    sizes = [x.size(1), hidden_size, num_classes] if hidden_size else [x.size(1), num_classes]
    layers = [nn.Linear(i, o) for i, o in zip(sizes, sizes[1:])]
    model = nn.Sequential(layers[0], *(part for layer in layers[1:] for part in (nn.ReLU(), layer)))
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
    """Wrong and all examples of each utterance, (U,) -> the error in %, and its standard error.

    Frames of an utterance go wrong together, so that utterances are what was drawn.
    """
    rate = wrong.sum() / counts.sum()
    deviation = np.sqrt(np.square(wrong - rate * counts).sum()) / counts.sum()
    return 100 * float(rate), 100 * float(deviation)


def probe(train, test, labels, layer, args):
    """(features, ids) to train and to test on -> error_rate of one layer."""
    sets = [[label for utt_id in ids for label in labels[utt_id]] for _, ids in (train, test)]
    classes = {label: i for i, label in enumerate(sorted(set(sets[0] + sets[1])))}
    y, y_test = (torch.tensor([classes[label] for label in values]) for values in sets)
    hidden_size = 512 if args.mlp else 0
    predict = fit(stack(*train, layer), y, len(classes), args.steps, args.seed, hidden_size)
    wrong = predict(stack(*test, layer)) != y_test
    counts = [len(labels[utt_id]) for utt_id in test[1]]
    return error_rate(np.array([w.sum().item() for w in wrong.split(counts)]), np.array(counts))


# The table ----------------------------------------------------------------------------------------


def markdown(rows, corner):
    """{row: {column: text}} -> a table in Markdown, its columns in the order of appearance."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row_names(args, folders, parser):
    """What to call the folders: --names, if there is one for each."""
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
    labels = read_labels(args.labels)
    rows, figures = {}, {}
    for name, folder, test_folder in zip(names, args.train_features, test_folders):
        features, layers = read_labelled(folder, labels)
        if test_folder is None:
            ids = hold_out(list(features), args.split_by, args.test_fraction, args.seed)
            train, test = ((features, part) for part in ids)
        else:
            test_features, test_layers = read_labelled(test_folder, labels)
            both = features.keys() & test_features.keys()
            if both:
                raise UserError(f"{test_folder}: utterance {min(both)}: is in {folder} too")
            if test_layers != layers:
                raise UserError(f"{test_folder}: has {test_layers}, but {folder} has {layers}")
            train, test = (features, list(features)), (test_features, list(test_features))
        counts = [sum(len(labels[utt_id]) for utt_id in ids) for _, ids in (train, test)]
        print(
            f"{name}: {'MLP' if args.mlp else 'linear'} classifier a layer, {len(train[1])} "
            f"utterances ({counts[0]} frames) to train on, {len(test[1])} ({counts[1]}) to test on",
            file=sys.stderr,
        )
        errors = [probe(train, test, labels, i, args) for i in range(len(layers))]
        figures[name] = dict(zip(layers, errors))
        rows[name] = {key: f"{e:.1f} ± {d:.1f}" for key, (e, d) in figures[name].items()}
    print(markdown(rows, "frame error, %"))
    if args.json:
        checkpoint.write_json(figures, args.json)


if __name__ == "__main__":
    run(main)
