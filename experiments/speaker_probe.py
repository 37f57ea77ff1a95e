"""How much features tell about the speaker: classification, and verification by cosine scores.

    python experiments/speaker_probe.py --names log-Mel untrained APC \\
        --features data/test features/untrained/test features/apc/test

Reads the same folders as phone_probe.py. An utterance is represented by the mean of its frames'
features; its speaker is what stands before the first "-" of its id. Prints two tables, in %:

- the error rate of a softmax classifier, trained on half of each speaker's utterances;
- the equal error rate of speaker verification, by the cosine of every two of the other utterances
  (after subtracting the training utterances' mean).
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments import phone_probe
from experiments.phone_probe import speaker_of
from utils import HelpFormatter, UserError, not_negative, positive, run_main, write_json


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add(
        "--features", nargs="+", metavar="DIR", required=True, help="folders to compare, a row each"
    )
    add("--steps", type=positive, default=1000, help="training steps of 512 random utterances each")
    add("--seed", type=not_negative, default=0, help="of the split, the weights and the batches")
    add("--names", nargs="+", metavar="NAME", help="of the rows (default: the folders' paths)")
    add("--json", metavar="FILE", help="write {name: {layer: [error rate, standard error, EER]}}")
    return parser


def split_speakers(ids, seed):
    """Utterance ids -> (training ids, test ids), half of every speaker's in each."""
    speakers = {}
    for utt_id in sorted(ids):
        speakers.setdefault(speaker_of(utt_id), []).append(utt_id)
    if len(speakers) < 2:
        raise UserError(f"only one speaker: {min(speakers)}")
    random = np.random.default_rng(seed)
    train, test = [], []
    for speaker, utterances in speakers.items():
        if len(utterances) < 4:  # two in each half, to make a pair
            raise UserError(f"speaker {speaker}: {len(utterances)} utterances, but 4 are needed")
        utterances = random.permutation(utterances).tolist()
        train += utterances[::2]
        test += utterances[1::2]
    return train, test


def equal_error_rate(scores, same):
    """The rate, 0 to 1, at which false rejections are as frequent as false acceptances.

    Args:
        scores: (N,), higher for pairs that are more alike.
        same: (N,) bool, whether the pair is from one speaker.
    """
    if same.all() or not same.any():
        raise UserError("equal error rate: needs pairs from one speaker and pairs from two")
    order = np.argsort(scores, kind="stable")
    scores, same = scores[order], same[order]
    last = np.append(scores[1:] != scores[:-1], True)  # no threshold separates equal scores
    rejected = np.append(0, np.cumsum(same)[last] / same.sum())
    accepted = np.append(1, 1 - np.cumsum(~same)[last] / (~same).sum())
    # rejected rises and accepted falls: interpolate linearly where they cross
    gap = rejected - accepted
    i = np.argmax(gap >= 0)
    weight = -gap[i - 1] / (gap[i] - gap[i - 1])
    return float(rejected[i - 1] + weight * (rejected[i] - rejected[i - 1]))


def cosine_pairs(x, speakers):
    """(U, H), (U,) speakers -> scores of all pairs, whether they are from one speaker."""
    x = torch.nn.functional.normalize(x, dim=1)
    i, j = np.triu_indices(len(x), k=1)
    return (x @ x.T).numpy()[i, j], speakers[i] == speakers[j]


def probe(features, train_ids, test_ids, layer, args):
    """One layer -> (classification error rate, its standard error, equal error rate), in %."""
    means = {utt_id: x[layer].float().mean(dim=0) for utt_id, x in features.items()}  # (H,)
    names = sorted(set(map(speaker_of, train_ids)))
    x, x_test = (torch.stack([means[utt_id] for utt_id in ids]) for ids in (train_ids, test_ids))
    y, y_test = (
        torch.tensor([names.index(speaker_of(utt_id)) for utt_id in ids])
        for ids in (train_ids, test_ids)
    )
    wrong = (phone_probe.fit(x, y, len(names), args.steps, args.seed)(x_test) != y_test).numpy()
    eer = equal_error_rate(*cosine_pairs(x_test - x.mean(dim=0), y_test.numpy()))
    return *phone_probe.error_rate(wrong, np.ones(len(wrong))), 100 * eer


def tables(errors):
    """{name: {layer: (error rate, standard error, EER)}} -> the two tables."""
    classification = phone_probe.table("speaker error rate, %", errors)
    return f"{classification}\n{phone_probe.table('equal error rate, %', errors, '{0[2]:.1f}')}"


def main(argv=None):
    parser = build_parser()
    args = parser.parse_args(argv)
    errors = {}
    names = phone_probe.row_names(args, args.features, parser)
    for name, folder in zip(names, args.features):
        features, layers = phone_probe.read_features(folder)
        ids = split_speakers(features, args.seed)
        sizes = f"training on {len(ids[0])} utterances, testing on {len(ids[1])}"
        print(f"{name}: {sizes}", file=sys.stderr)
        errors[name] = {layer: probe(features, *ids, i, args) for i, layer in enumerate(layers)}
    print(tables(errors), end="")
    if args.json:
        write_json(errors, args.json)


if __name__ == "__main__":
    run_main(main)
