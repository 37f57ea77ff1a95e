"""A trained model as ONNX: features in streaming mode, without PyTorch.

    inputs:  chunk (B, T, D), the next T >= 1 frames; state (S, B, H), zeros at the start
    outputs: predicted_mel (B, T, D), internal_reps (L, B, T, H), new_state (S, B, H)

As in APCModel.stream(), but the layers' states are stacked: S is L for a GRU, and 2 L for an LSTM,
whose cells come last. B and T are free.

The graph is written out here. torch.onnx.export's older exporter is deprecated; the newer one wants
another package and, as of torch 2.13, writes the T of its example into the outputs' shapes.
"""

import json

import numpy as np
import torch

from apc_model import APCModel
from formats.s3prl import QuantizedPostnet
from utils import UserError

GATES = {"gru": [1, 0, 2], "lstm": [0, 3, 1, 2]}  # PyTorch's, in the order of ONNX's
STATES = {"gru": "h", "lstm": "hc"}  # of a layer
TOLERANCE = 1e-5


def to_onnx(model: APCModel, about: dict) -> bytes:
    """A model in eval mode -> the .onnx file, checked to compute what the model does.

    Args:
        model: the model, on the CPU.
        about: the file's metadata, each value as JSON.

    Raises:
        UserError: a package is missing, the model cannot be written, or outputs differ.
    """
    if model.rnn_type == "transformer":
        raise UserError("--to_onnx needs a model of GRU or LSTM layers, not a Transformer")
    if isinstance(model.postnet, QuantizedPostnet):
        raise UserError("--to_onnx: quantised models (VQ-APC) are not supported")
    try:
        import onnx  # the package, not this module
        import onnxruntime
    except ImportError as error:
        text = f"--to_onnx needs {error.name}: pip install -r requirements-onnx.txt"
        raise UserError(text) from None
    text, tensors = graph(model)
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(
        onnx.numpy_helper.from_array(value, name) for name, value in tensors.items()
    )
    onnx.helper.set_model_props(proto, {name: json.dumps(about[name]) for name in about})
    content = proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # several spin, and are slow on a busy machine
    difference = largest_difference(onnxruntime.InferenceSession(content, options), model)
    if not difference <= TOLERANCE:  # NaN, too
        raise UserError(f"ONNX Runtime's outputs differ from this model's by {difference:g}")
    return content


def graph(model: APCModel) -> tuple[str, dict[str, np.ndarray]]:
    """A model -> its network in ONNX's text format, and the tensors that it names."""
    mel_dim, hidden_size = model.mel_dim, model.hidden_size
    layers, reps, tensors = network(model)
    names = STATES[model.rnn_type]
    states = [f"{name}{i}" for name in names for i in range(model.num_layers)]
    lines = [
        "frames = Transpose <perm = [1, 0, 2]> (chunk)",  # (T, B, D)
        f"{', '.join(states)} = Split <axis = 0, num_outputs = {len(states)}> (state)",  # (1, B, H)
        *layers,
        "predicted_mel = Transpose <perm = [1, 0, 2]> (postnet)",
        *(f"stacked_{rep} = Unsqueeze ({rep}, zero)" for rep in reps),  # (1, T, B, H)
        f"reps = Concat <axis = 0> ({', '.join(f'stacked_{rep}' for rep in reps)})",
        "internal_reps = Transpose <perm = [0, 2, 1, 3]> (reps)",
        f"new_state = Concat <axis = 0> ({', '.join(f'new_{name}' for name in states)})",
    ]
    state_type = f"float[{len(states)}, B, {hidden_size}]"
    return (
        '<ir_version: 8, opset_import: ["": 18]> '
        f"apc (float[B, T, {mel_dim}] chunk, {state_type} state) => "
        f"(float[B, T, {mel_dim}] predicted_mel, "
        f"float[{len(reps)}, B, T, {hidden_size}] internal_reps, {state_type} new_state) "
        f"{{ {' '.join(lines)} }}"
    ), tensors


def network(model: APCModel) -> tuple[list[str], list[str], dict[str, np.ndarray]]:
    """From `frames` to `postnet` -> lines, names of the layers' outputs, tensors by name."""
    lines, reps, tensors = [], [], {"zero": np.array([0]), "one": np.array([1])}

    def linear(name, layer, x):
        tensors[f"{name}_weight"] = layer.weight.detach().flatten(1).T.numpy()
        tensors[f"{name}_bias"] = layer.bias.detach().numpy()
        lines.append(f"{name}_product = MatMul ({x}, {name}_weight)")
        lines.append(f"{name} = Add ({name}_product, {name}_bias)")  # (T, B, H or D)

    x = "frames"
    for i, layer in enumerate(model.prenet.layers if model.prenet else ()):
        linear(f"linear{i}", layer, x)
        x = f"relu{i}"
        lines.append(f"{x} = Relu (linear{i})")
    if model.prenet:
        reps.append(x)
    options = f"hidden_size = {model.hidden_size}"
    if model.rnn_type == "gru":
        options += ", linear_before_reset = 1"  # as in PyTorch
    for i, rnn in enumerate(model.rnns):
        w, r, *biases = (  # (gates * H, ...) each
            weight.detach().unflatten(0, (-1, rnn.hidden_size))[GATES[model.rnn_type]].flatten(0, 1)
            for weight in (rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0)
        )
        weights = {f"w{i}": w, f"r{i}": r, f"b{i}": torch.cat(biases)}
        tensors |= {name: weight[None].numpy() for name, weight in weights.items()}
        states = [f"{name}{i}" for name in STATES[model.rnn_type]]
        lines += [
            f"y{i}, {', '.join(f'new_{name}' for name in states)} = {model.rnn_type.upper()} "
            f"<{options}> ({x}, {', '.join(weights)}, , {', '.join(states)})",
            f"outputs{i} = Squeeze (y{i}, one)",  # (T, 1, B, H) -> (T, B, H)
        ]
        outputs = f"outputs{i}"
        if model.rnn_residual and rnn.input_size == model.hidden_size:
            outputs = f"sum{i}"
            lines.append(f"{outputs} = Add (outputs{i}, {x})")
        reps.append(outputs)
        x = outputs
    linear("postnet", model.postnet.layer, x)
    return lines, reps, tensors


@torch.inference_mode()
def largest_difference(session, model: APCModel) -> float:
    """Between ONNX Runtime's outputs, in chunks, and forward()'s; relative for values above 1."""
    num_states, _, hidden_size = session.get_inputs()[1].shape
    differences = []
    for batch_size, num_frames, chunk_size in ((1, 1, 1), (1, 50, 1), (3, 60, 7), (2, 70, 70)):
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(batch_size, num_frames, model.mel_dim, generator=generator)
        state, outputs = np.zeros((num_states, batch_size, hidden_size), np.float32), []
        for chunk in inputs.split(chunk_size, dim=1):
            *chunk_outputs, state = session.run(None, {"chunk": chunk.numpy(), "state": state})
            outputs.append(map(torch.from_numpy, chunk_outputs))
        predicted, reps = zip(*outputs)
        found = torch.cat(predicted, dim=1), torch.cat(reps, dim=2)
        expected = model(inputs, torch.full([batch_size], num_frames))
        for ours, theirs in zip(found, expected):
            differences.append(((ours - theirs).abs() / theirs.abs().clamp(min=1)).max())
    return torch.stack(differences).max().item()  # NaN if one is
