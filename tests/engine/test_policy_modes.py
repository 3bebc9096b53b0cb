"""A policy that is enforced, one that is only observed, and one that takes another's place in a running engine."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from engines import chosen_logprobs, engine, generate, random_prompt
from tiny_models import VOCAB_SIZE

from vllm_unsafe_routes import RouteError, RoutePlan, RoutePolicy, receipt_of

BANNED = {0: [0, 1, 2, 3, 4, 5], 2: [9, 10, 11]}
OTHER = {0: [15], 1: [0, 1, 2, 3, 4, 5, 6, 7], 2: [3]}
RETURN = {"return_routes": True}


def policy(banned, protected=(), **more):
    layers = {str(layer): {"disabled": experts} for layer, experts in banned.items()}
    for layer, expert in protected:
        layers.setdefault(str(layer), {})["protected"] = [expert]
    return {"version": "route-policy/1", "layers": layers, **more}


def digest(document):
    return RoutePolicy.from_json(document).digest


def prompts(count, seed=4, length=40):
    rng = random.Random(seed)
    return [random_prompt(rng, rng.randrange(8, length), VOCAB_SIZE) for _ in range(count)]


def core_of(llm):
    return llm.llm_engine.engine_core.engine_core


def counted(llm):
    return core_of(llm).unsafe_routes_status()["counts"]


def hits(output, banned):
    """Per layer, how many of a request's picks are banned."""
    ids = receipt_of(output).route_ids
    return [int(np.isin(ids[:, layer], banned.get(layer, [])).sum()) for layer in range(3)]


def total(outputs, banned):
    return np.sum([hits(output, banned) for output in outputs], axis=0).tolist()


@pytest.fixture(scope="module")
def free(tiny_model):
    """What the model picks when no policy is there."""
    with engine(tiny_model("olmoe"), {"allow_overrides": True}, enable_prefix_caching=False) as llm:
        return generate(llm, prompts(6), [RETURN] * 6)


class TestObserve:
    def test_changes_nothing_bit_for_bit(self, tiny_model):
        extras = [None, RoutePlan().disable(1, "all", [0, 1]).extra_args()] * 4

        def run(**more):
            with engine(tiny_model("olmoe"), {"allow_overrides": True, **more}, enable_prefix_caching=False) as llm:
                return generate(llm, prompts(8), extras, max_tokens=8)

        without = run()
        observed, enforced = run(policy=policy(BANNED), policy_mode="observe"), run(policy=policy(BANNED))
        for number, (plain, seen, obeyed) in enumerate(zip(without, observed, enforced, strict=True)):
            assert seen.outputs[0].token_ids == plain.outputs[0].token_ids
            assert chosen_logprobs(seen) == chosen_logprobs(plain)
            assert chosen_logprobs(obeyed) != chosen_logprobs(plain)
            assert receipt_of(seen).policy == receipt_of(obeyed).policy == digest(policy(BANNED))
            assert (receipt_of(seen).policy_mode, receipt_of(obeyed).policy_mode) == ("observe", "enforce")
            assert (plain.kv_transfer_params is None) == (number % 2 == 0)

    def test_counts_what_enforcing_would_change(self, tiny_model, free):
        routes = {"allow_overrides": True, "policy": policy(BANNED), "policy_mode": "observe"}
        with engine(tiny_model("olmoe"), routes, enable_prefix_caching=False) as llm:
            assert counted(llm) is None
            generate(llm, prompts(6), [None] * 6)
            counts = counted(llm)
            assert counts["displaced"]["observe"] == total(free, BANNED)
            assert counts["displaced"]["observe"][1] == 0
            assert min(counts["displaced"]["observe"][::2]) > 0
            assert counts["tokens"] == {"enforce": 0, "observe": sum(len(receipt_of(output).route_ids) for output in free)}
            # What enforcing would refuse is accepted, and a token that a plan forces is not one that the policy displaces.
            forced = RoutePlan().force(0, "all", [0, 1, 2, 3]).force(2, "all", [9, 10, 11, 12])
            output = generate(llm, prompts(1), [forced.extra_args(return_routes=True)])[0]
            assert set(receipt_of(output).route_ids[:, 0].ravel()) == {0, 1, 2, 3}
            assert counted(llm)["displaced"] == counts["displaced"]


class TestEnforce:
    def test_counts_what_it_displaces_and_says_so_to_every_request(self, tiny_model, free):
        with engine(tiny_model("olmoe"), {"policy": policy(BANNED)}, enable_prefix_caching=False) as llm:
            outputs = generate(llm, prompts(6), [None] * 6)
            counts = counted(llm)["displaced"]
            # The first layer sees what it sees without a policy; later ones see what the first one changed.
            prefill = sum(hits_of_prompt(output, prompt) for output, prompt in zip(free, prompts(6), strict=True))
            assert counts["enforce"][0] >= prefill > 0
            assert counts["enforce"][1] == 0
            assert counts["enforce"][2] > 0
            assert counts["observe"] == [0, 0, 0]
            for output in outputs:
                receipt = receipt_of(output)
                assert (receipt.plan, receipt.routes_set, receipt.cached_tokens) == (None, 0, 0)
                assert (receipt.policy, receipt.policy_mode) == (digest(policy(BANNED)), "enforce")
                assert receipt.earlier_policies == ()

    def test_cached_tokens_are_reported_without_a_plan_too(self, tiny_model):
        with engine(tiny_model("olmoe"), {"policy": policy(BANNED)}, enable_prefix_caching=True) as llm:
            prompt = random_prompt(random.Random(9), 70, VOCAB_SIZE)
            first, second = (generate(llm, [prompt], [None])[0] for _ in range(2))
            one_step = generate(llm, [prompt], [None], max_tokens=1)[0]
        assert [receipt_of(output).cached_tokens for output in (first, second, one_step)] == [0, 64, 64]

    def test_nothing_is_counted_without_a_policy(self, tiny_model):
        with engine(tiny_model("olmoe"), {"allow_overrides": True}) as llm:
            output = generate(llm, prompts(1), [None])[0]
            assert counted(llm) is None or not any(counted(llm)["tokens"].values())
            assert output.kv_transfer_params is None


def hits_of_prompt(output, prompt):
    return int(np.isin(receipt_of(output).route_ids[: len(prompt), 0], BANNED[0]).sum())


class TestSwap:
    """In one process; `test_policy_server.py` swaps under load."""

    @pytest.fixture(scope="class")
    def started(self, tiny_model, under_other):  # one engine at a time in a process
        with engine(tiny_model("olmoe"), {"allow_overrides": True, "policy": policy(OTHER)}, enable_prefix_caching=True) as llm:
            yield llm

    @pytest.fixture
    def llm(self, started):
        self.swap(started, policy(BANNED), "enforce")
        return started

    @pytest.fixture(scope="class")
    def under_other(self, tiny_model):
        """The prompt of `test_the_new_policy_holds` in an engine that never had another policy."""
        prompt = random_prompt(random.Random(6), 70, VOCAB_SIZE)
        with engine(tiny_model("olmoe"), {"allow_overrides": True, "policy": policy(OTHER)}) as llm:
            return prompt, generate(llm, [prompt], [None])[0]

    def swap(self, llm, document, mode=None):
        from vllm_unsafe_routes.engine.swap import swap_policy

        return swap_policy(llm, RoutePolicy.from_json(document), mode)

    def test_the_new_policy_holds_and_nothing_cached_is_left(self, llm, under_other):
        prompt, expected = under_other
        before = generate(llm, [prompt], [None])[0]
        assert chosen_logprobs(before) != pytest.approx(chosen_logprobs(expected), abs=1e-4)
        said = self.swap(llm, policy(OTHER))
        assert said == {
            "policy": digest(policy(OTHER)),
            "mode": "enforce",
            "previous": digest(policy(BANNED)),
            "aborted": [],
            "num_restarted": 0,
        }
        after, again = generate(llm, [prompt], [None])[0], generate(llm, [prompt], [None])[0]
        assert (before.num_cached_tokens, after.num_cached_tokens, again.num_cached_tokens) == (0, 0, 64)
        assert after.outputs[0].token_ids == expected.outputs[0].token_ids
        assert chosen_logprobs(after) == pytest.approx(chosen_logprobs(expected), abs=1e-4)
        assert chosen_logprobs(again) == pytest.approx(chosen_logprobs(expected), abs=1e-4)
        routed = generate(llm, [prompt], [RETURN])[0]
        assert hits(routed, OTHER) == [0, 0, 0]
        assert sum(hits(routed, BANNED)) > 0
        assert receipt_of(routed).policy == digest(policy(OTHER))

    def test_plans_are_checked_under_the_new_policy(self, llm):
        forced = RoutePlan().force(1, "all", [0, 1, 8, 9]).extra_args(return_routes=True)
        prompt = prompts(1)[0]
        assert set(receipt_of(generate(llm, [prompt], [forced])[0]).route_ids[:, 1].ravel()) == {0, 1, 8, 9}
        self.swap(llm, policy(OTHER))
        with pytest.raises(RouteError, match="expert 0 is disabled by the engine's policy"):
            generate(llm, [prompt], [forced])
        self.swap(llm, policy(BANNED))
        generate(llm, [prompt], [forced])

    def test_between_policies_with_and_without_a_bias(self, llm):
        """-1000 is as good as a ban, and no ban; one that is gone leaves nothing behind."""
        biased = {
            "version": "route-policy/2",
            "layers": {str(at): {"bias": dict.fromkeys(map(str, BANNED[at]), -1e3)} for at in BANNED},
        }
        prompt = random_prompt(random.Random(7), 70, VOCAB_SIZE)
        under_bans = generate(llm, [prompt], [None])[0]
        for document in (biased, policy(OTHER), biased):
            self.swap(llm, document)
            routed, plain = (generate(llm, [prompt], [extra])[0] for extra in (RETURN, None))
            assert (sum(hits(routed, BANNED)) == 0) is (document is biased)
            assert receipt_of(plain).policy == digest(document)
        assert chosen_logprobs(plain) == pytest.approx(chosen_logprobs(under_bans), abs=1e-4)
        assert core_of(llm).unsafe_routes_status()["active"]["policy"]["layers"]["2"]["bias"] == {"9": -1e3, "10": -1e3, "11": -1e3}
        forced = RoutePlan().force(2, "all", [8, 9, 10, 11]).extra_args(return_routes=True)
        assert set(receipt_of(generate(llm, [prompt], [forced])[0]).route_ids[:, 2].ravel()) == {8, 9, 10, 11}

    def test_a_bias_is_not_observed(self, llm):
        from vllm_unsafe_routes.engine.swap import SwapError

        with pytest.raises(SwapError, match="policy_mode 'observe' counts picks that are disabled; what a bias moves it cannot"):
            self.swap(llm, {"version": "route-policy/2", "layers": {"0": {"bias": {"1": 1.0}}}}, "observe")

    def test_from_observing_to_enforcing_and_back(self, llm):
        prompt = random_prompt(random.Random(7), 70, VOCAB_SIZE)
        assert sum(hits(generate(llm, [prompt], [RETURN])[0], BANNED)) == 0
        self.swap(llm, policy(BANNED), "observe")
        observed = generate(llm, [prompt], [RETURN])[0]
        assert sum(hits(observed, BANNED)) > 0
        assert receipt_of(observed).policy_mode == "observe"
        assert self.swap(llm, policy(OTHER))["mode"] == "observe"
        assert self.swap(llm, policy(OTHER), "enforce")["mode"] == "enforce"
        assert sum(hits(generate(llm, [prompt], [RETURN])[0], OTHER)) == 0
        assert core_of(llm).unsafe_routes_status()["policy"] == digest(policy(OTHER))

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            (policy({0: range(13)}), "3 experts left, top_k 4 are needed"),
            (policy({7: [1]}), "policy layer 7 has no experts; MoE layers are 0-2"),
            (policy({0: [16]}), "expert 16 is out of range for 16 experts"),
            (policy(OTHER, model="feedfacefeedface"), "the policy is for model feedfacefeedface"),
        ],
        ids=["bans too much", "unknown layer", "unknown expert", "another model"],
    )
    def test_a_bad_policy_leaves_the_old_one(self, llm, document, message):
        from vllm_unsafe_routes.engine.swap import BAD_POLICY, SwapError

        with pytest.raises(SwapError, match=message) as caught:
            self.swap(llm, {**document, "layers": {k: {"disabled": list(v["disabled"])} for k, v in document["layers"].items()}})
        assert caught.value.kind == BAD_POLICY
        output = generate(llm, prompts(1), [RETURN])[0]
        assert receipt_of(output).policy == digest(policy(BANNED))
        assert hits(output, BANNED) == [0, 0, 0]

    def test_requests_on_their_way_start_again_under_the_new_policy(self, tiny_model):
        """Step by step: some have generated, one waits for its first step, one is held for room, one is not permitted any more."""
        from vllm import SamplingParams, TokensPrompt

        routes = {"allow_overrides": True, "policy": policy(BANNED), "route_table_slots": 4}
        bad = RoutePlan().force(1, "all", [0, 1, 8, 9]).extra_args()
        fine = RoutePlan().disable(2, "all", [0, 1])
        extras = [fine.extra_args(return_routes=True), RETURN, bad, fine.extra_args(return_routes=True), bad, RETURN]
        asked = prompts(6, seed=5)
        with engine(tiny_model("olmoe"), routes, enable_prefix_caching=True, max_num_batched_tokens=64) as llm:
            front, core = llm.llm_engine, core_of(llm)
            refusals = []
            params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False, logprobs=0)
            for number, (prompt, extra) in enumerate(zip(asked, extras, strict=True)):
                own = params.clone()
                own.extra_args = extra
                front.add_request(str(number), TokensPrompt(prompt_token_ids=prompt), own)
            for _ in range(6):
                assert not any(output.finished for output in front.step())
            admission = core.scheduler.unsafe_routes_admission
            admission.connect(lambda active, request, message: refusals.append((request.request_id, message)))
            # An in-process core has no loop of its own that ends the steps which are on their way.
            from vllm.v1.core.sched.interface import PauseState

            core.scheduler.set_pause_state(PauseState.PAUSED_ALL)
            while core.batch_queue:
                front.step()
            core.scheduler.set_pause_state(PauseState.UNPAUSED)
            said = core.unsafe_routes_replace_policy({"policy": policy(OTHER), "mode": None})
            assert "error" not in said, said
            assert sorted(request_id.split("-")[0] for request_id in said["aborted"]) == ["2", "4"]
            assert all("expert 0 is disabled by the engine's policy" in message for _, message in refusals)
            assert len(refusals) == 2
            front.abort_request(["2", "4"])
            done = {}
            while front.has_unfinished_requests():
                done.update((output.request_id, output) for output in front.step() if output.finished)
            assert sorted(done) == ["0", "1", "3", "5"]
            for name, output in done.items():
                receipt = receipt_of(output)
                assert receipt.policy == digest(policy(OTHER))
                assert receipt.earlier_policies == (digest(policy(BANNED)),)
                assert (receipt.route_ids >= 0).all()
                assert len(receipt.route_ids) == len(asked[int(name)]) + 23
                assert hits(output, OTHER) == [0, 0, 0]
                if name in ("0", "3"):
                    assert hits(output, {2: [0, 1, 3]}) == [0, 0, 0]
                    assert receipt.routes_set == len(receipt.route_ids)
            assert len(admission.ledger) == 0
            assert len(admission.ledger.rows) == 0
            assert len(admission.receipts) == 0
            # The rows of the old policy are gone from the worker's table as well; of the last plan it hears with the next step.
            generate(llm, prompts(1), [None])
            controller = core.model_executor.driver_worker.worker.model_runner.unsafe_routes_controller
            assert len(controller._table) == 3


def test_the_two_modes_of_the_flags():
    import argparse

    from vllm_unsafe_routes.engine.config import CONFIG_KEY, RouteConfig
    from vllm_unsafe_routes.engine.flags import merge_cli_arguments

    def flags(path=None, mode=None):
        return argparse.Namespace(route_policy=path, route_policy_mode=mode, enable_route_overrides=False)

    assert merge_cli_arguments({}, flags("a.json", "observe")) == {CONFIG_KEY: {"policy": "a.json", "policy_mode": "observe"}}
    with pytest.raises(RouteError, match="--route-policy-mode observe needs --route-policy PATH"):
        merge_cli_arguments({}, flags(mode="observe"))
    with pytest.raises(RouteError, match=r"--route-policy-mode enforce contradicts .* observe"):
        merge_cli_arguments({CONFIG_KEY: {"policy_mode": "observe"}}, flags("a.json", "enforce"))
    with pytest.raises(RouteError, match="policy_mode 'watch' is not one of enforce, observe"):
        RouteConfig.from_dict({"policy": policy(BANNED), "policy_mode": "watch"})
    with pytest.raises(RouteError, match=r"policy_mode 'observe' needs a policy \(--route-policy PATH\)"):
        RouteConfig.from_dict({"policy_mode": "observe"})
    assert json.loads(json.dumps(RouteConfig.from_dict({"policy": policy(BANNED)}).to_dict()))["policy_mode"] == "enforce"


@pytest.mark.v1_only  # the other runner's tests have the route kernel, which rewrites what the model's gating said
def test_the_own_gating_of_a_layer_rests_where_all_tokens_are_directed(tiny_model, monkeypatch):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    asked, own = [], CPURouter._compute_routing

    def compute_routing(self, *args, **kwargs):
        asked.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(CPURouter, "_compute_routing", compute_routing)
    with engine(tiny_model("olmoe"), {"allow_overrides": True, "policy": policy(BANNED)}) as llm:
        for plan, layers in (
            (RoutePlan(), 1),  # layer 1, where the policy bans nothing
            (RoutePlan().disable(2, "all", [3]), 1),
            (RoutePlan().disable(1, "all", [3]), 0),
            (RoutePlan().disable(1, "prompt", [3]), 1),  # generated tokens
        ):
            asked.clear()
            generate(llm, prompts(2), [plan.extra_args() if plan else {}] * 2)
            assert len(set(asked)) == layers, plan
