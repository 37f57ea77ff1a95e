"""Autoregressive Predictive Coding: the model and its loss.

    log-Mel x_1 ... x_T -> [Prenet] -> layer 1 -> ... -> layer L -> Postnet -> y_1 ... y_T
    loss: the mean of |y_t - x_{t+n}|,     features: the layers' outputs

The layers are GRUs or LSTMs [1], or Transformer blocks that attend to the past only [2].

[1] Chung, Hsu, Tang, Glass: An Unsupervised Autoregressive Model for Speech Representation
    Learning. Interspeech 2019.
[2] Chung, Glass: Generative Pre-Training for Speech with Autoregressive Predictive Coding.
    ICASSP 2020.

Shapes, here and everywhere: B batch, T frames, D mel_dim (log-Mel bins), H hidden units, L layers.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from utils import PrenetConfig, RNNConfig

RNN_TYPES = {"gru": nn.GRU, "lstm": nn.LSTM}


def valid_frames(lengths: Tensor, num_frames: int, device: torch.device) -> Tensor:
    """(B,) lengths -> (B, T) bool on `device`, true where a frame lies within its utterance."""
    return torch.arange(num_frames, device=device) < lengths.to(device)[:, None]


class Prenet(nn.Module):
    """Fully connected ReLU layers between the frames and the RNN.

    None of the papers' models has one. With it all RNN layers have inputs of the same size, so
    that residual connections reach the first of them too.
    """

    def __init__(self, input_size: int, num_layers: int, hidden_size: int, dropout: float):
        super().__init__()
        sizes = [input_size] + [hidden_size] * num_layers
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        # inputs: (B, T, D)
        for layer in self.layers:
            inputs = self.dropout(torch.relu(layer(inputs)))
        return inputs  # (B, T, H)


class TransformerBlock(nn.Module):
    """Causal self-attention and a feed-forward layer, each on normalised inputs and residual.

    Ours rather than nn.TransformerEncoderLayer, which takes `is_causal` as a hint and may attend
    to the future in eval mode. The attention itself has no dropout, and no padding mask: padding
    is on the right, where a causal layer does not look. No (T, T) matrix is held in memory.
    """

    HEAD_SIZE = 64

    def __init__(self, hidden_size: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden_size)
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.attention_out = nn.Linear(hidden_size, hidden_size)
        self.feedforward_norm = nn.LayerNorm(hidden_size)
        self.feedforward = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.ReLU(),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs: Tensor) -> Tensor:
        # inputs: (B, T, H)
        projected = self.query_key_value(self.attention_norm(inputs))  # (B, T, 3 H)
        heads = projected.unflatten(-1, (3, -1, self.HEAD_SIZE))  # (B, T, 3, heads, 64)
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # (B, heads, T, 64) each
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).flatten(2)  # (B, T, H)
        inputs = inputs + self.dropout(self.attention_out(attended))
        return inputs + self.dropout(self.feedforward(self.feedforward_norm(inputs)))  # (B, T, H)


def sinusoidal_positions(num_frames: int, hidden_size: int, device: torch.device) -> Tensor:
    """(T, H): sines (even) and cosines (odd) of wavelengths from 2 pi to 10000 * 2 pi frames."""
    frame = torch.arange(num_frames, device=device)[:, None]
    rate = torch.exp(torch.arange(0, hidden_size, 2, device=device) / hidden_size * -math.log(1e4))
    return torch.stack([torch.sin(frame * rate), torch.cos(frame * rate)], dim=-1).flatten(1)


class Postnet(nn.Module):
    """A linear layer from the last layer to the predicted frame. Features do not need it.

    It is a convolution of kernel 1, as in the original release, whose weights are (D, H, 1).
    """

    def __init__(self, input_size: int, output_size: int = 80):
        super().__init__()
        self.layer = nn.Conv1d(input_size, output_size, kernel_size=1)

    def forward(self, inputs: Tensor) -> Tensor:
        # inputs: (B, T, H)
        inputs = inputs.transpose(1, 2)  # (B, H, T)
        return self.layer(inputs).transpose(1, 2)  # (B, T, D)


class APCModel(nn.Module):
    """A causal model that predicts the frame n steps ahead; its hidden states are the features.

    The prediction asks for a summary of the past that says where the speech is heading: which
    sound, which speaker [1, Section 3]. Upper layers hold more of the former, lower layers more of
    the latter [1, Section 4].

    With rnn_type "transformer" the layers are Transformer blocks [2], four of width 512 in the
    paper. The rest is our choice: heads of 64, a feed-forward layer of 4 H with ReLU, layer norm
    before each sublayer and after the last block, sinusoidal positions (Vaswani et al. 2017), input
    and output projections of their own.

    Args:
        mel_dim: D, the feature dimension of a log-Mel frame.
        prenet_config: utils.PrenetConfig, or None for no prenet (as in the papers).
        rnn_config: utils.RNNConfig; `residual` adds a layer's input to its output wherever the two
            have the same size [1, Section 3.2], the first layer included.

    Attributes:
        rnn_type: "gru", "lstm" or "transformer".    rnn_residual: bool.
        hidden_size: H.    num_layers: L.    num_reps: L, or L + 1 with a prenet.

    Raises:
        ValueError: the sizes do not fit together, or rnn_type is unknown.
    """

    def __init__(self, mel_dim: int, prenet_config: PrenetConfig | None, rnn_config: RNNConfig):
        super().__init__()
        check_configs(mel_dim, prenet_config, rnn_config)
        self.mel_dim = mel_dim
        # The original release's config has no rnn_type.
        self.rnn_type = getattr(rnn_config, "rnn_type", "gru")
        self.rnn_residual = rnn_config.residual
        self.hidden_size = hidden_size = rnn_config.hidden_size
        self.num_layers = rnn_config.num_layers
        self.num_reps = self.num_layers + (prenet_config is not None)

        self.prenet = None if prenet_config is None else Prenet(**prenet_config._asdict())
        if self.rnn_type == "transformer":
            self.embedding = nn.Linear(mel_dim, hidden_size)
            self.blocks = nn.ModuleList(
                TransformerBlock(hidden_size, rnn_config.dropout) for _ in range(self.num_layers)
            )
            self.final_norm = nn.LayerNorm(hidden_size)
        else:
            in_sizes = [rnn_config.input_size] + [hidden_size] * (self.num_layers - 1)
            layer = RNN_TYPES[self.rnn_type]
            self.rnns = nn.ModuleList(layer(i, hidden_size, batch_first=True) for i in in_sizes)
            self.rnn_dropout = nn.Dropout(rnn_config.dropout)
        self.postnet = Postnet(input_size=hidden_size, output_size=mel_dim)

    def forward(
        self, inputs: Tensor, lengths: Tensor, need_reps: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the frame n steps ahead of every frame, and return the features on the way.

        The model is causal and the padding is on the right, where it cannot reach a valid frame:
        the batch goes through unpacked, and what lies beyond `lengths` is masked afterwards.

        Args:
            inputs: (B, T, D) float, zero-padded log-Mel frames.
            lengths: (B,) integers from 0 to T, frames of each utterance, in any order; a tensor on
                any device, an array or a list.
            need_reps: False saves the memory of internal_reps, which are None then.

        Returns:
            predicted_mel: (B, T, D); beyond `lengths` the postnet's bias.
            internal_reps: (L, B, T, H), or (L + 1, B, T, H) with the prenet's output first; beyond
                `lengths` 0. The last, internal_reps[-1], is the papers' feature.

        Raises:
            ValueError: `lengths` are not B integers from 0 to T.
        """
        valid = valid_frames(check_lengths(lengths, inputs), inputs.size(1), inputs.device)
        valid = valid[:, :, None]  # (B, T, 1)
        if self.rnn_type == "transformer":
            # Attention multiplies what it must not see by 0, which leaves NaN.
            predicted_mel, reps = self._transformer(inputs.masked_fill(~valid, 0), need_reps)
        else:
            predicted_mel, reps = self._rnn_in_chunks(inputs, need_reps)
        predicted_mel = torch.where(valid, predicted_mel, self.postnet.layer.bias)
        if need_reps:
            reps.masked_fill_(~valid, 0)
        return predicted_mel, reps

    def stream(
        self, inputs: Tensor, state: list | None = None
    ) -> tuple[Tensor, Tensor, list | None]:
        """forward() in streaming mode: each chunk's outputs need only the past.

        Chunks of any sizes, put together, give what forward() gives for the whole (to 1e-5). Call
        it in eval mode, and under torch.inference_mode() if no gradient is wanted.

        Args:
            inputs: (B, T, D) float, the next T >= 0 frames of each of B utterances.
            state: what the previous call returned; None at the start of the utterances.

        Returns:
            predicted_mel: (B, T, D).
            internal_reps: (L, B, T, H), or (L + 1, B, T, H) with the prenet's output first.
            state: list of L layers' states; (1, B, H) for a GRU, a pair of them for an LSTM.

        Raises:
            ValueError: the model is a Transformer, which needs the whole past.
        """
        if self.rnn_type == "transformer":
            raise ValueError("streaming needs a model of GRU or LSTM layers, not a Transformer")
        if inputs.size(1) == 0:  # which nn.GRU rejects
            reps = inputs.new_zeros(self.num_reps, inputs.size(0), 0, self.hidden_size)
            return inputs, reps, state
        reps, state = self._rnn(inputs, state)
        return self.postnet(reps[-1]), torch.stack(reps), state

    def _rnn(self, inputs, state):
        """One pass -> each layer's outputs (B, T, H), the prenet's first, and the new state."""
        reps, new_state = [], []
        if self.prenet is not None:
            inputs = self.prenet(inputs)  # (B, T, H)
            reps.append(inputs)
        for i, rnn in enumerate(self.rnns):
            outputs, rnn_state = rnn(inputs, state[i] if state else None)  # (B, T, H)
            if i + 1 < self.num_layers:
                outputs = self.rnn_dropout(outputs)
            if self.rnn_residual and inputs.size(-1) == outputs.size(-1):
                outputs = outputs + inputs
            reps.append(outputs)
            new_state.append(rnn_state)
            inputs = outputs
        return reps, new_state

    def _rnn_in_chunks(self, inputs, need_reps):
        """The whole sequence -> predicted_mel, internal_reps.

        On a CPU in chunks of T: glibc returns buffers above 32 MiB to the system, so that every
        step would page-fault them in again (24 % of a step at T = 1600).
        """
        on_cpu = inputs.device.type == "cpu"
        size = max(1, 4096 // max(1, inputs.size(0))) if on_cpu else inputs.size(1)
        predicted, reps, state = [], [], None
        for chunk in inputs.split(size, dim=1):
            chunk_reps, state = self._rnn(chunk, state)
            predicted.append(self.postnet(chunk_reps[-1]))
            if need_reps:
                reps.append(torch.stack(chunk_reps))
        if len(predicted) == 1:
            return predicted[0], reps[0] if need_reps else None
        return torch.cat(predicted, dim=1), torch.cat(reps, dim=2) if need_reps else None

    def _transformer(self, inputs, need_reps):
        """The whole sequence -> predicted_mel, internal_reps."""
        positions = sinusoidal_positions(inputs.size(1), self.hidden_size, inputs.device)
        outputs = self.embedding(inputs) + positions  # (B, T, H)
        reps = []
        for block in self.blocks:
            outputs = block(outputs)
            if need_reps:
                reps.append(outputs)
        outputs = self.final_norm(outputs)
        return self.postnet(outputs), torch.stack([*reps[:-1], outputs]) if need_reps else None


def check_configs(mel_dim: int, prenet: PrenetConfig | None, rnn: RNNConfig) -> None:
    """ValueError if the sizes of a model do not fit together."""
    input_size = rnn.input_size if prenet is None else prenet.input_size
    if input_size != mel_dim:
        raise ValueError(f"input_size is {input_size}, but mel_dim is {mel_dim}")
    rnn_type = getattr(rnn, "rnn_type", "gru")
    if rnn_type not in (*RNN_TYPES, "transformer"):
        raise ValueError(f"rnn_type is {rnn_type!r}, not one of {[*RNN_TYPES, 'transformer']}")
    if rnn.num_layers < 1:
        raise ValueError(f"the model has {rnn.num_layers} layers, but needs at least 1")
    if rnn_type == "transformer":
        if rnn.hidden_size % TransformerBlock.HEAD_SIZE:
            raise ValueError(
                f"a Transformer's hidden_size must be a multiple of {TransformerBlock.HEAD_SIZE}, "
                f"the size of its attention heads, not {rnn.hidden_size}"
            )
        if prenet is not None or rnn.residual:
            raise ValueError(
                "a Transformer has no prenet and no residual option: its blocks are residual"
            )
    # The prenet's output is stacked with the RNN's.
    if prenet is not None and not prenet.hidden_size == rnn.input_size == rnn.hidden_size:
        raise ValueError(
            "with a prenet its hidden_size and the RNN's input_size and hidden_size must be equal, "
            f"but they are {prenet.hidden_size}, {rnn.input_size} and {rnn.hidden_size}"
        )


def check_lengths(lengths: Tensor | np.ndarray | list, inputs: Tensor) -> Tensor:
    """Lengths of a batch (B, T, D) -> an integer tensor (B,); ValueError if they cannot be that."""
    lengths = torch.as_tensor(lengths)
    batch_size, num_frames = inputs.shape[:2]
    if lengths.shape != (batch_size,):
        raise ValueError(f"expected {batch_size} lengths, found a shape of {tuple(lengths.shape)}")
    if lengths.is_floating_point() or lengths.is_complex() or lengths.dtype == torch.bool:
        raise ValueError(f"expected lengths in frames, which are integers, found {lengths.dtype}")
    if batch_size and (lengths.min() < 0 or lengths.max() > num_frames):
        raise ValueError(
            f"expected lengths from 0 to {num_frames}, the frames of the inputs, found "
            f"{lengths.min().item()} to {lengths.max().item()}"
        )
    return lengths


# The loss -----------------------------------------------------------------------------------------


def apc_loss(
    predicted_mel: Tensor,
    inputs: Tensor,
    lengths: Tensor,
    time_shift: int,
    seq_len: int,
    bias: Tensor,
) -> "LossSums":
    """The L1 loss of a batch [1, Equation 2]: as sums, of which LossSums.means() makes means.

    Args:
        predicted_mel: (B, T - n, D), what the model predicts from inputs[:, :-n] and lengths - n.
        inputs: (B, T, D), the batch, zero-padded.
        lengths: (B,) integers > n, frames of each utterance; 0 for a dummy that adds nothing.
        time_shift: n, how many frames ahead the prediction is.
        seq_len: frames to which the utterances are padded on disk.
        bias: (D,), the postnet's bias.
    """
    target = inputs[:, time_shift:]  # x_{t+n}: (B, T - n, D)
    error = (predicted_mel.float() - target).abs().mean(dim=-1)  # |y_t - x_{t+n}|: (B, T - n)
    is_valid = valid_frames(lengths - time_shift, error.size(1), error.device)
    valid = error.masked_fill(~is_valid, 0).sum()

    # The original averages over all seq_len - n time steps of an utterance as it lies on disk,
    # padding included. There the prediction is the postnet's bias and the target is 0: the sum of
    # that part has a closed form, and the batch may be cut to its longest utterance.
    is_used = lengths > 0
    padding = ((seq_len - lengths) * is_used).sum().to(bias.device) * bias.abs().mean()
    return LossSums(valid, padding, int(is_used.sum()), int(lengths.sum()))


class MeanLosses(NamedTuple):
    """The two means of a summed L1 loss: numbers, or scalar tensors if the sums are."""

    with_padding: float | Tensor  # the original's: over all time steps, padding included
    per_valid_frame: float | Tensor


@dataclasses.dataclass
class LossSums:
    """The summed L1 errors of any number of utterances, each time step's a mean over D bins."""

    valid: float | Tensor = 0.0  # over valid (non-padded) frames; float32 scalar on the device
    padding: float | Tensor = 0.0  # over padding
    utterances: int = 0
    frames: int = 0  # of all utterances, their first n included

    def __add__(self, other: "LossSums") -> "LossSums":
        return LossSums(
            self.valid + other.valid,
            self.padding + other.padding,
            self.utterances + other.utterances,
            self.frames + other.frames,
        )

    def means(self, time_shift: int, seq_len: int) -> MeanLosses:
        """The means, with `time_shift` and `seq_len` as in apc_loss(); NaN without utterances."""
        if not self.utterances:
            return MeanLosses(math.nan, math.nan)
        return MeanLosses(
            (self.valid + self.padding) / (self.utterances * (seq_len - time_shift)),
            self.valid / (self.frames - time_shift * self.utterances),
        )
