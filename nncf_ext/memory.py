"""Memory that is short is not the fault of what was given."""

import torch

_WORDS = ("allocate memory", "not enough memory", "out of memory")  # of torch's allocators for CPU, on Windows, for MPS


def is_out_of_memory(error: BaseException) -> bool:
    """
    :param error: What reading, making or running a model has raised.
    :return: Whether the machine had too little memory, which smaller inputs or more memory mend, and nothing else.
    """
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS)
