"""The help texts in docs/help are those of the commands, docs/training.md names what there is."""

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from stf_train import helptexts, presets
from stf_train.cli import train

FOLDER = Path(__file__).parents[2] / "docs" / "help"
TRAINING = FOLDER.with_name("training.md")


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
    said = re.sub(r"\s+", "", helptexts.text("stf-train"))  # names are broken at their hyphens
    assert all(name in said for name in presets.PRESETS)


def test_shows_the_defaults_of_a_preset():
    said = CliRunner().invoke(train, ["--preset", "cifar10-vp", "--help"]).stdout
    for text in ("[default: vp]", "[default: ddpmpp-vp]", "[default: 1, 2, 2, 2]"):
        assert text in said
        assert text not in helptexts.text("stf-train")
    assert "the path must be given" in said


def test_training_has_every_preset_with_its_values():
    rows = {}
    section = TRAINING.read_text(encoding="utf-8").partition("## Presets")[2].partition("\n## ")[0]
    for line in section.splitlines():
        if match := re.match(r"\| `([a-z0-9-]+)` \| ", line):
            rows[match[1]] = [cell.strip() for cell in line.strip("|").split("|")][1:]
    assert rows.keys() == presets.PRESETS.keys()
    for name, (process, output, arch, cbase, length, lr, ema, sampler) in rows.items():
        options, sampling = presets.PRESETS[name], presets.PRESETS[name]["sampling"]
        assert process.split(",")[0] == options["process"]
        assert output == (options["output"] or "the process's")
        assert (arch, int(cbase)) == (options["arch"], options["cbase"])
        said = [float(number) for cell in (length, lr, ema) for number in cell.split(",")]
        names = ("batch", "duration", "lr", "rampup", "ema")
        assert said == pytest.approx([options[option] for option in names], rel=1e-3)
        expected = (
            f"rk45, {sampling.tolerance:.0e}".replace("e-0", "e-")
            if sampling.sampler == "rk45"
            else f"{sampling.sampler}, {sampling.steps} steps"
        )
        assert sampler == expected
        numbers = [float(number) for number in re.findall(r"[\d.]*\d", process)]
        asked = {
            "ve": ("noise_min", "noise_max"),
            "vp": ("beta_min", "beta_max"),
            "pfgmpp": ("D",),
            "ddpm": ("points",),
        }
        assert numbers == [options[option] for option in asked.get(options["process"], ())]


# Of torchrun and accelerate's launcher.
OTHERS = {"--nproc_per_node", "--num_processes", "--cpu", "--mixed_precision", "--dynamo_backend"}


def test_training_names_options_that_there_are():
    texts = "\n".join(map(helptexts.text, helptexts.COMMANDS))
    for option in re.findall(r"--[A-Za-z][\w-]*", TRAINING.read_text(encoding="utf-8")):
        if option not in OTHERS:
            assert re.search(rf"{option}[ ,]", texts), option
