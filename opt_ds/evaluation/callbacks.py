"""Evaluation during a run: trivial baselines for the validation losses, the image grid, and experiments at intervals.
"""

import logging
from collections.abc import Sequence

from opt_ds.config import Config
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.dvae.storage import load_store_dvae
from opt_ds.evaluation.during_training import check_experiments, figures_during_training
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.image_generation import ImageGenerator
from opt_ds.evaluation.image_grid import draw_image_grid
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import DVAE_FOLDER
from opt_ds.tasks.baselines import trivial_baselines
from opt_ds.training.callbacks import Callbacks, TrainingRun

_LOG = logging.getLogger(__name__)
_SHOWN = ("R@1", "wer", "bleu_4", "bits_per_code", "accuracy")  # printed; the other figures are in the files only


class EvaluationCallbacks(Callbacks):
    """Evaluates the model during training, as configured by `evaluate` and `train.image_grid`."""

    def __init__(self) -> None:
        self._baselines: dict[str, float] | None = None

    def check(self, config: Config, stores: Sequence[FeatureStore]) -> None:
        """Raise UserError if an experiment of `evaluate.experiments` cannot run on the first store."""
        check_experiments(config, stores[0])

    def reference_losses(self, run: TrainingRun) -> dict[str, float]:
        """Return each loss's trivial baseline. The baselines are computed once."""
        if self._baselines is None:
            is_main = run.group.ranks.is_main
            self._baselines = trivial_baselines(run.config, run.stores, run.plan.version) if is_main else {}
        return self._baselines

    def after_validation(self, run: TrainingRun) -> None:
        """Draw the image grid on rank 0. This is skipped at ZeRO stage 3, where one rank alone cannot run the model."""
        if not (run.group.ranks.is_main and run.config.train.image_grid and run.config.zero.stage < 3):
            return
        valid = run.config.data.valid_split
        store = next((store for store in run.stores if store.has_codes and store.has_pixels), None)
        if store is None or not (store.path / DVAE_FOLDER).is_dir():
            return
        evaluator = Evaluator(run.engine.module, run.config, store, run.group.device)
        if not evaluator.has_samples(valid, (TEXT, IMAGE)):
            return
        run.engine.eval()
        dvae = load_store_dvae(store.path, store.description).to(run.group.device)
        image = draw_image_grid(evaluator, ImageGenerator(dvae), valid, run.config.train.image_grid)
        run.report.image("valid/images", image, run.state.step)
        run.engine.train()

    def after_step(self, run: TrainingRun) -> None:
        """Run the experiments of `evaluate.experiments` if they are due, and report their figures.

        The experiments are distributed over the ranks.
        """
        options = run.config.evaluate
        if not (options.every_steps and run.is_due(options.every_steps)):
            return
        evaluator = Evaluator(run.engine.module, run.config, run.stores[0], run.group.device, run.group)
        figures = figures_during_training(evaluator, options, run.config.seed)
        run.engine.train()
        run.report.scalars(run.state.step, figures, "evaluate")
        _LOG.info(f"evaluation after step {run.state.step}, on {options.split}")
        for name, value in figures.items():
            if name.rpartition("/")[2] in _SHOWN:
                _LOG.info(f"  {name.removeprefix('evaluate/'):<50}{value:>9.4f}")
