"""Run recipes one after another in this process, with the trainers that Unsloth generates or with TRL's own.

    python -m tests.training.unsloth_cpu unsloth|hf JOBS.json      (a list of [script, recipe, argument …])

Where there is no GPU, Unsloth loads models by transformers and PEFT (its CPU backend) and leaves TRL's trainers as
they are. Here its generator is asked for them all the same, so that a recipe runs Unsloth's GRPO loss, its
log-probabilities and its ways through the trainer. Its forward passes, kernels and sampling run on a GPU alone.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    backend, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    if backend == "unsloth":
        os.environ["UNSLOTH_FORCE_CPU"] = "1"
        from tests.training import unsloth_arguments

        unsloth_arguments.generate()
        import trl

        from malpyeong.models import load

        load.choose_backend = lambda model: "unsloth"  # which a machine without a GPU refuses
        assert trl.GRPOTrainer.__name__ == "UnslothGRPOTrainer", trl.GRPOTrainer
        assert trl.SFTTrainer.__name__ == "UnslothSFTTrainer", trl.SFTTrainer
    scripts = {}
    for script, *arguments in jobs:
        if script not in scripts:
            spec = importlib.util.spec_from_file_location(Path(script).stem, ROOT / script)
            scripts[script] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(scripts[script])
        print(f"== {' '.join(arguments)}", flush=True)
        scripts[script].main(arguments, standalone_mode=False)


if __name__ == "__main__":
    main()
