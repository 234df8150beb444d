"""`opt-ds doctor`: check this machine, with one line per check."""

from pathlib import Path
from typing import Annotated

import typer

from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import ConfigOptions


@with_option_groups
def doctor(
    *,
    config: ConfigOptions,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run: check that it is writable and has space.")
    ] = None,
    # slurm/pretrain.sh passes all its arguments to this command.
    init_from: Annotated[
        Path | None, typer.Option(help="Run that a new one starts from: check that it is complete.")
    ] = None,
    init_moments: Annotated[bool, typer.Option("--init-moments", hidden=True)] = False,
    resume: Annotated[bool, typer.Option("--resume", hidden=True)] = False,
) -> None:
    """Check versions, GPUs, compilers, communication, memory, kernels and stores. Accepts pretrain.py's options.

    Prints one line per check: ok, warn or FAIL, and how to fix it. The exit code is 1 if a check fails.
    """
    from opt_ds.tools.doctor import Question, default_config, examine, resolve

    source = config.config or default_config(config.stores)
    resolved, taken = resolve(source, config.changes, config.stores)
    if config.config is None:
        typer.echo(f"ok    config        {source}, which pretrain.py uses here without --config")
    if taken:
        typer.echo(f"ok    config        {taken}")
    if init_from is not None:
        from opt_ds.training.init_from import find_start

        find_start(init_from, init_moments, output)
        typer.echo(f"ok    init-from     {init_from}: a new run can start from it")
    failed = False
    for finding in examine(Question(resolved, output)):
        typer.echo(f"{finding.level:<4}  {finding.subject:<12}  {finding.text}")
        failed |= finding.level == "FAIL"
    raise typer.Exit(int(failed))
