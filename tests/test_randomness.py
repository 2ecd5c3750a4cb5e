"""Draws depend on what they are for and on nothing else."""

import itertools

import torch

from refreward_trl.randomness import stateless_generator, stateless_seed


def test_every_part_of_the_key_matters() -> None:
    keys = [
        (0, "noise"), (1, "noise"), (0, "crop"), (0, "noise", 0), (0, "noise", "0"), (0, "noise", 0, 0),
        (0, "noise", "a", 1), (0, "noise", "a1"), (0, "noise", "1", "a"), (0, "nois", "e"),
    ]  # fmt: skip
    seeds = [stateless_seed(*key) for key in keys]
    assert all(a != b for a, b in itertools.combinations(seeds, 2))
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_global_state_is_neither_read_nor_written() -> None:
    torch.manual_seed(0)
    first = torch.rand(4, generator=stateless_generator(7, "x", "photo", 3))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert torch.equal(first, torch.rand(4, generator=stateless_generator(7, "x", "photo", 3)))
    assert torch.equal(before, torch.get_rng_state())
