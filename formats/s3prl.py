"""s3prl's checkpoints of APC, in and out: apc_360hr.ckpt, vq_apc_360hr.ckpt, for its apc_local.

s3prl computes log-Mel features with torchaudio's Kaldi fbank, from samples in [-1, 1], and
normalises them per utterance or not at all. Its APC has GRU layers only, with residual connections
from the second layer on, and a linear layer where the original release has a convolution of kernel
1. Its VQ-APC quantises what the last layer hands to the postnet; features are not quantised.
"""

import logging
import math

from torch import Tensor, nn

from apc_model import APCModel, Postnet
from formats.fbank import CMVN, S3PRL_FBANK, fbank_settings
from utils import UserError

# Of no effect on a model here: a constant, which CMVN removes or the weights absorb, and noise.
IGNORED = {"full_scale": 1.0, "htk_compat": False, "dither": 0.0}
FROM_S3PRL = {"rnn_layers.": "rnns.", "postnet.": "postnet.layer."}
VQ_FROM_S3PRL = {  # of a layer with one group
    "vq_layers.0.vq_logits.": "postnet.logits.",
    "vq_layers.0.codebook_CxE.": "postnet.codebook.",
}
# s3prl's audio settings, which it passes to torchaudio.compliance.kaldi.fbank -> ours.
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


class QuantizedPostnet(Postnet):
    """VQ-APC's: predicts a frame from the code that fits the last layer's output best."""

    def __init__(self, input_size: int, output_size: int, num_codes: int):
        super().__init__(input_size, output_size)
        self.logits = nn.Linear(input_size, num_codes)
        self.codebook = nn.Linear(num_codes, input_size, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        # inputs: (B, T, H)
        codes = self.logits(inputs).argmax(dim=-1)  # (B, T)
        return super().forward(self.codebook.weight.T[codes])  # (B, T, D)


def rename(weights: dict, prefixes: dict[str, str]) -> dict:
    """Replace the prefixes of the weights' names: {old: new}."""
    for old, new in prefixes.items():
        weights = {
            new + name.removeprefix(old) if name.startswith(old) else name: weight
            for name, weight in weights.items()
        }
    return weights


def rename_s3prl(weights: dict, path: str) -> dict[str, Tensor]:
    """Weights of s3prl's or NPC's APC -> with the original's names; others as they are.

    Raises:
        UserError: a model with other quantisation layers than s3prl's VQ-APC in postnet.*.
    """
    if any(name.startswith("vq_layers.") for name in weights):
        raise UserError(
            f"{path}: its quantisation layers (VQ-APC) are not supported: expected s3prl's own "
            "checkpoint, with one group of codes after the last layer"
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
        UserError: it is another model than APC or VQ-APC, or its config is incomplete or unknown.
    """
    quantizer = {name: weights[name] for name in weights if name.startswith(tuple(VQ_FROM_S3PRL))}
    weights = {name: weight for name, weight in weights.items() if name not in quantizer}
    weights = rename_s3prl(weights, path) | rename(quantizer, VQ_FROM_S3PRL)
    try:
        sound, paras = config["data"]["audio"], config["model"]["paras"]
        flags = {"rnn_residual": bool(paras["residual"]), "rnn_dropout": float(paras["dropout"])}
        feat_type, mel_dim = sound["feat_type"], int(sound["feat_dim"])
        cmvn = "utterance" if sound.get("cmvn", True) else "none"
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: missing or invalid in s3prl's config: {error}") from None
    if feat_type != "fbank":
        raise UserError(f"{path}: its features are {feat_type!r}, expected 'fbank'")
    unknown = sound.keys() - {"feat_type", "cmvn", "decode_wav", *FBANK_NAMES}
    if unknown:
        raise UserError(f"{path}: its audio setting {min(unknown)} is not supported")
    fbank = {ours: sound[name] for name, ours in FBANK_NAMES.items() if name in sound}
    fbank = S3PRL_FBANK | fbank | {"num_mel_bins": mel_dim}
    data = {"source": "audio", "fbank": fbank, "cmvn": cmvn}
    if cmvn == "utterance":
        data |= {"norm_vars": True, "unbiased_vars": True}
    return weights, flags | {"data": [data]}


def to_s3prl(model: APCModel, data: dict, dropout: float) -> dict:
    """A model -> what torch.save writes for s3prl's apc_local.

    Args:
        model: the model.
        data: prepared.json of its training data; empty if that is not known.
        dropout: of its RNN layers, in training.

    Raises:
        UserError: s3prl has no such model.
    """
    if model.rnn_type == "transformer":
        raise UserError("--to_s3prl needs a model of GRU or LSTM layers, not a Transformer")
    fbank = fbank_settings({"num_mel_bins": model.mel_dim} | (data.get("fbank") or {}))
    reject_what_s3prl_lacks(model, fbank)
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
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "dropout": dropout,
        "residual": bool(model.rnn_residual),
    }
    return {"model": weights, "config": {"data": {"audio": sound}, "model": {"paras": paras}}}


def reject_what_s3prl_lacks(model: APCModel, fbank: dict) -> None:
    own = {name: fbank[name] for name in ("frame_length_ms", "frame_shift_ms")}
    expected = fbank_settings(own | {"num_mel_bins": model.mel_dim} | IGNORED)
    reasons = {
        "its layers are LSTMs": model.rnn_type != "gru",
        "it has a prenet": model.prenet is not None,
        "its first layer is residual": model.rnn_residual and model.mel_dim == model.hidden_size,
        "its fbank is another": fbank | IGNORED != expected,
        "it has fewer than three layers, and apc_local takes outputs of three": (
            model.num_layers < 3
        ),
        "writing quantised models (VQ-APC) is not supported": (
            isinstance(model.postnet, QuantizedPostnet)
        ),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"s3prl cannot express this model: {reason}")
    if model.num_layers > 3:
        last = model.num_layers - 1
        logging.warning("s3prl's apc_local gives the outputs of layers 0, 1 and %d", last)


def choose_cmvn(data: dict, fbank: dict) -> str:
    """How s3prl will normalise, "utterance" or "none"; warns if the model was trained otherwise."""
    cmvn = CMVN.from_prepared(data)
    if data.get("source") != "audio":
        # Dumps and archives come normalised, as the original's did.
        logging.warning(
            "it is not known how the log-Mel features that the model was trained on were made: "
            "s3prl will use the original's fbank settings, and normalise mean and variance per "
            "utterance"
        )
        return "utterance"
    is_same = cmvn.kind == "none" or (cmvn.kind == "utterance" and cmvn.norm_vars)
    if not is_same:
        logging.warning(
            "the model was trained on log-Mel features normalised by %s (%s); s3prl normalises "
            "mean and variance by utterance: its features will be others (in a test, by 80 %% of "
            "their rms). Models that agree are trained on what prepare_data.py --as_s3prl makes",
            cmvn.kind,
            "mean and variance" if cmvn.norm_vars else "mean",
        )
    elif fbank["full_scale"] != 1:
        logging.warning(
            "s3prl's log energies have a higher floor than those that the model was trained on: "
            "its features will differ (in a test, by 1 % of their rms, and by up to 0.5 in "
            "silences). Models that agree are trained on what prepare_data.py --as_s3prl makes"
        )
    return "none" if cmvn.kind == "none" else "utterance"


def absorb_scale(weights: dict[str, Tensor], full_scale: float) -> None:
    """Change the first layer and the postnet, in place, for log energies of samples in [-1, 1]."""
    shift = 2 * math.log(full_scale)  # of log energies
    first = weights["rnn_layers.0.weight_ih_l0"]
    weights["rnn_layers.0.bias_ih_l0"] = weights["rnn_layers.0.bias_ih_l0"] + shift * first.sum(1)
    weights["postnet.bias"] = weights["postnet.bias"] - shift
