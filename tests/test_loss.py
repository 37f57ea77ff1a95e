"""apc_loss against the brute-force loss on whole padded batches."""

import pytest
import torch
from reference import PackedAPC, frame_loss, padded_loss

from apc_model import APCModel, apc_loss
from utils import PrenetConfig, RNNConfig

MEL, HIDDEN, SEQ_LEN = 6, 10, 40
LENGTHS = [31, 24, 22, 36]
shifts = pytest.mark.parametrize("shift", [1, 3, 20])
cuts = pytest.mark.parametrize("cut", [True, False], ids=["cut-to-longest", "full-length"])


def models(prenet_layers=0, residual=True, seed=0):
    """The packed reference and the model under test, same weights."""
    torch.manual_seed(seed)
    reference = PackedAPC(MEL, HIDDEN, 2, prenet_layers=prenet_layers, residual=residual)
    prenet = PrenetConfig(MEL, HIDDEN, prenet_layers, 0.0) if prenet_layers else None
    width = HIDDEN if prenet_layers else MEL
    model = APCModel(MEL, prenet, RNNConfig(width, HIDDEN, 2, 0.0, residual))
    model.load_state_dict(reference.state_dict())
    return reference, model


def padded_batch(lengths, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randn(len(lengths), SEQ_LEN, MEL, generator=generator)
    for b, n in enumerate(lengths):
        batch[b, n:] = 0
    return batch, torch.tensor(lengths)


def parts(model, batch, lengths, shift, cut):
    """(real, padding) of a batch, cut to its longest utterance as the collate step does, or not."""
    if cut:
        batch = batch[:, : int(lengths.max())]
    predicted, _ = model(batch[:, :-shift], lengths - shift)
    return apc_loss(predicted, batch, lengths, shift, SEQ_LEN, model.postnet.layer.bias)


def compare_gradients(model, reference):
    for (name, got), expected in zip(model.named_parameters(), reference.parameters()):
        torch.testing.assert_close(
            got.grad, expected.grad, rtol=1e-4, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}"
        )


@shifts
@cuts
@pytest.mark.parametrize("lengths", [LENGTHS, [40, 21, 40], [40, 40], [21], [22, 23, 21]])
@pytest.mark.parametrize("prenet_layers", [0, 2])
def test_the_originals_loss_and_gradients(shift, cut, lengths, prenet_layers):
    """Value and every gradient, the postnet's bias included, of all positions up to seq_len."""
    reference, model = models(prenet_layers)
    batch, lengths = padded_batch(lengths)
    expected = padded_loss(reference, batch, lengths, shift)
    real, padding = parts(model, batch, lengths, shift, cut)
    loss = (real + padding) / (len(lengths) * (SEQ_LEN - shift))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    loss.backward()
    compare_gradients(model, reference)


@shifts
@cuts
def test_the_loss_of_real_frames_and_its_gradients(shift, cut):
    reference, model = models()
    batch, lengths = padded_batch(LENGTHS)
    expected = frame_loss(reference, batch, lengths, shift)
    real, _ = parts(model, batch, lengths, shift, cut)
    loss = real / (lengths - shift).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    expected.backward()
    loss.backward()
    compare_gradients(model, reference)


@shifts
def test_both_parts_counted_by_hand(shift):
    """Each part position by position, the predictions being any numbers."""
    batch, lengths = padded_batch(LENGTHS)
    batch = batch[:, : int(lengths.max())]
    generator = torch.Generator().manual_seed(5)
    bias = torch.randn(MEL, generator=generator)
    predicted = torch.randn(batch[:, shift:].shape, generator=generator)
    for b, n in enumerate(LENGTHS):
        predicted[b, n - shift :] = bias
    real, padding = apc_loss(predicted, batch, lengths, shift, SEQ_LEN, bias)
    by_hand = sum(
        sum(abs(float(predicted[b, t, d] - batch[b, t + shift, d])) for d in range(MEL)) / MEL
        for b, n in enumerate(LENGTHS)
        for t in range(n - shift)
    )
    empty = sum(SEQ_LEN - n for n in LENGTHS)  # (seq_len - shift) - (n - shift) positions each
    assert real.shape == padding.shape == ()
    assert real.item() == pytest.approx(by_hand, rel=1e-5)
    assert padding.item() == pytest.approx(empty * float(bias.abs().mean()), rel=1e-5)


def test_one_target_an_utterance():
    """The shortest utterances that are kept have a single frame to predict."""
    _, model = models()
    batch, lengths = padded_batch([4, 4, 4])
    predicted, _ = model(batch[:, :1], lengths - 3)
    real, _ = parts(model, batch, lengths, 3, cut=True)
    expected = (predicted[:, 0] - batch[:, 3]).abs().mean(-1).sum()
    assert real.item() == pytest.approx(expected.item(), rel=1e-5)


def test_no_padding_costs_nothing():
    _, model = models()
    batch, lengths = padded_batch([SEQ_LEN, SEQ_LEN])
    assert parts(model, batch, lengths, 1, cut=True)[1].item() == 0


def test_order_of_utterances_does_not_matter():
    _, model = models()
    batch, lengths = padded_batch(LENGTHS)
    order = torch.tensor([2, 0, 3, 1])
    a = parts(model, batch, lengths, 3, cut=True)
    b = parts(model, batch[order], lengths[order], 3, cut=True)
    assert [x.item() for x in b] == pytest.approx([x.item() for x in a], rel=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_cuda_gives_the_cpu_loss(where):
    _, model = models()
    batch, lengths = padded_batch(LENGTHS)
    expected = [x.item() for x in parts(model, batch, lengths, 3, cut=True)]
    got = parts(model.cuda(), batch.cuda(), lengths.to(where), 3, cut=True)
    assert [x.item() for x in got] == pytest.approx(expected, rel=1e-4)
