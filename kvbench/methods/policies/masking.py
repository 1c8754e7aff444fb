"""What a policy that looks at keys and values only removes, found out within one pass over a text.

Such a policy could have chosen before anything was attended to, so that a mask stands for it: an entry is hidden from
the queries after the last that could see it. LRSA (arXiv 2506.11498) trains models under masks that are made so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvbench.errors import UserError
from kvbench.methods.policies.policy import CachePolicy, LayerView


def check_maskable(policy: CachePolicy) -> None:
    """Check that keys and values are all that the policy looks at, and that it removes entries as they are.

    Raises:
        UserError: it is not.
    """
    if policy.observes or policy.merges or policy.packs or policy.keeps_all or policy.rerotated or policy.weighs:
        raise UserError(
            f"{policy.name} looks at more than keys and values, or changes entries: no mask stands for it.",
            "Leave --execution out.",
        )


def last_queries(
    policy: CachePolicy, keys: Tensor, values: Tensor, *, layer: int, layers: int, row_seeds: Tensor, seed: int = 0
) -> Tensor:
    """The last token that may see each entry of a text of ``n`` tokens: int64 ``[batch, heads, n]``; n if text behind
    it still could.

    The policy is applied to keys and values ``[batch, heads, n, width]`` of one layer as while a text is read, and at
    its end; no gradient flows through its choices.
    """
    keys, values = keys.detach(), values.detach()
    batch, heads, n, width = keys.shape
    last = torch.full((batch, heads, n), n, device=keys.device)
    held = torch.empty(batch, heads, 0, dtype=torch.long, device=keys.device)
    read = since = removed_at = 0
    while read < n:
        run = min(policy.run_length(read), n - read)
        held = torch.cat([held, torch.arange(read, read + run, device=keys.device).expand(batch, heads, -1)], -1)
        read, since = read + run, since + run
        if read < n and not policy.is_due(read, since):
            continue
        since, keep = 0, policy.budget(read, n, layer, layers)
        if held.shape[-1] <= keep:
            removed_at = read
            continue
        at = held[..., None].expand(-1, -1, -1, width)
        view = LayerView(
            keys=keys.gather(2, at), values=values.gather(2, held[..., None].expand(-1, -1, -1, values.shape[-1])),
            positions=held, attention_sums=torch.zeros((), device=keys.device).expand(held.shape), queries=None,
            scaling=1.0, read=read, layer=layer, layers=layers, row_seeds=row_seeds, seed=seed,
            removed_at=removed_at,
        )
        kept = held.gather(-1, policy.chosen(view, keep))
        last.scatter_(-1, held, read - 1)
        last.scatter_(-1, kept, n)
        held, removed_at = kept, read
    return last


def mask_of(last: Tensor) -> Tensor:
    """bool ``[batch, heads, n, n]``: what each token of a text sees, given :func:`last_queries`."""
    places = torch.arange(last.shape[-1], device=last.device)
    return (places <= places[:, None]) & (last[..., None, :] >= places[:, None])
