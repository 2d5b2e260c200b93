"""
What is left of a Mamba mixer without its state space: projection, short convolution, gate, projection.

This file needs torch only: it lies beside the weights of models whose layers differ, for those who load them without
this package.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


class GatedConvMixer(nn.Module):
    """
    A mixer whose scan gives back what it is given: no step sizes, no states, no skip.

    ``x, z = in_proj(hidden); x = act(conv1d(x)); out_proj(norm(x, z))`` for Mamba-2 and Zamba2, which have a gated
    normalization, and ``out_proj(x * act(z))`` for Mamba-1. What is left in the cache is the input of the convolution.

    :param mixer: A mixer of transformers' Mamba, Falcon Mamba, Mamba-2 or Zamba2. Its weights are seen, not copied.

    Source: Munoz et al., Mamba-Shedder (arXiv 2501.17088), removal of SSM modules. There the projections that nobody
    reads stay in the model; here they are gone.
    """

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        self.layer_idx = mixer.layer_idx
        self.intermediate_size = width = mixer.intermediate_size
        self.conv_kernel_size = mixer.conv_kernel_size
        self.act = mixer.act
        self.in_proj = nn.Linear(mixer.in_proj.in_features, 2 * width, mixer.in_proj.bias is not None, device="meta")
        kernel, bias = mixer.conv1d.kernel_size[0], mixer.conv1d.bias is not None
        self.conv1d = nn.Conv1d(width, width, kernel, groups=width, padding=kernel - 1, bias=bias, device="meta")
        for own, other in ((self.in_proj, mixer.in_proj), (self.conv1d, mixer.conv1d)):
            for name, parameter in other.named_parameters():
                kept = parameter.detach()[: 2 * width if own is self.in_proj else width]
                setattr(own, name, nn.Parameter(kept, requires_grad=parameter.requires_grad))
        self.norm = getattr(mixer, "norm", None)
        self.out_proj = mixer.out_proj

    @classmethod
    def standing_for(cls, module: nn.Module) -> "GatedConvMixer":
        """:return: What stands in place of a mixer."""
        return cls(module)

    def forward(
        self, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None, **_kwargs: Any
    ) -> Tensor:
        """
        :param hidden_states: ``[sequences, tokens, hidden]``.
        :param cache_params: Cache of transformers, or None.
        :param attention_mask: ``[sequences, tokens]``, zero where a token is padding, or None.
        :return: Of the shape of the hidden states.
        """
        tokens, gated_norm = hidden_states.shape[1], self.norm is not None
        mask = None  # [sequences, 1, tokens]
        if attention_mask is not None and attention_mask.shape[1] == tokens > 1:
            mask = attention_mask.unsqueeze(1).to(hidden_states.dtype)
        if mask is not None and gated_norm:
            hidden_states = hidden_states * mask.transpose(1, 2)
        # Mamba-2 keeps the gate before the input, Mamba-1 behind it.
        first, second = self.in_proj(hidden_states).split(self.intermediate_size, dim=-1)
        x, gate = (second, first) if gated_norm else (first, second)
        x = x.transpose(1, 2)
        if mask is not None:
            x = x * mask
        if cache_params is not None and cache_params.has_previous_state(self.layer_idx):
            state = cache_params.update_conv_state(x, layer_idx=self.layer_idx)
            x = (state * self.conv1d.weight.squeeze(1)).sum(dim=-1, keepdim=True)
            if self.conv1d.bias is not None:
                x = x + self.conv1d.bias.unsqueeze(-1)
        else:
            if cache_params is not None:
                state = F.pad(x, (self.conv_kernel_size - tokens, 0))
                cache_params.update_conv_state(state, layer_idx=self.layer_idx)
            x = self.conv1d(x)[..., :tokens]
        x = self.act(x)
        if mask is not None:
            x = x * mask
        x = x.transpose(1, 2)
        mixed = self.norm(x, gate) if self.norm is not None else x * self.act(gate)
        return self.out_proj(mixed.to(hidden_states.dtype))
