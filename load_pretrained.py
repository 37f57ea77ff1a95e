"""Load a trained APC model, whatever wrote it; as a script, say what it is.

    from load_pretrained import load_pretrained
    model = load_pretrained("logs/foo.dir/foo__epoch_100.model")

    python load_pretrained.py bs32-rhl3-rhs512-rd0-adam-res-ts3.pt

Reads bare state dicts, as train.py and the original release write them, and train.py's last.ckpt.
Nothing in a file is ever executed.
"""

import argparse
import json
import os
import re

from utils import PrenetConfig, RNNConfig, UserError, add_residual_flags, run


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="FILE", help="the model")
    add_residual_flags(parser)
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import torch

import checkpoint
from apc_model import APCModel

# The original release's names, like bs32-rhl3-rhs512-rd0-adam-res-ts3.pt
RELEASED_NAME = re.compile(r"bs\d+-rhl\d+-rhs\d+-rd[\d.]+-\w+(?P<residual>-res)?-ts\d+")
GATES = {3: "gru", 4: "lstm"}  # of a layer, stacked in its weights


def load_pretrained(path, device="cpu", residual=None):
    """Load a trained model.

    Args:
        path: a file that train.py or the original release wrote.
        device: where the model is wanted, as torch.device takes it.
        residual: whether the model has residual connections. Weights do not tell; None asks the
            config.json beside the file, then the file's name in the original's style.

    Returns:
        APCModel in eval mode, float32, with `requires_grad` as trained.

    Raises:
        UserError: the file is no APC model, carries code, or leaves open whether it is residual.
        OSError: it cannot be read.
    """
    weights, config = read_checkpoint(path)
    mel_dim, prenet_config, rnn_config = infer_configs(weights, path)
    if residual is None:
        residual = find_residual(path, config, prenet_config, rnn_config)
    model = APCModel(mel_dim, prenet_config, rnn_config._replace(residual=residual))
    copy_weights(model, weights, path)
    return model.to(device).eval()


def read_checkpoint(path):
    """A file -> (state dict with the original's names, its flags or None). Raises UserError."""
    value = checkpoint.load(path)
    flags = None
    if isinstance(value, dict) and "model" in value and "flags" in value:  # last.ckpt
        value, flags = value["model"], value["flags"]
    if not isinstance(value, dict) or not all(
        isinstance(name, str) and isinstance(weight, torch.Tensor) for name, weight in value.items()
    ):
        raise UserError(f"{path}: expected an APC model's weights, found {type(value).__name__}")
    return {name.removeprefix("module."): weight for name, weight in value.items()}, flags


def infer_configs(weights, path):
    """A state dict -> (mel_dim, PrenetConfig or None, RNNConfig), from names and shapes alone."""
    try:
        gate_units, hidden_size = weights["rnns.0.weight_hh_l0"].shape
        mel_dim = weights["postnet.layer.weight"].shape[0]
        rnn_type = GATES[gate_units / hidden_size]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not an APC model: expected weights like rnns.0.weight_hh_l0 and "
            f"postnet.layer.weight, found {', '.join(list(weights)[:3]) or 'none'} ({error})"
        ) from None
    prenet_layers = count_layers(weights, "prenet.layers.")
    prenet_config = None
    if prenet_layers:
        prenet_config = PrenetConfig(mel_dim, hidden_size, prenet_layers, 0.0)
    input_size = hidden_size if prenet_layers else mel_dim
    rnn_layers = count_layers(weights, "rnns.")
    rnn_config = RNNConfig(input_size, hidden_size, rnn_layers, 0.0, False, rnn_type)
    return mel_dim, prenet_config, rnn_config


def count_layers(weights, prefix):
    """The largest layer number in the names, plus one: a missing layer is found out later."""
    numbers = [re.match(re.escape(prefix) + r"(\d{1,3})\.", name) for name in weights]
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def copy_weights(model, weights, path):
    """load_state_dict(strict=True), with a one-line UserError that names the first difference."""
    expected = model.state_dict()
    for name in [*expected, *weights]:
        want, have = expected.get(name), weights.get(name)
        if want is None or have is None or want.shape != have.shape:
            raise UserError(f"{path}: {name}: expected {_shape(want)}, found {_shape(have)}")
    model.load_state_dict(weights)


def _shape(weight):
    return "no such weight" if weight is None else f"shape {tuple(weight.shape)}"


def load_weights(model, path):
    """Start `model` from a file's weights; UserError with the flags of train.py that differ."""
    weights, _ = read_checkpoint(path)
    mel_dim, prenet_config, rnn_config = infer_configs(weights, path)
    found = {
        "feature_dim": mel_dim,
        "prenet_num_layers": prenet_config.num_layers if prenet_config else 0,
        "rnn_type": rnn_config.rnn_type,
        "rnn_num_layers": rnn_config.num_layers,
        "rnn_hidden_size": rnn_config.hidden_size,
    }
    expected = {
        "feature_dim": model.mel_dim,
        "prenet_num_layers": len(model.prenet.layers) if model.prenet else 0,
        "rnn_type": type(model.rnns[0]).__name__.lower(),
        "rnn_num_layers": len(model.rnns),
        "rnn_hidden_size": model.rnns[0].hidden_size,
    }
    differing = [
        f"--{flag} is {expected[flag]}, but the file's is {found[flag]}"
        for flag in expected
        if expected[flag] != found[flag]
    ]
    if differing:
        raise UserError(f"{path}: its weights do not fit the flags: {'; '.join(differing)}")
    copy_weights(model, weights, path)


def find_residual(path, flags, prenet_config, rnn_config):
    """Whether a model is residual, from its flags, its config.json or its name; else UserError."""
    config_path = os.path.join(os.path.dirname(path), "config.json")
    if flags is None and os.path.exists(config_path):
        flags = read_config(config_path)
        own = {
            "prenet_num_layers": prenet_config.num_layers if prenet_config else 0,
            "rnn_num_layers": rnn_config.num_layers,
            "rnn_hidden_size": rnn_config.hidden_size,
            "rnn_type": rnn_config.rnn_type,
        }
        for flag, value in own.items():
            if flags.get(flag, value) != value:
                raise UserError(
                    f"{config_path}: {flag} is {flags[flag]}, but {path} has {value}: it is "
                    "another model's: move it, or give --residual or --no_residual"
                )
    if flags is not None and isinstance(flags.get("rnn_residual"), bool):
        return flags["rnn_residual"]
    name = RELEASED_NAME.match(os.path.basename(path))
    if name:
        return name["residual"] is not None
    raise UserError(
        f"{path}: weights do not tell whether the model has residual connections, and there is no "
        "config.json beside them: give --residual or --no_residual (in Python, residual=...)"
    )


def read_config(path):
    """config.json -> dict. UserError if it is none."""
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected the flags of a run, found {type(config).__name__}")
    return config


def summary(model):
    """An APCModel in one line."""
    rnn = model.rnns[0]
    prenet = f"prenet of {len(model.prenet.layers)} layers" if model.prenet else "no prenet"
    return (
        f"{len(model.rnns)} {type(rnn).__name__} layers of {rnn.hidden_size} units, "
        f"{'residual' if model.rnn_residual else 'not residual'}, {prenet}, "
        f"mel_dim {model.mel_dim}, {sum(p.numel() for p in model.parameters()):,} parameters"
    )


def main(argv=None):
    args = build_parser().parse_args(argv)
    model = load_pretrained(args.checkpoint, residual=args.residual)
    rnn = model.rnns[0]
    rows = {
        "checkpoint": args.checkpoint,
        "RNN layers": len(model.rnns),
        "RNN type": type(rnn).__name__,
        "hidden size": rnn.hidden_size,
        "residual": "yes" if model.rnn_residual else "no",
        "prenet": f"{len(model.prenet.layers)} layers" if model.prenet else "none",
        "mel_dim": model.mel_dim,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }
    for name, value in rows.items():
        print(f"{name + ':':14}{value}")


if __name__ == "__main__":
    run(main)
