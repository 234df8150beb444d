"""One sample, as it is packed into a batch."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from opt_ds.data.modality import Items


@dataclass
class Sample:
    """Content of one sequence of a batch."""

    name: str = ""
    index: int = 0  # global sample index: the key of dropout, which therefore does not depend on the ranks
    items: dict[int, Items] = field(default_factory=dict)  # modality -> its items; absent modalities have no entry
    targets: dict[str, Any] = field(default_factory=dict)  # task -> its targets (see the task's file)

    def of(self, modality: int) -> Any:
        """Return the items of a modality that the sample must have."""
        assert modality in self.items, "the sample lacks a modality that its task needs"
        return self.items[modality]


def given(part: np.ndarray | None) -> np.ndarray:
    """Return an optional array that must be present."""
    assert part is not None, "the sample lacks a part that its modality or task needs"
    return part
