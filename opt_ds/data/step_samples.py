"""A step's samples as arrays: their indices, tasks and inputs, and what the tasks decided about them.

Legend: B samples of a step; M modalities of the model.
"""

from dataclasses import dataclass, fields

import numpy as np

from opt_ds.data.modalities import TEXT

#: Column of samples that must be in one micro-batch: those of one group have the same number, all others -1. The column is
#: absent if no task of the run has copies (`DataTask.most_copies`).
GROUP = "group"
VALIDATION_EPOCH = 2**40  # no training run reaches this epoch, so its hashes are distinct


@dataclass(frozen=True)
class StepSamples:
    """Arrays of length B. Rows are global rows of the sample's store; -1: absent."""

    epoch: np.ndarray  # int64
    store: np.ndarray  # int64, index into the run's stores
    sample: np.ndarray  # int64, index into the store
    task: np.ndarray  # int8, index into the plan's tasks; -1: no task can use this sample
    source_rows: np.ndarray  # int64 [B, M], the sample's own rows
    input_rows: np.ndarray  # int64 [B, M], after dropping and replacing
    input_lengths: np.ndarray  # int64 [B, M], items after truncation and stacking
    columns: dict[str, np.ndarray]  # columns of the tasks (`DataTask.columns`)

    def __len__(self) -> int:
        return len(self.task)

    def input_positions(self) -> np.ndarray:
        """Return the number of encoder positions, int64 [B]: [CLS] and the items, and [SEP] if there is text."""
        positions = self.input_rows[:, TEXT] >= 0
        positions = positions + sum(self.input_lengths.T)
        positions += 1
        return positions

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name. The name of a task's column is "columns/<name>"."""
        own = {name: getattr(self, name) for name in FIELDS}
        return own | {f"{_COLUMNS}{name}": array for name, array in self.columns.items()}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "StepSamples":
        """Return the samples for the result of `arrays`."""
        columns = {name.removeprefix(_COLUMNS): array for name, array in arrays.items() if name.startswith(_COLUMNS)}
        return cls(**{name: arrays[name] for name in FIELDS}, columns=columns)


_COLUMNS = "columns/"
FIELDS = tuple(field.name for field in fields(StepSamples) if field.name != "columns")


def concatenate(parts: list[StepSamples]) -> StepSamples:
    """Return the samples of all parts, concatenated."""
    arrays = [part.arrays() for part in parts]
    return StepSamples.from_arrays({name: np.concatenate([part[name] for part in arrays]) for name in arrays[0]})


def select(samples: StepSamples, index: np.ndarray) -> StepSamples:
    """Return the samples with these indices."""
    return StepSamples.from_arrays({name: array[index] for name, array in samples.arrays().items()})
