"""How many of a model's sampled reasons are distinct: what remembering scores can save in GRPO.

    python -m benchmarks.answer_diversity --adapter runs/tiny-sft/adapter

For some questions of the sample data's ``train`` (which SFT has seen) and ``explore`` (which it has not), 56 answers
each at temperature 0.9: the share of distinct reasons among 8 of them, and among all.
"""

import random
from statistics import fmean

import click

from malpyeong.contest.answer import contest_split
from malpyeong.contest.records import load_records
from malpyeong.models.load import load_for_prediction
from malpyeong.prompts.messages import build_messages, prompt_ids
from malpyeong.samples import DATA, TINY_BASE

GROUP, SAMPLES = 8, 56


@click.command()
@click.option("--model", default=str(TINY_BASE))
@click.option("--adapter", required=True)
@click.option("--questions", default=20, show_default=True, help="Of each split.")
def main(model: str, adapter: str, questions: int) -> None:
    """Print the two shares for each split."""
    import torch

    torch.manual_seed(0)
    loaded, tokenizer = load_for_prediction(model, adapter, "float32")
    for split in ("train", "explore"):
        few, all_ = [], []
        for record in random.Random(0).sample(load_records(DATA / f"{split}.json", answers="gold"), questions):
            prompt = torch.tensor([prompt_ids(tokenizer, build_messages(record))], device=loaded.device)
            with torch.inference_mode():
                sampled = loaded.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    do_sample=True,
                    temperature=0.9,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=SAMPLES,
                    max_new_tokens=200,
                    pad_token_id=tokenizer.pad_token_id,
                )
            texts = tokenizer.batch_decode(sampled[:, prompt.shape[1] :], skip_special_tokens=True)
            reasons = [contest_split(text)[1] for text in texts]
            all_.append(len(set(reasons)) / SAMPLES)
            few += [len(set(reasons[at : at + GROUP])) / GROUP for at in range(0, SAMPLES, GROUP)]
        click.echo(f"{split}: distinct of {GROUP} {fmean(few):.3f}, of {SAMPLES} {fmean(all_):.3f}")


if __name__ == "__main__":
    main()
