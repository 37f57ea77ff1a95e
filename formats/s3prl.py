"""s3prl's checkpoints of APC, in and out (apc_360hr.ckpt, apc_960hr.ckpt, its upstream apc_local).

s3prl computes features with torchaudio's Kaldi fbank, from samples in [-1, 1], and normalises by
utterance or not at all. Its APC has GRU layers alone, with residual connections from the second
layer on, and a linear layer where the original release has a convolution of kernel 1.
"""

import logging
import math

import torch
from torch import Tensor

from apc_model import APCModel
from formats.audio import fbank_settings
from utils import UserError

S3PRL_FBANK = {"window_type": "hamming", "htk_compat": False, "full_scale": 1.0}
# Of no effect on a model here: a constant, which CMVN removes or the weights absorb, and noise.
IGNORED = {"full_scale": 1.0, "htk_compat": False, "dither": 0.0}
FROM_S3PRL = {"rnn_layers.": "rnns.", "postnet.": "postnet.layer."}


def rename(weights: dict, prefixes: dict[str, str]) -> dict:
    """Replace the first of `prefixes` with which a weight's name starts."""
    renamed = {}
    for name, weight in weights.items():
        for old, new in prefixes.items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = weight
    return renamed


def from_s3prl(weights: dict, config: dict, path: str) -> tuple[dict[str, Tensor], dict]:
    """s3prl's weights and config -> (state dict with the original's names, flags).

    Raises:
        UserError: it is another model than APC, or its config is incomplete.
    """
    try:
        sound, paras = config["data"]["audio"], config["model"]["paras"]
        if paras.get("vq") or any(name.startswith("vq_layers.") for name in weights):
            raise UserError(f"{path}: is a VQ-APC model, which has extra layers")
        flags = {"rnn_residual": bool(paras["residual"]), "rnn_dropout": float(paras["dropout"])}
        if flags["rnn_residual"] and paras["hidden_size"] == sound["feat_dim"]:
            # Its residual connections never reach the first layer; ours would.
            raise UserError(f"{path}: residual with hidden_size = feat_dim is another model here")
        if sound["feat_type"] != "fbank":
            raise UserError(f"{path}: features are {sound['feat_type']!r}, expected 'fbank'")
        fbank = {
            "num_mel_bins": int(sound["feat_dim"]),
            "frame_length_ms": float(sound.get("frame_length", 25)),
            "frame_shift_ms": float(sound.get("frame_shift", 10)),
            **S3PRL_FBANK,
        }
        weights = rename(weights, FROM_S3PRL)
        if "postnet.layer.weight" in weights:
            weights["postnet.layer.weight"] = weights["postnet.layer.weight"][:, :, None]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: missing or invalid in s3prl's config: {error}") from None
    cmvn = "utterance" if sound.get("cmvn", True) else "none"
    flags["data"] = [{"source": "audio", "fbank": fbank, "cmvn": cmvn}]
    return weights, flags


def to_s3prl(model: APCModel, data: dict, dropout: float) -> dict:
    """A model -> what torch.save writes for s3prl's apc_local.

    Args:
        model: the model.
        data: prepared.json of what it was trained on; empty if that is not known.
        dropout: of its RNN layers, in training.

    Raises:
        UserError: s3prl has no such model.
    """
    fbank = fbank_settings({"num_mel_bins": model.mel_dim} | (data.get("fbank") or {}))
    refuse_what_s3prl_lacks(model, fbank)
    cmvn = choose_cmvn(data)
    weights = {name: weight.cpu() for name, weight in model.state_dict().items()}
    weights = rename(weights, {new: old for old, new in FROM_S3PRL.items()})
    weights["postnet.weight"] = weights["postnet.weight"][:, :, 0].clone()
    if cmvn == "none":
        absorb_scale(weights, fbank["full_scale"])
    sound = {
        "feat_type": "fbank",
        "feat_dim": model.mel_dim,
        "frame_length": fbank["frame_length_ms"],
        "frame_shift": fbank["frame_shift_ms"],
        "decode_wav": False,
        "cmvn": cmvn != "none",
    }
    paras = {
        "num_layers": len(model.rnns),
        "hidden_size": model.rnns[0].hidden_size,
        "dropout": dropout,
        "residual": bool(model.rnn_residual),
    }
    return {"model": weights, "config": {"data": {"audio": sound}, "model": {"paras": paras}}}


def refuse_what_s3prl_lacks(model: APCModel, fbank: dict) -> None:
    own = ("num_mel_bins", "frame_length_ms", "frame_shift_ms")
    expected = fbank_settings({name: fbank[name] for name in own} | IGNORED)
    first_is_residual = model.rnn_residual and model.mel_dim == model.rnns[0].hidden_size
    refused = {
        "its layers are LSTMs": not isinstance(model.rnns[0], torch.nn.GRU),
        "it has a prenet": model.prenet is not None,
        "its first layer is residual": first_is_residual,
        "its fbank is another": fbank | IGNORED != expected,
    }
    for reason, holds in refused.items():
        if holds:
            raise UserError(f"s3prl cannot express this model: {reason}")
    if len(model.rnns) < 3:
        logging.warning("s3prl's apc_local takes the features of layers 1 and 2: this has fewer")


def choose_cmvn(data: dict) -> str:
    """How s3prl will normalise: "utterance" or "none"."""
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
        cmvn = "utterance"
    return cmvn


def absorb_scale(weights: dict[str, Tensor], full_scale: float) -> None:
    """Change the first layer and the postnet, in place, for log energies of samples in [-1, 1]."""
    shift = 2 * math.log(full_scale)  # of log energies
    first = weights["rnn_layers.0.weight_ih_l0"]
    weights["rnn_layers.0.bias_ih_l0"] = weights["rnn_layers.0.bias_ih_l0"] + shift * first.sum(1)
    weights["postnet.bias"] = weights["postnet.bias"] - shift
