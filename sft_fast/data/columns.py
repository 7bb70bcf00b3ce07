"""Columns of integers on disk: a byte or two a value, opened in O(1), read anywhere in O(1).

Blocks of 128 values. A block is its least value, the sum of all values before it, and what its
values are above the least, in the 0, 1, 2 or 4 bytes that the greatest of them needs.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sft_fast.constants import ceil_div

BLOCK = 128
BLOCK_DTYPE = np.dtype([("sum", "<i8"), ("least", "<u4"), ("place", "<u4")])
"""`place` counts rows of BLOCK bytes; a block of n-byte values is n of them."""
_WIDTHS = {1: "<u1", 2: "<u2", 4: "<u4"}


@dataclass(frozen=True)
class Column:
    """N values from 0 to 2^32 - 1.

    Attributes:
        size: N.
        blocks: BLOCK_DTYPE [ceil(N / BLOCK) + 1]; the last one ends the one before it.
        data: uint8 [rows * BLOCK].
    """

    size: int
    blocks: npt.NDArray[np.void]
    data: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, values: npt.NDArray[np.uint32]) -> Column:
        """Encodes values, uint32 [N]."""
        encoder = ColumnEncoder()
        encoder.extend(values)
        blocks, data = encoder.take(last=True)
        return cls(len(values), blocks, data)

    def values(self) -> npt.NDArray[np.uint32]:
        """All values, uint32 [N]."""
        table = np.repeat(np.asarray(self.blocks["least"])[:-1, None], BLOCK, axis=1)
        data = np.asarray(self.data).reshape(-1, BLOCK)
        widths = np.diff(self.blocks["place"])
        for width, dtype in _WIDTHS.items():
            rows = data[_rows(self.blocks, width)].reshape(-1, width * BLOCK)
            table[widths == width] += rows.view(dtype)
        return table.reshape(-1)[: self.size]

    def sum(self, stop: int) -> int:
        """The sum of the first `stop` values."""
        number, count = divmod(stop, BLOCK)
        block = self.blocks[number]
        total = int(block["sum"])
        if count == 0:
            return total
        place, end = int(block["place"]), int(self.blocks[number + 1]["place"])
        total += count * int(block["least"])
        if place < end:
            values = self.data[place * BLOCK : end * BLOCK].view(_WIDTHS[end - place])
            total += int(values[:count].sum(dtype=np.int64))
        return total


class ColumnEncoder:
    """Encodes values that come one after another; what is encoded need not be kept."""

    def __init__(self) -> None:
        self._pending = array("I")
        # Of the blocks that were taken.
        self._sum = self._place = 0

    def append(self, value: int) -> None:
        """Adds a value."""
        self._pending.append(value)

    def extend(self, values: npt.NDArray[np.uint32]) -> None:
        """Adds values, uint32 [n]."""
        self._pending.frombytes(np.ascontiguousarray(values, np.uint32).tobytes())

    @property
    def num_pending(self) -> int:
        """Values that `take` has not encoded."""
        return len(self._pending)

    def take(self, *, last: bool) -> tuple[npt.NDArray[np.void], npt.NDArray[np.uint8]]:
        """The next part of the column: BLOCK_DTYPE [blocks] and uint8 [rows * BLOCK].

        Args:
            last: everything, and the block that ends the column; else whole blocks alone.
        """
        size = len(self._pending) if last else len(self._pending) // BLOCK * BLOCK
        values = np.array(self._pending[:size], np.uint32)
        del self._pending[:size]
        num_blocks = ceil_div(size, BLOCK)
        # The last value fills its block.
        edge = np.repeat(values[-1:], num_blocks * BLOCK - size)
        table = np.concatenate([values, edge]).reshape(-1, BLOCK)
        least = table.min(axis=1) if size else np.zeros(0, np.uint32)
        above = table - least[:, None]
        most = above.max(axis=1) if size else np.zeros(0, np.uint32)
        widths = np.select([most == 0, most < 2**8, most < 2**16], [0, 1, 2], 4)
        blocks = np.zeros(num_blocks + 1, BLOCK_DTYPE)
        sums = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
        blocks["sum"] = sums[np.minimum(np.arange(num_blocks + 1) * BLOCK, size)] + self._sum
        blocks["least"][:-1] = least
        blocks["place"] = np.concatenate([[0], np.cumsum(widths)]) + self._place
        self._sum, self._place = int(blocks["sum"][-1]), int(blocks["place"][-1])
        data = np.empty((int(widths.sum()), BLOCK), np.uint8)
        for width, dtype in _WIDTHS.items():
            chosen = widths == width
            rows = above[chosen].astype(dtype).view(np.uint8).reshape(-1, width, BLOCK)
            first = np.cumsum(widths)[chosen] - width
            data[first[:, None] + np.arange(width)] = rows
        return blocks if last else blocks[:-1], data.reshape(-1)


def _rows(blocks: npt.NDArray[np.void], width: int) -> npt.NDArray[np.int64]:
    """Row numbers in the data, int64 [n, width], of the blocks whose values have `width` bytes."""
    places = blocks["place"].astype(np.int64)
    return places[:-1][np.diff(places) == width][:, None] + np.arange(width)
