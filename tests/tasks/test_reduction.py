"""`tasks.reduction`: a loss as the mean over items, the mean over samples of their sums, or between both."""

import math
from typing import Any

import pytest
import torch

from opt_ds.config import Config
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.data.step_plan import StepPlan
from opt_ds.store import FeatureStore
from opt_ds.tasks.base import total_loss
from opt_ds.training.metrics import TermSums
from tests.tiny import make_batches, make_config, make_model, make_packer

MATCHING = {"candidates": 3, "candidate_fraction": 0.5}


def config_of(reduction: str, **batch: Any) -> Config:
    tasks = {"reduction": reduction, "matching": MATCHING, "dir": {"weight": 2.0}}
    return make_config(tasks=tasks, batch={"size": 60, "max_tokens": 400, **batch})


def terms_by_sample(config: Config, store: FeatureStore, step_plan: StepPlan) -> dict[str, list[float]]:
    """Loss -> its sum for each sample that has terms of it, each read and run alone, candidates of one sample together."""
    reader, packer, model = SampleReader(config, [store]), make_packer(config, [store]), make_model(config)
    groups: dict[Any, list[int]] = {}
    for index, group in enumerate(step_plan.samples.columns["group"].tolist()):
        groups.setdefault(group if group >= 0 else -1 - index, []).append(index)
    found: dict[str, list[float]] = {loss: [] for loss in config.tasks.active_losses}
    with torch.no_grad():
        for members in groups.values():
            for loss, term in model(packer.pack([reader.read(step_plan.samples, i) for i in members])).items():
                if term.count:
                    found[loss].append(float(term.sum))
    return found


@pytest.mark.parametrize("name", ["complete", "ragged"])
def test_the_total_is_the_sum_of_each_sample_averaged_over_samples(request: pytest.FixtureRequest, name: str) -> None:
    store, config = request.getfixturevalue(name), config_of("sample")
    step_plan = PretrainingPlan(config, [store]).step(0)
    sums = terms_by_sample(config, store, step_plan)
    assert all(len(values) > 1 for values in sums.values())
    assert {loss: float(len(values)) for loss, values in sums.items()} == step_plan.divisors
    expected = sum(config.tasks.loss_weight(loss) * sum(values) / len(values) for loss, values in sums.items())
    model = make_model(config)
    for world_size, max_tokens in ((1, 100_000), (1, 300), (2, 300)):
        own = config_of("sample", max_tokens=max_tokens)
        plan = PretrainingPlan(own, [store]).step(0, world_size)
        ranks = make_batches(own, [store], plan)
        with torch.no_grad():
            parts = [total_loss(model(batch), plan.divisors, own.tasks, world_size) for rank in ranks for batch in rank]
        assert sum(map(float, parts)) / world_size == pytest.approx(expected, rel=1e-5)


def test_the_root_is_between_items_and_samples(complete: FeatureStore) -> None:
    item, root, sample = (PretrainingPlan(config_of(each), [complete]).step(0) for each in ("item", "root", "sample"))
    assert item.divisors == item.counts == root.counts == sample.counts
    for loss, count in item.counts.items():
        assert root.divisors[loss] == pytest.approx(math.sqrt(count * sample.divisors[loss]))
        assert count >= root.divisors[loss] >= sample.divisors[loss] > 0
    assert item.counts["dir"] == 64 * sample.divisors["dir"] and item.counts["matching"] == sample.divisors["matching"]


def test_the_logged_total_is_the_one_that_is_trained(complete: FeatureStore) -> None:
    """Over two steps of different numbers of items."""
    for reduction in ("item", "sample"):
        config = config_of(reduction)
        model, plan, sums, trained = make_model(config), PretrainingPlan(config, [complete]), TermSums(), []
        for step in range(2):
            step_plan = plan.step(step)
            for batch in make_batches(config, [complete], step_plan)[0]:
                with torch.no_grad():
                    terms = model(batch)
                sums.add(terms)
                trained.append(float(total_loss(terms, step_plan.divisors, config.tasks, 1)))
            sums.add_counts(step_plan.counts, step_plan.divisors)
        means = {loss: value for (loss, name), value in sums.means(sums.vector()).items() if name == "loss"}
        assert sums.weighted(means, config.tasks) == pytest.approx(sum(trained) / 2, rel=0.05)
