"""`opt-ds …`: the list of commands.

A command's module is imported only when the command is called, so that `--help` is fast.
"""

import sys

try:
    import importlib
    import os
    from typing import Annotated, Any, NamedTuple

    import typer
    import typer.core

    from opt_ds.cli.arguments import StoppedError, build
    from opt_ds.cli.program import rank_of_environment, run_command
    from opt_ds.errors import UserError, did_you_mean
    from opt_ds.training.signals import REQUEUE_EXIT_CODE
except KeyboardInterrupt:  # handle a Ctrl-C while the libraries load like any other
    exec("")  # keeps the exit code, as `interrupts.keep_exit_code` does, which may not be loaded
    print("stopped", file=sys.stderr)
    sys.exit(130)


class Command(NamedTuple):
    """Location of a command's function (or group of functions), and its line in `opt-ds --help`."""

    module: str
    function: str
    summary: str


COMMANDS = {
    "corpus": Command("opt_ds.cli.data", "corpus", "Write a built-in corpus: raw images, texts and speech."),
    "prepare": Command("opt_ds.cli.data", "prepare", "Make a feature store from a manifest of raw files."),
    "import": Command(
        "opt_ds.cli.imports", "imports", "Write a manifest from a published collection, a folder or a table."
    ),
    "merge": Command("opt_ds.cli.data", "merge", "Merge the partitions that a job array prepared."),
    "inspect": Command("opt_ds.cli.stores", "inspect_store", "Verify a feature store, summarise it, show a sample."),
    "split": Command("opt_ds.cli.stores", "split", "Reassign a store's samples to splits."),
    "update": Command("opt_ds.cli.stores", "update", "Add or replace one modality of a store, or its image codes."),
    "convert": Command("opt_ds.cli.stores", "convert", "Copy a store, compressed or not; extract UNITER's features."),
    "train-dvae": Command("opt_ds.cli.dvae", "train_dvae", "Train the image decoder's dVAE and write image codes."),
    "finetune": Command("opt_ds.cli.finetune", "finetune", "Train a checkpoint further, for one task."),
    "evaluate": Command("opt_ds.cli.evaluate", "evaluate", "Measure a checkpoint on held-out samples."),
    "ablate": Command("opt_ds.cli.ablate", "ablate", "Run the ablation over tasks and levels; write one table."),
    "report": Command("opt_ds.cli.report", "report", "Write an HTML page of a run: curves, tables, images, cost."),
    "generate": Command("opt_ds.cli.serve", "generate", "Generate a text or an image from raw input."),
    "export": Command("opt_ds.cli.serve", "export", "Write a checkpoint in Hugging Face's layout."),
    "serve": Command("opt_ds.cli.serve", "serve", "Start a web page and a JSON API for a trained model."),
    "doctor": Command("opt_ds.cli.doctor", "doctor", "Check this machine; one line per check, with the fix."),
    "plan": Command("opt_ds.cli.plan", "plan", "Estimate a run: memory, micro-batches, traffic, time."),
}


class _LazyGroup(typer.core.TyperGroup):
    """Commands of `COMMANDS`, each imported at its first use."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in COMMANDS:
            raise UserError(f'unknown command "{cmd_name}"{did_you_mean(cmd_name, COMMANDS)}: see `opt-ds --help`')
        command = COMMANDS[cmd_name]
        return build(getattr(importlib.import_module(command.module), command.function), cmd_name)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # while a command's libraries were loading
            raise StoppedError("stopped") from None

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, command.summary) for name, command in COMMANDS.items()])


def _build() -> Any:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, cls=_LazyGroup, no_args_is_help=True)

    @app.callback()
    def opt_ds(local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1) -> None:
        """Prepare features for, pre-train, evaluate and serve OPT, a model of text, images and speech.

        Pre-training itself is started by a launcher: deepspeed --num_gpus 4 opt_ds/pretrain.py --help
        """

    return typer.main.get_command(app)


def main() -> None:
    """Run the console script."""
    code = run_command(_build(), sys.argv[1:], "opt-ds", rank_of_environment())
    if (
        code not in (0, REQUEUE_EXIT_CODE)
        and (torch := sys.modules.get("torch.distributed"))
        and torch.is_initialized()
    ):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # leaving a process group whose other ranks are lost can hang
    sys.exit(code)
