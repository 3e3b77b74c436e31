"""What the layers compute, as functions of tensors. Only here is asked who computes it."""

from cassetta.functional.attention import dot_product_attention as dot_product_attention
from cassetta.functional.conv import (
    conv as conv,
    conv_transposed as conv_transposed,
    pad as pad,
    same_padding as same_padding,
)
from cassetta.functional.resize import fit as fit, nth as nth, resize as resize
