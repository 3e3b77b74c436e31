"""What the layers compute, as functions of tensors. Only here is asked who computes it."""

from cassetta.functional.attention import dot_product_attention as dot_product_attention
from cassetta.functional.block import Product as Product
from cassetta.functional.conv import (
    conv as conv,
    conv_transposed as conv_transposed,
    pad as pad,
    same_padding as same_padding,
)
from cassetta.functional.deferred import (
    Deferred as Deferred,
    convolved as convolved,
    defer as defer,
    join as join,
    materialize as materialize,
)
from cassetta.functional.norm import (
    Normalization as Normalization,
    Pool as Pool,
    Running as Running,
)
from cassetta.functional.pool import max_pool as max_pool
from cassetta.functional.resize import (
    fit as fit,
    fit_at_once as fit_at_once,
    is_linear as is_linear,
    linear_grid as linear_grid,
    nth as nth,
    resize as resize,
    resize_deferred as resize_deferred,
)
