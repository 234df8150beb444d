"""Pre-training: parse, check, and hand over to the engine. Started by path, under any launcher:

deepspeed --num_gpus 4 opt_ds/pretrain.py [--config FILE|PRESET] [--store DIR]… [--output DIR] [--set key.path=value]…
torchrun --nproc_per_node 4 opt_ds/pretrain.py …
srun python opt_ds/pretrain.py …
python opt_ds/pretrain.py …                       # one process
"""

import os
import sys
from pathlib import Path

if __package__ in (None, ""):
    # Started by path: Python put this folder first on its search path, where our modules would shadow others.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

# Before torch is loaded: waiting threads must not spin when several ranks share the cores.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import time
import traceback
from typing import TYPE_CHECKING, Annotated

import typer

from opt_ds.commands import run_program
from opt_ds.config import Config, load_config
from opt_ds.engine.distributed import Ranks, find_ranks
from opt_ds.engine.signals import REQUEUE_EXIT_CODE, StopRequest
from opt_ds.errors import RunError, UserError

if TYPE_CHECKING:
    from opt_ds.engine.checkpoint import TrainState

_STORE_WAIT_S = 3 * 3600  # for rank 0 to build the emoji store
_RANKS = Ranks()


def pretrain(
    config: Annotated[str | None, typer.Option(help="A preset's name, or a YAML file.")] = None,
    store: Annotated[list[str] | None, typer.Option(help="A feature store; may be given several times.")] = None,
    output: Annotated[Path | None, typer.Option(help="Directory of the run; it resumes if it has begun.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY.PATH=VALUE", help="Change one setting.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Fail if --output has no checkpoint to go on from.")] = False,
    local_rank: Annotated[int, typer.Option("--local_rank", "--local-rank", hidden=True)] = -1,
) -> int:
    """Pre-train OPT on one or several feature stores.

    Without options: the emoji store in data/emoji (built once if missing) with its preset. A second start with the same
    --output resumes. Exit codes: 0 finished, 2 bad input, 75 stopped by a signal and saved, others failed.
    """
    resolved, output = _resolve(config, store or [], output, settings or [])
    _say(f"config {resolved.preset}, stores {', '.join(resolved.data.stores)}, output {output}")
    with StopRequest(resolved.train.preemption_signal) as stop:
        return _train(resolved, output, resume, stop)


def _resolve(source: str | None, stores: list[str], output: Path | None, settings: list[str]) -> tuple[Config, Path]:
    """The configuration with every default settled, and the output directory; builds the emoji store if it is meant."""
    from opt_ds.engine import preflight

    if source is None:
        named = next((s.partition("=")[2] for s in settings if s.startswith("preset=")), None)
        source, why = (named, "--set preset") if named else preflight.default_preset(stores, _has_gpu())
        _say(f"taking {source} ({why})")
    config = load_config(source, settings)
    if stores and config.data.stores and tuple(stores) != config.data.stores:
        _say(f"--store replaces the configuration's data.stores ({', '.join(config.data.stores)})")
    if not stores:
        stores = list(config.data.stores) or [_default_store(preflight.DEFAULT_STORE)]
    config = load_config(source, [*settings, f"data.stores={list(stores)!r}"])
    return config, output or Path("runs") / preflight.config_name(source)


def _default_store(path: Path) -> str:
    """The emoji store: rank 0 builds it if it is missing, the others wait."""
    finished = path / "store.json"
    if finished.is_file():
        return str(path)
    if _RANKS.is_main:
        from opt_ds.prepare import emoji_store

        _say(f"{path} is not there: building the emoji store, once")
        emoji_store(path, path.parent / "emoji-corpus")
    began = time.monotonic()
    while not finished.is_file():
        if time.monotonic() - began > _STORE_WAIT_S:
            raise UserError(
                f"{path}: rank 0 has not built it in {_STORE_WAIT_S // 3600} hours: run `opt-ds corpus emoji` first"
            )
        time.sleep(1)
    return str(path)


def _train(config: Config, output: Path, must_resume: bool, stop: StopRequest) -> int:
    from opt_ds.engine import checkpoint, preflight, run_folder
    from opt_ds.engine.deepspeed_config import Hardware, choose_precision, deepspeed_settings

    stores = preflight.open_stores(config)
    run_folder.check_same_run(output, config, stores)
    hardware = Hardware.detect()
    precision = choose_precision(config, hardware)
    deepspeed_settings(config, precision)  # a JSON that contradicts is refused here
    resume_from = _resumable(config, output)
    if must_resume and resume_from is None:
        raise UserError(f"--resume: {output} has no checkpoint: name the output directory of a run, or leave --resume away")
    if resume_from and _finished(config, checkpoint.train_state(checkpoint.read_state(resume_from))):
        _say(f"{output} is finished ({resume_from.name}): nothing to do; a larger --set train.max_steps goes on")
        return 0

    from opt_ds.engine.distributed import ProcessGroup, is_lost_rank

    held = run_folder.lock(output) if _RANKS.is_main else None
    group = ProcessGroup(_RANKS, config.guard.rank_timeout_s)
    try:
        from opt_ds.engine.trainer import Trainer

        resume_from = group.from_main(resume_from)
        code = Trainer(config, stores, output, group, hardware, precision, resume_from, stop).train()
        group.close()
        return code
    except RuntimeError as error:
        if not is_lost_rank(error):
            raise
        reason = str(error).splitlines()[0][:200]
        raise RunError(
            f"rank {_RANKS.rank} lost contact with another rank, whose log says why ({reason}): start again with the same "
            "--output to go on"
        ) from None
    finally:
        if held:
            held.close()


def _resumable(config: Config, output: Path) -> Path | None:
    from opt_ds.data.plan import StepPlan
    from opt_ds.engine import checkpoint

    folder = checkpoint.find_resumable(output, _say)
    if folder and (version := checkpoint.read_state(folder)["plan_version"]) != StepPlan.VERSION:
        raise UserError(
            f"{folder} was written with version {version} of the step plan, this is version "
            f"{StepPlan.VERSION}, which draws other samples: start anew with another --output"
        )
    return folder


def _finished(config: Config, state: "TrainState") -> bool:
    return state.step >= config.max_steps or state.stopped_early


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _say(line: str) -> None:
    if _RANKS.is_main:
        print(line, flush=True)


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
