"""Writes the help texts of the commands: python -m stf_train.helptexts docs/help."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from stf_train import cli

COMMANDS = {"stf-train": cli.train, "stf-sample": cli.sample, "stf-eval": cli.evaluate}


def text(name: str) -> str:
    """What a command says with --help, in 100 columns."""
    command = COMMANDS[name]
    context = click.Context(command, info_name=name, terminal_width=100, max_content_width=100)
    context.show_default = True
    return command.get_help(context) + "\n"


def main(folder: Path) -> None:
    """Writes NAME.txt for each command."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        (folder / f"{name}.txt").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
