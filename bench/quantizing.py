"""How fast arrays are quantized and dequantized, beside copying as many bytes.

    python -P bench/quantizing.py [--json FILE] [--size N] [--rounds N]

A float32 matrix becomes codes, and codes become float32 and bfloat16. Bytes are those read and
those written. They are compared with `numpy.copyto` of as many bytes, half of them read and half
written, on as many threads, in turns; three sets of arrays are taken one after the other. "into"
writes dequantized values into memory that is there, as copyto does; the others are whole calls,
which get their memory from the system. Every result is first compared, bit for bit, with the
reference's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # python -P leaves it out

import machine
import ml_dtypes
import numpy as np

import lowbit as lb
from lowbit.formats import reference
from lowbit.kernels.cpu import dequantize

FORMATS = ("int4_g128", "int8_row", "fp8_row", "nf4_g64", "mxfp4", "int3_g128", "nvfp4")
SETS = 3


@dataclass
class Row:
    """One kind of work."""

    name: str
    bytes_moved: int
    milliseconds: float
    best: float
    gigabytes_per_second: float
    copy_gigabytes_per_second: float
    share: float
    """Of copying: ratio of medians."""


class Copier:
    """`numpy.copyto` cut into one part a thread."""

    def __init__(self, size: int, threads: int) -> None:
        self.source = np.ones(size, np.uint8)
        self.target = np.zeros(size, np.uint8)
        cuts = [size * i // threads for i in range(threads + 1)]
        self.parts = [slice(a, b) for a, b in pairwise(cuts)]
        self.begin, self.end = (threading.Barrier(threads) for _ in range(2))

    def run(self) -> float:
        """Seconds of one copy."""
        others = [threading.Thread(target=self._part, args=(part,)) for part in self.parts[1:]]
        for each in others:
            each.start()
        self.begin.wait()
        start = time.perf_counter()
        np.copyto(self.target[self.parts[0]], self.source[self.parts[0]])
        self.end.wait()
        seconds = time.perf_counter() - start
        for each in others:
            each.join()
        return seconds

    def _part(self, part: slice) -> None:
        self.begin.wait()
        np.copyto(self.target[part], self.source[part])
        self.end.wait()


def measure(name: str, calls: list[Callable[[], Any]], size: int, rounds: int) -> Row:
    """Take turns with copying `size` bytes in all."""
    copiers = [Copier(size // 2, lb.get_num_threads()) for _ in range(SETS)]
    ours, copies = [], []
    for i in range(-SETS, rounds):
        start = time.perf_counter()
        held = calls[i % SETS]()
        seconds = time.perf_counter() - start
        del held
        copied = copiers[i % SETS].run()
        if i >= 0:
            ours.append(seconds)
            copies.append(copied)
    own, other = statistics.median(ours), statistics.median(copies)
    return Row(
        name, size, own * 1e3, min(ours) * 1e3, size / own / 1e9, size / other / 1e9, other / own
    )


def rows(size: int, rounds: int) -> list[Row]:
    """All of it."""
    rng = np.random.default_rng(0)
    found = []
    xs = [rng.standard_normal((size, size), np.float32) for _ in range(SETS)]
    for name in FORMATS:
        fmt = lb.format(name)
        ws = [lb.quantize(x, fmt) for x in xs]
        expected = reference.quantize(fmt, xs[0][: size // 8])
        got = lb.quantize(xs[0][: size // 8], fmt)._rows()
        if got.codes.tobytes() != expected.codes.tobytes():
            raise AssertionError(f"quantize {name}: not the reference's codes")
        moved = xs[0].nbytes + ws[0].nbytes
        calls = [lambda x=x, fmt=fmt: lb.quantize(x, fmt) for x in xs]
        found.append(measure(f"quantize {name}", calls, moved, rounds))
        for dtype in (np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)):
            out = np.empty((size, size), dtype)
            reference.dequantize_to(ws[0]._rows(), out)
            if out.tobytes() != ws[0].dequantize(dtype).tobytes():
                raise AssertionError(f"dequantize {name}: not the reference's bits")
            moved = ws[0].nbytes + out.nbytes
            outs = [np.zeros_like(out) for _ in range(SETS)]
            into = [
                lambda w=w, out=out: dequantize.dequantize_to(w._rows(), out)
                for w, out in zip(ws, outs, strict=True)
            ]
            found.append(measure(f"dequantize {name} into {dtype.name}", into, moved, rounds))
            calls = [lambda w=w, dtype=dtype: w.dequantize(dtype) for w in ws]
            found.append(measure(f"dequantize {name}, {dtype.name}", calls, moved, rounds))
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    found = rows(options.size, options.rounds)
    print(f"{'':38} {'ms':>7} {'best':>7} {'GB/s':>6} {'copy':>6} {'share':>6}")
    for row in found:
        print(
            f"{row.name:38} {row.milliseconds:7.2f} {row.best:7.2f} "
            f"{row.gigabytes_per_second:6.1f} {row.copy_gigabytes_per_second:6.1f} "
            f"{row.share:6.0%}"
        )
    if options.json:
        record = {"machine": machine.describe(), "rows": [asdict(row) for row in found]}
        options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
