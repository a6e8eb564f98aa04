"""Merge a LoRA adapter into its base model: ``python -m malpyeong.export ADAPTER -o FOLDER``.

The adapter is merged onto 16- or 32-bit weights, never onto 4-bit ones: there the small change is lost when the
sum is quantised again. The merged folder is loaded back and must give the logits and the greedy answers of the
adapter model; else nothing is written.
"""

import gc
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from malpyeong.contest.records import Record
from malpyeong.errors import InputError, counted
from malpyeong.files import digest, new_folder, write_text
from malpyeong.samples import DATA
from malpyeong.tasks.task import load
from malpyeong.terminal import Command

# What counts as the same model. In float32 only the order of sums differs. A merge in 16 bits rounds every weight
# once more, so that near ties may fall the other way: there the likeliest next token must agree at nearly every place
# of the adapter model's answers.
MAX_LOGIT_DIFF = 1e-4
MIN_AGREEMENT = 0.98


@dataclass(frozen=True, slots=True)
class Parity:
    """How the merged model compares with the adapter model.

    Attributes:
        max_logit_diff: largest absolute difference over all places of the checked prompts and answers.
        top_token_agreement: share of the answers' places at which the likeliest next token is the same.
        same_answers: whether every greedy answer is the same.
        records: how many prompts were checked.
        dtype: dtype of the merged weights.
    """

    max_logit_diff: float
    top_token_agreement: float
    same_answers: bool
    records: int
    dtype: str

    @property
    def ok(self) -> bool:
        """Whether the merged model may be used in the adapter model's place."""
        if self.dtype == "float32":
            return self.same_answers and self.max_logit_diff <= MAX_LOGIT_DIFF
        return self.top_token_agreement >= MIN_AGREEMENT


def export(
    adapter: Path,
    output: Path,
    base: str | None = None,
    dtype: str | None = None,
    dequantised: bool = False,
    *,
    check: Sequence[Record],
    max_new_tokens: int = 320,
) -> Parity:
    """Merge ``adapter`` into its base and write a model folder, whole or not at all.

    Args:
        adapter: folder of the LoRA adapter.
        output: folder to write; must not exist.
        base: the base model, if it is not where the adapter says.
        dtype: dtype of the merged weights; the base's own if None.
        dequantised: merge onto the base as 4-bit training saw it (NF4 and back), not onto its original weights.
        check: records, at least one, whose prompts are compared before and after.
        max_new_tokens: length limit of the compared answers.

    Raises:
        InputError: the adapter or its base cannot be loaded, or ``output`` exists or cannot be written.
        click.ClickException: the merged model differs from the adapter model; nothing is written.
    """
    import torch
    from safetensors import SafetensorError

    from malpyeong.decoding.answers import predict
    from malpyeong.decoding.engines import Decoding, TransformersEngine
    from malpyeong.models.adapter import adapter_folder, base_of_adapter, put_adapter
    from malpyeong.models.load import load_base, load_for_prediction, set_generation_config, tokenizer_for_prediction
    from malpyeong.models.tokenizer import save_tokenizer
    from malpyeong.prompts.messages import completion_ids, render
    from malpyeong.training.preflight import SAMPLES

    adapter = adapter_folder(adapter)
    base = base or base_of_adapter(adapter)
    with new_folder(output) as folder:
        tokenizer = tokenizer_for_prediction(base, str(adapter))
        chosen = getattr(torch, dtype) if dtype else _weights_dtype(base)
        model: Any = load_base(base, chosen, load_in_4bit=dequantised)
        if dequantised:
            model = _dequantised(model, base, chosen)
        elif method := getattr(model, "quantization_method", None):
            raise InputError(
                f"{base}: is a quantised model, onto which an adapter must not be merged; name its 16-bit original "
                f"with --base{', or use --dequantised' if method == 'bitsandbytes' else ''}"
            )
        set_generation_config(model, tokenizer)
        model = put_adapter(model, adapter).to("cuda" if torch.cuda.is_available() else "cpu").eval()
        prompts = [render(tokenizer, record) for record in check]
        decoding = Decoding(max_new_tokens=max_new_tokens)
        answers = dict(predict(TransformersEngine(model, tokenizer, decoding), prompts))
        texts = [prompt.ids + completion_ids(tokenizer, answers[row]) for row, prompt in enumerate(prompts)]
        logits = _logits(model, texts)
        merged = model.merge_and_unload(safe_merge=True)
        try:
            merged.save_pretrained(folder)
        except (OSError, SafetensorError) as error:
            size = sum(weight.numel() for weight in merged.parameters()) * chosen.itemsize / 2**30
            raise InputError(f"{output}: cannot be written ({error}); the model takes {size:.1f} GiB there") from None
        _name_old_config_keys(folder / "config.json")
        save_tokenizer(tokenizer, folder, [*SAMPLES, *(record.question for record in check), *answers.values()])
        del model, merged
        gc.collect()
        name = str(chosen).removeprefix("torch.")
        reloaded, tokenizer = load_for_prediction(str(folder), dtype=name)
        pairs = list(zip(logits, _logits(reloaded, texts), strict=True))
        agreement = torch.cat(
            [
                (a.argmax(-1) == b.argmax(-1))[len(prompt.ids) - 1 :]
                for (a, b), prompt in zip(pairs, prompts, strict=True)
            ]
        )
        again = [render(tokenizer, record) for record in check]
        parity = Parity(
            max_logit_diff=max(float((a - b).abs().max()) for a, b in pairs),
            top_token_agreement=float(agreement.float().mean()),
            same_answers=answers == dict(predict(TransformersEngine(reloaded, tokenizer, decoding), again)),
            records=len(check),
            dtype=name,
        )
        if not parity.ok:
            raise click.ClickException(
                f"{output}: not written; the merged model differs from the adapter model (largest logit difference "
                f"{parity.max_logit_diff:.2g}, likeliest token the same at {parity.top_token_agreement:.1%} of places, "
                f"same answers: {parity.same_answers})"
            )
        made_of = {"base": base, "adapter_sha256": digest(adapter / "adapter_model.safetensors"), **asdict(parity)}
        write_text(folder / "export.json", json.dumps(made_of, ensure_ascii=False, indent=2) + "\n")
    return parity


def _dequantised(model: Any, base: str, dtype: Any) -> Any:  # noqa: ANN401 -- a transformers model, a torch dtype
    """Return a quantised model with ordinary weights, of the values that its quantised ones stand for."""
    quantizer = model.hf_quantizer
    try:
        model = model.dequantize(dtype=dtype)
    except NotImplementedError:
        raise InputError(f"{base}: cannot be dequantised; name its 16-bit original with --base") from None
    # How a folder of 4-bit weights was read cannot be reversed, and need not be: what is saved is not in 4 bits.
    of_quantizer = {type(step) for one in quantizer.get_weight_conversions() for step in one.operations}
    model._weight_conversions = [
        one
        for one in model._weight_conversions
        if of_quantizer.isdisjoint(type(step) for step in getattr(one, "operations", ()))
    ]
    return model


def _name_old_config_keys(path: Path) -> None:
    """Write the rotary embedding's base under its name of transformers 4 too, which would take 10,000 instead."""
    config = json.loads(path.read_text("utf-8"))
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        config["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":
            config["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        write_text(path, json.dumps(config, ensure_ascii=False, indent=2) + "\n")


def _logits(model: Any, texts: Sequence[list[int]]) -> list[Any]:  # noqa: ANN401 -- a transformers or PEFT model
    """Return the logits over each text, of shape (tokens, vocabulary), in float32."""
    import torch

    with torch.inference_mode():
        return [model(input_ids=torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in texts]


def _weights_dtype(base: str) -> Any:  # noqa: ANN401 -- torch.dtype
    """Return the dtype of a base model's weights."""
    import torch
    from transformers import AutoConfig

    try:
        dtype = AutoConfig.from_pretrained(base).dtype
    except (OSError, ValueError):
        raise InputError(
            f"{base}: the adapter's base model is not here; name its folder or hub id with --base"
        ) from None
    return dtype or torch.float32


@click.command(cls=Command)
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option("--base", help="Base model, if it is not where the adapter says.")
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="[default: the base's]")
@click.option("--dequantised", is_flag=True, help="Merge onto the base as 4-bit training saw it.")
@click.option(
    "--check",
    type=click.Path(path_type=Path),
    default=DATA / "test_questions.json",
    help="Questions to compare on.",
)
@click.option("--check-records", default=8, show_default=True, type=click.IntRange(min=1))
def main(
    adapter: Path,
    output: Path,
    base: str | None,
    dtype: str | None,
    dequantised: bool,
    check: Path,
    check_records: int,
) -> None:
    """Merge ADAPTER into its base model and write the model folder, checked."""
    from malpyeong.models.memory import out_of_memory

    records = load(check)[:check_records]
    cure = "merge on the CPU (CUDA_VISIBLE_DEVICES= before the command), or predict without: --adapter, --load-in-4bit"
    with out_of_memory(cure):
        parity = export(adapter, output, base, dtype, dequantised, check=records)
    click.echo(
        f"{output}: merged in {parity.dtype}; over {counted(parity.records, 'prompt')} the largest logit difference is "
        f"{parity.max_logit_diff:.2g}, the likeliest token is the same at {parity.top_token_agreement:.1%} of places, "
        f"same answers: {parity.same_answers}"
    )


if __name__ == "__main__":
    main()
