"""How far a long work has come: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import time
from types import TracebackType

import click
from tqdm import tqdm

EVERY = 60.0  # seconds between lines
SOON = 10.0  # until the first one


class Progress:
    """Shown on stderr, once the work has taken a second on a terminal, and SOON in a log.

    Args:
        total: units of work.
        unit: what they are.
        what: of which work.
        done: units done before.
        brief: whether a log says nothing of work that was done soon.
        quiet: whether to say nothing at all.
    """

    def __init__(
        self,
        total: int,
        unit: str,
        what: str = "",
        *,
        done: int = 0,
        brief: bool = True,
        quiet: bool = False,
    ) -> None:
        self._total, self._unit, self._what = total, unit, what
        self._brief, self._quiet = brief, quiet
        self.done, self._note, self._said = done, "", -1
        self._begun = time.monotonic()
        self._next = self._begun + SOON
        self._bar: tqdm[None] | None = None
        if not quiet and sys.stderr.isatty():
            delay = 1.0 if brief else 0.0
            self._bar = tqdm(total=total, initial=done, unit=unit, desc=what or None, delay=delay)

    def update(self, done: int = 1, note: str = "") -> None:
        """Counts units as done; `note` says what there is to say of them."""
        self.done += done
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(done)
        elif not self._quiet and time.monotonic() >= self._next:
            self._say()

    def _say(self) -> None:
        now = time.monotonic()
        self._next, self._said = now + EVERY, self.done
        count, taken = f"{self._unit} {self.done}/{self._total}", f"{now - self._begun:.0f} s"
        line = ", ".join(part for part in (count, self._note, taken) if part)
        click.echo(f"{self._what}: {line}" if self._what else line, err=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif not self._quiet and self._said != self.done:
            soon = time.monotonic() < self._begun + SOON
            if not (self._brief and soon):
                self._say()
