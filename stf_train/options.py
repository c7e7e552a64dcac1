"""Kinds of command line options that click lacks, and what both commands share."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import click
import torch
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., object])

SETTINGS = {"show_default": True, "max_content_width": 100}
SEED_MAX = 2**32 - 1


class Finite(click.FloatRange):
    """A float that is neither inf nor nan."""

    name = "float"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(super().convert(value, param, ctx))  # type: ignore[arg-type]
        if not math.isfinite(number):
            self.fail(f"{value} is not finite.", param, ctx)
        return number


POSITIVE = Finite(min=0, min_open=True)
FROM_ZERO = Finite(min=0)
COUNT = click.IntRange(min=1)


class CountOrAll(click.ParamType):
    """A number from 1, or "all"."""

    name = "count"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | str:
        text = str(value)
        if text == "all":
            return text
        if not re.fullmatch(r"\d+", text) or int(text) < 1:
            self.fail(f"{text!r} is neither a number from 1 nor 'all'.", param, ctx)
        return int(text)


class Integers(click.ParamType):
    """Numbers from 1 like 1,2,2."""

    name = "integers"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", str(value)):
            self.fail(f"{value!r} is not a list of numbers like 1,2,2.", param, ctx)
        return tuple(map(int, str(value).split(",")))


class Seeds(click.ParamType):
    """Seeds like 0-63 or 1,2,5-10, a million at most."""

    name = "seeds"
    most = 1_000_000

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int]:
        seeds: list[int] = []
        for part in str(value).split(","):
            match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
            if not match:
                self.fail(f"{part!r} is neither a seed nor a range like 0-63.", param, ctx)
            first, last = int(match[1]), int(match[2] or match[1])
            if last < first:
                self.fail(f"{part!r} is empty: {last} is below {first}.", param, ctx)
            if last > SEED_MAX:
                self.fail(f"{last} is above {SEED_MAX}.", param, ctx)
            if len(seeds) + last - first >= self.most:
                self.fail(f"{value!r} are more than {self.most} seeds.", param, ctx)
            seeds.extend(range(first, last + 1))
        return seeds


DEVICE = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to compute; auto takes CUDA where there is one.",
)


class Command(click.Command):
    """A command whose function takes the context, where the options are, and nothing else."""

    def invoke(self, ctx: click.Context) -> object:
        assert self.callback is not None
        return ctx.invoke(self.callback, ctx)


class Setting(click.Option):
    """An option for which `nothing` says what it means to have no value."""

    nothing: str | None = None

    def get_help_extra(self, ctx: click.Context) -> click.types.OptionHelpExtra:
        extra = super().get_help_extra(ctx)
        if self.nothing is not None and self.get_default(ctx) is None:
            extra["default"] = self.nothing
        if isinstance(self.type, Finite) and self.type.min is None and self.type.max is None:
            extra.pop("range", None)  # click would write x<=None
        return extra


def attach(option: click.Option) -> Callable[[F], F]:
    """The decorator that gives a command an option."""

    def decorate(function: F) -> F:
        # As click.option does: the last decorator comes first.
        known = [*getattr(function, "__click_params__", []), option]
        function.__click_params__ = known  # type: ignore[attr-defined]
        return function

    return decorate


def given(context: click.Context, name: str) -> bool:
    """Whether an option stood on the command line."""
    return context.get_parameter_source(name) is ParameterSource.COMMANDLINE


def bad(option: str, message: str) -> click.BadParameter:
    """The error for an option that is fine by itself."""
    return click.BadParameter(message, param_hint=option)


@contextmanager
def blaming(otherwise: str, **options: str) -> Iterator[None]:
    """Turns what is wrong with an argument into what is wrong with the option it comes from.

    Args:
        otherwise: the option of errors that do not begin with one of the names.
        options: option by argument, the name with which an error's message begins.
    """
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError, MemoryError) as error:
        message = str(error)
        start = re.match(r"(\w*)(: )?", message)
        assert start is not None  # the empty match at least
        if start[1] in options and start[2]:
            message = message[start.end() :]  # "--size: size: ..." would say it twice
        raise bad(options.get(start[1], otherwise), message) from error


OVERWRITE = click.option("--overwrite", is_flag=True, help="Replaces files that are there.")


def writable(option: str, path: Path, overwrite: bool) -> Path:
    """The path of a file that can be written, and is not there unless it may be replaced."""
    if not path.parent.is_dir():
        raise bad(option, f"there is no folder {path.parent}.")
    if path.is_dir():
        raise bad(option, f"{path} is a folder.")
    if path.exists() and not overwrite:
        raise bad(option, f"{path} is there; --overwrite replaces it.")
    return path


def free(path: Path) -> Path:
    """The path, or with -1, -2, ... behind its name the first where there is nothing yet."""
    others = (path.with_stem(f"{path.stem}-{i}") for i in itertools.count(1))
    return next(p for p in itertools.chain([path], others) if not p.exists())


def resolve(device: str) -> str:
    """The device that is meant by --device."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise bad("--device", "torch finds no CUDA device.")
    if device == "auto":
        return "cuda" if cuda else "cpu"
    return device
