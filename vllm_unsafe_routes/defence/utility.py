"""What harmless prompts get under a defence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ..evaluation.datasets import PromptRecord
from ..search.backend import Search, run_tasks
from ..study.bench import Bench
from ..study.jobs import answer
from ..study.model import Item
from ..study.prompts import read_prompts
from ..study.records import Utility

# Harmless prompts; harmless ones that look forbidden, for over-refusal.
KINDS = ("benign", "category")


@dataclass(frozen=True, slots=True)
class UtilityPrompts:
    """Where harmless prompts come from.

    Attributes:
        benign: sources, as `study.prompts.read_prompts` takes them.
        category: sources of harmless prompts that look forbidden, for over-refusal.
        limit: prompts of each source.

    """

    benign: tuple[str, ...] = ()
    category: tuple[str, ...] = ()
    limit: int = 48

    def read(self) -> dict[str, list[PromptRecord]]:
        """The prompts by kind. Their ids differ from those of other prompts."""
        return {kind: list(self._read(kind, getattr(self, kind))) for kind in KINDS}

    def _read(self, kind: str, sources: Sequence[str]) -> Iterator[PromptRecord]:
        for number, source in enumerate(sources):
            prefix = kind if len(sources) == 1 else f"{kind}:{number}"
            for record in read_prompts(source, self.limit):
                yield replace(record, id=f"{prefix}:{record.id}")


def utility(kind: str, bench: Bench, item: Item, defence: str = "") -> Search[Utility]:
    """Whether a harmless prompt gets its answer. `success` of the judge means here that the answer is right.

    Args:
        kind: `benign` or `category`.
        bench: with the backend under the defence.
        item: the prompt, rendered under the defence.
        defence: name of the defence, for the record.

    """
    judged = yield from answer(bench, item, None)
    right = judged.success
    # Neither right nor refused is a wrong answer; only an exact judge can tell the two apart. None: no verdict.
    refused = None if right is None else (judged.label or ("complied" if right else "refused")) == "refused"
    return Utility(defence=defence, kind=kind, prompt=item.prompt.id, seed=0, right=right, refused=refused, error=judged.error)


def utility_rates(bench: Bench, prompts: Mapping[str, Sequence[Item]]) -> dict[str, float]:
    """`benign` (share right) and `over_refusal` (share of category prompts refused), where there are such prompts.

    For decisions, not for reports: plain means, in which an answer without a verdict is neither right nor refused.
    """
    tasks = [((kind, item.prompt.id), utility(kind, bench, item)) for kind in KINDS for item in prompts[kind]]
    found = [record for _, record in run_tasks(bench.backend, tasks)]
    right = [bool(record.right) for record in found if record.kind == "benign"]
    refused = [bool(record.refused) for record in found if record.kind == "category"]
    return {name: sum(values) / len(values) for name, values in (("benign", right), ("over_refusal", refused)) if values}
