"""Which text does the tiny language model learn from, and which text has it never seen?

The corpus is the Python source of the standard library and of a fixed list of installed packages under permissive
licences. Packages are held out whole. Files are visited in the order of their own SHA-256, a random order that depends
on nothing but the text, so the same installed versions give the same corpus, byte for byte.
"""

from __future__ import annotations

import hashlib
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SEPARATOR = "<|endoftext|>"
"""Stands between two files, in token streams and in the committed text files: beginning, end and padding token."""

STDLIB = "python-stdlib"
TRAINING_PACKAGES = (
    *("accelerate", "anyio", "click", "datasets", "filelock", "fonttools", "fsspec", "h11", "httpcore", "httpx"),
    *("huggingface_hub", "idna", "Jinja2", "joblib", "Mako", "markdown-it-py", "matplotlib", "mpmath", "mypy"),
    *("narwhals", "nncf", "numpy", "onnx", "onnx-ir", "onnxruntime", "onnxscript", "openvino", "openvino-tokenizers"),
    *("optuna", "packaging", "pandas", "pip", "pluggy", "psutil", "pyarrow", "Pygments", "pyparsing", "pytest"),
    *("python-dateutil", "PyYAML", "requests", "safetensors", "scikit-build-core", "scikit-learn", "scipy"),
    *("setuptools", "SQLAlchemy", "sympy", "tabulate", "torch", "transformers", "typer", "urllib3", STDLIB),
)
HELD_OUT_PACKAGES = ("aiohttp", "alembic", "networkx", "optimum", "optimum-intel", "peft", "rich")
QUOTED_PACKAGES = ("fonttools", "pandas", "scikit-learn", "SQLAlchemy", "sympy", "torch", "transformers", STDLIB)
"""Training packages that calibration.txt quotes: few, because the licence of each is committed with the text."""
HELD_OUT_STDLIB = frozenset({"asyncio", "email", "test_asyncio", "test_email"})

# Copies of other projects (possibly held out, possibly under other licences) and tables that are data, not text.
_SKIPPED_FOLDERS = frozenset(
    {"_vendor", "vendor", "vendored", "extern", "externals", "third_party", "site-packages", "__pycache__"}
    | {"encodings", "lib2to3", "pydoc_data", "idlelib", "unicode"}
)
_PERMISSIVE = re.compile(
    r"mit|mit license|isc|0bsd|bsl-1\.0|zlib|cc0-1\.0|psf-2\.0|python software foundation license"
    r"|bsd|bsd license|bsd-[23]-clause|apache software license|apache[ -]2\.0( license| with llvm-exception)?",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Package:
    """
    One source of text.

    :param name: name of the distribution, or ``python-stdlib``.
    :param version: installed version.
    :param licence: what its metadata says.
    :param root: folder that the file names are relative to.
    :param files: its Python files.
    :param licence_file: the text of its licence.
    """

    name: str
    version: str
    licence: str
    root: Path
    files: tuple[Path, ...]
    licence_file: Path

    def licence_text(self) -> bytes:
        """
        :return: content of the licence file.
        :raises RuntimeError: if the package came without one.
        """
        if not self.licence_file.is_file():
            raise RuntimeError(f"Text of {self.name} is quoted, which needs its licence, but it came without one.")
        return self.licence_file.read_bytes()


@dataclass(frozen=True)
class Document:
    """
    One cleaned file.

    :param package: name of the package.
    :param path: name of the file inside the package's root, with forward slashes.
    :param text: source without its leading comment block.
    :param notice: copyright lines of that block.
    :param sha256: hash of ``text`` in UTF-8.
    """

    package: str
    path: str
    text: str
    notice: tuple[str, ...]
    sha256: str

    def describe(self) -> dict[str, Any]:
        """
        :return: everything but the text.
        """
        return {"package": self.package, "path": self.path, "sha256": self.sha256, "notice": list(self.notice)}


@dataclass
class Corpus:
    """
    :param packages: every package used, by name.
    :param training: documents to learn from, in the order of their hashes.
    :param held_out: documents of the held-out packages, likewise.
    """

    packages: dict[str, Package]
    training: list[Document] = field(default_factory=list)
    held_out: list[Document] = field(default_factory=list)

    def describe(self) -> list[dict[str, Any]]:
        """
        :return: for each package and use, what was taken; the hash is that of a list of file hashes and names.
        """
        entries = []
        for held_out, documents in ((False, self.training), (True, self.held_out)):
            for name, package in self.packages.items():
                if own := [document for document in documents if document.package == name]:
                    listing = "".join(f"{document.sha256}  {document.path}\n" for document in own)
                    size = sum(len(document.text.encode()) for document in own)
                    entries.append(
                        {"name": name, "version": package.version, "licence": package.licence, "held_out": held_out}
                        | {"files": len(own), "bytes": size, "sha256": hashlib.sha256(listing.encode()).hexdigest()}
                    )
        return entries


def build_corpus(max_package_bytes: int) -> Corpus:
    """
    Read, clean and de-duplicate the text of all packages.

    Held-out files that mostly repeat training text (copied classes, generated code) are dropped, because they would
    measure memory, not language.

    :param max_package_bytes: no training package gives more text than this, so that none dominates.
    :return: the corpus.
    :raises RuntimeError: if a package is missing or its licence is not known to be permissive.
    """
    corpus = Corpus({name: find_package(name) for name in (*TRAINING_PACKAGES, *HELD_OUT_PACKAGES)})
    held_out: list[Document] = []
    for name, package in corpus.packages.items():
        documents = sorted(read_documents(package), key=lambda document: document.sha256)
        if name in HELD_OUT_PACKAGES:
            held_out += documents
            continue
        size = 0
        for document in documents:
            if name == STDLIB and HELD_OUT_STDLIB & set(Path(document.path).with_suffix("").parts):
                held_out.append(document)
            elif size < max_package_bytes:
                size += len(document.text.encode())
                corpus.training.append(document)
    corpus.training = list(_without_copies(corpus.training, set()))
    seen = {_fingerprint(document.text) for document in corpus.training}
    known = {hash(line) for document in corpus.training for line in _long_lines(document.text)}
    for document in _without_copies(held_out, seen):
        lines = _long_lines(document.text)
        if lines and sum(hash(line) in known for line in lines) <= 0.25 * len(lines):
            corpus.held_out.append(document)
    return corpus


def find_package(name: str) -> Package:
    """
    Locate an installed package.

    :param name: name of a distribution, or ``python-stdlib``.
    :return: the package.
    :raises RuntimeError: if it is not installed or its licence is not known to be permissive.
    """
    if name == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        version = ".".join(map(str, sys.version_info[:3]))
        return Package(name, version, "PSF-2.0", root, tuple(root.rglob("*.py")), root / "LICENSE.txt")
    try:
        distribution = metadata.distribution(name)
    except metadata.PackageNotFoundError as error:
        raise RuntimeError(f"The corpus needs the package {name!r}, which is not installed: pip install it.") from error
    info = {key: distribution.metadata.get_all(key) or [] for key in ("License-Expression", "Classifier", "License")}
    classifiers = [line.split(" :: ")[-1] for line in info["Classifier"] if line.startswith("License ::")]
    licence = " AND ".join(info["License-Expression"] or classifiers or info["License"]) or "unknown"
    if not is_permissive(licence):
        raise RuntimeError(
            f"The corpus takes permissive licences only, and {name!r} has {licence!r}: take it off the list."
        )
    root = Path(str(distribution.locate_file("")))
    paths = [(entry.suffix, Path(str(entry.locate()))) for entry in distribution.files or ()]
    licences = [
        path for _, path in paths if "dist-info" in str(path) and re.match("licen[cs]e|copying", path.name, re.I)
    ]
    return Package(
        name=name,
        version=distribution.version,
        licence=licence,
        root=root,
        files=tuple(path for suffix, path in paths if suffix == ".py"),
        licence_file=min(licences, key=lambda path: (len(path.parts), len(path.name)), default=Path()),
    )


def is_permissive(licence: str) -> bool:
    """
    :param licence: SPDX expression, classifier or free text.
    :return: whether every part of it is on the list of permissive licences.
    """
    return all(_PERMISSIVE.fullmatch(part.strip(" ()")) for part in re.split(r" AND | OR |, ", licence))


def read_documents(package: Package) -> Iterator[Document]:
    """
    :param package: where to read.
    :return: the cleaned files that are text a person wrote: neither tiny nor huge, short lines, mostly ASCII.
    """
    for path in package.files:
        relative = path.relative_to(package.root)
        if _SKIPPED_FOLDERS & set(relative.parts) or not path.is_file() or path.stat().st_size > 200_000:
            continue
        try:
            source = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        text, notice = split_notice(source.replace("\r\n", "\n"))
        size = len(text.encode())
        if size < 200 or size > 90 * (text.count("\n") + 1) or size > 1.01 * len(text) or SEPARATOR in text:
            continue
        yield Document(package.name, relative.as_posix(), text, notice, hashlib.sha256(text.encode()).hexdigest())


def split_notice(source: str) -> tuple[str, tuple[str, ...]]:
    """
    Take off the comment block at the top of a file: thousands of equal licence headers teach nothing.

    :param source: text of a file.
    :return: the text that follows, ending in one newline, and the copyright lines of the block.
    """
    lines = source.split("\n")
    start = next((i for i, line in enumerate(lines) if line.strip() and not line.startswith("#")), len(lines))
    notice = tuple(line.strip("# \t") for line in lines[:start] if "copyright" in line.lower())
    return "\n".join(lines[start:]).strip("\n") + "\n", notice


def quote(documents: Iterable[Document], max_bytes: int, packages: Iterable[str]) -> list[Document]:
    """
    Choose whole documents for a committed text file, taking turns between the packages.

    :param documents: where to choose from, in a random order.
    :param max_bytes: limit of the file's size, separators included.
    :param packages: names of the packages that may be quoted.
    :return: the chosen documents, in the order of their hashes.
    """
    queues: dict[str, list[Document]] = {name: [] for name in packages}
    for document in documents:
        if document.package in queues and 1_500 <= len(document.text.encode()) <= 12_000:
            queues[document.package].append(document)
    chosen: list[Document] = []
    size = 0
    turns = max(map(len, queues.values()), default=0)
    for document in (queue[turn] for turn in range(turns) for queue in queues.values() if turn < len(queue)):
        cost = len(document.text.encode()) + len(SEPARATOR)
        if size + cost <= max_bytes:
            chosen.append(document)
            size += cost
    return sorted(chosen, key=lambda document: document.sha256)


def join(documents: Iterable[Document]) -> str:
    """
    :param documents: any documents.
    :return: one text, each document followed by the separator.
    """
    return "".join(document.text + SEPARATOR for document in documents)


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """
    :param documents: text to learn merges from.
    :param vocab_size: number of tokens, the separator included.
    :return: a byte-level BPE tokenizer; the separator has id 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], batch: int = 256) -> Iterator[NDArray[np.uint16]]:
    """
    :param tokenizer: as trained.
    :param texts: documents.
    :param batch: documents encoded at once.
    :return: for each batch, one array [tokens]: the documents' tokens, each document followed by the separator.
    """
    end = tokenizer.token_to_id(SEPARATOR)
    for start in range(0, len(texts), batch):
        encodings = tokenizer.encode_batch_fast(texts[start : start + batch], add_special_tokens=False)
        yield np.concatenate([np.array([*encoding.ids, end], dtype=np.uint16) for encoding in encodings])


def held_out_stream(tokenizer: Tokenizer, joined: str) -> tuple[NDArray[np.uint16], int]:
    """
    :param tokenizer: the model's tokenizer.
    :param joined: documents, each followed by the separator.
    :return: uint16 [tokens], the documents with a separator in front of each, and their size in bytes without it.
    """
    documents = joined.split(SEPARATOR)[:-1]
    start = np.array([tokenizer.token_to_id(SEPARATOR)], dtype=np.uint16)
    return np.concatenate([start, *encode(tokenizer, documents)]), sum(len(document.encode()) for document in documents)


def _fingerprint(text: str) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()


def _without_copies(documents: list[Document], seen: set[str]) -> Iterator[Document]:
    for document in sorted(documents, key=lambda document: document.sha256):
        fingerprint = _fingerprint(document.text)
        if fingerprint not in seen:
            seen.add(fingerprint)
            yield document


def _long_lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.split("\n")) if len(line) >= 20]
