"""The model against the packed reference, and the properties that make packing needless."""

import copy

import pytest
import torch
from reference import PackedAPC, padded_loss
from torch import nn

from apc_model import APCModel
from utils import PrenetConfig, RNNConfig

MEL = 12
CASES = {
    "plain": dict(hidden=16, layers=3),
    "one-layer": dict(hidden=16, layers=1, residual=True),
    "residual": dict(hidden=16, layers=3, residual=True),
    "residual-into-first": dict(hidden=MEL, layers=3, residual=True),
    "equal-widths-no-residual": dict(hidden=MEL, layers=2),
    "prenet": dict(hidden=16, layers=2, prenet_layers=1),
    "deep-prenet-residual": dict(hidden=16, layers=2, prenet_layers=3, residual=True),
    "lstm": dict(hidden=16, layers=3, rnn_type="lstm"),
    "lstm-residual-into-first": dict(hidden=MEL, layers=2, residual=True, rnn_type="lstm"),
    "lstm-prenet-residual": dict(
        hidden=16, layers=2, prenet_layers=2, residual=True, rnn_type="lstm"
    ),
}
LENGTHS = {
    "falling": [11, 8, 3, 1],
    "rising": [1, 3, 8, 11],
    "mixed-with-ties": [3, 11, 1, 11, 7],
    "all-full": [13, 13],
    "single": [6],
}
FRAMES = 13  # longer than most batches' longest utterance, as in a stored, padded batch
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def build(
    hidden,
    layers,
    prenet_layers=0,
    residual=False,
    rnn_type="gru",
    prenet_dropout=0.0,
    dropout=0.0,
):
    prenet = PrenetConfig(MEL, hidden, prenet_layers, prenet_dropout) if prenet_layers else None
    width = hidden if prenet_layers else MEL
    return APCModel(MEL, prenet, RNNConfig(width, hidden, layers, dropout, residual, rnn_type))


def pair(case, seed=0):
    """The reference and the model under test with the same weights, in eval mode."""
    torch.manual_seed(seed)
    reference = PackedAPC(MEL, **case).eval()
    model = build(**case).eval()
    model.load_state_dict(reference.state_dict(), strict=True)
    return reference, model


def padded_batch(lengths, frames=FRAMES, seed=1):
    """Random inputs (B, frames, MEL), zero beyond each length; lengths as an int64 tensor."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(len(lengths), frames, MEL, generator=generator)
    lengths = torch.tensor(lengths)
    return inputs * real(lengths, frames)[..., None], lengths


def real(lengths, frames=FRAMES):
    return torch.arange(frames) < lengths[:, None]


def close(a, b, tolerance=1e-5):
    return torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@every_case
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
def test_outputs_are_the_packed_models(case, lengths):
    reference, model = pair(case)
    inputs, lengths = padded_batch(lengths)
    with torch.no_grad():
        expected, got = reference(inputs, lengths), model(inputs, lengths)
    close(got[0], expected[0])
    close(got[1], expected[1])


@every_case
def test_shapes_and_dtype(case):
    model = build(**case)
    inputs, lengths = padded_batch([4, 13, 9])
    predicted, reps = model(inputs, lengths)
    layers = case["layers"] + (1 if case.get("prenet_layers") else 0)
    assert predicted.shape == (3, FRAMES, MEL)
    assert reps.shape == (layers, 3, FRAMES, case["hidden"])
    assert predicted.dtype == reps.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@every_case
def test_state_dict_is_the_originals(case):
    """Same names, order and shapes, and strict loading in both directions."""
    reference, model = PackedAPC(MEL, **case), build(**case)
    ours, theirs = model.state_dict(), reference.state_dict()
    assert {k: tuple(v.shape) for k, v in ours.items()} == {
        k: tuple(v.shape) for k, v in theirs.items()
    }
    model.load_state_dict(theirs, strict=True)
    reference.load_state_dict(build(**case).state_dict(), strict=True)


def test_state_dict_keys_spelled_out():
    model = build(hidden=16, layers=2, prenet_layers=1)
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    rnn = {
        f"rnns.{i}.{name}_l0": shape
        for i in range(2)
        for name, shape in {
            "weight_ih": (48, 16),
            "weight_hh": (48, 16),
            "bias_ih": (48,),
            "bias_hh": (48,),
        }.items()
    }
    assert shapes == {
        "prenet.layers.0.weight": (16, MEL),
        "prenet.layers.0.bias": (16,),
        **rnn,
        "postnet.layer.weight": (MEL, 16, 1),
        "postnet.layer.bias": (MEL,),
    }


def test_parts_and_attributes_of_the_original():
    model = build(hidden=16, layers=3, residual=True)
    assert model.mel_dim == MEL and model.prenet is None and model.rnn_residual is True
    assert isinstance(model.postnet.layer, nn.Conv1d)
    assert model.postnet.layer.kernel_size == (1,)
    assert [type(rnn) for rnn in model.rnns] == [nn.GRU] * 3
    assert all(r.batch_first and r.num_layers == 1 and not r.bidirectional for r in model.rnns)
    lstm = build(hidden=16, layers=2, prenet_layers=1, rnn_type="lstm")
    assert lstm.prenet is not None and [type(rnn) for rnn in lstm.rnns] == [nn.LSTM] * 2


def test_configs_are_positional_as_in_the_original():
    """Five values make an RNN configuration, as in code written for the original; GRU then."""
    config = RNNConfig(MEL, 16, 2, 0.1, True)
    assert config.rnn_type == "gru"
    assert tuple(config)[:5] == (MEL, 16, 2, 0.1, True)
    assert tuple(PrenetConfig(MEL, 16, 2, 0.1)) == (MEL, 16, 2, 0.1)
    assert isinstance(APCModel(MEL, None, config).rnns[0], nn.GRU)


@every_case
def test_gradients_are_the_packed_models(case):
    """Of the original's loss and of the representations, for every weight and the inputs."""
    reference, model = pair(case)
    batch, lengths = padded_batch([5, 13, 2, 9])
    grads = []
    for net in (reference, model):
        inputs = batch.clone().requires_grad_()
        loss = padded_loss(net, batch, lengths, 1) + net(inputs, lengths)[1].pow(2).mean()
        loss.backward()
        grads.append({"inputs": inputs.grad, **{k: p.grad for k, p in net.named_parameters()}})
    for name, expected in grads[0].items():
        close(grads[1][name], expected, 1e-6)


@every_case
def test_batches_that_go_through_in_pieces_are_the_packed_models(case):
    """Utterances that end in, at and after the seams, and the gradient through them."""
    reference, model = pair(case)
    reference, model = reference.double(), model.double()
    inputs, lengths = padded_batch(range(10, 330, 10), 320)  # 32 utterances
    inputs = inputs.double()
    outputs, grads = [], []
    for net in (reference, model):
        padded_loss(net, inputs, lengths, 3).backward()
        grads.append({k: p.grad for k, p in net.named_parameters()})
        outputs.append(net(inputs, lengths))
    for expected, got in zip(*outputs):
        close(got, expected, 1e-12)
    for name, expected in grads[0].items():
        close(grads[1][name], expected, 1e-12)


@every_case
def test_beyond_the_lengths(case):
    """Representations are exactly 0 there and the prediction is the postnet's bias."""
    model = build(**case)
    inputs, lengths = padded_batch([4, 13, 9])
    predicted, reps = model(inputs, lengths)
    outside = ~real(lengths)
    assert outside.any() and (reps[:, outside] == 0).all()
    close(predicted[outside], model.postnet.layer.bias.expand(int(outside.sum()), MEL), 1e-7)


@every_case
@pytest.mark.parametrize("garbage", [1e3, float("nan"), float("inf")])
def test_padding_content_reaches_no_output(case, garbage):
    _, model = pair(case)
    inputs, lengths = padded_batch([4, 13, 9])
    dirty = inputs.masked_fill(~real(lengths)[..., None], garbage)
    clean_out, dirty_out = model(inputs, lengths), model(dirty, lengths)
    close(dirty_out[0], clean_out[0], 1e-6)
    close(dirty_out[1], clean_out[1], 1e-6)


@every_case
def test_padding_content_reaches_no_gradient(case):
    _, model = pair(case)
    inputs, lengths = padded_batch([4, 13, 9])
    dirty = inputs.masked_fill(~real(lengths)[..., None], 1e3)
    grads = []
    for batch in (inputs, dirty):
        model.zero_grad()
        predicted, reps = model(batch, lengths)
        (predicted.abs().mean() + reps.pow(2).mean()).backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for clean, got in zip(*grads):
        close(got, clean, 1e-6)


@every_case
def test_an_utterance_does_not_depend_on_its_batch(case):
    _, model = pair(case)
    inputs, lengths = padded_batch([4, 13, 9, 1])
    predicted, reps = model(inputs, lengths)
    for b, n in enumerate(lengths.tolist()):
        alone = model(inputs[b : b + 1, :n], lengths[b : b + 1])
        close(predicted[b, :n], alone[0][0], 1e-6)
        close(reps[:, b, :n], alone[1][:, 0], 1e-6)


@every_case
@pytest.mark.parametrize("t", [0, 1, 6, 12])
def test_causal(case, t):
    """Changing frame t leaves every output before t alone, and changes those at t."""
    _, model = pair(case)
    inputs, lengths = padded_batch([13, 13])
    changed = inputs.clone()
    changed[:, t] += 1.0
    with torch.no_grad():
        before, after = model(inputs, lengths), model(changed, lengths)
    for a, b in zip(before, after):
        close(b[..., :t, :], a[..., :t, :], 1e-6)
        assert ((b[..., t, :] - a[..., t, :]).abs().amax(-1) > 1e-4).all()


def test_rnn_dropout_follows_every_layer_but_the_last():
    model = build(hidden=16, layers=3, dropout=1.0).train()
    inputs, lengths = padded_batch([13, 6])
    _, reps = model(inputs, lengths)
    assert (reps[:2] == 0).all()
    silence = torch.zeros(2, FRAMES, 16)
    expected = model.rnns[2](silence)[0] * real(lengths)[..., None]
    close(reps[2], expected, 1e-6)
    assert (model.eval()(inputs, lengths)[1][:, real(lengths)] != 0).any(-1).all()


def test_rnn_dropout_rate():
    model = build(hidden=16, layers=3, dropout=0.25).train()
    torch.manual_seed(0)
    inputs, lengths = padded_batch([200] * 8, frames=200)
    _, reps = model(inputs, lengths)
    dropped = (reps == 0).float().mean(dim=(1, 2, 3))
    assert dropped[:2].tolist() == pytest.approx([0.25, 0.25], abs=0.02) and dropped[2] == 0


def test_dropout_comes_before_the_residual_sum():
    """A dropped layer passes its input on, the first layer included when widths are equal."""
    model = build(hidden=MEL, layers=3, residual=True, dropout=1.0).train()
    inputs, lengths = padded_batch([13, 6])
    _, reps = model(inputs, lengths)
    assert torch.equal(reps[0], inputs) and torch.equal(reps[1], inputs)


def test_a_single_layer_is_never_dropped():
    model = build(hidden=16, layers=1, dropout=0.9)
    inputs, lengths = padded_batch([13, 6])
    close(model.train()(inputs, lengths)[1], model.eval()(inputs, lengths)[1], 1e-6)


def test_prenet_is_relu_then_dropout():
    model = build(hidden=16, layers=1, prenet_layers=1, prenet_dropout=0.5)
    torch.manual_seed(0)
    inputs, lengths = padded_batch([100] * 8, frames=100)
    linear = inputs @ model.prenet.layers[0].weight.T + model.prenet.layers[0].bias
    rectified = linear.clamp(min=0)
    close(model.eval()(inputs, lengths)[1][0], rectified)
    dropped = model.train()(inputs, lengths)[1][0]
    kept = dropped != 0
    close(dropped[kept], 2 * rectified[kept])
    assert kept[rectified > 0].float().mean() == pytest.approx(0.5, abs=0.03)


def test_prenet_drops_after_each_of_its_layers():
    """Through an identity as second layer a unit survives both dropouts or neither."""
    model = build(hidden=16, layers=1, prenet_layers=2, prenet_dropout=0.5).train()
    with torch.no_grad():
        model.prenet.layers[1].weight.copy_(torch.eye(16))
        model.prenet.layers[1].bias.zero_()
    torch.manual_seed(0)
    inputs, lengths = padded_batch([100] * 8, frames=100)
    once = (inputs @ model.prenet.layers[0].weight.T + model.prenet.layers[0].bias).clamp(min=0)
    twice = model(inputs, lengths)[1][0]
    kept = twice != 0
    close(twice[kept], 4 * once[kept])
    assert kept[once > 0].float().mean() == pytest.approx(0.25, abs=0.03)


def test_rnn_dropout_leaves_the_prenet_alone():
    model = build(hidden=16, layers=2, prenet_layers=1, dropout=1.0).train()
    inputs, lengths = padded_batch([13, 6])
    _, reps = model(inputs, lengths)
    assert (reps[0] != 0).any() and (reps[1] == 0).all()


@pytest.mark.parametrize(
    "prenet, rnn, numbers",
    [
        (None, (11, 16, 2, 0.0, False), ("11", "12")),
        (PrenetConfig(13, 16, 1, 0.0), (16, 16, 2, 0.0, False), ("13", "12")),
        (PrenetConfig(12, 14, 1, 0.0), (16, 16, 2, 0.0, False), ("14", "16")),
        (PrenetConfig(12, 16, 1, 0.0), (16, 18, 2, 0.0, False), ("16", "18")),
    ],
    ids=["rnn-input", "prenet-input", "prenet-to-rnn", "rnn-hidden-with-prenet"],
)
def test_sizes_that_do_not_fit_are_named(prenet, rnn, numbers):
    with pytest.raises(ValueError) as caught:
        APCModel(MEL, prenet, RNNConfig(*rnn))
    message = str(caught.value)
    assert all(number in message for number in numbers) and len(message.split()) > 3


def test_an_unknown_rnn_type_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="(?is)transformer.*gru.*lstm|gru.*lstm.*transformer"):
        APCModel(MEL, None, RNNConfig(MEL, 16, 2, 0.0, False, "transformer"))


@needs_cuda
@every_case
def test_cuda_gives_the_cpu_outputs(case):
    """Lengths on either device."""
    _, model = pair(case)
    inputs, lengths = padded_batch([3, 13, 1, 9])
    with torch.no_grad():
        expected = model(inputs, lengths)
        on_gpu = copy.deepcopy(model).cuda()
        for where in ("cpu", "cuda"):
            got = on_gpu(inputs.cuda(), lengths.to(where))
            assert got[0].is_cuda and got[1].is_cuda
            close(got[0].cpu(), expected[0], 1e-4)
            close(got[1].cpu(), expected[1], 1e-4)


@needs_cuda
def test_cuda_lengths_with_cpu_inputs():
    _, model = pair(CASES["residual"])
    inputs, lengths = padded_batch([3, 13, 1, 9])
    with torch.no_grad():
        close(model(inputs, lengths.cuda())[1], model(inputs, lengths)[1], 1e-6)
