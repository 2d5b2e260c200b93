"""
Passes of a model without one candidate, each begun as late as possible.

Nothing before a candidate's layer differs from the pass of the model that still has it. Nor does anything that stands
before the layer which the last step changed differ from the candidate's own pass in the step before. What blocks gave
there is kept, within a limit of memory; blocks that run do so as in a pass of the whole masked model, so logits are the
same, bit for bit.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nncf_ext.pruning.candidates import Removal
from nncf_ext.structure.dimensions import Dimensions
from nncf_ext.structure.masking import mask_dimension
from nncf_ext.structure.plan import StructurePlan


class PrefixCache:
    """
    :param model: The dense model, masked by the caller.
    :param dimensions: Its dimensions.
    :param batches: Inputs of the model by name, ``[sequences, ...]``.
    :param reuse_bytes: Memory for outputs of blocks that wait for the next step, bytes, shared by the batches. What all
        blocks give for one batch is kept in any case.
    """

    def __init__(
        self, model: nn.Module, dimensions: Dimensions, batches: Sequence[Mapping[str, Tensor]], reuse_bytes: int
    ) -> None:
        self._model = model
        self._dimensions = dimensions
        blocks: Any = model.get_submodule(dimensions.blocks)
        self._blocks: tuple[nn.Module, ...] = tuple(blocks)
        self._batches = batches
        self._bytes_per_batch = reuse_bytes // max(1, len(batches))
        self._plan: StructurePlan | None = None
        self._candidates: Sequence[Removal] = ()
        self._whole: list[list[Any]] = [[] for _ in batches]
        """Outputs of the first blocks of the model with all candidates, by batch."""
        self._single: list[dict[Removal, dict[int, Any]]] = [{} for _ in batches]
        """Outputs of some blocks in the pass without one candidate, by batch."""
        self._stride: list[int] = [1] * len(batches)
        """Every how many blocks an output of a candidate's pass is kept, by batch."""

    def prepare(self, plan: StructurePlan, candidates: Sequence[Removal]) -> None:
        """
        To be called first in every step. Forgets what stands behind a layer that differs from the step before.

        :param plan: What is there with all candidates.
        :param candidates: What can be left out.
        """
        if self._plan is not None:
            before = self._plan.kept
            changed = [self._block(name) for name, kept in plan.kept.items() if before[name] != kept]
            first = min(changed, default=len(self._blocks))
            for whole, single in zip(self._whole, self._single, strict=True):
                del whole[first:]
                for removal, outputs in single.items():
                    single[removal] = {block: output for block, output in outputs.items() if block < first}
        self._plan, self._candidates = plan, candidates

    def whole(self, number: int) -> Tensor:
        """
        The pass that all others of the batch start from; to be called before them.

        :param number: Index of the batch.
        :return: Logits of the model with all candidates, ``[sequences, tokens, vocabulary]``.
        """
        # Of other batches nothing stays for which there is no memory between steps.
        for other, known in enumerate(self._whole):
            if other != number and self._stride[other] == len(self._blocks):
                known.clear()
        known = self._whole[number]
        begin, blocks = len(known), range(len(known), len(self._blocks))
        logits, outputs = self._run(self._batches[number], known[-1] if known else None, begin, blocks)
        known.extend(outputs[block] for block in blocks)
        # The stride only grows: what was thinned out once cannot come back.
        stride = self._stride[number] = max(self._stride[number], self._affordable_stride(number, _bytes(known[-1])))
        for candidate, single in self._single[number].items():
            kept = {block: output for block, output in single.items() if (block + 1) % stride == 0}
            self._single[number][candidate] = kept
        return logits

    def begin(self, number: int, candidate: Removal) -> int:
        """
        :param number: Index of the batch.
        :param candidate: What is left out.
        :return: The first block that has to run.
        """
        return 1 + max(self._single[number].get(candidate, ()), default=self._block(candidate.dimension) - 1)

    def without(self, number: int, candidates: Sequence[Removal]) -> Tensor:
        """
        Several candidates run in one pass, side by side on the axis of the batch: the same mathematics, in matrix
        products of another shape, so that the last bits may differ.

        :param number: Index of the batch.
        :param candidates: What is left out, one by one; the first block that has to run is the same.
        :return: Logits, ``[candidates, sequences, tokens, vocabulary]``.
        """
        count, sequences = len(candidates), len(self._batches[number]["input_ids"])
        (begin,) = {self.begin(number, each) for each in candidates}
        whole, single = self._whole[number], self._single[number]
        # Before a candidate's own block nothing differs from the whole model; behind it only its own pass will do.
        known = [
            single[each][begin - 1] if begin > self._block(each.dimension) else whole[begin - 1]
            for each in candidates
            if begin
        ]
        batch = self._batches[number]
        if count > 1:
            batch = {
                name: torch.cat([value] * count) if len(value) == sequences else value for name, value in batch.items()
            }
        stride = self._stride[number]
        # The last block's output is never kept: nothing begins behind it.
        kept = [block for block in range(begin, len(self._blocks) - 1) if (block + 1) % stride == 0]
        with self._masked(candidates, sequences):
            logits, outputs = self._run(batch, _joined(known) if known else None, begin, kept)
        for block, output in outputs.items():
            for candidate, own in zip(candidates, _apart(output, count), strict=True):
                single.setdefault(candidate, {})[block] = own
        return logits.unflatten(0, (count, -1))

    def _block(self, dimension: str) -> int:
        return self._dimensions[dimension].block

    def _affordable_stride(self, number: int, size: int) -> int:
        """The least for which all that is kept of a batch fits; the number of blocks where nothing does."""
        blocks = len(self._blocks)
        room = self._bytes_per_batch // size - blocks
        firsts = [self._block(each.dimension) for each in {*self._candidates, *self._single[number]}]
        for stride in range(1, blocks):
            kept = [block for block in range(blocks - 1) if (block + 1) % stride == 0]
            if sum(block >= first for first in firsts for block in kept) <= room:
                return stride
        return blocks

    @contextmanager
    def _masked(self, candidates: Sequence[Removal], sequences: int) -> Iterator[None]:
        """Each candidate is left out of its own rows of the batch."""
        device = next(self._model.parameters()).device
        own = torch.eye(len(candidates), dtype=torch.bool, device=device).repeat_interleave(sequences, dim=1)
        with ExitStack() as undo:
            for candidate, rows in zip(candidates, own, strict=True):
                for name in candidate.dimensions:
                    # A candidate that runs alone is left out for good: its branch does not run at all.
                    own_rows = None if rows.all() else rows
                    undo.callback(mask_dimension(self._model, self._dimensions[name], candidate.kept, own_rows))
            yield

    def _run(
        self, batch: Mapping[str, Tensor], known: Any, begin: int, kept: Sequence[int]
    ) -> tuple[Tensor, dict[int, Any]]:
        """A pass in which the blocks before one repeat what is known; gives logits and what some blocks gave."""
        blocks: Any = self._model.get_submodule(self._dimensions.blocks)
        outputs: dict[int, Any] = {}

        def keeping(block: int) -> Callable[[Any, Any, Any], None]:
            return lambda _module, _inputs, output: outputs.update({block: output})

        with ExitStack() as undo:
            for block in kept:
                undo.callback(blocks[block].register_forward_hook(keeping(block)).remove)
            for block in range(begin):
                undo.callback(blocks.__setitem__, block, self._blocks[block])
                blocks[block] = _Repeated(known)
            return self._model(**batch, use_cache=False).logits, outputs


class _Repeated(nn.Module):
    """Stands for blocks whose output is known."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output

    def forward(self, *_args: Any, **_kwargs: Any) -> Any:
        return self._output


def _parts(output: Any) -> tuple[Any, ...]:
    """Of some architectures a block gives hidden states and more."""
    return output if isinstance(output, tuple) else (output,)


def _joined(outputs: Sequence[Any]) -> Any:
    """Side by side on the axis of the batch."""
    if len(outputs) == 1:
        return outputs[0]
    joined = tuple(
        torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
        for parts in zip(*map(_parts, outputs), strict=True)
    )
    return joined if isinstance(outputs[0], tuple) else joined[0]


def _apart(output: Any, count: int) -> list[Any]:
    """The opposite of :func:`_joined`."""
    parts = [each.chunk(count) if isinstance(each, Tensor) else (each,) * count for each in _parts(output)]
    return [own if isinstance(output, tuple) else own[0] for own in zip(*parts, strict=True)]


def _bytes(output: Any) -> int:
    return sum(each.nbytes for each in _parts(output) if isinstance(each, Tensor))
