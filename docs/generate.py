"""Tables that follow from the code: the formats of README and docs, the figures of bench/results.

    python -P docs/generate.py     writes docs/_generated and the table inside README.md

tests/test_docs.py fails where README.md is stale.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import lowbit as lb
from lowbit import formats, kernels
from lowbit.kernels import Problem
from lowbit.kernels.cpu import isa
from lowbit.kernels.declare import format_bytes

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
RESULTS = HERE.parent / "bench" / "results"
AUDIT = HERE.parent / "tests" / "audit" / "table.json"
CUTLASS = AUDIT.parent / "cutlass.json"
AUDITED_ROWS = (1, 64, 512)  # of x, that are shown
MARKS = "<!-- formats: generated -->", "<!-- end of formats -->"


def bits_per_value(fmt: lb.Format) -> float:
    """Bits that a value of a 4096 x 4096 matrix takes, scales and zero points included."""
    return 8 * format_bytes(fmt, 4096, 4096) / 4096**2


def rows() -> list[list[str]]:
    """One row a declared name: name, printed name, bits a value, largest value, meaning."""
    table = []
    for name, named in sorted(formats.declared().items()):
        if named.summary == "user codebook":
            continue
        fmt = named.format
        shown = "" if name == fmt.name else f"`{fmt.name}`"
        bits, largest = f"{bits_per_value(fmt):.4g}", f"{fmt.element.max:g}"
        table.append([f"`{name}`", shown, bits, largest, named.summary])
    return table


HEADINGS = ["name", "stands for", "bits a value", "largest code", "what it is"]


def markdown() -> str:
    """The table of formats for README.md."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *rows()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rst(headings: list[str], body: list[list[str]]) -> str:
    """A list-table."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    for row in [headings, *body]:
        cells = [c.replace("`", "``") for c in row]
        lines += [f"   {'*' if i == 0 else ' '} - {cell}" for i, cell in enumerate(cells)]
    return "\n".join(lines) + "\n"


def kernel_rows() -> list[list[str]]:
    """Which kernel takes which pair, and the roundings that its error bound counts."""
    table = []
    for x in ("float32", "bfloat16", "float64", "int8_row", "fp8_row", "mxfp8"):
        for w in ("int8_row", "int4_g128", "uint4_g128_asym", "fp8_row", "nf4_g64", "int3_g32"):
            kind = x if x.startswith(("float", "bf")) and "_" not in x else lb.format(x)
            out = "float64" if x == "float64" else "float32"
            device = f"cpu:{isa.RECORDS[0].name}"
            p = Problem(16, 4096, 4096, kind, lb.format(w), out, device=device, threads=2)
            kernel = kernels.choose(p).kernel
            roundings = kernel.roundings(p)
            table.append([f"`{x}`", f"`{w}`", f"`{kernel.name}`", str(roundings.count)])
    return table


def figures() -> str:
    """The committed figures of bench/overheads.py."""
    path = RESULTS / "overheads.json"
    record = json.loads(path.read_text())
    machine = record["machine"]
    body = [
        [f["name"], f"{f['value']:.3g} {f['unit']}", f"{f['limit']:g} {f['unit']}"]
        for f in record["figures"]
    ]
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    note = (
        f"Measured on {machine['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['isa']}, Python {machine['python']}, {versions}.\n"
    )
    return rst(["what", "measured", "limit"], body) + "\n" + note


def cpu() -> str:
    """The committed figures of bench/cpu.py: roofs, and how often each target is met."""
    path = RESULTS / "cpu.json"
    if not path.exists():
        return "No whole run is committed.\n"
    record = json.loads(path.read_text())
    machine, roofs = record["machine"], record["roofs"]
    kinds: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
    for verdict in record["verdicts"]:
        against = f"our own, per {verdict['unit']}" if verdict["unit"] else verdict["against"]
        kinds.setdefault((verdict["section"], against, verdict["wanted"]), []).append(verdict)
    body = []
    for (section, against, wanted), found in kinds.items():
        worst = min(found, key=lambda verdict: (verdict["met"], verdict["ratio"]))
        work = worst["work"]
        met = sum(verdict["met"] for verdict in found)
        body.append(
            [
                section,
                f"`{against}`",
                f"{wanted:.2f}",
                f"{met} of {len(found)}",
                (
                    f"{worst['ratio']:.2f}: `{work['weight']}` {work['n']} x {work['k']}, "
                    f"M = {worst['m']}"
                ),
            ]
        )
    peaks = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in roofs["operations"].items())
    contenders = ", ".join(sorted(set(record["contenders"].values())))
    facts = (
        f"Measured on {machine['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['isa']}, {roofs['threads']} threads. Roofs: read {roofs['read'] / 1e9:.1f} "
        f"GB/s, copy {roofs['copy'] / 1e9:.1f} GB/s; Gop/s: {peaks}. {contenders}.\n"
    )
    picture = f".. image:: ../bench/results/{path.stem}.png\n   :alt: rooflines\n"
    headings = ["section", "against", "wanted", "met", "worst"]
    return "\n".join([rst(headings, body), facts, picture])


def demo() -> str:
    """The committed table of examples/minilm.py."""
    record = json.loads((RESULTS / "minilm.json").read_text())
    body = [
        [
            row["label"],
            f"{row['linear_bytes'] / 1e6:.2f}",
            *(f"{row[key]:.4f}" for key in ("cosine_mean", "cosine_worst")),
            *(f"{row[key]:.3f}" for key in ("top_1_equal", "top_10_overlap")),
            *(f"{row[batch]['gemm_seconds']:.2f}" for batch in ("batch_1", "batch_32")),
            ", ".join(row["batch_32"]["kernels"]),
        ]
        for row in record["results"]
    ]
    headings = [
        *(
            "format",
            "MB of linear weights",
            "cosine, mean",
            "worst",
            "top-1 equal",
            "top-10 shared",
        ),
        *("s in GEMMs, batch 1 (30 sentences)", "batch 32 (300)", "kernel"),
    ]
    facts = record["circumstances"]
    note = (
        f"{facts['machine']}, {facts['cores']} cores, {facts['lowbit_threads']} lowbit threads, "
        f"NumPy {facts['numpy']} with {facts['blas']}, Python {facts['python']}.\n"
    )
    return rst(headings, body) + "\n" + note


def audit() -> str:
    """What kernels take on each architecture, of the committed table of `make audit`."""
    record = json.loads(AUDIT.read_text())
    archs = [name for name in record if name != "nvrtc"]
    kinds: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for arch in archs:
        for each in record[arch].values():
            rows = re.search(r"M = (\d+)", each["for"])
            if rows and int(rows[1]) not in AUDITED_ROWS:
                continue
            found = kinds.setdefault((each["for"], each["kernel"]), {})
            # Of several for one purpose, with and without shared columns, the one that takes most.
            if arch not in found or found[arch]["registers"] < each["registers"]:
                found[arch] = each
    body = [
        [
            purpose.partition(", matmul")[0],
            f"`{kernel}`",
            *(taken(found[arch]) if arch in found else "" for arch in archs),
        ]
        for (purpose, kernel), found in kinds.items()
    ]
    version = ".".join(map(str, record["nvrtc"]))
    counts = ", ".join(f"{len(record[arch])} for {arch}" for arch in archs)
    note = f"NVRTC {version}; kernels looked at: {counts}. No stack, no spilled register.\n"
    return rst(["for", "kernel", *archs], body) + "\n" + note


def on_cutlass() -> str:
    """Kernels on CUTLASS whose machine code the package brings, of the table of `make cubins`."""
    record = json.loads(CUTLASS.read_text())
    body = [
        [
            each["arch"],
            each["for"],
            *(str(each[name]) for name in ("registers", "products", "argument")),
        ]
        for each in record.values()
    ]
    headings = [
        "for GPUs of",
        "kernel",
        "registers",
        "tensor core instructions",
        "bytes of its argument",
    ]
    note = f"{len(record)} kernels. No stack, no spilled register.\n"
    return rst(headings, body) + "\n" + note


def taken(kernel: dict[str, Any]) -> str:
    """Registers, shared memory, blocks, bytes in flight."""
    shared, flying = (f"{kernel[name] / 1024:.0f}" for name in ("shared", "in flight"))
    return f"{kernel['registers']}, {shared}, {kernel['blocks']}, {flying}"


def readme() -> str:
    """README.md with a fresh table."""
    start, end = MARKS
    text = README.read_text()
    if start not in text or end not in text:
        raise ValueError(f"README.md lacks the marks {start} and {end}")
    fresh = f"{start}\n\n{markdown()}\n\n{end}"
    return re.sub(f"{re.escape(start)}.*{re.escape(end)}", lambda _: fresh, text, flags=re.S)


def write() -> None:
    """All generated pages; README.md is left alone."""
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    pages = {
        "formats.txt": rst(HEADINGS, rows()),
        "kernels.txt": rst(["x", "w", "kernel", "roundings, K = 4096"], kernel_rows()),
        "figures.txt": figures(),
        "cpu.txt": cpu(),
        "demo.txt": demo(),
        "audit.txt": audit(),
        "cutlass.txt": on_cutlass(),
    }
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


if __name__ == "__main__":
    write()
    README.write_text(readme())
