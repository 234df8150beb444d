"""`opt-ds report`: write a run's report as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from opt_ds.cli.program import output_file


def report(
    run: Annotated[Path, typer.Argument(help="A run's output directory.")],
    output: Annotated[
        Path | None, typer.Option(help="The page. Default: report.html in the run's directory.", callback=output_file)
    ] = None,
    ablation: Annotated[Path | None, typer.Option(help="A folder of opt-ds ablate, to show its table too.")] = None,
) -> None:
    """Write one self-contained HTML page: curves, tables beside the paper's figures, picture grids, configuration, cost.

    It shows what the evaluations wrote into the run's directory, and names what was not measured.
    """
    from opt_ds.serving.report import write_report

    page = output or run / "report.html"
    missing = write_report(run, page, ablation)
    typer.echo(f"report          {page}")
    if missing:
        typer.echo(f"not measured    {', '.join(name.replace('_', ' ') for name in missing)}")
