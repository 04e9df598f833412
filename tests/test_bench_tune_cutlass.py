"""bench/tune_cutlass.py: tiles are timed one by one, shares land in the table."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import host
import ml_dtypes
import numpy as np
import pytest
from absence import needs_headers

from lowbit.kernels.cuda import costs, launch
from lowbit.kernels.cutlass import tiles

sys.path[:0] = [str(Path(__file__).parents[1] / "bench")]
tune_cutlass = importlib.import_module("tune_cutlass")

H100 = launch.Device(90, 132)


class Clock:
    """Every batch takes as long, so that a tile's share is that of its product's size.

    Swizzles of 4 take half of it.
    """

    def __init__(self) -> None:
        self.calls = 0

    def synchronize(self) -> None:
        pass

    def batch(self, call: Any, count: int) -> float:
        call(0)
        order = self.calls // tune_cutlass.ROUNDS % len(tune_cutlass.SWIZZLES)
        self.calls += 1
        return 1e-5 if tune_cutlass.SWIZZLES[order] == 4 else 2e-5


class NumPy:
    """What the tuning asks CuPy for; memory stays untouched."""

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)

    def ones(self, shape: Any, dtype: Any) -> Any:
        return np.ones(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)

    def empty(self, shape: Any, dtype: Any = np.float32) -> Any:
        return np.zeros(shape, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


@needs_headers
@pytest.mark.parametrize("family", tune_cutlass.WAYS)
def test_every_tile_is_timed(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_cutlass, "COLUMNS", 128)
    machine, clock = host.Watching(H100), Clock()
    path = tmp_path / "tiles.json"
    with launch.pretending(machine):
        tune_cutlass.tune(NumPy(), clock, [family], path)
    found, before = (json.loads(p.read_text()) for p in (path, tiles.PATH))
    listed = tiles.listed(family)
    assert len({source for source, *_ in machine.launched}) == len(listed)
    orders = {(source, argument[-200:]) for source, _, argument in machine.launched}
    assert len(orders) == len(tune_cutlass.SWIZZLES) * len(listed)
    assert clock.calls == tune_cutlass.ROUNDS * len(tune_cutlass.SWIZZLES) * len(listed)
    peak = tune_cutlass.WAYS[family].family.faster * costs.rates(90).dense
    for row, tile in zip(found[family], listed, strict=True):
        m, n = tune_cutlass.shape(tile, H100)
        assert row.pop("share") == round(2 * m * n * 128 / 1e-5 / peak, 3)
        assert row.pop("swizzle") == 4
    for row in before[family]:
        row.pop("share")
    assert found == before


def test_every_family_can_be_tuned() -> None:
    assert set(tune_cutlass.WAYS) == set(json.loads(tiles.PATH.read_text()))


def test_the_table_is_written_as_it_stands() -> None:
    text = tiles.PATH.read_text(encoding="utf-8")
    assert tune_cutlass.written(json.loads(text)) == text


@pytest.mark.parametrize("tile", tiles.listed("int8"), ids=str)
def test_tiles_fill_whole_waves(tile: tiles.Tile) -> None:
    m, n = tune_cutlass.shape(tile, H100)
    first, second = (n, m) if tile.turned else (m, n)
    rows, columns, _ = tile.shape
    blocks = (first // rows) * (second // columns)
    assert first % rows == second % columns == 0
    assert 3.8 * H100.processors <= blocks <= 4 * H100.processors


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_cutlass.gpu_device, "absence", lambda: "none here")
    with pytest.raises(SystemExit, match="none here"):
        tune_cutlass.main([])
