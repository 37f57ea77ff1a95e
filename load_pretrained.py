"""Load a trained APC model, whatever wrote it; as a script, describe or convert it.

    from load_pretrained import FeatureExtractor, load_pretrained
    model = load_pretrained("logs/foo.dir/foo__epoch_100.model")
    features = FeatureExtractor("pretrained/apc_3x512_n3.pt")("speech.wav")       # (T, 512)

    python load_pretrained.py bs32-rhl3-rhs512-rd0-adam-res-ts3.pt
    python load_pretrained.py logs/foo.dir/foo__epoch_100.model --to_onnx foo.onnx

Reads state dicts, as train.py and the original release write them, train.py's last.ckpt, the
checkpoints of s3prl (apc_360hr.ckpt, vq_apc_360hr.ckpt, ...) and of NPC's APC, with or without
their configs, and any of these weights in .safetensors. Nothing in a file is ever executed.
"""

import argparse
import logging
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from apc_model import APCModel
from formats.fbank import CMVN, FULL_SCALE, cmvn_stats, fbank, fbank_settings
from formats.onnx import to_onnx
from formats.s3prl import QuantizedPostnet, from_s3prl, rename_s3prl, to_s3prl
from utils import (
    BadUtterance,
    PrenetConfig,
    RNNConfig,
    UserError,
    __version__,
    atomic_write,
    is_float_tensor,
    load,
    new_parser,
    read_json,
    run_main,
    save,
    set_numerics,
    setup_logging,
    write_json,
)

# The original release's names, like bs32-rhl3-rhs512-rd0-adam-res-ts3.pt
RELEASED_NAME = re.compile(r"bs\d+-rhl\d+-rhs\d+-rd[\d.]+-\w+(?P<residual>-res)?-ts\d+")
GATES = {3: "gru", 4: "lstm"}  # of a layer, stacked in its weights
MAX_FRAMES = 1 << 16  # that go through a model at once, padding included
EXAMPLES = """\
  python load_pretrained.py pretrained/apc_3x512_n3.pt
  python load_pretrained.py logs/foo.dir/foo__epoch_100.model --to_onnx foo.onnx
  python load_pretrained.py apc_360hr.ckpt --to_state_dict weights/apc_360hr.pt"""


def load_pretrained(
    path: str | os.PathLike,
    device: str | torch.device = "cpu",
    residual: bool | None = None,
    unknown_residual: bool | None = None,
) -> APCModel:
    """Load a trained model.

    Args:
        path: a file that train.py, the original release or s3prl wrote.
        device: where the model is wanted, as torch.device takes it.
        residual: whether the model has residual connections. The weights of a GRU or LSTM do not
            show it; None looks into the file, then into config.json in the same directory, then at
            the file's name in the original's style.
        unknown_residual: what holds where neither `residual` nor any of these says it.

    Returns:
        APCModel in eval mode, in float32, with the dropout of its training for fine-tuning. Its
        attribute `config` is a dict of train.py's flags, as far as they are known: time_shift,
        rnn_type, rnn_num_layers ...; `data` is a list of the training data's prepared.json, None
        where there is none.

    Raises:
        UserError: the file is no APC model, carries code, or does not say whether it is residual.
        OSError: it cannot be read.
    """
    weights, config = read_checkpoint(path)
    mel_dim, prenet, rnn = infer_configs(weights, path)
    if "data" not in config:
        config = read_config(path) | config
    if rnn.rnn_type == "transformer":
        residual = False  # its residual connections are part of its blocks
    elif residual is None:
        residual = find_residual(path, config, unknown_residual)
    # In s3prl the first layer is never residual.
    if config.pop("is_s3prl", False) and residual and mel_dim == rnn.hidden_size:
        raise UserError(f"{path}: residual with hidden size = mel_dim is another model in s3prl")
    rnn = rnn._replace(residual=residual, dropout=config.get("rnn_dropout", 0.0))
    if prenet is not None:
        prenet = prenet._replace(dropout=config.get("prenet_dropout", 0.0))
    model = build_model(weights, mel_dim, prenet, rnn, path)
    found = model_flags(model)
    for flag, value in found.items():
        if flag != "rnn_residual" and config.get(flag, value) != value:
            raise UserError(
                f"{path}: its config.json says that {flag} is {config[flag]}, but the weights have "
                f"{value}: keep models in separate folders, each with its own config.json"
            )
    model.config = config | found
    return model.to(device).eval()


# Recognising what a file holds --------------------------------------------------------------------


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
    weights = {}
    for name, weight in check_state_dict(value, path).items():
        # DataParallel's and torch.compile's prefixes
        weights[re.sub(r"^(module\.|_orig_mod\.)+", "", name)] = weight
    if config is not None:
        weights, flags = from_s3prl(weights, config, path)
        return weights, flags | {"is_s3prl": True}
    renamed = rename_s3prl(weights, path)
    return renamed, flags if renamed is weights else {"is_s3prl": True}


def check_state_dict(value: Any, path: str | os.PathLike) -> dict[str, Tensor]:
    """-> `value` if it is a state dict; else a UserError, which names the key that holds one."""
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a state dict of APC, found {type(value).__name__}")
    for key, inner in value.items():
        if isinstance(inner, dict) and any(map(is_float_tensor, inner.values())):
            raise UserError(
                f"{path}: expected a state dict, but it is under the key {key!r}: unwrap it by "
                f"torch.save(torch.load({os.fspath(path)!r})[{key!r}], 'OUT.pt')"
            )
    for name, weight in value.items():
        if not (isinstance(name, str) and is_float_tensor(weight)):
            raise UserError(f"{path}: {name!r}: expected a weight, a dense floating-point tensor")
    return value


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    import safetensors.torch

    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:  # the latter may not name the file
        raise UserError(f"{path}: not a file of plain tensors: {error}") from None


def infer_configs(weights: dict, path: str) -> tuple[int, PrenetConfig | None, RNNConfig]:
    """A state dict -> (mel_dim, PrenetConfig or None, RNNConfig), from names and shapes only."""
    try:
        if "embedding.weight" in weights:
            hidden_size, mel_dim = weights["embedding.weight"].shape
            num_layers = count_layers(weights, "blocks.")
            rnn = RNNConfig(mel_dim, hidden_size, num_layers, 0.0, False, "transformer")
            return mel_dim, None, rnn
        gate_units, hidden_size = weights["rnns.0.weight_hh_l0"].shape
        mel_dim = weights["postnet.layer.weight"].shape[0]
        rnn_type = GATES[gate_units / hidden_size]
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise UserError(
            f"{path}: not an APC model: expected weights like rnns.0.weight_hh_l0 and "
            f"postnet.layer.weight, found {', '.join(list(weights)[:3]) or 'none'} ({error})"
        ) from None
    prenet, input_size = None, mel_dim
    if prenet_layers := count_layers(weights, "prenet.layers."):
        prenet, input_size = PrenetConfig(mel_dim, hidden_size, prenet_layers, 0.0), hidden_size
    num_layers = count_layers(weights, "rnns.")
    return mel_dim, prenet, RNNConfig(input_size, hidden_size, num_layers, 0.0, False, rnn_type)


def count_layers(weights: dict, prefix: str) -> int:
    """The largest layer number in the names, plus one: build_model() notices missing layers."""
    numbers = [re.match(re.escape(prefix) + r"(\d{1,3})\.", name) for name in weights]
    return max((int(number[1]) + 1 for number in numbers if number), default=0)


def build_model(
    weights: dict, mel_dim: int, prenet: PrenetConfig | None, rnn: RNNConfig, path: str
) -> APCModel:
    """A model with these weights; else a one-line UserError that names the differences."""
    try:
        model = APCModel(mel_dim, prenet, rnn)
        if "postnet.logits.bias" in weights:
            num_codes = len(weights["postnet.logits.bias"])
            model.postnet = QuantizedPostnet(rnn.hidden_size, mel_dim, num_codes)
        model.load_state_dict(weights)
        return model
    except (ValueError, RuntimeError) as error:
        what = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ")
        raise UserError(f"{path}: not the weights of an APC model: {what}") from None


def model_flags(model: APCModel) -> dict:
    """Those of train.py's flags that say what the model is."""
    return {
        "feature_dim": model.mel_dim,
        "prenet_num_layers": len(model.prenet.layers) if model.prenet else 0,
        "rnn_type": model.rnn_type,
        "rnn_num_layers": model.num_layers,
        "rnn_hidden_size": model.hidden_size,
        "rnn_residual": bool(model.rnn_residual),
    }


def read_config(path: str | os.PathLike) -> dict:
    """The model's config.json, in its directory or, if `path` is a link, in that of its target; {}
    if there is none, or it is another model's."""
    target = os.path.realpath(path)
    names = {os.path.basename(path), os.path.basename(target)}
    for folder in dict.fromkeys(map(os.path.dirname, (os.path.abspath(path), target))):
        config_path = os.path.join(folder, "config.json")
        config = read_json(config_path)
        if config is None:
            continue
        # train.py's names its experiment, and --to_state_dict's the file that it was written with.
        owner = config.get("state_dict") or config.get("experiment_name")
        pattern = rf"{re.escape(str(owner))}(__epoch_\d+\.model)?"
        if not owner or any(re.fullmatch(pattern, name) for name in names):
            return config
        logging.warning("%s: belongs to %s; ignored for %s", config_path, owner, path)
    return {}


def find_residual(path: str | os.PathLike, config: dict, unknown: bool | None) -> bool:
    """Whether a model is residual: from its flags, its name, or `unknown`; else UserError."""
    name = RELEASED_NAME.match(os.path.basename(path))
    if "rnn_residual" in config:
        return config["rnn_residual"]
    if name:
        return name["residual"] is not None
    if unknown is not None:
        return unknown
    raise UserError(
        f"{path}: the weights do not show whether the model has residual connections, and there is "
        "no config.json in the same directory that says so: give --residual or --no_residual (in "
        "Python, residual=...)"
    )


# Features of speech -------------------------------------------------------------------------------


def training_data(config: dict, name: str | os.PathLike) -> dict | None:
    """A model's config -> prepared.json of its (first) training data, with every fbank option
    filled in; None if it is not known."""
    first = (config.get("data") or [None])[0]
    if first is None or first.get("fbank") is None:
        return first
    try:
        return first | {"fbank": fbank_settings(first["fbank"])}
    except ValueError as error:
        raise UserError(f"{name}: the fbank options of its training data: {error}") from None


def frame_settings(prepared: dict | None) -> tuple[dict, CMVN, np.ndarray | None]:
    """training_data() -> how a model's log-Mel frames are made of audio: fbank settings, CMVN, and
    the training data's statistics if those normalise all speech (--cmvn global)."""
    if prepared is None or prepared["source"] != "audio":
        logging.warning(
            "it is not known how the log-Mel features that the model was trained on were made: "
            "using the original's fbank settings and mean normalisation per speaker"
        )
        return fbank_settings(), CMVN("speaker"), None
    cmvn = CMVN.from_prepared(prepared)
    stats = np.array(prepared["cmvn_stats"]) if cmvn.kind == "global" else None
    return prepared["fbank"], cmvn, stats


def layer_chooser(name: str, model: APCModel) -> Callable[[Tensor], Tensor]:
    """The flag --layer -> a function (L, B, T, H) -> ((layers,) B, T, H)."""
    if name == "mean":
        return lambda internal_reps: internal_reps.mean(dim=0)
    if name == "all":
        return lambda internal_reps: internal_reps
    numbers = [model.num_reps - 1] if name == "last" else []
    if re.fullmatch(r"\d{1,3}(,\d{1,3})*", name):
        numbers = [int(number) for number in name.split(",")]
    if not numbers or max(numbers) >= model.num_reps:
        choices = ["last", "all", "mean", *map(str, range(model.num_reps))]
        if model.prenet is not None:
            choices[3] += " (the prenet's output)"
        raise UserError(f"--layer {name}: this model has: {', '.join(choices)}, or a list like 0,1")
    return lambda internal_reps: internal_reps[numbers if len(numbers) > 1 else numbers[0]]


def check_length(model: APCModel, utt_id: str, num_frames: int) -> None:
    """UserError if an utterance is longer than a Transformer takes; a warning if longer than any
    that it was trained on."""
    if model.rnn_type != "transformer":
        return
    way_out = "prepare_data.py --long_utterances split divides long utterances"
    if num_frames > MAX_FRAMES:
        raise UserError(
            f"utterance {utt_id}: {num_frames} frames, but a Transformer takes at most "
            f"{MAX_FRAMES} at once: {way_out}"
        )
    longest = ((model.config.get("data") or [None])[0] or {}).get("max_seq_len")
    if longest is not None and num_frames > longest:
        logging.warning(
            "utterance %s has %d frames, but the Transformer was trained on at most %d, and its "
            "features of later frames may be poor: %s",
            utt_id,
            num_frames,
            longest,
            way_out,
        )


@torch.inference_mode()
def features_of(
    model: APCModel, chunks: Iterable[Tensor], num_frames: int, choose: Callable[[Tensor], Tensor]
) -> Tensor:
    """One utterance of any length -> its features ((layers,) T, H), on the CPU.

    Args:
        model: in eval mode.
        chunks: the utterance's log-Mel frames, some of them (t, D) at a time. A GRU or LSTM takes
            them one by one, so that only the features grow with the utterance.
        num_frames: T.
        choose: layer_chooser().
    """
    device = next(model.parameters()).device
    if model.rnn_type == "transformer":
        inputs = torch.cat([*chunks])[None].to(device)
        return choose(model(inputs, [num_frames])[1])[..., 0, :, :].cpu()
    features, state, done = None, None, 0
    for chunk in chunks:
        _, internal_reps, state = model.stream(chunk[None].to(device), state)
        new = choose(internal_reps)[..., 0, :, :].cpu()  # ((layers,) t, H)
        if features is None:
            features = new.new_empty(*new.shape[:-2], num_frames, new.shape[-1])
        features[..., done : done + len(chunk), :] = new
        done += len(chunk)
    return features


class FeatureExtractor:
    """Features of speech, exactly as `extract_features.py --audio FILE` makes them.

        extractor = FeatureExtractor("pretrained/apc_3x512_n3.pt")
        x = extractor("speech.wav")              # (T, H) float32, 100 frames per second
        x = extractor(samples, 16000)            # float in [-1, 1] or int16

    Log-Mel features are made as those of the model's training data; where these were normalised
    per speaker or utterance, over the recording. On a GPU PyTorch computes RNNs in TensorFloat-32
    unless utils.set_numerics() is called first, as the script does.

    Args:
        path, device, residual: as in load_pretrained().
        layer: last, all, mean, a number from 0 (the lowest) or a list like "0,2".
        resample: convert other sampling rates.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        layer: str | int = "last",
        device: str | torch.device = "cpu",
        residual: bool | None = None,
        resample: bool = False,
    ):
        from formats import audio  # which needs packages that loading a model does not

        self.arguments = (path, layer, device, residual, resample)
        self.audio, self.resample, self.longest = audio, resample, 0
        self.model = load_pretrained(path, device, residual)
        self.choose = layer_chooser(str(layer), self.model)
        self.fbank, self.cmvn, self.stats = frame_settings(training_data(self.model.config, path))
        bins, mel_dim = self.fbank["num_mel_bins"], self.model.mel_dim
        if bins != mel_dim:
            raise UserError(
                f"{path}: the model expects {mel_dim} log-Mel bins, but fbank makes {bins}"
            )

    def __reduce__(self):
        return FeatureExtractor, self.arguments

    def __call__(
        self, speech: str | os.PathLike | np.ndarray | Tensor, sample_rate: float | None = None
    ) -> Tensor:
        """-> (T, H) float32 on the CPU, or (layers, T, H) if several layers were asked for.

        Args:
            speech: an audio file of one channel; or samples (N,), float in [-1, 1] or int16.
            sample_rate: of the samples, Hz.

        Raises:
            UserError: another sampling rate, several channels, a file that cannot be decoded.
        """
        frames = self.log_mel(speech, sample_rate)
        return features_of(self.model, frames.split(4096), len(frames), self.choose)

    def log_mel(
        self, speech: str | os.PathLike | np.ndarray | Tensor, sample_rate: float | None = None
    ) -> Tensor:
        """-> the model's input (T, D), float32: normalised log-Mel frames. Arguments: as above."""
        name = "samples"
        try:
            if isinstance(speech, str | os.PathLike):
                name = self.audio.make_utt_id(os.path.basename(speech))  # which seeds dither
                recording = self.audio.Recording(name, os.fspath(speech))
                frames = self.audio.read_fbank(recording, self.fbank, resample=self.resample)
            else:
                samples = self._check(np.asarray(speech), sample_rate)
                frames = fbank(samples, self.fbank, name)
        except BadUtterance as error:
            text = str(error).replace("--resample", "resample=True")
            text = text.replace("convert with --channel K, from 0", "pass one channel's samples")
            raise UserError(text) from None
        if len(frames) > self.longest:
            check_length(self.model, name, len(frames))
            self.longest = len(frames)
        stats = cmvn_stats(frames) if self.stats is None else self.stats
        return torch.from_numpy(self.cmvn.apply(frames, stats))

    def _check(self, samples, rate):
        """The caller's samples -> float32 in 16-bit range, at the model's sampling rate."""
        expected = self.fbank["sample_rate"]
        if samples.dtype.kind == "f" and np.abs(samples).max(initial=0) <= self.audio.LOUDEST:
            samples = samples * FULL_SCALE
        elif samples.dtype != np.int16:
            raise UserError("samples: expected int16, or floating-point values in [-1, 1]")
        if samples.ndim != 1:
            shape = f"expected one channel (N,), found {samples.shape}"
            raise UserError(f"samples: {shape}: pass one, such as samples[0]")
        samples = samples.astype(np.float32)
        if rate == expected:
            return samples
        if not (rate and self.resample):
            hint = "resample=True converts others" if rate else "pass it with the samples"
            raise UserError(
                f"samples: expected a sampling rate of {expected:g} Hz, found {rate}: {hint}"
            )
        return np.concatenate([*self.audio.resample_blocks([samples], rate, expected)])


# The script ---------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    parser = new_parser("Load a trained APC model: describe it, or convert it.", EXAMPLES)
    group = parser.add_argument_group("model")
    group.add_argument("checkpoint", metavar="FILE", help="file with the model's weights")
    add_residual_flags(group)
    add = parser.add_argument_group("output").add_argument
    add("--to_s3prl", metavar="OUT", help="write a checkpoint for s3prl's upstream apc_local")
    add("--to_onnx", metavar="OUT", help="write a streaming model for ONNX Runtime")
    text = "write a state dict, and config.json in the same directory"
    add("--to_state_dict", metavar="OUT", help=text)
    return parser


def add_residual_flags(group: argparse._ActionsContainer) -> None:
    """--residual and --no_residual, for models that do not say."""
    add = group.add_mutually_exclusive_group().add_argument
    default = "what the file, its config.json or its name says"
    yes, no = f"assume residual connections (default: {default})", "assume none"
    add("--residual", action="store_true", default=None, help=yes)
    add("--no_residual", dest="residual", action="store_false", help=no)


def describe(model: APCModel) -> dict:
    """What a model is, for people."""
    about = {
        "layers": f"{model.num_layers} Transformer",
        "hidden size": model.hidden_size,
        "mel_dim": model.mel_dim,
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
    }
    if model.rnn_type != "transformer":
        about["layers"] = f"{model.num_layers} {model.rnn_type.upper()}"
        about["residual"] = "yes" if model.rnn_residual else "no"
        about["prenet"] = f"{len(model.prenet.layers)} layers" if model.prenet else "none"
    if isinstance(model.postnet, QuantizedPostnet):
        about["codes"] = f"{len(model.postnet.logits.bias)} (VQ-APC), for predictions only"
    return about


def summary(model: APCModel) -> str:
    """The same in one line."""
    return ", ".join(f"{name} {value}" for name, value in describe(model).items())


def describe_training(config: dict, name: str) -> dict:
    """What is known of a model's training, for people."""
    data, about = training_data(config, name), {"time shift n": config.get("time_shift", "unknown")}
    if data is None or data["source"] != "audio":
        return about | {"trained on": "Kaldi's features" if data else "unknown", "fbank": "unknown"}
    cmvn, usual = CMVN.from_prepared(data), fbank_settings()
    changes = [f"{key} {value}" for key, value in data["fbank"].items() if value != usual[key]]
    what = f"{'mean and variance' if cmvn.norm_vars else 'mean'} (--cmvn {cmvn.kind})"
    return about | {
        "trained on": "audio",
        "normalised": "nothing" if cmvn.kind == "none" else what,
        "fbank": "the original's" + (", but " + ", ".join(changes) if changes else ""),
    }


def convert(model: APCModel, args: argparse.Namespace) -> None:
    """Write the files that were asked for: none before all are made, and none over another."""
    config, data = model.config, training_data(model.config, args.checkpoint)
    files = []  # (path, function that writes, value)
    if args.to_s3prl:
        value = to_s3prl(model, data or {}, config.get("rnn_dropout", 0))
        files.append((args.to_s3prl, save, value))
    if args.to_onnx:
        about = {"mel_dim": model.mel_dim, "time_shift": config.get("time_shift"), "data": data}
        files.append((args.to_onnx, write_bytes, to_onnx(model, about)))
    if args.to_state_dict:
        folder, name = os.path.split(args.to_state_dict)
        config = config | {"state_dict": name, "version": __version__}
        if data:  # with every option in force
            config["data"] = [data, *config["data"][1:]]
        files.append((args.to_state_dict, save, model.state_dict()))
        files.append((os.path.join(folder, "config.json"), write_json, config))
    paths = [os.path.abspath(path) for path, _, _ in files]
    for path in paths:
        if os.path.exists(path) or paths.count(path) > 1:
            raise UserError(f"{path}: exists already, or is named twice: choose another name")
    for path, (_, write, value) in zip(paths, files):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        write(value, path)
        print(f"written: {path}")


def write_bytes(content: bytes, path: str) -> None:
    with atomic_write(path) as file:
        file.write(content)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    setup_logging()
    set_numerics()
    model = load_pretrained(args.checkpoint, residual=args.residual)
    about = {"checkpoint": args.checkpoint} | describe(model)
    for name, value in (about | describe_training(model.config, args.checkpoint)).items():
        print(f"{name + ':':14}{value}")
    convert(model, args)


if __name__ == "__main__":
    run_main(main)
