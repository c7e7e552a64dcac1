"""Where the golden targets have been computed: `python -m bench.fingerprints [--record]`.

Runs `stf_kernels.golden`, every way there is on this machine, and says of each way whether its bits
are the recorded ones; the exit status is 1 where one differs. `--record` adds a row with the
outcomes to docs/fingerprints.jsonl and writes docs/fingerprints.md again from all rows; `--render`
does only the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from dataclasses import asdict, fields
from typing import Any

import torch

from bench.provenance import ROOT, provenance
from stf_kernels import cpu_backend, golden

ROWS = ROOT / "docs" / "fingerprints.jsonl"
TABLE = ROOT / "docs" / "fingerprints.md"
# Variables that decide how targets are computed, kept with a row.
ENVIRONMENT = ("TRITON_INTERPRET", "ONEDNN_MAX_CPU_ISA")

HEADER = """\
# Where the bits have been compared

One sha256 over the targets of the golden inputs (`stf_kernels/golden_inputs.py`: {cases} calls with
bytes and floats, both precisions, labels, weights, Student-t noise and statistics), computed in
every way that a machine has. This file is written by `python -m bench.fingerprints --record`, which
adds the machine it runs on as a row of [fingerprints.jsonl](fingerprints.jsonl), or `--render` from
the rows alone; `python -m stf_kernels.golden` is the same comparison without a row.

The recorded hash is `{recorded}`.

{gpu}
"""


def row(outcomes: list[golden.Outcome], command: str, commit: str | None) -> dict[str, Any]:
    """One run as a line of ROWS."""
    gpu = any(outcome.way.device != "cpu" for outcome in outcomes)
    origin = provenance(torch.device("cuda" if gpu else "cpu"), command, commit)
    origin["products"] = "int8" if cpu_backend.has_int8_products() else "int16"
    origin["environment"] = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return {
        "provenance": origin,
        "recorded": golden.fingerprint(golden.RECORDED),
        "outcomes": [
            {
                **asdict(outcome.way),
                "sha256": None if outcome.failure else golden.fingerprint(outcome.digests),
                "is": outcome.verdict,
            }
            for outcome in outcomes
        ],
        "not_run": golden.absent(),
    }


def document(rows: list[dict[str, Any]]) -> str:
    """docs/fingerprints.md: what ran, and every way with a column for each run."""
    on_gpu = [k for k, row in enumerate(rows, 1) if row["provenance"]["gpu"]]
    gpu = (
        f"On a GPU: run {', '.join(map(str, on_gpu))}."
        if on_gpu
        else "**No GPU has run it.** What is said of kernels below ran in Triton's interpreter."
    )
    recorded = golden.fingerprint(golden.RECORDED)
    lines = [HEADER.format(cases=len(golden.CASES), recorded=recorded, gpu=gpu)]
    lines += markdown([["run", *RUN], *([str(k), *_run(row)] for k, row in enumerate(rows, 1))])
    lines += ["", PRODUCTS, ""]
    names = [field.name for field in fields(golden.Way)]
    ways: dict[tuple[Any, ...], dict[int, str]] = {}
    for k, one in enumerate(rows):
        for outcome in one["outcomes"]:
            way = tuple(outcome[name] for name in names)
            ways.setdefault(way, {})[k] = _verdict(outcome, recorded)
    head = [*names, *(f"run {k}" for k in range(1, len(rows) + 1))]
    body = [
        [*(str(value or "-") for value in way), *(found.get(k, "") for k in range(len(rows)))]
        for way, found in ways.items()
    ]
    return "\n".join([*lines, *markdown([head, *body]), "", WAYS])


RUN = ("date", "processor or GPU", "system, Python", "torch, Triton", "products", "commit", "ways")
PRODUCTS = """\
*products*: how the backend `cpu` multiplies, in int8 by oneDNN where the processor has VNNI or AMX
instructions, in int16, two digits at a time, elsewhere. A star behind a commit: the tree differed
from it. A run whose hashes were recorded for another list of cases says so in place of `equal`."""
WAYS = """\
*code* is the instruction set of the backend's own C++; an x86-64 build has baseline, avx2 and
avx512, and there are lines for those that a processor had. *least* is the smallest workspace a call
takes, one sample with 128 references at a time; *processes* share the references by
torch.distributed (Gloo), each with samples of its own. An empty field was not run there. On the CPU
`triton` is Triton's interpreter.
"""


def markdown(table: list[list[str]]) -> list[str]:
    """Lines of a Markdown table, the first row its head."""
    head, *body = (f"| {' | '.join(cells)} |" for cells in table)
    return [head, "|---" * len(table[0]) + "|", *body]


def _run(row: dict[str, Any]) -> list[str]:
    about = row["provenance"]
    gpu = about["gpu"]
    machine = about["cpu"]
    if gpu:
        machine = f"{gpu['name']}, driver {gpu.get('driver')}, CUDA {gpu['cuda']}; {machine}"
    else:
        machine += f", {about['cores']} cores, {', '.join(about['flags'])}"
    return [
        about["date"][:10],
        machine,
        f"{about['os']}, Python {about['python']}",
        f"{about['torch']}, {about['triton'] or '-'}",
        about["products"],
        (about["commit"] or "?")[:10] + ("*" if about["dirty"] else ""),
        str(len(row["outcomes"])),
    ]


def _verdict(outcome: dict[str, Any], recorded: str) -> str:
    """What a row says of a way, and only if its hash is what it says it is."""
    same = outcome["sha256"] == recorded
    if outcome["is"] == "equal":
        return "equal" if same else "equal to other hashes"
    return str(outcome["is"])


def main() -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.fingerprints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--record", action="store_true", help="add a row and write the table again")
    parser.add_argument("--render", action="store_true", help="write the table again, run nothing")
    parser.add_argument("--commit", help="for a copy without git history: what it is a copy of")
    options = parser.parse_args()
    outcomes: list[golden.Outcome] = []
    if not options.render:
        outcomes = list(golden.check(golden.ways()))
        print("\n".join(golden.report(outcomes)))
    if options.record:
        settings = [f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ]
        command = shlex.join([*settings, "python", "-m", "bench.fingerprints", *sys.argv[1:]])
        line = json.dumps(row(outcomes, command, options.commit))  # before the tree differs by it
        with ROWS.open("a") as file:
            file.write(f"{line}\n")
    if options.record or options.render:
        TABLE.write_text(document(list(map(json.loads, ROWS.read_text().splitlines()))))
    return golden.status(outcomes)


if __name__ == "__main__":
    sys.exit(main())
