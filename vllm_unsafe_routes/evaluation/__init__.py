"""What an attack or a defence is measured with: prompts, judges, intervals, and the files that results are handed on in.

Nothing here imports torch or vLLM, and nothing here brings harmful text along: prompts and judge templates are the user's files.
"""

from .artifacts import ArtifactError, ArtifactParameters, Attempt, make_artifact, read_artifact, write_artifact
from .datasets import Columns, DatasetError, PromptRecord, load_prompts, prompts_digest
from .judges import EndpointJudge, ExactJudge, Judge, JudgeItem, RefusalPhraseJudge, Verdict, error_counts
from .statistics import Interval, Outcomes, attack_success_rate, mean_interval, paired_difference
from .templates import JudgeTemplate, TemplateError, load_template

__all__ = [
    "ArtifactError",
    "ArtifactParameters",
    "Attempt",
    "Columns",
    "DatasetError",
    "EndpointJudge",
    "ExactJudge",
    "Interval",
    "Judge",
    "JudgeItem",
    "JudgeTemplate",
    "Outcomes",
    "PromptRecord",
    "RefusalPhraseJudge",
    "TemplateError",
    "Verdict",
    "attack_success_rate",
    "error_counts",
    "load_prompts",
    "load_template",
    "make_artifact",
    "mean_interval",
    "paired_difference",
    "prompts_digest",
    "read_artifact",
    "write_artifact",
]
