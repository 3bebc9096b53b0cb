"""Names under which route control hangs its objects on vLLM's."""

# `RouteController` on a model runner, `RouteAdmission` on a scheduler, `RouteMonitor` on an `AsyncLLM`.
CONTROLLER = "unsafe_routes_controller"
ADMISSION = "unsafe_routes_admission"
MONITOR = "unsafe_routes_monitor"
