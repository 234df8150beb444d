"""Test MAM: regression, and the contrast of a masked frame's prediction with the unmasked frames of the utterance."""

import itertools
import math

import numpy as np
import pytest
import torch

from opt_ds.data.batch import PackedBatch
from opt_ds.data.modalities import AUDIO
from opt_ds.data.sample import Sample
from opt_ds.modalities.audio import AudioItems
from opt_ds.model.opt import OPT
from opt_ds.ops.sequences import Sequences
from opt_ds.store import FeatureStore
from opt_ds.tasks.mam import MamHead, MaskedFrames
from tests.tiny import make_config, make_model, make_packer, positions_of, read_samples


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_both_losses_are_their_formulas(ragged: FeatureStore, temperature: float) -> None:
    tasks = {"sampling_weights": {"mam": 0.7, "modality": 0.3}, "mac": {"temperature": temperature}}
    config = make_config(tasks=tasks, batch={"size": 60})
    model, samples = make_model(config), read_samples(config, [ragged])
    batch = make_packer(config, [ragged]).pack(samples)
    with torch.no_grad():
        hidden, terms = model.encode(batch.inputs).double().numpy(), model(batch)
    w = {name: value.detach().double().numpy() for name, value in model.mam.named_parameters()}
    error, contrast, count, correct = 0.0, 0.0, 0, 0
    for sample, (_, _, _, places) in zip(samples, positions_of(samples), strict=True):
        for m in np.flatnonzero(sample.items[AUDIO].masked) if "mam" in sample.targets else []:
            frames = sample.items[AUDIO].features.astype("float64")
            h = hidden[places[m]]
            error += np.square(w["regress.weight"] @ h + w["regress.bias"] - frames[m]).mean()
            prediction = w["contrast.weight"] @ h + w["contrast.bias"]
            candidates = [m, *np.flatnonzero(~sample.items[AUDIO].masked)]
            similar = [cosine(prediction, frames[k]) / temperature for k in candidates]
            contrast -= math.log(math.exp(similar[0]) / sum(math.exp(s) for s in similar))
            correct += max(similar) == similar[0]
            count += 1
    assert count > 15 and terms["mafr"].count == terms["mac"].count == count
    assert terms["mafr"].sum.item() == pytest.approx(error, rel=1e-5)
    assert terms["mac"].sum.item() == pytest.approx(contrast, rel=1e-5)
    assert terms["mac"].metrics["correct"] == correct


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def identity_head() -> MamHead:
    """A head whose prediction is the hidden state itself, so that the test chooses the cosines."""
    config = make_config(model={"audio_stack": 1, "audio_feature_dim": 16}).model
    head = MamHead(config, temperature=0.1)
    with torch.no_grad():
        head.contrast.weight.copy_(torch.eye(16))
        head.contrast.bias.zero_()
    return head


def contrast(
    hidden: torch.Tensor, frames: torch.Tensor, masked: torch.Tensor, lengths: list[int]
) -> tuple[float, float]:
    """MAC's (mean, count) for utterances of these lengths, hidden states [a, 16] lying where the frames do."""
    rows = torch.arange(len(frames))
    places = torch.cat([torch.arange(n) for n in lengths])
    counts = [int(part.sum()) for part in masked.split(lengths)]
    part = MaskedFrames(
        index=rows[masked], rows=rows[masked], places=places[masked], sequences=Sequences.from_lengths(counts),
        utterance_rows=rows, utterances=Sequences.from_lengths(lengths),
    )  # fmt: skip
    with torch.no_grad():
        term = identity_head()(hidden, part, frames, masked)["mac"]
    return term.sum.item() / term.count, term.count


def test_the_loss_falls_as_the_cosine_with_the_positive_rises() -> None:
    generator = torch.Generator().manual_seed(0)
    frames = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0][
        :6
    ]  # orthonormal, so that only one cosine moves
    masked = torch.tensor([False, False, True, False, False, False])
    elsewhere = torch.linalg.qr(torch.cat([frames, torch.randn(10, 16, generator=generator)]).T)[0][:, 10]
    losses = []
    for angle in np.linspace(math.pi, 0, 13):
        hidden = torch.zeros(6, 16)
        hidden[2] = 3.0 * (math.cos(angle) * frames[2] + math.sin(angle) * elsewhere)
        losses.append(contrast(hidden, frames, masked, [6])[0])
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[0] > 10 and losses[-1] < 0.01
    chance = math.log(6)
    hidden = torch.zeros(6, 16)
    hidden[2] = elsewhere
    assert contrast(hidden, frames, masked, [6])[0] == pytest.approx(chance, rel=1e-5), "equal candidates: log K"


def test_the_loss_rises_with_the_cosine_to_a_negative() -> None:
    frames = torch.eye(16)[:4]
    masked = torch.tensor([False, True, False, False])
    losses = []
    for share in (0.0, 0.5, 1.0, 2.0):
        hidden = torch.zeros(4, 16)
        hidden[1, 1], hidden[1, 3] = 1.0, share
        losses.append(contrast(hidden, frames, masked, [4])[0])
    assert losses == sorted(losses) and losses[-1] > losses[0] + 1


def mac_of(model: OPT, batch: PackedBatch, hidden: torch.Tensor) -> float:
    """MAC with the encoder's output held fixed, so that only the candidates can change it."""
    frames = model.embeddings.frame_standardizer(batch.inputs.parts[AUDIO].features)
    with torch.no_grad():
        return model.mam(hidden, batch.parts["mam"], frames, batch.inputs.parts[AUDIO].masked)["mac"].sum.item()


def frames_sample(count: int, masked: list[int], seed: int, index: int) -> Sample:
    rng = np.random.default_rng(seed)
    flags = np.zeros(count, dtype=bool)
    flags[masked] = True
    frames = rng.standard_normal((count, 12)).astype("float16")
    return Sample(index=index, items={AUDIO: AudioItems(frames, masked=flags)}, targets={"mam": True})


def test_the_candidates_are_the_own_frame_and_the_unmasked_frames_of_the_utterance(complete: FeatureStore) -> None:
    config = make_config()
    model, packer = make_model(config), make_packer(config, [complete])
    first, second = frames_sample(8, [2, 3], 0, 0), frames_sample(3, [0], 1, 1)
    # of a sample that is not used for MAM
    other = Sample(index=2, items={AUDIO: AudioItems(frames_sample(5, [], 2, 2).of(AUDIO).features)})
    batch = packer.pack([first, second, other])
    with torch.no_grad():
        hidden = model.encode(batch.inputs)
    before = mac_of(model, batch, hidden)

    def change(sample: Sample, frame: int) -> float:
        kept = sample.items[AUDIO].features.copy()
        sample.items[AUDIO].features[frame] = -3.0 * sample.items[AUDIO].features[frame] + 1.0
        after = mac_of(model, packer.pack([first, second, other]), hidden)
        sample.items[AUDIO].features = kept
        return after

    for sample, frame in ((first, 0), (first, 7), (second, 1), (second, 2)):
        assert change(sample, frame) != pytest.approx(before, rel=1e-4), "an unmasked frame is a negative"
    assert change(first, 2) != pytest.approx(before, rel=1e-4), "a masked frame is its own positive"
    assert all(change(other, frame) == before for frame in range(5)), "another utterance's frame is no candidate"

    alone = mac_of(model, packer.pack([first]), hidden) + mac_of(model, packer.pack([second]), hidden[9:])
    assert before == pytest.approx(alone, rel=1e-5), "padding to the longest utterance adds no candidate"


def test_a_masked_frame_is_no_negative_of_another() -> None:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(5, 16, generator=generator)
    masked = torch.tensor([True, True, False, False, False])
    hidden = frames.clone()  # frame 0's prediction is right, and frame 1's feature shall not matter to it
    own = []
    for twin in (frames[1], frames[0] * 2):
        changed = frames.clone()
        changed[1] = twin
        both = contrast(hidden, changed, masked, [5])[0] * 2
        prediction, candidates = hidden[1], changed[[1, 2, 3, 4]]
        similarity = torch.cosine_similarity(prediction[None], candidates) / 0.1
        own.append(both + torch.log_softmax(similarity, 0)[0].item())
    assert own[0] == pytest.approx(own[1], abs=1e-5)


def test_a_frame_without_negatives_adds_nothing() -> None:
    frames, masked = torch.eye(16)[:2], torch.tensor([True, True])
    mean, _ = contrast(-frames, frames, masked, [2])
    assert mean == 0.0


def test_zero_frames_stay_finite() -> None:
    frames = torch.zeros(4, 16)
    mean, count = contrast(torch.zeros(4, 16), frames, torch.tensor([True, False, False, False]), [4])
    assert count == 1 and mean == pytest.approx(math.log(4))
