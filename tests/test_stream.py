"""APCModel.stream: speech that comes in pieces gives what forward() gives for the whole of it."""

import copy

import pytest
import torch

from apc_model import APCModel
from utils import PrenetConfig, RNNConfig

MEL, FRAMES, STREAMS = 12, 37, 3
CASES = {
    "gru": dict(hidden=16, layers=3),
    "gru-residual": dict(hidden=16, layers=3, residual=True),
    "gru-residual-into-first": dict(hidden=MEL, layers=3, residual=True),
    "gru-one-layer": dict(hidden=16, layers=1),
    "gru-prenet-residual": dict(hidden=16, layers=2, prenet_layers=2, residual=True),
    "lstm": dict(hidden=16, layers=3, rnn_type="lstm"),
    "lstm-residual-into-first": dict(hidden=MEL, layers=2, residual=True, rnn_type="lstm"),
    "lstm-prenet": dict(hidden=16, layers=2, prenet_layers=1, rnn_type="lstm"),
    "lstm-one-layer-prenet-residual": dict(
        hidden=16, layers=1, prenet_layers=1, residual=True, rnn_type="lstm"
    ),
}
CHUNKS = {
    "whole": [FRAMES],
    "frame by frame": [1] * FRAMES,
    "irregular": [3, 1, 17, 2, 9, 5],
    "one, then the rest": [1, FRAMES - 1],
    "nothing at the start": [0, 0, 20, 17],
    "nothing here and there": [5, 0, 8, 0, 0, 24, 0],
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def build(hidden, layers, prenet_layers=0, residual=False, rnn_type="gru"):
    """In eval mode; the dropout is there to be seen if it were active."""
    torch.manual_seed(0)
    prenet = PrenetConfig(MEL, hidden, prenet_layers, 0.5) if prenet_layers else None
    width = hidden if prenet_layers else MEL
    return APCModel(MEL, prenet, RNNConfig(width, hidden, layers, 0.5, residual, rnn_type)).eval()


def speech(streams=STREAMS, frames=FRAMES, seed=1):
    return torch.randn(streams, frames, MEL, generator=torch.Generator().manual_seed(seed))


def whole(model, inputs):
    lengths = torch.full((inputs.size(0),), inputs.size(1))
    return model(inputs, lengths)


def streamed(model, inputs, sizes, state=None):
    """Stream the inputs in chunks of these sizes -> (predicted_mel, internal_reps, state)."""
    predicted, reps = [], []
    for chunk in inputs.split(list(sizes), dim=1):
        outputs = model.stream(chunk, state)
        assert len(outputs) == 3
        predicted.append(outputs[0])
        reps.append(outputs[1])
        state = outputs[2]
    return torch.cat(predicted, dim=1), torch.cat(reps, dim=2), state


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def tensors(state):
    """The tensors of a state, whatever it is made of."""
    if isinstance(state, torch.Tensor):
        return [state]
    return [tensor for part in state for tensor in tensors(part)]


@every_case
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_chunks_together_are_the_whole(case, sizes):
    model, inputs = build(**case), speech()
    with torch.no_grad():
        predicted, reps, _ = streamed(model, inputs, sizes)
        expected = whole(model, inputs)
    layers = case["layers"] + bool(case.get("prenet_layers"))
    assert predicted.shape == (STREAMS, FRAMES, MEL)
    assert reps.shape == (layers, STREAMS, FRAMES, case["hidden"])
    close(predicted, expected[0])
    close(reps, expected[1])


@pytest.mark.parametrize("case", ["gru-residual", "lstm-prenet"])
def test_many_random_cuts(case):
    model, inputs = build(**CASES[case]), speech(frames=200)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        expected = whole(model, inputs)
        for _ in range(10):
            cuts = torch.randint(0, 201, (15,), generator=generator).sort().values.tolist()
            sizes = [end - start for start, end in zip([0, *cuts], [*cuts, 200])]
            predicted, reps, _ = streamed(model, inputs, sizes)
            close(predicted, expected[0])
            close(reps, expected[1])


@every_case
def test_streams_of_a_batch_do_not_meet(case):
    model, inputs = build(**case), speech()
    with torch.no_grad():
        predicted, reps, _ = streamed(model, inputs, [7, 1, 29])
        for b in range(STREAMS):
            alone = streamed(model, inputs[b : b + 1], [20, 17])
            close(predicted[b : b + 1], alone[0])
            close(reps[:, b : b + 1], alone[1])


@every_case
def test_nothing_comes_out_of_nothing(case):
    """A chunk without frames gives outputs without frames, and leaves the state as it was."""
    model, inputs = build(**case), speech()
    layers = case["layers"] + bool(case.get("prenet_layers"))
    nothing = inputs[:, :0]
    with torch.no_grad():
        _, _, before = model.stream(inputs)
        for state in (None, before):
            predicted, reps, after = model.stream(nothing, state)
            assert predicted.shape == (STREAMS, 0, MEL)
            assert reps.shape == (layers, STREAMS, 0, case["hidden"])
            assert predicted.dtype == reps.dtype == torch.float32
            if state is not None:
                assert all(torch.equal(a, b) for a, b in zip(tensors(before), tensors(after)))


@every_case
def test_state_is_as_documented(case):
    """A list with a state a layer; (1, B, H) for a GRU, a pair of them for an LSTM."""
    with torch.no_grad():
        _, _, state = build(**case).stream(speech())
    assert isinstance(state, list) and len(state) == case["layers"]
    shape = (1, STREAMS, case["hidden"])
    for layer in state:
        if case.get("rnn_type") == "lstm":
            assert isinstance(layer, tuple) and [tuple(part.shape) for part in layer] == [shape] * 2
        else:
            assert isinstance(layer, torch.Tensor) and tuple(layer.shape) == shape


@every_case
@pytest.mark.parametrize("size", [1, 6])
def test_state_is_not_changed_in_place(case, size):
    """One may keep a state and go on from it twice, as a beam search does."""
    model, inputs = build(**case), speech()
    with torch.no_grad():
        _, _, state = model.stream(inputs[:, :10])
        kept = copy.deepcopy(state)
        first = model.stream(inputs[:, 10 : 10 + size], state)
        other = model.stream(-inputs[:, 10 : 10 + size], state)
        again = model.stream(inputs[:, 10 : 10 + size], state)
    assert len(state) == len(kept) == case["layers"]
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(kept)))
    assert torch.equal(first[1], again[1]) and torch.equal(first[0], again[0])
    assert not torch.allclose(first[1], other[1])


@every_case
def test_inputs_are_not_changed_in_place(case):
    model, inputs = build(**case), speech()
    before = inputs.clone()
    with torch.no_grad():
        streamed(model, inputs, [1, 30, 6])
    assert torch.equal(inputs, before)


def test_outputs_are_not_overwritten_by_the_next_chunk():
    model, inputs = build(**CASES["gru-residual-into-first"]), speech()
    with torch.no_grad():
        predicted, reps, state = model.stream(inputs[:, :5])
        copies = predicted.clone(), reps.clone()
        model.stream(inputs[:, 5:], state)
    assert torch.equal(predicted, copies[0]) and torch.equal(reps, copies[1])


@every_case
def test_without_a_state_an_utterance_begins(case):
    model, inputs = build(**case), speech()
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = model.stream(inputs)
        model.stream(speech(seed=2), first[2])
        second = model.stream(inputs)
        third = model.stream(inputs, None)
    for again in (second, third):
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("case", ["gru-residual", "lstm"])
def test_two_calls_on_one_model_are_independent(case):
    """Interleaved speakers, each with the state of its own."""
    model, ours, theirs = build(**CASES[case]), speech(1), speech(1, seed=2)
    got, states = {"ours": [], "theirs": []}, {}
    with torch.no_grad():
        for start in range(0, FRAMES, 5):
            for name, inputs in (("ours", ours), ("theirs", theirs)):
                chunk = inputs[:, start : start + 5]
                _, reps, states[name] = model.stream(chunk, states.get(name))
                got[name].append(reps)
        close(torch.cat(got["ours"], dim=2), whole(model, ours)[1])
        close(torch.cat(got["theirs"], dim=2), whole(model, theirs)[1])


@every_case
def test_real_time_use_under_inference_mode(case):
    """Frame by frame as they come from a sound card, the state handed on in inference mode."""
    model, inputs = build(**case), speech(1)
    expected = whole(model, inputs)[1].detach()
    state, frames = None, []
    for t in range(FRAMES):
        with torch.inference_mode():  # entered anew for each frame
            predicted, reps, state = model.stream(inputs[:, t : t + 1], state)
        assert not predicted.requires_grad and not reps.requires_grad
        frames.append(reps[-1, 0, 0].clone())
    close(torch.stack(frames), expected[-1, 0])


@pytest.mark.parametrize("case", ["gru", "lstm"])
def test_state_of_inference_mode_serves_without_it(case):
    model, inputs = build(**CASES[case]), speech()
    with torch.inference_mode():
        _, _, state = model.stream(inputs[:, :9])
    with torch.no_grad():
        _, reps, _ = model.stream(inputs[:, 9:], state)
        close(reps, whole(model, inputs)[1][:, :, 9:])


@every_case
def test_gradients_flow_through_the_state(case):
    """Where they are wanted, they are those of the whole."""
    model, inputs = build(**case), speech()
    grads = []
    for run in (lambda: whole(model, inputs)[:2], lambda: streamed(model, inputs, [4, 0, 30, 3])):
        model.zero_grad()
        outputs = run()
        (outputs[0].pow(2).mean() + outputs[1].pow(2).mean()).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in grads[0].items():
        close(grads[1][name], expected)


@pytest.mark.parametrize("case", ["gru-prenet-residual", "lstm-prenet"])
def test_in_double_precision(case):
    model, inputs = build(**CASES[case]).double(), speech().double()
    with torch.no_grad():
        predicted, reps, _ = streamed(model, inputs, [0, 1, 20, 0, 16])
        expected = whole(model, inputs)
    assert predicted.dtype == reps.dtype == torch.float64
    close(predicted, expected[0], 1e-12)
    close(reps, expected[1], 1e-12)


def test_chunks_may_be_views_in_any_layout():
    """A ring buffer's frames lie transposed, or with gaps between them."""
    model, inputs = build(**CASES["gru-residual"]), speech()
    with torch.no_grad():
        expected = whole(model, inputs)[1]
        transposed = inputs.transpose(0, 1).contiguous().transpose(0, 1)
        close(streamed(model, transposed, [10, 27])[1], expected)
        spaced = inputs.repeat_interleave(2, dim=1)[:, ::2]
        close(streamed(model, spaced, [10, 27])[1], expected)


@needs_cuda
@every_case
def test_on_a_gpu(case):
    model, inputs = build(**case), speech()
    with torch.inference_mode():
        expected = whole(model, inputs)
        predicted, reps, state = streamed(model.cuda(), inputs.cuda(), [1, 0, 20, 16])
    assert all(tensor.is_cuda for tensor in [predicted, reps, *tensors(state)])
    close(predicted.cpu(), expected[0], 1e-4)
    close(reps.cpu(), expected[1], 1e-4)
