"""Every option of every command refuses bad values by its name, and nothing is written."""

import click
import pytest
from click.testing import CliRunner

from stf_train import helptexts
from stf_train.options import CountOrAll, Integers, Seeds, bad, blaming, free, writable


def commands(command, words):
    if isinstance(command, click.Group):
        for name, below in command.commands.items():
            yield from commands(below, [*words, name])
    else:
        yield words, command


def wrong(kind):
    """Values that no option of a kind takes."""
    if isinstance(kind, click.Choice):
        return ["nonsense"]
    if isinstance(kind, click.types.BoolParamType):
        return ["maybe"]
    if isinstance(kind, Seeds):
        return ["x", "3-1", "4294967296", "0-99999999", ""]
    if isinstance(kind, CountOrAll):
        return ["0", "-1", "some"]
    if isinstance(kind, Integers):
        return ["0", "1,,2", "x", "-1"]
    if isinstance(kind, click.Path):
        return ["nowhere"] if kind.exists else ["."] if not kind.dir_okay else []
    if isinstance(kind, click.IntRange):
        least = [str(kind.min - 1)] if kind.min is not None else []
        most = [str(kind.max + 1)] if kind.max is not None else []
        return ["x", "1.5", *least, *most]
    if isinstance(kind, click.FloatRange):
        least = ["-1e9"] if kind.min is not None else []
        most = ["1e9"] if kind.max is not None else []
        return ["x", "nan", *least, *most]
    return []


CASES = [
    pytest.param(words, option, value, id=f"{' '.join(words)} {option.name} {value}")
    for name, top in helptexts.COMMANDS.items()
    for words, command in commands(top, [name])
    for option in command.params
    if isinstance(option, click.Option) and not option.is_flag
    if option.name != "S_max"  # takes inf; see test_cli
    for value in wrong(option.type)
]


def test_there_are_cases_for_nearly_every_option():
    asked = {(tuple(words), option.name) for words, option, _ in (case.values for case in CASES)}
    every = {
        (tuple(words), option.name)
        for name, top in helptexts.COMMANDS.items()
        for words, command in commands(top, [name])
        for option in command.params
        if isinstance(option, click.Option) and not option.is_flag and not option.hidden
    }
    free_of_kind = {"data", "outdir", "weights", "S_max"}
    assert {name for _, name in every - asked} == free_of_kind


@pytest.mark.parametrize(("words", "option", "value"), CASES)
def test_bad_values_are_refused_by_name(tmp_path, monkeypatch, words, option, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    top, *below = words
    needs = ["run"] if top in ("stf-sample", "stf-eval") else []
    line = [*below, *needs, option.opts[-1], *[value] * option.nargs]
    result = CliRunner().invoke(helptexts.COMMANDS[top], line)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert any(name in result.stderr for name in option.opts), result.stderr
    assert [path.name for path in tmp_path.rglob("*")] == ["run"]


def test_blame_goes_to_the_option_of_the_argument():
    with pytest.raises(click.BadParameter) as caught, blaming("--data", channels="--cbase"):
        raise ValueError("channels must be 8, got 7")
    assert (caught.value.param_hint, caught.value.message) == (
        "--cbase",
        "channels must be 8, got 7",
    )
    with pytest.raises(click.BadParameter) as caught, blaming("--data", channels="--cbase"):
        raise FileNotFoundError("/there is none")
    assert caught.value.param_hint == "--data"
    with pytest.raises(click.BadParameter, match="mine"), blaming("--data"):
        raise bad("--seed", "mine")
    with pytest.raises(ZeroDivisionError), blaming("--data"):
        raise ZeroDivisionError  # a bug, no mistake of the user


def test_files_are_not_replaced_unasked(tmp_path):
    path = tmp_path / "a.png"
    assert free(path) == path
    assert writable("--output", path, overwrite=False) == path
    path.touch()
    (tmp_path / "a-1.png").touch()
    assert free(path) == tmp_path / "a-2.png"
    with pytest.raises(click.BadParameter, match=r"a\.png is there; --overwrite replaces it"):
        writable("--output", path, overwrite=False)
    assert writable("--output", path, overwrite=True) == path
    with pytest.raises(click.BadParameter, match="there is no folder"):
        writable("--output", tmp_path / "b" / "a.png", overwrite=True)
    with pytest.raises(click.BadParameter, match="is a folder"):
        writable("--output", tmp_path, overwrite=True)
