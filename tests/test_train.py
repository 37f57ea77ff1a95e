"""train.py run for real on tiny folders: what it writes, what it computes, what it refuses."""

import json
import os
import re

import pytest
import torch
from conftest import make_folder, run_forked, run_script
from reference import OPTIMIZERS, PackedAPC, evaluate, frame_loss, padded_loss, train_epoch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MEL, SEQ_LEN, HIDDEN = 20, 40, 16
TRAIN_LENGTHS = [33, 12, 40, 25, 40, 18, 29, 37, 21, 15]
SHORT = [2, 1]  # no frame to predict at the shifts that the tests use: left out
VALID_LENGTHS = [28, 40, 13]
EPOCH_LINE = r"Epoch: (\d+) Training Loss: (\d+\.\d{5}) Validation Loss: (\d+\.\d{5})"
TAGS = (
    "training loss (step-wise)",
    "gradient norm",
    "training loss (epoch-wise)",
    "validation loss (epoch-wise)",
)

# Each case: the flags beyond COMMON, the reference model's arguments, and how it is trained.
COMMON = [
    *("--feature_dim", MEL, "--rnn_hidden_size", HIDDEN, "--device", "cpu"),
    *("--load_data_workers", 0, "--seed", 7),
]
FOLLOW = {
    "gru-residual-adam": dict(
        flags="--rnn_num_layers 3 --rnn_residual --rnn_hidden_size 20 --time_shift 2"
        " --batch_size 4 --learning_rate 0.003 --epochs 15",
        model=dict(hidden=20, layers=3, residual=True),
        training=dict(shift=2, clip=1.0, batch=4, optimizer="adam", lr=0.003),
    ),
    "prenet-residual-sgd-clipped": dict(
        flags="--prenet_num_layers 2 --rnn_num_layers 2 --rnn_residual --time_shift 3"
        " --batch_size 3 --optimizer sgd --learning_rate 0.5 --clip_thresh 0.05 --epochs 15"
        " --no_bucketing --train_split part-a part-b --valid_split held-out",
        model=dict(hidden=HIDDEN, layers=2, prenet_layers=2, residual=True),
        training=dict(shift=3, clip=0.05, batch=3, optimizer="sgd", lr=0.5),
    ),
    "lstm-prenet-rmsprop-real-frames": dict(
        flags="--rnn_type lstm --prenet_num_layers 1 --rnn_num_layers 2 --time_shift 2"
        " --batch_size 4 --optimizer rmsprop --learning_rate 0.002 --epochs 15 --mask_padding",
        model=dict(hidden=HIDDEN, layers=2, prenet_layers=1, rnn_type="lstm"),
        training=dict(shift=2, clip=1.0, batch=4, optimizer="rmsprop", lr=0.002, kind=frame_loss),
    ),
    "one-batch-adadelta": dict(  # the original gives adadelta no rate: torch's default, 1.0
        flags="--rnn_num_layers 1 --time_shift 5 --optimizer adadelta --epochs 15",
        model=dict(hidden=HIDDEN, layers=1),
        training=dict(shift=5, clip=1.0, batch=32, optimizer="adadelta", lr=1.0),
    ),
}
follow_cases = pytest.mark.parametrize("case", FOLLOW)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folder of splits; dict of all training utterances' (tensor, length) and the same of valid."""
    root = tmp_path_factory.mktemp("data")

    def split(name, lengths, seed, **kw):
        tensors, table = make_folder(root / name, lengths, MEL, SEQ_LEN, seed, **kw)
        return {name: (tensors[name], table[name]) for name in tensors}

    train = split("train-clean-360", TRAIN_LENGTHS + SHORT, seed=1)
    valid = split("dev-clean", VALID_LENGTHS, seed=2)
    split("part-a", TRAIN_LENGTHS[:4], seed=1)  # the same draws: the first utterances of train
    later = split("part-b", TRAIN_LENGTHS[4:], seed=3, prefix="more")
    split("held-out", VALID_LENGTHS, seed=2)
    split("all-short", [2, 1, 2], seed=4)
    split("wide", [20, 30], seed=5)
    make_folder(root / "width-24", [20, 30], 24, SEQ_LEN)
    return root, {**train, **later}, list(valid.values())


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run as users start it, relative paths and loader workers included; dropout on."""
    work = tmp_path_factory.mktemp("plain")
    os.symlink(data[0], work / "corpus")
    return work, run_script("train.py", *plain_flags(), "--load_data_workers", 2, cwd=work)


def plain_flags(seed=3, name="first.try", librispeech_path="corpus", store_path="runs/here"):
    return [
        *COMMON,
        *("--prenet_num_layers", 1, "--prenet_dropout", 0.2),
        *("--rnn_num_layers", 2, "--rnn_dropout", 0.3, "--rnn_residual"),
        *("--time_shift", 3, "--batch_size", 4, "--epochs", 3, "--learning_rate", 0.001),
        *("--seed", seed, "--experiment_name", name),
        *("--librispeech_path", librispeech_path, "--store_path", store_path),
    ]


PLAIN_MODEL = dict(hidden=HIDDEN, layers=2, prenet_layers=1, residual=True)


@pytest.fixture(scope="module")
def followed(data, tmp_path_factory):
    """The runs to be followed, each a process of its own: results, folders and what was fed."""
    work = tmp_path_factory.mktemp("followed")
    jobs = []
    for name, case in FOLLOW.items():
        paths = ["--librispeech_path", data[0], "--store_path", work, "--experiment_name", name]
        jobs.append(([*COMMON, *case["flags"].split(), *paths], work / f"{name}.fed"))
    results = run_forked("train.py", jobs, work / "jobs")
    return {
        name: (result, work / f"{name}.dir", work / f"{name}.fed")
        for name, result in zip(FOLLOW, results)
    }


def weights(folder, epoch):
    (file,) = folder.glob(f"*__epoch_{epoch}.model")
    return torch.load(file, weights_only=True)


def epoch_lines(text):
    return [(int(k), float(a), float(b)) for k, a, b in re.findall(EPOCH_LINE, text)]


def log_files(folder):
    """Every file directly in the run's folder that is a text with epoch lines."""
    texts = [f.read_text(errors="replace") for f in folder.iterdir() if f.is_file()]
    return [text for text in texts if re.search(EPOCH_LINE, text)]


def tensorboard(folder):
    (log,) = folder.glob("*.tb_log")
    events = EventAccumulator(str(log), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    return events


def scalars(folder):
    events = tensorboard(folder)
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def stacked(utterances):
    return torch.stack([x for x, _ in utterances]), torch.tensor([n for _, n in utterances])


def batches_fed(file, utterances, shift):
    """The training batches of a run from what its model was fed, whole and padded, by epoch.

    Utterances are recognised by their frames, so the order that the run drew does not matter,
    but every usable utterance must come exactly once an epoch.
    """
    usable = {name: (x, n) for name, (x, n) in utterances.items() if n > shift}
    epochs, seen = [[]], []
    for training, inputs, lengths in torch.load(file, weights_only=True):
        if not training:
            continue
        if len(seen) == len(usable):
            epochs.append([])
            seen = []
        names = []
        for frames, length in zip(inputs, lengths.tolist()):
            (name,) = (
                name
                for name, (x, n) in usable.items()
                if n == length + shift and torch.equal(frames[:length], x[:length])
            )
            names.append(name)
        seen += names
        assert len(set(seen)) == len(seen), "an utterance came twice in an epoch"
        epochs[-1].append(stacked([usable[name] for name in names]))
    assert len(seen) == len(usable), "utterances are missing from an epoch"
    return epochs


def corpus_of(case, utterances):
    """The training utterances of a followed run."""
    if "part-a" in case["flags"]:
        first = sorted(n for n in utterances if n.startswith("utt"))[:4]
        return {n: u for n, u in utterances.items() if n in first or n.startswith("more")}
    return {n: u for n, u in utterances.items() if n.startswith("utt")}


# What a run computes


@follow_cases
def test_epoch_losses_follow_the_originals(case, followed, data):
    """From a run's own initial weights and batches the packed, padded loop gives its losses."""
    result, folder, fed = followed[case]
    assert result.returncode == 0, result.stderr
    case = FOLLOW[case]
    options = dict(case["training"])
    batch, name, lr = (options.pop(key) for key in ("batch", "optimizer", "lr"))
    shift, kind = options["shift"], options.get("kind", padded_loss)

    utterances = corpus_of(case, data[1])
    epochs = batches_fed(fed, utterances, shift)
    assert len(epochs) == 15
    usable = sum(n > shift for _, n in utterances.values())
    for batches in epochs:
        sizes = sorted((len(lengths) for _, lengths in batches), reverse=True)
        assert sizes == [batch] * (usable // batch) + [usable % batch] * (usable % batch > 0)

    model = PackedAPC(MEL, **case["model"])
    model.load_state_dict(weights(folder, 0), strict=True)
    optimizer = OPTIMIZERS[name](model.parameters(), lr=lr)
    trained, validated, step_losses, norms = [], [], [], []
    for batches in epochs:
        loss, step_loss, norm = train_epoch(model, optimizer, batches, **options)
        trained.append(loss)
        step_losses += step_loss
        norms += norm
        validated.append(evaluate(model, [stacked(data[2])], shift, kind))
    if options["clip"] < 1:
        assert min(norms) > options["clip"], "the test has lost its point: nothing was clipped"

    got = scalars(folder)
    assert got["training loss (epoch-wise)"] == pytest.approx(trained, rel=5e-4)
    assert got["validation loss (epoch-wise)"] == pytest.approx(validated, rel=5e-4)
    assert got["training loss (step-wise)"] == pytest.approx(step_losses, rel=1e-3)
    assert got["gradient norm"] == pytest.approx(norms, rel=2e-2)
    assert trained[-1] < 0.97 * trained[0], "the test has lost its point: nothing was learnt"
    lines = epoch_lines(result.stdout + result.stderr)
    assert [k for k, _, _ in lines] == list(range(1, 16))
    assert [a for _, a, _ in lines] == pytest.approx(trained, rel=5e-4, abs=1e-5)
    assert [b for _, _, b in lines] == pytest.approx(validated, rel=5e-4, abs=1e-5)


@follow_cases
def test_both_kinds_of_loss_are_shown(case, followed, data):
    """Whichever loss is trained, TensorBoard has padded and per-frame validation losses."""
    _, folder, _ = followed[case]
    case = FOLLOW[case]
    model = PackedAPC(MEL, **case["model"])
    model.load_state_dict(weights(folder, 15))
    last = [values[-1] for tag, values in scalars(folder).items() if "loss" in tag.lower()]
    for kind in (padded_loss, frame_loss):
        expected = evaluate(model, [stacked(data[2])], case["training"]["shift"], kind)
        assert any(value == pytest.approx(expected, rel=1e-4) for value in last)


def test_validation_is_without_dropout(plain, data):
    """Each epoch's validation loss is that of its saved model in eval mode."""
    work, result = plain
    model = PackedAPC(MEL, **PLAIN_MODEL)
    lines = epoch_lines(result.stdout + result.stderr)
    assert len(lines) == 3
    for epoch, _, loss in lines:
        model.load_state_dict(weights(work / "runs/here/first.try.dir", epoch))
        assert loss == pytest.approx(evaluate(model, [stacked(data[2])], 3), rel=1e-4)


@pytest.fixture(scope="module")
def repeated(data, plain, tmp_path_factory):
    """Folders of the plain run's repetition, without loader workers, and of one by another seed."""
    work = tmp_path_factory.mktemp("repeated")
    where = dict(librispeech_path=data[0], store_path=work)
    jobs = [
        (plain_flags(**where, name="again"), work / "again.fed"),
        (plain_flags(**where, name="other", seed=4), work / "other.fed"),
    ]
    results = run_forked("train.py", jobs, work / "jobs")
    assert [r.returncode for r in results] == [0, 0], results[0].stderr + results[1].stderr
    return plain[0] / "runs/here/first.try.dir", work / "again.dir", work / "other.dir"


@pytest.mark.parametrize("epoch", [0, 3])
def test_a_seed_fixes_the_weights_bit_by_bit(repeated, epoch):
    """With dropout on, and whether workers load the data or not."""
    first, again, _ = (weights(folder, epoch) for folder in repeated)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("epoch", [0, 3])
def test_another_seed_gives_other_weights(repeated, epoch):
    first, _, other = (weights(folder, epoch) for folder in repeated)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def orders(file, utterances, shift):
    """The order of an epoch's utterances, told by their first frames, for each epoch of a run."""
    epochs = batches_fed(file, utterances, shift)
    return [tuple(batch[:, 0, 0].tolist() for batch, _ in batches) for batches in epochs]


@pytest.mark.parametrize("case", [case for case in FOLLOW if "one-batch" not in case])
def test_the_data_is_shuffled_anew_each_epoch(case, followed, data):
    """Without buckets no two epochs are alike; with buckets the few batches change places."""
    flags, shift = FOLLOW[case]["flags"], FOLLOW[case]["training"]["shift"]
    epochs = [str(o) for o in orders(followed[case][2], corpus_of(FOLLOW[case], data[1]), shift)]
    assert len(set(epochs)) == 15 if "--no_bucketing" in flags else len(set(epochs)) > 3


def test_the_seed_orders_the_data(repeated, data):
    utterances = {n: u for n, u in data[1].items() if n.startswith("utt")}
    again, other = (orders(f.with_suffix(".fed"), utterances, 3) for f in repeated[1:])
    assert again != other


# What a run writes


def test_checkpoints_are_bare_state_dicts(plain):
    work, result = plain
    assert result.returncode == 0, result.stderr
    folder = work / "runs/here/first.try.dir"
    assert sorted(f.name for f in folder.glob("*.model")) == [
        f"first.try__epoch_{k}.model" for k in range(4)
    ]
    expected = PackedAPC(MEL, **PLAIN_MODEL).state_dict()
    for k in range(4):
        state = weights(folder, k)
        assert {n: t.shape for n, t in state.items()} == {n: t.shape for n, t in expected.items()}
        assert all(t.dtype == torch.float32 and t.device.type == "cpu" for t in state.values())
    assert not torch.equal(weights(folder, 0)["rnns.0.bias_hh_l0"], state["rnns.0.bias_hh_l0"])


def test_epoch_lines_stand_in_the_log_and_on_the_console(plain):
    work, result = plain
    console = epoch_lines(result.stdout + result.stderr)
    assert [k for k, _, _ in console] == [1, 2, 3]
    logs = log_files(work / "runs/here/first.try.dir")
    assert len(logs) == 1 and epoch_lines(logs[0]) == console


def test_tensorboard_has_the_originals_scalars(plain):
    work, result = plain
    folder = work / "runs/here/first.try.dir"
    assert (folder / "first.try.tb_log").is_dir()
    got = scalars(folder)
    assert set(TAGS) <= set(got)
    steps, epochs = 3 * 3, 3  # ten usable utterances, four a batch
    assert [len(got[tag]) for tag in TAGS] == [steps, steps, epochs, epochs]
    lines = epoch_lines(result.stdout + result.stderr)
    assert got[TAGS[2]] == pytest.approx([a for _, a, _ in lines], abs=1e-5)
    assert got[TAGS[3]] == pytest.approx([b for _, _, b in lines], abs=1e-5)
    for tag in TAGS:
        order = [event.step for event in tensorboard(folder).Scalars(tag)]
        assert order == list(range(order[0], order[0] + len(order)))


def test_tensorboard_has_the_new_entries(plain):
    work, _ = plain
    folder = work / "runs/here/first.try.dir"
    got, events = scalars(folder), tensorboard(folder)
    (rate,) = (values for tag, values in got.items() if "learning rate" in tag.lower())
    assert rate == pytest.approx([0.001] * len(rate))
    (speed,) = (values for tag, values in got.items() if re.search("(?i)frames.*sec|frames/s", tag))
    assert all(value > 0 for value in speed)
    images = [image for tag in events.Tags()["images"] for image in events.Images(tag)]
    assert images and all(i.encoded_image_string.startswith(b"\x89PNG") for i in images)


def test_config_records_every_flag(plain):
    work, _ = plain
    config = json.loads((work / "runs/here/first.try.dir/config.json").read_text())
    flat = dict(config)
    for value in config.values():
        flat.update(value if isinstance(value, dict) else {})
    text = run_script("train.py", "--help").stdout
    flags = set(re.findall(r"--(\w+)", text)) - {"help"}
    assert len(flags) > 20
    missing = {f for f in flags if f not in flat and f.removeprefix("no_") not in flat}
    assert not missing
    expected = {
        "prenet_num_layers": 1,
        "prenet_dropout": 0.2,
        "rnn_num_layers": 2,
        "rnn_hidden_size": HIDDEN,
        "rnn_dropout": 0.3,
        "rnn_residual": True,
        "rnn_type": "gru",
        "optimizer": "adam",
        "learning_rate": 0.001,
        "time_shift": 3,
        "feature_dim": MEL,
        "seed": 3,
        "mask_padding": False,
        "experiment_name": "first.try",
    }
    assert {name: flat[name] for name in expected} == expected


def test_it_says_beforehand_what_it_is_about_to_do(plain):
    _, result = plain
    before = (result.stdout + result.stderr).split("Epoch: 1 ")[0].replace(",", "")
    parameters = sum(p.numel() for p in PackedAPC(MEL, **PLAIN_MODEL).parameters())
    frames = sum(TRAIN_LENGTHS)
    for word in (parameters, frames, "utterances", "frames", "h(ours)?", "parameters", "cpu"):
        assert re.search(rf"\b{word}\b", before), f"{word} is not in:\n{before}"


def test_short_utterances_are_counted_in_one_warning(plain):
    """Two of the training folder's have no frame to predict; the validation folder has none."""
    _, result = plain
    lines = [x for x in (result.stdout + result.stderr).splitlines() if re.search("(?i)warn", x)]
    assert len(lines) == 1 and re.search(r"\b2\b", lines[0]), lines


def test_help_has_groups_and_the_papers_defaults():
    result = run_script("train.py", "--help")
    assert result.returncode == 0
    defaults = {
        "prenet_num_layers": "0",
        "prenet_dropout": "0.0",
        "rnn_num_layers": "3",
        "rnn_hidden_size": "512",
        "rnn_dropout": "0.0",
        "optimizer": "adam",
        "batch_size": "32",
        "learning_rate": "0.0001",
        "epochs": "100",
        "time_shift": "1",
        "clip_thresh": "1.0",
        "feature_dim": "80",
        "load_data_workers": "2",
        "experiment_name": "foo",
        "store_path": "./logs",
        "librispeech_path": "./librispeech_data/preprocessed",
        "rnn_type": "gru",
        "valid_split": "dev-clean",
        "device": "auto",
    }
    descriptions = re.split(r"\n  (?=-)", result.stdout)
    for flag, default in defaults.items():
        (text,) = (d for d in descriptions if re.match(rf"--{flag}\b", d))
        text = re.sub(r"\s+", " ", text)
        assert f"(default: {default})" in text, text
    (splits,) = (d for d in descriptions if d.startswith("--train_split"))
    assert "train-clean-360" in splits
    for flag in ("rnn_residual", "mask_padding", "no_bucketing", "seed", "init_checkpoint"):
        assert any(d.startswith(f"--{flag}") for d in descriptions)
    assert len(re.findall(r"(?m)^[a-z].*:$", result.stdout)) >= 3  # headings


# What it starts from, and what it refuses

OTHER_MODELS = {  # what differs from two GRU layers of HIDDEN units on MEL, and must be said
    "hidden": (dict(mel_dim=MEL, hidden=24, layers=2), ("24", str(HIDDEN))),
    "layers": (dict(mel_dim=MEL, hidden=HIDDEN, layers=3), ("3", "2", "layer")),
    "lstm": (dict(mel_dim=MEL, hidden=HIDDEN, layers=2, rnn_type="lstm"), ("lstm", "gru")),
    "prenet": (dict(mel_dim=MEL, hidden=HIDDEN, layers=2, prenet_layers=1), ("prenet",)),
    "width": (dict(mel_dim=24, hidden=HIDDEN, layers=2), ("24", str(MEL))),
}


class Hostile:
    """Pickled, this writes a file when it is loaded by a careless reader."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return open, (self.marker, "w")


@pytest.fixture(scope="module")
def attempts(data, plain, tmp_path_factory):
    """Short runs by name: those that start from given weights, and those to be refused."""
    work = tmp_path_factory.mktemp("attempts")
    torch.manual_seed(11)
    fitting = PackedAPC(MEL, HIDDEN, 2).state_dict()
    torch.save(fitting, work / "fitting.pt")
    torch.save({f"module.{k}": v for k, v in fitting.items()}, work / "parallel.pt")
    for name, (shape, _) in OTHER_MODELS.items():
        torch.save(PackedAPC(**shape).state_dict(), work / f"{name}.pt")
    torch.save({k: v * float("nan") for k, v in fitting.items()}, work / "nan.pt")
    (work / "text.pt").write_text("no checkpoint\n")
    torch.save({"weights": Hostile(work / "marker")}, work / "hostile.pt")

    base = [*COMMON, "--rnn_num_layers", 2, "--epochs", 1, "--time_shift", 2]
    flags = {
        "from-file": ["--init_checkpoint", work / "fitting.pt", "--rnn_residual"],
        "from-parallel": ["--init_checkpoint", work / "parallel.pt"],
        "from-run": [
            *("--init_checkpoint", plain[0] / "runs/here/first.try.dir/first.try__epoch_3.model"),
            *("--prenet_num_layers", 1, "--rnn_residual"),
        ],
        **{f"misfit-{name}": ["--init_checkpoint", work / f"{name}.pt"] for name in OTHER_MODELS},
        "no-prenet": ["--init_checkpoint", work / "fitting.pt", "--prenet_num_layers", 1],
        "no-checkpoint": ["--init_checkpoint", work / "text.pt"],
        "nan-checkpoint": ["--init_checkpoint", work / "nan.pt"],
        "seed": ["--seed", 2**64],
        "name": ["--experiment_name", ".."],
        "taken-name": ["--experiment_name", "last.ckpt"],
        "missing-checkpoint": ["--init_checkpoint", work / "nowhere.pt"],
        "hostile-checkpoint": ["--init_checkpoint", work / "hostile.pt"],
        "feature-dim": ["--feature_dim", 24],
        "train-width": ["--train_split", "train-clean-360", "width-24"],
        "valid-width": ["--valid_split", "width-24"],
        "no-train-split": ["--train_split", "train-other-500"],
        "no-second-split": ["--train_split", "train-clean-360", "train-other-500"],
        "no-valid-split": ["--valid_split", "dev-other"],
        "short-train": ["--train_split", "all-short"],
        "short-valid": ["--valid_split", "all-short"],
        "no-data": ["--librispeech_path", work / "nowhere"],
    }
    jobs = [
        [
            *(*base, "--librispeech_path", data[0], "--store_path", work),
            *("--experiment_name", name, *extra),
        ]
        for name, extra in flags.items()
    ]
    results = run_forked("train.py", jobs, work / "jobs")
    return work, dict(zip(flags, results))


def assert_refused(result, *words):
    """A nonzero status, one line of error that holds all the words, and no traceback."""
    output = result.stdout + result.stderr
    assert result.returncode != 0, output
    assert "Traceback" not in output, output
    errors = [line for line in result.stderr.splitlines() if "error:" in line]
    assert len(errors) == 1 and errors[0].startswith("train.py: error: "), output
    assert result.stderr.strip().endswith(errors[0]), output
    missing = [word for word in words if word.lower() not in errors[0].lower()]
    assert not missing, f"{missing} not in: {errors[0]}"


@pytest.mark.parametrize("name", ["from-file", "from-parallel"])
def test_init_checkpoint_gives_the_initial_weights(attempts, name):
    """Of bare weights that say nothing of residual connections: the flags define the model."""
    work, results = attempts
    assert results[name].returncode == 0, results[name].stderr
    given = torch.load(work / "fitting.pt", weights_only=True)
    start, end = weights(work / f"{name}.dir", 0), weights(work / f"{name}.dir", 1)
    assert start.keys() == given.keys()
    assert all(torch.equal(start[k], given[k]) for k in given)
    assert not any(torch.equal(start[k], end[k]) for k in given)


def test_init_checkpoint_takes_an_earlier_run(attempts, plain):
    work, results = attempts
    assert results["from-run"].returncode == 0, results["from-run"].stderr
    given = weights(plain[0] / "runs/here/first.try.dir", 3)
    start = weights(work / "from-run.dir", 0)
    assert all(torch.equal(start[k], given[k]) for k in given)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_weights_that_do_not_fit_are_refused(attempts, name):
    assert_refused(attempts[1][f"misfit-{name}"], *OTHER_MODELS[name][1])


@pytest.mark.parametrize(
    "name, words",
    {
        "no-prenet": ("prenet",),
        "no-checkpoint": ("text.pt",),
        "nan-checkpoint": ("nan.pt", "finite"),
        "seed": ("--seed",),
        "name": ("--experiment_name",),
        "taken-name": ("--experiment_name", "last.ckpt"),
        "missing-checkpoint": ("nowhere.pt",),
        "hostile-checkpoint": ("hostile.pt",),
        "feature-dim": ("24", str(MEL)),
        "train-width": ("24", str(MEL), "width-24"),
        "valid-width": ("24", str(MEL), "width-24"),
        "no-train-split": ("train-other-500",),
        "no-second-split": ("train-other-500",),
        "no-valid-split": ("dev-other",),
        "short-train": ("all-short",),
        "short-valid": ("all-short",),
        "no-data": ("nowhere",),
    }.items(),
)
def test_what_cannot_be_trained_is_refused(attempts, name, words):
    assert_refused(attempts[1][name], *words)


def test_checkpoints_cannot_run_code(attempts):
    work, results = attempts
    assert results["hostile-checkpoint"].returncode != 0
    assert not (work / "marker").exists()


def test_a_refused_run_leaves_its_name_free(attempts):
    """Else the mended command would be refused too, as an existing experiment."""
    work, results = attempts
    left = {name for name, r in results.items() if r.returncode and (work / f"{name}.dir").exists()}
    assert not left


def test_an_existing_experiment_is_left_alone(plain):
    work, _ = plain
    folder = work / "runs/here/first.try.dir"
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    contents = {f: f.read_bytes() for f in before if f.is_file()}
    result = run_script("train.py", *plain_flags(), cwd=work)
    assert_refused(result, "first.try")
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    assert {f: f.read_bytes() for f in contents} == contents
