# malpyeong: `make help` lists what there is. Everything runs in .venv, made on the first call.
PYTHON ?= python3
VENV   ?= .venv
# torch is installed first and pinned: unpinned, other packages pull in several GB of another build.
TORCH  ?= torch==2.13.0
DATA   ?= data
RUNS   ?= runs
EXTRAS := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo '[gpu]')

STAMP  := $(VENV)/.installed
RUN    := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint format samples tiny-base bench-rewards bench-decoding sft-qwen grpo-qwen export-qwen submit-qwen clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP) ## make .venv and install everything (once)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv "$(VENV)"
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet --editable ".$(EXTRAS)" --group dev
	@touch "$(STAMP)"

demo: $(STAMP) ## base → SFT → GRPO → merge → submission with the tiny model (10 minutes on two cores)
	$(RUN) recipes/demo.py -o "$(RUNS)/demo"

test: $(STAMP) ## run the tests
	$(RUN) -m pytest

lint: $(STAMP) ## ruff and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: $(STAMP) ## let ruff format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

samples: $(STAMP) ## rebuild malpyeong/samples/data from the item bank
	$(RUN) -m malpyeong.samples.build

tiny-base: $(STAMP) ## pre-train the tiny base model again, to runs/tiny_base
	$(RUN) recipes/tiny_base.py -o "$(RUNS)/tiny_base"

bench-rewards: $(STAMP) ## scoring GRPO batches: pair by pair against ours
	$(RUN) -m benchmarks.rewards

bench-decoding: $(STAMP) ## free, constrained and voted answers of the tiny model (ADAPTERS="one per seed")
	$(RUN) -m benchmarks.decoding $(ADAPTERS)

# The contest's files are DATA/train.json, DATA/dev.json and DATA/test.json.
sft-qwen: $(STAMP) ## SFT of Qwen3-4B on DATA=folder with the contest's files (one GPU)
	$(RUN) recipes/sft.py recipes/qwen/sft.yaml data.train="$(DATA)/train.json" data.dev="$(DATA)/dev.json" \
	  training.output="$(RUNS)/qwen-sft" --resume auto

grpo-qwen: $(STAMP) ## GRPO from the SFT adapter
	$(RUN) recipes/grpo.py recipes/qwen/grpo.yaml data.train="$(DATA)/train.json" \
	  model.adapter="$(RUNS)/qwen-sft/adapter" training.output="$(RUNS)/qwen-grpo" --resume auto

export-qwen: $(STAMP) ## merge the GRPO adapter into the 16-bit model
	$(RUN) -m malpyeong.export "$(RUNS)/qwen-grpo/adapter" -o "$(RUNS)/qwen-merged"

submit-qwen: $(STAMP) ## answer DATA/test.json and write a checked submission
	$(RUN) -m malpyeong.predict "$(RUNS)/qwen-merged" "$(DATA)/test.json" -o "$(RUNS)/qwen-test.json"
	$(RUN) -m malpyeong.submit "$(DATA)/test.json" "$(RUNS)/qwen-test.json" -o "$(RUNS)/qwen-submission.json"

clean: ## remove the virtual environment and caches (runs/ stays)
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache .hypothesis
