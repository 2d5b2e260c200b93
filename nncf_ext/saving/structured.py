"""How stock classes of transformers read a model whose layers differ, where this package is imported."""

from pathlib import Path
from typing import Any

import torch

from nncf_ext.standalone import modeling_nncf_structured
from nncf_ext.standalone.modeling_nncf_structured import StructuredConfig as StructuredConfig


class StructuredModel(modeling_nncf_structured.StructuredModel):
    """Stands where transformers wants a class; a folder is read by :func:`nncf_ext.load_pretrained`."""

    @classmethod
    def from_pretrained(cls, folder: str, *_args: Any, config: StructuredConfig, **options: Any) -> Any:
        """
        :param folder: Folder or repository.
        :param config: Its configuration.
        :param options: ``dtype``; for a repository, also what finds a file of it. Nothing that splits or quantizes.
        :return: The model, of the class that was saved, in evaluation mode.
        :raises ValueError: An option is not supported.
        :raises nncf.ValidationError: The folder is damaged.
        """
        if not Path(folder).is_dir():
            return super().from_pretrained(folder, config=config, **options)
        cls.check_options(options)
        from nncf_ext.saving.loading import load_pretrained

        # transformers writes the caller's choice into the configuration
        dtype: Any = options.get("dtype") or config.dtype
        if isinstance(dtype, str):
            dtype = None if dtype == "auto" else getattr(torch, dtype)
        return load_pretrained(folder, dtype=dtype)
