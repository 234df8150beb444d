"""Keys in files of earlier versions that have another name now. Readers accept both; writers use the new one.

Former keys of configurations are in the sections (`Section.renamed`), former options in `opt_ds.cli.former_options`.
"""

from collections.abc import Mapping
from typing import Any

#: Keys in metrics.jsonl.
METRICS = {
    "speed/fill": "speed/packing_efficiency",
    "speed/rank_balance": "speed/load_imbalance",
    "speed/data_wait_share": "speed/data_wait_fraction",
}


def current_keys(tree: Any, names: Mapping[str, str]) -> Any:
    """Return JSON values whose former keys, at any depth, have their current names.

    Args:
        tree: The values. They are not changed.
        names: Former key -> its name. If a mapping has both, the former key is dropped.

    Returns:
        The values.
    """
    if isinstance(tree, Mapping):
        found = {names.get(key, key): current_keys(value, names) for key, value in tree.items() if key in names}
        return found | {key: current_keys(value, names) for key, value in tree.items() if key not in names}
    if isinstance(tree, list):
        return [current_keys(item, names) for item in tree]
    return tree
