"""A server of a tiny model as vLLM's is seen from outside: its models, its tokenizer, log-probs of prompts."""

import asyncio
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from transformers import AutoTokenizer

from support.tiny_workers import load_plain


def vllm_json(log_probs: torch.Tensor, tokens: list[int], topk: int) -> list[dict[str, Any] | None]:
    """``prompt_logprobs`` of vLLM: at each token but the first, its own log-prob, then the likeliest; -1: all."""
    entries: list[dict[str, Any] | None] = [None]
    for values, token in zip(log_probs, tokens[1:], strict=False):
        likeliest = values.argsort(descending=True)[: topk if topk >= 0 else None].tolist()
        named = dict.fromkeys([token, *likeliest])
        entries.append({str(id): {"logprob": values[id].item(), "rank": 1, "decoded_token": "x"} for id in named})
    return entries


class FakeServer:
    """Listens on the loopback, in a thread, until it is closed.

    Args:
        folder: model with its tokenizer.
        key: wanted as a bearer token; None: no key.
        before: called with the number of each scored row, from 1; what it returns, if anything, is the status.
        rows: of its head, which is cut there; None: all.
    """

    def __init__(
        self,
        folder: Path,
        key: str | None = None,
        before: Callable[[int], int | None] = lambda number: None,
        rows: int | None = None,
    ) -> None:
        self.rows: list[list[int]] = []
        """Token ids of every request for scores."""
        self.max_model_len, self.before, self._head_rows = 512, before, rows
        self.shift = 0.0  # is added to all log-probs
        self._model, self._tokenizer, self._key = load_plain(folder), AutoTokenizer.from_pretrained(folder), key
        self._loop, started = asyncio.new_event_loop(), threading.Event()
        threading.Thread(target=self._serve, args=(started,), daemon=True).start()
        assert started.wait(30)

    def close(self) -> None:
        """End at once: what is being answered is cut off."""
        if self._loop.is_running():
            self._loop.call_soon_threadsafe(self.abort)
            self._loop.call_soon_threadsafe(self._loop.stop)

    def abort(self) -> None:
        """Cut all connections off and listen no more; for the server's own thread."""
        self._server.close()
        for connection in list(self._runner.server.connections):
            connection.transport.abort()

    def _serve(self, started: threading.Event) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._listen())
        started.set()
        self._loop.run_forever()

    async def _listen(self) -> None:
        app = web.Application(client_max_size=2**26)
        app.add_routes([web.get("/v1/models", self._models), web.post("/tokenize", self._tokenize)])
        app.add_routes([web.post("/v1/completions", self._complete)])
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        self._server = await self._loop.create_server(self._runner.server, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def _check_key(self, request: web.Request) -> None:
        if self._key and request.headers.get("Authorization") != f"Bearer {self._key}":
            raise web.HTTPUnauthorized

    async def _models(self, request: web.Request) -> web.Response:
        self._check_key(request)
        return web.json_response({"data": [{"id": "tiny", "max_model_len": self.max_model_len}]})

    async def _tokenize(self, request: web.Request) -> web.Response:
        asked = await request.json()
        tokens = self._tokenizer.encode(asked["prompt"], add_special_tokens=asked["add_special_tokens"])
        return web.json_response({"tokens": tokens})

    async def _complete(self, request: web.Request) -> web.Response:
        self._check_key(request)
        asked = await request.json()
        assert asked["model"] == "tiny" and asked["max_tokens"] == 1
        tokens, topk = asked["prompt"], asked["prompt_logprobs"]
        self.rows.append(tokens)
        if (status := self.before(len(self.rows))) is not None:
            return web.Response(status=status, text="out of order")
        if max(tokens) >= self._model.config.vocab_size:
            return web.Response(status=400, text=f"Token id {max(tokens)} is out of vocabulary")
        with torch.no_grad():
            log_probs = self._model(torch.tensor([tokens])).logits[0, :, : self._head_rows].log_softmax(-1)
        choice = {"text": "x", "prompt_logprobs": vllm_json(log_probs + self.shift, tokens, topk)}
        return web.Response(body=json.dumps({"choices": [choice]}).encode(), content_type="application/json")
