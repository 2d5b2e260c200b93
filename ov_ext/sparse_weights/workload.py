"""What a model is used for: how much the time of prompts and of tokens counts."""

from __future__ import annotations

from dataclasses import dataclass

_USUAL_PROMPT = 512  # tokens of the prompt that reports tell about where a workload has none


@dataclass(frozen=True)
class Expected:
    """Expected times of a layer.

    :param token: Seconds of one step.
    :param prompt: Seconds of the prompt; None where nothing is known about so many rows.
    """

    token: float
    prompt: float | None


@dataclass(frozen=True)
class Workload:
    """What a model is used for.

    :param prompt: Tokens of the prompt. 0: the time of prompts does not count.
    :param generated: Tokens that are generated after it. 0: only prompts count, as in an encoder.
    :param batch: Sequences at a time: a batch, the beams of a search, or the tokens that a speculative step checks.
    :raises ValueError: A number below its least, or nothing to do.
    """

    prompt: int = 0
    generated: int = 1
    batch: int = 1

    def __post_init__(self) -> None:
        if self.prompt < 0 or self.generated < 0 or self.batch < 1 or not self.prompt + self.generated:
            raise ValueError(
                "a workload has prompt and generated tokens, at least one of them, and a batch from 1; got "
                f"prompt={self.prompt}, generated={self.generated}, batch={self.batch}."
            )

    @property
    def prompt_rows(self) -> int:
        """Rows of activations of a prompt: of the usual one, for the report, where prompts do not count."""
        return self.batch * (self.prompt or _USUAL_PROMPT)

    def seconds(self, expected: Expected) -> float:
        """:return: Time of the work. A prompt about which nothing is known does not count."""
        return self.generated * expected.token + (expected.prompt or 0.0 if self.prompt else 0.0)

    def __str__(self) -> str:
        parts = [f"{count} {name}" for count, name in self._parts() if count]
        return " and ".join(parts) + (f", {self.batch} at a time" if self.batch > 1 else "")

    def _parts(self) -> list[tuple[int, str]]:
        tokens = "token" if self.generated == 1 else "tokens"
        return [(self.prompt, "tokens of prompt"), (self.generated, tokens)]
