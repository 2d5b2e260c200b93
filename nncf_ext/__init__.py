"""
Compression of PyTorch models in the manner of NNCF.

Every public name is loaded on first use, so that ``import nncf_ext`` needs neither torch nor nncf.
"""

import ast
import os
import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nncf_ext.saving.registration import register as _register

# The public names, one statement each. Type checkers see imports; at run time they are read as text, by _homes().
if TYPE_CHECKING:
    from nncf_ext.algorithms.accuracy_control.control import (
        compress_with_accuracy_control as compress_with_accuracy_control,
    )
    from nncf_ext.algorithms.accuracy_control.forms import WeightForm as WeightForm
    from nncf_ext.algorithms.accuracy_control.objectives import packed_bytes as packed_bytes
    from nncf_ext.algorithms.accuracy_control.parameters import (
        AdvancedAccuracyControlParameters as AdvancedAccuracyControlParameters,
    )
    from nncf_ext.algorithms.accuracy_control.report import AccuracyControlResult as AccuracyControlResult
    from nncf_ext.algorithms.accuracy_control.report import FormPlan as FormPlan
    from nncf_ext.algorithms.activation_sparsity.parameters import (
        AdvancedActivationSparsityParameters as AdvancedActivationSparsityParameters,
    )
    from nncf_ext.algorithms.attention_pruning.algorithm import AttentionLevels as AttentionLevels
    from nncf_ext.algorithms.attention_pruning.algorithm import find_attention_levels as find_attention_levels
    from nncf_ext.algorithms.attention_pruning.rule import prune_tokens as prune_tokens
    from nncf_ext.algorithms.bootstrap_nas.algorithm import SuperNetwork as SuperNetwork
    from nncf_ext.algorithms.bootstrap_nas.batch_norm import adapt_batch_norm as adapt_batch_norm
    from nncf_ext.algorithms.bootstrap_nas.batch_norm import adapted_batch_norm as adapted_batch_norm
    from nncf_ext.algorithms.bootstrap_nas.eftnas import FirstOrderImportance as FirstOrderImportance
    from nncf_ext.algorithms.bootstrap_nas.eftnas import eftnas_loss as eftnas_loss
    from nncf_ext.algorithms.bootstrap_nas.parameters import (
        AdvancedBootstrapNasParameters as AdvancedBootstrapNasParameters,
    )
    from nncf_ext.algorithms.bootstrap_nas.shrinking import BOOTSTRAP_NAS_STAGES as BOOTSTRAP_NAS_STAGES
    from nncf_ext.algorithms.bootstrap_nas.shrinking import ShrinkingStage as ShrinkingStage
    from nncf_ext.algorithms.bootstrap_nas.shrinking import shrinking_schedule as shrinking_schedule
    from nncf_ext.algorithms.bootstrap_nas.training import sandwich as sandwich
    from nncf_ext.algorithms.bootstrap_nas.training import sandwich_step as sandwich_step
    from nncf_ext.algorithms.bootstrap_nas.training import soft_cross_entropy as soft_cross_entropy
    from nncf_ext.algorithms.bootstrap_nas.training import uniform_over_macs as uniform_over_macs
    from nncf_ext.algorithms.elastic_lora.algorithm import ElasticLora as ElasticLora
    from nncf_ext.algorithms.elastic_lora.parameters import RankGroup as RankGroup
    from nncf_ext.algorithms.elastic_lora.training import ElasticCallback as ElasticCallback
    from nncf_ext.algorithms.elastic_lora.training import sandwich_loss as sandwich_loss
    from nncf_ext.algorithms.lonas.algorithm import ElasticBaseAndLora as ElasticBaseAndLora
    from nncf_ext.algorithms.mamba_shedder.parameters import (
        AdvancedMambaShedderParameters as AdvancedMambaShedderParameters,
    )
    from nncf_ext.algorithms.mamba_shedder.parameters import PruningStage as PruningStage
    from nncf_ext.algorithms.multipruner.parameters import (
        AdvancedMultiPrunerParameters as AdvancedMultiPrunerParameters,
    )
    from nncf_ext.algorithms.sparse_weights.parameters import (
        AdvancedSparseWeightsParameters as AdvancedSparseWeightsParameters,
    )
    from nncf_ext.algorithms.sqft.algorithm import make_mergeable as make_mergeable
    from nncf_ext.algorithms.sqft.gptq_checkpoint import load_gptq as load_gptq
    from nncf_ext.algorithms.sqft.merging import merge as merge
    from nncf_ext.algorithms.sqft.parameters import AdvancedSqftParameters as AdvancedSqftParameters
    from nncf_ext.algorithms.sqft.partner import prerounding as prerounding
    from nncf_ext.algorithms.zero_cost.evolution import ProxyTask as ProxyTask
    from nncf_ext.algorithms.zero_cost.evolution import evolve_proxy as evolve_proxy
    from nncf_ext.algorithms.zero_cost.parameters import AdvancedEznasParameters as AdvancedEznasParameters
    from nncf_ext.algorithms.zero_cost.proxy import Proxy as Proxy
    from nncf_ext.algorithms.zero_cost.statistics import StatisticsCache as StatisticsCache
    from nncf_ext.compression import compress as compress
    from nncf_ext.compression import structure_plan as structure_plan
    from nncf_ext.elastic import make_elastic as make_elastic
    from nncf_ext.exploration.additive import additive_front as additive_front
    from nncf_ext.exploration.additive import best_additive as best_additive
    from nncf_ext.exploration.engine import search as search
    from nncf_ext.exploration.linas import LinasSampler as LinasSampler
    from nncf_ext.exploration.nemo import NemoSampler as NemoSampler
    from nncf_ext.exploration.objectives import Measured as Measured
    from nncf_ext.exploration.objectives import Objective as Objective
    from nncf_ext.exploration.objectives import macs as macs
    from nncf_ext.exploration.objectives import parameter_count as parameter_count
    from nncf_ext.exploration.objectives import weight_bytes as weight_bytes
    from nncf_ext.exploration.openvino_latency import latency as latency
    from nncf_ext.exploration.report import SearchReport as SearchReport
    from nncf_ext.exploration.samplers import HillClimbingSampler as HillClimbingSampler
    from nncf_ext.exploration.space import SearchSpace as SearchSpace
    from nncf_ext.extraction import extract as extract
    from nncf_ext.importance.metrics import DivergenceMetric as DivergenceMetric
    from nncf_ext.importance.metrics import Metric as Metric
    from nncf_ext.importance.metrics import PerplexityMetric as PerplexityMetric
    from nncf_ext.input_scopes import sparsify_activations as sparsify_activations
    from nncf_ext.parameters import ActivationAllocation as ActivationAllocation
    from nncf_ext.parameters import ActivationCentering as ActivationCentering
    from nncf_ext.parameters import CompressMode as CompressMode
    from nncf_ext.parameters import ElasticMode as ElasticMode
    from nncf_ext.parameters import MergeMode as MergeMode
    from nncf_ext.parameters import SearchSampler as SearchSampler
    from nncf_ext.parameters import SparsityAllocation as SparsityAllocation
    from nncf_ext.parameters import UnitImportance as UnitImportance
    from nncf_ext.report import CompressionReport as CompressionReport
    from nncf_ext.report import compression_report as compression_report
    from nncf_ext.saving.checkpoint import save_pretrained as save_pretrained
    from nncf_ext.saving.fitting import load_compressed as load_compressed
    from nncf_ext.saving.loading import load_pretrained as load_pretrained
    from nncf_ext.saving.thresholds import load_thresholds as load_thresholds
    from nncf_ext.saving.thresholds import save_thresholds as save_thresholds
    from nncf_ext.structure.counting import count_costs as count_costs
    from nncf_ext.structure.masking import masked as masked
    from nncf_ext.structure.plan import StructurePlan as StructurePlan
    from nncf_ext.structure.uniform import snap_to_uniform as snap_to_uniform
    from nncf_ext.training.distillation import DistillationTrainer as DistillationTrainer
    from nncf_ext.training.zeros import KeepZeros as KeepZeros


if os.environ.get("NNCF_EXT_NO_TELEMETRY", "0") not in ("", "0"):
    # openvino and nncf send messages by means of this package, and do without where it is not installed.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


_register()


def _homes() -> dict[str, str]:
    """
    :return: The module of every public name.
    """
    source = ast.parse(Path(__file__).read_text(encoding="utf-8"))
    block = next(statement for statement in source.body if isinstance(statement, ast.If))
    imports = [statement for statement in block.body if isinstance(statement, ast.ImportFrom)]
    return {name.name: str(each.module) for each in imports for name in each.names}


_HOMES = _homes()
__all__ = [*_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name == "__version__":
        try:
            return version("nncf-ext")
        except PackageNotFoundError:
            return "unknown"
    if name not in _HOMES:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
