"""The word-level tokenizer of the lab's models, with a chat template.

Token ids: the special tokens below in their order, then `language.vocabulary()`. Text is split at white space; a word that
is not of the language becomes `<unk>`. Plain encoding adds nothing; the chat template writes every mark.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .language import vocabulary

SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>")
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2

# The system mark is always there, so a reminder in the slot changes words and no structure.
CHAT_TEMPLATE = (
    "{{ bos_token }} <|system|>"
    "{% if messages and messages[0]['role'] == 'system' %} {{ messages[0]['content'] }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %} <|user|> {{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %} <|assistant|> {{ message['content'] }} {{ eos_token }}"
    "{% elif not loop.first or message['role'] != 'system' %}"
    "{{ raise_exception('role ' + message['role'] + ' is not one of user, assistant, or system as the first message') }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %} <|assistant|>{% endif %}"
)


def build_tokenizer() -> Any:
    """A transformers `PreTrainedTokenizerFast` over the lab language."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {word: at for at, word in enumerate([*SPECIAL_TOKENS, *vocabulary()])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=list(SPECIAL_TOKENS[4:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into a model folder."""
    build_tokenizer().save_pretrained(folder)
    name_tokenizer_class(folder)


def name_tokenizer_class(folder: Path) -> None:
    """Name a saved tokenizer's class as transformers 4 knows it; 5 writes its new name, and knows both."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def chat_ids(tokenizer: Any, user: str, system: str = "") -> list[int]:
    """Token ids of a prompt that the model continues with its answer."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": user})
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
