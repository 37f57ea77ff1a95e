"""Make the model beside this script from nothing: fetch the speech, train, keep the best epoch.

    pip install -r requirements.txt       # on Debian, with apt-get install ffmpeg
    python pretrained/make_pretrained.py  # about half an hour on two quiet cores

After an interruption the same command goes on. The run begins as experiments/evidence.py's run
with utterance CMVN, and ends at a tenth of its learning rate. Of the epochs, that with the smallest
validation loss is kept, in half precision, which load_pretrained() widens to float32.
"""

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from experiments import evidence
from load_pretrained import load_with_config
from utils import HelpFormatter, positive, run_main, save, write_json

RUN = "utterance_n3"
MADE_WITH = (  # what config.json says of the training
    "rnn_residual time_shift mask_padding optimizer learning_rate batch_size clip_thresh seed data"
)


def build_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=positive, default=4, help="at learning rate 0.001")
    add("--last_epochs", type=positive, default=2, help="at learning rate 0.0001")
    add("--work_dir", default="./logs/evidence", help="for the corpus and the runs")
    add("--save_dir", default=str(HERE), help="for the weights and config.json, replaced")
    return parser


def best_epoch(work, run, epochs):
    """-> the model with the smallest validation loss of a run's first epochs, and that loss."""
    losses = evidence.validation_losses(work, run)[:epochs]
    best = min(range(len(losses)), key=losses.__getitem__)
    return evidence.model_file(work, run, best + 1), losses[best]


def main(argv=None):
    args = build_parser().parse_args(argv)
    work, out = Path(args.work_dir), Path(args.save_dir)
    work.mkdir(parents=True, exist_ok=True)
    evidence.make_data(work, ["utterance"])
    evidence.train(work, RUN, args.epochs)
    first, _ = best_epoch(work, RUN, args.epochs)
    evidence.train(work, RUN, args.last_epochs, 0.0001, f"{RUN}_last", init_checkpoint=first)
    best, loss = best_epoch(work, f"{RUN}_last", args.last_epochs)
    model, config = load_with_config(best)
    file = out / evidence.PRETRAINED.name
    out.mkdir(parents=True, exist_ok=True)
    save({name: weight.half() for name, weight in model.state_dict().items()}, file)
    about = {key: config[key] for key in MADE_WITH.split()} | {"state_dict": file.name}
    about["data"][0].pop("path")
    write_json(about, out / "config.json")
    print(f"{file}: {best.stem}, validation loss {loss:.4f} a real frame")


if __name__ == "__main__":
    run_main(main)
