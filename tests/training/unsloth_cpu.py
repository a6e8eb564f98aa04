"""Run recipes one after another in this process, with the trainers that Unsloth generates or with TRL's own.

    python -m tests.training.unsloth_cpu unsloth|hf JOBS.json      (a list of [stage, recipe, argument …])

Where there is no GPU, Unsloth loads models by transformers and PEFT (its CPU backend) and leaves TRL's trainers as
they are. Here its generator is asked for them all the same, so that a recipe runs Unsloth's GRPO loss, its
log-probabilities and its ways through the trainer. Its forward passes, kernels and sampling run on a GPU alone.
"""

import functools
import json
import sys
from pathlib import Path

from tests.training import unsloth_arguments
from tests.training.test_unsloth import script


def main() -> None:
    backend, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    if backend == "unsloth":
        unsloth_arguments.generate()
        import trl

        from malpyeong.models import load

        load.choose_backend = lambda model: "unsloth"  # which a machine without a GPU refuses
        assert trl.GRPOTrainer.__name__ == "UnslothGRPOTrainer", trl.GRPOTrainer
        assert trl.SFTTrainer.__name__ == "UnslothSFTTrainer", trl.SFTTrainer
    recipe = functools.cache(script)
    for stage, *arguments in jobs:
        print(f"== {stage} {' '.join(arguments)}", flush=True)
        recipe(stage).main(arguments, standalone_mode=False)


if __name__ == "__main__":
    main()
