# malpyeong: `make help` lists what there is. Everything runs in .venv, made on the first call.
# The newest Python here that everything has wheels for.
PYTHON ?= $(or $(shell for python in python3.13 python3.12 python3.11 python3.14 python3; do \
  $$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && \
  echo $$python && break; done),$(error Python 3.11, 3.12, 3.13 or 3.14 is needed, with venv, and none is here: install one, or name it, as in make setup PYTHON=/usr/bin/python3.12))
VENV   ?= .venv
DATA   ?= data
RUNS   ?= runs
MODELS := tiny $(notdir $(basename $(wildcard recipes/models/*.yaml)))
GPU_EXTRA := $(shell command -v nvidia-smi >/dev/null 2>&1 && echo ',gpu')
EXTRAS := [rules,retrieval,serve$(GPU_EXTRA)]
# The versions that were tested together; without them, other packages pull in several GB of another torch.
LOCK   ?= $(if $(GPU_EXTRA),constraints/gpu.txt,requirements.lock)

STAMP  := $(VENV)/.installed
RUN    := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup setup-vllm setup-unsloth lock demo test test-slow test-all lint format samples tiny-base offline bench-rewards bench-ppl bench-decoding bench-overhead bench-contexts compare bench-gpu gpu-check torture clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'
	@echo
	@echo "  One model on one GPU, with the contest's files in DATA, as they come or as train.json, dev.json, test.json:"
	@echo "  make sft-NAME      SFT with dev loss deciding when to stop        DATA=data  RUNS=runs"
	@echo "  make doctor-NAME   preflight: will the GRPO stage run, and fit?   GPU=t4|24gb|40gb|80gb (default: what is here)"
	@echo "  make grpo-NAME     GRPO, starting from the SFT adapter            MODEL=another hub id, or a folder"
	@echo "  make score-NAME    the adapter on dev: greedy, and what its own samples hold for GRPO to win"
	@echo "  make export-NAME   merge the GRPO adapter into the 16-bit model   ARGS=anything else that the command takes,"
	@echo "  make submit-NAME   answer test.json, write a checked submission     as training.max_steps=500 or --batch-size=4"
	@echo "  make serve-NAME    the merged model over HTTP (OpenAI's API), and a page to ask on: http://127.0.0.1:8000"
	@echo "  make hard-NAME     the questions that SFT knows least; to ask only those, grpo-NAME ARGS=data.train=RUNS/NAME-hard.json"
	@echo "  make mine-NAME     which rules make the gold answers likelier: labels for NAME-choice, with DATA/rules.json"
	@echo "  NAME: $(MODELS)"

setup: $(STAMP) ## make .venv and install everything (once)

$(STAMP): pyproject.toml
	$(PYTHON) -m venv "$(VENV)"
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --constraint "$(LOCK)" --editable ".$(EXTRAS)" --group dev
	@touch "$(STAMP)"

setup-vllm: $(STAMP) ## add vLLM, for a GPU from the Ampere generation on
	$(RUN) -m pip install --quiet --constraint constraints/gpu-vllm.txt --editable ".[gpu,vllm]"

setup-unsloth: $(STAMP) ## add Unsloth where there is no GPU, for its tests (without what it needs on a card)
	$(RUN) -m pip install --quiet --no-deps --constraint constraints/gpu.txt unsloth unsloth_zoo triton

# What pip would install beside the pins of pyproject.toml and these: torchvision, triton and vLLM go with one torch.
RESOLVE = $(RUN) -m pip install --quiet --dry-run --ignore-installed --use-feature=fast-deps --report - --group dev --editable
lock: $(STAMP) ## write requirements.lock and constraints/ again (downloads no large packages)
	$(RESOLVE) ".[rules,retrieval,serve]" torch==2.13.0 | $(RUN) tools/constraints.py lock requirements.lock
	$(RESOLVE) ".[rules,retrieval,serve,gpu]" torch==2.11.0 | $(RUN) tools/constraints.py lock constraints/gpu.txt
	$(RESOLVE) ".[rules,retrieval,serve,gpu,vllm]" torch==2.11.0 xgrammar==0.2.1 | $(RUN) tools/constraints.py lock constraints/gpu-vllm.txt

demo: $(STAMP) ## base → SFT → GRPO → merge → submission with the tiny model (ten minutes on two cores)
	$(RUN) recipes/demo.py -o "$(RUNS)/demo"

# Two processes of one thread each: what is tested is small.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses=auto --dist=loadfile --no-loadscope-reorder

test: $(STAMP) ## run the tests (4 minutes on two cores)
	$(PYTEST) -m "not slow"

test-slow: $(STAMP)
	$(PYTEST) -m slow

test-all: test test-slow ## after them the slow ones: whole runs, the notebook, browser pages, fuzzing

lint: $(STAMP) ## ruff, mypy and the order of the rooms
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	"$(VENV)/bin/lint-imports"

format: $(STAMP) ## let ruff format the code
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

samples: $(STAMP) ## rebuild malpyeong/samples/data from the item bank
	$(RUN) -m tools.samples.build

tiny-base: $(STAMP) ## pre-train the tiny base model again, to runs/tiny_base
	$(RUN) -m tools.tiny_base -o "$(RUNS)/tiny_base"

offline: $(STAMP) ## a folder to install from where there is no internet: OUT=FOLDER (docs/offline.md)
	$(RUN) -m tools.offline "$(OUT)" $(if $(MODEL),--model "$(MODEL)") $(ARGS)

gpu-check: $(STAMP) ## does all of it run on this GPU? times, tokens/s, peaks (random weights, offline, minutes)
	$(RUN) -m benchmarks.gpu_check --work "$(RUNS)/gpu-check"

bench-gpu: $(STAMP) ## ways of sampling and memory limits on this GPU (an hour; resumes where it stopped)
	$(RUN) -m benchmarks.gpu_check --speed --work "$(RUNS)/gpu-check"
	$(RUN) -m benchmarks.gpu_check --limits --work "$(RUNS)/gpu-check"

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

bench-overhead: $(STAMP) ## GRPO steps of the recipe against a bare TRL script
	test -e "$(BENCH_ADAPTER)" || $(RUN) recipes/sft.py recipes/tiny/sft.yaml training.epochs=1 \
	  "training.output=$(RUNS)/bench-decoding" --resume auto
	$(RUN) -m benchmarks.overhead --adapter "$(BENCH_ADAPTER)"

bench-contexts: $(STAMP) ## rules, examples and chosen rules in the prompt of the tiny model (hours; resumes where it stopped)
	$(RUN) -m benchmarks.contexts -o "$(RUNS)/contexts"

compare: $(STAMP) ## SFT, GRPO, RLOO, DPO, PPO … side by side, tiny model (hours; resumes; ARGS=--variants: ways of GRPO)
	$(RUN) -m benchmarks.compare -o "$(RUNS)/compare" $(ARGS)

torture: $(STAMP) ## SIGKILL, full disk, read-only folder: does each long command end as if nothing had happened? (an hour)
	$(RUN) -m benchmarks.torture -o "$(RUNS)/torture"

# The contest's files are DATA/train.json, dev.json and test.json, or as they come (korean_language_rag_V1.0_train.json …),
# .jsonl too; the first that is there.  $(call found,SPLIT)
found = $(shell for name in $(1) korean_language_rag_V1.0_$(1); do for end in json jsonl; do \
  file="$(DATA)/$$name.$$end"; if test -e "$$file"; then echo "$$file"; exit; fi; done; done)
TRAIN = $(or $(call found,train),$(DATA)/train.json)
DEV   = $(or $(call found,dev),$(DATA)/dev.json)
TEST  = $(or $(call found,test),$(DATA)/test.json)
FILES = data.train="$(TRAIN)" data.dev="$(DEV)" $(if $(call found,test),data.test="$(TEST)")

# Each recipes/models/NAME.yaml is a model, and tiny the sample model on a CPU: make sft-NAME, grpo-NAME …
# GPU=t4|24gb|40gb|80gb states the card, MODEL= another hub id or a folder with weights, ARGS= whatever else the stage's
# command takes. NAME-choice is the model NAME that names a rule before it answers (docs/choice.md); which one is right is
# known from make mine-NAME.
NAME   = $(patsubst %-choice,%,$*)
CHOICE = $(filter %-choice,$*)
# The recipe of a stage for NAME.  $(call recipe,STAGE)
recipe = $(if $(filter tiny,$(NAME)),recipes/tiny/$(1).yaml,recipes/$(1).yaml "recipes/models/$(NAME).yaml")
CARD   = $(if $(GPU),gpu=$(GPU)) $(if $(MODEL),"model.name=$(MODEL)") $(ARGS)

# Solved examples, and rules where DATA/rules.json is there (python -m malpyeong.retrieval and malpyeong.rules): the same
# for every model and stage, so made once, and again when a file in DATA is newer. NAME-choice has rules of its own: those
# that the mined labels of similar questions vote for.  $(call search,QUESTIONS,OUTPUT)
LABELS = $(RUNS)/$(NAME)-mined/contexts.jsonl
search = @test -z "$(CHOICE)" -o -e "$(LABELS)" || { echo "make $@: $(LABELS) is not there; run make mine-$(NAME) first" >&2; exit 2; }; \
  set -- $(1) --examples "$(TRAIN)" $(if $(CHOICE),--labels "$(LABELS)" --rules-k 5); \
  test ! -e "$(DATA)/rules.json" || set -- "$$@" --rules "$(DATA)/rules.json"; \
  test -e "$(2)" && test -z "$$(find $(1) "$(TRAIN)" "$(DATA)/rules.json" $(if $(CHOICE),"$(LABELS)") -newer "$(2)" 2>/dev/null)" || \
  $(RUN) -m malpyeong.retrieval search "$$@" -o "$(2)"
FOUND   = $(RUNS)/$(if $(CHOICE),$*-)context
CONTEXT = $(call search,"$(TRAIN)" "$(DEV)",$(FOUND).jsonl)
# What stands in the prompts.
PROMPTS = data.context="$(FOUND).jsonl" $(if $(CHOICE),data.mode=choose_rule data.labels="$(LABELS)",data.mode=context)
# What GRPO and its preflight are given.
GRPO    = $(FILES) $(PROMPTS) $(if $(CHOICE),data.rewards.choice=0.5) \
  model.adapter="$(RUNS)/$*-sft/adapter" training.output="$(RUNS)/$*-grpo" $(CARD)

mine-%: $(STAMP)
	$(RUN) recipes/mine.py $(call recipe,mine) 'data.questions=["$(TRAIN)", "$(DEV)"]' \
	  data.rules="$(DATA)/rules.json" mining.output="$(RUNS)/$*-mined" \
	  $(if $(MODEL),"model.name=$(MODEL)") $(ARGS) --resume auto

sft-%: $(STAMP)
	$(CONTEXT)
	$(RUN) recipes/sft.py $(call recipe,sft) $(FILES) \
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

# The newest adapter there is.
score-%: $(STAMP)
	$(CONTEXT)
	@adapter="$(RUNS)/$*-grpo/adapter"; test -e "$$adapter" || adapter="$(RUNS)/$*-sft/adapter"; \
	$(RUN) -m malpyeong.score "$$adapter" "$(DEV)" --context "$(FOUND).jsonl" $(if $(CHOICE),--choose) $(ARGS)

export-%: $(STAMP)
	$(RUN) -m malpyeong.export "$(RUNS)/$*-grpo/adapter" -o "$(RUNS)/$*-merged" $(ARGS)

submit-%: $(STAMP)
	$(call search,"$(TEST)",$(FOUND)-test.jsonl)
	$(RUN) -m malpyeong.predict "$(RUNS)/$*-merged" "$(TEST)" -o "$(RUNS)/$*-test.json" \
	  --context "$(FOUND)-test.jsonl" $(if $(CHOICE),--choose) $(ARGS)
	$(RUN) -m malpyeong.submit "$(TEST)" "$(RUNS)/$*-test.json" -o "$(RUNS)/$*-submission.json"

serve-%: $(STAMP)
	@set -- --examples "$(TRAIN)" $(if $(CHOICE),--choose --labels "$(LABELS)" --rules-k 5); \
	test ! -e "$(DATA)/rules.json" || set -- "$$@" --rules "$(DATA)/rules.json"; \
	$(RUN) -m malpyeong.serve "$(RUNS)/$*-merged" "$$@" $(ARGS)

clean: ## remove the virtual environment and caches (runs/ stays)
	rm -rf "$(VENV)" .pytest_cache .mypy_cache .ruff_cache .hypothesis
