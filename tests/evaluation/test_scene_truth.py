"""Test evaluation by the truth of scenes, with models that know the answer, that ignore their input, or that guess.

The corpus has real captions, negatives and images. Features are random numbers that tell the samples apart.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.sample import Sample
from opt_ds.dvae.model import DiscreteVAE, DVAEConfig
from opt_ds.errors import UserError
from opt_ds.evaluation import scene_images
from opt_ds.evaluation.evaluator import Evaluator
from opt_ds.evaluation.figures import FIGURES
from opt_ds.evaluation.scene_images import judge_images
from opt_ds.evaluation.scene_negatives import ALL_KINDS, preferences
from opt_ds.evaluation.scene_texts import judge_texts, truest_caption
from opt_ds.evaluation.scene_truth import SampleCounts, SceneTruth, scene_lines
from opt_ds.model.generation import DecodingConfig, image_decoding
from opt_ds.scenes.checker import for_checking
from opt_ds.scenes.drawing import draw
from opt_ds.scenes.negatives import NEGATIVES
from opt_ds.scenes.records import SceneRecord, read_truth, truth_lines
from opt_ds.scenes.sampling import COMPOSITION, TRAIN
from opt_ds.serving.report_tables import scene_tables
from opt_ds.store import FeatureStore
from tests.evaluation.scene_store import CODEBOOK, SAMPLES, make_records, open_model, write_store
from tests.tiny import masked


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The truth file, with the store next to it."""
    folder, records = tmp_path_factory.mktemp("scenes"), make_records()
    path = folder / "truth.jsonl"
    path.write_text("".join(truth_lines(records)))
    write_store(folder / "store", records)
    return path


@pytest.fixture(scope="module")
def tiny(truth: Path) -> Evaluator:
    return open_model(FeatureStore(truth.with_name("store")))


def dvae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(DVAEConfig(codebook_size=CODEBOOK, encoder_width=4, encoder_blocks=0, decoder_width=4, decoder_blocks=0))


def measured(evaluator: Evaluator, truth: Path, **counts: Any) -> dict[str, Any]:
    scenes = SceneTruth(evaluator, truth, dvae, options=DecodingConfig())
    figures = scenes.measure(COMPOSITION, SampleCounts(**{"probe": 0, **counts}))
    json.dumps(figures, allow_nan=False)
    return figures


class Known:
    """What is known of the samples, found by their image or audio features, or by the tokens of their captions."""

    def __init__(self, evaluator: Evaluator, truth: Path) -> None:
        self.by_content: dict[bytes, SceneRecord] = {}
        self.tokens: dict[str, np.ndarray] = {}
        records = read_truth(truth)
        for index in evaluator.store.split_samples(COMPOSITION):
            record = records[evaluator.store.sample_id(int(index))]
            sample = evaluator.read(index, (TEXT, IMAGE, AUDIO))
            self.tokens[record.id] = sample.of(TEXT).ids
            for content in (sample.of(TEXT).ids, sample.of(IMAGE).features, sample.of(AUDIO).features):
                self.by_content[content.tobytes()] = record

    def record(self, sample: Sample, modalities: tuple[int, ...] = (AUDIO, IMAGE)) -> SceneRecord | None:
        """The record of the first of these modalities that a sample has."""
        for modality in (modality for modality in modalities if modality in sample.items):
            items = sample.of(modality)
            return self.by_content.get((items.ids if modality == TEXT else items.features).tobytes())
        return None


def control(row: dict[str, Any], name: str, key: str) -> float:
    return row[FIGURES][name]["controls"][key]["value"]


def writes(monkeypatch: pytest.MonkeyPatch, text_of: Callable[[Sample], str]) -> None:
    monkeypatch.setattr(Evaluator, "write_text", lambda self, samples, options: [text_of(sample) for sample in samples])


# ---- generated texts


@pytest.mark.parametrize("which", [0, 1, 3], ids=["caption", "paraphrase", "another paraphrase"])
def test_the_truth_in_any_words_is_complete(
    tiny: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    known = Known(tiny, truth)
    writes(monkeypatch, lambda sample: known.record(sample).captions[which])  # type: ignore[union-attr]
    figures = measured(tiny, truth, generate=0)
    for name in ("I", "A", "A+I"):
        row = figures["texts"][name]
        assert row["complete"] == row["true"] == 1 and row["outside_grammar"] == 0 and row["samples"] == SAMPLES[COMPOSITION]
        assert control(row, "complete", "constant_caption") < 0.1
    assert control(figures["texts"]["I"], "complete", "another_image") < 0.1
    assert not figures["texts"]["I"][FIGURES]["complete"]["verdicts"]
    # The stub hears and does not look.
    assert figures["texts"]["A+I"][FIGURES]["complete"]["verdicts"] == ["does not use its input (image)"]


def test_a_writer_of_one_caption_is_exposed(tiny: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    constant = truest_caption(read_truth(truth).values(), 1)
    assert constant is not None
    writes(monkeypatch, lambda sample: constant)
    figures = measured(tiny, truth, generate=0)
    row = figures["texts"]["I"]
    for name in ("complete", "true"):
        assert row[name] == control(row, name, "constant_caption") < 0.5
        assert row[FIGURES][name]["verdicts"] == ["does not use its input (image)", "no better than one caption for all"]
    assert any("does not use its input (image)" in line for line in scene_lines(figures))


def test_a_negative_is_never_true_and_nonsense_is_outside_the_grammar(truth: Path) -> None:
    records = [record for record in read_truth(truth).values() if record.negatives]
    for kind in NEGATIVES:
        own = [record for record in records if kind in record.negatives]
        judged = judge_texts([record.negatives[kind] for record in own], [record.scene.graph for record in own])
        assert own and judged["true"].value == judged["complete"].value == 0, kind
    assert judge_texts(["[UNK] left", ""], [record.scene.graph for record in records[:2]])["true"].value == 0


def test_the_constant_caption_is_from_training_alone(truth: Path) -> None:
    records = read_truth(truth)
    assert truest_caption(records.values(), 1) in {
        record.captions[0] for record in records.values() if record.split == TRAIN
    }
    assert truest_caption([record for record in records.values() if record.split != TRAIN], 1) is None


# ---- hard negatives


def scores_by(
    monkeypatch: pytest.MonkeyPatch, evaluator: Evaluator, score: Callable[[Sample, np.ndarray], float]
) -> None:
    """Let both the text decoder and the matching head of a model score a text of a sample by this function."""

    def likelihoods(
        samples: list[Sample], texts: list[np.ndarray], wanted: list[np.ndarray]
    ) -> list[np.ndarray]:
        return [
            np.array([score(sample, texts[place]) for place in places])
            for sample, places in zip(samples, wanted, strict=True)
        ]

    def matches(samples: list[Sample]) -> np.ndarray:
        return np.repeat([[score(sample, sample.of(TEXT).ids)] for sample in samples], 5, axis=1)

    monkeypatch.setattr(evaluator, "text_log_likelihood_of", likelihoods)
    monkeypatch.setattr(evaluator, "matching_scores", matches)


def test_the_truth_is_preferred_to_every_negative(
    tiny: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(tiny, truth)

    def is_caption(sample: Sample, ids: np.ndarray) -> float:
        record = known.record(sample)
        return float(record is not None and np.array_equal(known.tokens[record.id], ids))

    writes(monkeypatch, lambda sample: "")
    scores_by(monkeypatch, tiny, is_caption)
    figures = measured(tiny, truth, generate=0)
    for name, other in (("I", "another_image"), ("A", "another_audio")):
        for score in ("likelihood", "matching"):
            row = figures["negatives"][name][score]
            assert set(row["pairs"]) == {ALL_KINDS, *NEGATIVES} and min(row["pairs"].values()) > 0
            assert row["pairs"][ALL_KINDS] == sum(row["pairs"][kind] for kind in NEGATIVES)
            for kind in row["pairs"]:
                assert row[kind] == 1 and control(row, kind, "chance") == control(row, kind, other) == 0.5
                assert ("no_input" in row[FIGURES][kind]["controls"]) == (score == "likelihood")
                assert {"untrained_model", "bag_of_words"} <= set(row[FIGURES][kind]["controls"])
                assert not row[FIGURES][kind]["verdicts"]
            assert control(row, "swapped", "bag_of_words") == 0.5, "the same words"
        assert control(figures["negatives"][name]["likelihood"], "swapped", "no_input") == 0.5
        assert figures["negatives"][name]["indistinguishable"] == 0


def test_a_bag_of_words_is_at_chance_for_the_order(
    tiny: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = np.random.default_rng(0).standard_normal(tiny.config.model.vocab_size)
    writes(monkeypatch, lambda sample: "")
    scores_by(monkeypatch, tiny, lambda sample, ids: float(weights[np.sort(ids)].sum()))
    figures = measured(tiny, truth, generate=0)
    for score in ("likelihood", "matching"):
        row = figures["negatives"]["I"][score]
        assert row["swapped"] == 0.5 and 0.2 < row["colours"] < 0.8
        assert "does not use its input (image)" in row[FIGURES]["swapped"]["verdicts"]
        assert "no better than chance" in row[FIGURES]["swapped"]["verdicts"]
        assert "does not use its input (image)" in row[FIGURES]["object"]["verdicts"]


def test_ties_and_equal_tokens_count_half() -> None:
    a, b = np.array([1, 2]), np.array([1, 3])
    parts = preferences([np.array([2.0, 1.0, 2.0]), np.array([1.0, 0.5]), np.array([np.nan, 1.0])],
                        [[a, b, b], [a, a], [a, b]], [["count", "object"], ["count"], ["count"]])  # fmt: skip
    assert parts["count"].tolist() == [[1, 1], [0.5, 1], [0, 1]]
    assert parts["object"].tolist() == [[0.5, 1], [0, 0], [0, 0]]
    assert parts[ALL_KINDS].sum(0).tolist() == [2, 4]


# ---- generated images


def paints(monkeypatch: pytest.MonkeyPatch, image_of: Callable[[Sample], np.ndarray]) -> None:
    def generate(runner: Any, dvae: Any, samples: list[Sample], options: Any, count: int) -> np.ndarray:
        return np.stack([image_of(sample) for sample in samples])[:, None]

    monkeypatch.setattr(scene_images, "generate_candidates", generate)


def pixels_of(record: SceneRecord) -> np.ndarray:
    return for_checking(draw(record.scene)).transpose(2, 0, 1)


def test_a_painter_of_the_truth_is_right_as_often_as_the_true_image(
    tiny: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Known(tiny, truth)
    writes(monkeypatch, lambda sample: "")
    paints(monkeypatch, lambda sample: pixels_of(known.record(sample, (TEXT, AUDIO))))  # type: ignore[arg-type]
    figures = measured(tiny, truth, limit=2, generate=8)
    images = figures["images"]
    assert list(images) == ["T", "A", "T+A", "reconstruction", "true"]
    for name in ("T", "A", "T+A", "true"):
        assert {images[name][verdict] for verdict in images[name][FIGURES]} == {1.0}, name
    for name, other in (("T", "another_text"), ("A", "another_audio"), ("true", "another_image")):
        assert control(images[name], "whole", other) < 0.1 and control(images[name], "objects", other) < 0.2
        assert not images[name][FIGURES]["whole"]["verdicts"]
    assert images["T+A"][FIGURES]["whole"]["verdicts"] == ["does not use its input (audio)"]
    assert images["reconstruction"]["whole"] == 0, "this dVAE has not learned anything"


def test_a_painter_of_one_image_is_exposed(tiny: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = pixels_of(next(iter(read_truth(truth).values())))
    writes(monkeypatch, lambda sample: "")
    paints(monkeypatch, lambda sample: one)
    row = measured(tiny, truth, limit=2, generate=8)["images"]["T"]
    for verdict in ("whole", "ground", "layout", "objects"):
        assert row[verdict] == control(row, verdict, "another_text") < 0.9, verdict
        assert row[FIGURES][verdict]["verdicts"] == ["does not use its input (text)"], verdict


def test_what_is_not_asked_for_is_not_judged(truth: Path) -> None:
    record = next(record for record in read_truth(truth).values() if all(group.colour for group in record.scene.graph.groups))
    graph = record.scene.graph
    plain = graph
    for place in range(len(graph.groups)):
        plain = plain.with_group(place, colour=None)
    assert judge_images([graph], [graph])["colour"].tolist() == [[1, 1]]
    assert judge_images([graph], [plain])["colour"].tolist() == [[0, 0]]


# ---- the whole


def test_an_untrained_model_is_measured_and_reported(tiny: Evaluator, truth: Path, logged: list[str]) -> None:
    figures = measured(tiny, truth, limit=8, generate=2)
    assert figures["skipped"] == {} and figures["split"] == COMPOSITION
    assert figures["texts"]["I"]["true"] == 0 and figures["images"]["true"]["whole"] == 1
    again = measured(tiny, truth, limit=8, generate=2)
    assert again == figures, "the same seed gives the same figures"
    parts = [line.split(" measured")[0].removeprefix(f"note: {COMPOSITION}: ") for line in logged[:3]]
    assert parts == ["texts", "negatives", "images"]
    lines = "\n".join(scene_lines(figures))
    for part in ("image→text, text likelihood, swapped", "audio→text, matching head", "no input", "another sample's text",
                 "true image, whole", "dVAE of the true image, objects", "one caption for all"):  # fmt: skip
        assert part in lines, part
    tables = scene_tables({"scenes": figures})
    assert [table.columns for table in tables] == [("complete", "true"), ("preferred",), ("right",)]
    assert all(block.controls for table in tables[:2] for block in table.blocks)


def test_what_the_model_cannot_do_is_skipped_and_said_once(truth: Path) -> None:
    store = FeatureStore(truth.with_name("store"))
    figures = measured(open_model(store, dtr={"weight": 0}, dir={"weight": 0}), truth, limit=4)
    assert figures["skipped"] == {
        "texts": "the model was trained without dtr", "negatives, likelihood": "the model was trained without dtr",
        "images": "the model was trained without dir",
    }  # fmt: skip
    assert "texts" not in figures and "images" not in figures and "matching" in figures["negatives"]["I"]
    assert sum("the model was trained without dir" in line for line in scene_lines(figures)) == 1
    cannot = open_model(store, dtr={"weight": 0}, dir={"weight": 0}, matching={"weight": 0})
    with pytest.raises(UserError, match=r"nothing can be measured .*trained without dtr"):
        measured(cannot, truth)


def test_a_store_without_images(tiny: Evaluator, truth: Path) -> None:
    without = Evaluator(tiny.model, tiny.config, masked(tiny.store, IMAGE))
    figures = measured(without, truth, limit=4)
    assert [name for name in ("I", "A", "A+I") if name in figures["texts"]] == ["A"]
    assert list(figures["negatives"]) == ["A"] and "images" not in figures
    assert figures["skipped"] == {"images": f'no sample of split "{COMPOSITION}" has an image'}


def test_a_truth_file_of_other_samples_is_refused(tiny: Evaluator, truth: Path, tmp_path: Path) -> None:
    lines = truth.read_text().splitlines(keepends=True)
    other = tmp_path / "truth.jsonl"
    other.write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r'truth\.jsonl: it has no sample "\d{12}", which split "test_composition"'):
        measured(tiny, other)
    last = json.loads(lines[-1])
    last["captions"][0] = "a cat"
    other.write_text("".join([*lines[:-1], json.dumps(last)]))
    with pytest.raises(UserError, match=r"the caption of sample .* is not that of the store: give the truth\.jsonl"):
        measured(tiny, other)
    other.unlink()
    with pytest.raises(UserError, match="no such file"):
        measured(tiny, other)


@pytest.mark.parametrize("temperature", [0.01, 5.0])
def test_images_are_sampled_with_the_given_options(
    tiny: Evaluator, truth: Path, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    asked: list[DecodingConfig] = []
    real = Evaluator.write_codes

    def note(self: Evaluator, samples: list[Sample], options: DecodingConfig) -> np.ndarray:
        asked.append(options)
        return real(self, samples, options)

    monkeypatch.setattr(Evaluator, "write_codes", note)
    sampling = image_decoding(top_k=7, top_p=0.5, temperature=temperature, seed=99)
    rows = SceneTruth(tiny, truth, dvae, seed=3, sampling=sampling).measure(COMPOSITION, SampleCounts(2, 0, 2))["images"]
    assert asked and {(one.top_k, one.top_p, one.temperature) for one in asked} == {(7, 0.5, temperature)}
    assert rows["T"]["sampling"] == sampling.model_copy(update={"seed": 3}).model_dump()
