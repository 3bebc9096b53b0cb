"""What a step reports is read when its output is ready, and is what the device held when it was asked for."""

import types

import numpy as np
import pytest
import torch

from vllm_unsafe_routes.engine.capture import RouteCapture
from vllm_unsafe_routes.engine.host_copies import HostCopy
from vllm_unsafe_routes.engine.progress import (
    COUNTS_ATTRIBUTE,
    PROGRESS_ATTRIBUTE,
    RouteCounts,
    RoutesSet,
    StepProgress,
    StepReport,
)
from vllm_unsafe_routes.engine.receipts import ReceiptBook
from vllm_unsafe_routes.engine.scheduler import RouteAdmission
from vllm_unsafe_routes.engine.step import Part, Resident, Step
from vllm_unsafe_routes.engine.sums import DeviceSums
from vllm_unsafe_routes.extras import RouteExtras


def test_an_asynchronous_output_gets_its_own_step_however_late_it_is_read():
    report = StepReport()
    outputs = []
    buffer = torch.zeros(3)
    for number in range(2):
        buffer.fill_(number)
        entry = StepProgress(RoutesSet(0, 1, number))
        report.progress = {"a": entry}
        report.copies.take(buffer, lambda values, entry=entry: setattr(entry, "scores", values))
        outputs.append(types.SimpleNamespace(get_output=types.SimpleNamespace))
        report.hang_on(outputs[-1], None)
        assert entry.scores is None  # nobody waited
    buffer.fill_(9)
    for number, output in reversed(list(enumerate(outputs))):
        (entry,) = getattr(output.get_output(), PROGRESS_ATTRIBUTE).values()
        assert (entry.routes.number, entry.scores.tolist()) == (number, [number] * 3)


def test_a_report_of_nothing_leaves_the_output_alone():
    output = types.SimpleNamespace()
    StepReport().hang_on(output, None)
    assert vars(output) == {}


def test_captured_routes_are_cut_to_each_request(monkeypatch):
    monkeypatch.setattr("vllm_unsafe_routes.engine.capture.get_pp_group", lambda: types.SimpleNamespace(world_size=1))
    capture = RouteCapture((2, 16, 4), torch.device("cpu"), False, [0, 1])
    assert capture.apply(0, 5, True) == (None, None)
    wants, other = (Resident(0, None, RouteExtras(wants_routes=wanted), 3, 0) for wanted in (True, False))
    # The host takes a draft of the step before for accepted, which the device knows was not: 4 instead of 5.
    positions = torch.tensor([7, 8, 4, 5, 6])
    step = Step([Part("a", other, 7, 2, 0), Part("b", wants, 5, 3, 2)], ["a", "b"], {"a": 2, "b": 3}, 5, None, positions)
    capture.stage(step)
    for slot in range(2):
        ids, weights = capture.apply(slot, 5, True)
        ids.copy_(torch.arange(20).reshape(5, 4) + 100 * slot)
        weights.fill_(slot)
    report = StepReport()
    report.progress = {"a": StepProgress(), "b": StepProgress()}
    capture.collect(step, report)
    report.copies.resolve()
    assert report.progress["a"].route_ids is None
    found = report.progress["b"]
    assert found.chunk_start == 4
    expected = np.arange(8, 20).reshape(3, 1, 4) + np.array([0, 100]).reshape(1, 2, 1)
    assert found.route_ids.tolist() == expected.tolist()
    assert found.route_weights[:, 1].tolist() == [[1.0] * 4] * 3


@pytest.fixture
def often(monkeypatch):
    """Sums are read in every step."""
    monkeypatch.setattr("vllm_unsafe_routes.engine.sums._SECONDS_BETWEEN_READS", 0)


def test_what_warm_up_counts_in_inference_mode_can_be_counted_on_outside_it(often):
    sums = DeviceSums(2, torch.device("cpu"))
    with torch.inference_mode():
        sums.displaced[0, 1] += 4
        sums.grew("enforce", 3)
        sums.due()
    for number in range(2, 4):
        sums.displaced[0, 1] += 4
        sums.grew("enforce", 3)
        assert sums.due().displaced["enforce"] == [0, 4 * number]
    assert sums.due() is None


def test_a_copy_that_is_under_way_is_not_waited_for(often, monkeypatch):
    """On a GPU; here the copy says so."""
    sums = DeviceSums(1, torch.device("cpu"))
    sums.displaced[0, 0] += 4
    sums.grew("enforce", 3)
    with monkeypatch.context() as patch:
        patch.setattr(HostCopy, "is_ready", False)
        assert sums.due() is None
        sums.displaced[0, 0] += 1
        sums.grew("enforce", 5)
    counts = sums.due()
    assert (counts.tokens["enforce"], counts.displaced["enforce"]) == (3, [4])


def test_counts_never_go_back():
    """An output that waits while the workers are asked says less than they did: `/metrics` would count backwards."""

    def counts(number, missed=(0, 0)):
        return RouteCounts({"enforce": number, "observe": 0}, {"enforce": [number, 0], "observe": [0, 0]}, list(missed), [0, 0])

    admission = RouteAdmission.__new__(RouteAdmission)
    admission.counts, admission.receipts = None, ReceiptBook(None)
    admission.absorb(types.SimpleNamespace())
    assert admission.counts is None
    admission.absorb(types.SimpleNamespace(**{COUNTS_ATTRIBUTE: counts(3)}))
    admission.absorb_counts(counts(7, (1, 0)), counts(7, (0, 2)))  # two pipeline ranks are asked
    admission.absorb(types.SimpleNamespace(**{COUNTS_ATTRIBUTE: counts(5)}))  # an output from before
    assert admission.counts == counts(7, (1, 2))
