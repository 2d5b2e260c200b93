"""Benchmarks at the size of a language model: each checks first, then times in interleaved rounds. See README.md."""
