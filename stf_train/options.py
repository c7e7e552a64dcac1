"""Kinds of command line options that click lacks, and what both commands share."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import TypeVar

import click
import torch
from click.core import ParameterSource

F = TypeVar("F", bound=Callable[..., object])


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
    """Seeds like 0-63 or 1,2,5-10."""

    name = "seeds"

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


def resolve(device: str) -> str:
    """The device that is meant by --device."""
    cuda = torch.cuda.is_available()
    if device == "cuda" and not cuda:
        raise bad("--device", "torch finds no CUDA device.")
    if device == "auto":
        return "cuda" if cuda else "cpu"
    return device
