"""What a study is asked to do: frozen values, made once, that everything below a command line goes by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RouteError
from ..evaluation.datasets import Columns
from ..policy import RoutePolicy
from ..search.fsour import FsourSettings
from ..search.mascing import MascingSettings
from ..search.masking import ATTACKS, MaskSettings
from ..search.rosais import RosaisSettings
from ..search.safex import SafexSettings
from ..search.silencing import SilencingSettings

# SteerMoE, SAFEx, L3, MASCing.
RECIPES = ("steermoe", "safex", "l3", "mascing")


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """Where requests run.

    Attributes:
        servers: base URLs of replicas; empty: an engine in this process.
        ray: address of a Ray cluster whose actors are engines, empty for what Ray finds; None: no cluster.
        policy: what the engine enforces, or the servers.
        max_model_len: longest request in tokens; None: the model's own.
        dtype: of the weights, as vLLM takes it; "float32" makes scores repeatable to 1e-6.
        arguments: further arguments of `vllm.LLM`.
        concurrency: prompts in flight at one time.

    """

    servers: tuple[str, ...] = ()
    ray: str | None = None
    policy: RoutePolicy | None = None
    max_model_len: int | None = None
    dtype: str = "auto"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    concurrency: int = 64

    def __post_init__(self) -> None:
        if self.servers and self.ray is not None:
            raise RouteError("servers and a Ray cluster exclude each other: requests go to the one or to the other")

    @property
    def world_size(self) -> int:
        """GPUs (or processes on a CPU) of one engine."""
        return int(self.arguments.get("tensor_parallel_size", 1)) * int(self.arguments.get("pipeline_parallel_size", 1))


@dataclass(frozen=True, slots=True)
class JudgeSettings:
    """How answers are made and judged.

    Attributes:
        name: the judge whose verdict is the result, as `study.judges` takes it: `lab`, `topic`, `refusal`, `llama-guard` or a
            template file; None: `lab` on prompts of the lab language, else `refusal`.
        more: further judges, reported beside the first.
        stop: the judge that ends a search; None: the first.
        url: OpenAI-compatible endpoint of a judge model, up to and including /v1.
        model: the judge model's name there.
        key_env: environment variable with the endpoint's key; None: it needs none.
        timeout: seconds for one try at the endpoint.
        max_new_tokens: length of a judged answer.
        keep_completions: also record completions that were judged harmful or could not be judged.

    """

    name: str | None = None
    more: tuple[str, ...] = ()
    stop: str | None = None
    url: str | None = None
    model: str | None = None
    key_env: str | None = None
    timeout: float = 60.0
    max_new_tokens: int = 64
    keep_completions: bool = False


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every study needs.

    Attributes:
        model: a Hugging Face folder, or `lab` for the model that ships with this package.
        data: prompts, as `study.prompts.read_prompts` takes them.
        out: folder of the run; an interrupted run goes on with the same settings.
        limit: draw so many prompts.
        categories: keep prompts of these only.
        columns: where `data` of no known form has goal and target.
        system: system message put before every prompt.
        seeds: of the draws, each on its own.
        engine: where requests run.
        judging: how answers are judged.

    """

    model: str
    data: str
    out: Path
    limit: int | None = None
    categories: tuple[str, ...] | None = None
    columns: Columns = field(default_factory=Columns)
    system: str = ""
    seeds: tuple[int, ...] = (0,)
    engine: EngineSettings = field(default_factory=EngineSettings)
    judging: JudgeSettings = field(default_factory=JudgeSettings)


@dataclass(frozen=True, kw_only=True)
class RosaisStudy(Setup):
    """RoSais of every layer.

    Attributes:
        search: settings of the score; its seed is that of `seeds` in turn.
        same_masks: the same masks for every prompt, which the dataset level needs.

    """

    search: RosaisSettings = field(default_factory=RosaisSettings)
    same_masks: bool = False


@dataclass(frozen=True, kw_only=True)
class MaskStudy(Setup):
    """Router masking with its controls.

    Attributes:
        rosais: folder of a RoSais run on other prompts, for the ranking of layers and the score.
        levels: numbers of masked layers; those beyond what the model has count as all of them.
        attacks: of `search.masking.ATTACKS`.
        chosen_on: dataset level: one set of masks for all prompts, chosen on these; None: each prompt has masks of its own.
        chosen_limit: prompts drawn of `chosen_on`.
        search: the other settings; seed, score and number of layers come from the fields above.
        controls: as in `FsourStudy`, beside the masks of most layers of every attack.

    """

    rosais: Path
    levels: tuple[int, ...] = (1, 2, 5)
    attacks: tuple[str, ...] = ATTACKS
    chosen_on: str | None = None
    chosen_limit: int = 24
    search: MaskSettings = field(default_factory=MaskSettings)
    controls: int = 0

    def __post_init__(self) -> None:
        if not self.levels or min(self.levels) < 1:
            raise RouteError(f"levels must be 1 or more, got {list(self.levels)}")
        unknown = set(self.attacks) - set(ATTACKS)
        if unknown:
            raise RouteError(f"attack {sorted(unknown)[0]!r} is not one of {', '.join(ATTACKS)}")


@dataclass(frozen=True, kw_only=True)
class RecipeStudy(Setup):
    """Other people's recipes on every prompt; see `study.recipes`.

    Attributes:
        refused: prompts that the model refuses, other ones than `data`, as `study.prompts.read_prompts` takes them.
        answered: prompts that it answers.
        contrast_limit: prompts drawn of each of these.
        recipes: of `RECIPES`.
        num_candidates: plans scored for a prompt at most.
        safex: settings of SAFEx; its seed is that of `seeds` in turn.
        l3: settings of L3; its number of candidates is `num_candidates`.
        mascing: likewise of MASCing.

    """

    refused: str
    answered: str
    contrast_limit: int = 48
    recipes: tuple[str, ...] = RECIPES
    num_candidates: int = 128
    safex: SafexSettings = field(default_factory=SafexSettings)
    l3: SilencingSettings = field(default_factory=SilencingSettings)
    mascing: MascingSettings = field(default_factory=MascingSettings)

    def __post_init__(self) -> None:
        unknown = set(self.recipes) - set(RECIPES)
        if unknown:
            raise RouteError(f"recipe {sorted(unknown)[0]!r} is not one of {', '.join(RECIPES)}")
        if self.num_candidates < 2:
            raise RouteError(f"num_candidates must be at least 2, got {self.num_candidates}")


@dataclass(frozen=True, kw_only=True)
class FsourStudy(Setup):
    """F-SOUR on every prompt.

    Attributes:
        search: settings of the search; its seed is that of `seeds` in turn, its length of an answer that of `judging`.
        library_prompts: strategy `adaptive`: this many prompts are attacked first, and the routes found there are where the others
            start.
        artifact: also write a JailbreakBench attack artifact to this file.
        search_answered: also search prompts that the model answers anyway, as runs before 2026-11-26 did; else the plain answer is
            judged first, and one that complies is a success without a search, as published.
        controls: random routes beside each found one, with the other controls of `study.controls`; 0: no controls.

    """

    search: FsourSettings = field(default_factory=FsourSettings)
    library_prompts: int = 4
    artifact: Path | None = None
    search_answered: bool = False
    controls: int = 0
