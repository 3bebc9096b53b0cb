"""The row index of a step on the CPU is the same whether written anew or taken from the step before; and what is read off it."""

import random

import numpy as np
import pytest
import torch
from vllm_unsafe_routes.kernels.spec import unpack_allowed

from vllm_unsafe_routes import ModelShape, RoutePlan, RoutePolicy
from vllm_unsafe_routes.compiled import NO_ROW
from vllm_unsafe_routes.engine.config import RouteConfig
from vllm_unsafe_routes.engine.device_table import DeviceTable
from vllm_unsafe_routes.engine.row_index import RowIndex
from vllm_unsafe_routes.engine.step import NO_PLAN_SLOT, Part, Resident, Step
from vllm_unsafe_routes.engine.step_masks import step_masks
from vllm_unsafe_routes.extras import RouteExtras
from vllm_unsafe_routes.policy import ActivePolicy

pytestmark = pytest.mark.v1_only  # under Triton's interpreter nothing is read off a step with plans

SHAPE = ModelShape("olmoe", 3, 32, (0, 1, 2), 8, 2)
POLICY = {"version": "route-policy/1", "layers": {"1": {"disabled": [7]}}}


class Requests:
    """Requests that come, are computed and go at random, with a plan or none; the host may take rejected drafts for accepted."""

    def __init__(self, active, seed, num_drafts=0):
        self.rng, self.num_drafts = random.Random(seed), num_drafts
        config = RouteConfig(allow_overrides=True)
        self.compiler = config.compiler(SHAPE, active)
        self.table = DeviceTable(config, self.compiler.layout, 3, torch.device("cpu"))
        contents = self.compiler.policy_rows()
        self.policy_row_of = np.full(len(contents), NO_ROW, np.int32)
        for slot, content in enumerate(contents):
            if content is not None:
                self.policy_row_of[slot] = self.table.acquire([content])[0]
        self.resident, self.position, self.made = {}, {}, 0

    def index(self):
        made = RowIndex(self.table, 3, 64, self.num_drafts)
        made.start_policy(self.policy_row_of)
        return made

    def plan(self):
        rng, plan = self.rng, RoutePlan()
        for layer in range(3):
            tokens = rng.choice(["all", "prompt", "generated", [0, 2], None])
            if tokens == [0, 2] and rng.random() < 0.5:
                plan.force(layer, tokens, rng.sample(range(7), 2))
            elif tokens is not None:
                plan.disable(layer, tokens, rng.sample(range(7), 3))
        return plan

    def come(self):
        req_id, prompt_len = f"r{self.made}", self.rng.randrange(1, 6)
        self.made += 1
        # Some were computed before, as after a preemption.
        self.position[req_id] = self.rng.choice([0, 0, 6])
        plan, slot = self.plan(), NO_PLAN_SLOT
        if plan and self.rng.random() < 0.8:
            compiled = self.compiler.compile_text(plan.to_json())
            slot = self.table.place(req_id, compiled, prompt_len, self.policy_row_of)
            self.resident[req_id] = Resident(slot, compiled, RouteExtras(), prompt_len, 0)

    def go(self):
        if self.position:
            req_id = self.rng.choice(list(self.position))
            del self.position[req_id]
            if req_id in self.resident:
                self.table.remove(req_id, self.resident.pop(req_id).plan)

    def told(self, req_id):
        position = self.position[req_id]
        return position + self.rng.randrange(self.num_drafts + 1) if position >= self.resident[req_id].prompt_len else position

    def step(self):
        req_ids = list(self.position)
        number = {req_id: self.rng.randrange(1, 4) if self.position[req_id] < 5 else 1 for req_id in req_ids}
        starts = np.cumsum([0, *number.values()])
        places = [at for req_id in req_ids for at in range(self.position[req_id], self.position[req_id] + number[req_id])]
        parts = [
            Part(req_id, self.resident[req_id], self.told(req_id), number[req_id], int(first))
            for req_id, first in zip(req_ids, starts, strict=False)
            if req_id in self.resident
        ]
        for req_id in req_ids:
            self.position[req_id] += number[req_id]
        as_tensor = torch.from_numpy(starts.astype(np.int32)), torch.tensor(places, dtype=torch.int64)
        return Step(parts, req_ids, number, len(places), *as_tensor)


@pytest.mark.parametrize("active", [ActivePolicy(), ActivePolicy(RoutePolicy.from_json(POLICY))], ids=["free", "policy"])
@pytest.mark.parametrize("num_drafts", [0, 2])
@pytest.mark.parametrize("seed", range(8))
def test_rows_follow_every_step(active, num_drafts, seed):
    requests = Requests(active, seed, num_drafts)
    index, lasted, masks = requests.index(), 0, {}
    for _ in range(150):
        if requests.rng.random() < 0.1 or not requests.position:
            requests.come()
        if (requests.rng.random() < 0.08 and len(requests.position) > 1) or len(requests.position) > 8:
            requests.go()
        step = requests.step()
        anew = requests.index()
        index.stage(step)
        anew.stage(step)
        rows = index.rows[:, : step.num_tokens]
        assert torch.equal(rows, anew.rows[:, : step.num_tokens])
        assert (index.covered, index.bare) == (anew.covered, anew.bare)
        assert index.covered == {slot for slot in range(3) if (rows[slot] >= 0).all()}
        assert index.bare == {slot for slot in range(3) if (rows[slot] < 0).all()}
        if not index.is_idle and not index.lasts:
            masks = step_masks(index.rows, step.num_tokens, index.covered, requests.table.rows, SHAPE)
        if not index.is_idle:
            assert_masks(masks, rows, index.covered, requests.table.rows)
            lasted += index.lasts
    assert lasted > 10


def test_a_slot_that_changes_hands_between_two_steps_of_decoding():
    requests = Requests(ActivePolicy(), 0)
    index = requests.index()
    for expert in range(3):
        requests.plan = lambda expert=expert: RoutePlan().disable(0, "all", [expert])
        while not requests.resident:
            requests.come()
        requests.position = dict.fromkeys(requests.resident, 9)
        for lasts in (False, True):
            index.stage(requests.step())
            assert index.lasts == lasts  # the new plan's row may have the number of the old one's
            allowed = requests.table.rows.allowed[index.rows[0, :1].long()]
            assert unpack_allowed(allowed, 8)[0].logical_not().nonzero().tolist() == [[expert]]
        requests.go()


def assert_masks(masks, rows, covered, table):
    for slot in range(3):
        row = rows[slot].long()
        plain = slot in covered and not table.flags[row].any()
        assert (slot in masks) == plain
        if plain:
            assert torch.equal(masks[slot].banned, ~unpack_allowed(table.allowed[row], 8))
            assert not masks[slot].native_weights and masks[slot].score_bias is None
