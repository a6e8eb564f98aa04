"""The page of a training run: curves, sampled groups of completions, and what the run was made from."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from errno import ENOENT
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import yaml

from malpyeong.errors import InputError
from malpyeong.report.charts import Chart, Points, chart
from malpyeong.report.pages import render
from malpyeong.training.run import checkpoints, logged

MAX_SAMPLED_STEPS = 8
_AVERAGED = 5  # logged steps at either end whose mean reward is compared
# Name → key of the log (malpyeong.training.callbacks.StepClock).
_SECONDS = {
    "step": "step_seconds",
    "샘플링": "generate_seconds",
    "보상": "reward_seconds",
    "업데이트": "update_seconds",
}
_PEAKS = {"할당": "peak_allocated_gib", "예약": "peak_reserved_gib"}
_PEAKS_NOTE = "GiB. 한 step에서 가장 많을 때(torch의 할당기가 센 값)"


@dataclass(frozen=True, slots=True)
class Completion:
    """A sampled completion, or the gold answer among them (``training.gold_advantage``).

    Attributes:
        text: what the model wrote.
        rewards: reward name → reward; None where it does not apply.
        total: the weighted sum of the rewards, None if none applies, as to the gold answer.
        advantage: the one that the trainer used.
        count: how often it was sampled in its group.
    """

    text: str
    rewards: Mapping[str, float | None]
    total: float | None
    advantage: float
    count: int


@dataclass(frozen=True, slots=True)
class Group:
    """The completions of one prompt at one step, the largest advantage first."""

    step: int
    record_id: str
    question: str
    prompt: str
    reference: str
    completions: Sequence[Completion]
    groups_of_step: int

    @property
    def largest(self) -> float:
        """The largest advantage, whichever sign."""
        return max(abs(completion.advantage) for completion in self.completions)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run's folder holds.

    Attributes:
        path: the folder.
        config_text: ``config.yaml`` as it stands.
        config: the same, read.
        environment: versions, digests, git revision.
        log: what the trainer logged, one mapping a logged step.
        ended: whether training has ended.
        samples: of each of a few steps, evenly spaced, the group whose rewards are furthest apart; none in an SFT run.
    """

    path: Path
    config_text: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    ended: bool
    samples: Sequence[Group]

    @property
    def weights(self) -> Mapping[str, float]:
        """Reward name → weight; empty in an SFT run."""
        weights: Mapping[str, float] = self.config["data"].get("rewards", {})
        return weights


def read_run(path: Path) -> Run:
    """Read a run's folder; nothing in it is changed, so a run in progress is not disturbed.

    Raises:
        InputError: it is no run's folder, or a file in it is damaged.
    """
    try:
        config_text = _text(path / "config.yaml")
        config = yaml.safe_load(config_text)
        if not all(isinstance(config[block], dict) for block in ("model", "data", "training")):
            raise TypeError
    except OSError:
        raise InputError(
            f"{path}: has no config.yaml; name the folder of a training run, like runs/tiny-grpo"
        ) from None
    except (yaml.YAMLError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"{path / 'config.yaml'}: is damaged or not a recipe's; name a training run's folder"
        ) from None
    environment = _read_json(path / "environment.json", dict)
    ended = (path / "adapter").is_dir()
    log = _read_json(path / "log.json", list) if ended else _log_of_newest_checkpoint(path)
    weights = config["data"].get("rewards", {})
    samples = _read_samples(path, weights, config["training"]["num_generations"]) if weights else []
    return Run(path, config_text, config, environment, log, ended, samples)


def _text(path: Path) -> str:
    if not path.is_file():  # a pipe would be read for ever
        raise FileNotFoundError(ENOENT, "no such file")
    return path.read_text("utf-8")


def _read_json(path: Path, kind: type) -> Any:  # noqa: ANN401 -- what the file holds
    try:
        value = json.loads(_text(path))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); is this a training run's folder?") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: is damaged (not JSON); restore it or train again") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: is damaged (not what a run writes); restore it or train again")
    return value


def _log_of_newest_checkpoint(path: Path) -> list[dict[str, Any]]:
    for folder in checkpoints(path):
        try:
            log: list[dict[str, Any]] = json.loads(_text(folder / "trainer_state.json"))["log_history"]
        except (OSError, ValueError, KeyError):
            continue  # being written just now
        return log
    return []


def _read_samples(path: Path, weights: Mapping[str, float], num_generations: int) -> list[Group]:
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    samples = []
    for file in _evenly_spaced(sorted((path / "completions").glob("completions_*.parquet")), MAX_SAMPLED_STEPS):
        try:
            rows = read_table(file).to_pylist()
        except (OSError, ArrowException):
            continue  # being written just now, or cut off by a kill; a resumed run writes it again
        groups = [
            _group(rows[start : start + num_generations], weights, len(rows) // num_generations)
            for start in range(0, len(rows), num_generations)
        ]
        if groups:
            samples.append(max(groups, key=_spread))
    return samples


def _evenly_spaced(files: Sequence[Path], count: int) -> list[Path]:
    if len(files) <= count:
        return list(files)
    return [files[round(place * (len(files) - 1) / (count - 1))] for place in range(count)]


def _group(rows: Sequence[Mapping[str, Any]], weights: Mapping[str, float], groups_of_step: int) -> Group:
    # The same text may stand there twice: sampled, and as the gold answer.
    counts = Counter((row["completion"], row["advantage"]) for row in rows)
    different = {(row["completion"], row["advantage"]): row for row in rows}
    completions = [_completion(row, weights, counts[key]) for key, row in different.items()]
    return Group(
        step=rows[0]["step"],
        record_id=rows[0]["record_id"],
        question=rows[0]["question"],
        prompt=rows[0]["prompt"],
        reference=rows[0]["reference"],
        completions=sorted(completions, key=lambda completion: -completion.advantage),
        groups_of_step=groups_of_step,
    )


def _completion(row: Mapping[str, Any], weights: Mapping[str, float], count: int) -> Completion:
    rewards = {name: logged(row, name) for name in weights}
    parts = [weights[name] * reward for name, reward in rewards.items() if reward is not None]
    return Completion(row["completion"], rewards, math.fsum(parts) if parts else None, row["advantage"], count)


def _spread(group: Group) -> float:
    totals = [one.total for one in group.completions for _ in range(one.count) if one.total is not None]
    return stdev(totals) if len(totals) > 1 else 0.0


def run_page(run: Run) -> str:
    """Return the page as HTML."""
    return render(
        "run.html.j2",
        "run.js",
        title=f"학습 보고서 · {run.path.resolve().name}",
        run=run,
        name=run.path.resolve().name,
        stage="GRPO" if run.weights else "SFT",
        last_step=max((row["step"] for row in run.log), default=0),
        charts=_grpo_charts(run) if run.weights else _sft_charts(run),
        facts=_grpo_facts(run) if run.weights else _sft_facts(run),
    )


def _points(log: Sequence[Mapping[str, Any]], key: str) -> Points:
    points = [(row["step"], value) for row in log if (value := logged(row, key)) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _charts(run: Run, wanted: Iterable[tuple[str, str, Mapping[str, str], float | None]]) -> list[Chart]:
    """Make charts of (title, note, name → key of the log, start of the y axis); those without a value are left out."""
    made = (
        # SFT logs means over several steps already.
        chart(title, note, {name: _points(run.log, key) for name, key in names.items()}, low, bool(run.weights))
        for title, note, names, low in wanted
    )
    return [one for one in made if one is not None]


def _grpo_charts(run: Run) -> list[Chart]:
    weights = ", ".join(f"{name} {weight:g}" for name, weight in run.weights.items())
    lengths = {"평균": "completions/mean_length", "가장 긴 것": "completions/max_length"}
    return _charts(
        run,
        [
            ("보상", "보상마다 한 step의 평균", {name: f"rewards/{name}/mean" for name in run.weights}, 0),
            ("보상의 가중합", f"가중치: {weights}", {"가중합": "reward"}, None),
            (
                "그룹 안 표준편차",
                "한 그룹의 completion들이 받은 보상의 표준편차. 0이면 그 보상에서 배울 것이 없음",
                {name: f"group_std/{name}" for name in run.weights},
                0,
            ),
            ("죽은 그룹", "dead groups: 보상이 모두 같아 배울 것이 없는 그룹의 비율", {"비율": "dead_groups"}, 0),
            ("completion 길이", "토큰 수", {**lengths, "가장 짧은 것": "completions/min_length"}, 0),
            ("잘린 completion", "길이 제한에 걸려 끝맺지 못한 비율", {"비율": "completions/clipped_ratio"}, 0),
            ("손실", "정책 손실(policy loss). 작아져야 좋은 값이 아님", {"손실": "loss"}, None),
            ("기울기 노름", "gradient norm, 클리핑 전", {"노름": "grad_norm"}, 0),
            ("엔트로피", "토큰마다 nat. 0에 가까우면 같은 completion만 나옴", {"엔트로피": "entropy"}, 0),
            ("step 시간", "초", _SECONDS, 0),
            ("GPU 메모리", _PEAKS_NOTE, _PEAKS, 0),
        ],
    )


def _sft_charts(run: Run) -> list[Chart]:
    accuracy = {"학습": "mean_token_accuracy", "dev": "eval_mean_token_accuracy"}
    return _charts(
        run,
        [
            ("손실", "토큰마다 nat. dev가 다시 오르면 과적합(overfitting)", {"학습": "loss", "dev": "eval_loss"}, 0),
            ("토큰 정확도", "정답의 다음 토큰을 첫째로 꼽은 비율", accuracy, None),
            ("기울기 노름", "gradient norm, 클리핑 전", {"노름": "grad_norm"}, 0),
            ("학습률", "", {"학습률": "learning_rate"}, 0),
            ("step 시간", "초", {"step": "step_seconds"}, 0),
            ("GPU 메모리", _PEAKS_NOTE, _PEAKS, 0),
        ],
    )


def _grpo_facts(run: Run) -> list[tuple[str, str, str]]:
    """Return (name, value, note) of what tells soonest whether the run went well."""
    facts = []
    rewards = _points(run.log, "reward")[1]
    if rewards:
        ends = min(_AVERAGED, len(rewards))
        first, last = fmean(rewards[:ends]), fmean(rewards[-ends:])
        facts.append(("보상의 가중합", f"{first:.2f} → {last:.2f}", f"처음과 마지막 {ends}개 기록의 평균"))
    for name, key in (("죽은 그룹", "dead_groups"), ("잘린 completion", "completions/clipped_ratio")):
        values = _points(run.log, key)[1]
        if values:
            facts.append((name, f"{fmean(values):.1%}", f"마지막 {values[-1]:.1%}"))
    return facts + _cost_facts(run)


def _cost_facts(run: Run) -> list[tuple[str, str, str]]:
    """Return what a step took and how much memory the fullest one needed."""
    facts, spent = [], {name: _points(run.log, key)[1] for name, key in _SECONDS.items()}
    if seconds := spent.pop("step"):
        shares = [f"{name} {sum(values) / sum(seconds):.0%}" for name, values in spent.items() if values]
        facts.append(("step 시간", f"{median(seconds):.1f}초", ", ".join(shares) or "중앙값"))
    if peaks := _points(run.log, _PEAKS["할당"])[1]:
        reserved = max(_points(run.log, _PEAKS["예약"])[1])
        facts.append(("GPU 메모리", f"{max(peaks):.1f} GiB", f"가장 많을 때. 예약 {reserved:.1f} GiB"))
    return facts


def _sft_facts(run: Run) -> list[tuple[str, str, str]]:
    facts = []
    steps, losses = _points(run.log, "eval_loss")
    if losses:
        best = min(losses)
        note = f"step {steps[losses.index(best)]}. 처음 {losses[0]:.4f}, 마지막 {losses[-1]:.4f}"
        facts.append(("가장 낮은 dev 손실", f"{best:.4f}", note))
    training = _points(run.log, "loss")[1]
    if training:
        facts.append(("학습 손실", f"{training[-1]:.4f}", f"처음 {training[0]:.4f}"))
    return facts + _cost_facts(run)
