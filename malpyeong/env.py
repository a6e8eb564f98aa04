"""What runs here, for a bug report: ``python -m malpyeong env``."""

import platform
import sys

import click

from malpyeong.models.environment import version, version_problems
from malpyeong.terminal import Command
from malpyeong.training.run import PACKAGES, git_revision

_MORE = ("xformers", "triton", "trackio", "tensorboard", "wandb")


@click.command(cls=Command)
def main() -> None:
    """Print versions, the graphics card and what does not fit together; no paths, and no name of this machine."""
    import torch

    click.echo(f"malpyeong {version('malpyeong')} ({git_revision() or 'no git revision'})")
    click.echo(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in (*PACKAGES[1:], *_MORE):
        click.echo(f"{package} {version(package) or '-'}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            click.echo(
                f"GPU {index}: {card.name}, {card.total_memory / 2**30:.1f} GiB, compute capability "
                f"{card.major}.{card.minor}, CUDA {torch.version.cuda}"
            )
    else:
        click.echo(f"no GPU; {torch.get_num_threads()} threads")
    problems = list(version_problems("malpyeong"))
    for line in problems:
        click.echo(f"problem: {line}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
