"""Checksums see every bit, its place, and nothing else."""

from __future__ import annotations

import pytest
import torch

from refreward_trl.checksums import checksums, digest

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    return {name: (torch.randn(shape, generator=source) * 9).to(dtype) for name, shape in (("b", (7, 9)), ("a", (5,)))}


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_weights_have_equal_checksums(dtype: torch.dtype) -> None:
    assert torch.equal(checksums(weights(dtype)), checksums(weights(dtype)))
    strided = {name: torch.stack([tensor, tensor], -1)[..., 0] for name, tensor in weights(dtype).items()}
    assert torch.equal(checksums(strided), checksums(weights(dtype)))


@pytest.mark.parametrize("place", [0, 17, 62])
@pytest.mark.parametrize("bit", [0, 7, 22, 31])
def test_every_bit_counts(place: int, bit: int) -> None:
    changed = weights()
    changed["b"].view(torch.int32).view(-1)[place] ^= -(2**31) if bit == 31 else 1 << bit
    assert (checksums(changed) != checksums(weights())).tolist() == [True, False]


def test_the_order_of_elements_counts() -> None:
    changed = weights()
    changed["a"] = changed["a"].flip(0)
    assert (checksums(changed) != checksums(weights())).tolist() == [False, True]


def test_a_digest_counts_names_and_shapes_but_not_the_order_of_tensors() -> None:
    plain = weights()
    assert digest(plain) == digest(dict(reversed(plain.items())))
    assert digest({"b": plain["b"], "c": plain["a"]}) != digest(plain)
    assert digest({**plain, "b": plain["b"].view(9, 7)}) != digest(plain)
    assert checksums({}).shape == (0,)
