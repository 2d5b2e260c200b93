"""Conversations to calibrate a chat model on: plain questions, and what the model itself answers to them.

There is no text nearer to what a chat model will read and write than its own answers, and they need no data set.
"""

from __future__ import annotations

from typing import Any

QUESTIONS = (
    "What is the capital of Australia?",
    "Explain photosynthesis to a child.",
    "How do I boil an egg?",
    "Write a short poem about the sea.",
    "What is the difference between a virus and a bacterium?",
    "Give me three tips for a job interview.",
    "Who wrote Romeo and Juliet, and what is it about?",
    "Summarize the story of Cinderella in three sentences.",
    "What does a compiler do?",
    "Why do we have leap years?",
    "Translate 'good morning' into French, Spanish and German.",
    "How can I sleep better?",
    "What is inflation?",
    "List five animals that live in the desert.",
    "Write an email that asks a colleague for a meeting on Friday.",
    "What causes earthquakes?",
    "How does a bicycle stay upright?",
    "Give me a recipe for pancakes.",
    "What is the largest planet of the solar system?",
    "Explain the rules of chess briefly.",
    "What is 17 plus 25?",
    "Name some advantages of electric cars.",
    "What is machine learning?",
    "How do vaccines work?",
    "Write a Python function that reverses a string.",
    "What is the plot of a typical detective novel?",
    "Why is the sky blue?",
    "How do I remove a coffee stain from a shirt?",
    "What are the primary colors?",
    "Describe the water cycle.",
    "What should I see in Rome in one day?",
    "Who was Marie Curie?",
    "How can I learn a new language quickly?",
    "What is the difference between weather and climate?",
    "Give me ideas for a birthday party of a ten-year-old.",
    "What is a black hole?",
    "How do airplanes fly?",
    "Write a two-sentence review of a good restaurant.",
    "What are healthy snacks?",
    "How does the internet work?",
    "What is democracy?",
    "Why do cats purr?",
    "How do I change a flat tire?",
    "What is the meaning of the word 'ephemeral'?",
    "Tell me a joke.",
    "Which exercises strengthen the back?",
    "How is paper made?",
    "What happened in 1969?",
)
"""Of everyday life; none is a question that results are shown for."""


def conversations(model: Any, tokenizer: Any, tokens: int = 192) -> str:
    """
    :param model: A causal language model of torch that was trained on conversations.
    :param tokenizer: Its tokenizer, with a chat template.
    :param tokens: Of an answer, at most.
    :return: Every question with an answer drawn from the model (its likeliest ones go in circles), in the form of the
        chat template, one after the other. The same each time.
    """
    import torch
    from transformers import set_seed

    asked = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [tokenizer.apply_chat_template(each, add_generation_prompt=True, tokenize=False) for each in asked]
    set_seed(0)
    written: list[str] = []
    end = tokenizer.eos_token_id
    for start in range(0, len(prompts), 16):
        inputs = tokenizer(prompts[start : start + 16], return_tensors="pt", padding=True, padding_side="left")
        with torch.no_grad():
            outputs = model.generate(
                **inputs, do_sample=True, temperature=0.7, top_p=0.9, max_new_tokens=tokens, pad_token_id=end
            )
        answers = tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        pairs = zip(asked[start : start + 16], answers, strict=True)
        written += [
            tokenizer.apply_chat_template([*each, {"role": "assistant", "content": answer.strip()}], tokenize=False)
            for each, answer in pairs
        ]
    return "".join(written)
