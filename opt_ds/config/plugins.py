"""Names of units of other packages in a plain configuration tree."""

from typing import Any


def plugins_of(tree: Any) -> tuple[str, ...]:
    """Return `plugins` of the section's plain tree.

    Return none if they are not a list of names; validation then reports that.
    """
    given = tree.get("plugins") if isinstance(tree, dict) else None
    if not isinstance(given, (list, tuple)) or not all(isinstance(name, str) for name in given):
        return ()
    return tuple(given)
