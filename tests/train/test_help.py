"""The help texts in docs/help are those of the commands."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from stf_train import helptexts, presets
from stf_train.cli import train

FOLDER = Path(__file__).parents[2] / "docs" / "help"


@pytest.mark.parametrize("name", helptexts.COMMANDS)
def test_is_current(name):
    kept = (FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert kept == helptexts.text(name), "python -m stf_train.helptexts docs/help"


def test_there_are_no_others():
    assert {path.stem for path in FOLDER.iterdir()} == helptexts.COMMANDS.keys()


def test_there_is_one_for_every_script():
    text = (FOLDER.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    scripts = text.partition("[project.scripts]\n")[2].partition("\n\n")[0]
    assert {line.split(" = ")[0] for line in scripts.splitlines()} == helptexts.COMMANDS.keys()


def test_subcommands_are_in_it():
    said = helptexts.text("stf-variance")
    assert said.count("Usage: stf-variance [OPTIONS]") == 1
    for name in ("draw", "figure-2", "figure-3", "study"):
        assert said.count(f"Usage: stf-variance {name} [OPTIONS]") == 1
    assert "  --references N" in said.partition("Usage: stf-variance study")[2]


def test_names_every_preset():
    assert all(name in helptexts.text("stf-train").replace("\n", " ") for name in presets.PRESETS)


def test_shows_the_defaults_of_a_preset():
    said = CliRunner().invoke(train, ["--preset", "cifar10-vp", "--help"]).stdout
    for text in ("[default: vp]", "[default: ddpmpp-vp]", "[default: 1, 2, 2, 2]"):
        assert text in said
        assert text not in helptexts.text("stf-train")
    assert "the path must be given" in said
