"""The order of samples depends on seed and epoch, not on how an update is split."""

from __future__ import annotations

import itertools

from refreward_trl.trainers.ordering import REUSED, BlockBatchSampler, MarkerAwareCollator, OncePerRollout


def sampler(epoch: int = 0, **changes: int | bool) -> BlockBatchSampler:
    settings = {
        "batch_size": 4,
        "accumulation": 1,
        "world_size": 1,
        "rank": 0,
        "repeats": 1,
        "shuffle": True,
        "seed": 7,
    }
    return BlockBatchSampler(21, epoch=lambda updates: epoch, **{**settings, **changes})


def blocks(samplers: list[BlockBatchSampler], per_update: int) -> list[set[int]]:
    """The samples of each update, over ranks and accumulation."""
    streams = [list(each) for each in samplers]
    return [
        set(itertools.chain.from_iterable(batch for stream in streams for batch in stream[start : start + per_update]))
        for start in range(0, len(streams[0]), per_update)
    ]


def test_an_update_sees_the_same_samples_for_every_split() -> None:
    whole = blocks([sampler()], 1)
    assert blocks([sampler(batch_size=2, accumulation=2)], 2) == whole
    assert blocks([sampler(batch_size=2, world_size=2, rank=rank) for rank in (0, 1)], 1) == whole
    assert blocks([sampler(batch_size=1, accumulation=2, world_size=2, rank=rank) for rank in (0, 1)], 2) == whole


def test_each_sample_comes_once_and_only_whole_blocks_are_used() -> None:
    seen = list(itertools.chain.from_iterable(sampler()))
    assert len(seen) == len(set(seen)) == 20
    assert all(len(batch) == 4 for batch in sampler())


def test_epochs_differ_and_repeat_exactly() -> None:
    assert list(sampler(epoch=1)) == list(sampler(epoch=1))
    assert list(sampler(epoch=1)) != list(sampler(epoch=0))
    assert list(sampler(seed=8)) != list(sampler(seed=7))


def test_sequential_order() -> None:
    assert next(iter(sampler(shuffle=False))) == [0, 1, 2, 3]


def test_repeats_are_markers_of_the_block_before() -> None:
    repeated = list(sampler(batch_size=2, accumulation=2, repeats=3))
    assert len(repeated) == len(sampler(batch_size=2, accumulation=2, repeats=3)) == 5 * 2 * 3
    first, markers = repeated[:2], repeated[2:6]
    assert all(index >= 0 for batch in first for index in batch)
    assert markers == [[-1 - index for index in batch] for batch in first] * 2


def test_a_small_dataset_fills_one_block() -> None:
    few = BlockBatchSampler(
        3, batch_size=4, accumulation=2, world_size=1, rank=0, repeats=1, shuffle=True, seed=0, epoch=lambda updates: 0
    )
    batches = list(few)
    assert [len(batch) for batch in batches] == [4, 4]
    assert set(itertools.chain.from_iterable(batches)) == {0, 1, 2}


def test_markers_read_nothing() -> None:
    class Refusing:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> dict[str, int]:
            assert index >= 0
            return {"value": index}

    dataset, collate = OncePerRollout(Refusing()), MarkerAwareCollator(list)
    assert collate([dataset[-1], dataset[-2]]) == {REUSED: True}
    assert collate([dataset[0]]) == [{"value": 0}]
