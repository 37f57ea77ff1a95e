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
from formats.fbank import S3PRL_FBANK, cmvn_settings, fbank_settings
from utils import UserError

# Of no effect on a model here: a constant, which CMVN removes or the weights absorb, and noise.
IGNORED = {"full_scale": 1.0, "htk_compat": False, "dither": 0.0}
FROM_S3PRL = {"rnn_layers.": "rnns.", "postnet.": "postnet.layer."}
# s3prl's audio settings, which it hands on to torchaudio.compliance.kaldi.fbank -> ours.
FBANK_NAMES = {
    "feat_dim": "num_mel_bins",
    "frame_length": "frame_length_ms",
    "frame_shift": "frame_shift_ms",
    "preemphasis_coefficient": "preemph_coeff",
    "blackman_coeff": "blackman_coeff",
    "dither": "dither",
    "low_freq": "low_freq",
    "high_freq": "high_freq",
    "remove_dc_offset": "remove_dc_offset",
    "round_to_power_of_two": "round_to_power_of_two",
    "snip_edges": "snip_edges",
    "use_log_fbank": "use_log_fbank",
    "use_power": "use_power",
}


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


def rename_s3prl(weights: dict, path: str) -> dict[str, Tensor]:
    """Weights of s3prl's, VQ-APC's or NPC's APC -> with the original's names; others as they are.

    Raises:
        UserError: a model with quantisation layers.
    """
    if any(name.startswith("vq_layers.") for name in weights):
        raise UserError(
            f"{path}: is a VQ-APC model: its quantisation layers are not supported, only plain APC"
        )
    if not any(name.startswith("rnn_layers.") for name in weights):
        return weights
    weights = rename(weights, FROM_S3PRL)
    postnet = weights.get("postnet.layer.weight")
    if postnet is not None and postnet.dim() == 2:  # a linear layer
        weights["postnet.layer.weight"] = postnet[:, :, None]
    return weights


def from_s3prl(weights: dict, config: dict, path: str) -> tuple[dict[str, Tensor], dict]:
    """s3prl's weights and config -> (state dict with the original's names, flags).

    Raises:
        UserError: it is another model than APC, or its config is incomplete or unknown.
    """
    weights = rename_s3prl(weights, path)
    try:
        sound, paras = dict(config["data"]["audio"]), config["model"]["paras"]
        if paras.get("vq"):
            raise UserError(f"{path}: is a VQ-APC model, which is not supported, only plain APC")
        flags = {"rnn_residual": bool(paras["residual"]), "rnn_dropout": float(paras["dropout"])}
        flags["residual_first"] = False  # its residual connections never reach the first layer
        feat_type = sound.pop("feat_type")
        if feat_type != "fbank":
            raise UserError(f"{path}: features are {feat_type!r}, expected 'fbank'")
        sound.pop("decode_wav", None)
        cmvn = "utterance" if sound.pop("cmvn", True) else "none"
        fbank = {"num_mel_bins": int(sound["feat_dim"])} | S3PRL_FBANK
        for name, value in sound.items():
            if name not in FBANK_NAMES:
                raise UserError(f"{path}: {name}: an audio setting that is not supported")
            if not isinstance(value, int | float):
                raise ValueError(f"{name} {value!r}")
            fbank[FBANK_NAMES[name]] = value
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise UserError(f"{path}: missing or invalid in s3prl's config: {error}") from None
    data = {"source": "audio", "fbank": fbank, "cmvn": cmvn}
    if cmvn == "utterance":
        data |= {"norm_vars": True, "unbiased_vars": True}
    flags["data"] = [data]
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
    if not isinstance(dropout, int | float):
        raise UserError(f"config.json: rnn_dropout is {dropout!r}, expected a number")
    fbank = fbank_settings({"num_mel_bins": model.mel_dim} | (data.get("fbank") or {}))
    refuse_what_s3prl_lacks(model, fbank)
    cmvn = choose_cmvn(data, fbank)
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
    own = {name: fbank[name] for name in ("frame_length_ms", "frame_shift_ms")}
    expected = fbank_settings(own | {"num_mel_bins": model.mel_dim} | IGNORED)
    refused = {
        "its layers are LSTMs": not isinstance(model.rnns[0], torch.nn.GRU),
        "it has a prenet": model.prenet is not None,
        "its first layer is residual": (
            model.rnn_residual and model.mel_dim == model.rnns[0].hidden_size
        ),
        "its fbank is another": fbank | IGNORED != expected,
        "it has fewer than three layers, and apc_local takes outputs of three": len(model.rnns) < 3,
    }
    for reason, holds in refused.items():
        if holds:
            raise UserError(f"s3prl cannot express this model: {reason}")
    if len(model.rnns) > 3:
        logging.warning(
            "s3prl's apc_local gives the outputs of layers 1, 2 and %d", len(model.rnns)
        )


def choose_cmvn(data: dict, fbank: dict) -> str:
    """How s3prl will normalise, "utterance" or "none"; warns if the model was trained otherwise."""
    cmvn, options = cmvn_settings(data)
    if data.get("source") != "audio":
        # Dumps and archives come normalised, as the original's did.
        logging.warning(
            "how the features that the model was trained on were made is not known: s3prl will "
            "take the original's fbank settings, and normalise mean and variance by utterance"
        )
        return "utterance"
    is_same = cmvn == "none" or (cmvn == "utterance" and options["norm_vars"])
    if not is_same:
        logging.warning(
            "the model was trained on features normalised by %s (%s); s3prl normalises mean and "
            "variance by utterance: its features will be others (in a test, by 80 %% of their "
            "rms). Models that agree are trained on what prepare_data.py --as_s3prl makes",
            cmvn,
            "mean and variance" if options["norm_vars"] else "mean",
        )
    elif fbank["full_scale"] != 1:
        logging.warning(
            "s3prl's log energies have a higher floor than those that the model was trained on: "
            "its features will differ (in a test, by 1 % of their rms, and by up to 0.5 in "
            "silences). Models that agree are trained on what prepare_data.py --as_s3prl makes"
        )
    return "none" if cmvn == "none" else "utterance"


def absorb_scale(weights: dict[str, Tensor], full_scale: float) -> None:
    """Change the first layer and the postnet, in place, for log energies of samples in [-1, 1]."""
    shift = 2 * math.log(full_scale)  # of log energies
    first = weights["rnn_layers.0.weight_ih_l0"]
    weights["rnn_layers.0.bias_ih_l0"] = weights["rnn_layers.0.bias_ih_l0"] + shift * first.sum(1)
    weights["postnet.bias"] = weights["postnet.bias"] - shift
