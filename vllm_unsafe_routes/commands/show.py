"""Summaries as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..shape import ModelShape


def facts_of(shape: ModelShape) -> dict[str, Any]:
    """What `inspect` says of a model."""
    return {
        "model_type": shape.model_type,
        "fingerprint": shape.fingerprint,
        "decoder_layers": shape.num_hidden_layers,
        "moe_layers": list(shape.moe_layers),
        "experts": shape.num_experts,
        "top_k": shape.top_k,
        "native_weights": shape.native_weights,
    }


def facts(found: Mapping[str, Any], shape: ModelShape) -> str:
    """Facts about a model of this shape, a line each."""
    named = {**found, "moe_layers": shape.describe_layers()}
    named |= {
        f"{name}, vLLM {release}": verdict
        for name, verdicts in named.pop("architectures", {}).items()
        for release, verdict in verdicts.items()
    }
    return "\n".join(f"{name.replace('_', ' '):<26} {value}" for name, value in named.items())


def interval(entry: Mapping[str, Any]) -> str:
    """A rate with its interval; where no answer could be judged only the number of errors."""
    if entry["value"] is None:
        return f"no verdict ({entry['errors']} error{'s' if entry['errors'] != 1 else ''})"
    errors = f"  {entry['errors']} without verdict" if entry["errors"] else ""
    return f"{entry['value']:.2f}  [{entry['low']:.2f}, {entry['high']:.2f}]{errors}"


def rosais(summary: Mapping[str, Any]) -> str:
    """Layers by their score."""
    lines = [f"RoSais over {summary['prompts']} prompts, seeds {summary['seeds']} (nats, mean with 95% interval)"]
    for layer in summary["ranking"]:
        entry = summary["layers"][str(layer)]
        dataset = f"   dataset level {entry['dataset']:+.2f}" if "dataset" in entry else ""
        lines.append(f"  layer {layer:>3}   {entry['mean']:+.2f}  [{entry['low']:+.2f}, {entry['high']:+.2f}]{dataset}")
    return "\n".join(lines) + cost(summary)


def masks(summary: Mapping[str, Any]) -> str:
    """ASR by attack and number of layers."""
    lines = ["ASR with 95% interval"]
    lines += [f"  {_label(name):<28} {interval(entry)}" for name, entry in summary["asr"].items()]
    for attack, found in summary.get("controls", {}).items():
        lines.append(f"{attack}, masks of most layers")
        lines += _controls(found)
    return "\n".join(lines) + cost(summary)


def _controls(found: Mapping[str, Any]) -> list[str]:
    """The target under each control."""
    return [
        f"  target, {name:<20} {entry['value']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}] nats"
        for name, entry in found.items()
        if name != "prompts"
    ]


def _label(name: str) -> str:
    """An attack as summaries write it, for readers."""
    name, by, judge = name.partition(" by ")
    attack, _, level = name.partition("/")
    label = f"{attack}, {level} layer{'s' if level != '1' else ''}" if level else "no attack" if attack == "none" else attack
    return label + by + judge


def cost(summary: Mapping[str, Any]) -> str:
    """What a run took, where it is kept."""
    found = summary.get("cost")
    if found is None:
        return ""
    return (
        f"\n  {found['candidates']} candidates in {found['seconds']:.1f} s ({found['candidates_per_s']:.1f} a second), "
        f"{found['seconds_per_prompt']:.2f} s a prompt; {found['device']}, vLLM {found['versions'].get('vllm', 'unknown')}"
    )


def fsour(summary: Mapping[str, Any], strategy: str) -> str:
    """ASR and what it cost."""
    lines = [f"F-SOUR ({strategy})   ASR {interval(summary['asr'])}"]
    lines += [f"  {_label(name):<28} {interval(entry)}" for name, entry in summary.get("asr_besides", {}).items()]
    lines.append(
        f"  {summary['attempts']} attempts, {summary['candidates']} candidates ({summary['needed']} one by one), "
        f"{summary['computed_tokens']} of {summary['tokens']} tokens computed"
    )
    lines += _controls(summary.get("controls", {}))
    return "\n".join(lines) + cost(summary)


def matrix(summary: Mapping[str, Any]) -> str:
    """Attacks by defences, with utility and speed."""
    lines = []
    for defence, row in summary["asr"].items():
        lines += ["", f"defence: {defence}"]
        lines += [f"  ASR, {attack:<22} {interval(entry)}" for attack, entry in row.items()]
        for kind, entry in summary["utility"].get(defence, {}).items():
            lines.append(f"  {'benign answers right' if kind == 'benign' else 'over-refusal':<27} {interval(entry)}")
        if defence in summary["tokens_per_s"]:
            lines.append(f"  {'tokens/s':<27} {summary['tokens_per_s'][defence]:.0f}")
    return "\n".join(lines)
