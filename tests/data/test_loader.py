"""The loader: the same micro-batches whatever the threads, bounded look-ahead, errors that arrive, no hanging."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from opt_ds.data.batch import PackedBatch
from opt_ds.data.loader import MicroBatchLoader
from opt_ds.data.modalities import AUDIO, IMAGE, TEXT
from opt_ds.data.pretraining_plan import PretrainingPlan
from opt_ds.data.samples import SampleReader
from opt_ds.store import FeatureStore
from tests.tiny import make_batches, make_config

CPU = torch.device("cpu")


@pytest.fixture
def loaders() -> Iterator[list[MicroBatchLoader]]:
    made: list[MicroBatchLoader] = []
    yield made
    for loader in made:
        loader.close()


def make_loader(loaders: list, store: FeatureStore, rank: int = 0, world_size: int = 1, **data) -> MicroBatchLoader:
    config = make_config(data=data, batch={"size": 40})
    loaders.append(MicroBatchLoader(PretrainingPlan(config, [store]), rank, world_size, CPU))
    return loaders[-1]


def same(a: PackedBatch, b: PackedBatch) -> bool:
    pairs = [(a.inputs.parts[TEXT].ids, b.inputs.parts[TEXT].ids),
             (a.inputs.parts[AUDIO].features, b.inputs.parts[AUDIO].features),
             (a.inputs.parts[IMAGE].masked, b.inputs.parts[IMAGE].masked), (a.inputs.gather_index, b.inputs.gather_index),
             (a.parts["modality"].image.target_ids, b.parts["modality"].image.target_ids),
             (a.parts["matching"].labels, b.parts["matching"].labels)]  # fmt: skip
    return a.sample_names == b.sample_names and all(torch.equal(x, y) for x, y in pairs)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_planned_micro_batches_arrive_in_order(loaders: list, ragged: FeatureStore, workers: int) -> None:
    loader = make_loader(loaders, ragged, rank=1, world_size=2, workers=workers, prefetch_batches=5)
    plan = loader.plan
    for step, (step_plan, batches) in enumerate(loader.steps(3, 7), start=3):
        expected = make_batches(plan.config, [ragged], plan.step(step, 2))[1]
        got = list(batches)
        assert step_plan.step == step and len(got) == len(expected)
        assert all(same(a, b) for a, b in zip(got, expected, strict=True))
    assert step == 6
    passes = [[b for _, batches in loader.validation(10) for b in batches] for _ in range(2)]
    assert passes[0] and all(same(a, b) for a, b in zip(*passes, strict=True))


def test_an_abandoned_iterator_does_not_hang(loaders: list, ragged: FeatureStore) -> None:
    loader = make_loader(loaders, ragged, workers=2)
    steps = loader.steps(0, 1000)
    _, batches = next(steps)
    next(batches)
    steps.close()
    for step_plan, batches in loader.steps(5, 6):  # and the loader still serves
        assert step_plan.step == 5 and list(batches)
    closing = threading.Thread(target=loader.close)
    closing.start()
    closing.join(timeout=10)
    assert not closing.is_alive()


def test_look_ahead_is_bounded(loaders: list, ragged: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(loaders, ragged, workers=3, prefetch_batches=3)
    made = []
    make = loader._make
    monkeypatch.setattr(loader, "_make", lambda *arguments: (made.append(1), make(*arguments))[1])
    taken = 0
    for _, batches in loader.steps(0, 4):
        for _ in batches:
            taken += 1
            time.sleep(0.02)
            assert len(made) <= taken + 3
    assert len(made) == taken


def test_an_error_in_a_worker_reaches_the_caller(loaders: list, ragged: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(loaders, ragged, workers=2)

    def fail(*_: object) -> None:
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader._reader, "read", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        for _, batches in loader.steps(0, 2):
            list(batches)


def test_waiting_for_data_is_measured(loaders: list, ragged: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(loaders, ragged)
    make = loader._make
    monkeypatch.setattr(loader, "_make", lambda *arguments: (time.sleep(0.02), make(*arguments))[1])
    count = sum(len(list(batches)) for _, batches in loader.steps(0, 2))
    assert loader.wait_s > 0.015 * count


def test_planning_and_reading_ahead_stay_bounded(loaders: list, ragged: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the consumer sleeps at its first micro-batch: no more than the limit and one micro-batch is asked for."""
    asked: list[int] = []
    read_ahead = SampleReader.read_ahead

    def counted(reader: SampleReader, step_plan, indices) -> int:
        asked.append(read_ahead(reader, step_plan, indices))
        return 2**19  # as if every micro-batch had half a mebibyte

    monkeypatch.setattr(SampleReader, "read_ahead", counted)
    loader = make_loader(loaders, ragged, prefetch_batches=1, read_ahead_mib=2)
    steps = loader.steps(0, 1000)
    _, batches = next(steps)
    next(batches)
    consumed, packed, limit = 1, 1, 4  # packed: if it was planned before the consumer went to sleep
    deadline = time.monotonic() + 60
    while len(asked) < consumed + limit and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # time enough to go too far
    assert consumed + limit <= len(asked) <= consumed + packed + limit
    assert all(size > 0 for size in asked)
    steps.close()


def test_without_reading_ahead_the_batches_are_the_same(loaders: list, ragged: FeatureStore) -> None:
    with_it, without = (make_loader(loaders, ragged, read_ahead_mib=limit) for limit in (1, 0))
    ours, theirs = ([b for _, batches in loader.steps(0, 3) for b in batches] for loader in (with_it, without))
    assert len(ours) == len(theirs) and all(same(a, b) for a, b in zip(ours, theirs, strict=True))


def test_later_steps_are_planned_while_one_is_trained(
    loaders: list, ragged: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = make_loader(loaders, ragged, prefetch_batches=1)
    step, third = loader.plan.step, threading.Event()
    monkeypatch.setattr(loader.plan, "step", lambda number, world: (third.set() if number == 3 else None, step(number, world))[1])
    steps = loader.steps(0, 5)
    _, batches = next(steps)
    next(batches)
    assert third.wait(60)  # this thread, which trains, does nothing
    steps.close()


def test_an_error_in_the_plan_reaches_the_caller(loaders: list, ragged: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make_loader(loaders, ragged)
    step = loader.plan.step

    def fail(number: int, world_size: int):
        if number == 2:
            raise OSError("the disk is gone")
        return step(number, world_size)

    monkeypatch.setattr(loader.plan, "step", fail)
    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        for step_plan, batches in loader.steps(0, 5):
            seen.append((step_plan.step, len(list(batches))))
    assert [number for number, count in seen if count] == [0, 1]
