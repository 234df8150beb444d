"""Requirements of training on a store's splits.

They are reported when a store is made or inspected, before training starts.
"""

from pathlib import Path

from opt_ds.errors import did_you_mean
from opt_ds.store.schema import StoreDescription

TRAIN_SPLIT, VALID_SPLIT = "train", "valid"
_VALID_FRACTION = 0.1


def split_problems(
    path: Path, description: StoreDescription, train_split: str = TRAIN_SPLIT, valid_split: str = VALID_SPLIT
) -> list[str]:
    """Check that the splits that training reads have samples.

    Args:
        path: The store's folder, for messages.
        description: The store's description.
        train_split: Name of the split to train on.
        valid_split: Name of the split to validate on.

    Returns:
        One line per split without samples, with the command that fixes it.
    """
    counts = {name: count for name, count in description.split_counts.items() if count}
    if not counts:
        return [f"{path}: no sample is in it: prepare a store with samples"]
    problems = []
    for split in dict.fromkeys((train_split, valid_split)):
        if split in counts:
            continue
        what = f'split "{split}" is empty' if split in description.split_names else f'no split "{split}"'
        near = did_you_mean(split, counts)
        there = ", ".join(f"{name} ({count})" for name, count in counts.items())
        remedy = _remedy(path, split, train_split, counts)
        problems.append(f"{path}: {what}{near}, which training reads; it has {there}: {remedy}")
    return problems


def _remedy(path: Path, split: str, train_split: str, counts: dict[str, int]) -> str:
    largest = max(counts, key=lambda name: counts[name])
    if split == train_split:
        source, fractions, key = largest, {split: 1 - _VALID_FRACTION, VALID_SPLIT: _VALID_FRACTION}, "data.train_split"
    else:
        source, key = train_split if train_split in counts else largest, "data.valid_split"
        fractions = {source: 1 - _VALID_FRACTION, split: _VALID_FRACTION}
    ratios = " ".join(f"--ratio {name}={fraction:g}" for name, fraction in fractions.items())
    return f"opt-ds split {path} --from {source} {ratios}, or name another split with {key}"
