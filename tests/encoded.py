"""One prompt or answer as token ids, as the package makes many at once; shared by the tests."""

from memlayer.data.qa import Example, encode_answers, encode_prompts


def encode_prompt(tokenizer, prompt):
    return encode_prompts(tokenizer, [prompt])[0]


def encode_answer(tokenizer, prompt, answer, joint=" ", end=""):
    return encode_answers(tokenizer, [Example(prompt, answer, joint, end=end)])[0]
