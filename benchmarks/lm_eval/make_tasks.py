r"""Two tasks for EleutherAI's lm-eval in the lab language: utility as users measure it on public models, with no hub to ask.

`lab_answer` generates and compares the whole answer (`exact_match`). `lab_choice` compares log-probabilities of the right answer,
the refusal and two wrong answers (`acc`), for which the server must give prompt log-probabilities. Both use benign prompts.
lm-eval is used as it comes from PyPI, as a client of vLLM's server:

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
from pathlib import Path
from typing import Any

import yaml

from vllm_unsafe_routes.lab import language

# What differs between the tasks. Servers decode the first word with the space before it, hence the filter.
TASKS: dict[str, dict[str, Any]] = {
    "lab_answer": {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": ["<eos>"], "max_gen_toks": 28, "temperature": 0},
        "filter_list": [{"name": "stripped", "filter": [{"function": "remove_whitespace"}, {"function": "take_first"}]}],
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "lab_choice": {
        "output_type": "multiple_choice",
        "doc_to_target": "label",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
}


def row(at: int, prompt: language.Prompt) -> dict[str, Any]:
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


def make_tasks(folder: Path, split: str, limit: int) -> None:
    """Write the data file and a YAML file for each task."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder.resolve() / "lab.jsonl"
    prompts = language.prompts(split, "benign", count=limit)
    data.write_text("".join(json.dumps(row(at, prompt)) + "\n" for at, prompt in enumerate(prompts)), encoding="utf-8")
    shared = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    for name, own in TASKS.items():
        task = {"task": name, **shared, "doc_to_text": "goal", **own, "metadata": {"version": 1.0}}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(task, sort_keys=False), encoding="utf-8")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the tasks and their data")
    parser.add_argument("--split", default="test", choices=language.SPLITS, help="prompts (default: test)")
    parser.add_argument("--limit", type=int, default=96, help="how many prompts (default: 96)")
    args = parser.parse_args()
    make_tasks(args.out, args.split, args.limit)
    print(f"{', '.join(TASKS)}: {args.limit} benign prompts of the split {args.split} in {args.out}")


if __name__ == "__main__":
    main()
