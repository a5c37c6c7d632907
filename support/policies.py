"""What PyTorch's distributions lack: drawing without a GPU's waiting, and a copy without a gradient."""

import torch
from torch.distributions import Categorical, Distribution, Independent, Normal

Distribution.set_default_validate_args(False)  # the checks would make a GPU wait at every call


def sample(policy):
    """As policy.sample(), but a GPU need not wait for its checks -> actions (..., N) or (..., N, A)."""
    if policy.has_rsample:
        return policy.rsample()
    gumbel = -torch.empty_like(policy.logits).exponential_().log()
    return (policy.logits + gumbel).argmax(-1)


def constant(policy):
    """The same policy without a gradient (stop-gradient)."""
    if isinstance(policy, Categorical):
        return Categorical(logits=policy.logits.detach())
    return Independent(Normal(policy.base_dist.loc.detach(), policy.base_dist.scale.detach()), 1)
