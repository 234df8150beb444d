"""Reassign the samples of a finished store to splits, by ratio or by a list of ids or groups.

By ratio, near-duplicate images stay in one split too (see `near_duplicates`). With a list, they are only counted.
"""

import csv
import hashlib
import io
import logging
from pathlib import Path

import numpy as np

from opt_ds.errors import UserError
from opt_ds.store.near_duplicates import images_across_splits, joined_groups, same_images
from opt_ds.store.reader import FeatureStore
from opt_ds.store.schema import StoreDescription, check_split_names, group_code
from opt_ds.store.statistics import TRAIN_SPLIT
from opt_ds.store.update import Arrays, rewrite_shards
from opt_ds.store.verify import open_store
from opt_ds.user_files import decode_text

_LOG = logging.getLogger(__name__)
_HEADERS = [[name, "split"] for name in ("id", "ids", "sample", "name", "group", "groups")]


def parse_ratios(arguments: list[str]) -> dict[str, float]:
    """Parse ["train=0.9", "valid=0.1"] to fractions that sum to 1. Raise UserError for anything else."""
    ratios: dict[str, float] = {}
    for each in arguments:
        name, equals, fraction = each.partition("=")
        try:
            ratios[name] = float(fraction)
        except ValueError:
            equals = ""
        if not (name and equals and ratios[name] > 0):
            raise UserError(f'--ratio "{each}": write SPLIT=FRACTION, such as train=0.9')
    total = sum(ratios.values())
    if abs(total - 1) > 1e-6:
        raise UserError(f"--ratio: the fractions sum to {total:g}, not to 1")
    return ratios


def split_by_ratio(
    path: Path,
    ratios: dict[str, float],
    seed: int = 0,
    source: str | None = None,
    *,
    near_duplicates_together: bool = True,
) -> StoreDescription:
    """Assign the groups to splits by a hash of (seed, group).

    The result is reproducible. Fractions are met as closely as the number of groups allows. Groups that share a
    near-duplicate image count as one. Every split gets a group.

    Args:
        path: The store's folder.
        ratios: Fraction of each split.
        seed: Seed of the hash. Another seed gives another assignment.
        source: Reassign only the samples of this split.
        near_duplicates_together: Merge groups with near-duplicate images.

    Returns:
        The new description of the store.

    Raises:
        UserError: There are fewer groups than splits, or near-duplicates connect more samples than the largest
            fraction.
    """
    store = open_store(path)
    chosen = np.arange(store.num_samples) if source is None else store.split_samples(source)
    of = "" if source is None else f" of split {source}"
    groups = store.groups[chosen]
    near = same_images(store).near if near_duplicates_together else None
    if near is not None:
        groups = _joined(store, chosen, near, ratios)
    split_of = _split_of_groups(np.unique(groups).tolist(), ratios, seed)
    if len(split_of) < len(ratios):
        raise UserError(f"{path}: the samples{of} have {len(split_of)} groups for {len(ratios)} splits: give fewer --ratio")
    splits = [store.description.split_names[code] for code in store.split_codes.tolist()]
    for index, group in zip(chosen.tolist(), groups.tolist(), strict=True):
        splits[index] = split_of[group]
    if near is not None:
        _warn_of_what_stays_apart(store, near, splits)
    return _reassign(store, splits, "group hash" if source is None else "manifest")


def _joined(store: FeatureStore, chosen: np.ndarray, near: np.ndarray, ratios: dict[str, float]) -> np.ndarray:
    """Return the groups of the chosen samples, merged by near-duplicate images.

    Raise UserError if the fractions are impossible.
    """
    own = store.groups[chosen]
    groups = joined_groups(store, near, chosen)
    names, counts = np.unique(groups, return_counts=True)
    parts = _groups_in(groups, own)
    joined = np.isin(groups, names[parts > 1])
    largest = int(np.argmax(np.where(parts > 1, counts, 0)))
    capacity = max(ratios.values()) * len(chosen)
    too_few = len(names) < len(ratios) <= len(np.unique(own))
    if parts[largest] > 1 and (counts[largest] > capacity or too_few):
        first = store.sample_id(int(chosen[groups == names[largest]][0]))
        raise UserError(
            f'{store.path}: near-duplicate images connect {counts[largest]} of {len(chosen)} samples, such as "{first}": '
            "too many for these fractions: see the counts of opt-ds inspect, or use --ignore-near-duplicates"
        )
    if joined.any():
        _LOG.info(
            f"{store.path}: {int(joined.sum())} samples of {int(parts[parts > 1].sum())} groups are kept together in "
            f"{int((parts > 1).sum())} by near-duplicate images"
        )
    return groups


def _groups_in(groups: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return the number of original groups in each merged group, int64 [merged groups]."""
    pairs = np.unique(np.stack([groups, own]), axis=1)
    return np.unique(pairs[0], return_counts=True)[1]


def _warn_of_what_stays_apart(store: FeatureStore, near: np.ndarray, splits: list[str]) -> None:
    """Log how many images have a near-duplicate in another split.

    Samples that are not reassigned or are listed can have some.
    """
    count = images_across_splits(store, near, np.array(splits))
    if count:
        _LOG.warning(f"{store.path}: {count} images have a near-duplicate in another split; opt-ds inspect names some")


def _split_of_groups(codes: list[int], ratios: dict[str, float], seed: int) -> dict[int, str]:
    """Return the split of each group.

    A split that would be empty gets the first group of the split with the most groups.
    """
    bounds, names = np.cumsum(list(ratios.values())), list(ratios)
    place = {code: _uniform(seed, code) for code in codes}
    of_split: dict[str, list[int]] = {name: [] for name in names}
    for code in sorted(codes, key=lambda code: place[code]):
        of_split[names[min(int(np.searchsorted(bounds, place[code], side="right")), len(names) - 1)]].append(code)
    for name in names:
        largest = max(of_split.values(), key=len)
        if not of_split[name] and len(largest) > 1:
            of_split[name].append(largest.pop(0))
    return {code: name for name, members in of_split.items() for code in members}


def split_by_list(
    path: Path,
    file: Path,
    *,
    by_group: bool = False,
    count_near_duplicates: bool = True,
) -> StoreDescription:
    """Assign samples to splits by a list. Samples that it does not name are unchanged.

    Args:
        path: The store's folder.
        file: CSV or TSV file with the columns id (or group) and split.
        by_group: The first column holds groups instead of ids.
        count_near_duplicates: Log how many images have a near-duplicate in another split. They are not moved.

    Returns:
        The new description of the store.

    Raises:
        UserError: A name is not in the store.
    """
    store = open_store(path)
    named = _read_list(file)
    if by_group:
        keys = {group_code(name): name for name in named}
        of_sample = [keys.get(code) for code in store.groups.tolist()]
    else:
        of_sample = [name if (name := store.sample_id(index)) in named else None for index in range(store.num_samples)]
    unknown = set(named) - set(of_sample)
    if unknown:
        what = "groups" if by_group else "ids"
        raise UserError(f'{file}: {len(unknown)} {what} are not in {path}, such as "{min(unknown)}"')
    present = [store.description.split_names[code] for code in store.split_codes.tolist()]
    splits = [own if name is None else named[name] for name, own in zip(of_sample, present, strict=True)]
    if count_near_duplicates:
        _warn_of_what_stays_apart(store, same_images(store).near, splits)
    return _reassign(store, splits, "manifest")


def _reassign(store: FeatureStore, splits: list[str], source: str) -> StoreDescription:
    names = sorted(set(splits), key=lambda name: (name != TRAIN_SPLIT, name))
    if TRAIN_SPLIT not in names:
        raise UserError(f"{store.path}: no sample would be in {TRAIN_SPLIT}, which training reads: keep some there")
    check_split_names(names, str(store.path))
    codes = np.array([names.index(split) for split in splits], "uint8")
    ends = np.cumsum([shard.num_samples for shard in store.description.shards])

    def change(index: int, arrays: Arrays) -> Arrays:
        start = ends[index] - store.description.shards[index].num_samples
        return {**arrays, "samples/split": codes[start : ends[index]]}

    return rewrite_shards(store, change, lambda: {"split_names": names, "splits_source": source})


def _uniform(seed: int, code: int) -> float:
    digest = hashlib.blake2b(f"split {seed} {code}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _read_list(file: Path) -> dict[str, str]:
    """Return name -> split. A first line such as "id,split" is a header. Raise UserError for a name with two splits."""
    if not file.is_file():
        raise UserError(f"{file}: no such file")
    named: dict[str, str] = {}
    line_of: dict[str, int] = {}
    separator = "\t" if file.suffix == ".tsv" else ","
    try:
        with io.StringIO(decode_text(file.read_bytes()), newline="") as lines:
            for number, row in enumerate(csv.reader(lines, delimiter=separator, strict=True), 1):
                if not row or (number == 1 and [cell.strip().lower() for cell in row] in _HEADERS):
                    continue
                if len(row) != 2 or not all(row):
                    raise UserError(f"{file} line {number}: write a name and a split, separated by a comma (a tab in .tsv)")
                name, split = row
                if named.setdefault(name, split) != split:
                    raise UserError(
                        f'{file} line {number}: "{name}" is in {split}, but in {named[name]} on line {line_of[name]}: '
                        "remove one of the lines"
                    )
                line_of.setdefault(name, number)
    except UnicodeDecodeError:
        raise UserError(f"{file}: not UTF-8 text: save it as UTF-8") from None
    except csv.Error:
        raise UserError(f"{file}: a quote is not closed: close it, or write quotes inside of a name twice") from None
    return named
