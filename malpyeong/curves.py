"""Learning curves of a run as a PNG: ``python -m malpyeong.curves RUN -o curves.png``."""

import io
import json
from pathlib import Path
from typing import Any

import click

from malpyeong.errors import InputError
from malpyeong.files import write_bytes
from malpyeong.runs import logged


def read_log(run: Path) -> list[dict[str, Any]]:
    """Return what the trainer logged, one mapping a logged step.

    Raises:
        InputError: the run has no log (not a run's folder, or it has not ended).
    """
    try:
        log: list[dict[str, Any]] = json.loads((run / "log.json").read_text("utf-8"))
    except (OSError, ValueError):
        raise InputError(f"{run}: has no log.json; name the folder of a run that has ended") from None
    return log


def series(log: list[dict[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values of what is plotted: dev and training loss, mean reward of each component.

    A step at which a component applied to no completion is left out.
    """
    names = {"loss": "training loss", "eval_loss": "dev loss"}
    rewards = {key: key.split("/")[1] for row in log for key in row if _is_reward(key)}
    if rewards:
        names = rewards
    found: dict[str, tuple[list[int], list[float]]] = {}
    for key, name in names.items():
        points = [(int(row["step"]), value) for row in log if (value := logged(row, key)) is not None]
        if points:
            found[name] = ([step for step, _ in points], [value for _, value in points])
    return found


def plot(run: Path, output: Path) -> None:
    """Draw the curves of a run."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    curves = series(read_log(run))
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for name, (steps, values) in curves.items():
        (line,) = axes.plot(steps, values, alpha=0.35, linewidth=1)
        axes.plot(steps, _smooth(values), label=name, color=line.get_color(), linewidth=2)
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward" if "training loss" not in curves else "loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    axes.set_title(run.name)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png")
    plt.close(figure)
    write_bytes(output, picture.getvalue())


def _is_reward(key: str) -> bool:
    return key.startswith("rewards/") and key.endswith("/mean")


def _smooth(values: list[float], window: int = 10) -> list[float]:
    return [
        sum(values[max(0, index - window + 1) : index + 1]) / min(window, index + 1) for index in range(len(values))
    ]


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="PNG file to write.")
def main(run: Path, output: Path) -> None:
    """Draw the learning curves of RUN."""
    plot(run, output)
    click.echo(str(output))


if __name__ == "__main__":
    main()
