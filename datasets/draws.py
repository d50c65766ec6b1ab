"""The random numbers of many samples at once, equal to those of `SampleKey.generator` one by one.

A NumPy generator takes 9 us to set up, which a batch on the device would spend most of its time
on. What seeds it and the bits that it gives are fixed by NumPy for good (`SeedSequence`, `PCG64`),
and are computed here for a whole array of positions. Only the few bits that crops and flips take
are made; how a bounded integer comes from them (Lemire's multiplication) is NumPy's as well.
"""

from typing import NamedTuple

import numpy as np

from datasets.sampling import SAMPLE_STREAM, SampleKey

_U32 = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)
# SeedSequence (after O'Neill's seed_seq_fe): a pool of four words of 32 bits.
_POOL = 4
_INIT_A, _MULT_A = 0x43B0D7E5, 0x931E8875
_INIT_B, _MULT_B = 0x8B51F9DD, 0x58F38DED
_MIX_L, _MIX_R = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)
_XSHIFT = np.uint32(16)
# PCG64's multiplier, high and low half.
_PCG_HIGH, _PCG_LOW = np.uint64(0x2360ED051FC65DA4), np.uint64(0x4385DF649FCCF645)

Wide = tuple[np.ndarray, np.ndarray]  # 128 bits: high and low half, (n,) uint64 each


class Draws(NamedTuple):
    """What is random about n samples.

    Attributes:
        top, left: (n,) int64, the corner of the crop.
        flips: (n, 3) bool, in the order of `datasets.wrappers.FLIPS`.
    """

    top: np.ndarray
    left: np.ndarray
    flips: np.ndarray


def draw(seed: int, positions: np.ndarray, tops: np.ndarray, lefts: np.ndarray) -> Draws:
    """Corners and flips of the samples at `positions`.

    Args:
        seed: of the run.
        positions: (n,) int64, not negative.
        tops, lefts: (n,) int64 from 1 to 2**32 - 1, how many places each corner has.
    """
    bits = sample_bits(seed, positions)
    # Integers take 32 bits each, the low half first; an axis with one place takes none.
    halves = np.stack([bits[:, 0] & _U32, bits[:, 0] >> _HALF], axis=1)
    top, again_top = _bounded(halves[:, 0], tops)
    second = np.where(tops > 1, halves[:, 1], halves[:, 0])
    left, again_left = _bounded(second, lefts)
    # The uniform numbers begin with a new word of 64 bits; below 1/2 means a clear highest bit.
    first = np.where((tops > 1) | (lefts > 1), 1, 0)[:, None] + np.arange(3)
    flips = np.take_along_axis(bits, first, axis=1) >> np.uint64(63) == 0
    for place in np.flatnonzero(again_top | again_left):
        generator = SampleKey(0, int(positions[place]), 0, seed).generator()
        top[place] = generator.integers(tops[place])
        left[place] = generator.integers(lefts[place])
        flips[place] = generator.random(3) < 0.5
    return Draws(top, left, flips)


def _bounded(bits: np.ndarray, bounds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Integers below `bounds` from 32 bits each, and where NumPy might draw once more (rare)."""
    limit = bounds.astype(np.uint64)
    product = bits * limit
    again = ((product & _U32) < limit) & (limit > 1)
    return (product >> _HALF).astype(np.int64), again


def sample_bits(seed: int, positions: np.ndarray) -> np.ndarray:
    """(n, 4) uint64: the first four words of each position's bit generator."""
    words = _seed_words(seed, positions)
    state, stream = (words[0], words[1]), (words[2], words[3])
    one = np.uint64(1)
    increment = (stream[0] << one) | (stream[1] >> np.uint64(63)), (stream[1] << one) | one
    # Two steps of the generator are part of seeding it: from state 0, and from the seed.
    state = _step(_add(increment, state), increment)
    found = []
    for _ in range(4):
        state = _step(state, increment)
        found.append(_output(state))
    return np.stack(found, axis=1)


def _seed_words(seed: int, positions: np.ndarray) -> list[np.ndarray]:
    """Four (n,) uint64 words: SeedSequence([seed, stream, position]).generate_state(4)."""
    high = positions >> 32
    if high.any() and not high.all():
        # A position of more than 32 bits is two words of entropy, so the halves differ in kind.
        parts = np.empty((4, len(positions)), np.uint64)
        for chosen in (high == 0, high > 0):
            parts[:, chosen] = _seed_words(seed, positions[chosen])
        return list(parts)
    fixed = [*_words_of(seed), SAMPLE_STREAM]
    entropy = [np.full(len(positions), word, np.uint32) for word in fixed]
    entropy.append((positions & 0xFFFFFFFF).astype(np.uint32))
    if high.any():
        entropy.append(high.astype(np.uint32))
    pool = _mixed_pool(entropy)
    constant, state = _INIT_B, []
    for index in range(8):
        word = pool[index % _POOL] ^ np.uint32(constant)
        constant = constant * _MULT_B & 0xFFFFFFFF
        word = word * np.uint32(constant)
        state.append((word ^ (word >> _XSHIFT)).astype(np.uint64))
    return [state[i] | (state[i + 1] << _HALF) for i in range(0, 8, 2)]


def _mixed_pool(entropy: list[np.ndarray]) -> list[np.ndarray]:
    constant = _INIT_A

    def hashed(word: np.ndarray) -> np.ndarray:
        nonlocal constant
        word = word ^ np.uint32(constant)
        constant = constant * _MULT_A & 0xFFFFFFFF
        word = word * np.uint32(constant)
        return word ^ (word >> _XSHIFT)

    def mixed(word: np.ndarray, other: np.ndarray) -> np.ndarray:
        total: np.ndarray = word * _MIX_L - other * _MIX_R
        return total ^ (total >> _XSHIFT)

    nothing = np.zeros_like(entropy[0])
    pool = [hashed(word) for word in [*entropy, *[nothing] * _POOL][:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], hashed(pool[source]))
    for word in entropy[_POOL:]:
        pool = [mixed(target, hashed(word)) for target in pool]
    return pool


def _words_of(number: int) -> list[int]:
    """The 32-bit words of an integer from 0 on, lowest first."""
    words = [number & 0xFFFFFFFF]
    while number := number >> 32:
        words.append(number & 0xFFFFFFFF)
    return words


def _step(state: Wide, increment: Wide) -> Wide:
    """state * multiplier + increment, modulo 2**128."""
    high, low = state
    low_0, low_1 = low & _U32, low >> _HALF
    by_0, by_1 = _PCG_LOW & _U32, _PCG_LOW >> _HALF
    middle = low_1 * by_0 + (low_0 * by_0 >> _HALF)
    carry = low_0 * by_1 + (middle & _U32)
    upper = low_1 * by_1 + (middle >> _HALF) + (carry >> _HALF)
    return _add((upper + high * _PCG_LOW + low * _PCG_HIGH, low * _PCG_LOW), increment)


def _add(a: Wide, b: Wide) -> Wide:
    low = a[1] + b[1]
    return a[0] + b[0] + (low < a[1]), low


def _output(state: Wide) -> np.ndarray:
    """PCG's XSL-RR: the halves' exclusive or, rotated to the right by the highest six bits."""
    word, turn = state[0] ^ state[1], state[0] >> np.uint64(58)
    return (word >> turn) | (word << (-turn & np.uint64(63)))
