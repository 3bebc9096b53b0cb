"""A model provider for Inspect: a vLLM server with this plugin, asked under a plan or a policy, with the receipt in the log.

    inspect eval TASK --model vllm-unsafe-routes/NAME -M base_url=http://host:8000/v1 -M plan=plan.json -M policy=policy.json

NAME is the server's name of the model. The provider is Inspect's own for OpenAI-compatible servers, with what is added here:

- `plan`: a file of a route-plan/1, for every request (the server needs `--enable-route-overrides`). A sample may bring its own in
  `GenerateConfig(extra_body={"vllm_xargs": {"route_plan": ...}})`, which wins.
- `policy`: a policy file that the server must enforce. It is the server's; here it is checked: an answer whose
  receipt names another policy, or none, or that was only observed, ends the sample with an error.
- The receipt stands in each model output's `metadata["unsafe_routes"]`, so in the log of every sample. An answer to a plan that
  has no receipt is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inspect_ai.model import GenerateConfig, ModelOutput, modelapi
from inspect_ai.model._providers.openai_compatible import OpenAICompatibleAPI

from ..errors import RouteError
from ..plan import RoutePlan
from ..policy import RoutePolicy
from ..receipt import RECEIPT_KEY, Receipt, receipt_of
from ..wire import PLAN_KEY

NAME = "vllm-unsafe-routes"


class RoutedAPI(OpenAICompatibleAPI):
    """See the module.

    Args:
        model_name: the server's name of the model.
        base_url: of the server, up to and including /v1; or the environment variable VLLM_UNSAFE_ROUTES_BASE_URL.
        api_key: the server's; most have none.
        config: Inspect's.
        plan: path of a plan.
        policy: path of the policy that the server must enforce.
        more: Inspect's own arguments of OpenAI-compatible providers.

    Attributes:
        policy: the policy itself.

    Raises:
        RouteError: a bad plan or policy.

    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig | None = None,
        plan: str | None = None,
        policy: str | None = None,
        **more: Any,
    ) -> None:
        config = GenerateConfig() if config is None else config
        super().__init__(model_name, base_url, api_key or "none", config, service=NAME, stream=False, **more)
        self._plan = None if plan is None else RoutePlan.from_json(Path(plan).read_text(encoding="utf-8"))
        self.policy = None if policy is None else RoutePolicy.load(policy)

    def service_model_name(self) -> str:
        """As the server calls it; Inspect has taken the provider's name off."""
        return str(self.model_name)

    def completion_params(self, config: GenerateConfig, tools: bool) -> dict[str, Any]:
        """Inspect's parameters of a request, with the plan where it brings none of its own."""
        params: dict[str, Any] = super().completion_params(config, tools)
        if self._plan is not None:
            body = dict(params.get("extra_body") or {})
            body["vllm_xargs"] = {PLAN_KEY: self._plan.to_string(), **(body.get("vllm_xargs") or {})}
            params["extra_body"] = body
        return params

    async def generate(self, *args: Any, **kwargs: Any) -> Any:
        """An answer with its receipt.

        Raises:
            RouteError: the answer was not computed under what was asked for.

        """
        result = await super().generate(*args, **kwargs)
        output, call = result if isinstance(result, tuple) else (result, None)
        if isinstance(output, ModelOutput) and call is not None and call.error is None:
            request: Any = call.request
            response: Any = call.response or {}
            asked = (request.get("extra_body") or {}).get("vllm_xargs") or {}
            receipt = self._receipt(response, planned=PLAN_KEY in asked)
            if receipt is not None:
                output.metadata = {**(output.metadata or {}), RECEIPT_KEY: _small(receipt)}
        return result

    def _receipt(self, response: Mapping[str, Any], planned: bool) -> Receipt | None:
        if not response.get("kv_transfer_params"):
            if planned or self.policy is not None:
                raise RouteError(
                    "the server answered without a receipt, so under neither plan nor policy: does it have the plugin, and "
                    "--enable-route-overrides or --route-policy?"
                )
            return None
        receipt = receipt_of(response)
        if planned and receipt.plan is None:
            raise RouteError("the answer's receipt names no plan, though one was sent")
        asked = None if self.policy is None else self.policy.digest
        if asked is not None and (receipt.policy, receipt.policy_mode) != (asked, "enforce"):
            raise RouteError(
                f"the server has policy {receipt.policy} in mode {receipt.policy_mode}, policy {asked} was to be enforced"
            )
        return receipt


def _small(receipt: Receipt) -> dict[str, Any]:
    """The receipt as JSON, without routes and scores, which are large."""
    return {name: value for name, value in receipt.to_dict().items() if name not in ("routes", "scores")}


@modelapi(name=NAME)
def RoutedServer() -> type[RoutedAPI]:
    """The provider, for Inspect's registry."""
    return RoutedAPI
