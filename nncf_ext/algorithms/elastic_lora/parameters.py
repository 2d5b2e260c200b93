"""What can be asked of elastic adapters."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import nncf


@dataclass(frozen=True)
class RankGroup:
    """
    Adapters that share one rank.

    :param patterns: Regular expressions, compared with the start of a layer's path in the base model, such as
        ``model.layers.0.self_attn.q_proj``: ``[r".*\\.(q|k|v)_proj$"]``.
    :param ranks: The ranks to choose from. The largest must be the rank of the adapters.
    :param per: ``"block"``: one rank, and one dimension of the search space, for each repeated block of the model.
        ``"model"``: one for all of the model.
    :param name: Name of the group in dimensions (``model.layers.0.<name>``, or ``<name>``); by default the last names
        of its layers: ``q_proj+k_proj+v_proj``.
    :raises nncf.ValidationError: There are no patterns, one is no regular expression, ranks are not distinct positive
        integers, or `per` is unknown.
    """

    patterns: Sequence[str]
    ranks: Sequence[int]
    per: Literal["block", "model"] = "block"
    name: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str) or not self.patterns:
            msg = f"patterns of a RankGroup must be a list of regular expressions; got {self.patterns!r}."
            raise nncf.ValidationError(msg)
        for pattern in self.patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                msg = f"Pattern {pattern!r} of a RankGroup is no regular expression: {error}."
                raise nncf.ValidationError(msg) from None
        sound = all(type(rank) is int and rank > 0 for rank in self.ranks)
        if not self.ranks or not sound or len(set(self.ranks)) < len(self.ranks):
            msg = f"ranks of a RankGroup must be distinct positive integers, such as [32, 24, 16]; got {self.ranks!r}."
            raise nncf.ValidationError(msg)
        if self.per not in ("block", "model"):
            msg = f"per of a RankGroup must be 'block' or 'model'; got {self.per!r}."
            raise nncf.ValidationError(msg)
