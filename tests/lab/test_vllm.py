"""Lab models in the real engine: vLLM loads the folder as it is and answers as transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import engines
import pytest

from vllm_unsafe_routes import lab
from vllm_unsafe_routes.lab import language
from vllm_unsafe_routes.lab.settings import SHAPES, LabSettings


def assert_engine_agrees(folder: Path, fixture: tuple[Any, Any], **settings: Any) -> None:
    """The same chat prompts, tokens and greedy answers from vLLM and from transformers."""
    from vllm import SamplingParams

    from vllm_unsafe_routes.lab.evaluate import MAX_NEW_TOKENS, generate
    from vllm_unsafe_routes.lab.tokenizer import chat_ids

    asked = [prompt for kind in language.KINDS for prompt in language.prompts("search", kind, count=16)]
    chats = [[{"role": "user", "content": prompt.text}] for prompt in asked]
    with engines.engine(folder, skip_tokenizer_init=False, **settings) as llm:
        outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS), use_tqdm=False)
    model, tokenizer = fixture
    ids = [chat_ids(tokenizer, prompt.text) for prompt in asked]
    assert [list(output.prompt_token_ids) for output in outputs] == ids
    expected = [tokenizer.decode(answer) for answer in generate(model, ids)]
    # The engine's incremental decoding puts a space before the first word.
    assert [output.outputs[0].text.strip() for output in outputs] == expected


def test_shipped_model_answers_in_vllm_as_in_transformers(shipped):
    assert_engine_agrees(lab.model_path(), shipped)


@pytest.mark.long
@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"olmoe"}))
def test_other_shapes_answer_in_vllm_as_in_transformers(shape, tmp_path, load_lab_model):
    from vllm_unsafe_routes.lab.recipe import make_lab_model

    # Half trained: enough for answers that are words in an order, which is what is compared.
    make_lab_model(LabSettings(shape=shape, pretrain_steps=150, tune_steps=20), tmp_path)
    assert_engine_agrees(tmp_path, load_lab_model(tmp_path), **engines.SETTINGS.get(shape, {}))
