"""All commands: ``python -m malpyeong``, or ``malpyeong`` once installed.

A command's module is imported when it is called, so that looking at the list is quick.
"""

import importlib

import click

from malpyeong.terminal import Group

_COMMANDS = {
    "Before training": {
        "env": "versions and hardware, for a bug report",
        "doctor": "preflight: will a recipe run, fit and learn",
        "nfd": "put the syllables of a file from macOS together",
        "rules": "turn the reference document into a rule book",
        "retrieval": "find rules and solved examples, and measure how well",
    },
    "After training": {
        "export": "merge an adapter into its base model, checked",
        "predict": "answer the questions of a contest file",
        "serve": "answer over HTTP (OpenAI's API), with a page to ask on",
        "submit": "write a submission file and check every answer",
        "reproduce": "repeat a prediction and compare it byte for byte",
    },
    "Looking at results": {
        "evaluate": "the contest's score of a prediction, with intervals",
        "score": "a model on dev: greedy, mean and best of its samples",
        "report": "one HTML page: a prediction's errors, or a training run",
    },
}
_MODULES = {name: f"malpyeong.{name}.__main__" for name in ("retrieval", "report", "serve")}
_EPILOG = "Training: make sft-NAME, make grpo-NAME, or python recipes/sft.py --help (recipes/ is in the repository)."


class _Lazy(Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for group in _COMMANDS.values() for name in group]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command = importlib.import_module(_MODULES.get(cmd_name, f"malpyeong.{cmd_name}")).main
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, commands in _COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl(list(commands.items()))


@click.command(cls=_Lazy, epilog=_EPILOG)
@click.version_option(package_name="malpyeong")
def main() -> None:
    """From the files of 국립국어원 AI 말평 to a submission, on one GPU."""


if __name__ == "__main__":
    main(prog_name="malpyeong")
