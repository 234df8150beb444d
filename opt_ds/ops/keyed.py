"""Stateless randomness: hashes and permutations that are pure functions of their keys.

All functions take and return NumPy uint64 arrays (or scalars) and work elementwise, so that a step of 10,240 samples
needs one call. Mixing function: the finaliser of SplitMix64 (Steele, Lea, Flood 2014). Permutation: a balanced Feistel
network with cycle walking (Black and Rogaway 2002), which permutes any range in O(1) memory.
"""

from typing import Any

import numpy as np

from opt_ds.ops.plan_operators import as_tensor, plan_operators

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEISTEL_ROUNDS = 6
_COMPILED_FROM = 2048  # elements; for fewer, the call overhead of the compiled form exceeds its gain


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def keyed_hash(*keys: int | str | np.ndarray) -> np.ndarray:
    """Return 64 well-mixed bits per combination of the (broadcast) keys; uint64.

    A key may be a string that names a purpose.
    """
    numbers = [np.asarray(_number_of(key) if isinstance(key, str) else key).astype(np.uint64) for key in keys]
    shape = np.broadcast_shapes(*(number.shape for number in numbers))
    if int(np.prod(shape)) >= _COMPILED_FROM and (operators := plan_operators()) is not None:
        return _hashed_by(operators, numbers, shape)
    with np.errstate(over="ignore"):
        state = np.array(0x243F6A8885A308D3, dtype=np.uint64)
        for number in numbers:
            state = _mix((state ^ number) + _GOLDEN)
    return state


def _number_of(word: str) -> int:
    return int.from_bytes(word.encode()[:8].ljust(8, b"\0"), "little")


def _hashed_by(operators: Any, numbers: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    keys = [as_tensor(number if number.size == 1 else np.broadcast_to(number, shape)) for number in numbers]
    return operators.keyed_hash(keys, size).numpy().view(np.uint64).reshape(shape)


def keyed_uniform(*keys: int | str | np.ndarray) -> np.ndarray:
    """Return a float64 in [0, 1) with 53 random bits per combination of the keys."""
    return (keyed_hash(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_choice(count: int | np.ndarray, *keys: int | str | np.ndarray) -> np.ndarray:
    """Return an int64 in [0, count) per combination of the keys.

    The bias of the 64-bit modulus is below 2^-30 for count < 2^34.
    """
    return (keyed_hash(*keys) % np.asarray(count).astype(np.uint64)).astype(np.int64)


def permute(index: np.ndarray, count: int, *keys: int | str | np.ndarray) -> np.ndarray:
    """Return the image of each index under a permutation of range(count) chosen by the keys; int64.

    Every index must satisfy 0 <= index < count.
    """
    if np.size(index) >= _COMPILED_FROM and (operators := plan_operators()) is not None:
        key = np.broadcast_to(keyed_hash(*keys), np.shape(index))
        images = operators.permute(as_tensor(np.asarray(index).astype(np.uint64)), count, as_tensor(key))
        return images.numpy().reshape(np.shape(index))
    half_bits = np.uint64(max(1, (max(count - 1, 1).bit_length() + 1) // 2))
    half_mask = (np.uint64(1) << half_bits) - np.uint64(1)
    key = keyed_hash(*keys)
    key = np.broadcast_to(key, np.shape(index)).reshape(-1)
    image = np.asarray(index, dtype=np.uint64).reshape(-1).copy()
    walking = np.arange(image.size)
    while walking.size:
        value, subkey = image[walking], key[walking]
        left, right = value >> half_bits, value & half_mask
        for round_number in range(_FEISTEL_ROUNDS):
            left, right = right, left ^ (keyed_hash(subkey, round_number, right) & half_mask)
        value = (left << half_bits) | right
        image[walking] = value
        walking = walking[value >= np.uint64(count)]
    return image.astype(np.int64).reshape(np.shape(index))
