"""`opt-ds doctor`: this machine's fitness, a line a fact."""

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    config: Annotated[
        str | None, typer.Option(help="A preset's name, or a YAML file. Default: what pretrain.py would take.")
    ] = None,
    store: Annotated[list[str] | None, typer.Option(help="A feature store to try; may be given several times.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory of the run: can it be written, is there room.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting.")
    ] = None,
    # slurm/pretrain.sh gives it what it was given
    init_from: Annotated[Path | None, typer.Option(help="The run that a new one starts from: is it whole.")] = None,
    init_moments: Annotated[bool, typer.Option("--init-moments", hidden=True)] = False,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,
) -> None:
    """Check versions, GPUs, compilers, communication, memory, kernels and stores; takes what pretrain.py takes.

    A line a fact: ok, warn or FAIL, and how to mend it. Exit code 1 if something fails.
    """
    from opt_ds.tools.doctor import Question, default_config, examine, resolve

    source = config or default_config(store or [])
    resolved, taken = resolve(source, settings or [], store or [])
    if config is None:
        typer.echo(f"ok    config        {source}, which pretrain.py takes here without --config")
    if taken:
        typer.echo(f"ok    config        {taken}")
    if init_from is not None:
        from opt_ds.engine.init_from import find_start

        find_start(init_from, init_moments, output)
        typer.echo(f"ok    init-from     {init_from} can be started from")
    failed = False
    for finding in examine(Question(resolved, output)):
        typer.echo(f"{finding.level:<4}  {finding.subject:<12}  {finding.text}")
        failed |= finding.level == "FAIL"
    raise typer.Exit(int(failed))
