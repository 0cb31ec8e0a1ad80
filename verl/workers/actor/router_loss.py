"""The loss that balances the experts of a mixture, as transformers computes it, over a whole mini-batch.

::

    loss = E sum_e f_e P_e      over E experts; f_e: share of tokens that expert e gets, P_e: its mean probability

Means are over all layers and over the tokens that the update reads on all ranks. f_e counts, so it has no gradient:
once it is known, the loss is a sum over tokens, and the gradient does not depend on how these fall on ranks and
micro-batches. A pass without gradient finds it.

In:  the student and the micro-batches of a mini-batch. Out: each one's share.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist

from verl.workers.fsdp.token_stats_model import MicroBatch, TokenStatsModel


class RouterLoss:
    """Shares of a mini-batch's loss. Every rank must construct it: it runs the model, and counts over ranks.

    Args:
        module: a mixture of experts whose routers' logits transformers gives.
        micros: this rank's part of the mini-batch.
        coef: weight of the loss.
    """

    def __init__(self, module: TokenStatsModel, micros: Sequence[MicroBatch], coef: float) -> None:
        self.coef = coef
        chosen = int(module.causal_lm.config.num_experts_per_tok)

        def count(router_logits: list[torch.Tensor]) -> torch.Tensor:
            """(E,) tokens of all layers that each expert gets."""
            experts = [logits.topk(chosen, dim=-1).indices.flatten() for logits in router_logits]
            return torch.cat(experts).bincount(minlength=router_logits[0].shape[-1]).double()

        with torch.no_grad():
            counts = torch.stack([module.run(micro, lambda *_: None, count)[1] for micro in micros]).sum(dim=0)
        dist.all_reduce(counts)
        tokens = counts.sum() / chosen
        self._weights = (len(counts) * counts / tokens**2).float()

    def share(self, router_logits: list[torch.Tensor]) -> torch.Tensor:
        """A micro-batch's share, times the number of ranks; 0-dim, with gradient."""
        sums = [logits.float().softmax(dim=-1).sum(dim=0) for logits in router_logits]
        return dist.get_world_size() * torch.stack(sums).sum(dim=0) @ self._weights
