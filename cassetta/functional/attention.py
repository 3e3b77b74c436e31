"""Attention between all voxels of an image."""

from torch import Tensor
from torch.nn import functional as F


def dot_product_attention(
    qkv: Tensor, key_channels: int, val_channels: int, nb_heads: int = 1, scaled: bool = True
) -> Tensor:
    """Every voxel gathers values from all voxels, weighted by softmax(query . key).

    softmax over voxels j of (q_i . k_j [/ sqrt(K)]), times v_j  [arXiv:1706.03762, eq. 1].

    Parameters
    ----------
    qkv : (B, heads * (2K + V), *size) tensor
        Queries (K channels), keys (K) and values (V) of the first head, then of the next.
    key_channels, val_channels, nb_heads : int
        K, V and the number of heads.
    scaled : bool
        Divide the products by the square root of K.

    Returns
    -------
    out : (B, heads * V, *size) tensor
    """
    batch, _, *size = qkv.shape
    per_head = qkv.reshape(batch, nb_heads, 2 * key_channels + val_channels, -1).transpose(-1, -2)
    query, key, value = per_head.split([key_channels, key_channels, val_channels], dim=-1)
    scale = None if scaled else 1.0
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)  # (B, heads, voxels, V)
    return out.transpose(-1, -2).reshape(batch, nb_heads * val_channels, *size)
