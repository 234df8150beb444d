"""Test generated images: the best candidate by match probability is kept; FID, CLIP score and the extractor's features.

The networks have random weights in the file formats of the real ones.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from opt_ds.data.modalities import IMAGE
from opt_ds.data.sample import Sample
from opt_ds.dvae.model import DVAE_PRESETS, DiscreteVAE
from opt_ds.errors import UserError
from opt_ds.evaluation import image_networks
from opt_ds.evaluation.evaluator import SUBSETS, Evaluator
from opt_ds.evaluation.image_generation import (
    ImageGenerator,
    bits_per_code,
    generation_figures,
    image_generation_lines,
    possible_inputs,
    to_image,
)
from opt_ds.evaluation.image_networks import ClipScore, check_inception, frechet_inception_distance
from opt_ds.evaluation.reranking import MatchingReranker
from opt_ds.model.generation import DecodingConfig
from tests.tiny import masked

SAMPLING = DecodingConfig(method="sample", temperature=1.0)


class Redness(MatchingReranker):
    """Prefers red images. Like the matching head, it requires text or audio."""

    def score(self, sample: Sample, image: Image.Image) -> float:
        return float(np.asarray(image)[..., 0].mean()) / 255


REDNESS = Redness(None)  # type: ignore[arg-type]  # it asks no model


@pytest.fixture(scope="module")
def dvae() -> DiscreteVAE:
    torch.manual_seed(0)
    return DiscreteVAE(DVAE_PRESETS["dvae-tiny"].model_copy(update={"codebook_size": 16})).eval()


@pytest.fixture(scope="module")
def inception(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """torch-fidelity's Inception-v3 with random weights."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=str(path))
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)  # or the deep layers see nothing
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of two thin layers, saved as Hugging Face saves one."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizerFast

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    words = {piece: number for number, piece in enumerate(pieces)}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    thin: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    text = {**thin, "vocab_size": len(words), "max_position_embeddings": 12, "eos_token_id": len(words) - 1}
    config = CLIPConfig(text_config=text, vision_config={**thin, "image_size": 32, "patch_size": 16}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"))
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_the_candidate_that_matches_best_is_kept(evaluator: Evaluator, dvae: DiscreteVAE) -> None:
    gallery = evaluator.samples_with("train", SUBSETS["T"], 3)
    samples = [evaluator.read(index, SUBSETS["T"]) for index in gallery]
    images, scores = ImageGenerator(dvae, SAMPLING, 5, REDNESS).generate(evaluator, samples)
    assert scores is not None and scores.shape == (3, 5)
    assert len(np.unique(scores)) > 5, "candidates are sampled again"
    kept = [REDNESS.score(sample, to_image(one)) for sample, one in zip(samples, images, strict=True)]
    assert kept == pytest.approx(scores.max(1))
    alone, none = ImageGenerator(dvae, SAMPLING).generate(evaluator, samples)
    assert none is None and alone.shape == (3, 3, 64, 64)
    assert REDNESS.score(samples[0], to_image(alone[0])) == pytest.approx(scores[0, 0]), (
        "the first candidate is the only one's"
    )


def test_an_input_that_cannot_be_compared_gets_a_single_image(evaluator: Evaluator, dvae: DiscreteVAE) -> None:
    samples = [evaluator.read(index, (IMAGE,)) for index in evaluator.samples_with("train", (IMAGE,), 2)]
    images, scores = ImageGenerator(dvae, SAMPLING, 5, REDNESS).generate(evaluator, samples)
    assert scores is None
    np.testing.assert_array_equal(images, ImageGenerator(dvae, SAMPLING).generate(evaluator, samples)[0])


@pytest.fixture(scope="module")
def guided(evaluator: Evaluator) -> Evaluator:
    """Return the same model as if it had been trained with dropped conditions."""
    tasks = evaluator.config.tasks
    modality = tasks.modality.model_copy(update={"condition_dropout": 0.1})
    config = evaluator.config.model_copy(update={"tasks": tasks.model_copy(update={"modality": modality})})
    return Evaluator(evaluator.model, config, evaluator.store)


def test_guidance_1_is_none_and_guidance_0_ignores_the_input(evaluator: Evaluator, guided: Evaluator) -> None:
    samples = [evaluator.read(index, SUBSETS["T+A"]) for index in evaluator.samples_with("train", SUBSETS["T+A"], 4)]
    codes = {scale: guided.write_codes(samples, SAMPLING.model_copy(update={"guidance": scale})) for scale in (0.0, 1.0, 3.0)}
    np.testing.assert_array_equal(codes[1.0], evaluator.write_codes(samples, SAMPLING))
    assert (codes[3.0] != codes[1.0]).any() and (codes[0.0] != codes[1.0]).any()
    nothing = guided.write_codes([Sample()] * 4, SAMPLING)
    np.testing.assert_array_equal(codes[0.0], nothing)


def test_guidance_of_a_model_that_always_had_an_input_is_refused(evaluator: Evaluator, dvae: DiscreteVAE) -> None:
    generator = ImageGenerator(dvae, SAMPLING.model_copy(update={"guidance": 2.0}))
    with pytest.raises(UserError, match=r"trained without dropped conditions \(tasks.modality.condition_dropout is 0\)"):
        generator.generate(evaluator, [Sample()])


def test_true_images_are_their_own_nearest_and_noise_is_not(evaluator: Evaluator, dvae: DiscreteVAE) -> None:
    class Copying(ImageGenerator):
        def generate(self, runner: Any, samples: Any) -> tuple[np.ndarray, None]:
            gallery = evaluator.samples_with("train", (0, 1), 20)
            return np.stack([evaluator.store.pixels(int(row)) for row in evaluator.store.rows[gallery, 1]]), None

    image_embedding = lambda image: np.asarray(image, dtype=np.float32).reshape(-1)  # noqa: E731
    copied = generation_figures(evaluator, "train", "T", Copying(dvae), 20, image_embedding=image_embedding)
    assert copied["nearest"]["R@1"] == 1.0 and copied["nearest"]["chance"]["R@1"] == pytest.approx(1 / 20)
    others = copied["nearest"]["figures"]["R@1"]["controls"]
    assert set(others) == {"chance", "another_text"} and others["another_text"]["value"] == 0, "they show other images"
    generated = generation_figures(
        evaluator, "train", "T", ImageGenerator(dvae, SAMPLING), 20, image_embedding=image_embedding
    )
    assert generated["nearest"]["R@1"] < 0.5


def test_the_distance_is_between_the_generated_and_the_true_images(inception: Path) -> None:
    """It is 0 if either is compared with itself; of torch-fidelity's own figure only that is ours."""
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64), dtype=np.uint8)
    assert frechet_inception_distance(images, images // 3, inception) > 0.01


def test_clip_score_is_the_cosine_of_transformers_own_embeddings(evaluator: Evaluator, dvae: DiscreteVAE, clip: Path) -> None:
    clip_score = ClipScore(clip)
    images = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64), dtype=np.uint8)
    found = clip_score.scores(images, ["a red heart", "a very long caption of more tokens than the model reads"])
    given = clip_score.processor(text=["a red heart"], images=[to_image(images[0])], return_tensors="pt")
    with torch.inference_mode():
        output = clip_score.model(**given)
    cosine = float(torch.nn.functional.cosine_similarity(output.image_embeds, output.text_embeds))
    assert found[0] == pytest.approx(100 * max(cosine, 0), abs=0.01) and found.shape == (2,)
    figures = generation_figures(evaluator, "train", "T+A", ImageGenerator(dvae, SAMPLING), 4, clip=clip)
    assert set(figures["clip_score"]) == {"generated", "true", "figures"}
    assert set(figures["clip_score"]["figures"]["generated"]["controls"]) == {"another_text", "another_audio"}
    assert json.loads(json.dumps(figures)) == figures


def test_what_is_no_network_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        check_inception(tmp_path / "nowhere.pth")
    (tmp_path / "bad.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="not the weights of torch-fidelity's Inception-v3"):
        check_inception(tmp_path / "bad.pth")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="not the weights"):
        check_inception(tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"no config\.json"):
        ClipScore(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"not a CLIP folder: model_type in its config\.json is 'bert'"):
        ClipScore(tmp_path)


def test_only_what_samples_have_is_generated_from(evaluator: Evaluator, without_audio: Evaluator) -> None:
    assert possible_inputs(evaluator, "valid") == ("T", "A", "T+A")
    assert possible_inputs(without_audio, "valid") == ("T",)
    with pytest.raises(UserError, match='no sample of split "valid" has an image and audio'):
        bits_per_code(without_audio, "valid", "A")
    imageless = Evaluator(evaluator.model, evaluator.config, masked(evaluator.store, IMAGE))
    with pytest.raises(UserError, match='no sample of split "valid" has an image and text or audio'):
        possible_inputs(imageless, "valid")


def test_match_probabilities_and_the_distance_have_controls(
    evaluator: Evaluator, dvae: DiscreteVAE, inception: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_networks, "frechet_inception_distance", lambda generated, true, weights: float(len(true)))
    found = generation_figures(
        evaluator, "valid", "T", ImageGenerator(dvae, SAMPLING, 2, REDNESS), 4, inception=inception
    )
    matching = found["matching"]["figures"]
    assert set(matching) == {"first", "kept"} and set(matching["kept"]["controls"]) == {"unmatched_image"}
    assert "no better than image generated for another sample" in matching["kept"]["verdicts"], "redness ignores the text"
    assert found["fid"] == 4 and set(found["figures"]["fid"]["controls"]) == {"training_images"}
    lines = image_generation_lines({"T": {**bits_per_code(evaluator, "valid", limit=4), "generated": found}})
    assert any("training images" in line for line in lines) and not any("not shown" in line for line in lines)
