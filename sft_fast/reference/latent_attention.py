"""Oracle of latent attention, which attends to the narrow vectors themselves."""

import torch
from torch import Tensor


def latent_attention(
    queries: Tensor, latents: Tensor, turned_keys: Tensor, up: Tensor, scale: float
) -> Tensor:
    """Causal attention of one sample whose keys and values are never computed.

    A head's score is scale * (q^T K c + r^T t) for its query (q, r), the narrow vector c of a token
    and the rotated part t of its key; its output is V times the weighted sum of the vectors c.

    Source: DeepSeek-V2, 2024 (arXiv 2405.04434), section 2.1.2 and appendix C.

    Args:
        queries: [T, heads, n + r], with n channels without positions and then r rotated ones.
        latents: [T, rank], after their norm.
        turned_keys: [T, r], rotated; all heads share them.
        up: [heads, n + v, rank], of each head K [n, rank] and V [v, rank].
        scale: factor of the scores.

    Returns: [T, heads, v].
    """
    num_turned = turned_keys.shape[1]
    outputs = []
    for head in range(len(up)):
        plain, turned = queries[:, head].split([queries.shape[2] - num_turned, num_turned], dim=1)
        key_matrix, value_matrix = up[head, : plain.shape[1]], up[head, plain.shape[1] :]
        scores = scale * (plain @ key_matrix @ latents.t() + turned @ turned_keys.t())
        is_later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(is_later, -torch.inf).softmax(dim=1)
        outputs.append(weights @ latents @ value_matrix.t())
    return torch.stack(outputs, dim=1)
