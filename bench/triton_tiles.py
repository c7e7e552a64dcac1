"""`python -m bench.triton_tiles`: writes stf_kernels/triton_backend/table.py, tiles by size.

On a GPU the table's part for its architecture is measured. Everything else is reasoned: the largest
tile that still gives three quarters of the processors one. Candidates must hold the int8 matrix
instruction and no spill inside the main loop, by offline compilation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch

from bench.clock import milliseconds
from stf_kernels import triton_backend
from stf_kernels.stages import Prepared, Samples, Weights
from stf_kernels.triton_backend import table
from stf_kernels.triton_backend.offline import ARCHITECTURES, compile_kernel
from stf_kernels.triton_backend.products import logits, multiply_dense
from stf_kernels.triton_backend.table import ANY, Entry, Tile

PROCESSORS = {80: 108, 90: 132, 100: 148}  # of A100, H100 and H200, B200
ROWS = {16: 16, 32: 32, 64: 64, 128: 128, ANY: 512}  # up to so many samples: measured at
WIDTHS = {1024: 1024, 4096: 4096, 16_384: 16_384, ANY: 50_000}  # the same for references
MEASURED_DIM = 3072
NARROW = Entry(ANY, 16, Tile(16, 16, 128, 4, 3))  # stage 4 of the norms' digits: one value each
INTERPRETED = {
    "LOGITS": (Entry(ANY, ANY, Tile(16, 128, 128, 4, 1)),),
    "DENSE": (Entry(ANY, 16, Tile(16, 16, 128, 4, 1)), Entry(ANY, ANY, Tile(16, 64, 128, 4, 1))),
}


def candidates(architecture: int) -> list[Tile]:
    """Tiles that compile well for both products, largest first."""
    shapes = product((64, 32, 16), (128, 64), ((8, 4), (4, 4)))
    tiles = [Tile(BM, 128, BK, *launch) for BM, BK, launch in shapes]
    return [tile for tile in tiles if compiles_well(tile, architecture)]


def compiles_well(tile: Tile, architecture: int) -> bool:
    """No spill in the main loop with the most limbs, and little enough shared memory."""
    limit = {80: 99, 90: 227, 100: 227}[architecture] << 10  # 99 KB: sm_86, sm_89, sm_120
    for kernel, constants in (
        (logits, logits_constants(tile, 4, 4, False)),
        (multiply_dense, dense_constants(tile, 4)),
    ):
        code = compile_kernel(kernel, constants, architecture, warps=tile.warps, stages=tile.stages)
        if not code.products or code.spills_in_loop or code.shared > limit:
            return False
    return True


def logits_constants(tile: Tile, L: int, R: int, ragged: bool) -> dict[str, object]:
    """Constants of stage 2 for Gaussian noise, without log_weight and labels."""
    absent = dict.fromkeys(("p_offset", "p_exponent", "p_bias", "p_labels", "p_ref_labels"))
    return {**absent, "L": L, "R": R, "SPANS": 1, "RAGGED": ragged, "BM": tile.BM, "BK": tile.BK}


def dense_constants(tile: Tile, L: int) -> dict[str, object]:
    """Constants of stage 4's product."""
    sizes = {"BM": tile.BM, "BN": tile.BN, "BK": tile.BK}
    return {"L": L, "R": 1, "SLOTS": 132, "PART": triton_backend.PART_TERMS, **sizes}


def reasoned(tiles: list[Tile], rows: int, width: int, processors: int) -> Tile:
    """The largest tile, half full or fuller, that keeps three quarters of the GPU busy."""
    fitting = [tile for tile in tiles if tile.BM == 16 or 2 * rows > tile.BM]
    for tile in fitting:
        if -(-rows // tile.BM) * -(-width // tile.BN) >= 0.75 * processors:
            return tile
    return next(tile for tile in fitting if tile.BM == fitting[-1].BM)


def measured(
    stage: dict[int, tuple[Entry, ...]],
    architecture: int,
    tiles: list[Tile],
    call: Callable[[], object],
) -> Tile:
    """The tile with which `call` is fastest."""
    before, times = stage[architecture], {}
    try:
        for tile in tiles:
            stage[architecture] = (Entry(ANY, ANY, tile),)
            times[tile] = milliseconds(call, torch.device("cuda"))[0]
            print(f"{tile}: {times[tile]:.4f} ms", flush=True)
    finally:
        stage[architecture] = before
    return min(times, key=lambda tile: times[tile])


def logits_call(rows: int, n: int, dim: int) -> Callable[[], object]:
    """Stage 2 on random digits."""
    samples, refs = random_problem(rows, n, dim)
    return lambda: triton_backend.logits(samples, refs)


def dense_call(rows: int, n: int, dim: int) -> Callable[[], object]:
    """Stage 4 of rows that all have more survivors than are gathered."""
    _, refs = random_problem(rows, n, dim)
    peak = torch.zeros(rows, device="cuda", dtype=torch.float64)
    weights: Weights = triton_backend.weights(
        torch.zeros(rows, n, device="cuda"),
        peak[:, None].repeat(1, -(-n // 128)),
        peak,
        "exact",
        False,
    )
    columns = triton_backend.transpose(refs.values)
    return lambda: triton_backend.weighted_sum(weights, refs.values, columns)


def random_problem(rows: int, n: int, dim: int) -> tuple[Samples, Prepared]:
    """Samples and references of random digits on the GPU."""

    def digits(*shape: int) -> torch.Tensor:
        return torch.randint(-128, 128, shape, device="cuda").to(torch.int8)

    def ones(size: int) -> torch.Tensor:
        return torch.ones(size, device="cuda", dtype=torch.float64)

    width = -(-dim // 128) * 128
    samples = Samples(
        torch.zeros(rows, dim, device="cuda"),
        digits(rows, 4, width),
        slope=ones(rows),
        curvature=ones(rows),
        c_D=ones(rows),
        c_x=ones(rows),
        labels=None,
    )
    return samples, Prepared(digits(1, n, dim), ones(n), ones(2), None, None)


def logits_entries(architecture: int, tiles: list[Tile], here: bool) -> list[Entry]:
    entries = []
    for (rows, B), (width, n) in product(ROWS.items(), WIDTHS.items()):
        tile = (
            measured(table.LOGITS, architecture, tiles, logits_call(B, n, MEASURED_DIM))
            if here
            else reasoned(tiles, B, n, PROCESSORS[architecture])
        )
        entries.append(Entry(rows, width, tile))
    return entries


def dense_entries(architecture: int, tiles: list[Tile], here: bool) -> list[Entry]:
    """Parts of n occupy the processors, so that only the rows' number matters to the reasoning."""
    entries = [NARROW]
    for rows, B in ROWS.items():
        tile = (
            measured(table.DENSE, architecture, tiles, dense_call(B, 4096, MEASURED_DIM))
            if here
            else reasoned(tiles, B, MEASURED_DIM, 0)
        )
        entries.append(Entry(rows, ANY, tile))
    return entries


def merged(entries: list[Entry]) -> list[Entry]:
    """Without the entries whose problems the next ones would give the same tile."""
    kept: list[Entry] = []
    for i, entry in enumerate(entries):
        after = [e for e in entries[i + 1 :] if entry.rows <= e.rows and entry.width <= e.width]
        if not after or after[0].tile != entry.tile:
            kept.append(entry)
    return kept


def spelled(entries: dict[int, tuple[Entry, ...]]) -> str:
    """The dict as Python source."""
    lines = []
    for architecture, row in entries.items():
        lines.append(f"    {architecture}: (")
        for entry in row:
            text = f"Entry({entry.rows}, {entry.width}, Tile{tuple(entry.tile)})"
            lines.append(f"        {text.replace(str(ANY), 'ANY')},")
        lines.append("    ),")
    return "{\n" + "\n".join(lines) + "\n}\n"


def main() -> None:
    here = None
    if torch.cuda.is_available():
        here = triton_backend.tiles.architecture(torch.device("cuda", torch.cuda.current_device()))
    path = Path(table.__file__)
    text = path.read_text()
    origins = dict(re.findall(r"^sm_(\d+): (.*)$", text, re.MULTILINE))
    logits_table, dense_table = {0: INTERPRETED["LOGITS"]}, {0: INTERPRETED["DENSE"]}
    for architecture in ARCHITECTURES:
        if here != architecture and "measured on" in origins.get(str(architecture), ""):
            logits_table[architecture] = table.LOGITS[architecture]
            dense_table[architecture] = table.DENSE[architecture]
            continue
        tiles = candidates(architecture)
        print(f"sm_{architecture}: {len(tiles)} candidates", flush=True)
        logits_found = logits_entries(architecture, tiles, here == architecture)
        dense_found = dense_entries(architecture, tiles, here == architecture)
        logits_table[architecture] = tuple(merged(logits_found))
        dense_table[architecture] = tuple(merged(dense_found))
        origins[str(architecture)] = (
            f"measured on {torch.cuda.get_device_name()}" if here == architecture else "reasoned"
        )
    head, definitions = text.split('"""', 2)[1:]
    head = re.sub(r"(^sm_\d+: .*\n)+", _origin_lines(origins), head, flags=re.MULTILINE)
    definitions = definitions[: definitions.index("LOGITS = {")]
    path.write_text(
        f'"""{head}"""{definitions}LOGITS = {spelled(logits_table)}DENSE = {spelled(dense_table)}'
    )
    print(f"written: {path}; now `ruff format` it")


def _origin_lines(origins: dict[str, str]) -> str:
    return "".join(
        f"sm_{architecture}: {origins[str(architecture)]}\n" for architecture in ARCHITECTURES
    )


if __name__ == "__main__":
    main()
