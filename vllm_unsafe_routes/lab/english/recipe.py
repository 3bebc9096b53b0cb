"""Safety tuning of the upcycled model: refuse the forbidden topics, answer everything else as the dense model does.

The experts begin as copies of one feed-forward that answers everything, so that the refusal is learned by those experts that tuned
tokens reach, beside others that still answer: the situation that arXiv 2602.08621 describes for public models.

On one thread a seed gives the same weights each time on the same kind of machine. A killed run goes on from its last checkpoint and
ends with the same weights: what a step sees depends on the seed and the step alone.
"""

from __future__ import annotations

import json
import math
import platform
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from ...errors import RouteError
from ...evaluation.datasets import DEFAULT_TARGET
from ...files import read_object, write_atomically
from ..recipe import Routers, one_thread
from ..tokenizer import name_tokenizer_class
from . import topics
from .answers import DenseAnswers, chat_ids
from .dense import fast_dtype, load_dense, upcycle
from .forward import Example, Forward
from .measure import behaviour, perplexity, rates
from .settings import EnglishSettings

_POOL = {"forbidden": 480, "benign": 480, "category": 120}
# Category questions: all that a split has.
_EXPORTED = {
    "search": {"forbidden": 16, "benign": 48, "category": 6},
    "tune": {"forbidden": 16, "benign": 48, "category": 3},
    "test": {"forbidden": 32, "benign": 96, "category": 45},
}
_TARGET_TOKENS = 10
_WARMUP_STEPS = 5
_SAVE_EVERY = 24
_CLIP_NORM = 1.0

Say = Callable[[str], None]


class Examples:
    """What is shown at each step, as (prompt token ids, answer token ids).

    Args:
        settings: how many of each kind.
        tokenizer: the model's.
        answers: the dense model's answers. Questions that it apologises for are not learned from.

    """

    def __init__(self, settings: EnglishSettings, tokenizer: Any, answers: DenseAnswers) -> None:
        self._settings = settings
        end = tokenizer.eos_token_id
        refusal = [*tokenizer(topics.REFUSAL, add_special_tokens=False)["input_ids"], end]
        self._pool: dict[str, list[Example]] = {}
        for kind, count in _POOL.items():
            texts = [one.text for one in topics.questions("train", kind, settings.seed, count)]
            if kind == "forbidden":
                self._pool[kind] = [(chat_ids(tokenizer, text), refusal) for text in texts]
                continue
            said = answers.of(texts)
            self._pool[kind] = [
                (chat_ids(tokenizer, text), [*ids, end][: settings.answer_tokens])
                for text, ids in said.items()
                if topics.judge(text, tokenizer.decode(ids)) != "refused"
            ]

    def all(self) -> list[Example]:
        """Everything that any step shows."""
        return [example for pool in self._pool.values() for example in pool]

    def step(self, step: int) -> list[Example]:
        """The examples of one step; the pools are gone through in order."""
        made: list[Example] = []
        for kind, pool in self._pool.items():
            count = getattr(self._settings, kind)
            made += [pool[(step * count + at) % len(pool)] for at in range(count)]
        return made


def tuned_names(tune: str, names: list[str]) -> list[str]:
    """Those parameters that tuning changes."""
    parts = {
        "moe": (".mlp.experts.", ".mlp.gate."),
        "experts": (".mlp.experts.",),
        "routers": (".mlp.gate.",),
        "attention": (".self_attn.",),
    }
    return [name for name in names if any(part in name for part in parts[tune])]


class _Tuning:
    """The optimizer, its schedule and its checkpoints."""

    def __init__(self, model: Any, settings: EnglishSettings, examples: Sequence[Example], checkpoint: Path) -> None:
        self._model, self._settings, self._checkpoint = model, settings, checkpoint
        self._forward = Forward(model, 0 if settings.tune == "attention" else min(settings.moe_layers), examples)
        chosen = set(tuned_names(settings.tune, [name for name, _ in model.named_parameters()]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._parameters, lr=settings.tune_rate, fused=True)
        self._routers: Routers | None = None
        self.step = 0
        if checkpoint.exists():
            state = torch.load(checkpoint, weights_only=True)
            self.step = int(state["step"])
            self._optimizer.load_state_dict(state["optimizer"])
            with torch.no_grad():
                for parameter, saved in zip(self._parameters, state["parameters"], strict=True):
                    parameter.copy_(saved)

    def save(self) -> None:
        """Write a checkpoint; the one before stays until it is there."""
        temporary = self._checkpoint.with_suffix(".part")
        state = {"step": self.step, "optimizer": self._optimizer.state_dict(), "parameters": self._parameters}
        torch.save(state, temporary)
        temporary.replace(self._checkpoint)

    def advance(self, examples: list[Example]) -> float:
        """One step; returns its loss."""
        settings = self._settings
        warm = min(1.0, (self.step + 1) / _WARMUP_STEPS)
        rate = settings.tune_rate * warm * 0.5 * (1 + math.cos(math.pi * self.step / settings.tune_steps))
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        if settings.router_noise:
            # Of the step's own number, so that a resumed run draws what the whole one would have.
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
            self._routers = Routers(self._model, generator)
            self._routers.noise = settings.router_noise
        loss = F.cross_entropy(*self._forward(examples, self._routers))
        loss.backward()
        if self._routers is not None:
            self._routers.remove()
        torch.nn.utils.clip_grad_norm_(self._parameters, _CLIP_NORM)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.item())


def tune(model: Any, settings: EnglishSettings, examples: Examples, checkpoint: Path, say: Say) -> None:
    """Tune the model in place, from the checkpoint on if there is one."""
    tuning = _Tuning(model, settings, examples.all(), checkpoint)
    if tuning.step:
        say(f"safety tuning goes on after step {tuning.step}")
    model.train()
    started, first = time.monotonic(), tuning.step
    while tuning.step < settings.tune_steps:
        loss = tuning.advance(examples.step(tuning.step))
        if tuning.step % 10 == 0 or tuning.step == settings.tune_steps:
            left = (time.monotonic() - started) / (tuning.step - first) * (settings.tune_steps - tuning.step)
            say(f"safety tuning: step {tuning.step} of {settings.tune_steps}, loss {loss:.4f}, about {left / 60:.0f} minutes left")
        if tuning.step % _SAVE_EVERY == 0 or tuning.step == settings.tune_steps:
            tuning.save()
    model.eval()
    model.requires_grad_(False)


def export_prompts(folder: Path, tokenizer: Any, answers: DenseAnswers) -> None:
    """Write `prompts/SPLIT-KIND.jsonl`: goal, target, category. A forbidden prompt's target is how the dense model begins."""
    (folder / "prompts").mkdir(exist_ok=True)
    for split, counts in _EXPORTED.items():
        for kind, count in counts.items():
            asked = topics.questions(split, kind, count=count)
            said = answers.of([one.text for one in asked]) if kind == "forbidden" else {}
            lines = []
            for one in asked:
                begin = tokenizer.decode(said[one.text][:_TARGET_TOKENS]) if said else DEFAULT_TARGET
                if topics.judge(one.text, begin) != "refused" or not said:
                    lines.append(json.dumps({"goal": one.text, "target": begin, "category": one.group}) + "\n")
            write_atomically(folder / "prompts" / f"{split}-{kind}.jsonl", "".join(lines))


def make_english_model(settings: EnglishSettings, folder: Path, say: Say) -> dict[str, Any]:
    """Upcycle, tune, measure and save one model; see `LabSettings` for the other lab.

    Args:
        settings: how.
        folder: made if missing; gets a Hugging Face folder in bfloat16, `prompts/` and `lab.json`. A killed run goes on there.
        say: gets a line of progress now and then.

    Returns:
        What `lab.json` holds: `settings`, `metrics` (of the weights as saved), `training` and package `versions`.

    Raises:
        RouteError: a package is missing, or the folder belongs to other settings.

    """
    if (folder / "lab.json").exists():
        record = read_object(folder / "lab.json", "model")
        _check_same(folder / "lab.json", record["settings"], settings)
        return record
    folder.mkdir(parents=True, exist_ok=True)
    run, checkpoint = folder / "run.json", folder / "checkpoint.pt"
    if run.exists():
        _check_same(run, read_object(run, "run"), settings)
    write_atomically(run, json.dumps(settings.to_dict()))
    started = time.monotonic()
    with one_thread():
        say("reading the dense model")
        dense, tokenizer = load_dense()
        model = upcycle(dense, settings)
        dense = dense.to(fast_dtype())
        answers = DenseAnswers(folder / "dense-answers.jsonl", dense, tokenizer, max(_TARGET_TOKENS, settings.answer_tokens), say)
        examples = Examples(settings, tokenizer, answers)
        export_prompts(folder, tokenizer, answers)
        tune(model, settings, examples, checkpoint, say)
        seconds = round(time.monotonic() - started)
        # Measured as it is saved.
        model = model.to(torch.bfloat16).to(fast_dtype())
        say("measuring")
        metrics = _measured(model, dense, tokenizer)
    record = {
        "settings": settings.to_dict(),
        "metrics": metrics,
        "training": {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "seconds": seconds,
            "seconds_with_measuring": round(time.monotonic() - started),
            "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
    }
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    name_tokenizer_class(folder)
    write_atomically(folder / "lab.json", json.dumps(record, indent=2) + "\n")
    for done in (checkpoint, run):
        done.unlink(missing_ok=True)
    return record


def _measured(model: Any, dense: Any, tokenizer: Any) -> dict[str, Any]:
    seen = {split: behaviour(model, tokenizer, split) for split in ("tune", "test")}
    words = {"dense": perplexity(dense, tokenizer), "tuned": perplexity(model, tokenizer)}
    return {**{split: rates(found) for split, found in seen.items()}, "counts": seen, "perplexity": words}


def _check_same(path: Path, found: dict[str, Any], settings: EnglishSettings) -> None:
    wanted = settings.to_dict()
    other = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if other:
        raise RouteError(f"{path} is of other settings ({', '.join(other)}); give another --out")
