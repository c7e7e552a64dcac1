"""Kinds of command line options that click lacks, and what both commands share."""

from __future__ import annotations

import math
import re

import click
import torch
from click.core import ParameterSource


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
    """A number from 1 to `total`, or "all" of them."""

    name = "count"

    def __init__(self, total: int) -> None:
        self.total = total

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        text = str(value)
        if text == "all":
            return self.total
        if not re.fullmatch(r"\d+", text) or not 1 <= int(text) <= self.total:
            self.fail(f"{text!r} is neither a number from 1 to {self.total} nor 'all'.", param, ctx)
        return int(text)


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
