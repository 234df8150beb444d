"""`opt-ds report`: write a run's report as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from opt_ds.cli.program import output_file


def report(
    run: Annotated[Path, typer.Argument(help="Output directory of the run.")],
    output: Annotated[
        Path | None, typer.Option(help="HTML file to write. Default: report.html in the run's directory.", callback=output_file)
    ] = None,
    ablation: Annotated[Path | None, typer.Option(help="Folder of opt-ds ablate, whose table is included.")] = None,
) -> None:
    """Write one self-contained HTML page: curves, tables next to the paper's figures, image grids, configuration, cost.

    It shows the results of evaluations in the run's directory and lists what was not measured.
    """
    from opt_ds.serving.report import write_report

    page = output or run / "report.html"
    missing = write_report(run, page, ablation)
    typer.echo(f"report          {page}")
    if missing:
        typer.echo(f"not measured    {', '.join(name.replace('_', ' ') for name in missing)}")
