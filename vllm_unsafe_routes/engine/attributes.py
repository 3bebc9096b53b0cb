"""Names under which route control hangs its objects on vLLM's."""

# `RouteController` on a model runner, `RouteAdmission` on a scheduler, `RouteMonitor` on an `AsyncLLM`.
CONTROLLER = "unsafe_routes_controller"
ADMISSION = "unsafe_routes_admission"
MONITOR = "unsafe_routes_monitor"
# On a front end's `RequestState` the parts of its receipt, on a `ParentRequest` the receipts of its samples.
PARTS = "unsafe_routes_receipt_parts"
SAMPLES = "unsafe_routes_receipts"
# On the `RequestOutputCollector` of a request that came over HTTP: its `HttpAnswer`, and which of the answer's requests it is.
ANSWER = "unsafe_routes_answer"
# `Reserve` on a scheduler, `CellScorer` on a model runner.
RESERVE = "unsafe_routes_reserve"
CELLS = "unsafe_routes_cells"
# On an engine core: since when expert usage is counted, and what had been counted before.
USAGE = "unsafe_routes_usage_since"
