"""Many requests at once: is each of them answered or refused, and does memory stay where it was?

python -m benchmarks.serve_load [MODEL] [--requests 400] starts a server of its own on this machine.
"""

import asyncio
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import click
import httpx

from malpyeong.contest.records import load_records
from malpyeong.samples import DATA, TINY_BASE
from malpyeong.terminal import Command


def peak_mib(pid: int) -> float:
    """Return the largest resident size that a process has had, in MiB (Linux)."""
    (size,) = re.findall(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(size) / 1024


async def storm(url: str, count: int, seconds: float) -> tuple[Counter[str], list[float]]:
    """Send requests of every kind at once.

    Returns:
        How many ended with each status, and the seconds that the answered ones took.
    """
    questions = [record.question for record in load_records(DATA / "test_questions.json")]
    statuses: Counter[str] = Counter()
    times: list[float] = []

    async def one(number: int, client: httpx.AsyncClient) -> None:
        body = {
            "model": "tiny-grammar" if number % 3 == 0 else "tiny",
            "messages": [{"role": "user", "content": questions[number % len(questions)]}],
            "max_tokens": 64,
            "stream": number % 5 == 0,
            **({"seed": number, "temperature": 1.0} if number % 7 == 0 else {}),
        }
        start = time.perf_counter()
        try:
            response = await client.post(f"{url}/v1/chat/completions", json=body)
        except httpx.HTTPError as error:
            statuses[type(error).__name__] += 1
            return
        if response.status_code == 200:
            times.append(time.perf_counter() - start)
            broken = body["stream"] and '"error"' in response.text
            statuses["timed out while streaming" if broken else "200"] += 1
        else:
            statuses[str(response.status_code)] += 1

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(limits=limits, timeout=seconds) as client:
        await asyncio.gather(*(one(number, client) for number in range(count)))
    return statuses, times


def measure(model: str, requests: int, rounds: int, *options: str) -> tuple[list[Counter[str]], list[float]]:
    """Start a server and send it requests, all at once, in several rounds.

    Returns:
        The statuses of each round, and the server's peak memory in MiB before the first round and after each.
    """
    command = [sys.executable, "-m", "malpyeong.serve", model, "--name", "tiny", "--port", "0", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout
            (url,) = re.findall(r"http://\S+", server.stdout.readline())
            peaks, found = [peak_mib(server.pid)], []
            for number in range(rounds):
                start = time.perf_counter()
                statuses, times = asyncio.run(storm(url, requests, 600))
                found.append(statuses)
                peaks.append(peak_mib(server.pid))
                took = time.perf_counter() - start
                median = f", answered in {statistics.median(times):.1f} s (median)" if times else ""
                click.echo(f"round {number + 1}: {dict(statuses)} in {took:.1f} s{median}; peak {peaks[-1]:.0f} MiB")
            assert httpx.get(f"{url}/health").status_code == 200
        finally:
            server.terminate()
        click.echo(f"peak before: {peaks[0]:.0f} MiB; ended with {server.wait(60)}")
    return found, peaks


@click.command(cls=Command)
@click.argument("model", default=str(TINY_BASE))
@click.option("--requests", default=400, show_default=True)
@click.option("--rounds", default=2, show_default=True)
@click.option("--queue", default=64, show_default=True)
@click.option("--timeout", default=60, show_default=True)
def main(model: str, requests: int, rounds: int, queue: int, timeout: int) -> None:
    """Print what became of the requests."""
    measure(model, requests, rounds, "--queue", str(queue), "--timeout", str(timeout))


if __name__ == "__main__":
    main()
