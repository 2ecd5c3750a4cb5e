"""The order in which training sees its samples: a pure function of seed and epoch, whatever the number of ranks.

One update uses one block of `batch_size * accumulation * world_size` samples. With several updates per rollout the
block comes that many times; the repeats only stand for "use the rollout again", so their images are never read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from refreward_trl.randomness import stateless_generator

REUSED = "reused"
"""Key of the batches that stand for another update on the current rollout."""


class BlockBatchSampler(Sampler[list[int]]):
    """Yields this rank's micro-batches of indices, block by block.

    The samples of an update are the same for every split into ranks, micro-batches and accumulation steps. Only whole
    blocks are used, so that all ranks have equal micro-batches; a dataset smaller than one block is cycled to fill it.
    Repeats of a block yield `-1 - index`, which `OncePerRollout` answers without reading anything.

    Args:
        num_samples: Length of the dataset.
        batch_size: Samples per micro-batch and rank.
        accumulation: Micro-batches per update and rank.
        world_size: Number of ranks.
        rank: This rank.
        repeats: Updates per block.
        shuffle: False keeps the dataset's order.
        seed: Seed of the order.
        epoch: Called at the start of an iteration; returns which epoch begins or goes on.
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        accumulation: int,
        world_size: int,
        rank: int,
        repeats: int,
        shuffle: bool,
        seed: int,
        epoch: Callable[[int], int],
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.accumulation = accumulation
        self.world_size = world_size
        self.rank = rank
        self.repeats = repeats
        self.shuffle = shuffle
        self.seed = seed
        self._epoch = epoch

    @property
    def block_size(self) -> int:
        """Samples per update over all ranks."""
        return self.batch_size * self.accumulation * self.world_size

    @property
    def updates_per_epoch(self) -> int:
        """Optimizer steps in one pass over the blocks."""
        return max(1, self.num_samples // self.block_size) * self.repeats

    def __len__(self) -> int:
        return self.updates_per_epoch * self.accumulation

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order(self._epoch(self.updates_per_epoch))
        for start in range(0, max(1, self.num_samples // self.block_size) * self.block_size, self.block_size):
            block = [order[place % self.num_samples] for place in range(start, start + self.block_size)]
            for repeat in range(self.repeats):
                for batch in self._own(block):
                    yield batch if repeat == 0 else [-1 - index for index in batch]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(self.num_samples))
        return torch.randperm(self.num_samples, generator=stateless_generator(self.seed, "order", epoch)).tolist()

    def _own(self, block: list[int]) -> Iterator[list[int]]:
        stride = self.batch_size * self.world_size
        for start in range(self.rank * self.batch_size, len(block), stride):
            yield block[start : start + self.batch_size]


class OncePerRollout(Dataset):
    """The training dataset, except that a negative index is a marker for "already rolled out"."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {REUSED: True} if index < 0 else self.dataset[index]


class MarkerAwareCollator:
    """Collates rows, and passes on the marker of a repeated block."""

    def __init__(self, collate: Callable[[Sequence[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[dict[str, Any]]) -> Any:
        return {REUSED: True} if REUSED in rows[0] else self.collate(rows)
