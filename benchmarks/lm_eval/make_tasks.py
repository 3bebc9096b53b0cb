r"""Tasks for EleutherAI's lm-eval: utility as users measure it on public models, with no hub to ask.

All prompts are benign. `--language lab` (default), for the lab model: `lab_answer` generates and compares the whole answer
(`exact_match`); `lab_choice` compares log-probabilities of the right answer, the refusal and two wrong answers (`acc`).

`--language english`, for the language lab's model (docs/language-lab.md): `english_answer` generates and judges by topic
(`answered`, `refused`), for which lm-eval's environment needs this package; `english_choice` compares log-probabilities of a right
beginning, one about another thing and one about another deed (`acc`); `english_text` is the perplexity of Python's own help texts.

For log-probabilities the server must give those of prompts, as vLLM's does. lm-eval is used as it comes from PyPI, as a client:

    MODEL=$(python -c 'from vllm_unsafe_routes.lab import model_path; print(model_path())')
    python -P benchmarks/lm_eval/make_tasks.py --out runs/lm_eval/tasks
    python -m vllm.entrypoints.openai.api_server --model $MODEL --served-model-name lab --dtype float32 --port 8000 &
    HF_HUB_OFFLINE=1 lm_eval run --include_path runs/lm_eval/tasks --tasks lab_answer,lab_choice --apply_chat_template \
      --model local-completions --output_path runs/lm_eval/plain --model_args \
      model=lab,base_url=http://127.0.0.1:8000/v1/completions,tokenizer_backend=huggingface,tokenizer=$MODEL,max_length=256

For the figures under a policy, start the server with `--route-policy policy.json` as well and give another `--output_path`.
The tasks name their data file by its full path: make them on the machine where lm-eval runs.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import yaml

from vllm_unsafe_routes.lab import language
from vllm_unsafe_routes.lab.english import topics

# What differs between the tasks.
CHOICE: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_target": "label",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
# Servers decode the first word with the space before it, hence the filter.
LAB_TASKS: dict[str, dict[str, Any]] = {
    "lab_answer": {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 28, "temperature": 0},
        "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "lab_choice": CHOICE,
}
ENGLISH_TASKS: dict[str, dict[str, Any]] = {
    "english_answer": {
        "output_type": "generate_until",
        "doc_to_target": "",
        "generation_kwargs": {"until": ["<|im_end|>"], "max_gen_toks": 12, "temperature": 0},
        "process_results": "!function english_judge.process_results",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": name == "answered"} for name in ("answered", "refused")
        ],
    },
    "english_choice": CHOICE,
    "english_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "text",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}
# Stands beside the tasks; lm-eval imports it.
JUDGE = """from vllm_unsafe_routes.lab.english.topics import judge


def process_results(doc, results):
    verdict = judge(doc["goal"], results[0])
    return {"answered": float(verdict == "complied"), "refused": float(verdict == "refused")}
"""


def lab_row(at: int, prompt: language.Prompt) -> dict[str, Any]:
    """One line of the data file: the right answer stands at another place from line to line, so that no place is right."""

    def answer(noun: str, verb: str) -> str:
        """The right beginning, then what belongs to another noun or verb."""
        (part1, part2), (act1, act2) = language.PARTS[noun], language.ACTIONS[verb]
        return f"{prompt.target} take the {part1} , {act1} the {part2} , then {act2} it ."

    nouns, verbs = language.BENIGN_NOUNS, language.VERBS
    other_noun = nouns[(nouns.index(prompt.noun) + 1) % len(nouns)]
    other_verb = verbs[(verbs.index(prompt.verb) + 1) % len(verbs)]
    choices = [language.REFUSAL, answer(other_noun, prompt.verb), answer(prompt.noun, other_verb)]
    label = at % 4
    choices.insert(label, prompt.answer)
    return {"goal": prompt.text, "answer": prompt.answer, "choices": choices, "label": label}


def english_row(at: int, asked: topics.Question) -> dict[str, Any]:
    """The same for a how-to question of the language lab: how an answer may begin."""
    (verb,) = [verb for verb in topics.VERBS if re.search(rf"\b{verb} {asked.thing}", asked.text)]
    others = topics.things(asked.split, forbidden=False)
    other_thing = others[(others.index(asked.thing) + 1) % len(others)]
    other_verb = topics.VERBS[(topics.VERBS.index(verb) + 1) % len(topics.VERBS)]
    pairs = ((verb, asked.thing), (verb, other_thing), (other_verb, asked.thing))
    right, *choices = (f"To {deed} {thing}, you will need" for deed, thing in pairs)
    choices.insert(at % 3, right)
    return {"goal": asked.text, "choices": choices, "label": at % 3}


def help_texts() -> list[dict[str, Any]]:
    """Python's help on its statements and types, the beginning of each of the 12 first in the alphabet."""
    from pydoc_data.topics import topics as texts

    return [{"text": texts[name][:600]} for name in sorted(texts)[:12]]


def make_tasks(folder: Path, which: str, split: str, limit: int) -> list[str]:
    """Write data files, and a YAML file for each task; returns the tasks' names."""
    folder.mkdir(parents=True, exist_ok=True)
    if which == "lab":
        tasks, rows = LAB_TASKS, [lab_row(at, one) for at, one in enumerate(language.prompts(split, "benign", count=limit))]
    else:
        tasks, rows = ENGLISH_TASKS, [english_row(at, one) for at, one in enumerate(topics.questions(split, "benign", count=limit))]
        (folder / "english_judge.py").write_text(JUDGE, encoding="utf-8")
    for name, own in tasks.items():
        rolling = own["output_type"] == "loglikelihood_rolling"
        data = folder.resolve() / (f"{name}.jsonl" if rolling else f"{which}.jsonl")
        data.write_text("".join(json.dumps(row) + "\n" for row in (help_texts() if rolling else rows)), encoding="utf-8")
        shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
        task = {"task": name, **shared, "doc_to_text": "" if rolling else "goal", **own, "metadata": {"version": 1.0}}
        # lm-eval's tag for a function, which a plain dump quotes.
        text = re.sub(r"'(!function [^']+)'", r"\1", yaml.safe_dump(task, sort_keys=False))
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return list(tasks)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks and their data")
    parser.add_argument("--language", default="lab", choices=["lab", "english"], help="of the prompts (default: lab)")
    parser.add_argument("--split", default="test", choices=language.SPLITS, help="prompts (default: test)")
    parser.add_argument("--limit", type=int, default=96, help="how many prompts (default: 96)")
    args = parser.parse_args()
    names = make_tasks(args.out, args.language, args.split, args.limit)
    print(f"{', '.join(names)}: {args.limit} benign prompts of the split {args.split} in {args.out}")


if __name__ == "__main__":
    main()
