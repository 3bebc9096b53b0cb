"""Run folders: what opening finds, what it refuses, and what real kills, locks and full disks leave behind."""

from __future__ import annotations

import io
import json
import logging
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from vllm_unsafe_routes import RouteError
from vllm_unsafe_routes.study.campaign import Campaign, CampaignError, read_records, read_settings, results_digest
from vllm_unsafe_routes.study.progress import CleanStop, progress_bar

WRITERS = Path(__file__).parent / "writers.py"
SETTINGS = {"seed": 7}


def start(mode: str, folder: Path, *numbers: int, prefix: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*prefix, sys.executable, str(WRITERS), mode, str(folder), *map(str, numbers)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def filled(folder: Path, count: int = 3) -> bytes:
    with Campaign(folder, SETTINGS) as campaign:
        for number in range(count):
            campaign.append(("prompt", number), {"score": number})
    return (folder / "records.jsonl").read_bytes()


# What is in a folder.


def test_a_folder_holds_settings_records_and_summary(tmp_path):
    with Campaign(tmp_path / "a" / "run", {"model": "toy", "layers": (1, 2)}) as campaign:
        campaign.append("first", {"score": np.float32(0.5), "ids": np.arange(3)})
        campaign.append(("second", 1, None), {"score": None})
        assert not campaign.finished
        campaign.finish({"mean": 0.5})
        assert campaign.finished
    folder = tmp_path / "a" / "run"
    assert read_settings(folder) == {"model": "toy", "layers": [1, 2]}
    assert list(read_records(folder)) == [
        {"key": "first", "score": 0.5, "ids": [0, 1, 2]},
        {"key": ("second", 1, None), "score": None},
    ]
    assert json.loads((folder / "summary.json").read_text()) == {"mean": 0.5}
    assert {path.name for path in folder.iterdir()} == {"settings.json", "records.jsonl", "summary.json", "lock"}


def test_a_resumed_campaign_knows_what_is_done(tmp_path):
    filled(tmp_path)
    with Campaign(tmp_path, SETTINGS) as campaign:
        assert len(campaign) == 3
        assert campaign.done(("prompt", 2))
        assert ["prompt", 2] in campaign
        assert not campaign.done(("prompt", 3))
        assert not campaign.done("prompt")


def test_a_key_is_written_once(tmp_path):
    before = filled(tmp_path)
    with Campaign(tmp_path, SETTINGS) as campaign, pytest.raises(CampaignError, match=r'already a record with key \["prompt",1\]'):
        campaign.append(("prompt", 1), {"score": 9})
    assert (tmp_path / "records.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "record", "message"),
    [
        pytest.param("a", {"loss": {"value": [1.0, float("nan")]}}, r"loss\.value\.1 is not finite", id="nan"),
        pytest.param("a", {"loss": np.float32("-inf")}, "loss is not finite", id="minus-infinity"),
        pytest.param("a", {"what": object()}, "object is not JSON", id="object"),
        pytest.param("a", {"key": 1}, "'key' is taken", id="field-key"),
        pytest.param((), {}, "key is empty", id="empty-key"),
        pytest.param(None, {}, "key must be", id="no-key"),
        pytest.param(("a", b"b"), {}, "b'b' is not a string", id="bytes-in-key"),
    ],
)
def test_what_is_not_a_record_is_refused_and_leaves_no_trace(tmp_path, key, record, message):
    with Campaign(tmp_path, SETTINGS) as campaign:
        with pytest.raises(CampaignError, match=message):
            campaign.append(key, record)
        campaign.append("a", {})
    assert [record["key"] for record in read_records(tmp_path)] == ["a"]


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"seed": 8}, "seed: was 7, now 8", id="changed"),
        pytest.param({"seed": "7"}, 'seed: was 7, now "7"', id="other-type"),
        pytest.param({"seed": 7, "search": {"draws": 10}}, r"search\.draws: was \(absent\), now 10", id="added"),
        pytest.param({}, r"seed: was 7, now \(absent\)", id="removed"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, settings, message):
    filled(tmp_path)
    with pytest.raises(CampaignError, match=message):
        Campaign(tmp_path, settings)
    Campaign(tmp_path, SETTINGS).close()


def test_a_folder_may_be_older_than_a_setting(tmp_path):
    """What it does not name it was made with; another value is another campaign."""
    filled(tmp_path)
    later = {"masks.weights": "masked"}
    Campaign(tmp_path, {**SETTINGS, "masks": {"weights": "masked"}}, later=later).close()
    with pytest.raises(CampaignError, match=r'masks\.weights: was "masked", now "native"'):
        Campaign(tmp_path, {**SETTINGS, "masks": {"weights": "native"}}, later=later)


def test_resuming_can_be_refused(tmp_path):
    Campaign(tmp_path, SETTINGS, resume=False).close()
    with pytest.raises(CampaignError, match="already holds a campaign"):
        Campaign(tmp_path, SETTINGS, resume=False)


@pytest.mark.parametrize("name", ["records.jsonl", "summary.json"])
def test_results_without_settings_are_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(CampaignError, match=rf"has {name} but no settings\.json"):
        Campaign(tmp_path, SETTINGS)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"seed": ', "cannot be read"), ("[" * 100_000, "cannot be read"), ("[7]", "is not a JSON object")],
    ids=["cut off", "too deep", "a list"],
)
def test_damaged_settings_are_refused(tmp_path, content, message):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(CampaignError, match=rf"settings\.json {message}"):
        Campaign(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CampaignError, match="file/run cannot be made"):
        Campaign(tmp_path / "file" / "run", SETTINGS)


# Damage.


@pytest.mark.parametrize("kept", [1, 10, 27, -1])
def test_a_torn_last_line_is_cut_off(tmp_path, caplog, kept):
    content = filled(tmp_path)
    last = content.splitlines(keepends=True)[-1]
    (tmp_path / "records.jsonl").write_bytes(content[: -len(last)] + last[:kept])
    assert len(list(read_records(tmp_path))) == 2
    with caplog.at_level(logging.WARNING), Campaign(tmp_path, SETTINGS) as campaign:
        assert campaign.truncated_bytes == len(last[:kept])
        assert "cut off a torn last line" in caplog.text
        assert not campaign.done(("prompt", 2))
        campaign.append(("prompt", 2), {"score": 2})
    assert (tmp_path / "records.jsonl").read_bytes() == content


def test_every_cut_of_the_file_resumes_to_the_same_content(tmp_path):
    content = filled(tmp_path)
    for size in range(len(content)):
        (tmp_path / "records.jsonl").write_bytes(content[:size])
        filled_again = Campaign(tmp_path, SETTINGS)
        with filled_again as campaign:
            for number in range(3):
                if not campaign.done(("prompt", number)):
                    campaign.append(("prompt", number), {"score": number})
        assert (tmp_path / "records.jsonl").read_bytes() == content, size


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(b'{"key":["prompt",1],"sco\n', id="cut"),
        pytest.param(b"\n", id="empty"),
        pytest.param(b"\0" * 20 + b"\n", id="zeros"),
        pytest.param(b'{"score":1}\n', id="no-key"),
        pytest.param(b"[1]\n", id="list"),
        pytest.param(b'{"key":"\xff"}\n', id="not-utf8"),
    ],
)
def test_a_damaged_line_in_the_middle_is_an_error_and_changes_nothing(tmp_path, damage):
    lines = filled(tmp_path).splitlines(keepends=True)
    damaged = lines[0] + damage + lines[2]
    (tmp_path / "records.jsonl").write_bytes(damaged)
    with pytest.raises(CampaignError, match=r"records\.jsonl, line 2: not a record"):
        Campaign(tmp_path, SETTINGS)
    assert (tmp_path / "records.jsonl").read_bytes() == damaged


def test_a_key_that_is_twice_in_the_file_is_an_error(tmp_path):
    content = filled(tmp_path)
    (tmp_path / "records.jsonl").write_bytes(content + content.splitlines(keepends=True)[0])
    with pytest.raises(CampaignError, match=r"line 4: key \[\"prompt\",0\] is already on line 1"):
        Campaign(tmp_path, SETTINGS)


def test_records_removed_under_the_writer_are_noticed(tmp_path):
    with Campaign(tmp_path, SETTINGS) as campaign:
        campaign.append(0, {})
        (tmp_path / "records.jsonl").unlink()
        with pytest.raises(CampaignError, match="was removed"):
            campaign.append(1, {})


def test_an_interrupt_inside_a_write_leaves_no_half_line(tmp_path, monkeypatch):
    with Campaign(tmp_path, SETTINGS) as campaign:
        campaign.append(0, {})
        real_write = os.write

        def interrupted(descriptor, data):
            real_write(descriptor, bytes(data)[:5])
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            campaign.append(1, {})
        monkeypatch.setattr(os, "write", real_write)
        assert not campaign.done(1)
        campaign.append(1, {})
    assert [record["key"] for record in read_records(tmp_path)] == [0, 1]


def test_after_a_failed_sync_the_campaign_must_be_opened_again(tmp_path, monkeypatch):
    campaign = Campaign(tmp_path, SETTINGS, sync_seconds=3600)
    campaign.append(0, {})

    def failing(descriptor):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(CampaignError, match="not synced"):
            campaign.flush()
    with pytest.raises(CampaignError, match="open the campaign again"):
        campaign.append(1, {})
    campaign.close()
    with Campaign(tmp_path, SETTINGS) as campaign:
        campaign.append(1, {})


def test_syncs_are_batched_by_time(tmp_path, monkeypatch):
    syncs = []
    real_sync = os.fsync
    with Campaign(tmp_path, SETTINGS, sync_seconds=3600) as campaign:
        monkeypatch.setattr(os, "fsync", lambda descriptor: syncs.append(real_sync(descriptor)))
        for number in range(50):
            campaign.append(number, {})
        assert not syncs
        campaign.flush()
        campaign.flush()
        assert len(syncs) == 1
    with Campaign(tmp_path, SETTINGS, sync_seconds=0) as campaign:
        syncs.clear()
        for number in range(50, 60):
            campaign.append(number, {})
        assert len(syncs) == 10


def test_threads_write_whole_lines(tmp_path):
    with Campaign(tmp_path, SETTINGS) as campaign:
        threads = [
            threading.Thread(target=lambda at=at: [campaign.append((at, number), {"text": "plim" * 999}) for number in range(40)])
            for at in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(campaign) == 320
        assert len(list(campaign.records())) == 320


# The digest.


@given(st.permutations(range(6)), st.floats(0, 1e6))
@hypothesis_settings(max_examples=25, deadline=None)
def test_the_digest_ignores_order_and_volatile_fields(tmp_path_factory, order, seconds):
    digests = []
    for numbers, taken in ((range(6), 1.0), (order, seconds)):
        folder = tmp_path_factory.mktemp("run")
        with Campaign(folder, SETTINGS, volatile=("seconds", "host"), sync_seconds=9) as campaign:
            for number in numbers:
                campaign.append(number, {"score": number / 3, "seconds": taken, "steps": [{"host": taken, "gain": 1}]})
            digests.append(campaign.results_digest())
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([("a", {"score": 1}), ("b", {"score": 3})], id="value"),
        pytest.param([("a", {"score": 1})], id="missing-record"),
        pytest.param([("a", {"score": 1}), ("c", {"score": 2})], id="key"),
        pytest.param([("a", {"score": 1}), ("b", {"score": 2, "more": None})], id="field"),
    ],
)
def test_the_digest_sees_every_difference(tmp_path, records):
    for folder, content in (("one", [("a", {"score": 1}), ("b", {"score": 2})]), ("two", records)):
        with Campaign(tmp_path / folder, SETTINGS) as campaign:
            for key, record in content:
                campaign.append(key, record)
    assert results_digest(tmp_path / "one") != results_digest(tmp_path / "two")


# Real processes.


def test_a_second_writer_is_told_who_holds_the_folder(tmp_path):
    holder = start("hold", tmp_path)
    try:
        assert holder.stdout.readline() == "open\n"
        second = start("hold", tmp_path)
        _, errors = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"{tmp_path} is being written by process {holder.pid} on " in errors
        assert read_settings(tmp_path) == SETTINGS
        assert list(read_records(tmp_path)) == []
    finally:
        holder.kill()
        holder.communicate()
    # SIGKILL took the lock along.
    Campaign(tmp_path, SETTINGS).close()


def test_a_forked_child_neither_writes_nor_keeps_the_lock(tmp_path):
    holder = start("hold_with_child", tmp_path)
    line = holder.stdout.readline()
    child = int(line.split()[1].rstrip(":"))
    try:
        assert "is closed in this process" in line
        holder.kill()
        holder.wait()
        os.kill(child, 0)
        Campaign(tmp_path, SETTINGS).close()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.communicate()


def test_a_writer_killed_over_and_over_ends_with_the_same_results(tmp_path):
    whole = start("run", tmp_path / "whole")
    _, errors = whole.communicate(timeout=120)
    assert whole.returncode == 0, errors
    draw = random.Random(3)
    kills = torn = 0
    while True:
        writer = start("run", tmp_path / "killed")
        assert writer.stdout.readline() == "open\n"
        try:
            writer.wait(draw.uniform(0.005, 0.08) if kills < 60 else 120)
        except subprocess.TimeoutExpired:
            writer.kill()
            writer.communicate()
            kills += 1
            content = (tmp_path / "killed" / "records.jsonl").read_bytes()
            torn += not content.endswith(b"\n") and bool(content)
            continue
        _, errors = writer.communicate()
        assert writer.returncode == 0, errors
        break
    assert kills >= 3
    assert results_digest(tmp_path / "killed") == results_digest(tmp_path / "whole")
    for folder in ("killed", "whole"):
        keys = [record["key"] for record in read_records(tmp_path / folder)]
        assert keys == [("prompt", number) for number in range(120)]
        assert json.loads((tmp_path / folder / "summary.json").read_text()) == {"records": 120}
    print(f"{kills} kills, {torn} torn lines")


def _private_mount(folder: Path) -> tuple[str, ...]:
    """A command prefix under which `folder` is a filesystem of 250 KB; empty where that is not granted."""
    mount = f'mount -t tmpfs -o size=250k none "{folder}" && exec "$@"'
    for user in ((), ("--user", "--map-root-user")):
        prefix = ("unshare", *user, "--mount", "sh", "-c", mount, "sh")
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode == 0:
            return prefix
    return ()


@pytest.mark.parametrize("limit", ["filesystem", "file-size"])
def test_a_full_disk_loses_nothing_and_says_so(tmp_path, limit):
    prefix: tuple[str, ...] = ()
    if limit == "filesystem":
        prefix = _private_mount(tmp_path)
        if not prefix:
            pytest.skip("no right to mount a small filesystem; the case file-size covers the path")
    writer = start("fill", tmp_path / "run", 0 if prefix else 101_001, prefix=prefix)
    output, errors = writer.communicate(timeout=60)
    assert writer.returncode == 0, errors
    message, digest = output.splitlines()
    reason = "the disk is full" if prefix else "limit on file size"
    assert reason in message
    assert "records.jsonl: record " in message
    assert "before it are whole" in message
    with Campaign(tmp_path / "undisturbed", SETTINGS) as campaign:
        for number in range(100):
            campaign.append(number, {"score": number, "text": "plim " * 400})
        assert campaign.results_digest() == digest


def test_a_full_disk_leaves_the_old_summary(tmp_path, monkeypatch):
    with Campaign(tmp_path, SETTINGS) as campaign:
        campaign.finish({"round": 1})

        def full(self, target):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full)
        with pytest.raises(CampaignError, match=r"summary\.json: not written: the disk is full"):
            campaign.finish({"round": 2})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"round": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"settings.json", "records.jsonl", "summary.json", "lock"}


# Stopping.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_the_first_signal_stops_between_records(tmp_path, number):
    writer = start("count_slowly", tmp_path)
    assert writer.stdout.readline() == "open\n"
    writer.send_signal(number)
    output, errors = writer.communicate(timeout=60)
    assert (writer.returncode, output) == (0, "stopped between records\n")
    assert "once more to abort" in errors


def test_the_second_signal_aborts(tmp_path):
    writer = start("ignore_stop", tmp_path)
    assert writer.stdout.readline() == "open\n"
    writer.send_signal(signal.SIGINT)
    assert writer.stderr.readline() == "\n"
    assert "once more" in writer.stderr.readline()
    writer.send_signal(signal.SIGINT)
    _, errors = writer.communicate(timeout=60)
    assert writer.returncode != 0
    assert "KeyboardInterrupt" in errors
    assert len(list(read_records(tmp_path))) == 1


def test_handlers_are_put_back_and_other_threads_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    with CleanStop() as stop:
        assert signal.getsignal(signal.SIGINT) != before
        assert not stop
    assert signal.getsignal(signal.SIGINT) is before
    seen = []

    def elsewhere():
        with CleanStop() as stop:
            seen.append(bool(stop))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]


# Progress.


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_off_a_terminal_is_a_line_now_and_then():
    stream = io.StringIO()
    with progress_bar(100, "prompts", initial=40, label="rosais", every_seconds=0.2, stream=stream) as progress:
        start = time.monotonic()
        while progress.n < 90:
            time.sleep(0.01)
            progress.update(1)
    lines = [line for line in stream.getvalue().splitlines() if line]
    assert 2 <= len(lines) <= 2 + (time.monotonic() - start) / 0.2
    assert re.fullmatch(r"rosais: \d\d/100 prompts \(\d\d%\), [\d.]+ prompts/s, 00:0\d left", lines[0])
    assert lines[-1].startswith("rosais: 90/100 prompts (90%), ")
    # What an earlier run did is no throughput: about 100 a second are left.
    assert 20 < float(re.search(r"([\d.]+) prompts/s", lines[-1])[1]) < 110


def test_short_work_off_a_terminal_prints_nothing():
    stream = io.StringIO()
    with progress_bar(3, "prompts", stream=stream) as progress:
        progress.update(3)
    assert stream.getvalue() == ""


def test_progress_on_a_terminal_is_a_bar():
    stream = Terminal()
    with progress_bar(4, "prompts", label="rosais", stream=stream) as progress:
        progress.update(4)
    assert "rosais: 100%" in stream.getvalue()
    assert "4/4" in stream.getvalue()


def test_errors_are_route_errors():
    assert issubclass(CampaignError, RouteError)


def test_importing_needs_neither_torch_nor_vllm():
    code = "import sys, vllm_unsafe_routes.study.campaign; print({'torch', 'vllm', 'tqdm'} & set(sys.modules))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output == "set()\n"
