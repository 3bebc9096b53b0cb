"""The demo runs what it says: each command that it prints stands for the settings that it uses."""

from __future__ import annotations

import pytest

from vllm_unsafe_routes.cli import make_parser
from vllm_unsafe_routes.commands import fsour, mask_attack, rosais
from vllm_unsafe_routes.commands.demo import steps_of

SETTINGS_OF = {"rosais": rosais.settings_of, "mask-attack": mask_attack.settings_of, "fsour": fsour.settings_of}


@pytest.mark.parametrize("at", range(4))
def test_a_step_s_command_is_its_study(tmp_path, at):
    step = steps_of(tmp_path, 5, "0,1")[at]
    args = make_parser().parse_args(list(step.words))
    assert SETTINGS_OF[step.words[0]](args) == step.study
