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


class TextbookTransformer(nn.Module):
    """T-APC from Vaswani et al. 2017, one utterance and one head at a time, with pre-norm.

    Holds its weights by name in `weights`, a state dict of the model under test.
    """

    def __init__(self, weights, num_layers):
        super().__init__()
        self.weights = nn.ParameterDict({name.replace(".", "/"): w for name, w in weights.items()})
        self.num_layers = num_layers

    def linear(self, name, x):
        weight, bias = (self.weights[f"{name.replace('.', '/')}/{w}"] for w in ("weight", "bias"))
        return x @ weight.flatten(1).T + bias

    def norm(self, name, x):
        weight, bias = (self.weights[f"{name.replace('.', '/')}/{w}"] for w in ("weight", "bias"))
        x = x - x.mean(dim=-1, keepdim=True)
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight + bias

    def attention(self, block, x):
        num_frames, hidden_size = x.shape
        query, key, value = self.linear(f"{block}.query_key_value", x).chunk(3, dim=-1)
        future = torch.ones(num_frames, num_frames, dtype=torch.bool).triu(diagonal=1)
        heads = []
        for start in range(0, hidden_size, 64):
            q, k, v = (part[:, start : start + 64] for part in (query, key, value))
            scores = (q @ k.T / 64**0.5).masked_fill(future, float("-inf"))
            exponentials = (scores - scores.amax(dim=-1, keepdim=True)).exp()
            heads.append(exponentials / exponentials.sum(dim=-1, keepdim=True) @ v)
        return self.linear(f"{block}.attention_out", torch.cat(heads, dim=-1))

    def utterance(self, frames):
        """(T, D) -> predictions (T, D), representations [(T, H)] of each block."""
        x = self.linear("embedding", frames)
        for i in range(x.size(1)):  # the positions, as the paper's formulas have them
            angle = torch.arange(len(x), dtype=x.dtype) / 10000 ** ((i - i % 2) / x.size(1))
            x = x + (angle.cos() if i % 2 else angle.sin())[:, None] * torch.eye(x.size(1))[i]
        states = []
        for i in range(self.num_layers):
            block = f"blocks.{i}"
            x = x + self.attention(block, self.norm(f"{block}.attention_norm", x))
            hidden = self.linear(
                f"{block}.feedforward.0", self.norm(f"{block}.feedforward_norm", x)
            )
            x = x + self.linear(f"{block}.feedforward.2", hidden.clamp(min=0))
            states.append(x)
        states[-1] = self.norm("final_norm", states[-1])
        return self.linear("postnet.layer", states[-1]), states

    def forward(self, inputs, lengths):
        total = inputs.size(1)
        predicted, reps = [], []
        for frames, n in zip(inputs, lengths.tolist()):
            mel, states = self.utterance(frames[:n])
            bias = self.weights["postnet/layer/bias"].expand(total - n, -1)
            predicted.append(torch.cat([mel, bias]))
            reps.append(torch.stack([nn.functional.pad(x, (0, 0, 0, total - n)) for x in states]))
        return torch.stack(predicted), torch.stack(reps, dim=1)


def padded_loss(model, batch, lengths, shift):
    """The original's: mean absolute error over all (max_seq_len - shift) positions.

    `batch` (B, max_seq_len, D) is padded with zeros to the stored length.
    """
    predicted, _ = model(batch[:, :-shift], lengths - shift)
    return nn.L1Loss()(predicted, batch[:, shift:])


def frame_loss(model, batch, lengths, shift):
    """Mean absolute error over the valid frames only, utterance by utterance."""
    predicted, _ = model(batch[:, :-shift], lengths - shift)
    errors = [
        (predicted[b, : n - shift] - batch[b, shift:n]).abs()
        for b, n in enumerate(lengths.tolist())
    ]
    return torch.cat(errors).mean()


def epoch_mean(losses, batches, shift, kind):
    """Mean over utterances, or over valid target frames where the loss is one of frames."""
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
