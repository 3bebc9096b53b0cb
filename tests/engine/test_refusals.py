"""What cannot be controlled stops the engine: the message names the place, the class and what helps.

The routers and layers are vLLM's own; a class is a stand-in only where the real one cannot exist on CPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import types

import pytest
import torch
from engines import engine

from vllm_unsafe_routes import ModelShape, RouteError
from vllm_unsafe_routes.engine.config import CONFIG_KEY, RouteConfig, refuse_misspelled
from vllm_unsafe_routes.engine.flags import merge_cli_arguments
from vllm_unsafe_routes.engine.supported import check_supported

NUM_EXPERTS, TOP_K = 16, 4
WHAT_HELPS = "serve the model without a policy and without overrides, or set VLLM_UNSAFE_ROUTES_DISABLE=1"
SIZE = dict(top_k=TOP_K, global_num_experts=NUM_EXPERTS)


@pytest.fixture(scope="module")
def loaded(tiny_model):
    """A model as vLLM loads it, and its shape; the engine itself has no route control."""
    from transformers import AutoConfig

    folder = tiny_model("olmoe")
    shape = ModelShape.from_hf_config(AutoConfig.from_pretrained(folder))
    assert (shape.num_experts, shape.top_k, shape.moe_layers) == (NUM_EXPERTS, TOP_K, (0, 1, 2))
    with engine(folder) as llm:
        yield llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.get_model(), shape


@pytest.fixture
def bind(loaded, monkeypatch):
    """`bind(router=..., shape=..., layers=..., extra=...)`: bind the model with something about layer 1 changed."""
    from vllm_unsafe_routes.engine.bind import bind_routers
    from vllm_unsafe_routes.engine.router import RouterHooks, RouterState

    hooks = RouterHooks(0, RouterState(), False, frozenset(), has_plans=True)
    model, shape = loaded

    def run(router=None, shape=shape, layers=range(3), extra=None):
        for runner in runners(model):  # binding leaves its mark on the instance
            monkeypatch.setitem(runner.router.__dict__, "_compute_routing", runner.router._compute_routing)
        if router is not None:
            monkeypatch.setattr(runners(model)[1], "router", router)
        root = torch.nn.ModuleList([model, extra]) if extra is not None else model
        return bind_routers(root, shape, hooks, layers)

    return run


def runners(model):
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return [module for module in model.modules() if isinstance(module, MoERunner)]


def table():
    return torch.zeros(128, TOP_K, dtype=torch.int32)


def bias():
    return torch.zeros(NUM_EXPERTS)


def known_by_nobody(hidden_states, gating_output, topk, renormalize):
    raise AssertionError("never called")


def cpu_router(**options):
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    return CPURouter(**SIZE, **options)


def bias_router(**options):
    from vllm.model_executor.layers.fused_moe.router.fused_topk_bias_router import FusedTopKBiasRouter

    return FusedTopKBiasRouter(**SIZE, **options)


def grouped_router(**options):
    from vllm.model_executor.layers.fused_moe.router.grouped_topk_router import GroupedTopKRouter

    return GroupedTopKRouter(**SIZE, num_expert_group=4, topk_group=2, **options)


def custom_router(function):
    from vllm.model_executor.layers.fused_moe.router.custom_routing_router import CustomRoutingRouter

    return CustomRoutingRouter(**SIZE, custom_routing_function=function)


def zero_expert_router():
    from vllm.model_executor.layers.fused_moe.router.zero_expert_router import ZeroExpertRouter

    return ZeroExpertRouter(**SIZE, e_score_correction_bias=bias(), num_logical_experts=NUM_EXPERTS, zero_expert_type="identity")


def simulator_router():
    """The class itself; its constructor differs between releases."""
    from vllm.model_executor.layers.fused_moe.router.routing_simulator_router import RoutingSimulatorRouter

    router = object.__new__(RoutingSimulatorRouter)
    router.__dict__.update(SIZE)
    return router


def aiter_router():
    """The class itself; its constructor asks for ROCm kernels."""
    from vllm.model_executor.layers.fused_moe.router.aiter_shared_routed_fused_moe_router import AiterSharedRoutedFusedMoERouter

    router = object.__new__(AiterSharedRoutedFusedMoERouter)
    router.__dict__.update(SIZE, renormalize=True, scoring_func="softmax")
    return router


def derived_router():
    """A subclass may route in its own way, so a known parent is not enough."""
    from vllm.model_executor.layers.fused_moe.router.fused_topk_router import FusedTopKRouter

    return type("NewerRouter", (FusedTopKRouter,), {})(**SIZE)


BIAS, GROUPED, CPU = "FusedTopKBiasRouter", "GroupedTopKRouter", "CPURouter"
UNCONTROLLABLE = {
    "unknown class": (simulator_router, "RoutingSimulatorRouter is not a router class known here"),
    "zero experts": (zero_expert_router, "ZeroExpertRouter is not a router class known here"),
    "aiter": (aiter_router, "AiterSharedRoutedFusedMoERouter is not a router class known here"),
    "subclass": (derived_router, "NewerRouter is not a router class known here"),
    "custom function": (
        lambda: custom_router(known_by_nobody),
        "CustomRoutingRouter calls a custom routing function 'known_by_nobody' that is not known to respect masked logits",
    ),
    "custom function on CPU": (
        lambda: cpu_router(custom_routing_function=known_by_nobody),
        "CPURouter calls a custom routing function 'known_by_nobody'",
    ),
    "custom function without a name": (
        lambda: cpu_router(custom_routing_function=functools.partial(known_by_nobody)),
        "CPURouter calls a custom routing function 'partial'",
    ),
    "hash table": (
        lambda: bias_router(scoring_func="sqrtsoftplus", hash_indices_table=table()),
        "FusedTopKBiasRouter routes by a table of token ids, not by scores",
    ),
    "hash table on CPU": (
        lambda: cpu_router(scoring_func="sqrtsoftplus", hash_indices_table=table()),
        "CPURouter routes by a table of token ids, not by scores",
    ),
    "second bias": (
        lambda: bias_router(e_score_correction_bias=bias(), bias_vl=bias()),
        "FusedTopKBiasRouter has a second routing bias for image tokens",
    ),
    "fused shared experts": (
        lambda: bias_router(e_score_correction_bias=bias(), num_fused_shared_experts=1),
        "FusedTopKBiasRouter appends fused shared experts to the routed ones",
    ),
    "scoring that the CPU lacks": (
        lambda: cpu_router(scoring_func="sigmoid", e_score_correction_bias=bias()),
        "CPURouter has no sigmoid gating without groups on CPU",
    ),
}


@pytest.mark.parametrize("name", UNCONTROLLABLE)
def test_a_router_that_cannot_be_controlled(name, bind):
    make, message = UNCONTROLLABLE[name]
    with pytest.raises(RouteError) as caught:
        bind(make())
    assert str(caught.value).startswith("MoE layer 1 (model.layers.1.")
    assert f": router {message}" in str(caught.value)
    assert str(caught.value).endswith(f"; {WHAT_HELPS}")


def test_grouped_routing_with_fused_shared_experts():
    """The constructor asks for ROCm's kernels, so the option is set afterwards."""
    from vllm_unsafe_routes.engine.router import gating_of

    router = grouped_router()
    assert gating_of(router, NUM_EXPERTS).spec.num_expert_group == 4
    router.num_fused_shared_experts = 1
    with pytest.raises(RouteError, match="appends fused shared experts"):
        gating_of(router, NUM_EXPERTS)


def test_what_is_not_a_base_router(bind):
    with pytest.raises(RouteError, match=r"MoE layer 1 \(model\..*\): router SimpleNamespace is not a BaseRouter; serve the model"):
        bind(types.SimpleNamespace(top_k=TOP_K))


def test_a_runner_class_that_nobody_has_read(bind, loaded, monkeypatch):
    """vLLM has subclasses with paths of their own to the expert kernels."""
    runner = runners(loaded[0])[1]
    monkeypatch.setattr(runner, "__class__", type("FastMoERunner", (type(runner),), {}))
    with pytest.raises(RouteError, match=r"MoE layer 1 \(.*\): MoE runner FastMoERunner is not a class known here: it may reach"):
        bind()


# By names of vLLM's quantisation methods; --moe-backend triton has a monolithic kernel for MXFP4 and none for NVFP4.
ADVICE = {
    "UnquantizedFusedMoEMethod": "triton",
    "Fp8MoEMethod": "triton",
    "GptOssMxfp4MoEMethod": "marlin or triton_unfused or flashinfer_cutlass",
    "CompressedTensorsW4A4Mxfp4MoEMethod": "marlin or triton_unfused or flashinfer_cutlass",
    "ModelOptNvFp4FusedMoE": "flashinfer_cutlass or cutlass or marlin",
    "CompressedTensorsW4A4Nvfp4MoEMethod": "flashinfer_cutlass or cutlass or marlin",
}


@pytest.mark.parametrize("name", ADVICE)
def test_a_monolithic_kernel(bind, loaded, monkeypatch, name):
    method = runners(loaded[0])[0].routed_experts.quant_method
    monkeypatch.setattr(method, "__class__", type(name, (type(method),), {"is_monolithic": True}))
    with pytest.raises(RouteError) as caught:
        bind()
    assert str(caught.value).startswith("MoE layer 0 (model.layers.0.")
    assert f"the monolithic expert kernel of {name} routes inside itself" in str(caught.value)
    assert f"with --moe-backend {ADVICE[name]}, or for plans that only mask and bias 'seam': 'logits'; " in str(caught.value)
    assert str(caught.value).endswith(WHAT_HELPS)


def test_a_kernel_that_gathers_before_routing(bind, loaded, monkeypatch):
    monkeypatch.setattr(type(runners(loaded[0])[0]), "do_naive_dispatch_combine", True)
    with pytest.raises(RouteError, match=r"MoE layer 0 .*: \w+ gathers the tokens of all data-parallel ranks before routing"):
        bind()


def test_the_advised_backends_are_modular_by_vllm_s_own_selection():
    from vllm.model_executor.layers.fused_moe.oracle import fp8, int8, int_wna16, mxfp4, nvfp4, unquantized

    from vllm_unsafe_routes.engine.backends import modular_backends

    def kernels(oracle, backend):
        name = oracle.__name__.rpartition(".")[2].removeprefix("int_")
        backends = getattr(oracle, f"map_{name}_backend")(backend)
        for each in backends if isinstance(backends, list) else [backends]:
            yield from oracle.backend_to_kernel_cls(each)

    assert any(kernel.is_monolithic() for kernel in kernels(mxfp4, "triton"))
    of = {mxfp4: "GptOssMxfp4MoEMethod", nvfp4: "ModelOptNvFp4FusedMoE"}
    for oracle in (fp8, int8, int_wna16, mxfp4, nvfp4, unquantized):
        for backend in modular_backends(type(of.get(oracle, "Fp8MoEMethod"), (), {})()):
            found = list(kernels(oracle, backend))
            assert found and not any(kernel.is_monolithic() for kernel in found), (oracle.__name__, backend)


def test_the_config_announces_a_layer_without_router(bind, loaded):
    shape = dataclasses.replace(loaded[1], num_hidden_layers=4, moe_layers=(0, 1, 2, 3))
    with pytest.raises(RouteError, match="MoE layer 3 has no router that could be found in OlmoeForCausalLM; serve the model"):
        bind(shape=shape, layers=range(4))
    # The next pipeline rank holds that layer.
    assert sorted(bind(shape=shape, layers=range(3))) == [0, 1, 2]


def test_the_model_has_a_layer_that_the_config_does_not_announce(bind, loaded):
    shape = dataclasses.replace(loaded[1], moe_layers=(0, 2))
    with pytest.raises(
        RouteError, match=r"MoE layer 1 \(.*\): the model's config does not announce it; .* by config are 0, 2; serve"
    ):
        bind(shape=shape)


def test_a_second_router_in_a_layer(bind, loaded):
    with pytest.raises(RouteError, match=r"MoE layer 2 \(1\): the layer has a second router; serve the model without"):
        bind(extra=copy.copy(runners(loaded[0])[2]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 2}, "the router picks 4 of 16 experts, the model's config says 2 of 16; serve the model"),
        ({"num_experts": 32}, "the router picks 4 of 16 experts, the model's config says 4 of 32; serve the model"),
    ],
    ids=["top_k", "num_experts"],
)
def test_the_router_has_another_size_than_the_config(bind, loaded, change, message):
    with pytest.raises(RouteError, match=message):
        bind(shape=dataclasses.replace(loaded[1], **change))


def test_a_function_that_weighs_its_own_selection_only(bind, loaded):
    from vllm.model_executor.models.phimoe import phimoe_routing_function

    router = cpu_router(custom_routing_function=phimoe_routing_function)
    with pytest.raises(RouteError, match=r"MoE layer 1 \(.*no native weights, which model_type 'olmoe' should have"):
        bind(router)
    assert bind(router, shape=dataclasses.replace(loaded[1], native_weights=False))[1].gating.spec is None


@pytest.mark.v1_only  # says nothing about the runner, and the engine start costs seconds
def test_the_engine_does_not_start(tiny_model, monkeypatch):
    import vllm.envs

    # Not through the environment: vLLM remembers its variables once an engine has run in this process.
    monkeypatch.setattr(vllm.envs, "VLLM_MOE_ROUTING_SIMULATION_STRATEGY", "uniform_random")
    with (
        pytest.raises(RouteError, match=r"MoE layer 0 \(.*router RoutingSimulatorRouter is not a router class known here"),
        engine(tiny_model("olmoe"), {"allow_overrides": True}),
    ):
        pass


def vllm_config(section=None, **values):
    """What is looked at of a `VllmConfig`, one section with other values; `VllmConfig` itself refuses some without GPUs."""
    from vllm.config import KVTransferConfig, ParallelConfig

    sections = dict(
        parallel_config=ParallelConfig(worker_cls="vllm.v1.worker.gpu_worker.Worker", tensor_parallel_size=2),
        scheduler_config=types.SimpleNamespace(scheduler_cls=None),
        model_config=types.SimpleNamespace(enable_sleep_mode=False),
        speculative_config=None,
        kv_transfer_config=None,
        lora_config=None,
        kernel_config=types.SimpleNamespace(),
        additional_config={},
    )
    if section == "kv_transfer_config":
        sections[section] = KVTransferConfig(kv_role="kv_both", **values)
    elif section == "additional_config":
        sections[section] = values
    elif section is not None:
        sections[section] = sections[section] or types.SimpleNamespace()
        for name, value in values.items():
            assert section != "parallel_config" or hasattr(sections[section], name)
            setattr(sections[section], name, value)
    return types.SimpleNamespace(**sections)


PARALLEL, SCHEDULER, DRAFTS, TRANSFER = "parallel_config", "scheduler_config", "speculative_config", "kv_transfer_config"
POLICY_ONLY = RouteConfig.from_dict({"policy": {"version": "route-policy/1", "layers": {}}})
PLANS = RouteConfig.from_dict({"allow_overrides": True})
# In the order of the table's columns; the first column that says no decides the others.
ASKED_OF_US = (
    POLICY_ONLY,
    PLANS,
    RouteConfig.from_dict({"allow_overrides": True, "router_logits_mib": 4}),
    RouteConfig(monitor={}),
)
# Row of the table in docs/integration.md -> a config that asks for it, its columns, what the refusal says.
ASKED = {
    "data parallel": (PARALLEL, {"data_parallel_size": 2}, "yyyy", None),
    "data parallel with other balancing": (
        PARALLEL,
        {"data_parallel_size": 2, "data_parallel_hybrid_lb": True},
        "nnnn",
        "data_parallel_hybrid_lb=True: ",
    ),
    "elastic expert parallel": (PARALLEL, {"enable_elastic_ep": True}, "nnnn", "enable_elastic_ep=True: "),
    "sequence-parallel experts": (
        PARALLEL,
        {"data_parallel_size": 2, "enable_expert_parallel": True},
        "nnnn",
        "use_sequence_parallel_moe=True: ",
    ),
    "pipeline parallel": (PARALLEL, {"pipeline_parallel_size": 2}, "yyyn", "pipeline_parallel_size=2: each rank has the routes"),
    "microbatching": (PARALLEL, {"ubatch_size": 2}, "nnnn", "use_ubatching=True: .* leave out --enable-dbo and --ubatch-size"),
    "prefill context parallel": (PARALLEL, {"prefill_context_parallel_size": 2}, "nnnn", "prefill_context_parallel_size=2: the"),
    "decode context parallel": (PARALLEL, {"decode_context_parallel_size": 2}, "ynny", "decode_context_parallel_size=2: it leaves"),
    "speculation": (DRAFTS, {"rejection_sample_method": "block"}, "yyny", "block: logits of rejected drafts would come back"),
    "speculation with relaxed acceptance": (DRAFTS, {"rejection_sample_method": "fly"}, "nnnn", "rejection_sample_method=fly: dra"),
    "KV offloading by block hash": (TRANSFER, {"kv_connector": "OffloadingConnector"}, "yyyy", None),
    "other KV connectors": (TRANSFER, {"kv_connector": "ExampleConnector"}, "nnnn", "ExampleConnector: .*leave out --kv-transfer"),
    "monokernel": ("kernel_config", {"monokernel": True}, "nnnn", "monokernel=True: its decode kernels pick experts inside them"),
    "decode kernels of Kimi-K3 and DeepSeek-V4.1": (
        "additional_config",
        {"decode_backend": "latency_specialized"},
        "nnnn",
        r"additional_config\['decode_backend'\]=latency_specialized: its decode kernels pick experts inside themselves",
    ),
    "another worker class": (
        PARALLEL,
        {"worker_cls": "vllm.v1.worker.xpu_worker.XPUWorker"},
        "nnnn",
        "XPUWorker: .* known are vllm",
    ),
    "another scheduler class": (
        SCHEDULER,
        {"scheduler_cls": "mine.Scheduler"},
        "nnnn",
        "Scheduler: .* known are vllm.v1.core.sched",
    ),
    "LoRA": ("lora_config", {}, "yyyy", None),
    "sleep and wake": ("model_config", {"enable_sleep_mode": True}, "yyyy", None),
    "expert-parallel load balancing": (PARALLEL, {"enable_eplb": True}, "yyyy", None),
    "native routed experts": ("aux_output_config", {"enable_return_routed_experts": True}, "yyyy", None),
}


@pytest.mark.parametrize("name", ASKED)
def test_features_under_which_a_policy_or_plans_cannot_be_kept(name):
    section, values, columns, message = ASKED[name]
    if section == "aux_output_config":
        asked = vllm_config()
        asked.aux_output_config = types.SimpleNamespace(**values)
    else:
        asked = vllm_config(section, **values)
    for config, is_kept in zip(ASKED_OF_US, columns, strict=True):
        if is_kept == "y":
            check_supported(asked, config)
        else:
            with pytest.raises(RouteError, match=f"(route control|route plans|router logits|--route-monitor) .*{message}"):
                check_supported(asked, config)


def test_every_feature_has_its_case_and_nothing_else_is_asked_for():
    from vllm_unsafe_routes.engine.supported import FEATURES

    assert sorted(feature.name for feature in FEATURES) == sorted([*ASKED, "front end in Rust"])
    check_supported(vllm_config(PARALLEL, pipeline_parallel_size=2, ubatch_size=1), PLANS)
    check_supported(vllm_config("additional_config", decode_backend="auto"), PLANS)


@pytest.mark.parametrize("routes", [{"allow_overrides": True}, {}, None], ids=["asked for", "nothing in it", "not asked for"])
def test_the_check_runs_when_a_config_is_made(routes, tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(tiny_model("olmoe")),
        skip_tokenizer_init=True,
        kv_transfer_config={"kv_connector": "ExampleConnector", "kv_role": "kv_both"},
        additional_config={} if routes is None else {CONFIG_KEY: routes},
    )
    if routes:
        with pytest.raises(RouteError, match="kv_connector=ExampleConnector: it keys KV by tokens"):
            arguments.create_engine_config()
    else:
        assert arguments.create_engine_config().kv_transfer_config is not None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([], r"additional_config\['unsafe_routes'\] must be an object, got \[\]"),
        ("on", "must be an object, got 'on'"),
        ({"overrides": True}, "has unknown keys overrides; known are allow_overrides, gating, "),
        ({"allow_overrides": "yes"}, "allow_overrides must be true or false, got 'yes'"),
        ({"allow_overrides": 1}, "allow_overrides must be true or false, got 1"),
        ({"route_table_rows": 0}, "route_table_rows must be a positive integer, got 0"),
        ({"route_table_cells": 2.5}, "route_table_cells must be a positive integer, got 2.5"),
        ({"route_table_slots": True}, "route_table_slots must be a positive integer, got True"),
        ({"route_table_slots": None}, "route_table_slots must be a positive integer, got None"),
        ({"gating": "quick"}, "gating 'quick' is not one of native, fused"),
        ({"policy": 5}, "policy must be a path or a route-policy/1 object, got 5"),
        ({"policy": False}, "policy must be a path or a route-policy/1 object, got False"),
        ({"policy": "nowhere.json"}, "policy file nowhere.json cannot be read"),
        ({"policy": {}}, "policy version None is not 'route-policy/1'"),
    ],
    ids=lambda value: "" if isinstance(value, str) and " " in value else str(value),
)
def test_settings_of_a_wrong_kind(section, message):
    with pytest.raises(RouteError, match=message):
        RouteConfig.from_dict(section)


def test_a_policy_that_fills_the_table(loaded):
    policy = {"version": "route-policy/1", "layers": {str(layer): {"disabled": [1]} for layer in range(3)}}
    config = RouteConfig.from_dict({"policy": policy, "route_table_rows": 3})
    with pytest.raises(RouteError, match="route_table_rows 3 is too small: the policy alone needs 3"):
        config.compiler(loaded[1])


def flags(policy=None, overrides=False):
    return argparse.Namespace(route_policy=policy, enable_route_overrides=overrides)


def test_flags_and_the_additional_config_are_merged():
    given = {"other": 1, CONFIG_KEY: {"route_table_rows": 7}}
    assert merge_cli_arguments(given, flags()) is given
    merged = merge_cli_arguments(given, flags("a.json", True))
    assert merged == {"other": 1, CONFIG_KEY: {"route_table_rows": 7, "policy": "a.json", "allow_overrides": True}}
    assert given[CONFIG_KEY] == {"route_table_rows": 7}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"policy": "b.json"}, "--route-policy and additional_config.* both name a policy; keep one"),
        ({"policy": {"version": "route-policy/1", "layers": {}}}, "both name a policy"),
        ("on", "must be an object, got 'on'"),
        ([1], r"must be an object, got \[1\]"),
    ],
    ids=["another path", "a policy itself", "a string", "a list"],
)
def test_flags_that_contradict_the_additional_config(section, message):
    with pytest.raises(RouteError, match=message):
        merge_cli_arguments({CONFIG_KEY: section}, flags("a.json"))


def test_flags_reach_servers_that_read_them_before_plugins_are_loaded(tiny_model, tmp_path):
    """`vllm serve --api-server-count 2` hands its arguments to new processes; there vLLM's own function reads them."""
    from vllm.engine.arg_utils import EngineArgs

    from vllm_unsafe_routes.engine import plugin

    plugin.register()
    path = tmp_path / "policy.json"
    path.write_text('{"version": "route-policy/1", "layers": {"1": {"disabled": [3]}}}')
    args = argparse.Namespace(model=str(tiny_model("olmoe")), additional_config={"other": 1}, middleware=["somebody.else"])
    args.route_policy, args.route_policy_mode, args.enable_route_overrides, args.route_jitter = str(path), "observe", True, "0.5"
    first = EngineArgs.from_cli_args(args).additional_config
    path.unlink()
    own = EngineArgs.from_cli_args.__func__.__wrapped__
    for again in (own(EngineArgs, args), EngineArgs.from_cli_args(args)):
        assert again.additional_config == first
    assert first["other"] == 1
    config = RouteConfig.from_dict(first[CONFIG_KEY])
    assert (config.allow_overrides, config.policy_mode, config.load_jitter().scale) == (True, "observe", 0.5)
    assert config.load_policy().layers[1].disabled == {3}
    assert args.middleware == ["somebody.else", "vllm_unsafe_routes.engine.answers.RouteAnswers"]


@pytest.mark.parametrize(
    "key",
    [
        *("unsafe-routes", "unsafe_route", "Unsafe_Routes", "unsafe routes", "unsaferoutes", "usafe_routes", "vllm_unsafe_routes"),
        *(
            "route_policy",
            "route-policy",
            "enable_route_overrides",
            "allow_overrides",
            "route_table_rows",
            "policy_mode",
            "route_plans",
        ),
    ],
)
def test_a_key_that_resembles_ours_is_refused(key, tiny_model):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(tiny_model("olmoe")), skip_tokenizer_init=True, additional_config={key: {"allow_overrides": True}}
    )
    with pytest.raises(
        RouteError, match=f"additional_config has {key!r}, which resembles .*; settings of routes stand under 'unsafe_routes'"
    ):
        arguments.create_engine_config()


@pytest.mark.parametrize("key", ["decode_backend", "router", "policy_server", "gdn_prefill_backend", "routes", "safe_mode"])
def test_other_people_s_keys_are_left_alone(key):
    refuse_misspelled({key: 1, CONFIG_KEY: {}})


def test_a_front_end_without_the_plugin_is_refused(monkeypatch):
    # Not through the environment: vLLM remembers its variables once an engine has run in this process.
    monkeypatch.setattr("vllm.envs.VLLM_USE_RUST_FRONTEND", True, raising=False)
    with pytest.raises(RouteError, match="route control does not support VLLM_USE_RUST_FRONTEND"):
        check_supported(vllm_config(), POLICY_ONLY)
