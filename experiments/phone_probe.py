"""Phone classification from single frames: how well a probe recognises phones from features.

--labels has one utterance per line: its id, then a label every 10 ms; --train_ids and --test_ids
list one id per line. The field's files for LibriSpeech's train-clean-100 [1] look like this.

The probe is softmax regression on single frames [2, Section 4.1] (linear probe), with --hidden_size
after one layer of ReLUs (MLP probe). Prints the accuracy in % of each layer, numbered from 0 as by
extract_features.py --layer: the mean over --seeds and, in brackets, the 95 % bootstrap interval
over the test utterances, because the frames of an utterance are not independent.

[1] van den Oord, Li, Vinyals: Representation Learning with Contrastive Predictive Coding. 2018.
[2] Chung, Hsu, Tang, Glass: An Unsupervised Autoregressive Model ... Interspeech 2019.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from datasets import is_finished, read_lengths
from utils import UserError, load, new_parser, not_negative, positive, run_main, write_json

EXAMPLE = """\
  python experiments/phone_probe.py data/train-clean-100 features/layer2 --names log-Mel APC \\
      --labels converted_aligned_phones.txt --train_ids train_split.txt --test_ids test_split.txt"""


def build_parser():
    parser = new_parser(__doc__.split("\n\n")[0], EXAMPLE)
    add = parser.add_argument
    text = "directory of <utt_id>.pt, a row of the table: extracted features or a prepared dataset"
    add("features", nargs="+", metavar="DIR", help=text)
    add("--names", nargs="+", metavar="NAME", help="names of the rows (default: the directories)")
    add("--labels", required=True, metavar="FILE", help="ids, and a label every 10 ms")
    add("--train_ids", required=True, metavar="FILE", help="ids to train on, one per line")
    add("--test_ids", required=True, metavar="FILE", help="ids to test on, one per line")
    text = "train on about this many frames at most (default: %(default)s)"
    add("--max_frames", type=positive, default=1000000, help=text)
    text = "ReLUs of the hidden layer; 0: linear probe (default: %(default)s)"
    add("--hidden_size", type=not_negative, default=0, help=text)
    text = "training steps of 512 random frames each (default: %(default)s)"
    add("--steps", type=positive, default=1000, help=text)
    text = "random seeds (initialisation, batches), one probe each (default: 0 1 2)"
    add("--seeds", type=not_negative, nargs="+", default=[0, 1, 2], help=text)
    add("--json", metavar="FILE", help="write the numbers of correct frames behind the table")
    return parser


# Reading ------------------------------------------------------------------------------------------


def read_table(path):
    """A file of lines that start with an utterance id -> {id: list of the rest of its line}."""
    table = {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            utt_id, *rest = line.split() or [""]
            if not utt_id or utt_id in table:
                raise UserError(f"{path}:{number}: expected an utterance id that no other line has")
            table[utt_id] = rest
    return table


def match(x, labels, where):
    """Features (layers, T, H) and an utterance's labels -> the same, of as many frames.

    With two labels more than frames, the windows of the labels' frames were centred on every 10 ms,
    beyond the ends as well (Kaldi's --snip-edges=false): the second label is then the nearest to
    the middle of our first frame.
    """
    surplus = len(labels) - x.size(1)
    if abs(surplus) > 2:
        raise UserError(f"{where}: {x.size(1)} frames, but {len(labels)} labels")
    labels = labels[max(surplus, 0) // 2 :][: x.size(1)]
    return x[:, : len(labels)], labels


def read_labelled(folder, ids, labels):
    """Yield each utterance's features (layers, T, H) and its T labels."""
    lengths = read_lengths(folder) if is_finished(folder) else {}
    for utt_id in ids:
        path = Path(folder, f"{utt_id}.pt")
        x = load(path)[..., : lengths.get(path.name), :]
        yield match(x if x.dim() == 3 else x[None], labels[utt_id], path)


# The probe ----------------------------------------------------------------------------------------


def fit(x, y, num_classes, hidden_size, steps, seed, learning_rate=0.01, batch_size=512):
    """Fit a probe with Adam; its learning rate falls to 0 along a cosine.

    Args:
        x: (N, H), standardised here by their own mean and standard deviation.
        y: (N,) int64, classes below num_classes.
        hidden_size: ReLUs of the MLP probe; 0 for the linear probe.

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
        for layer, probes in layers.items():
            for row, classify in zip(correct[layer], probes):
                row.append((classify(x[layer]) == y).sum().item())
    return correct, counts


# The table ----------------------------------------------------------------------------------------


def accuracy(correct, counts, minus=None, samples=2000):
    """Correct frames (seeds, utterances), and frames -> accuracy in %, and its 95 % interval.

    `minus`, another probe's correct frames, gives the difference of the two, in points.
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
    cell, rows = "{:.1f} ({:.1f} to {:.1f})".format, {}
    for name, layers in results["correct"].items():
        cells = [cell(*accuracy(correct, results["frames"])) for correct in layers.values()]
        columns = ["features"] if len(layers) == 1 else [f"layer {layer}" for layer in layers]
        rows[name] = dict(zip(columns, cells))
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
