"""Search on an engine of this process's own: requests go straight into `LLMEngine`, results come from its steps."""

from __future__ import annotations

import platform
import re
import threading
import time
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.v1.engine.exceptions import EngineDeadError

from ..cells import Cells, CellScores
from ..errors import EngineEnded, RouteError
from ..receipt import receipt_of
from ..search.backend import About, Request, Response, own_versions
from .cell_blocks import CellsUnavailable, ask
from .config import model_shape, route_config
from .log import logger_of

logger = logger_of(__name__)

_ENDED = "the engine's process has ended (its own messages stand above); what was finished before is kept"

_WATCH_SECONDS = 0.5


def cpu_name() -> str:
    """The processor's name, where Linux says it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.*)", info.read_text(encoding="utf-8")) if info.exists() else None
    return found[1] if found else platform.machine()


def _watch(core: Any) -> None:
    """Wake the caller of a client whose engine process was killed: vLLM notices, but its synchronous client waits on."""
    if not hasattr(core, "outputs_queue"):  # the engine is in this process
        return
    client = weakref.ref(core)

    def watch() -> None:
        while (living := client()) is not None:
            if living.resources.engine_dead:
                living.outputs_queue.put_nowait(EngineDeadError())
                # Calls to the workers wait for an answer of their own.
                for answer in list(living.utility_results.values()):
                    answer.set_exception(EngineDeadError())
                return
            del living
            time.sleep(_WATCH_SECONDS)

    threading.Thread(target=watch, name="unsafe-routes-watch", daemon=True).start()


class EngineBackend:
    """A `vllm.LLM` (or `LLMEngine`) as a search backend; nobody else may use the engine meanwhile.

    Args:
        engine: made with `additional_config={"unsafe_routes": {"allow_overrides": True}}`.
        capacity: requests handed to the engine at a time; None: twice what it schedules at once.

    Attributes:
        has_cells: whether candidates are scored as cells; False: as requests.

    Raises:
        RouteError: overrides are not enabled, or the model has no MoE layer.

    """

    def __init__(self, engine: Any, capacity: int | None = None) -> None:
        self.engine = getattr(engine, "llm_engine", engine)
        vllm_config = self.engine.vllm_config
        config = route_config(vllm_config)
        if config is None or not config.allow_overrides:
            raise RouteError(
                "route overrides are not enabled in this engine; make it with "
                "additional_config={'unsafe_routes': {'allow_overrides': True}}"
            )
        self.shape = model_shape(vllm_config)
        self.policy = config.load_policy()
        self.max_model_len = int(vllm_config.model_config.max_model_len)
        self.capacity = capacity or 2 * int(vllm_config.scheduler_config.max_num_seqs)
        self.has_cells = True
        # Requests that an abandoned search left behind must not be taken for later ones.
        self._prefix = f"route-search-{id(self):x}-"
        self._lengths: dict[int, int] = {}
        _watch(self.engine.engine_core)

    def submit(self, number: int, request: Request) -> None:
        """Start a request. Raises `RouteError` if it is refused."""
        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.max_tokens,
            stop_token_ids=list(request.stop_token_ids) or None,
            detokenize=False,
            extra_args=request.extras.to_extra_args() or None,
        )
        try:
            self.engine.add_request(f"{self._prefix}{number}", TokensPrompt(prompt_token_ids=list(request.token_ids)), params)
        except EngineDeadError as error:
            raise EngineEnded(_ENDED) from error
        self._lengths[number] = len(request.token_ids)

    def score_cells(self, items: Sequence[Cells]) -> list[CellScores] | None:
        """Score candidates between two steps. None: this engine cannot. Raises `RouteError` if they are refused."""
        if not self.has_cells:
            return None
        try:
            return ask(self.engine.engine_core, items)
        except EngineDeadError as error:
            raise EngineEnded(_ENDED) from error
        except CellsUnavailable as error:
            logger.warning("Candidates are scored as requests: %s", error)
            self.has_cells = False
            return None
        except Exception as error:
            # So vLLM's client says that a call failed in the engine's process; one that is just ending cancels the calls in hand.
            if type(error) is not Exception:
                raise
            raise RouteError(f"cells could not be scored: {error}") from error

    def poll(self) -> list[tuple[int, Response | RouteError]]:
        """Step the engine until a request has finished. Raises `RouteError` if its process has ended."""
        while self._lengths:
            done: list[tuple[int, Response | RouteError]] = []
            try:
                outputs = self.engine.step()
            except EngineDeadError as error:
                self._lengths.clear()
                raise EngineEnded(_ENDED) from error
            for output in outputs:
                if output.finished and output.request_id.startswith(self._prefix):
                    number = int(output.request_id.removeprefix(self._prefix))
                    done.append((number, self._response(output, self._lengths.pop(number))))
            if done:
                return done
        return []

    def about(self) -> About:
        """The engine's device and the versions of what it is made of."""
        import torch
        import transformers
        import vllm
        from vllm.platforms import current_platform

        gpu = current_platform.is_cuda_alike()
        name = current_platform.get_device_name() if gpu else cpu_name()
        parallel = self.engine.vllm_config.parallel_config
        count = parallel.world_size if gpu else torch.get_num_threads()
        versions = {
            name: str(module.__version__) for name, module in (("vllm", vllm), ("torch", torch), ("transformers", transformers))
        }
        return About(f"{name}, {count} {'GPU' if gpu else 'thread'}{'' if count == 1 else 's'}", own_versions() | versions)

    def _response(self, output: Any, num_tokens: int) -> Response:
        token_ids = tuple(output.outputs[0].token_ids)
        cached = output.num_cached_tokens or 0
        if not output.kv_transfer_params:
            return Response(token_ids, num_tokens - cached)
        receipt = receipt_of(output)
        return Response(
            token_ids, num_tokens - cached, receipt.scores, receipt.route_ids, receipt.route_weights, receipt.routes_set
        )
