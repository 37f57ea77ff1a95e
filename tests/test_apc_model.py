"""apc_model.py: the model is the packed reference, whole or in chunks; the loss, by brute force."""

import copy
import math
from collections import namedtuple

import pytest
import torch
from reference import PackedAPC, TextbookTransformer, frame_loss, padded_loss
from torch import nn

from apc_model import APCModel, LossSums, apc_loss
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
    "lstm-one-layer-prenet-residual": dict(
        hidden=16, layers=1, prenet_layers=2, residual=True, rnn_type="lstm"
    ),
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


def pair(case, **dropouts):
    """The reference and the model under test with the same weights, in eval mode."""
    torch.manual_seed(0)
    reference = PackedAPC(MEL, **case).eval()
    model = build(**case, **dropouts).eval()
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


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def gradients(net):
    return {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


# The model ----------------------------------------------------------------------------------------


@every_case
def test_outputs_and_gradients_are_the_packed_models(case):
    """Gradients of the predictions and of the representations, for every weight and the inputs."""
    reference, model = pair(case)
    for lengths in ([11, 8, 3, 1], [1, 3, 8, 11], [3, 11, 1, 11, 7], [13, 13], [6]):
        batch, lengths = padded_batch(lengths)
        outputs, found = [], []
        for net in (reference, model):
            net.zero_grad()
            inputs = batch.clone().requires_grad_()
            predicted, reps = net(inputs, lengths)
            (predicted.pow(2).mean() + reps.pow(2).mean()).backward()
            outputs.append((predicted, reps))
            found.append({"inputs": inputs.grad, **gradients(net)})
        close(outputs[1], outputs[0])
        close(found[1], found[0], 1e-6)


def test_state_dict_is_the_originals():
    """Names, order and shapes of the released weights."""
    model = build(hidden=16, layers=2, prenet_layers=1)
    gru = {"weight_ih": (48, 16), "weight_hh": (48, 16), "bias_ih": (48,), "bias_hh": (48,)}
    assert [(name, tuple(value.shape)) for name, value in model.state_dict().items()] == [
        ("prenet.layers.0.weight", (16, MEL)),
        ("prenet.layers.0.bias", (16,)),
        *((f"rnns.{i}.{name}_l0", shape) for i in range(2) for name, shape in gru.items()),
        ("postnet.layer.weight", (MEL, 16, 1)),
        ("postnet.layer.bias", (MEL,)),
    ]


def test_configs_of_code_written_for_the_original():
    """Five values make an RNN's, which is a GRU then; other classes with the same fields will do.
    Whether it is residual is never guessed."""
    model = APCModel(MEL, PrenetConfig(MEL, 16, 2, 0.1), RNNConfig(16, 16, 3, 0.2, True))
    assert model.mel_dim == MEL and [type(rnn) for rnn in model.rnns] == [nn.GRU] * 3
    assert len(model.prenet.layers) == 2
    assert (model.prenet.dropout.p, model.rnn_dropout.p) == (0.1, 0.2)
    fields = "input_size", "hidden_size", "num_layers", "dropout"
    prenet = namedtuple("PrenetConfig", fields)(MEL, 16, 1, 0.0)
    for residual in (True, False):
        rnn = namedtuple("RNNConfig", [*fields, "residual"])(16, 16, 2, 0.0, residual)
        model = APCModel(MEL, prenet, rnn)
        assert isinstance(model.rnns[1], nn.GRU) and model.rnn_residual is residual
    with pytest.raises(TypeError, match="residual"):
        RNNConfig(16, 16, 2, 0.0)


@pytest.mark.parametrize("case", ["residual-into-first", "lstm"])
def test_a_batch_too_large_for_one_chunk(case):
    """Utterances that end in, at and after the seams of T, and the gradient through these."""
    reference, model = pair(CASES[case])
    inputs, lengths = padded_batch(range(4, 196, 3), 196)  # 64 utterances: in chunks of 64 frames
    outputs, found = [], []
    for net in (reference.double(), model.double()):
        padded_loss(net, inputs.double(), lengths, 3).backward()
        outputs.append(net(inputs.double(), lengths))
        found.append(gradients(net))
    close(outputs[1], outputs[0], 1e-12)
    close(found[1], found[0], 1e-12)


@every_case
def test_padding(case):
    """Its content reaches no output and no gradient; beyond the lengths, 0 and the bias."""
    _, model = pair(case)
    inputs, lengths = padded_batch([4, 13, 9])
    outside = ~real(lengths)
    outputs, found = {}, {}
    for garbage in (0.0, 1e3, math.inf, math.nan):
        predicted, reps = model(inputs.masked_fill(outside[..., None], garbage), lengths)
        assert (reps[:, outside] == 0).all()
        assert (predicted[outside] == model.postnet.layer.bias).all()
        model.zero_grad()
        (predicted.abs().mean() + reps.pow(2).mean()).backward()
        outputs[garbage], found[garbage] = (predicted, reps), gradients(model)
        close(outputs[garbage], outputs[0.0], 1e-6)
    close(found[1e3], found[0.0], 1e-6)


@every_case
def test_causal(case):
    """Changing a frame changes no output before it, and every output at it."""
    _, model = pair(case)
    inputs, lengths = padded_batch([13, 13])
    for t in (0, 1, 6, 12):
        changed = inputs.clone()
        changed[:, t] += 1.0
        with torch.no_grad():
            before, after = model(inputs, lengths), model(changed, lengths)
        for a, b in zip(before, after):
            close(b[..., :t, :], a[..., :t, :], 1e-6)
            assert ((b[..., t, :] - a[..., t, :]).abs().amax(-1) > 1e-4).all()


def test_rnn_dropout_follows_every_layer_but_the_last():
    model = build(hidden=16, layers=3, prenet_layers=1, dropout=1.0).train()
    inputs, lengths = padded_batch([13, 6])
    _, reps = model(inputs, lengths)
    assert (reps[0] != 0).any(), "the prenet has a dropout of its own"
    assert (reps[1:3] == 0).all()
    expected = model.rnns[2](torch.zeros(2, FRAMES, 16))[0] * real(lengths)[..., None]
    close(reps[3], expected, 1e-6)
    assert (model.eval()(inputs, lengths)[1][:, real(lengths)] != 0).any(-1).all()
    single = build(hidden=16, layers=1, dropout=0.9)
    close(single.train()(inputs, lengths)[1], single.eval()(inputs, lengths)[1], 1e-6)


def test_dropout_comes_before_the_residual_sum():
    """A dropped layer passes its input on, the first layer included when widths are equal."""
    model = build(hidden=MEL, layers=3, residual=True, dropout=1.0).train()
    inputs, lengths = padded_batch([13, 6])
    _, reps = model(inputs, lengths)
    assert torch.equal(reps[0], inputs) and torch.equal(reps[1], inputs)


def test_prenet_drops_after_the_relu_of_each_of_its_layers():
    """Through an identity as second layer a unit survives both dropouts or neither."""
    model = build(hidden=16, layers=1, prenet_layers=2, prenet_dropout=0.5).train()
    with torch.no_grad():
        model.prenet.layers[1].weight.copy_(torch.eye(16))
        model.prenet.layers[1].bias.zero_()
    torch.manual_seed(0)
    inputs, lengths = padded_batch([100] * 8, frames=100)
    first = model.prenet.layers[0]
    once = (inputs @ first.weight.T + first.bias).clamp(min=0)
    twice = model(inputs, lengths)[1][0]
    kept = twice != 0
    close(twice[kept], 4 * once[kept])
    assert kept[once > 0].float().mean() == pytest.approx(0.25, abs=0.03)


def test_sizes_that_do_not_fit_are_named():
    rnn = RNNConfig(16, 16, 2, 0.0, False)
    cases = {
        "input_size.*11.*12": (None, rnn._replace(input_size=11)),
        "input_size.*13.*12": (PrenetConfig(13, 16, 1, 0.0), rnn),
        "hidden_size.*14.*16": (PrenetConfig(MEL, 14, 1, 0.0), rnn),
        "hidden_size.*16.*18": (PrenetConfig(MEL, 16, 1, 0.0), rnn._replace(hidden_size=18)),
        "'rnn'.*gru.*lstm.*transformer": (None, RNNConfig(MEL, 16, 2, 0.0, False, "rnn")),
        "multiple of 64.*96": (None, RNNConfig(MEL, 96, 2, 0.0, False, "transformer")),
        "residual": (None, RNNConfig(MEL, 64, 2, 0.0, True, "transformer")),
        "0 layers": (None, RNNConfig(MEL, 16, 0, 0.0, False)),
    }
    for message, configs in cases.items():
        with pytest.raises(ValueError, match=message):
            APCModel(MEL, *configs)


@pytest.mark.parametrize("rnn_type", ["gru", "transformer"])
def test_lengths_that_are_no_lengths_are_rejected(rnn_type):
    """Shares of T, counts of samples, a length too few: each would let padding through."""
    model = build(hidden=64, layers=1, rnn_type=rnn_type)
    inputs, lengths = padded_batch([13, 5])
    expected = model(inputs, lengths)
    for same in ([13, 5], lengths.numpy(), lengths.int()):
        close(model(inputs, same), expected)
    wrong = [torch.tensor([1.0, 0.4]), lengths.float(), [13, 14], [13, -1], [13], [13, 5, 1], 13]
    for lengths in wrong:
        with pytest.raises(ValueError, match="lengths"):
            model(inputs, lengths)


def test_representations_are_left_out_on_request():
    """As in training: no copy of every layer's outputs is made."""
    inputs, lengths = padded_batch([13, 5])
    for rnn_type in ("lstm", "transformer"):
        model = build(hidden=64, layers=2, rnn_type=rnn_type).eval()
        predicted, reps = model(inputs, lengths, need_reps=False)
        assert reps is None
        assert torch.equal(predicted, model(inputs, lengths)[0])


# The Transformer ----------------------------------------------------------------------------------


def transformer_pair():
    torch.manual_seed(0)
    model = build(hidden=128, layers=3, rnn_type="transformer").eval()
    with torch.no_grad():  # norms start as the identity, which would hide them
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    return TextbookTransformer(weights, 3), model


def test_transformers_outputs_and_gradients_are_the_textbooks():
    reference, model = transformer_pair()
    batch, lengths = padded_batch([11, 3, 13, 1])
    outputs, found = [], []
    for net in (reference, model):
        inputs = batch.clone().requires_grad_()
        predicted, reps = net(inputs, lengths)
        (predicted.pow(2).mean() + reps.pow(2).mean()).backward()
        outputs.append((predicted, reps))
        named = {
            name.removeprefix("weights.").replace("/", "."): g for name, g in gradients(net).items()
        }
        found.append({"inputs": inputs.grad, **named})
    close(outputs[1], outputs[0])
    close(found[1], found[0])


@pytest.mark.parametrize("training", [False, True])
def test_transformer_is_causal(training):
    """In eval mode, where nn.TransformerEncoderLayer's fast path is not, as well as in training."""
    _, model = transformer_pair()
    model.train(training)
    inputs, lengths = padded_batch([13, 13])
    for t in (0, 1, 6, 12):
        changed = inputs.clone()
        changed[:, t:] += 1.0
        with torch.no_grad():
            before, after = model(inputs, lengths), model(changed, lengths)
        for a, b in zip(before, after):
            close(b[..., :t, :], a[..., :t, :], 1e-6)
            assert ((b[..., t, :] - a[..., t, :]).abs().amax(-1) > 1e-4).all()


def test_batch_and_padding_make_no_difference_to_a_transformer():
    _, model = transformer_pair()
    inputs, lengths = padded_batch([4, 13, 9])
    predicted, reps = model(inputs, lengths)
    garbage = inputs.masked_fill(~real(lengths)[..., None], math.nan)
    close(model(garbage, lengths), (predicted, reps))
    for i, n in enumerate(lengths.tolist()):
        one, one_reps = model(inputs[i : i + 1, :n], [n])
        close(one[0], predicted[i, :n])
        close(one_reps[:, 0], reps[:, i, :n])
        assert (reps[:, i, n:] == 0).all()
        assert (predicted[i, n:] == model.postnet.layer.bias).all()


def test_transformers_dropout_acts_on_what_each_sublayer_adds():
    model = build(hidden=64, layers=2, rnn_type="transformer", dropout=1.0).train()
    inputs, lengths = padded_batch([13, 13])
    _, reps = model(inputs, lengths)
    close(model.final_norm(reps[0]), reps[1])  # the second block adds nothing


def test_transformer_holds_no_matrix_of_all_pairs_of_frames():
    """The memory that a training step needs grows with T, not with T squared."""
    peaks = []
    model = build(hidden=64, layers=1, rnn_type="transformer")
    for num_frames in (1024, 4096):
        inputs = torch.randn(1, num_frames, MEL)
        saved = []

        def pack(tensor):
            saved.append(tensor.untyped_storage().nbytes())  # noqa: B023
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(inputs, [num_frames])[0].sum().backward()
        peaks.append(max(saved))
    assert peaks[1] <= 4.1 * peaks[0]
    assert peaks[1] < 4096 * 4096


def test_transformers_do_not_stream():
    with pytest.raises(ValueError, match="GRU or LSTM"):
        build(hidden=64, layers=1, rnn_type="transformer").stream(torch.zeros(1, 3, MEL))


# Streaming ----------------------------------------------------------------------------------------

STREAMED = 37  # frames
CHUNKS = [1] * STREAMED, [3, 1, 17, 2, 9, 5], [0, 0, 20, 0, 17, 0]


@every_case
def test_chunks_together_are_the_packed_model(case):
    """As real-time use has it: no gradient, each chunk with the state of the one before it."""
    reference, model = pair(case, dropout=0.5)
    inputs, lengths = padded_batch([STREAMED] * 3, STREAMED)
    with torch.no_grad():
        expected = reference(inputs, lengths)
    for sizes in CHUNKS:
        predicted, reps, state = [], [], None
        for chunk in inputs.split(sizes, dim=1):
            with torch.inference_mode():  # entered anew for each chunk
                *outputs, state = model.stream(chunk, state)
            assert outputs[0].shape == chunk.shape
            assert outputs[1].shape == (len(expected[1]), *chunk.shape[:2], case["hidden"])
            predicted.append(outputs[0])
            reps.append(outputs[1])
        close((torch.cat(predicted, dim=1), torch.cat(reps, dim=2)), expected)


@every_case
def test_the_state_of_a_stream(case):
    """A list with a state a layer, (1, B, H) for a GRU, a pair of them for an LSTM; it may be kept
    and continued from twice, and a chunk of no frames leaves it as it was."""
    _, model = pair(case)
    inputs, _ = padded_batch([FRAMES] * 3)
    with torch.no_grad():
        _, _, state = model.stream(inputs[:, :10])
        first, again = (model.stream(inputs[:, 10:], state)[:2] for _ in range(2))
        _, _, after_nothing = model.stream(inputs[:, :0], state)
    assert isinstance(state, list) and len(state) == case["layers"]
    shape, is_lstm = (1, 3, case["hidden"]), case.get("rnn_type") == "lstm"
    for layer in state:
        assert isinstance(layer, tuple if is_lstm else torch.Tensor)
        assert [part.shape for part in (layer if is_lstm else [layer])] == [shape] * (1 + is_lstm)
    close(after_nothing, state, 0)
    close(again, first, 0)


# The loss -----------------------------------------------------------------------------------------

SEQ_LEN = 40
shifts = pytest.mark.parametrize("shift", [1, 3, 20])


def sums(model, batch, lengths, shift):
    predicted, _ = model(batch[:, :-shift], lengths - shift)
    return apc_loss(predicted, batch, lengths, shift, SEQ_LEN, model.postnet.layer.bias)


@shifts
@pytest.mark.parametrize("case", ["residual", "deep-prenet-residual"])
def test_both_losses_and_all_their_gradients(case, shift):
    """Value and every gradient, the postnet's bias included, by brute force on the whole batch; cut
    to the longest utterance or not, utterances without padding or all alike among them."""
    reference, model = pair(CASES[case])
    for lengths in ([31, 24, 22, 36], [40, 21, 40], [40, 40], [21]):
        batch, lengths = padded_batch(lengths, SEQ_LEN)
        for brute_force, which in ((padded_loss, "with_padding"), (frame_loss, "per_valid_frame")):
            reference.zero_grad()
            expected = brute_force(reference, batch, lengths, shift)
            expected.backward()
            wanted = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
            for frames in (SEQ_LEN, int(lengths.max())):
                means = sums(model, batch[:, :frames], lengths, shift).means(shift, SEQ_LEN)
                loss = getattr(means, which)
                assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
                model.zero_grad()
                loss.backward()
                torch.testing.assert_close(gradients(model), wanted, rtol=1e-4, atol=1e-7)


@shifts
def test_both_means_of_an_epoch(shift):
    """Summed over batches of different sizes they are the mean over all
    utterances' time steps as they lie on disk, and the mean over all valid frames. Predictions are
    any numbers, beyond the lengths too; an utterance of 0 frames counts for nothing."""
    generator = torch.Generator().manual_seed(3)
    bias = torch.randn(MEL, generator=generator, dtype=torch.float64)
    with_padding, valid_frames = [], []
    total = LossSums()
    for lengths in ([31, 24, 0, 40], [shift + 1], [40, 22, 23, 36, 21]):
        batch, lengths = padded_batch(lengths, SEQ_LEN, seed=len(lengths))
        predicted = torch.randn(batch[:, shift:].shape, generator=generator).double()
        for b, n in enumerate(lengths.tolist()):
            if n == 0:
                continue
            on_disk = predicted[b].clone()
            on_disk[n - shift :] = bias
            error = (on_disk - batch[b, shift:]).abs().mean(-1)
            with_padding.append(error.mean())
            valid_frames.append(error[: n - shift])
        longest = int(lengths.max())
        predicted, batch = predicted[:, : longest - shift], batch[:, :longest]
        part = apc_loss(predicted, batch, lengths, shift, SEQ_LEN, bias)
        total = total + part
    losses = total.means(shift, SEQ_LEN)
    assert total.utterances == len(with_padding)
    assert losses.with_padding == pytest.approx(torch.stack(with_padding).mean().item(), rel=1e-6)
    assert losses.per_valid_frame == pytest.approx(torch.cat(valid_frames).mean().item(), rel=1e-6)
    assert all(math.isnan(loss) for loss in LossSums().means(shift, SEQ_LEN))


# On a GPU -----------------------------------------------------------------------------------------


@needs_cuda
@every_case
def test_cuda_gives_the_cpus_numbers(case):
    """forward(), wherever the lengths are, the loss, and stream()."""
    _, model = pair(case)
    inputs, lengths = padded_batch([22, 40, 31], SEQ_LEN)
    on_gpu, frames = copy.deepcopy(model).cuda(), inputs.cuda()
    with torch.no_grad():
        expected, losses = model(inputs, lengths), sums(model, inputs, lengths, 3)
        streamed, _, state = model.stream(inputs)
        for where in ("cpu", "cuda"):
            got = on_gpu(frames, lengths.to(where))
            assert all(output.is_cuda for output in got)
            close([output.cpu() for output in got], list(expected), 1e-4)
            found = sums(on_gpu, frames, lengths.to(where), 3)
            assert found.valid.item() == pytest.approx(losses.valid.item(), rel=1e-4)
            assert found.padding.item() == pytest.approx(losses.padding.item(), rel=1e-4)
        _, _, state = on_gpu.stream(frames[:, :11])
        predicted, _, _ = on_gpu.stream(frames[:, 11:], state)
        close(predicted.cpu(), streamed[:, 11:], 1e-4)
