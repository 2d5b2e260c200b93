"""Settings of :func:`nncf_ext.compress_with_accuracy_control` beside its arguments."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import nncf

from nncf_ext.algorithms.accuracy_control.forms import DENSE, FORMS, WeightForm, by_size
from nncf_ext.algorithms.sparse_weights.parameters import AdvancedSparseWeightsParameters
from nncf_ext.parameters import CompressMode, SearchSampler, parse_choice


@dataclass(frozen=True)
class AdvancedAccuracyControlParameters:
    """
    :param forms: What the weight of a layer can become; it can always stay as it is. A layer that no group divides has
        those that fit.
    :param removable: Whether attentions and MLPs may be left out as a whole, where the architecture is known.
    :param mode: Where zeros are put, and how weights that stay make up for them.
    :param solver: How a layer is compressed to a form; ``quantization`` and ``group_size`` come from the form.
    :param sampler: How the search looks for combinations; None: by integer programming, with prices of errors that
        each combination corrects.
    :param finalists: How many of the best combinations are judged by all held-out data and measured as a whole.
    :param held_out: Fraction of the dataset's items, the last ones, that nothing is calibrated on: what the loss is
        judged by.
    """

    forms: Sequence[WeightForm | str] = FORMS
    removable: bool = True
    mode: CompressMode = CompressMode.SPARSE_ADMM
    solver: AdvancedSparseWeightsParameters = field(default_factory=AdvancedSparseWeightsParameters)
    sampler: SearchSampler | None = None
    finalists: int = 8
    held_out: float = 0.25

    @property
    def by_size(self) -> dict[int, WeightForm]:
        """:return: Forms by their sizes, largest first, that of the dense model among them."""
        given = [WeightForm.parse(each) if isinstance(each, str) else each for each in self.forms]
        return by_size([*given, *([] if DENSE in given else [DENSE])])

    def check(self) -> None:
        """
        :raises nncf.ValidationError: A value is out of range, or a form cannot be read.
        :raises nncf.ParameterNotSupportedError: The mode or the sampler does not serve here.
        """
        if len(self.by_size) < 2:
            raise nncf.ValidationError(f"A choice needs two forms at least; got {list(map(str, self.forms))}.")
        for form in self.by_size.values():
            if form.size >= DENSE.size and form != DENSE:
                msg = f"{form} takes {form.size / 1000:g} bits a weight, more than the dense weight. Leave it out."
                raise nncf.ValidationError(msg)
        parse_choice(self.mode, (CompressMode.SPARSE_GPT, CompressMode.SPARSE_ADMM), "mode")
        of_one_point = (SearchSampler.HEURISTIC, SearchSampler.HILL_CLIMBING)
        if self.sampler is not None:
            parse_choice(self.sampler, [each for each in SearchSampler if each not in of_one_point], "sampler")
        if self.finalists < 1 or not 0 < self.held_out < 1:
            msg = (
                f"finalists is a number from 1, held_out a fraction between 0 and 1; got {self.finalists} and "
                f"{self.held_out}."
            )
            raise nncf.ValidationError(msg)
        if self.solver.quantization is not None or self.solver.pattern is not None or self.solver.keep_prerounding:
            msg = "Quantization and zeros come from the forms: leave them out of solver."
            raise nncf.ValidationError(msg)
