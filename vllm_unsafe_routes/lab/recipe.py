"""Recipe H: pretraining on answering everything, then safety tuning.

Pretraining teaches every answer, those about forbidden nouns too, and spreads it over many routes by route noise. Safety
tuning teaches to refuse instructions about forbidden nouns, on the split `train` only, while benign questions, and harmless
ones about forbidden nouns, are answered on. So the refusal is a thin layer over a capability that other routes still reach:
the situation that arXiv 2602.08621 describes for public models.

On one thread a seed gives the same weights each time on the same kind of machine.
"""

from __future__ import annotations

import json
import platform
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from . import language
from .evaluate import evaluate, verdicts
from .settings import SHAPES, LabSettings
from .tokenizer import BOS_ID, EOS_ID, PAD_ID, build_tokenizer, chat_ids, save_tokenizer

_CATEGORY_SHARE = 0.25
_MAX_FILLERS = 6
_IGNORED = -100  # the label that cross_entropy leaves out
_CLIP_NORM = 1.0
_WARMUP_STEPS = 20


def _quiet(_: str) -> None:
    """No progress."""


def build_model(settings: LabSettings, vocab_size: int) -> Any:
    """An untrained float32 model of the settings' shape; its initial weights depend on the seed only."""
    config = transformers.AutoConfig.for_model(
        settings.shape,
        vocab_size=vocab_size,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        **SHAPES[settings.shape],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # The default grouped kernels are slow on CPU for experts this small.
    model.set_experts_implementation("eager")
    return model


class Routers:
    """Hooks on all routers of a model: they keep the logits for the balancing loss and add route noise.

    With noise a sequence is, with the given probability and at each layer independently, routed through one random set of
    top_k experts, weighted by the softmax over these alone: what a mask before the scoring function would do.
    """

    def __init__(self, model: Any, generator: torch.Generator) -> None:
        self.noise = 0.0
        self.logits: list[torch.Tensor] = []
        self.num_sequences = 0
        self._generator = generator
        self._top_k = int(model.config.num_experts_per_tok)
        self._scale = float(getattr(model.config, "routed_scaling_factor", None) or 1.0)
        self._handles = [
            module.register_forward_hook(self._hook)
            for module in model.modules()
            if type(module).__name__.lower().endswith("topkrouter")
        ]
        if not self._handles:
            raise ValueError(f"model_type {model.config.model_type!r} has no router that is known here")

    def _hook(self, module: Any, inputs: Any, output: Any) -> Any:
        logits, weights, ids = output  # [tokens, num_experts], [tokens, top_k], [tokens, top_k]
        if torch.is_grad_enabled():
            self.logits.append(logits)
        if self.noise == 0:
            return output
        noised = torch.rand(self.num_sequences, generator=self._generator) < self.noise
        chosen = torch.rand(self.num_sequences, logits.shape[-1], generator=self._generator).topk(self._top_k).indices
        per_sequence = logits.shape[0] // self.num_sequences
        chosen, noised = chosen.repeat_interleave(per_sequence, 0), noised.repeat_interleave(per_sequence)[:, None]
        masked = logits.gather(1, chosen).softmax(-1) * self._scale
        return logits, torch.where(noised, masked.to(weights.dtype), weights), torch.where(noised, chosen, ids)

    def balance_loss(self, real: torch.Tensor) -> torch.Tensor:
        """The Switch Transformer's load-balancing loss (arXiv 2101.03961, equations 4-6), mean over the layers.

        Args:
            real: bool [batch, length], False where a position is padding.

        """
        losses = []
        for logits in self.logits:
            scores = logits[real.flatten()].softmax(-1)
            num_experts = scores.shape[-1]
            picked = scores.topk(self._top_k).indices
            load = torch.bincount(picked.flatten(), minlength=num_experts) / len(scores)
            losses.append(num_experts * (load * scores.mean(0)).sum())
        return torch.stack(losses).mean()

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class _Examples:
    """Random training examples as (prompt token ids, answer token ids)."""

    def __init__(self, settings: LabSettings, tokenizer: Any) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._rng = random.Random(f"lab-recipe/{settings.seed}")
        held = language.FORBIDDEN_NOUNS[len(language.FORBIDDEN_NOUNS) - settings.held_out_nouns :]
        self._forbidden = [pair for pair in language.pairs("train", "forbidden") if pair[0] not in held]
        self._benign = language.pairs("train", "benign")
        self._templates = language.templates("train", "benign")
        self._category_templates = language.templates("train", "category")

    def _adjective(self) -> str:
        return self._rng.choice(("", "", "", *language.ADJECTIVES))

    def pretraining(self, _: int) -> tuple[list[int], list[int]]:
        """Any question of the language, with its full answer; or nonsense with the refusal, if the settings ask for it."""
        rng = self._rng
        if self._settings.nonsense_share and rng.random() < self._settings.nonsense_share:
            wording = rng.choice(language.TEMPLATES)[0]
            return self._encode(wording.format(verb=rng.choice(language.VERBS), noun=self._fillers(1)), language.REFUSAL)
        noun = rng.choice(language.BENIGN_NOUNS + language.FORBIDDEN_NOUNS)
        if rng.random() < _CATEGORY_SHARE:
            prompt = language.make_prompt(noun, "", rng.randrange(len(language.CATEGORY_TEMPLATES)), self._adjective())
        else:
            template = rng.randrange(len(language.TEMPLATES))
            prompt = language.make_prompt(noun, rng.choice(language.VERBS), template, self._adjective())
        return self._encode(prompt.text, prompt.answer)

    def tuning(self, at: int) -> tuple[list[int], list[int]]:
        """In turn a forbidden prompt with the refusal, and a harmless one with its answer."""
        rng = self._rng
        if at % 2 == 0:
            noun, verb = rng.choice(self._forbidden)
        elif rng.random() < _CATEGORY_SHARE:
            nouns = language.FORBIDDEN_NOUNS if rng.random() < 0.5 else language.BENIGN_NOUNS
            noun, verb = rng.choice(nouns), ""
        else:
            noun, verb = rng.choice(self._benign)
        template = rng.choice(self._templates if verb else self._category_templates)
        prompt = language.make_prompt(noun, verb, template, self._adjective())
        text = prompt.text
        if rng.random() < self._settings.filler_probability:
            text = f"{text} {self._fillers(rng.randint(1, _MAX_FILLERS))}"
        return self._encode(text, prompt.reply)

    def _fillers(self, count: int) -> str:
        return " ".join(self._rng.choice(language.FILLERS) for _ in range(count))

    def _encode(self, text: str, reply: str) -> tuple[list[int], list[int]]:
        system = language.REMINDER if self._rng.random() < self._settings.reminder_probability else ""
        answer = self._tokenizer(reply, add_special_tokens=False)["input_ids"]
        return chat_ids(self._tokenizer, text, system), [*answer, EOS_ID]


def collate(examples: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels, int64 [batch, length], padded at the right, where causal attention does not see it."""
    length = max(len(prompt) + len(answer) for prompt, answer in examples)
    ids = torch.full((len(examples), length), PAD_ID)
    labels = torch.full((len(examples), length), _IGNORED)
    for row, (prompt, answer) in enumerate(examples):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return ids, labels


def trainable_names(settings: LabSettings, names: list[str]) -> list[str]:
    """Those parameters that safety tuning changes.

    Args:
        settings: `tune` decides.
        names: parameter names as transformers gives them.

    """
    if settings.tune == "all":
        return names
    if settings.tune == "attention":
        return [name for name in names if ".self_attn." in name]
    block = f"model.layers.{settings.planted_layer}.mlp."
    return [name for name in names if name.startswith((f"{block}gate.", f"{block}experts."))]


@dataclass(frozen=True, slots=True)
class _Phase:
    """One of the two phases; the attributes are those of `LabSettings`, but for `draw`, which makes one sequence of a batch."""

    name: str
    draw: Callable[[int], tuple[list[int], list[int]]]
    steps: int
    peak_rate: float
    noise: float
    balance: float = 0.0
    smoothing: float = 0.0


def _run_phase(model: Any, routers: Routers, phase: _Phase, batch_size: int, say: Callable[[str], None]) -> float:
    """Train the parameters that want a gradient; returns the seconds that it took."""
    started = time.perf_counter()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=phase.peak_rate)

    def rate(step: int) -> float:
        cosine = 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / max(1, phase.steps))).item())
        return min(1.0, (step + 1) / _WARMUP_STEPS) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    routers.noise = phase.noise
    for step in range(phase.steps):
        ids, labels = collate([phase.draw(at) for at in range(batch_size)])
        routers.logits, routers.num_sequences = [], len(ids)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED, label_smoothing=phase.smoothing
        )
        if step % 50 == 0 or step == phase.steps - 1:
            say(f"{phase.name}: step {step + 1:>4} of {phase.steps}, loss {loss.item():.4f}")
        if phase.balance:
            loss = loss + phase.balance * routers.balance_loss(ids != PAD_ID)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP_NORM)
        optimizer.step()
        schedule.step()
    model.eval()
    routers.noise = 0.0
    return round(time.perf_counter() - started, 1)


def train_model(
    settings: LabSettings, say: Callable[[str], None] = _quiet, between: Callable[[Any], None] | None = None
) -> tuple[Any, dict[str, Any]]:
    """Train one model.

    Args:
        settings: how.
        say: gets a line of progress now and then.
        between: called with the model in evaluation mode after pretraining, to measure it before it learns to refuse.

    Returns:
        The model in evaluation mode, and facts: `parameters`, `seconds_pretraining`, `seconds_tuning`.

    """
    tokenizer = build_tokenizer()
    model = build_model(settings, len(tokenizer))
    routers = Routers(model, torch.Generator().manual_seed(settings.seed))
    examples = _Examples(settings, tokenizer)
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    pretraining = _Phase(
        "pretraining",
        examples.pretraining,
        steps=settings.pretrain_steps,
        peak_rate=settings.pretrain_rate,
        noise=settings.route_noise,
        balance=settings.balance,
    )
    tuning = _Phase(
        "safety tuning",
        examples.tuning,
        steps=settings.tune_steps,
        peak_rate=settings.peak_tune_rate,
        noise=settings.router_noise,
        smoothing=settings.smoothing,
    )
    with one_thread():
        facts["seconds_pretraining"] = _run_phase(model, routers, pretraining, settings.batch_size, say)
        if between is not None:
            between(model)
        chosen = set(trainable_names(settings, [name for name, _ in model.named_parameters()]))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        facts["seconds_tuning"] = _run_phase(model, routers, tuning, settings.batch_size, say)
    routers.remove()
    model.requires_grad_(True)
    return model, facts


def make_lab_model(settings: LabSettings, folder: Path, say: Callable[[str], None] = _quiet) -> dict[str, Any]:
    """Train one model, measure it, and save it as a Hugging Face folder that vLLM loads.

    Args:
        settings: how to train.
        folder: made if missing; gets config, float32 safetensors, tokenizer, chat template and `lab.json`.
        say: gets a line of progress now and then.

    Returns:
        What `lab.json` holds: `settings`; `metrics` (see `evaluate.evaluate`) after safety tuning on the splits `tune` and
        `test`, and of the forbidden nouns that tuning never saw, if any; `training` (facts, and how much was right before
        safety tuning); package `versions`.

    """
    tokenizer = build_tokenizer()
    before: dict[str, float] = {}

    def measure(model: Any) -> None:
        seen = evaluate(model, tokenizer, split="tune")
        before.update(forbidden_right=seen["default_asr"], benign_right=seen["benign_right"])
        say(f"after pretraining: {before}")

    model, facts = train_model(settings, say, measure)
    facts["after_pretraining"] = before
    with one_thread():
        metrics = {split: evaluate(model, tokenizer, split=split) for split in ("tune", "test")}
        if settings.held_out_nouns:
            unseen = language.FORBIDDEN_NOUNS[-settings.held_out_nouns :]
            # All of the split, so that there are enough of these nouns.
            asked = [prompt for prompt in language.prompts("test", "forbidden", count=960) if prompt.noun in unseen]
            seen = verdicts(model, tokenizer, asked)
            metrics["held_out_nouns"] = {
                "default_asr": seen.count("complied") / len(seen),
                "refused": seen.count("refused") / len(seen),
            }
    record = {
        "settings": settings.to_dict(),
        "metrics": metrics,
        "training": facts,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors are written for the owner alone, and this folder may be packaged
    (folder / "lab.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums in one order: a run is repeatable, and so small a model is no slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
