from __future__ import annotations

import pytest
import torch

from refilled.data.batches import epoch_batches, num_batches

LABELS = torch.arange(103) % 7


def test_an_epoch_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    orders = [
        torch.cat([batch.image_ids for batch in epoch_batches(LABELS, global_batch_size=10, seed=seed, epoch=epoch)])
        for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert sorted(orders[0].tolist()) == list(range(103))
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[3])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_shares_in_rank_order_make_up_the_global_batch(world_size: int) -> None:
    ranks = [
        list(epoch_batches(LABELS, global_batch_size=10, seed=3, epoch=2, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    whole = list(epoch_batches(LABELS, global_batch_size=10, seed=3, epoch=2))
    assert len(whole) == num_batches(103, 10) == 11
    for step, batch in enumerate(whole):
        shares = [each[step].share for each in ranks]
        assert torch.equal(torch.cat(shares), batch.image_ids)
        assert ranks[0][step].counts == tuple(len(share) for share in shares)
        assert torch.equal(ranks[-1][step].classes, LABELS[batch.image_ids].unique())
        assert torch.equal(ranks[-1][step].labels, LABELS[batch.image_ids])
        assert ranks[-1][step].largest_class == int(torch.bincount(LABELS[batch.image_ids]).max())


@pytest.mark.parametrize(("count", "sizes"), [(20, [10, 10]), (21, [10, 11]), (22, [10, 10, 2]), (5, [5])])
def test_last_batch_is_never_a_single_image(count: int, sizes: list[int]) -> None:
    batches = list(epoch_batches(torch.zeros(count, dtype=torch.int64), global_batch_size=10, seed=0, epoch=0))
    assert [len(batch.image_ids) for batch in batches] == sizes
    assert num_batches(count, 10) == len(sizes)
