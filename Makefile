# malpyeong: `make help` lists what there is. Everything runs in .venv, made on the first call.
PYTHON ?= python3
VENV   ?= .venv
# torch is installed first and pinned: unpinned, other packages pull in several GB of another build.
TORCH  ?= torch==2.13.0
DATA   ?= data
RUNS   ?= runs
MODELS := tiny $(notdir $(basename $(wildcard recipes/models/*.yaml)))
EXTRAS := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo '[gpu]')

STAMP  := $(VENV)/.installed
RUN    := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all lint format samples tiny-base bench-rewards bench-ppl bench-decoding bench-contexts bench-gpu clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo
	@echo "  One model on one GPU, with the contest's train.json, dev.json and test.json in DATA:"
	@echo "  make sft-NAME      SFT with dev loss deciding when to stop        DATA=data  RUNS=runs"
	@echo "  make doctor-NAME   look whether the GRPO stage will run, and fit  GPU=t4|24gb|40gb|80gb (default: what is here)"
	@echo "  make grpo-NAME     GRPO, going on from the SFT adapter            MODEL=another hub id, or a folder"
	@echo "  make export-NAME   merge the GRPO adapter into the 16-bit model   ARGS=anything else that the command takes,"
	@echo "  make submit-NAME   answer test.json, write a checked submission     as training.max_steps=500 or --batch-size=4"
	@echo "  make hard-NAME     the questions that SFT knows least; to ask only those, grpo-NAME ARGS=data.train=RUNS/NAME-hard.json"
	@echo "  make mine-NAME     which rules make the gold answers likelier: labels for NAME-choice, with DATA/rules.json"
	@echo "  NAME: $(MODELS)"

setup: $(STAMP) ## make .venv and install everything (once)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv "$(VENV)"
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet "$(TORCH)"
	$(RUN) -m pip install --quiet --editable ".$(EXTRAS)" --group dev
	@touch "$(STAMP)"

demo: $(STAMP) ## base → SFT → GRPO → merge → submission with the tiny model (10 minutes on two cores)
	$(RUN) recipes/demo.py -o "$(RUNS)/demo"

# Two processes of one thread each: what is tested is small.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=auto --dist=loadfile

test: $(STAMP) ## run the tests (4 minutes on two cores)
	$(PYTEST) -m "not slow"

test-all: test ## after them the slow ones: whole runs, the notebook, browser pages, fuzzing
	$(PYTEST) -m slow

lint: $(STAMP) ## ruff, mypy and the order of the rooms
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	"$(VENV)/bin/lint-imports"

format: $(STAMP) ## let ruff format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

samples: $(STAMP) ## rebuild malpyeong/samples/data from the item bank
	$(RUN) -m malpyeong.samples.build

tiny-base: $(STAMP) ## pre-train the tiny base model again, to runs/tiny_base
	$(RUN) tools/tiny_base.py -o "$(RUNS)/tiny_base"

bench-gpu: $(STAMP) ## GRPO on this GPU: Unsloth against plain TRL, memory limits (hours; goes on where it stopped)
	$(RUN) -m benchmarks.gpu all

bench-rewards: $(STAMP) ## scoring GRPO batches: pair by pair against ours
	$(RUN) -m benchmarks.rewards

bench-ppl: $(STAMP) ## mining PPL labels: a forward for each pair against ours
	$(RUN) -m benchmarks.ppl

# Without ADAPTERS an adapter of one SFT epoch is trained first.
BENCH_ADAPTER = $(if $(ADAPTERS),$(firstword $(ADAPTERS)),$(RUNS)/bench-decoding/adapter)

bench-decoding: $(STAMP) ## constrained against free: seconds (ADAPTERS="one per seed": exact match and votes before that)
	$(if $(ADAPTERS),$(RUN) -m benchmarks.decoding quality $(ADAPTERS))
	$(if $(ADAPTERS),,test -e "$(BENCH_ADAPTER)" || $(RUN) recipes/sft.py recipes/tiny/sft.yaml training.epochs=1 \
	  "training.output=$(RUNS)/bench-decoding" --resume auto)
	$(RUN) -m benchmarks.decoding speed "$(BENCH_ADAPTER)"

bench-contexts: $(STAMP) ## rules, examples and chosen rules in the prompt of the tiny model (hours; goes on where it stopped)
	$(RUN) -m benchmarks.contexts -o "$(RUNS)/contexts"

# The contest's files are DATA/train.json, DATA/dev.json and DATA/test.json. Each recipes/models/NAME.yaml is a model, and
# tiny the sample model on a CPU: make sft-NAME, grpo-NAME … GPU=t4|24gb|40gb|80gb states the card, MODEL= another hub id or
# a folder with weights, ARGS= whatever else the stage's command takes. NAME-choice is the model NAME that names a rule
# before it answers (docs/choice.md); which one is right is known from make mine-NAME.
NAME   = $(patsubst %-choice,%,$*)
CHOICE = $(filter %-choice,$*)
# The recipe of a stage for NAME.  $(call recipe,STAGE)
recipe = $(if $(filter tiny,$(NAME)),recipes/tiny/$(1).yaml,recipes/$(1).yaml "recipes/models/$(NAME).yaml")
CARD   = $(if $(GPU),gpu=$(GPU)) $(if $(MODEL),"model.name=$(MODEL)") $(ARGS)

# Solved examples, and rules where DATA/rules.json is there (python -m malpyeong.retrieval and malpyeong.rules): the same
# for every model and stage, so made once, and again when a file in DATA is newer.  $(call search,QUESTIONS,OUTPUT)
search = @set -- $(1) --examples "$(DATA)/train.json"; \
  test ! -e "$(DATA)/rules.json" || set -- "$$@" --rules "$(DATA)/rules.json"; \
  test -e "$(2)" && test -z "$$(find $(1) "$(DATA)/train.json" "$(DATA)/rules.json" -newer "$(2)" 2>/dev/null)" || \
  $(RUN) -m malpyeong.retrieval search "$$@" -o "$(2)"
CONTEXT = $(call search,"$(DATA)/train.json" "$(DATA)/dev.json",$(RUNS)/context.jsonl)
# What stands in the prompts.
PROMPTS = data.context="$(RUNS)/context.jsonl" $(if $(CHOICE),data.mode=choose_rule \
  data.labels="$(RUNS)/$(NAME)-mined/contexts.jsonl",data.mode=context)
# What GRPO and a look at it beforehand are given.
GRPO    = data.train="$(DATA)/train.json" $(PROMPTS) $(if $(CHOICE),data.rewards.choice=0.5) \
  model.adapter="$(RUNS)/$*-sft/adapter" training.output="$(RUNS)/$*-grpo" $(CARD)

mine-%: $(STAMP)
	$(CONTEXT)
	$(RUN) recipes/mine.py $(call recipe,mine) 'data.questions=["$(DATA)/train.json", "$(DATA)/dev.json"]' \
	  data.rules="$(DATA)/rules.json" data.context="$(RUNS)/context.jsonl" mining.output="$(RUNS)/$*-mined" \
	  $(if $(MODEL),"model.name=$(MODEL)") $(ARGS) --resume auto

sft-%: $(STAMP)
	$(CONTEXT)
	$(RUN) recipes/sft.py $(call recipe,sft) data.train="$(DATA)/train.json" data.dev="$(DATA)/dev.json" \
	  $(PROMPTS) training.output="$(RUNS)/$*-sft" $(CARD) --resume auto

grpo-%: $(STAMP)
	$(CONTEXT)
	$(RUN) recipes/grpo.py $(call recipe,grpo) $(GRPO) --resume auto

hard-%: $(STAMP)
	$(CONTEXT)
	$(RUN) recipes/hard_questions.py $(call recipe,grpo) $(GRPO) -o "$(RUNS)/$*-hard.json"

doctor-%: $(STAMP)
	$(CONTEXT)
	$(RUN) -m malpyeong.doctor $(call recipe,grpo) $(GRPO)

export-%: $(STAMP)
	$(RUN) -m malpyeong.export "$(RUNS)/$*-grpo/adapter" -o "$(RUNS)/$*-merged" $(ARGS)

submit-%: $(STAMP)
	$(call search,"$(DATA)/test.json",$(RUNS)/context-test.jsonl)
	$(RUN) -m malpyeong.predict "$(RUNS)/$*-merged" "$(DATA)/test.json" -o "$(RUNS)/$*-test.json" \
	  --context "$(RUNS)/context-test.jsonl" $(if $(CHOICE),--choose) $(ARGS)
	$(RUN) -m malpyeong.submit "$(DATA)/test.json" "$(RUNS)/$*-test.json" -o "$(RUNS)/$*-submission.json"

clean: ## remove the virtual environment and caches (runs/ stays)
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache .hypothesis
