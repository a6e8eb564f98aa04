"""Loading the models of BERTScore and BLEURT: for scores, rewards and votes alike."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from malpyeong.metrics.pairs import PairScorer


def load_scorer(metric: str, model: str | None = None, device: str = "auto", dtype: str = "float32") -> "PairScorer":
    """Load the model of one metric.

    Args:
        metric: ``bertscore`` or ``bleurt``.
        model: folder or hub id; the contest's own if None.
        device: ``auto``, ``cpu`` or ``cuda``.
        dtype: of its weights.

    Raises:
        MissingModelError: it is not on this machine and cannot be downloaded.
        InputError: it is damaged or of another kind.
    """
    from malpyeong.metrics.bertscore import BERTSCORE_MODEL, BERTScore
    from malpyeong.metrics.bleurt import BLEURT, BLEURT_MODEL

    kinds: dict[str, tuple[Any, str]] = {"bertscore": (BERTScore, BERTSCORE_MODEL), "bleurt": (BLEURT, BLEURT_MODEL)}
    kind, default = kinds[metric]
    scorer: PairScorer = kind(model or default, device=device, dtype=dtype)
    return scorer


def load_scorers(
    metrics: Sequence[str], bertscore: str | None, bleurt: str | None, device: str
) -> tuple[tuple[str, ...], dict[str, "PairScorer"]]:
    """Load the models of those among ``metrics`` that need one, and say which is not on this machine.

    Returns:
        (metrics, scorers): without those whose model is missing, and the loaded ones.

    Raises:
        InputError: ROUGE-1 is among them, and its dictionary is not there.
    """
    from malpyeong.metrics.pairs import MissingModelError
    from malpyeong.metrics.rouge import load_dictionary

    if "rouge1" in metrics:
        load_dictionary()
    scorers: dict[str, PairScorer] = {}
    missing = []
    for metric, model in (("bertscore", bertscore), ("bleurt", bleurt)):
        if metric in metrics:
            try:
                scorers[metric] = load_scorer(metric, model, device)
            except MissingModelError as error:
                missing.append(metric)
                click.echo(f"{metric} is left out. {error.message}", err=True)
    return tuple(metric for metric in metrics if metric not in missing), scorers
