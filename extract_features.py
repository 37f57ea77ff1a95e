"""Write the features that a trained APC model makes of a prepared folder.

    python extract_features.py --checkpoint logs/foo.dir/foo__epoch_100.model \\
        --data_dir data/dev-clean --save_dir features/dev-clean

Writes <save_dir>/<utt_id>.pt, float32 (frames, hidden size): the last layer's outputs, as in the
papers. With --layer all, (layers, frames, hidden size), a prenet's output first.
"""

import argparse
import os

from utils import UserError, add_residual_flags, choose_device, positive, run, setup_logging


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", required=True, metavar="FILE", help="any that load_pretrained.py reads")
    add_residual_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data_dir", required=True, metavar="DIR", help="folder from prepare_data.py")
    add("--save_dir", required=True, metavar="DIR", help="folder for the features")
    add("--layer", default="last", help="which layer: last, all, or a number from 0 (the lowest)")
    add = parser.add_argument_group("machine").add_argument
    add("--batch_size", type=positive, default=32, help="utterances at a time")
    add("--load_data_workers", type=int, default=2, help="processes that load data")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="auto", help="where to compute")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import torch
from tqdm import tqdm

import checkpoint
from datasets import BatchSampler, LibriSpeech, collate
from load_pretrained import load_pretrained, summary


def choose_layer(name, num_layers):
    """`last`, `all` or a number -> what indexes internal_reps. UserError lists what there is."""
    choices = {"last": -1, "all": slice(None)} | {str(i): i for i in range(num_layers)}
    if name not in choices:
        raise UserError(f"--layer {name}: this model has: {', '.join(choices)}")
    return choices[name]


def main(argv=None):
    args = build_parser().parse_args(argv)
    setup_logging()
    device = choose_device(args.device)
    model = load_pretrained(args.checkpoint, device, args.residual)
    num_layers = len(model.rnns) + (model.prenet is not None)
    layer = choose_layer(args.layer, num_layers)
    dataset = LibriSpeech(args.data_dir)
    if dataset.mel_dim != model.mel_dim:
        raise UserError(
            f"{args.data_dir}: its frames have {dataset.mel_dim} numbers, but the model "
            f"{args.checkpoint} reads {model.mel_dim}"
        )
    if os.path.exists(os.path.join(args.save_dir, "lengths.pkl")):
        raise UserError(f"{args.save_dir}: is a prepared folder: choose another --save_dir")
    os.makedirs(args.save_dir, exist_ok=True)
    print(
        f"extracting layer {args.layer} of {args.checkpoint} ({summary(model)}) for "
        f"{len(dataset)} utterances, {sum(dataset.lengths.values())} frames of {args.data_dir}, on "
        f"{device} -> {args.save_dir}"
    )
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=BatchSampler(dataset.frame_counts(), args.batch_size, shuffle=False),
        collate_fn=collate,
        num_workers=args.load_data_workers,
        pin_memory=device.type == "cuda",
    )
    with torch.inference_mode(), tqdm(total=len(dataset), unit="utt", dynamic_ncols=True) as bar:
        # The sampler's order is fixed, so that a second round tells which utterances a batch has.
        for (inputs, lengths), indices in zip(loader, loader.batch_sampler):
            inputs = inputs.to(device, non_blocking=True)
            _, internal_reps = model(inputs, lengths)
            features = internal_reps[layer].cpu()  # ((layers,) B, T, H)
            for i, index in enumerate(indices):
                utterance = features[..., i, : lengths[i], :].clone()
                checkpoint.save(
                    utterance, os.path.join(args.save_dir, dataset.ids[index]), sync=False
                )
            bar.update(len(indices))
    print(f"{args.save_dir}: {len(dataset)} utterances, the last one {tuple(utterance.shape)}")


if __name__ == "__main__":
    run(main)
