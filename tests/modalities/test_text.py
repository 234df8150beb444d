"""Text: the tokens that replace masked ones."""

import numpy as np

from opt_ds.modalities.text import corrupt_tokens


def test_masked_tokens_are_replaced_80_10_10() -> None:
    ordinary, mask_id, share = np.arange(5, 40), 4, []
    tokens = np.full(200_000, 39)
    masked = np.arange(200_000) % 5 < 4
    corrupted = corrupt_tokens(tokens, masked, mask_id, ordinary, 123)
    assert (corrupted[~masked] == 39).all()
    changed = corrupted[masked]
    share = [np.mean(changed == mask_id), np.mean((changed != mask_id) & (changed != 39)), np.mean(changed == 39)]
    assert np.abs(np.array(share) - [0.8, 0.1 * 34 / 35, 0.1 + 0.1 / 35]).max() < 0.005
    random = np.bincount(changed[(changed != mask_id) & (changed != 39)], minlength=40)
    assert (random[:5] == 0).all(), "no special token is drawn"
    expected = random.sum() / 34
    assert ((random[5:39] - expected) ** 2 / expected).sum() < 80.0, "34 ordinary tokens equally often"
