"""The PyRIT target of docs/harnesses.md: the page's own block, on a real server of the lab model."""

from __future__ import annotations

import asyncio
import importlib.util
import re
from pathlib import Path

import pytest
from inspect_runs import PLAN, PROMPTS, lab_server, own_scores

from vllm_unsafe_routes.lab import language

pytestmark = [
    pytest.mark.v1_only,  # server processes of their own
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("pyrit") is None, reason="needs requirements/pyrit.txt"),
]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "harnesses.md"


def test_the_page(tmp_path):
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "pyrit" in block]
    page = {}
    exec(block, page)

    async def results(url):
        await page["initialize_pyrit_async"](page["IN_MEMORY"], silent=True)
        target = page["RoutedTarget"](url=f"{url}/v1", model="tiny", plan=PLAN)
        return await page["main"]([prompt.text for prompt in PROMPTS], target)

    with lab_server(tmp_path, "--enable-route-overrides") as started:
        answers = [result.last_response for result in asyncio.run(results(started.url))]
        expected = own_scores(started.url, PLAN)
    judged = [language.judge(one, answer.converted_value) == "complied" for one, answer in zip(PROMPTS, answers, strict=True)]
    assert judged == expected
    assert {(answer.prompt_metadata["plan"], answer.prompt_metadata["policy"]) for answer in answers} == {(PLAN.digest, None)}
    assert all(answer.prompt_metadata["routes_set"] > 0 for answer in answers)
