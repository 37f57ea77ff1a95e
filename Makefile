# make demo: the whole pipeline on the samples.   make test: lint and tests.
# make bench: speed, in about ten minutes.         make evidence: what the features are good for.
# make pretrained: train the model in pretrained/ again.
# Each needs Python 3.10 or newer: it makes .venv and installs what is missing. The last two download
# speech, and need Debian's apt-get and ffmpeg.

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo test bench evidence pretrained clean

demo: .venv/runtime
	rm -rf demo
	$(BIN)/python prepare_data.py --kaldi samples/train.blogmel.xz \
		--save_dir demo/data/train-clean-360
	$(BIN)/python prepare_data.py --kaldi samples/dev.blogmel.xz \
		--save_dir demo/data/dev-clean
	$(BIN)/python train.py --librispeech_path demo/data --store_path demo/logs \
		--experiment_name demo --rnn_residual --time_shift 3 --rnn_hidden_size 256 \
		--learning_rate 0.001 --batch_size 8 --epochs 6
	$(BIN)/python extract_features.py --checkpoint demo/logs/demo.dir/demo__epoch_6.model \
		--data_dir demo/data/dev-clean --save_dir demo/features
	$(BIN)/python extract_features.py --checkpoint pretrained/apc_3x512_n3.pt \
		--audio samples/en-followme-sorry.flac --save_dir demo/pretrained_features
	@echo
	@echo "Done: tensors in demo/data, models in demo/logs/demo.dir, features in demo/features;" \
		"features of a recording by the pretrained model in demo/pretrained_features." \
		"TensorBoard: $(BIN)/tensorboard --logdir demo/logs"

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	OMP_NUM_THREADS=1 timeout 1800 $(BIN)/python -m pytest -q -n auto --dist loadfile

bench: .venv/runtime
	for stage in train_step busy prepare_dump prepare_audio extract; do \
		$(BIN)/python benchmarks/$$stage.py || exit 1; done

evidence: .venv/evidence
	$(BIN)/python experiments/evidence.py

pretrained: .venv/runtime
	$(BIN)/python pretrained/make_pretrained.py

clean:
	rm -rf .venv demo

.venv/runtime: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed")'
	test -x $(BIN)/pip || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	touch $@

.venv/dev: requirements-dev.txt requirements-onnx.txt .venv/runtime
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

.venv/evidence: experiments/requirements.txt .venv/dev
	$(BIN)/python -m pip install --quiet -r experiments/requirements.txt -c constraints.txt
	touch $@
