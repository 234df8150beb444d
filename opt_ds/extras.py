"""Packages of setup.py's extras: imported where they are used, so that everything else works without them."""

from collections.abc import Iterator
from contextlib import contextmanager

from opt_ds.errors import UserError


@contextmanager
def needs_extra(extra: str, purpose: str) -> Iterator[None]:
    """Turn a failed import in the block into a UserError that names the extra.

    `purpose`: what needs the package, as the beginning of the sentence, e.g. "the word error rate".
    """
    try:
        yield
    except ImportError as error:
        raise UserError(f"{purpose} needs {error.name}: pip install 'opt_ds[{extra}]'") from None
