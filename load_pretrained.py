"""Load a trained APC model, whatever wrote it; as a script, say what it is or convert it.

    from load_pretrained import load_pretrained
    model = load_pretrained("logs/foo.dir/foo__epoch_100.model")

    python load_pretrained.py bs32-rhl3-rhs512-rd0-adam-res-ts3.pt
    python load_pretrained.py logs/foo.dir/foo__epoch_100.model --to_s3prl foo.ckpt
    python load_pretrained.py logs/foo.dir/foo__epoch_100.model --to_onnx foo.onnx

Reads bare state dicts, as train.py and the original release write them, train.py's last.ckpt, the
checkpoints of s3prl (apc_360hr.ckpt, apc_960hr.ckpt) and of NPC's APC, with or without their
configs, and any of these weights in .safetensors. Nothing in a file is ever executed.
"""

import argparse
import logging
import os
import re

import numpy as np
import torch
from torch import Tensor

from apc_model import APCModel
from formats.fbank import CMVN_KINDS, fbank_settings
from formats.onnx import to_onnx
from formats.s3prl import from_s3prl, rename_s3prl, to_s3prl
from utils import (
    HelpFormatter,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    atomic_write,
    is_plain,
    load,
    read_json,
    run_main,
    save,
    setup_logging,
    write_json,
)

# The original release's names, like bs32-rhl3-rhs512-rd0-adam-res-ts3.pt
RELEASED_NAME = re.compile(r"bs\d+-rhl\d+-rhs\d+-rd[\d.]+-\w+(?P<residual>-res)?-ts\d+")
GATES = {3: "gru", 4: "lstm"}  # of a layer, stacked in its weights


def load_pretrained(
    path: str | os.PathLike, device: str | torch.device = "cpu", residual: bool | None = None
) -> APCModel:
    """Load a trained model.

    Args:
        path: a file that train.py, the original release or s3prl wrote.
        device: where the model is wanted, as torch.device takes it.
        residual: whether the model has residual connections. Weights do not tell; None asks the
            file, the config.json beside it, then the file's name in the original's style.

    Returns:
        APCModel in eval mode, in float32.

    Raises:
        UserError: the file is no APC model, carries code, or does not say whether it is residual.
        OSError: it cannot be read.
    """
    return load_with_config(path, device, residual)[0]


def load_with_config(
    path: str | os.PathLike, device: str | torch.device = "cpu", residual: bool | None = None
) -> tuple[APCModel, dict]:
    """load_pretrained(), and how the model was made -> (model, dict of flags).

    The flags are those of train.py's config.json, as far as they are known. `data` is a list of the
    training folders' prepared.json, None where there is none.
    """
    weights, config = read_checkpoint(path)
    mel_dim, prenet_config, rnn_config = infer_configs(weights, path)
    found = model_flags(mel_dim, prenet_config, rnn_config)
    if "data" not in config:
        config = read_config(path, found) | config
    if residual is None:
        residual = find_residual(path, config)
    residual_first = config.pop("residual_first", True)
    if residual and not residual_first and mel_dim == rnn_config.hidden_size:
        raise UserError(f"{path}: residual with hidden size = mel_dim is another model in s3prl")
    model = APCModel(mel_dim, prenet_config, rnn_config._replace(residual=residual))
    copy_weights(model, weights, path)
    return model.to(device).eval(), config | found | {"rnn_residual": residual}


def read_checkpoint(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """A file -> (state dict with the original's names, the flags in the file)."""
    is_safetensors = os.fspath(path).endswith(".safetensors")
    value = load_safetensors(path) if is_safetensors else load(path, verify=True)
    flags, config = {}, None
    if isinstance(value, dict) and "model" in value:
        if isinstance(value.get("flags"), dict):  # last.ckpt
            flags = value["flags"] | ({"data": value["data"]} if "data" in value else {})
        else:  # s3prl's, under another name in 2021; NPC's checkpoints have none
            config = value.get("config", value.get("Upstream_Config"))
        value = value["model"]
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an APC model's weights, found {type(value).__name__}")
    weights = {}
    for name, weight in value.items():
        if not (isinstance(name, str) and is_plain(weight)):
            raise UserError(f"{path}: {name!r}: expected a weight, a plain tensor of floats")
        # DataParallel's and torch.compile's prefixes
        weights[re.sub(r"^(module\.|_orig_mod\.)+", "", name)] = weight
    if config is not None:
        return from_s3prl(weights, config, path)
    renamed = rename_s3prl(weights, path)
    return renamed, flags if renamed is weights else {"residual_first": False}


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """A .safetensors file -> its tensors by name. UserError if it is damaged."""
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:  # the latter may not name the file
        raise UserError(f"{path}: not a file of plain tensors: {error}") from None


def infer_configs(weights: dict, path: str) -> tuple[int, PrenetConfig | None, RNNConfig]:
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
    prenet = PrenetConfig(mel_dim, hidden_size, prenet_layers, 0.0) if prenet_layers else None
    input_size = hidden_size if prenet_layers else mel_dim
    rnn_layers = count_layers(weights, "rnns.")
    rnn = RNNConfig(input_size, hidden_size, rnn_layers, 0.0, False, rnn_type)
    return mel_dim, prenet, rnn


def count_layers(weights: dict, prefix: str) -> int:
    """The largest layer number in the names, plus one: copy_weights() notices missing layers."""
    numbers = [re.match(re.escape(prefix) + r"(\d{1,3})\.", name) for name in weights]
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def copy_weights(model: APCModel, weights: dict, path: str) -> None:
    """model.load_state_dict(), with a one-line UserError that names the differences."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        differences = " ".join(" ".join(str(error).splitlines()[1:]).split())
        raise UserError(f"{path}: not the weights of an APC model: {differences}") from None


def model_flags(mel_dim: int, prenet_config: PrenetConfig | None, rnn_config: RNNConfig) -> dict:
    """Those of train.py's flags that follow from the weights."""
    return {
        "feature_dim": mel_dim,
        "prenet_num_layers": prenet_config.num_layers if prenet_config else 0,
        "rnn_type": rnn_config.rnn_type,
        "rnn_num_layers": rnn_config.num_layers,
        "rnn_hidden_size": rnn_config.hidden_size,
    }


def read_config(path: str, found: dict) -> dict:
    """The config.json beside a model; {} if there is none, or it is another model's.

    Raises:
        UserError: it contradicts the weights.
    """
    path = os.path.realpath(path)  # of a link, what it points to
    config_path = os.path.join(os.path.dirname(path), "config.json")
    config = read_json(config_path) or {}
    # train.py's names its experiment, and --to_state_dict's the file that it was written with.
    name = config.get("state_dict") or config.get("experiment_name")
    if name and not re.fullmatch(
        rf"{re.escape(str(name))}(__epoch_\d+\.model)?", os.path.basename(path)
    ):
        logging.warning("%s: belongs to %s, and is not used for %s", config_path, name, path)
        return {}
    for flag, value in found.items():
        if config.get(flag, value) != value:
            raise UserError(
                f"{config_path}: {flag} is {config[flag]}, but {path} has {value}: keep models in "
                "separate folders, each with its own config.json"
            )
    return config


def training_data(config: dict, name: str) -> dict | None:
    """A model's flags -> prepared.json of what it was trained on, or None if unknown."""
    try:
        first = (config.get("data") or [None])[0]
        if first is None:
            return None
        from_audio = first["source"] == "audio"
        cmvn = first["cmvn"] if from_audio else first.get("cmvn", "none")
        if cmvn not in CMVN_KINDS:
            raise ValueError(f"cmvn {cmvn!r}")
        for key in ("norm_vars", "unbiased_vars"):
            if not isinstance(first.get(key, False), bool):
                raise ValueError(f"{key} {first[key]!r}")
        if from_audio or first.get("fbank") is not None:
            # Every option, of old files too; TypeError if it is no dict.
            first = first | {"fbank": fbank_settings({} | first["fbank"])}
        if from_audio and cmvn == "global":
            stats = np.array(first["cmvn_stats"], np.float64)
            is_finite = np.isfinite(stats).all() and stats[0, -1] >= 1
            if not is_finite or stats.shape != (2, first["fbank"]["num_mel_bins"] + 1):
                raise ValueError("cmvn_stats")
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{name}: config.json: its entry on the training data is incomplete or wrong: {error}"
        ) from None
    return first


def find_residual(path: str, config: dict) -> bool:
    """Whether a model is residual, from its flags or its name; else UserError."""
    if isinstance(config.get("rnn_residual"), bool):
        return config["rnn_residual"]
    name = RELEASED_NAME.match(os.path.basename(path))
    if name:
        return name["residual"] is not None
    raise UserError(
        f"{path}: weights do not show whether a model has residual connections, and no config.json "
        "beside them says so: give --residual or --no_residual (in Python, residual=...)"
    )


# The script ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Load a trained APC model: say what it is, or convert it.",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="FILE", help="the model")
    add_residual_flags(parser)
    add = parser.add_argument_group("conversion").add_argument
    add("--to_s3prl", metavar="OUT", help="write it for s3prl's apc_local upstream")
    add("--to_onnx", metavar="OUT", help="write it for ONNX Runtime, as it streams")
    add("--to_state_dict", metavar="OUT", help="write bare weights, and config.json beside them")
    return parser


def add_residual_flags(parser: argparse.ArgumentParser) -> None:
    """--residual and --no_residual, for models that do not say."""
    add = parser.add_mutually_exclusive_group().add_argument
    default = "what its config.json or name says"
    yes, no = f"the model has residual connections (default: {default})", "the model has none"
    add("--residual", action="store_true", default=None, help=yes)
    add("--no_residual", dest="residual", action="store_false", help=no)


def describe(model: APCModel) -> dict:
    """What a model is, for people."""
    rnn = model.rnns[0]
    return {
        "RNN layers": len(model.rnns),
        "RNN type": type(rnn).__name__,
        "hidden size": rnn.hidden_size,
        "residual": "yes" if model.rnn_residual else "no",
        "prenet": f"{len(model.prenet.layers)} layers" if model.prenet else "none",
        "mel_dim": model.mel_dim,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
    }


def summary(model: APCModel) -> str:
    """The same in one line."""
    return ", ".join(f"{name} {value}" for name, value in describe(model).items())


def write_bytes(content: bytes, path: str) -> None:
    with atomic_write(path) as file:
        file.write(content)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    setup_logging()
    model, config = load_with_config(args.checkpoint, residual=args.residual)
    for name, value in ({"checkpoint": args.checkpoint} | describe(model)).items():
        print(f"{name + ':':14}{value}")
    if not (args.to_s3prl or args.to_onnx or args.to_state_dict):
        return
    data = training_data(config, args.checkpoint)
    made = []  # (function that writes, what, path): nothing is written until all is made
    if args.to_s3prl:
        exported = to_s3prl(model, data or {}, config.get("rnn_dropout", 0))
        made.append((save, exported, args.to_s3prl))
    if args.to_onnx:
        about = {"mel_dim": model.mel_dim, "time_shift": config.get("time_shift"), "data": data}
        made.append((write_bytes, to_onnx(model, about), args.to_onnx))
    if args.to_state_dict:
        about = {"state_dict": os.path.basename(args.to_state_dict), "version": __version__}
        if data:  # with every option in force
            about["data"] = [data, *config["data"][1:]]
        config_path = os.path.join(os.path.dirname(args.to_state_dict), "config.json")
        made.append((save, model.state_dict(), args.to_state_dict))
        made.append((write_json, config | about, config_path))
    paths = [os.path.abspath(path) for _, _, path in made]
    for path in paths:
        if os.path.exists(path) or paths.count(path) > 1:
            raise UserError(f"{path}: exists already, or is named twice: choose another name")
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
    for write, value, path in made:
        write(value, path)
        print(f"written: {path}")


if __name__ == "__main__":
    run_main(main)
