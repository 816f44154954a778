"""Expert parallelism: each process of a set holds some experts of a layer, and tokens travel to them and back.

A process sorts its rows, one for each token and chosen expert, by expert; an all-to-all of uneven pieces brings each
row to the process that holds its expert, and another one brings the results back, where they are weighed and summed as
one process would sum them. No row is dropped. Gradients take the same way backwards, so an expert's gradient is the sum
over all processes of its set. The router knows nothing of this: its choices are the same wherever an expert lies.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from daedal.model.moe import Experts, MoE, each
from daedal.ops.arithmetic import Arithmetic


class SpreadExperts(nn.Module):
    """The experts of one layer, in the place and under the names of `Experts`; its stacks are dealt out over `mesh`."""

    def __init__(self, whole: Experts, mesh: DeviceMesh):
        super().__init__()
        self.group, self.limit = mesh.get_group(), whole.limit
        self.arithmetic: Arithmetic | None = whole.arithmetic
        self.num_experts = whole.gate_up_proj.shape[0]
        self.gate_up_proj = nn.Parameter(_dealt(whole.gate_up_proj, mesh))
        self.down_proj = nn.Parameter(_dealt(whole.down_proj, mesh))

    def forward(self, x_TD: Tensor, ids_TA: Tensor, weights_TA: Tensor) -> Tensor:
        ids_N = ids_TA.flatten()
        order_N = ids_N.argsort(stable=True)
        tokens_N = order_N // ids_TA.shape[1]
        here_PE, there_PE = self._counts(ids_N)
        sent, received = here_PE.sum(1).tolist(), there_PE.sum(1).tolist()
        rows_ND = all_to_all_single_autograd(x_TD[tokens_N].contiguous(), received, sent, self.group)
        results_ND = all_to_all_single_autograd(self._computed(rows_ND, there_PE), sent, received, self.group)
        weighted_ND = results_ND.float() * weights_TA.flatten()[order_N].unsqueeze(-1)
        total = torch.zeros_like(x_TD, dtype=torch.float32).index_add(0, tokens_N, weighted_ND)
        return total.to(x_TD.dtype)

    def _counts(self, ids_N: Tensor) -> tuple[Tensor, Tensor]:
        """Rows by process and by its experts, [P, E / P]: those that go there, and those that come from there."""
        processes = dist.get_world_size(self.group)
        here_E = torch.bincount(ids_N, minlength=self.num_experts)
        there_E = torch.empty_like(here_E)
        dist.all_to_all_single(there_E, here_E, group=self.group)
        return here_E.view(processes, -1), there_E.view(processes, -1)

    def _computed(self, rows_ND: Tensor, counts_PE: Tensor) -> Tensor:
        """Each row through its expert. Rows lie by the process they came from, and by expert."""
        gate_up, down = (_local(stack) for stack in (self.gate_up_proj, self.down_proj))
        if not len(rows_ND):
            # No row comes: the gradient is zero then, and not absent, as all processes step the same parameters.
            return rows_ND + (gate_up[:, :0].sum() + down[:, :0].sum()).to(rows_ND.dtype)
        own_E = torch.arange(counts_PE.shape[1], device=rows_ND.device)
        ids_N = own_E.repeat(counts_PE.shape[0]).repeat_interleave(counts_PE.flatten())
        return each(rows_ND, ids_N, gate_up, down, arithmetic=self.arithmetic, limit=self.limit)


def deal_experts(layer: nn.Module, mesh: DeviceMesh) -> SpreadExperts | None:
    """Replaces the experts of a layer by this process's share of them; None for a layer that has none."""
    block = getattr(layer, "mlp", None)
    if not isinstance(block, MoE):
        return None
    block.experts = SpreadExperts(block.experts, mesh)  # type: ignore[assignment]
    return block.experts  # type: ignore[return-value]


def _dealt(stack: Tensor, mesh: DeviceMesh) -> DTensor:
    """A process's own experts of a whole stack, as part of the stack."""
    own = stack.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False)


def _local(stack: Tensor) -> Tensor:
    return stack.to_local() if isinstance(stack, DTensor) else stack
