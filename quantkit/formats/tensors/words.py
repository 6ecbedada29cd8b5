"""Small codes in larger words: which code lies in which bits, forwards and back.

Orders: GPTQModel (nn_modules/qlinear), compressed-tensors (pack_to_int32) and the OCP formats fill a word
from its low bits; AutoAWQ (awq/modules/linear/gemm.py) interleaves the eight codes of a word for its
kernels; bitsandbytes puts the first of two codes in the high nibble.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Order = tuple[int, ...]

AWQ: Order = (0, 2, 4, 6, 1, 3, 5, 7)  # entry i: which of a word's codes lies in its i-th lowest bits
HIGH_FIRST: Order = (1, 0)


def pack(codes: npt.NDArray[np.uint8], bits: int, word: npt.DTypeLike, order: Order | None = None) -> np.ndarray:
    """Codes (..., n) of ``bits`` bits as words (..., ceil(n / codes per word)); missing codes are 0.

    word: an integer type whose bits are a multiple of ``bits``. Raises ValueError for a code that is too large.
    """
    word, order = _checked(bits, word, order)
    if codes.size and int(codes.max()) >> bits:
        raise ValueError(f"code {int(codes.max())} does not fit {bits} bits")
    short = -codes.shape[-1] % len(order)
    if short:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], short), codes.dtype)], axis=-1)
    unsigned = np.dtype(f"u{word.itemsize}")
    words = np.zeros((*codes.shape[:-1], codes.shape[-1] // len(order)), unsigned)
    for place, member in enumerate(order):
        words |= codes[..., member :: len(order)].astype(unsigned) << unsigned.type(bits * place)
    return words.view(word)


def unpack(words: np.ndarray, bits: int, count: int, order: Order | None = None) -> npt.NDArray[np.uint8]:
    """The inverse: words (..., m) → the first ``count`` codes, uint8 (..., count)."""
    word, order = _checked(bits, words.dtype, order)
    unsigned = np.dtype(f"u{word.itemsize}")
    words = np.ascontiguousarray(words).view(unsigned)
    codes = np.empty((*words.shape, len(order)), np.uint8)
    for place, member in enumerate(order):
        codes[..., member] = (words >> unsigned.type(bits * place)) & unsigned.type((1 << bits) - 1)
    return codes.reshape(*words.shape[:-1], words.shape[-1] * len(order))[..., :count]


def _checked(bits: int, word: npt.DTypeLike, order: Order | None) -> tuple[np.dtype, Order]:
    """The word's type and a full order. Raises ValueError if codes do not fill a word or the order is none."""
    word = np.dtype(word)
    if not 1 <= bits <= 8 or 8 * word.itemsize % bits:
        raise ValueError(f"codes of {bits} bits do not fill a word of {8 * word.itemsize}")
    order = order or tuple(range(8 * word.itemsize // bits))
    if sorted(order) != list(range(8 * word.itemsize // bits)):
        raise ValueError(f"{order} is no order of {8 * word.itemsize // bits} codes")
    return word, order
