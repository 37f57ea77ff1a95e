"""Autoregressive Predictive Coding: the model and its loss.

    log-Mel x_1 ... x_T -> [Prenet] -> RNN layer 1 -> ... -> RNN layer L -> Postnet -> y_1 ... y_T
    loss: the mean of |y_t - x_{t+n}|,     features: the RNN layers' outputs

[1] Chung, Hsu, Tang, Glass: An Unsupervised Autoregressive Model for Speech Representation
    Learning. Interspeech 2019.
[2] Chung, Glass: Generative Pre-Training for Speech with Autoregressive Predictive Coding.
    ICASSP 2020.

Shapes, here and everywhere: B batch, T frames, D mel_dim (log-Mel bins), H hidden units, L layers.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils import PrenetConfig, RNNConfig

RNN_TYPES = {"gru": nn.GRU, "lstm": nn.LSTM}


def valid_frames(lengths: Tensor, num_frames: int, device: torch.device) -> Tensor:
    """(B,) lengths -> (B, T) bool on `device`, true where a frame lies within its utterance."""
    return torch.arange(num_frames, device=device) < lengths.to(device)[:, None]


class Prenet(nn.Module):
    """Fully connected ReLU layers between the frames and the RNN.

    None of the papers' models has one; it lets the RNN layers be all of one width, so that
    residual connections reach the first of them too.
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


class Postnet(nn.Module):
    """A linear layer from the last RNN layer to the predicted frame. Features do not need it.

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
    """A causal RNN that predicts the frame n steps ahead; its hidden states are the features.

    The prediction asks for a summary of the past that tells the future of the speech: which sound,
    which speaker [1, Section 3]. Upper layers hold more of the former, lower layers more of the
    latter [1, Section 4].

    Args:
        mel_dim: D, the width of a frame.
        prenet_config: utils.PrenetConfig, or None for no prenet (as in the papers).
        rnn_config: utils.RNNConfig; `residual` adds a layer's input to its output wherever the two
            are equally wide [1, Section 3.2], the first layer included.

    Raises:
        ValueError: the sizes do not fit together, or the RNN is neither `gru` nor `lstm`.
    """

    def __init__(self, mel_dim: int, prenet_config: PrenetConfig | None, rnn_config: RNNConfig):
        super().__init__()
        self.mel_dim = mel_dim
        first = rnn_config if prenet_config is None else prenet_config
        if first.input_size != mel_dim:
            raise ValueError(f"input_size is {first.input_size}, but mel_dim is {mel_dim}")
        rnn_type = getattr(rnn_config, "rnn_type", "gru")  # the original's config has no such field
        if rnn_type not in RNN_TYPES:
            raise ValueError(f"rnn_type is {rnn_type!r}, not one of {list(RNN_TYPES)}")
        if rnn_config.num_layers < 1:
            raise ValueError(f"the RNN has {rnn_config.num_layers} layers, but needs at least 1")

        self.prenet = None
        if prenet_config is not None:
            # The prenet's output is stacked with the RNN's: all are of one width.
            widths = {prenet_config.hidden_size, rnn_config.input_size, rnn_config.hidden_size}
            if len(widths) > 1:
                raise ValueError(
                    "with a prenet its hidden_size and the RNN's input_size and hidden_size are "
                    f"one number, but found {sorted(widths)}"
                )
            self.prenet = Prenet(
                input_size=prenet_config.input_size,
                num_layers=prenet_config.num_layers,
                hidden_size=prenet_config.hidden_size,
                dropout=prenet_config.dropout,
            )

        hidden_size = rnn_config.hidden_size
        in_sizes = [rnn_config.input_size] + [hidden_size] * (rnn_config.num_layers - 1)
        self.rnns = nn.ModuleList(
            RNN_TYPES[rnn_type](in_size, hidden_size, batch_first=True) for in_size in in_sizes
        )
        self.rnn_dropout = nn.Dropout(rnn_config.dropout)
        self.rnn_residual = rnn_config.residual
        self.postnet = Postnet(input_size=hidden_size, output_size=mel_dim)

    def forward(self, inputs: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Predict the frame n steps ahead of every frame, and return the features on the way.

        The model is causal and the padding is on the right, where it cannot reach a real frame:
        the batch goes through unpacked, and what lies beyond `lengths` is masked afterwards.

        Args:
            inputs: (B, T, D) float, zero-padded log-Mel frames.
            lengths: (B,) integers, frames of each utterance, in any order, on any device.

        Returns:
            predicted_mel: (B, T, D); beyond `lengths` the postnet's bias.
            internal_reps: (L, B, T, H), or (L + 1, B, T, H) with the prenet's output first; beyond
                `lengths` 0. The last, internal_reps[-1], is the papers' feature.
        """
        predicted_mel, internal_reps = self._in_chunks(inputs)
        valid = valid_frames(lengths, inputs.size(1), inputs.device)[:, :, None]  # (B, T, 1)
        predicted_mel = torch.where(valid, predicted_mel, self.postnet.layer.bias)
        return predicted_mel, internal_reps.masked_fill_(~valid, 0)

    def stream(
        self, inputs: Tensor, state: list | None = None
    ) -> tuple[Tensor, Tensor, list | None]:
        """forward() for speech that is still coming in: each chunk's outputs need only the past.

        Chunks of any sizes, put together, give what forward() gives for the whole (to 1e-5). Call
        it in eval mode, and under torch.inference_mode() if no gradient is wanted.

        Args:
            inputs: (B, T, D) float, the next T >= 0 frames of each of B utterances.
            state: what the previous call returned; None at the start of the utterances.

        Returns:
            predicted_mel: (B, T, D).
            internal_reps: (L, B, T, H), or (L + 1, B, T, H) with the prenet's output first.
            state: list of L layers' states; (1, B, H) for a GRU, a pair of them for an LSTM.
        """
        if inputs.size(1) == 0:  # which nn.GRU refuses
            num_reps = len(self.rnns) + (self.prenet is not None)
            hidden_size = self.rnns[0].hidden_size
            return (inputs, inputs.new_zeros(num_reps, inputs.size(0), 0, hidden_size), state)
        reps, new_state = [], []
        if self.prenet is not None:
            inputs = self.prenet(inputs)  # (B, T, H)
            reps.append(inputs)
        for i, rnn in enumerate(self.rnns):
            outputs, rnn_state = rnn(inputs, state[i] if state else None)  # (B, T, H)
            if i + 1 < len(self.rnns):
                outputs = self.rnn_dropout(outputs)
            if self.rnn_residual and inputs.size(-1) == outputs.size(-1):
                outputs = outputs + inputs
            reps.append(outputs)
            new_state.append(rnn_state)
            inputs = outputs
        return self.postnet(outputs), torch.stack(reps), new_state

    def _in_chunks(self, inputs):
        """stream() from the start to the end -> predicted_mel, internal_reps.

        On a CPU in chunks of T: buffers above 32 MiB would go back to the system, and be fetched
        again page by page, in every step.
        """
        on_cpu = inputs.device.type == "cpu"
        chunk_size = 4096 // max(1, inputs.size(0)) if on_cpu else inputs.size(1)
        predicted, reps, state = [], [], None
        for chunk in inputs.split(max(1, chunk_size), dim=1):
            chunk_predicted, chunk_reps, state = self.stream(chunk, state)
            predicted.append(chunk_predicted)
            reps.append(chunk_reps)
        return torch.cat(predicted, dim=1), torch.cat(reps, dim=2)


def apc_loss(
    predicted_mel: Tensor,
    inputs: Tensor,
    lengths: Tensor,
    time_shift: int,
    seq_len: int,
    bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """The L1 loss of a batch [1, Equation 2], as two sums: over real and over padded positions.

    Training and validation of the original release average over all `seq_len - n` positions of
    every utterance as it lies on disk, padding included. In the padding the prediction is the
    postnet's bias and the target is 0, so that part needs no computing frame by frame: the batch
    may be cut to its longest utterance. mean_losses() makes means of the sums.

    Args:
        predicted_mel: (B, T - n, D), what the model makes of inputs[:, :-n] and lengths - n.
        inputs: (B, T, D), the batch, zero-padded.
        lengths: (B,) integers > n, frames of each utterance; 0 for one that counts for nothing.
        time_shift: n, how many frames ahead the prediction is.
        seq_len: frames to which the utterances are padded on disk.
        bias: (D,), the postnet's bias.

    Returns:
        real, padding: scalar float32 tensors; each position's error is the mean over its D bins.
    """
    lengths = lengths.to(inputs.device)
    target = inputs[:, time_shift:]  # (B, T - n, D)
    error = (predicted_mel.float() - target).abs().mean(dim=-1)  # (B, T - n)
    real = error.masked_fill(~valid_frames(lengths - time_shift, error.size(1), error.device), 0)
    padded = ((seq_len - lengths) * (lengths > 0)).sum()
    return real.sum(), padded * bias.abs().mean()


class MeanLosses(NamedTuple):
    """The two means of a summed L1 loss: numbers, or scalar tensors if the sums are."""

    with_padding: float | Tensor  # the original's: over all positions, padding included
    per_real_frame: float | Tensor


def mean_losses(
    real: float | Tensor,
    padding: float | Tensor,
    utterances: int,
    frames: int,
    time_shift: int,
    seq_len: int,
) -> MeanLosses:
    """The sums of apc_loss() over any number of batches -> their means.

    Args:
        real, padding: the summed errors.
        utterances, frames: how many of each went into them.
        time_shift, seq_len: as in apc_loss().
    """
    if not utterances:  # every step of an epoch was skipped
        return MeanLosses(math.nan, math.nan)
    return MeanLosses(
        (real + padding) / (utterances * (seq_len - time_shift)),
        real / (frames - time_shift * utterances),
    )
