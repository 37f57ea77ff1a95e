"""The tests' truth: the paper's model in the packed textbook way, and its loss with no shortcut.

Nothing here comes from the code under test. Sequences are packed once, sorted by length as the
packing of 2019 needed, and every layer works on the packed frames, so no padded position exists
until the end. Losses are computed on the whole padded batch.
"""

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adadelta": torch.optim.Adadelta,
    "sgd": torch.optim.SGD,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
}


class PackedAPC(nn.Module):
    """APC on packed sequences, with the state-dict names of the original release."""

    def __init__(self, mel_dim, hidden, layers, prenet_layers=0, residual=False, rnn_type="gru"):
        super().__init__()
        if prenet_layers:
            widths = [mel_dim] + [hidden] * prenet_layers
            linear = [nn.Linear(a, b) for a, b in zip(widths[:-1], widths[1:])]
            self.prenet = nn.ModuleDict({"layers": nn.ModuleList(linear)})
        else:
            self.prenet = None
        kind = {"gru": nn.GRU, "lstm": nn.LSTM}[rnn_type]
        self.rnns = nn.ModuleList()
        for i in range(layers):
            width = hidden if i or prenet_layers else mel_dim
            self.rnns.append(kind(width, hidden, batch_first=True))
        self.postnet = nn.ModuleDict({"layer": nn.Conv1d(hidden, mel_dim, kernel_size=1)})
        self.residual = residual

    def forward(self, inputs, lengths):
        total, order = inputs.size(1), torch.argsort(lengths, descending=True)
        back = torch.argsort(order)
        packed = pack_padded_sequence(inputs[order], lengths[order].cpu(), batch_first=True)

        def repack(frames):
            return PackedSequence(frames, packed.batch_sizes)

        def unpack(frames):
            return pad_packed_sequence(repack(frames), batch_first=True, total_length=total)[0]

        frames, states = packed.data, []
        if self.prenet is not None:
            for layer in self.prenet["layers"]:
                frames = torch.relu(layer(frames))
            states.append(frames)
        for rnn in self.rnns:
            out = rnn(repack(frames))[0].data
            if self.residual and out.shape == frames.shape:
                out = out + frames
            frames = out
            states.append(frames)

        reps = torch.stack([unpack(state)[back] for state in states])
        predicted = self.postnet["layer"](reps[-1].transpose(1, 2)).transpose(1, 2)
        return predicted, reps


def padded_loss(model, batch, lengths, shift):
    """The original's: mean absolute error over all (max_seq_len - shift) positions.

    `batch` (B, max_seq_len, D) is padded with zeros to the stored length.
    """
    predicted, _ = model(batch[:, :-shift], lengths - shift)
    return nn.L1Loss()(predicted, batch[:, shift:])


def frame_loss(model, batch, lengths, shift):
    """Mean absolute error over the real frames alone, utterance by utterance."""
    predicted, _ = model(batch[:, :-shift], lengths - shift)
    errors = [
        (predicted[b, : n - shift] - batch[b, shift:n]).abs()
        for b, n in enumerate(lengths.tolist())
    ]
    return torch.cat(errors).mean()


def epoch_mean(losses, batches, shift, kind):
    """Mean over utterances, or over real target frames where the loss is one of frames."""
    if kind is frame_loss:
        weights = [int((lengths - shift).sum()) for _, lengths in batches]
    else:
        weights = [len(lengths) for _, lengths in batches]
    return sum(w * x for w, x in zip(weights, losses)) / sum(weights)


def train_epoch(model, optimizer, batches, shift, clip, kind=padded_loss):
    """One epoch over a list of (batch, lengths); returns its loss, step losses, gradient norms."""
    model.train()
    losses, norms = [], []
    for batch, lengths in batches:
        loss = kind(model, batch, lengths, shift)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), clip)))
        optimizer.step()
        losses.append(loss.item())
    return epoch_mean(losses, batches, shift, kind), losses, norms


@torch.no_grad()
def evaluate(model, batches, shift, kind=padded_loss):
    model.eval()
    losses = [kind(model, batch, lengths, shift).item() for batch, lengths in batches]
    return epoch_mean(losses, batches, shift, kind)
