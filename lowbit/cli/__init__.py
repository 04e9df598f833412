"""The command `lowbit`. What a command needs is imported when it runs."""

from __future__ import annotations

import json
from typing import Annotated

import typer

import lowbit

app = typer.Typer(
    name="lowbit",
    help="Low-precision arrays and their matrix products.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line."""
    app(prog_name="lowbit")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(lowbit.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say what lowbit finds on this machine, and what to do about what is missing.

    The exit status is 0 where lowbit can be used.
    """
    from lowbit.cli import diagnosis

    findings = diagnosis.examine()
    usable = all(each.usable for each in findings)
    if as_json:
        report = {"usable": usable, "findings": [each.record() for each in findings]}
        typer.echo(json.dumps(report, indent=1))
    else:
        typer.echo("\n".join(str(each) for each in findings))
    raise typer.Exit(0 if usable else 1)


@app.command()
def explain(
    m: Annotated[int, typer.Argument(min=0, help="Rows of x.")],
    n: Annotated[int, typer.Argument(min=0, help="Rows of the weight: columns of the result.")],
    k: Annotated[int, typer.Argument(min=0, help="Columns of both.")],
    weight: Annotated[str, typer.Option(help="Format of the weight: int4_g128, nf4_g64, ...")],
    x: Annotated[str, typer.Option(help="dtype of a dense x.")] = "float32",
    x_format: Annotated[
        str | None, typer.Option(help="Format of a quantized x, instead: int8_row, ...")
    ] = None,
    out: Annotated[str | None, typer.Option(help="dtype of the result.")] = None,
    bias: Annotated[bool, typer.Option("--bias", help="Add a bias.")] = False,
    activation: Annotated[str | None, typer.Option(help="relu, gelu, gelu_tanh or silu.")] = None,
    residual: Annotated[bool, typer.Option("--residual", help="Add a residual.")] = False,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Bits of a row must not depend on M.")
    ] = False,
    device: Annotated[
        str | None, typer.Option(help="Another machine than this one: cpu:avx2, cpu:neon, ...")
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads; else this machine's.")
    ] = None,
    kernel: Annotated[str | None, typer.Option(help="Force a kernel by name.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Say which kernel computes activation(x @ weight.T + bias) + residual, and why.

    Nothing is computed: any shape, format and machine will do.
    """
    from lowbit.cli import reasoning

    try:
        explanation = reasoning.explain(
            m,
            n,
            k,
            weight=weight,
            x=x_format or x,
            quantized=x_format is not None,
            out=out,
            bias=bias,
            activation=activation,
            residual=residual,
            batch_invariant=batch_invariant,
            device=device,
            threads=threads,
            kernel=kernel,
        )
    except (TypeError, ValueError) as error:
        typer.echo(f"lowbit explain: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(json.dumps(reasoning.record(explanation), indent=1) if as_json else str(explanation))


@app.command()
def bench(
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure this machine, and remember its rates.")
    ] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer repetitions: seconds, and rough.")
    ] = False,
    weights: Annotated[
        str, typer.Option(help="Formats of weights, else a few of each kind: int4_g128,nf4_g64")
    ] = "",
    x: Annotated[
        str, typer.Option("--x", help="dtypes or formats of x, else bfloat16,float32,int8_g128")
    ] = "",
    rows: Annotated[str, typer.Option(help="Rows of x, else 1,4,16,64,256")] = "",
    shapes: Annotated[str, typer.Option(help="Weights' NxK,... else 4096x4096")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Measure products on this machine: what was chosen, what it took, and what was expected.

    With --tune, measure what the machine does in a second instead, and write it where later
    processes find it: LOWBIT_TUNING=file, else the user's folder of settings.
    """
    from lowbit.cli import benching

    try:
        if tune:
            typer.echo(benching.tuned(quick, as_json))
            return
        found = benching.measured(
            benching.names(weights) or benching.WEIGHTS,
            benching.names(x) or benching.LEFTS,
            benching.numbers(rows, "--rows") or benching.ROWS,
            benching.sides(shapes, "--shapes") or benching.SHAPES,
            quick,
        )
    except (OSError, TypeError, ValueError) as error:
        typer.echo(f"lowbit bench: {error}", err=True)
        raise typer.Exit(2) from None
    typer.echo(benching.record(found) if as_json else benching.table(found))
