"""Permutations that a seed stands for, and folding to high-order tensors and back."""

import math

import pytest
import torch

from tdlib.decompositions.permutation import (
    checksum,
    fold,
    fold_modes,
    inverse_permutation,
    permutation,
    unfold,
)
from tdlib.errors import RankError


def test_a_permutation_is_a_pure_function_of_length_and_seed():
    state = torch.random.get_rng_state()
    first = permutation(60, 3)
    assert torch.equal(first, permutation(60, 3)) and torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, permutation(60, 4))
    assert torch.equal(first.sort().values, torch.arange(60, dtype=torch.int32))
    assert torch.equal(first[inverse_permutation(60, 3).long()], torch.arange(60, dtype=torch.int32))
    assert torch.equal(permutation(5, None), torch.arange(5, dtype=torch.int32))


def test_seeds_mean_the_same_permutation_in_every_version_of_torch():
    # Saved networks hold the seed only: if this number changes, they can no longer be loaded.
    assert checksum(permutation(9216, 0)) == 2085215368


@pytest.mark.parametrize("shape", [(8, 6, 3, 3), (10, 7), (5, 3, 1, 1), (11, 13)])
@pytest.mark.parametrize("seed", [None, 0, 7])
def test_unfolding_undoes_folding(shape, seed):
    weight = torch.randn(shape)
    for order in (2, 3, 4):
        modes = fold_modes(shape, order)
        assert len(modes) == order and math.prod(modes) == weight.numel()
        folded = fold(weight, modes, seed)
        assert torch.equal(folded.flatten(), weight.flatten()[permutation(weight.numel(), seed).long()])
        assert torch.equal(unfold(folded, shape, seed), weight)


def test_modes_as_given_of_the_kernel_and_wrong_ones():
    assert fold_modes((8, 6, 3, 3)) == (6, 6, 4, 3) and fold_modes((8, 6, 3, 3), modes=(12, 36)) == (12, 36)
    assert fold_modes((8, 6, 1, 1), modes="kernel") == (8, 6) and fold_modes((1, 1), modes="kernel") == (1,)
    with pytest.raises(RankError, match=r"multiply to 49, but the kernel has 432"):
        fold_modes((8, 6, 3, 3), modes=(7, 7))
    with pytest.raises(RankError, match="'other'"):
        fold_modes((8, 6, 3, 3), modes="other")
    with pytest.raises(RankError, match="order of at least 2"):
        fold_modes((8, 6, 3, 3), order=1)
