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
        list[str] | None, typer.Option(help="Feature store. May be repeated. The probe uses the first one.")
    ] = None


@with_option_groups
def ablate(
    *,
    output: Annotated[Path, typer.Option(help="Folder of the ablation: one run per row, and the tables.")],
    config: FullRunOptions,
    row: Annotated[
        list[str] | None, typer.Option(help="Row of the table to run. May be repeated. Default: all that differ.")
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(help="Split that the probe is evaluated on. Default: as opt-ds evaluate classification."),
    ] = None,
    probe: ProbeOptions,
    subset: Annotated[
        list[str] | None, typer.Option(help="Input of the probe, such as T+A+I. May be repeated. Default: T+A+I.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Largest number of samples of the probe. Default: all.", min=1)
    ] = None,
    num_ranks: Annotated[int | None, typer.Option(help="Ranks per run. Default: one per GPU, or 1.", min=1)] = None,
    task: Annotated[
        int | None, typer.Option(help="Run only this row, counted from 0, as a task of a job array.", min=0)
    ] = None,
    list_rows: Annotated[bool, typer.Option("--list", help="Print the names of the rows and exit.")] = False,
    arguments: Annotated[
        bool, typer.Option("--arguments", help="Print the arguments of pretrain.py for --task and exit.")
    ] = False,
) -> int:
    """Run the paper's ablation: pre-train without each task and level, fit a linear probe to each run, write one table.

    All runs have the same seed and budget. Run the same command again to resume: finished rows are skipped. Exit codes
    are those of pretrain.py: 75 after a signal, saved.
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
    rows = ablation.ablation_rows(source, given, stores, row or ())
    if task is not None:
        if task >= len(rows):
            raise UserError(f"--task {task}: there are {len(rows)} rows, numbered from 0")
        rows = [rows[task]]
    if list_rows:
        typer.echo("\n".join(each.name for each in rows))
        return 0
    if arguments:
        if len(rows) != 1:
            raise UserError("--arguments: name one row with --task (or one --row)")
        typer.echo("\n".join(ablation.pretrain_arguments(source, rows[0], output)))
        return 0
    if split is None:
        split = held_out_splits(stores[0])[0]
        _LOG.info(f"note: evaluated on {split}; choose another one with --split", extra=ON_STDERR)
    wanted = ablation.Probe(
        split, probe.train_split, tuple(subset or ("T+A+I",)), probe.min_positives, probe.regularisation, limit
    )
    ablation.check_labels(stores[0], wanted, rows[0].config.seed)
    for each in rows:
        run_folder.check_same_run(output / each.name, each.config, stores)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ranks = num_ranks or max(1, torch.cuda.device_count())
    names = ", ".join(each.name for each in rows)
    _LOG.info(f"{len(rows)} rows ({names}) of {source}, {ranks} rank{'s' * (ranks > 1)} per run, in {output}")
    code = ablation.make_rows(source, rows, output, stores[0], wanted, ranks, device)
    if code:
        return code
    figures = ablation.write_tables(output, stores[0], rows[0].config, wanted)
    typer.echo("\n" + ablation_table.ablation_markdown(figures))
    typer.echo(f"table   {output / ablation_table.MARKDOWN_FILE}, {output / ablation_table.JSON_FILE}")
    typer.echo(f"chart   {output / ablation_table.CHART_FILE}")
    return 0
