"""Servers of a teacher: any vLLM servers that score prompts, asked by the driver; and those that a run starts itself.

In: rows of token ids. Out: what a server names at each token. Rows are spread over all endpoints; what fails on one
goes to another, and the last one's end ends the run. A server that a run starts ends with it, however that ends::

    actor of the run ── starts ──► server and its processes, a group of their own
           └──── looked at by ─────── one of these, which ends them all when the actor or the server has ended
"""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import aiohttp

from verl.config import RolloutConfig
from verl.single_controller.base import WorkerError
from verl.single_controller.base.worker import find_free_port
from verl.workers.rollout.vllm_replica import cause_of_death, own_log, unblock_sigterm
from verl.workers.rollout.vllm_settings import command_line, engine_environment

logger = logging.getLogger(__name__)

MODELS, COMPLETIONS, TOKENIZE = "/v1/models", "/v1/completions", "/tokenize"
ROWS_AT_ONCE = 16
"""Rows scored at once on one endpoint; a server's answers are large, and it writes them one by one."""
PULSE_S = 8.0
"""Seconds between checks that an endpoint is still there, and the timeout of each check."""
TRIES, PAUSE_S = 4, 1.0
"""Attempts at a row on endpoints that still answer, and seconds between them."""
POLL_S, SHUTDOWN_S = 0.5, 5.0
"""Seconds between checks that a server has started, and seconds that it has to end by itself."""
WRONG_OPTIONS = 2
"""Exit code of a program that was called with wrong options."""
START = """
import os, select, signal, sys
ends = [os.pidfd_open(int(sys.argv[1])), os.pidfd_open(os.getpid())]
if os.fork() == 0:
    select.select(ends, [], [])  # readable once one of them has ended
    os.killpg(0, signal.SIGKILL)
os.execv(sys.executable, [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *sys.argv[2:]])
"""
"""Becomes the server, with a process beside it that ends its group with the process of the first argument."""

Entries = Sequence[Mapping[str, Mapping[str, Any]]]
"""Of each position what a server names: id as a text to ``logprob``."""
_Result = TypeVar("_Result")


class RefusedError(WorkerError):
    """A server does not serve a request, and would not another time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, by_user=True)


FAILURES = (aiohttp.ClientError, TimeoutError, OSError)
"""Errors that another attempt or another endpoint may not meet."""
FAULTS = (*FAILURES, RefusedError, LookupError, TypeError)
"""Errors that a check of an endpoint may meet, even where a server of another kind answers."""


@dataclass
class Endpoint:
    """One server."""

    url: str
    model: str = ""
    """Its name for the model."""
    rows: int = 0
    """Being scored there now."""
    fault: str | None = None
    """Why it is not asked any more; None: it is."""


class TeacherServers:
    """The endpoints of one teacher.

    Args:
        urls: of the servers.
        key: that they want; None: none.
        timeout_s: for an answer.
        fix: what to do about servers that fail, where the run starts them; None: the user does.
    """

    def __init__(self, urls: Sequence[str], key: str | None, timeout_s: float | None, fix: str | None = None) -> None:
        self.endpoints = [Endpoint(url.rstrip("/").removesuffix("/v1")) for url in urls]
        self._lock, self.fix = threading.Lock(), fix
        self._headers, self._timeout_s = {"Authorization": f"Bearer {key}"} if key else {}, timeout_s

    def run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """Run what asks them, from any thread, one after the other; its requests share connections."""
        with self._lock:
            return asyncio.run(self._in_session(work))

    async def _in_session(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        self._slots = asyncio.Semaphore(ROWS_AT_ONCE * len(self.endpoints))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=self._headers, connector=connector) as self._session:
            return await work

    async def reconnect(self, connect: Callable[[Endpoint], Coroutine[Any, Any, None]]) -> None:
        """Try endpoints that are not asked any more; perhaps they are back."""
        for endpoint in self.endpoints:
            if endpoint.fault is not None:
                with suppress(*FAULTS):
                    await connect(endpoint)

    async def score(self, tokens: list[int], topk: int) -> Entries:
        """What is named at each token of a row, by whichever endpoint; nothing at the first.

        Raises:
            WorkerError: no endpoint answers.
        """
        last: Exception | None = None
        for _ in range(TRIES + len(self.endpoints)):
            async with self._slots:
                there = [endpoint for endpoint in self.endpoints if endpoint.fault is None]
                if not there:
                    break
                endpoint = min(there, key=lambda each: each.rows)
                endpoint.rows += 1
                try:
                    return await self._while_there(endpoint, self.complete(endpoint, tokens, topk))
                except RefusedError as error:
                    raise RefusedError(f"{endpoint.url}: {error}") from None
                except FAILURES as error:
                    last = error
                    await self._note_failure(endpoint, error)
                finally:
                    endpoint.rows -= 1
        faults = "; ".join(f"{endpoint.url}: {endpoint.fault or describe(last)}" for endpoint in self.endpoints)
        fix = self.fix or "start them again, and then the run"
        raise WorkerError(f"no endpoint of a teacher scores any more ({faults}); {fix}")

    async def complete(self, endpoint: Endpoint, tokens: list[int], topk: int) -> Entries:
        """What an endpoint names at each token of a row; raises as `request`."""
        body = {"model": endpoint.model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": topk}
        answer = await self.request(endpoint, COMPLETIONS, body)
        entries = answer["choices"][0].get("prompt_logprobs")
        if entries is None or len(entries) != len(tokens):
            raise RefusedError(f"it gives no prompt_logprobs of {len(tokens)} tokens; is it a vLLM server?")
        return entries

    async def request(
        self, endpoint: Endpoint, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """An endpoint's answer.

        Raises:
            RefusedError: the endpoint refuses the request, and would again.
            OSError, TimeoutError, aiohttp.ClientError: no usable answer; another attempt may get one.
        """
        limits = aiohttp.ClientTimeout(total=timeout_s or self._timeout_s, sock_connect=PULSE_S)
        method, url = "GET" if body is None else "POST", endpoint.url + path
        async with self._session.request(method, url, json=body, timeout=limits) as response:
            content, status = await response.read(), response.status
        if status >= 400:
            message = f"{path} answers {status}: {content[:300].decode(errors='replace')}"
            # A timeout (408), too many requests (429) or an error of the server (5xx): worth another attempt.
            raise OSError(message) if status in (408, 429) or status >= 500 else RefusedError(message)
        try:  # megabytes, for which the other requests should not wait
            return await asyncio.to_thread(json.loads, content)
        except ValueError as error:
            raise OSError(f"{path} answers no JSON: {content[:100].decode(errors='replace')!r}") from error

    async def _while_there(self, endpoint: Endpoint, answer: Coroutine[Any, Any, _Result]) -> _Result:
        """The answer; an error once nothing listens at the endpoint, which an open connection may not show."""
        parts, task = urlsplit(endpoint.url), asyncio.ensure_future(answer)
        try:
            while not (await asyncio.wait({task}, timeout=PULSE_S))[0]:
                async with asyncio.timeout(PULSE_S):
                    port = parts.port or (443 if parts.scheme == "https" else 80)
                    _, writer = await asyncio.open_connection(parts.hostname, port)
                    writer.close()
            return task.result()
        finally:
            task.cancel()

    async def _note_failure(self, endpoint: Endpoint, error: Exception) -> None:
        """Stop asking the endpoint, unless it still answers."""
        try:
            await self.request(endpoint, MODELS, timeout_s=PULSE_S)
            logger.warning("%s failed to score a row, which is tried again: %s", endpoint.url, describe(error))
            await asyncio.sleep(PAUSE_S)
        except (*FAILURES, RefusedError):
            if endpoint.fault is None:
                logger.warning("%s does not answer, the others score its rows: %s", endpoint.url, describe(error))
            endpoint.fault = describe(error)


def describe(error: Exception | None) -> str:
    """An error in one line; some of them have no text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class VLLMServer:
    """A vLLM server on this machine; its log is this process's.

    Args:
        host: the address that it listens at.
        options: of its command line, but host and port.
        rollout: settings of engines, of which it takes the environment.
        device: ``cpu`` or ``cuda``.
        key: that it wants of who asks.
    """

    def __init__(self, host: str, options: Mapping[str, Any], rollout: RolloutConfig, device: str, key: str) -> None:
        self._host, self._options, self._rollout, self._device, self._key = host, options, rollout, device, key
        self._process: subprocess.Popen[bytes] | None = None

    async def launch(self) -> str:
        """Start it and wait until it answers; its URL.

        Raises:
            RuntimeError, ValueError: it ended before that; the latter where it does not take its options.
        """
        port, usual = find_free_port(), engine_environment(self._rollout, self._device)
        own = {"VLLM_API_KEY": self._key, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        if threads := usual.get("OMP_NUM_THREADS"):  # where Ray sets 1 of its own accord
            own["OMP_NUM_THREADS"] = threads
        environment = {**usual, **os.environ, **own}
        words = command_line({**self._options, "host": self._host, "port": port})
        with unblock_sigterm():
            process = self._process = subprocess.Popen(
                [sys.executable, "-c", START, str(os.getpid()), *words], stdout=2, env=environment, process_group=0
            )
        url = f"http://{self._host}:{port}"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=PULSE_S)) as session:
            while (code := process.poll()) is None:
                with suppress(*FAILURES):
                    async with session.get(f"{url}/health") as answer:
                        if answer.ok:
                            return url
                await asyncio.sleep(POLL_S)
        last = next((line for line in reversed(own_log()) if "rror" in line), f"exit code {code}")
        kind = ValueError if code == WRONG_OPTIONS else RuntimeError
        raise kind(f"vLLM's server of {self._options['model']} ended: {cause_of_death(()) or last}")

    async def shutdown(self) -> None:
        """End it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(self._process.wait, SHUTDOWN_S)
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
