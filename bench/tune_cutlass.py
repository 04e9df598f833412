"""What each tile of the kernels on CUTLASS reaches on this GPU, written into their table.

    python -P bench/tune_cutlass.py [--family NAME] [--json FILE]

Every tile computes a product that fills the GPU with whole waves of it, in every order of its
tiles. The best order and its share of the tensor cores' peak go into kernels/cutlass/tiles.json,
which the choice of tiles is made from; commit the file, and run `make cubins` where the list of
tiles itself has changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

from harness import gpu_device
from harness.gpu_clock import Clock

import lowbit as lb
from lowbit.kernels import Epilogue, Problem
from lowbit.kernels.cuda import costs, launch
from lowbit.kernels.cutlass import blockwise, tiles, upcast, w8a8
from lowbit.kernels.cutlass.families import Family
from lowbit.kernels.cutlass.tiles import Tile


class Way(NamedTuple):
    """What a family is measured with."""

    x: str
    """Format or dtype."""
    w: str
    family: Family[Tile, Any]


OPERANDS = {
    "int8": ("int8_row", "int8_row"),
    "float8": ("fp8_row", "fp8_row"),
    "float8_fast": ("fp8_row", "fp8_row"),
    "float8_blocks": ("fp8_g128", "fp8_128x128"),
    "upcast16": ("bfloat16", "int4_g128"),
    "upcast_int8": ("int8_row", "int4_row"),
    "upcast_float8": ("fp8_row", "int4_g128_e4m3"),
    "upcast_float8_scaled": ("fp8_row", "int4_g128_e4m3"),
}
WAYS = {
    name: Way(*OPERANDS[name], family)
    for module in (w8a8, blockwise, upcast)
    for name, family in module.FAMILIES.items()
}
DTYPES = ("bfloat16", "float16")
WAVES, COLUMNS, CALLS, ROUNDS = 4, 8192, 20, 5
SWIZZLES = (1, 2, 4, 8)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    found = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    found.add_argument("--family", choices=WAYS, action="append")
    found.add_argument("--json", type=Path, default=tiles.PATH)
    options = found.parse_args(arguments)
    why = gpu_device.absence()
    if why is not None:
        raise SystemExit(f"bench/tune_cutlass.py measures a GPU, and there is none: {why}")
    import cupy

    tune(cupy, Clock(cupy), options.family or list(WAYS), options.json)


def tune(cupy: Any, clock: Any, families: list[str], path: Path) -> None:
    """Measure the tiles of some families and write their shares."""
    device = launch.machine_of(cupy.empty(1)).device
    table = json.loads(tiles.PATH.read_text(encoding="utf-8"))
    for family in families:
        for tile, row in zip(tiles.listed(family), table[family], strict=True):
            ways = [replace(tile, swizzle=wide) for wide in SWIZZLES]
            shares = {way: share(cupy, clock, family, way, device) for way in ways}
            best = max(ways, key=lambda way: shares[way])
            row |= {"share": round(shares[best], 3), "swizzle": best.swizzle}
            print(f"{family}: {best}: {row['share']:.1%} of the peak")
    path.write_text(written(table), encoding="utf-8")


def share(cupy: Any, clock: Any, family: str, tile: Tile, device: launch.Device) -> float:
    """Operations a second, of those that the tensor cores can do."""
    m, n = shape(tile, device)
    way = WAYS[family]
    x_format = way.x if way.x in DTYPES else lb.format(way.x)
    p = Problem(m, n, COLUMNS, x_format, lb.format(way.w), "bfloat16", device=device.name)
    x: Any = cupy.ones((m, COLUMNS), way.x if way.x in DTYPES else "float16")
    if way.x not in DTYPES:
        x = lb.quantize(x, way.x)._parts
    w = lb.quantize(cupy.ones((n, COLUMNS), "float16"), way.w)._parts
    out = cupy.empty((m, n), "bfloat16")
    run = way.family.bind(p, way.family.spec(p, tile))(w)
    run(x, Epilogue(), out)
    clock.synchronize()
    best = min(clock.batch(lambda i: run(x, Epilogue(), out), CALLS) for _ in range(ROUNDS))
    peak = costs.rates(device.capability).dense * way.family.faster
    return float(p.operations / best / peak)


def shape(tile: Tile, device: launch.Device) -> tuple[int, int]:
    """Rows of x and of w whose tiles fill the GPU a few times."""
    first, second, _ = tile.shape
    (a, b), total = tile.cluster, WAVES * device.processors
    across = 12 // b * b
    m, n = first * (total // across // a * a), second * across
    return (n, m) if tile.turned else (m, n)


def written(table: dict[str, list[dict[str, Any]]]) -> str:
    """The table as it stands in the repository: a line for each tile."""
    lists = (
        f'"{family}": [\n ' + ",\n ".join(json.dumps(row) for row in rows) + "\n]"
        for family, rows in table.items()
    )
    return "{\n" + ",\n".join(lists) + "\n}\n"


if __name__ == "__main__":
    main()
