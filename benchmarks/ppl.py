"""PPL mining with one forward for each pair, as is commonly done, against ours.

    make bench-ppl

Both score the same answers with the same model and prompts; every perplexity that the loop computes is compared.

- loop: the chat template rendered for the pair, prompt and answer in one sequence, batch 1, ``model(input_ids,
  labels=labels).loss`` (logits at every position), PPL(a|q) once for each question. Its cost per pair does not change, so
  it is measured on a sample of the pairs, spread over rules and questions.
- ours: what ``recipes/mine_contexts.py`` runs, planning and tokenizing included, on all pairs.

Two models: the sample model (2.2 M parameters, a vocabulary of 1,664), and random weights with Qwen3's vocabulary of
151,936 (40 M parameters, 39 M of them embeddings), where logits cost what they do in a real small model. Rules have the
lengths of the contest's sections (median 329 characters, at most 2,133): the sample's are joined to reach them.
"""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from malpyeong.mining import Plan, Rule, load_rules
from malpyeong.prompts import build_messages, completion_ids, prompt_ids
from malpyeong.records import Record
from malpyeong.samples import DATA

TOLERANCE = 1e-3
MAX_LENGTH = 4096


def contest_length_rules(count: int) -> list[Rule]:
    """Return rules whose lengths are log-normal quantiles with the contest's median and p95 (329, 970), at most 2,133."""
    text = "\n".join(rule.full_text for rule in load_rules(DATA / "rules.json"))
    spread = math.log(970 / 329) / statistics.NormalDist().inv_cdf(0.95)
    rules, start = [], 0
    for number in range(count):
        quantile = statistics.NormalDist().inv_cdf((number + 0.5) / count)
        length = min(2133, round(329 * math.exp(spread * quantile)))
        start = start if start + length <= len(text) else 0
        rules.append(Rule(str(number), text[start : start + length]))
        start += length
    return rules


def qwen3_vocabulary_model() -> Any:  # noqa: ANN401 -- a transformers model
    """Return random weights: Qwen3's blocks and vocabulary, narrow and shallow enough for two cores."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
    )
    return Qwen3ForCausalLM(config).eval()


def loop(model: Any, tokenizer: Any, pairs: Sequence[tuple[Record, Rule | None]]) -> list[float]:  # noqa: ANN401
    """Return PPL(answer | rule, question) by one whole forward for each pair."""
    import torch

    found = []
    for record, rule in pairs:
        prompt = prompt_ids(tokenizer, build_messages(record, rule.full_text if rule else ""))
        answer = completion_ids(tokenizer, record.answer or "")[:-1]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.inference_mode():
            found.append(math.exp(float(model(input_ids=ids, labels=labels).loss)))
    return found


def ours(model: Any, tokenizer: Any, records: Sequence[Record], rules: Sequence[Rule], batch_tokens: int) -> Plan:  # noqa: ANN401
    """Return the plan of all pairs, computed; the perplexities are kept in ``ours.ppl``."""
    raise NotImplementedError
