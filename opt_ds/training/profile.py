"""Profiler traces of a few training steps (`--set profile.steps=N`), made with torch's profiler.

    <output>/profile/step-00000003-rank0.json.gz    for https://ui.perfetto.dev or chrome://tracing
    <output>/profile/step-00000003-rank0.txt        the operators that take the most time
"""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from opt_ds.config import ProfileConfig

_LOG = logging.getLogger(__name__)
FOLDER = "profile"
_ROWS = 30


class StepProfiler:
    """Profiler of `config.steps` steps after the first `config.skip` steps of this launch, on rank 0 only."""

    def __init__(self, config: ProfileConfig, output: Path, rank: int) -> None:
        self._folder, self._rank, self._step = output / FOLDER, rank, 0
        self._profile: profile | None = None
        warmup = min(1, config.skip)  # the profiler's own warm-up, whose events it discards
        if config.steps and rank == 0:
            self._profile = profile(
                activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
                schedule=schedule(wait=config.skip - warmup, warmup=warmup, active=config.steps, repeat=1),
                on_trace_ready=self._write,
                record_shapes=True,
                profile_memory=True,
                acc_events=True,
            )
            self._profile.start()

    def step_done(self, step: int) -> None:
        """Notify the profiler that a step has ended. `step` counts from 1."""
        if self._profile is not None:
            self._step = step
            self._profile.step()

    def close(self) -> None:
        """Stop the profiler and write what was traced so far."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None

    def _write(self, traced: profile) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{self._step:08d}-rank{self._rank}.json.gz"
        traced.export_chrome_trace(str(path))
        key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
        table = traced.key_averages().table(sort_by=key, row_limit=_ROWS)
        path.with_suffix("").with_suffix(".txt").write_text(table + "\n", encoding="utf-8")
        _LOG.info(f"profile: {path} (open it in https://ui.perfetto.dev)")
