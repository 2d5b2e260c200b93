"""
Stock classes of transformers learn to read the folders of this package, whichever of the two is imported first.

transformers has functions for that, but nothing that calls them: no entry points. So each of its modules that keeps a
table is given our entry as soon as it is there: at once, or when it is imported. Nothing is imported for it earlier.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

AUTO_CLASSES = ("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSequenceClassification")


def register() -> None:
    """Registers our folders with the modules of transformers that are imported, and with the others later."""
    for name in _ENTRIES.keys() & sys.modules.keys():
        _enter(sys.modules[name])
    sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Lets the other finders find the modules that have an entry, and makes the entry when the module is complete."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _ENTRIES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_enter(module: ModuleType) -> None:
                execute(module)
                _enter(module)

            spec.loader.exec_module = execute_and_enter  # type: ignore[method-assign]  # of this one loader
        return spec


def _enter(module: ModuleType) -> None:
    if find_spec("torch") and find_spec("nncf"):  # without them, transformers says what it cannot read
        _ENTRIES[module.__name__](module)


def _quantizer(_auto: Any) -> None:
    import nncf_ext.saving.quantizer  # noqa: F401  registers itself: it may be what imports the module of transformers


def _configuration(auto: Any) -> None:
    from nncf_ext.saving.structured import StructuredConfig

    auto.AutoConfig.register(StructuredConfig.model_type, StructuredConfig, exist_ok=True)


def _models(auto: Any) -> None:
    from nncf_ext.saving.structured import StructuredConfig, StructuredModel

    for name in AUTO_CLASSES:
        getattr(auto, name).register(StructuredConfig, StructuredModel, exist_ok=True)


_ENTRIES: Mapping[str, Callable[[Any], None]] = {
    "transformers.quantizers.auto": _quantizer,
    "transformers.models.auto.configuration_auto": _configuration,
    "transformers.models.auto.modeling_auto": _models,
}
