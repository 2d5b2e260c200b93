"""The enums users type. This file needs nothing but the standard library."""

from enum import StrEnum


class CompressMode(StrEnum):
    """
    The one-shot compression methods of :func:`nncf_ext.compress`.

    :param SPARSE_MAGNITUDE: Zeros the smallest weights of every output row. Needs no data.
    :param SPARSE_WANDA: Zeros the weights of every output row with the smallest product of weight magnitude and
        input norm. Weights that stay are not changed. https://arxiv.org/abs/2306.11695
    :param SPARSE_GPT: Zeros the weights whose removal costs least in the layer's output, block of columns by block of
        columns, and corrects the weights that stay. https://arxiv.org/abs/2301.00774
    """

    SPARSE_MAGNITUDE = "sparse_magnitude"
    SPARSE_WANDA = "sparse_wanda"
    SPARSE_GPT = "sparse_gpt"
