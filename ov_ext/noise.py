"""
What do the commands say on stderr? Their own lines only; with ``--verbose`` also what the libraries below them say.

This file stands in ``nncf_ext`` and in ``ov_ext``, which do not import each other. The two are equal, and tested to be.
"""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import rich

OWN = ("nncf_ext", "ov_ext")
# Libraries read these when they are imported. What the user has set counts.
_SWITCHES = {
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # those of transformers, too
    "HF_HUB_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-torch",  # the minus sign stands for errors only
    "TRANSFORMERS_VERBOSITY": "error",  # that of Optimum, too
}


class _Stderr(logging.Handler):
    """Writes to what is stderr at the time, so that a progress bar moves out of the way."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # nobody reads any more: no reason to end the work
            print(self.format(record), file=sys.stderr)


@contextmanager
def own_lines(verbose: bool) -> Iterator[None]:
    """
    For the time of a command, shows the log of these packages on stderr, each line with its time: warnings, and without
    a terminal, where there is no progress bar, progress. Libraries show errors only.

    A library that sets its level when it is imported takes no notice.

    :param verbose: Show all of the log, and leave the libraries as they are.
    """
    handler = _Stderr()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    level = logging.DEBUG if verbose else logging.WARNING if sys.stderr.isatty() else logging.INFO
    loggers = [logging.getLogger(name) for name in OWN]
    before = [logger.level for logger in (logging.root, *loggers)]
    switched = [] if verbose else [name for name in _SWITCHES if name not in os.environ]
    with warnings.catch_warnings():
        for logger in loggers:
            logger.addHandler(handler)
            logger.setLevel(level)
        if not verbose:
            logging.root.setLevel(logging.ERROR)
            rich.reconfigure(quiet=True)  # the console that NNCF's progress bars are written to
            if not sys.warnoptions:
                warnings.simplefilter("ignore")
        os.environ.update({name: _SWITCHES[name] for name in switched})
        try:
            yield
        finally:
            for name in switched:
                os.environ.pop(name, None)
            for logger, old in zip((logging.root, *loggers), before, strict=True):
                logger.removeHandler(handler)
                logger.setLevel(old)
            if not verbose:
                rich.reconfigure()


@contextmanager
def logging_as_it_was() -> Iterator[None]:
    """For the time of a conversion: OpenVINO's converter sets the level of the root logger, for the whole process."""
    level, handlers = logging.root.level, [*logging.root.handlers]
    try:
        yield
    finally:
        logging.root.setLevel(level)
        logging.root.handlers[:] = handlers
