"""MLM: −log P(t_m | t_\\m, V, A), of exactly the masked WordPieces."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from opt_ds.data.modalities import TEXT
from opt_ds.store import FeatureStore
from tests.tiny import make_config, make_model, make_packer, positions_of, read_samples


@pytest.mark.parametrize("name", ["complete", "ragged"])
def test_the_loss_is_its_formula(request: pytest.FixtureRequest, name: str) -> None:
    store = request.getfixturevalue(name)
    config = make_config(tasks={"sampling_weights": {"mlm": 0.7, "mvm": 0.3}}, batch={"size": 60})
    model, samples = make_model(config), read_samples(config, [store])
    batch = make_packer(config, [store]).pack(samples)
    head = model.mlm
    w = {name: value.detach().double() for name, value in head.named_parameters()}
    total, count, correct = 0.0, 0, 0
    with torch.no_grad():
        hidden, term = model.encode(batch.inputs).double(), model(batch)["mlm"]
    for sample, (_, places, _, _) in zip(samples, positions_of(samples), strict=True):
        for n in np.flatnonzero(sample.items[TEXT].masked) if "mlm" in sample.targets else []:
            h = F.gelu(w["transform.weight"] @ hidden[places[n]] + w["transform.bias"])
            h = (h - h.mean()) / torch.sqrt(h.var(unbiased=False) + head.norm.eps) * w["norm.weight"] + w["norm.bias"]
            scores = w["word.weight"] @ h + w["bias"]
            total -= torch.log(torch.exp(scores) / torch.exp(scores).sum())[sample.targets["mlm"][n]].item()
            correct += int(scores.argmax() == sample.targets["mlm"][n])
            count += 1
    assert count > 20 and term.count == count and term.metrics["correct"] == correct
    assert term.sum.item() == pytest.approx(total, rel=1e-5)
    assert term.sum.dtype == torch.float32


def test_the_head_shares_the_word_embedding(complete: FeatureStore) -> None:
    model = make_model(make_config())
    assert model.mlm.word.weight is model.embeddings.text.word.weight is model.text_decoder.word.weight


def test_bf16_scores_become_an_fp32_loss(complete: FeatureStore) -> None:
    config = make_config(tasks={"sampling_weights": {"mlm": 1.0}})
    model, samples = make_model(config), read_samples(config, [complete])
    batch = make_packer(config, [complete]).pack(samples)
    terms = model.bfloat16()(batch)
    assert all(term.sum.dtype == torch.float32 for term in terms.values())
