"""Experiment: accuracy of a model that was fine-tuned for visual question answering."""

from pathlib import Path
from typing import Any

from opt_ds.abilities import LABEL
from opt_ds.data.modalities import IMAGE, TEXT
from opt_ds.errors import UserError
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.experiments import Experiment, Request
from opt_ds.evaluation.predictions import Row, check_files, write_evalai, write_rows
from opt_ds.evaluation.question_kinds import question_kinds
from opt_ds.evaluation.vqa import has_answers, vqa, vqa_lines, vqa_without_answers
from opt_ds.training.checkpoint import load_model
from opt_ds.training.preflight import check_store
from opt_ds.training.run_folder import fixed_settings

#: Settings in which the run of the control differs from the evaluated one.
_OF_THE_CONTROL = ("finetune.untrained", "finetune.weights_sha256", "seed")


class Vqa(Experiment):
    """See `opt_ds.evaluation.vqa`."""

    ability_in_training = LABEL
    modalities = ((TEXT, IMAGE),)

    def measure(
        self, request: Request, *, limit: int | None, untrained: Path | None, annotations: list[Path] | None,
        predictions: Path | None, evalai: Path | None,
    ) -> dict[str, Any]:  # fmt: skip
        """Return the figures of `vqa`, over all questions and by kind of question.

        Args:
            request: The model, the store and the split.
            limit: Maximum number of questions. None: all.
            untrained: Run of `opt-ds finetune vqa --untrained`, a control. None: no such control.
            annotations: Files with the types of the questions. None: the kinds of the corpus `scenes`, by the text.
            predictions: File of the predictions, as JSON Lines. None: none is written.
            evalai: File of the answers for EvalAI's server. None: none is written.

        Raises:
            UserError: The split has no answers and no file for the model's answers is given; or `evalai` would lack
                questions.
        """
        check_files(request.output, {"--predictions": predictions, "--evalai": evalai})
        evaluator, rows = request.evaluator, list[Row]()
        if evalai is not None:
            _require_all_questions(evaluator, request.split, limit)
        if (evalai or predictions) and evaluator.labels_are_answers and not has_answers(evaluator, request.split):
            found = vqa_without_answers(evaluator, request.split, rows, limit=limit, seed=request.seed)
            write_rows(predictions, rows, evaluator.is_main)
            write_evalai(evalai, rows, evaluator.is_main)
            return found
        control = open_untrained(evaluator, untrained) if untrained and evaluator.labels_are_answers else None
        kinds = question_kinds(evaluator, request.split, annotations or ())
        found = vqa(
            evaluator, request.split, limit=limit, seed=request.seed, kinds=kinds, untrained=control, predictions=rows
        )
        write_rows(predictions, rows, evaluator.is_main)
        write_evalai(evalai, rows, evaluator.is_main)
        return found

    def measure_in_training(self, evaluator: Evaluator, split: str, limit: int, seed: int) -> dict[str, Any]:
        """Return the figures of `vqa`."""
        return vqa(evaluator, split, limit=limit, seed=seed)

    def table(self, figures: dict[str, Any]) -> str:
        """Return the accuracies with their controls and upper bounds."""
        return "\n".join(vqa_lines(figures))


def _require_all_questions(evaluator: Evaluator, split: str, limit: int | None) -> None:
    """Raise UserError if not all questions of the split are answered, because EvalAI's server takes complete files only."""
    if limit is not None:
        raise UserError("--evalai: EvalAI takes the answers to all questions of a split: leave out --limit")
    asked, answered = (len(evaluator.samples_with(split, kinds)) for kinds in ((TEXT,), (TEXT, IMAGE)))
    if answered < asked:
        raise UserError(
            f'--evalai: EvalAI takes the answers to all questions of a split, but {asked - answered} of {asked} of split '
            f'"{split}" have no image in {evaluator.store.path}: prepare it with all images'
        )


def open_untrained(evaluator: Evaluator, path: Path) -> Evaluator:
    """Return an evaluator of a model that was fine-tuned like the evaluated one, from random weights.

    Raises:
        UserError: The run is no such control: it started from a checkpoint, or it was trained in another way.
    """
    model, config = load_model(path, evaluator.device)
    if config.finetune is None or not config.finetune.untrained:
        raise UserError(f"--untrained {path}: this run is no control: name one of opt-ds finetune vqa --untrained")
    check_store(config, evaluator.store)
    own, its = (
        fixed_settings(each, [evaluator.store]) | {"train.max_steps": each.max_steps}
        for each in (evaluator.config, config)
    )
    for key in sorted({*own, *its}):
        if own.get(key) != its.get(key) and key not in _OF_THE_CONTROL:
            raise UserError(
                f"--untrained {path}: it was not trained in the same way ({key} is {its.get(key)}, not {own.get(key)}): "
                "train it with the options of the evaluated run and --untrained"
            )
    return Evaluator(model, config, evaluator.store, evaluator.device, evaluator.group)


EXPERIMENT = Vqa()
