"""Gradients of every family under PyTorch's fully_shard (FSDP2), two processes; run by test_distributed.py."""

import copy
from unittest.mock import patch

import hydra
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing import assert_close

from xlm_hf.families import families
from xlm_hf.objectives import head_operator
from xlm_hf.testing import FamilyCase


def check(family: str) -> None:
    """Half of a batch on each of two ranks, weights in shards and head in chunks, against the whole on one."""
    case = FamilyCase(family)
    whole = case.model().eval()
    sharded = copy.deepcopy(whole)
    collate, examples = case.collator(case.task.kind, whole), case.examples(8)
    loss = hydra.utils.instantiate(case.cfg.loss)
    num_items = loss.num_items(collate(examples))
    (loss(whole, collate(examples)).loss_sum / num_items).backward()
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    share = collate(examples[dist.get_rank() * 4 :][:4])
    with patch.object(head_operator, "rows_per_chunk", return_value=4):
        # The gradients of the ranks are averaged, and the loss is their sum.
        (2 * loss(sharded, share).loss_sum / num_items).backward()
    for (name, expected), parameter in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        assert_close(parameter.grad.full_tensor(), expected.grad, rtol=1e-4, atol=1e-5, msg=f"{family}: {name}")


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in families():
        check(name)
    dist.destroy_process_group()
