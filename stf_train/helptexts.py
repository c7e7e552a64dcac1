"""Writes the help texts of the commands: python -m stf_train.helptexts docs/help."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from stf_train import cli
from stf_train.variance_cli import variance

COMMANDS: dict[str, click.Command] = {
    "stf-train": cli.train,
    "stf-sample": cli.sample,
    "stf-eval": cli.evaluate,
    "stf-variance": variance,
}


def text(name: str) -> str:
    """What a command and its subcommands say with --help, in 100 columns."""
    return "\n\n".join(helps(COMMANDS[name], name, None))


def helps(command: click.Command, name: str, parent: click.Context | None) -> Iterator[str]:
    """The help of a command, then those of its subcommands."""
    context = click.Context(
        command, parent, info_name=name, terminal_width=100, max_content_width=100
    )
    context.show_default = True
    yield command.get_help(context) + "\n"
    if isinstance(command, click.Group):
        for below, subcommand in sorted(command.commands.items()):
            yield from helps(subcommand, below, context)


def main(folder: Path) -> None:
    """Writes NAME.txt for each command."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        (folder / f"{name}.txt").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
