"""Pre-training: parse, check, and hand over to the engine. Started by path, under any launcher:

deepspeed --num_gpus 4 opt_ds/pretrain.py [--config FILE|PRESET] [--store DIR]… [--output DIR] [--set key.path=value]…
torchrun --nproc_per_node 4 opt_ds/pretrain.py …
srun python opt_ds/pretrain.py …
python opt_ds/pretrain.py …                       # one process
python opt_ds/pretrain.py --init-from RUN …       # a new run from another run's weights
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python put this folder first on its search path, where our modules would shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Before torch is loaded: waiting threads must not spin when several ranks share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

try:
    import logging
    import time
    import traceback
    from typing import TYPE_CHECKING, Annotated

    import typer

    from opt_ds.cli.option_groups import with_option_groups
    from opt_ds.cli.options import ConfigOptions
    from opt_ds.cli.program import run_program
    from opt_ds.config import Config
    from opt_ds.errors import UserError
    from opt_ds.training.distributed import Ranks, find_ranks
    from opt_ds.training.launch import run_training
    from opt_ds.training.signals import REQUEUE_EXIT_CODE, StopRequest

    if TYPE_CHECKING:
        from opt_ds.training.init_from import Start
except KeyboardInterrupt:  # a Ctrl-C while the libraries load ends as any other does
    print("stopped", file=sys.stderr)
    sys.exit(130)

_LOG = logging.getLogger("opt_ds.pretrain")  # started by path, its __name__ is "__main__"
_STORE_WAIT_S = 3 * 3600  # for rank 0 to build the emoji store
_RANKS = Ranks()


@with_option_groups
def pretrain(
    *,
    config: ConfigOptions,
    output: Annotated[
        Path | None, typer.Option(help="Directory of the run. If it holds a run, that run resumes.")
    ] = None,
    init_from: Annotated[
        Path | None,
        typer.Option(help="Start a new run from the weights of a run (its best checkpoint) or of one checkpoint."),
    ] = None,
    init_moments: Annotated[
        bool, typer.Option("--init-moments", help="With --init-from: take Adam's moments too.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Fail if --output has no checkpoint to resume from.")
    ] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> int:
    """Pre-train OPT on one or several feature stores.

    Without options, it trains on the emoji store in data/emoji (built once if missing) with its preset. Run the same
    command again to resume. Exit codes: 0 finished, 2 bad input, 75 stopped by a signal and saved, others failed.
    """
    start = _start(init_from, init_moments, output)
    resolved, output = _resolve(config.config, config.stores, output, config.changes, start)
    _LOG.info(f"config {resolved.preset}, stores {', '.join(resolved.data.stores)}, output {output}")
    from opt_ds.evaluation.callbacks import EvaluationCallbacks  # PyTorch takes seconds to import: not for --help

    with StopRequest(resolved.train.preemption_signal) as stop:
        return run_training(resolved, output, _RANKS, stop, must_resume=resume, callbacks=EvaluationCallbacks())


def _start(source: Path | None, moments: bool, output: Path | None) -> "Start | None":
    """What `--init-from` means, None without it."""
    if source is None:
        if moments:
            raise UserError("--init-moments takes moments from the run that --init-from names: add --init-from RUN")
        return None
    from opt_ds.training.init_from import find_start

    return find_start(source, moments, output)


def _resolve(
    source: str | None, stores: list[str], output: Path | None, settings: list[str], start: "Start | None" = None
) -> tuple[Config, Path]:
    """The configuration with every default settled, and the output directory; builds the emoji store if it is meant."""
    from opt_ds.training import init_from, preflight

    if start and not (stores or preflight.configured_stores(source, settings)):
        stores = list(start.config.data.stores)
        _LOG.info(f"no --store: using {', '.join(stores)}, as {start.run} does")
    if source is None:
        source, why = _default_source(stores, settings, start)
        _LOG.info(f"using {source} ({why})")
    configured = preflight.configured_stores(source, settings)
    if stores and configured and stores != configured:
        _LOG.info(f"--store replaces the configuration's data.stores ({', '.join(configured)})")
    stores = stores or configured or [_default_store(preflight.DEFAULT_STORE)]
    if start:
        settings = init_from.settings_of_start(start, source, settings)
    config, _, taken = preflight.settle(source, settings, stores)
    if taken:
        _LOG.info(taken)
    output = output or Path("runs") / preflight.config_name(source)
    if start:
        _LOG.info(init_from.describe_start(start))
        for note in init_from.check_fit(start, config):
            _LOG.info(note)
    else:
        init_from.refuse_forgotten(config, output)
    return config, output


def _default_source(stores: list[str], settings: list[str], start: "Start | None") -> tuple[str, str]:
    """(preset, why) where no --config is given."""
    from opt_ds.config.sources import preset_names
    from opt_ds.training import preflight

    named = next((s.partition("=")[2] for s in settings if s.startswith("preset=")), None)
    if named:
        return named, "--set preset"
    if start and start.config.preset in preset_names():
        return start.config.preset, f"the preset of {start.run}"
    return preflight.default_preset(stores, _has_gpu())


def _default_store(path: Path) -> str:
    """The emoji store: rank 0 builds it if it is missing, the others wait."""
    finished = path / "store.json"
    if finished.is_file():
        return str(path)
    if _RANKS.is_main:
        from opt_ds.ingest import emoji_store

        _LOG.info(f"{path} does not exist: building the emoji store, once")
        emoji_store(path, path.parent / "emoji-corpus")
    began = time.monotonic()
    while not finished.is_file():
        if time.monotonic() - began > _STORE_WAIT_S:
            raise UserError(
                f"{path}: rank 0 has not built it in {_STORE_WAIT_S // 3600} hours: run `opt-ds corpus emoji` first"
            )
        time.sleep(1)
    return str(path)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def main() -> int:
    """Entry point: find the ranks, run, and turn what went wrong into one line and an exit code."""
    global _RANKS

    def run() -> int:
        global _RANKS
        _RANKS = find_ranks()
        return run_program(pretrain, sys.argv[1:], name="pretrain.py", rank=_RANKS.rank)

    try:
        code = run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        code = 130
    except Exception:
        traceback.print_exc()
        code = 1
    if code not in (0, REQUEUE_EXIT_CODE):
        # Leaving a process group whose other ranks are lost or hang can hang as well; what had to be written is.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":
    sys.exit(main())
