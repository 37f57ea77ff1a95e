"""Frame classification: how well a classifier recognises phones from features, frame by frame.

    python experiments/phone_probe.py data/train-clean-100 features/layer2 --names log-Mel APC \\
        --labels converted_aligned_phones.txt --train_ids train_split.txt --test_ids test_split.txt

A folder is a row of the table. It holds <utt_id>.pt: features (T, H), or (layers, T, H) from
extract_features.py --layer all; or it is a prepared folder. --labels has one utterance per line,
its id, then a label every 10 ms; --train_ids and --test_ids have an id per line. These are the
files that the field uses for LibriSpeech's train-clean-100 [1].

The classifier is softmax regression, trained on single frames [2, Section 4.1], with --hidden_size
after one layer of ReLUs. Prints the accuracy in %, the mean over --seeds, and in brackets the
bootstrap interval of 95 % over the test utterances, because an utterance's frames are not
independent.

[1] van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding. 2018.
[2] Chung, Hsu, Tang, Glass: An Unsupervised Autoregressive Model for Speech Representation
    Learning. Interspeech 2019.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import is_finished, read_lengths
from utils import HelpFormatter, UserError, load, not_negative, positive, run_main, write_json

SPARE_LABELS = 2  # of an utterance: windows that need not fit give so many frames more


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument_group("data").add_argument
    add("features", nargs="+", metavar="DIR", help="folders to compare, a row each")
    add("--names", nargs="+", metavar="NAME", help="of the rows (default: the folders' paths)")
    add("--labels", required=True, metavar="FILE", help="ids, and a label every 10 ms")
    add("--train_ids", required=True, metavar="FILE", help="ids to train on, one a line")
    add("--test_ids", required=True, metavar="FILE", help="ids to test on")
    add("--max_frames", type=positive, default=1000000, help="at most, to train on, about")
    add = parser.add_argument_group("classifier").add_argument
    add("--hidden_size", type=not_negative, default=0, help="ReLUs of a hidden layer; 0: linear")
    add("--steps", type=positive, default=1000, help="training steps of 512 random frames each")
    add("--seeds", type=not_negative, nargs="+", default=[0, 1, 2], help="of weights and batches")
    add = parser.add_argument_group("output").add_argument
    add("--json", metavar="FILE", help="write what the table is made of")
    return parser


# Reading ------------------------------------------------------------------------------------------


def read_table(path):
    """A file of lines that begin with an utterance id -> dict id -> list of the line's rest."""
    table = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            utt_id, *rest = line.split() or [""]
            if not utt_id or utt_id in table:
                raise UserError(f"{path}:{number}: expected an utterance id, each once")
            table[utt_id] = rest
    if not table:
        raise UserError(f"{path}: no utterances in it")
    return table


def read_features(folder, utt_id, lengths):
    """-> an utterance's features (layers, T, H). `lengths` are those of a prepared folder."""
    path = Path(folder, f"{utt_id}.pt")
    x = load(path)
    if not (isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim() in (2, 3)):
        raise UserError(f"{path}: expected a tensor ((layers,) T, H)")
    return (x if x.dim() == 3 else x[None])[:, : lengths.get(path.name)]


def match(x, labels, where):
    """Features (layers, T, H) and an utterance's labels -> the same, of as many frames.

    With two labels more than frames, the windows of the labels' frames were centred on every 10 ms,
    beyond the ends as well (Kaldi's --snip-edges=false): the second label is then the nearest to
    the middle of our first frame.
    """
    surplus = len(labels) - x.size(1)
    if abs(surplus) > SPARE_LABELS:
        raise UserError(f"{where}: {x.size(1)} frames, but {len(labels)} labels")
    labels = labels[max(surplus, 0) // 2 :][: x.size(1)]
    return x[:, : len(labels)], labels


def read_labelled(folder, ids, labels):
    """Yield features (layers, T, H) and T labels of each utterance."""
    lengths = read_lengths(folder) if is_finished(folder) else {}
    first = None
    for utt_id in ids:
        x, y = match(read_features(folder, utt_id, lengths), labels[utt_id], f"{folder}: {utt_id}")
        first = x if first is None else first
        if x.shape[::2] != first.shape[::2]:
            raise UserError(f"{folder}: {utt_id}: {tuple(x.shape)} after {tuple(first.shape)}")
        yield x, y


# The classifier -----------------------------------------------------------------------------------


def fit(x, y, num_classes, hidden_size, steps, seed, learning_rate=0.01, batch_size=512):
    """Fit a softmax classifier with Adam; the learning rate falls to 0 along a cosine.

    Args:
        x: (N, H), standardised here by their own mean and standard deviation.
        y: (N,) int64, classes below num_classes.
        hidden_size: of one hidden layer of ReLUs; 0 for a linear classifier.

    Returns:
        A function from (M, H) to the M most probable classes.
    """
    mean, scale = x.float().mean(dim=0), 1 / x.float().std(dim=0).clamp(min=1e-6)
    torch.manual_seed(seed)
    model = nn.Linear(hidden_size or x.size(1), num_classes)
    if hidden_size:
        model = nn.Sequential(nn.Linear(x.size(1), hidden_size), nn.ReLU(), model)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        batch = torch.randint(len(x), (batch_size,))
        loss = nn.functional.cross_entropy(model((x[batch].float() - mean) * scale), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return lambda x: model((x.float() - mean) * scale).detach().argmax(dim=1)


def probe(folder, labels, train_ids, test_ids, args):
    """-> {layer: correct frames (seeds, test utterances)}, and the utterances' frames."""
    classes = {label: i for i, label in enumerate(sorted({y for u in labels.values() for y in u}))}
    every = -(-sum(len(labels[utt_id]) for utt_id in train_ids) // args.max_frames)
    xs, ys = zip(*read_labelled(folder, list(train_ids)[::every], labels))
    y = torch.tensor([classes[label] for part in ys for label in part])
    print(f"{folder}: training on {len(xs)} utterances ({len(y)} frames)", file=sys.stderr)
    layers = {}
    for layer in range(len(xs[0])):
        x = torch.cat([part[layer] for part in xs])
        flags = (len(classes), args.hidden_size, args.steps)
        layers[layer] = [fit(x, y, *flags, seed) for seed in args.seeds]
    counts, correct = [], {layer: [[] for _ in args.seeds] for layer in layers}
    for x, y in read_labelled(folder, test_ids, labels):
        y = torch.tensor([classes[label] for label in y])
        counts.append(len(y))
        for layer, classifiers in layers.items():
            for row, classify in zip(correct[layer], classifiers):
                row.append((classify(x[layer]) == y).sum().item())
    return correct, counts


# The table ----------------------------------------------------------------------------------------


def accuracy(correct, counts, minus=None, samples=2000):
    """Correct frames (seeds, utterances), and frames -> accuracy in %, and its 95 % interval.

    `minus` is another classifier's: then it is the accuracies' difference, over the same samples.
    """
    correct = np.mean(correct, axis=0) - (0 if minus is None else np.mean(minus, axis=0))
    counts = np.array(counts)
    drawn = np.random.default_rng(0).integers(len(counts), size=(samples, len(counts)))
    rates = correct[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(rates, (0.025, 0.975))
    return 100 * correct.sum() / counts.sum(), 100 * low, 100 * high


def table(corner, rows):
    """{row: {column: text}} -> a Markdown table."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [[corner, *columns], ["---"] * (1 + len(columns))]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def accuracy_table(results):
    """What --json has -> a Markdown table."""
    cell = "{:.1f} ({:.1f} to {:.1f})".format
    rows = {
        name: {
            "features" if len(layers) == 1 else f"layer {int(layer) + 1}": cell(
                *accuracy(correct, results["frames"])
            )
            for layer, correct in layers.items()
        }
        for name, layers in results["correct"].items()
    }
    return table("frame accuracy, %", rows)


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    names = args.names or args.features
    if len(names) != len(args.features) or len(set(names)) < len(names):
        parser.error(f"--names: expected {len(args.features)} different names, found {names}")
    labels, train_ids, test_ids = map(read_table, (args.labels, args.train_ids, args.test_ids))
    if both := train_ids.keys() & test_ids.keys():
        raise UserError(f"{args.test_ids}: utterance {min(both)} is in {args.train_ids} too")
    if lost := [utt_id for utt_id in (*train_ids, *test_ids) if not labels.get(utt_id)]:
        raise UserError(f"{args.labels}: {len(lost)} utterances have no labels: {lost[0]}, ...")
    results = {"correct": {}}
    for name, folder in zip(names, args.features):
        found = probe(folder, labels, train_ids, test_ids, args)
        results["correct"][name], results["frames"] = found
    print(accuracy_table(results), end="")
    if args.json:
        write_json(results, args.json)


if __name__ == "__main__":
    run_main(main)
