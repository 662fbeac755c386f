"""Losses of the rows of a vocabulary head: from a row's logits, its loss and the gradient in the same memory.

A row function is what `head_operator.head_losses` calls for every chunk of rows. Its gradient is a closed form, so that
nothing of the size of the vocabulary is kept for a backward pass. With p = softmax(z), a loss f(p) has the gradient

    df/dz_j = u_j - p_j sum_i u_i,    u_j = p_j df/dp_j.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

# A target that is none, as in torch's own cross-entropy.
IGNORED_ID = -100

# Logits that a row function takes at once: what stays in a CPU's cache with the temporaries beside it, and elsewhere
# what keeps an accelerator busy.
_BLOCK_SIZES = {"cpu": 2**19}
_BLOCK_SIZE = 2**25

# Row functions by the names of their classes: an operator of torch takes names and tensors, but no objects.
ROW_FUNCTIONS: dict[str, type["RowFunction"]] = {}


@dataclass
class RowFunction:
    """Losses of rows, one each. All attributes are tensors with one entry per row; a subclass adds its own.

    A subclass is a dataclass that defines `losses_and_gradient_`. It may live in the folder of a family.

    Attributes:
        target_ids: (S,) the token of each row; a row with `IGNORED_ID` has the loss 0, whatever else is said of it.
        weights: (S,) weight of each loss in the sum that is minimised.
    """

    target_ids: Tensor
    weights: Tensor

    # What is not of a row. For `head_losses`: q (S, D), which adds q table^T to the logits, and table (V, D), the
    # vectors of the ids. For `losses_and_gradient_`: table and, if it is wanted, memory (V, D) for a gradient, to which
    # that of the weighted losses by the vectors themselves is added. Without an annotation it is no field.
    of_table = ()  # type: tuple[Tensor, ...]

    def __init_subclass__(cls) -> None:
        ROW_FUNCTIONS[cls.__name__] = cls

    def tensors(self) -> list[Tensor]:
        """The attributes, from which `ROW_FUNCTIONS[name](*tensors)` makes the same function."""
        return [getattr(self, field.name) for field in fields(self)]

    def row_groups(self) -> Tensor | None:
        """(S,) group of each row, ascending, where the loss of a row depends on the other rows of its group."""
        return None

    def fill_(
        self,
        logits: Tensor,
        rows: slice,
        num_ids: int,
        losses: Tensor,
        correct: Tensor,
        log_normalisers: Tensor | None = None,
    ) -> None:
        """Write the losses of a chunk, and their gradient over its logits.

        Args:
            logits: (R, V), float32 or float64, -inf at suppressed ids. They become weight x d loss / d logits.
            rows: which rows of the whole they belong to.
            num_ids: number of ids that are not suppressed.
            losses: like `target_ids`, of the whole; those of the chunk are written.
            correct: like `target_ids`, of the whole: whether no token of its row scores higher than the target.
            log_normalisers: (S,) logsumexp of each row's group; None without groups, and where chunks hold whole ones.
        """
        is_target = self.target_ids[rows] != IGNORED_ID
        # An ignored row gets numbers that every function is defined at, and no weight.
        ids, weights = self.target_ids[rows].clamp(min=0), self.weights[rows].where(is_target, 0.0).to(logits.dtype)
        others = [x[rows].where(is_target, 1) for x in self.tensors()[2:]]
        num_rows = max(1, _BLOCK_SIZES.get(logits.device.type, _BLOCK_SIZE) // logits.shape[-1])
        for start in range(0, len(logits), num_rows):
            block = slice(start, start + num_rows)
            of_block = type(self)(*(x[block] for x in (ids, weights, *others)))
            of_block.of_table = self.of_table
            losses[rows][block], correct[rows][block] = of_block.losses_and_gradient_(logits[block], num_ids)
        losses[rows].masked_fill_(~is_target, 0.0)
        correct[rows].logical_and_(is_target)

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """Losses and `correct` of a few rows, no target ignored; `logits` become weight x d loss / d logits."""
        raise NotImplementedError


def softmax_(logits: Tensor, target_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits (R, V) into probabilities, in place.

    Returns:
        (R, 1) for each of `target_ids` (R, 1) its log-probability, and whether no other is larger.
    """
    scores, largest = logits.gather(1, target_ids), logits.amax(dim=-1, keepdim=True)
    torch.softmax(logits, dim=-1, out=logits)
    # The largest probability is 1 / sum exp(z - largest).
    return scores - largest + logits.amax(dim=-1, keepdim=True).log(), scores >= largest


@dataclass
class CrossEntropy(RowFunction):
    """-log softmax(z)[x] of the target x."""

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        ids, weights = self.target_ids[:, None], self.weights[:, None]
        log_p, correct = softmax_(logits, ids)
        logits.mul_(weights).scatter_add_(1, ids, -weights)
        return -log_p[:, 0], correct[:, 0]


@dataclass
class JointCrossEntropy(RowFunction):
    """Cross-entropy of pairs (row, token), the rows of a group sharing one softmax over all of their pairs.

        loss_t = log sum_{r in g, v} exp(z_{r,v}) - z_{row_t, id_t},    g the group of row_t.

    A row has any number of targets, the same one twice as well: `target_ids`, `weights` and the losses are (T,).

    Attributes:
        target_rows: (T,) row of each target.
        groups: (S,) group of each row, ascending.
    """

    target_rows: Tensor
    groups: Tensor

    def row_groups(self) -> Tensor:
        """See `RowFunction`."""
        return self.groups

    @staticmethod
    def logsumexp_of_groups(of_rows: Tensor, groups: Tensor) -> Tensor:
        """For each row, the logsumexp of `of_rows` over its group; `groups` ascend."""
        groups = numbered(groups)
        largest = torch.full_like(of_rows, -torch.inf).scatter_reduce(0, groups, of_rows, "amax")[groups]
        return largest + torch.zeros_like(of_rows).index_add(0, groups, (of_rows - largest).exp())[groups].log()

    def fill_(self, logits, rows, num_ids, losses, correct, log_normalisers=None) -> None:
        """See `RowFunction`."""
        is_target, within, num_rows = self.target_ids != IGNORED_ID, self.target_rows - rows.start, len(logits)
        inside = (within >= 0) & (within < num_rows) & is_target
        at = (within.clamp(0, num_rows - 1), self.target_ids.clamp(min=0))
        scores, largest = logits[at], logits.amax(dim=-1)
        correct |= (scores >= largest[at[0]]) & inside
        torch.softmax(logits, dim=-1, out=logits)
        of_rows, groups = largest - logits.amax(dim=-1).log(), numbered(self.groups)
        own = self.logsumexp_of_groups
        of_groups = own(of_rows, groups[rows]) if log_normalisers is None else log_normalisers[rows]
        losses += (of_groups[at[0]] - scores).where(inside, 0.0)
        # By the logsumexp of a row: the weights of its group times its share of the group's probability.
        weights = self.weights.where(is_target, 0.0).to(logits.dtype)
        totals = weights.new_zeros(len(groups)).index_add(0, groups[self.target_rows], weights)
        by_rows = totals[groups[rows]] * (of_rows - of_groups).exp()
        logits.mul_(by_rows[:, None]).index_put_(at, -weights.where(inside, 0.0), accumulate=True)


def numbered(groups: Tensor) -> Tensor:
    """The groups by their numbers 0, 1, ..., so that a tensor as long as `groups` has an entry for each."""
    return (groups.diff(prepend=groups[:1]) != 0).cumsum(0)


@dataclass
class HybridBound(RowFunction):
    """The bound of interpolating diffusion at a token that noise may have replaced (arXiv 2503.04482, theorem 1).

    At a noise level a token x is itself with probability alpha, the mask with some probability, and each of the N ids
    that are not suppressed with probability u beside. This made z. With the prediction p = softmax(logits),
    q(j) = alpha 1[j = x] + u and p'(j) = alpha p_j + u,

        loss = KL(q || p') + r - 1 - log r,    r = q(z) / p'(z) (1 where z is the mask),

    which times rho(z) / q(z) is the rate of the bound, rho(z) = d share(z) / dt - (d log alpha / dt) share(z) for the
    share of noise at z. The mask and all else that is no prediction must be suppressed. Without uniform noise, u = 0,
    the loss is alpha x `CrossEntropy`.

    The two sums of the KL are put so that no large numbers cancel: with k = alpha / u and e_j = r_j - 1,

        KL = alpha log(1 + e_x) + u [log(1 + k) - sum_j log(1 + k p_j)],    e_x = k (1 - p_x) / (1 + k p_x).

    Attributes:
        noisy_ids: (S,) z.
        alpha: (S,) in (0, 1).
        uniform: (S,) u > 0.
    """

    noisy_ids: Tensor
    alpha: Tensor
    uniform: Tensor

    def losses_and_gradient_(self, logits: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
        """See `RowFunction`."""
        ids, noisy_ids = self.target_ids[:, None], self.noisy_ids[:, None]
        alpha, u = self.alpha.to(logits.dtype)[:, None], self.uniform.to(logits.dtype)[:, None]
        kappa, weights, is_kept = alpha / u, self.weights[:, None], ids == noisy_ids
        _, correct = softmax_(logits, ids)
        # 1 - p_x, summed: of a prediction that is nearly sure the difference would be rounding alone.
        p_x = logits.gather(1, ids)
        rest = logits.scatter_(1, ids, 0.0).sum(dim=-1, keepdim=True)
        odds = logits.scatter_(1, ids, p_x) * kappa
        odds_x, odds_z = odds.gather(1, ids), odds.gather(1, noisy_ids)
        excess = kappa * rest / (1 + odds_x)
        share_x, share_z = odds_x / (1 + odds_x), odds_z / (1 + odds_z)
        divergence = alpha * excess.log1p() + u * (kappa.log1p() - odds.log1p().sum(dim=-1, keepdim=True))
        losses = divergence + torch.where(is_kept, excess - excess.log1p(), odds_z.log1p() - share_z)
        # u_j of the module's formula: -u share_j everywhere, and more at x and at z.
        shares = odds.div_(odds + 1)
        at_x = -share_x * (torch.where(is_kept, alpha + excess, alpha) + u) * weights
        at_z = (share_z * share_z).where(~is_kept, 0.0) * weights
        of_others = at_z - u * weights * (shares.sum(dim=-1, keepdim=True) - share_x)
        logits.mul_(-at_x - of_others).addcmul_(shares, -u * weights)
        logits.scatter_add_(1, noisy_ids, at_z).scatter_(1, ids, at_x * rest - p_x * of_others)
        return losses[:, 0], correct[:, 0]
