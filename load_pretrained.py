"""Load a trained APC model, whatever wrote it; as a script, say what it is or convert it.

    from load_pretrained import load_pretrained
    model = load_pretrained("logs/foo.dir/foo__epoch_100.model")

    python load_pretrained.py bs32-rhl3-rhs512-rd0-adam-res-ts3.pt
    python load_pretrained.py logs/foo.dir/foo__epoch_100.model --to_s3prl foo.ckpt

Reads bare state dicts, as train.py and the original release write them, train.py's last.ckpt, and
the checkpoints of s3prl (apc_360hr.ckpt, apc_960hr.ckpt). Nothing in a file is ever executed.
"""

import argparse
import math
import os
import re

from utils import (
    CMVN_KINDS,
    HelpFormatter,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    add_residual_flags,
    run,
    setup_logging,
)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=HelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="FILE", help="the model")
    add_residual_flags(parser)
    add = parser.add_argument_group("conversion").add_argument
    add("--to_s3prl", metavar="OUT", help="write it for s3prl's apc_local upstream")
    add("--to_state_dict", metavar="OUT", help="write bare weights, and config.json beside them")
    return parser


if __name__ == "__main__":
    build_parser().parse_args()  # --help must not wait for torch

import logging
from dataclasses import asdict

import numpy as np
import torch

import checkpoint
from apc_model import APCModel
from audio import FbankConfig

# The original release's names, like bs32-rhl3-rhs512-rd0-adam-res-ts3.pt
RELEASED_NAME = re.compile(r"bs\d+-rhl\d+-rhs\d+-rd[\d.]+-\w+(?P<residual>-res)?-ts\d+")
GATES = {3: "gru", 4: "lstm"}  # of a layer, stacked in its weights


def load_pretrained(path, device="cpu", residual=None):
    """Load a trained model.

    Args:
        path: a file that train.py, the original release or s3prl wrote.
        device: where the model is wanted, as torch.device takes it.
        residual: whether the model has residual connections. Weights do not tell; None asks the
            file, the config.json beside it, then the file's name in the original's style.

    Returns:
        APCModel in eval mode, in float32.

    Raises:
        UserError: the file is no APC model, carries code, or leaves open whether it is residual.
        OSError: it cannot be read.
    """
    return load_with_config(path, device, residual)[0]


def load_with_config(path, device="cpu", residual=None):
    """load_pretrained(), and what is known of the model's making -> (model, dict of flags).

    The flags are those of train.py's config.json, as far as they are known. `data` is a list of
    what prepare_data.py says of the training data (prepared.json), or of None.
    """
    weights, config = read_checkpoint(path)
    mel_dim, prenet_config, rnn_config = infer_configs(weights, path)
    found = model_flags(mel_dim, prenet_config, rnn_config)
    if config is None or "data" not in config:
        config = (read_config(path, found) or {}) | (config or {})
    if residual is None:
        residual = find_residual(path, config)
    model = APCModel(mel_dim, prenet_config, rnn_config._replace(residual=residual))
    copy_weights(model, weights, path)
    return model.to(device).eval(), config | found | {"rnn_residual": residual}


def read_checkpoint(path):
    """A file -> (state dict with the original's names, its flags or None). Raises UserError."""
    value, flags, config = checkpoint.load(path, verify=True), None, None
    if isinstance(value, dict) and "model" in value:
        if isinstance(value.get("flags"), dict):  # last.ckpt
            flags = value["flags"] | ({"data": value["data"]} if "data" in value else {})
        else:
            config = value.get("config")  # s3prl's
        value = value["model"]
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an APC model's weights, found {type(value).__name__}")
    weights = {}
    for name, weight in value.items():
        if not (isinstance(name, str) and checkpoint.is_plain(weight)):
            raise UserError(f"{path}: {name!r}: expected a weight, a plain tensor of floats")
        weights[name.removeprefix("module.")] = weight
    return from_s3prl(weights, config, path) if config is not None else (weights, flags)


def infer_configs(weights, path):
    """A state dict -> (mel_dim, PrenetConfig or None, RNNConfig), from names and shapes alone."""
    try:
        gate_units, hidden_size = weights["rnns.0.weight_hh_l0"].shape
        mel_dim = weights["postnet.layer.weight"].shape[0]
        if not mel_dim:
            raise ValueError("frames of no numbers")
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


def model_flags(mel_dim, prenet_config, rnn_config):
    """What weights tell of train.py's flags."""
    return {
        "feature_dim": mel_dim,
        "prenet_num_layers": prenet_config.num_layers if prenet_config else 0,
        "rnn_type": rnn_config.rnn_type,
        "rnn_num_layers": rnn_config.num_layers,
        "rnn_hidden_size": rnn_config.hidden_size,
    }


def load_weights(model, path):
    """Start `model` from a file's weights; UserError with the flags of train.py that differ."""
    weights, _ = read_checkpoint(path)
    found = model_flags(*infer_configs(weights, path))
    expected = model_flags(*infer_configs(model.state_dict(), path))
    differing = [
        f"--{flag} is {expected[flag]}, but the file's is {found[flag]}"
        for flag in expected
        if expected[flag] != found[flag]
    ]
    if differing:
        raise UserError(f"{path}: its weights do not fit the flags: {'; '.join(differing)}")
    copy_weights(model, weights, path)


def read_config(path, found):
    """The config.json beside a model -> dict, or None. UserError if it is another model's."""
    config_path = os.path.join(os.path.dirname(path), "config.json")
    config = checkpoint.read_json(config_path)
    if config is None:
        return None
    for flag, value in found.items():
        if config.get(flag, value) != value:
            raise UserError(
                f"{config_path}: {flag} is {config[flag]}, but {path} has {value}: it belongs to "
                "another model: keep them in separate folders"
            )
    return config


def training_data(config, name):
    """A model's flags -> prepared.json of what it was trained on, or None where nobody knows."""
    data = config.get("data") or [None]
    try:
        first = data[0]
        if first is None:
            return None
        from_audio = first["source"] == "audio"
        cmvn = first["cmvn"] if from_audio else first.get("cmvn", "none")
        if cmvn not in CMVN_KINDS:
            raise ValueError(f"cmvn {cmvn!r}")
        if from_audio or first.get("fbank") is not None:
            fbank = FbankConfig(**first["fbank"])
        if from_audio and cmvn == "global":
            stats = np.array(first["cmvn_stats"], np.float64)
            if stats.shape != (2, fbank.num_mel_bins + 1) or not stats[0, -1] >= 1:
                raise ValueError("cmvn_stats")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(f"{name}: config.json: its data lacks or mistakes {error}") from None
    return first


def find_residual(path, config):
    """Whether a model is residual, from its flags or its name; else UserError."""
    if isinstance(config.get("rnn_residual"), bool):
        return config["rnn_residual"]
    name = RELEASED_NAME.match(os.path.basename(path))
    if name:
        return name["residual"] is not None
    raise UserError(
        f"{path}: weights do not tell whether the model has residual connections, and there is no "
        "config.json beside them: give --residual or --no_residual (in Python, residual=...)"
    )


# s3prl --------------------------------------------------------------------------------------------

# s3prl computes features with torchaudio's Kaldi fbank, from samples in [-1, 1].
S3PRL_FBANK = {"window_type": "hamming", "htk_compat": False, "full_scale": 1.0}


def from_s3prl(weights, config, path):
    """s3prl's weights and config -> (state dict with the original's names, flags)."""
    try:
        sound, paras = config["data"]["audio"], config["model"]["paras"]
        if paras.get("vq") or any(name.startswith("vq_layers.") for name in weights):
            raise UserError(f"{path}: is a VQ-APC model, which has layers that APC has not")
        flags = {"rnn_residual": bool(paras["residual"]), "rnn_dropout": float(paras["dropout"])}
        if flags["rnn_residual"] and paras["hidden_size"] == sound["feat_dim"]:
            # Its residual connections never reach the first layer; ours would.
            raise UserError(f"{path}: residual with hidden_size = feat_dim is another model here")
        if sound["feat_type"] != "fbank":
            raise UserError(f"{path}: features are {sound['feat_type']!r}, expected 'fbank'")
        fbank = FbankConfig(
            num_mel_bins=int(sound["feat_dim"]),
            frame_length_ms=float(sound.get("frame_length", 25)),
            frame_shift_ms=float(sound.get("frame_shift", 10)),
            **S3PRL_FBANK,
        )
        names = {"rnn_layers.": "rnns.", "postnet.": "postnet.layer."}
        renamed = {}
        for name, weight in weights.items():
            for old, new in names.items():
                if name.startswith(old):
                    name = new + name.removeprefix(old)
                    break
            renamed[name] = weight
        if "postnet.layer.weight" in renamed:  # of a linear layer; the original's is a Conv1d
            renamed["postnet.layer.weight"] = renamed["postnet.layer.weight"][:, :, None]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(
            f"{path}: expected s3prl's config of an APC model, but it lacks or mistakes {error}"
        ) from None
    cmvn = "utterance" if sound.get("cmvn", True) else "none"
    flags["data"] = [{"source": "audio", "fbank": asdict(fbank), "cmvn": cmvn}]
    return renamed, flags


def to_s3prl(model, config):
    """A model and its flags -> what s3prl's apc_local loads. UserError if s3prl has no such model.

    s3prl's APC has GRU layers alone, residual connections from the second layer on, and features of
    Kaldi's fbank, normalised by utterance or not at all.
    """
    hidden_size = model.rnns[0].hidden_size
    refused = {
        "its layers are LSTMs": not isinstance(model.rnns[0], torch.nn.GRU),
        "it has a prenet": model.prenet is not None,
        "its first layer is residual": model.rnn_residual and model.mel_dim == hidden_size,
    }
    if len(model.rnns) < 3:
        logging.warning("s3prl's apc_local takes the features of layers 1 and 2: this has fewer")
    data = training_data(config, "the model") or {}
    fbank = FbankConfig(num_mel_bins=model.mel_dim)
    if data.get("fbank"):
        fbank = FbankConfig(**data["fbank"])
        own = {"frame_length_ms": fbank.frame_length_ms, "frame_shift_ms": fbank.frame_shift_ms}
        # A constant, which CMVN takes away or the weights take up, and what is of no weight here.
        ignored = {"full_scale": 1.0, "dither": 0.0, "htk_compat": False}
        same = FbankConfig(num_mel_bins=model.mel_dim, **own, **ignored)
        refused["its fbank is another"] = FbankConfig(**asdict(fbank) | ignored) != same
    for reason, holds in refused.items():
        if holds:
            raise UserError(f"s3prl cannot express this model: {reason}")
    cmvn = data.get("cmvn")
    if data.get("source") != "audio":
        # Dumps and archives come normalised, as the original's did; "none" adds nothing to that.
        logging.warning(
            "how the features that the model was trained on were made is not known: s3prl will "
            "take the original's fbank settings, and normalise by utterance"
        )
        cmvn = cmvn if cmvn in ("speaker", "global") else "utterance"
    if cmvn in ("speaker", "global"):
        logging.warning(
            "the model was trained on features normalised by %s; s3prl normalises by utterance",
            {"speaker": "speaker", "global": "corpus"}[cmvn],
        )
    names = {"rnns.": "rnn_layers.", "postnet.layer.": "postnet."}
    weights = {}
    for name, weight in model.state_dict().items():
        for old, new in names.items():
            if name.startswith(old):
                weights[new + name.removeprefix(old)] = weight.cpu()
    weights["postnet.weight"] = weights["postnet.weight"][:, :, 0].clone()
    if cmvn == "none":  # our log energies lie above s3prl's: let the weights take that up
        shift = 2 * math.log(fbank.full_scale)
        first = weights["rnn_layers.0.weight_ih_l0"]
        weights["rnn_layers.0.bias_ih_l0"] = weights["rnn_layers.0.bias_ih_l0"] + shift * first.sum(
            1
        )
        weights["postnet.bias"] = weights["postnet.bias"] - shift
    sound = {
        "feat_type": "fbank",
        "feat_dim": model.mel_dim,
        "frame_length": fbank.frame_length_ms,
        "frame_shift": fbank.frame_shift_ms,
        "decode_wav": False,
        "cmvn": cmvn != "none",
    }
    paras = {
        "num_layers": len(model.rnns),
        "hidden_size": hidden_size,
        "dropout": float(config.get("rnn_dropout") or 0.0),
        "residual": bool(model.rnn_residual),
    }
    return {"model": weights, "config": {"data": {"audio": sound}, "model": {"paras": paras}}}


# The script ---------------------------------------------------------------------------------------


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
    setup_logging()
    model, config = load_with_config(args.checkpoint, residual=args.residual)
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
    outs = [args.to_s3prl] if args.to_s3prl else []
    if args.to_state_dict:
        config_path = os.path.join(os.path.dirname(args.to_state_dict), "config.json")
        outs += [args.to_state_dict, config_path]
    for out in outs:
        if os.path.exists(out) or len({os.path.abspath(path) for path in outs}) < len(outs):
            raise UserError(f"{out}: exists already, or is to be two files: choose another name")
    exported = to_s3prl(model, config) if args.to_s3prl else None  # or an error: first of all
    for out in outs:
        os.makedirs(os.path.dirname(out) or ".", exist_ok=True)
    if args.to_s3prl:
        checkpoint.save(exported, args.to_s3prl)
        print(f"written for s3prl: {args.to_s3prl}")
    if args.to_state_dict:
        checkpoint.save(model.state_dict(), args.to_state_dict)
        checkpoint.write_json(config | {"version": __version__}, config_path)
        print(f"written: {args.to_state_dict} and {config_path}")


if __name__ == "__main__":
    run(main)
