"""Make the model next to this script from nothing: fetch the speech, train, keep the best epoch.

About half an hour on two quiet cores; the same command resumes after an interruption. Four epochs
at learning rate 0.001, then two at 0.0001 from the best of them. Of these, the epoch with the
smallest validation loss is kept, in half precision, which load_pretrained() widens to float32.
"""

import json
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from experiments import common
from load_pretrained import load_pretrained
from utils import new_parser, positive, run_main, save, write_json

MADE_WITH = (  # what config.json says of the training
    "rnn_residual time_shift mask_padding optimizer learning_rate batch_size clip_thresh seed data"
)
EXAMPLE = """\
  pip install -r requirements.txt    # on Debian, with apt-get install ffmpeg
  python pretrained/make_pretrained.py"""


def build_parser():
    parser = new_parser(__doc__.split("\n\n")[0], EXAMPLE)
    add = parser.add_argument
    text = "passes over the training data at learning rate 0.001 (default: %(default)s)"
    add("--epochs", type=positive, default=4, help=text)
    text = "passes over the training data at learning rate 0.0001 (default: %(default)s)"
    add("--last_epochs", type=positive, default=2, help=text)
    text = "directory for the corpus and the runs (default: %(default)s)"
    add("--work_dir", type=Path, default=Path("logs/evidence"), help=text)
    text = "directory for the weights and config.json, replaced (default: %(default)s)"
    add("--save_dir", type=Path, default=HERE, help=text)
    return parser


def best_epoch(work, name, epochs):
    """-> the model with the smallest validation loss of a run's first epochs, and that loss."""
    lines = common.model_file(work, name, 0).with_name("metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("validation_loss") for line in lines]
    losses = [loss for loss in losses if loss is not None][:epochs]
    best = min(range(len(losses)), key=losses.__getitem__)
    return common.model_file(work, name, best + 1), losses[best]


def main(argv=None):
    args = build_parser().parse_args(argv)
    work, out = args.work_dir, args.save_dir
    if not (work / "corpus" / "texts.txt").exists():
        common.run("experiments/make_corpus.py", work / "corpus")
    for split in ("train", "dev"):
        common.prepare(work / "corpus" / split, work / "data" / "utterance" / split)
    name = "utterance_n3"
    common.train(work, name, args.epochs, "utterance", common.N3)
    first, _ = best_epoch(work, name, args.epochs)
    last = ("--learning_rate", 0.0001, "--init_checkpoint", first)
    common.train(work, f"{name}_last", args.last_epochs, "utterance", (*common.N3, *last))
    best, loss = best_epoch(work, f"{name}_last", args.last_epochs)
    model = load_pretrained(best)
    file = out / common.PRETRAINED.name
    out.mkdir(parents=True, exist_ok=True)
    save({key: weight.half() for key, weight in model.state_dict().items()}, file)
    about = {key: model.config[key] for key in MADE_WITH.split()} | {"state_dict": file.name}
    about["data"][0].pop("path")
    write_json(about, out / "config.json")
    print(f"{file}: {best.stem}, validation loss {loss:.4f} per valid frame")


if __name__ == "__main__":
    run_main(main)
