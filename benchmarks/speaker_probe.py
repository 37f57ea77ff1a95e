"""How much features tell of the speaker: a linear classifier, and scores of pairs of utterances.

    python benchmarks/speaker_probe.py --names log-Mel untrained trained \\
        --features data/test features/untrained/test features/trained/test

Folders as those of phone_probe.py. An utterance is the mean of its frames' features; its speaker is
what stands before the first "-" of its id. Prints two tables, in %:

- the error of a softmax classifier that knows the speakers from a part of their utterances;
- the equal-error rate, where a threshold on the cosine of two utterances (of those that the
  classifier does not know, the mean of the others subtracted) accepts as many pairs of two speakers
  as it rejects pairs of one.
"""
# ruff: noqa: E402

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from utils import UserError, not_negative, positive, run


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("data").add_argument
    add("--features", nargs="+", metavar="DIR", required=True, help="folders, each a row")
    add = parser.add_argument_group("classifier").add_argument
    add("--steps", type=positive, default=1000, help="of 512 utterances each, drawn at random")
    add("--seed", type=not_negative, default=0, help="of the split, the weights and the order")
    add = parser.add_argument_group("output").add_argument
    add("--names", nargs="+", metavar="NAME", help="of the folders in the tables; default: paths")
    add("--json", metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import numpy as np
import torch

import checkpoint
from benchmarks.phone_probe import error_rate, fit, markdown, read_features, row_names


def split_speakers(ids, seed):
    """Utterance ids -> (to train on, to test on), half of every speaker's in each."""
    speakers = {}
    for utt_id in sorted(ids):
        speakers.setdefault(utt_id.split("-")[0], []).append(utt_id)
    if len(speakers) < 2:
        raise UserError(f"only one speaker: {min(speakers)}")
    random = np.random.default_rng(seed)
    parts = [], []
    for speaker, of_it in speakers.items():
        if len(of_it) < 4:  # two in each part, for a pair
            raise UserError(f"speaker {speaker}: {len(of_it)} utterances, but 4 are needed")
        of_it = random.permutation(of_it).tolist()
        parts[0].extend(of_it[::2])
        parts[1].extend(of_it[1::2])
    return parts


def equal_error_rate(scores, same):
    """The rate at which false rejections are as frequent as false acceptances, 0 to 1.

    Args:
        scores: (N,), the higher the more alike; equal scores fall together.
        same: (N,) bool, whether the pair is one speaker's.
    """
    if same.all() or not same.any():
        raise UserError("equal-error rate: needs pairs of one speaker and pairs of two")
    order = np.argsort(scores, kind="stable")
    scores, same = scores[order], same[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of equal scores; a threshold lies behind it
    rejected = np.append(0, np.cumsum(same)[last] / same.sum())
    accepted = np.append(1, 1 - np.cumsum(~same)[last] / (~same).sum())
    # rejected rises and accepted falls: a straight line between the two thresholds at the crossing
    gap = rejected - accepted
    i = np.argmax(gap >= 0)
    part = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(rejected[i - 1] + part * (rejected[i] - rejected[i - 1]))


def cosine_pairs(x, speakers):
    """(U, H), (U,) speakers -> scores of all pairs, whether they are of one speaker."""
    x = torch.nn.functional.normalize(x, dim=1)
    i, j = np.triu_indices(len(x), k=1)
    return (x @ x.T).numpy()[i, j], speakers[i] == speakers[j]


def probe(features, train_ids, test_ids, layer, args):
    """One layer -> (classification error and its standard error, equal-error rate), in %."""
    x, x_test = (
        torch.stack([features[utt_id][layer].float().mean(dim=0) for utt_id in ids])
        for ids in (train_ids, test_ids)
    )  # (U, H)
    names = sorted({utt_id.split("-")[0] for utt_id in train_ids})
    y, y_test = (
        torch.tensor([names.index(utt_id.split("-")[0]) for utt_id in ids])
        for ids in (train_ids, test_ids)
    )
    wrong = (fit(x, y, len(names), args.steps, args.seed)(x_test) != y_test).numpy()
    eer = equal_error_rate(*cosine_pairs(x_test - x.mean(dim=0), y_test.numpy()))
    return *error_rate(wrong, np.ones(len(wrong))), 100 * eer


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    names = row_names(args, args.features, parser)
    errors, rates, figures = {}, {}, {}
    for name, folder in zip(names, args.features):
        features, layers = read_features(folder)
        ids = split_speakers(features, args.seed)
        print(
            f"{name}: {len(ids[0])} utterances to train on, {len(ids[1])} to test on",
            file=sys.stderr,
        )
        found = [probe(features, *ids, i, args) for i in range(len(layers))]
        figures[name] = dict(zip(layers, found))
        errors[name] = {key: f"{e:.1f} ± {d:.1f}" for key, (e, d, _) in figures[name].items()}
        rates[name] = {key: f"{eer:.1f}" for key, (_, _, eer) in figures[name].items()}
    print(markdown(errors, "speaker error, %"), markdown(rates, "equal-error rate, %"), sep="\n\n")
    if args.json:
        checkpoint.write_json(figures, args.json)


if __name__ == "__main__":
    run(main)
