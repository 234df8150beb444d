"""Test modality-level reconstruction: the complete text with its end, all 64 codes, each conditioned on those before it."""

import numpy as np
import pytest
import torch

from opt_ds.nn.inputs import DecoderBatch
from opt_ds.ops.sequences import Sequences
from opt_ds.store import FeatureStore
from opt_ds.tasks.reconstruct import code_targets
from tests.tiny import make_config, make_model, make_packer, read_samples, written


@pytest.mark.parametrize("always_drop_target", [False, True])
@torch.no_grad()
def test_both_losses_are_their_formulas(ragged: FeatureStore, always_drop_target: bool) -> None:
    """Return scores of one sample and one item at a time, each from a decoder that has seen only the items before it."""
    options = {"sampling_weights": {"modality": 0.8, "mlm": 0.2}, "modality": {"always_drop_target": always_drop_target}}
    config = make_config(tasks=options, batch={"size": 14})
    model, packer = make_model(config), make_packer(config, [ragged])
    samples = read_samples(config, [ragged])
    terms = model(packer.pack(samples))
    sep = ragged.description.tokenizer.sep_id
    for loss, name, begin, end, decoder in (
        ("dtr", "text", ragged.description.tokenizer.cls_id, [sep], model.text_decoder),
        ("dir", "codes", -1, [], model.image_decoder),
    ):
        total, count, correct = 0.0, 0, 0
        for sample in samples:
            items = getattr(written(sample), name)
            if items is None:
                continue
            hidden = model.encode(packer.pack([sample]).inputs)
            targets = [*items.tolist(), *([] if loss == "dtr" and not written(sample).text_ends else end)]
            for n in range(0, len(targets), 9 if loss == "dir" else 1):
                scores = last_scores(decoder, [begin, *targets[:n]], hidden).double().numpy()
                total -= scores[targets[n]] - np.log(np.exp(scores).sum())
                correct += int(scores.argmax() == targets[n])
                count += 1
        if loss == "dtr":
            assert terms[loss].count == count > 10 and terms[loss].metrics["correct"] == correct
            assert terms[loss].sum.item() == pytest.approx(total, rel=1e-5)
        else:  # every ninth code, compared with the same codes of the packed pass
            batch = packer.pack(samples)
            packed = model.image_decoder.scores(code_targets(batch), model.encode(batch.inputs))
            losses = -torch.log_softmax(packed.double(), -1).gather(1, code_targets(batch).target_ids[:, None])[:, 0]
            assert losses.unflatten(0, (-1, 64))[:, ::9].sum().item() == pytest.approx(total, rel=1e-5)
            assert terms[loss].sum.item() == pytest.approx(losses.sum().item(), rel=1e-5)
            assert terms[loss].count == len(losses) == 64 * sum(written(s).codes is not None for s in samples)


def last_scores(decoder: torch.nn.Module, ids: list[int], hidden: torch.Tensor) -> torch.Tensor:
    items = DecoderBatch(
        input_ids=torch.tensor(ids), target_ids=torch.zeros(len(ids), dtype=torch.long),
        positions=torch.arange(len(ids)), sequences=Sequences.from_lengths([len(ids)]),
        memory_index=torch.arange(len(hidden)), memory=Sequences.from_lengths([len(hidden)]),
    )  # fmt: skip
    return decoder.scores(items, hidden)[-1]
