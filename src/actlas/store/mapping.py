"""All shards of a store as one matrix, so that a batch drawn from thousands of shards is one gather.

Each shard's file is mapped where the operating system likes. A tensor that stands n elements above the
lowest of these addresses is element n of one long array, whatever lies between the files, so a row is
found by one number:

    offset(row) = start(shard) + (row - first(shard)) * channels

and rows are taken out of the view `array[offset : offset + channels]` by `gather_rows`. Only offsets of
rows that are there are ever used; the array is never read as a whole and never leaves this module.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actlas.kernels.gather import gather_rows
from actlas.store.layout import SCALE, Piece

_AT_ONCE = 10_000_000  # bytes that are gathered at once: enough for two threads to pay
_MOST_ROOMS = 4


class _Rooms:
    """Memory for batches that is used again as soon as nobody holds a batch in it.

    Fresh memory has to be cleared page by page by the system, which takes as long as filling it.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self._columns = rows, columns
        self._rooms: list[np.ndarray[Any, Any]] = []

    def free(self, rows: int) -> Tensor:
        """Return a tensor `[rows, columns]` in a room that no tensor uses."""
        for number in range(len(self._rooms)):
            # This list and the argument of getrefcount; a tensor made from the room would be another.
            if sys.getrefcount(self._rooms[number]) == 2:
                return torch.from_numpy(self._rooms[number])[:rows]
        room = np.empty((self.rows, self._columns), np.float32)
        if len(self._rooms) < _MOST_ROOMS:
            self._rooms.append(room)
        return torch.from_numpy(room)[:rows]


class Matrix:
    """One tensor of a store, through all shards.

    Args:
        files: the mapped file of each shard.
        pieces: where the tensor lies in each.
        firsts: int64 `[shards]`, the first row of each.
        scales: where the factors of the rows lie, for int8.
    """

    def __init__(
        self,
        files: Sequence[Any],
        pieces: Sequence[Piece],
        firsts: Tensor,
        scales: Sequence[Piece] | None = None,
    ) -> None:
        self.columns = pieces[0].columns
        self._files, self._firsts = files, firsts.numpy()
        size = pieces[0].dtype.itemsize
        starts = [file.data_ptr() + piece.offset for file, piece in zip(files, pieces, strict=True)]
        low, high = min(starts), max(s + p.rows * p.row_bytes for s, p in zip(starts, pieces, strict=True))
        self._memory = (ctypes.c_char * (high - low)).from_address(low)
        whole = torch.frombuffer(self._memory, dtype=pieces[0].dtype)
        self._view = whole.as_strided((len(whole) - self.columns + 1, self.columns), (1, 1))
        self._shift = np.array([(start - low) // size for start in starts]) - self._firsts * self.columns
        self._scales = None if scales is None else Matrix(files, scales, firsts)
        self._rooms: _Rooms | None = None

    def offsets(self, rows: Tensor) -> Tensor:
        """Return where rows begin, int64 `[n]`."""
        # In NumPy: the threads of PyTorch would cost more here than they save, and wait for each other.
        numbers = rows.numpy()
        if len(self._firsts) == 1:
            return torch.from_numpy(self._shift[0] + numbers * self.columns)
        shard = np.searchsorted(self._firsts, numbers, side="right") - 1
        return torch.from_numpy(self._shift[shard] + numbers * self.columns)

    def gather(self, rows: Tensor) -> Tensor:
        """Return rows as float32 `[n, columns]`; they must be there."""
        return next(self.batches(rows, len(rows)), torch.empty(0, self.columns))

    def batches(self, rows: Tensor, size: int) -> Iterator[Tensor]:
        """Yield rows as float32, `size` at a time."""
        if not len(rows):
            return
        together = size * max(1, _AT_ONCE // (4 * self.columns * size))
        if self._rooms is None or self._rooms.rows < min(together, len(rows)):
            self._rooms = _Rooms(min(together, len(rows)), self.columns)
        rooms = self._rooms
        for block in rows.split(together):
            found = gather_rows(self._view, self.offsets(block), rooms.free(len(block)), checked=True)
            if self._scales is not None:
                found *= self._scales.gather(block)
            yield from found.split(size)


class Files:
    """The mapped files of a snapshot.

    Args:
        paths: the shards' files.
        pieces: the tensors of each, by name.
        firsts: the first row of each.
    """

    def __init__(self, paths: Sequence[Path], pieces: Sequence[dict[str, Piece]], firsts: Tensor) -> None:
        # Private maps: nothing that is done to a tensor reaches a file.
        self._maps = [torch.UntypedStorage.from_file(str(path), False, path.stat().st_size) for path in paths]
        self._pieces, self._firsts = pieces, firsts
        self._matrices: dict[str, Matrix] = {}

    def __getitem__(self, name: str) -> Matrix:
        """Return one of the tensors, through all shards."""
        if name not in self._matrices:
            scaled = name + SCALE in self._pieces[0]
            scales = [found[name + SCALE] for found in self._pieces] if scaled else None
            tensors = [found[name] for found in self._pieces]
            self._matrices[name] = Matrix(self._maps, tensors, self._firsts, scales)
        return self._matrices[name]
