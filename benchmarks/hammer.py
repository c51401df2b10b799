"""Sends pictures to a server, over as many connections as asked for, each with the next when it has its answer.

    python -m benchmarks.hammer URL FOLDER CONTENT_TYPE CONNECTIONS SECONDS

A process of its own, so that it neither waits for the benchmark nor is measured with it. FOLDER holds the bodies; which
comes next is the same for everybody. Prints one line of JSON: requests, seconds, latencies in ms, answers by status.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.load import Client, post, saturate


def main() -> int:
    url, folder, content_type, connections, seconds = sys.argv[1:]
    bodies = [path.read_bytes() for path in sorted(Path(folder).iterdir())]
    requests = [post(url, body, {"Content-Type": content_type}) for body in bodies]
    random.Random(0).shuffle(requests)
    following = itertools.cycle(requests)
    client = Client(urlsplit(url).port or 80)
    time_began, processor_began = time.perf_counter(), time.process_time()
    samples = asyncio.run(saturate(client, lambda: next(following), int(connections), float(seconds)))
    took = time.perf_counter() - time_began
    statuses = Counter(str(sample.status) for sample in samples)
    wrong = next((sample.body.decode(errors="replace")[:500] for sample in samples if sample.status != 200), "")
    print(
        json.dumps(
            {
                "requests": len(samples),
                "seconds": took,
                "processor": time.process_time() - processor_began,
                "latencies": [round(1e3 * sample.seconds, 3) for sample in samples if sample.status == 200],
                "statuses": statuses,
                "wrong": wrong,
            }
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
