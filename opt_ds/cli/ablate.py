"""`opt-ds ablate`: pre-train without each task or level, probe, and make one table."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from opt_ds.cli.option_groups import with_option_groups
from opt_ds.cli.options import ConfigOptions, ProbeOptions
from opt_ds.errors import UserError, did_you_mean
from opt_ds.log import ON_STDERR

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FullRunOptions(ConfigOptions):
    """The configuration of the run with every task and level."""

    store: Annotated[
        list[str] | None, typer.Option(help="A feature store; may be repeated. The first one is probed on.")
    ] = None


@with_option_groups
def ablate(
    *,
    output: Annotated[Path, typer.Option(help="Folder of the ablation: a run a row, and the tables.")],
    config: FullRunOptions,
    row: Annotated[list[str] | None, typer.Option(help="A row to make; may be repeated. Default: all that differ.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split that the probe is judged on. Default: as opt-ds evaluate classification's.")
    ] = None,
    probe: ProbeOptions,
    subset: Annotated[
        list[str] | None, typer.Option(help="Input of the probe, such as T+A+I; may be repeated. Default: T+A+I.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Samples of the probe at most, a seeded choice.", min=1)] = None,
    num_ranks: Annotated[int | None, typer.Option(help="Ranks of each run. Default: a GPU each, else 1.", min=1)] = None,
    task: Annotated[int | None, typer.Option(help="Only this one of the rows, from 0: a task of a job array.", min=0)] = None,
    list_rows: Annotated[bool, typer.Option("--list", help="Print the rows' names, and do nothing.")] = False,
    arguments: Annotated[bool, typer.Option("--arguments", help="Print pretrain.py's arguments for --task.")] = False,
) -> int:
    """The paper's ablation: the same seed and budget without each task and level, a linear probe of each, one table.

    Rows that are done are skipped, and one that was cut resumes, when the same command is given again. Exit codes as
    pretrain.py's: 75 after a signal, saved.
    """
    import torch

    from opt_ds.evaluation import ablation, ablation_table
    from opt_ds.evaluation.evaluator import SUBSETS, held_out_splits
    from opt_ds.training import preflight, run_folder

    for name in subset or ():
        if name not in SUBSETS:
            raise UserError(f'--subset "{name}": choose of {", ".join(SUBSETS)}{did_you_mean(name, SUBSETS)}')
    source = config.config or preflight.default_preset(config.stores, torch.cuda.is_available())[0]
    paths = config.stores or preflight.configured_stores(source, config.changes) or [str(preflight.DEFAULT_STORE)]
    resolved, given, taken = preflight.settle(source, config.changes, paths)
    if taken:
        _LOG.info(f"note: {taken}", extra=ON_STDERR)
    stores = preflight.open_stores(resolved)
    rows = ablation.plan_rows(source, given, stores, row or ())
    if task is not None:
        if task >= len(rows):
            raise UserError(f"--task {task}: there are {len(rows)} rows, numbered from 0")
        rows = [rows[task]]
    if list_rows:
        typer.echo("\n".join(planned.name for planned in rows))
        return 0
    if arguments:
        if len(rows) != 1:
            raise UserError("--arguments: name one row with --task (or one --row)")
        typer.echo("\n".join(ablation.pretrain_arguments(source, rows[0], output)))
        return 0
    if split is None:
        split = held_out_splits(stores[0])[0]
        _LOG.info(f"note: judged on {split}; --split chooses", extra=ON_STDERR)
    wanted = ablation.Probe(
        split, probe.train_split, tuple(subset or ("T+A+I",)), probe.min_positives, probe.regularisation, limit
    )
    ablation.check_labels(stores[0], wanted, rows[0].config.seed)
    for planned in rows:
        run_folder.check_same_run(output / planned.name, planned.config, stores)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = num_ranks or max(1, torch.cuda.device_count())
    names = ", ".join(planned.name for planned in rows)
    _LOG.info(f"{len(rows)} rows ({names}) of {source}, {ranks} rank{'s' * (ranks > 1)} a run, in {output}")
    code = ablation.make_rows(source, rows, output, stores[0], wanted, ranks, device)
    if code:
        return code
    figures = ablation.write_tables(output, stores[0], rows[0].config, wanted)
    typer.echo("\n" + ablation_table.ablation_markdown(figures))
    typer.echo(f"table   {output / ablation_table.MARKDOWN_FILE}, {output / ablation_table.JSON_FILE}")
    typer.echo(f"chart   {output / ablation_table.CHART_FILE}")
    return 0
