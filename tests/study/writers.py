"""Real writer processes for the campaign tests, run by path: `python writers.py MODE FOLDER [NUMBER]`."""

from __future__ import annotations

import os
import resource
import sys
import time
from pathlib import Path

from vllm_unsafe_routes.study.campaign import Campaign, CampaignError
from vllm_unsafe_routes.study.progress import CleanStop

SETTINGS = {"seed": 7}
NUM_RECORDS = 120


def record(number: int) -> dict[str, object]:
    # Every tenth is large enough for a kill to land inside its write.
    return {"score": number / 7, "text": "plim " * (400_000 if number % 10 == 0 else 20), "seconds": time.time()}


def run(folder: Path) -> None:
    """Do all that is left, at a pace that leaves time to be killed."""
    with Campaign(folder, SETTINGS, sync_seconds=0.05) as campaign:
        print("open", flush=True)
        for number in range(NUM_RECORDS):
            if not campaign.done(("prompt", number)):
                campaign.append(("prompt", number), record(number))
                time.sleep(0.002)
        campaign.finish({"records": len(campaign)})


def hold(folder: Path) -> None:
    """Keep the folder until killed."""
    with Campaign(folder, SETTINGS):
        print("open", flush=True)
        time.sleep(120)


def hold_with_child(folder: Path) -> None:
    """Keep the folder until killed, with a forked child that lives on and tries to write."""
    campaign = Campaign(folder, SETTINGS)
    child = os.fork()
    if child == 0:
        try:
            campaign.append("from the child", {})
            print("wrote", flush=True)
        except CampaignError as error:
            print(f"child {os.getpid()}: {error}", flush=True)
        time.sleep(120)
    time.sleep(120)


def fill(folder: Path, byte_limit: int) -> None:
    """Append until the disk or the file-size limit stops it, make room, append the rest."""
    ballast = folder.parent / "ballast"
    if byte_limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte_limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    else:
        ballast.write_bytes(b"x" * 100_000)
    with Campaign(folder, SETTINGS, sync_seconds=0) as campaign:
        errors = 0
        for number in range(100):
            row = {"score": number, "text": "plim " * 400}
            try:
                campaign.append(number, row)
            except CampaignError as error:
                errors += 1
                print(error, flush=True)
                content = (folder / "records.jsonl").read_bytes()
                assert content.endswith(b"\n")
                assert content.count(b"\n") == number == len(campaign)
                assert not campaign.done(number)
                if byte_limit:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                else:
                    ballast.unlink()
                campaign.append(number, row)
        assert errors == 1, errors
        campaign.finish({"records": len(campaign)})
        print(campaign.results_digest(), flush=True)


def count_slowly(folder: Path) -> None:
    """Until asked to stop; says how it ended."""
    with Campaign(folder, SETTINGS) as campaign, CleanStop() as stop:
        for number in range(100_000):
            if stop:
                print("stopped between records", flush=True)
                return
            campaign.append(number, {})
            if number == 0:
                print("open", flush=True)
            time.sleep(0.01)


def ignore_stop(folder: Path) -> None:
    """Does not look at the stop, as a long record would."""
    with Campaign(folder, SETTINGS) as campaign, CleanStop():
        campaign.append(0, {})
        print("open", flush=True)
        time.sleep(120)


if __name__ == "__main__":
    mode, where, *numbers = sys.argv[1:]
    globals()[mode](Path(where), *map(int, numbers))
