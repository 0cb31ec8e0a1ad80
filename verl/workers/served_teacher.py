"""A teacher behind URLs: any vLLM server that scores prompts, asked by the driver in place of a worker group.

In: rows of a batch. Out: the keys that a `TeacherWorker` gives, from the log-probs of the rows' tokens and of the
likeliest ids. Ids that the teacher lacks are replaced before anything is sent, and a row ends with its last scored
token. Rows are spread over all endpoints; what fails on one goes to another, and the last one's end ends the run.

A server's softmax runs over all rows of its head, the teacher's here over the shared ids alone. With z the server's
log-probs, m the mass of the shared ids that it names, and u that of all ids that it does not name::

    log q(v) = z(v) - log(m + u)      too low by at most log(1 + u / m), for a part of u may not be of shared ids
    rest     = log(u / (m + u))       of all shared ids that are not named

Where all shared ids are named (``algorithm.distill.topk`` is their number), u is 0 and everything is exact, at any
temperature. Elsewhere the temperature has to be 1: that of the server.

Letters: B rows, R response, S scored positions of a row, W ids that the server names there, K likeliest ids.
"""

import asyncio
import json
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import aiohttp
import torch

from verl.config import ActorRolloutRefConfig, TeacherConfig
from verl.protocol import DataProto
from verl.single_controller.base import WorkerError
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.vocab_rules import PROBES
from verl.vocabulary import Vocabulary
from verl.workers.actor.teachers import TOP_TENSORS
from verl.workers.fsdp.token_stats_model import ScoredRows, real_response_tokens
from verl.workers.model_workers import choose_replacement

logger = logging.getLogger(__name__)

MODELS, COMPLETIONS, TOKENIZE = "/v1/models", "/v1/completions", "/tokenize"
ROWS_AT_ONCE = 16
"""Of one endpoint; a server's answers are large, and it writes them one by one."""
PULSE_S, PROBE_S = 8.0, 60.0
"""Between looks at whether an endpoint is still there, and for each; for the probe, maybe a server's first request."""
TRIES, PAUSE_S = 4, 1.0
"""Of a row on endpoints that are there, and between them."""
SAME_SCORES, SAME_MODEL = 1e-3, 0.1
"""Mean difference in nats between endpoints: that is not worth a word, and that can be rounding."""
PROBE_TOKENS, TURN_TOKENS = 128, 16
"""Of the text that endpoints are compared on; what a chat template writes around a system message, at most."""
RESOLUTION = 1e-7
"""Of a mass that is 1 less a sum of float32 numbers."""

Entries = Sequence[Mapping[str, Mapping[str, Any]]]
"""Of each position what a server names: id as a text to ``logprob``."""
_Result = TypeVar("_Result")


class RefusedError(WorkerError):
    """A server does not serve a request, and would not another time."""

    def __init__(self, message: str) -> None:
        super().__init__(message, by_user=True)


FAILURES = (aiohttp.ClientError, TimeoutError, OSError)
"""What another try or another endpoint may not meet."""


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


class ServedScores(NamedTuple):
    """Of S positions, in float64."""

    drawn: torch.Tensor
    """(S,) log-probs of the tokens that were sent."""
    top_ids: torch.Tensor
    """(S, K) the likeliest ids; where there are fewer than K, the likeliest stands again in their place."""
    top_log_probs: torch.Tensor
    """(S, K)"""
    rest: torch.Tensor
    """(S,) log of the mass of all other shared ids."""
    bound: torch.Tensor
    """(S,) how much too low the log-probs can be, nats."""


def served_scores(entries: Entries, sent: torch.Tensor, ids: int, topk: int, temperature: float = 1.0) -> ServedScores:
    """The teacher's scores from what a server names; see the head of the module.

    Args:
        entries: of S positions.
        sent: (S,) the tokens, which are named at every position.
        ids: number of shared ids.
        topk: K, how many likeliest ids the server was asked for; 0: the tokens alone.
        temperature: other than 1 only where all shared ids are named.
    """
    width = max([topk, *map(len, entries)])
    named, served = torch.full((len(entries), width), ids), torch.full((len(entries), width), -torch.inf).double()
    for row, entry in enumerate(entries):
        named[row, : len(entry)] = torch.tensor([int(token) for token in entry])
        served[row, : len(entry)] = torch.tensor([each["logprob"] for each in entry.values()], dtype=torch.float64)
    served, order = served.sort(dim=1, descending=True)
    named, unseen = named.gather(1, order), 1 - served.exp().sum(dim=1)
    # No id that is not named is likelier than the last of the likeliest.
    most = served[:, min(topk, ids) - 1].exp() if topk else torch.ones(len(entries))
    known = named < ids
    unseen = torch.minimum(unseen.clamp(min=RESOLUTION), (ids - known.sum(dim=1)) * most)
    values, order = (served / temperature).masked_fill(~known, -torch.inf).sort(dim=1, descending=True, stable=True)
    named, inside = named.gather(1, order), values.logsumexp(dim=1)
    total = (inside.exp() + unseen).log()
    log_q = values - total[:, None]
    drawn = log_q.masked_fill(named != sent[:, None], -torch.inf).amax(dim=1)
    top, rest = log_q[:, :topk], (unseen / total.exp() + log_q[:, topk:].exp().sum(dim=1)).log()
    named, top = (torch.where(top > -torch.inf, each[:, :topk], each[:, :1]) for each in (named, log_q))
    return ServedScores(drawn, named, top, rest, total - inside)


class ServedTeacher:
    """Scores the student's tokens as `TeacherWorker` does, which has the same arguments; methods as those of a group.

    Args:
        config: ``actor_rollout_ref``.
        device: not used.
        teacher: a further teacher; None: the one of ``actor_rollout_ref.ref``.
        topk: number of likeliest ids at each trained position that `score_for_update` gives; None: none.
        exports_hidden_states: not used; a server has none to give.

    Raises:
        ValueError: settings that a served teacher cannot follow.
    """

    def __init__(
        self,
        config: ActorRolloutRefConfig,
        device: str = "auto",
        teacher: TeacherConfig | None = None,
        topk: int | None = None,
        exports_hidden_states: bool = False,
    ) -> None:
        settings = config.ref if teacher is None else teacher
        model, ref, rollout = config.model, config.ref, config.rollout
        self._topk, self._missing, self._timeout_s = topk, ref.ref_log_prob_replace_val, rollout.timeout_s
        self._endpoints = [Endpoint(url.rstrip("/").removesuffix("/v1")) for url in settings.url]
        self._headers = {}
        if (variable := settings.api_key_env) is not None:
            if not os.environ.get(variable):
                raise ValueError(f"api_key_env={variable}: this environment variable is not set; export it")
            self._headers["Authorization"] = f"Bearer {os.environ[variable]}"
        student = model.tokenizer_path or str(model.path)
        own = None if teacher is not None else ref.model.tokenizer_path or ref.model.path
        self._tokenizer = hf_tokenizer(student, trust_remote_code=model.trust_remote_code)
        vocabulary, self._replacement = Vocabulary(len(self._tokenizer), rollout.extend_start), None
        self._ids = vocabulary.ids
        if teacher is None or not teacher.knows_extended:
            theirs = hf_tokenizer(own, trust_remote_code=model.trust_remote_code) if own else self._tokenizer
            self._ids = vocabulary.shared_ids(len(theirs))  # as of a teacher of the run
            stand_ins = [theirs.pad_token_id, theirs.eos_token_id]
            self._replacement = choose_replacement(ref.ref_replace_token_id, stand_ins, self._ids)
        self._is_whole = topk is not None and topk >= self._ids
        if rollout.temperature != 1 and not self._is_whole:
            raise ValueError(
                f"actor_rollout_ref.rollout.temperature={rollout.temperature}: a server scores at temperature 1, and "
                f"another follows from log-probs of all {self._ids} ids alone; set it to 1, or with "
                f"algorithm.distill.objective=topk set algorithm.distill.topk={self._ids}"
            )
        self._longest = rollout.prompt_length + rollout.response_length
        if settings.system_prompt:
            self._longest += len(self._tokenizer.encode(settings.system_prompt)) + TURN_TOKENS
        tokens = self._tokenizer.encode("\n".join(PROBES["texts"]), add_special_tokens=False)
        self._probe = [token for token in tokens if token < self._ids][: min(PROBE_TOKENS, self._longest)]
        self._probe_scores: torch.Tensor | None = None

    # ------------------------------------------------------------------ what a worker group has

    def init_model(self) -> None:
        """See that every endpoint serves the model, and all the same one.

        Raises:
            ValueError: one of them does not.
        """
        asyncio.run(self._in_session(self._connect_all()))

    def find_other_tokens(self) -> list[str]:
        """Endpoints whose tokenizer makes other ids of the probe texts than the student's, a line each."""
        return asyncio.run(self._in_session(self._find_other_tokens()))

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R): the teacher's log-probs of the responses."""
        return self._score(data, real_response_tokens(data), None)

    def score_for_update(self, data: DataProto) -> DataProto:
        """With ``ref_log_prob`` (B, R) the likeliest ids, at trained positions alone; 0 elsewhere.

        ``meta_info["metrics"]``: how much too low the log-probs can be, nats, and the mass of all ids beside the
        likeliest; means over the positions.
        """
        return self._score(data, data.tensor("response_mask").bool(), self._topk)

    # ------------------------------------------------------------------ rows

    def _score(self, data: DataProto, select: torch.Tensor, topk: int | None) -> DataProto:
        input_ids, temperature = data.tensor("input_ids"), data.meta_info["temperature"]
        if self._replacement is not None:
            input_ids = input_ids.masked_fill(input_ids >= self._ids, self._replacement)
        layout = ScoredRows(input_ids, data.tensor("attention_mask"), select)
        scores = {"ref_log_prob": torch.zeros(select.shape)}
        if topk is not None:
            shape = (*select.shape, topk)
            empty = torch.zeros(shape, dtype=torch.int32), torch.zeros(shape), torch.zeros(select.shape)
            scores |= dict(zip(TOP_TENSORS, empty, strict=True))
        asked = -1 if self._is_whole and (topk is not None or temperature != 1) else topk or 0
        bounds = torch.zeros(select.shape).double()

        async def score_row(row: int) -> None:
            micro = layout.build([row], packed=True)
            # The last scored token is predicted and never read; a server has to be sent it all the same.
            tokens = [*micro.inputs.input_ids[0].tolist(), int(micro.inputs.labels[-1])]
            entries = await self._entries(tokens, asked)
            named = [entries[place + 1] for place in micro.inputs.select_index.tolist()]
            settings = micro.inputs.labels, self._ids, topk or 0, temperature
            found = await asyncio.to_thread(served_scores, named, *settings)
            # `scores` has this order: `ref_log_prob`, then TOP_TENSORS.
            for target, values in zip(scores.values(), found, strict=False):
                target[micro.rows, micro.columns] = values.to(target.dtype)
            bounds[micro.rows, micro.columns] = found.bound

        async def score_rows() -> None:
            for endpoint in self._endpoints:
                if endpoint.fault is not None:  # perhaps it is back
                    with suppress(*FAILURES, RefusedError, LookupError, TypeError):
                        await self._connect(endpoint)
            await asyncio.gather(*map(score_row, layout.lengths.nonzero().flatten().tolist()))

        asyncio.run(self._in_session(score_rows()))
        scores["ref_log_prob"].masked_fill_(select & (data.tensor("responses") >= self._ids), self._missing)
        if topk is None or not select.any():
            return DataProto.from_dict(scores)
        metrics = {
            "distill/teacher_log_prob_bound": float(bounds[select].mean()),
            "distill/teacher_rest_mass": float(scores[TOP_TENSORS[-1]][select].exp().mean()),
        }
        return DataProto.from_dict(scores, meta_info={"metrics": metrics})

    async def _entries(self, tokens: list[int], topk: int) -> Entries:
        """What is named at each token of a row, by whichever endpoint; nothing at the first.

        Raises:
            WorkerError: no endpoint answers.
        """
        last: Exception | None = None
        for _ in range(TRIES + len(self._endpoints)):
            async with self._slots:
                there = [endpoint for endpoint in self._endpoints if endpoint.fault is None]
                if not there:
                    break
                endpoint = min(there, key=lambda each: each.rows)
                endpoint.rows += 1
                try:
                    return await self._while_there(endpoint, self._complete(endpoint, tokens, topk))
                except RefusedError as error:
                    raise RefusedError(f"{endpoint.url}: {error}") from None
                except FAILURES as error:
                    last = error
                    await self._note_failure(endpoint, error)
                finally:
                    endpoint.rows -= 1
        faults = "; ".join(f"{endpoint.url}: {endpoint.fault or describe(last)}" for endpoint in self._endpoints)
        raise WorkerError(f"no endpoint of a teacher scores any more ({faults}); start them again, and then the run")

    # ------------------------------------------------------------------ endpoints

    async def _connect(self, endpoint: Endpoint) -> None:
        """See that an endpoint serves the model that the others do, to rows as long as the run's."""
        model = (await self._request(endpoint, MODELS, timeout_s=PULSE_S))["data"][0]
        endpoint.model, length = model["id"], model.get("max_model_len")
        if length is not None and length <= self._longest:
            raise RefusedError(f"it takes {length} tokens, and the longest row has {self._longest}, and one is written")
        async with asyncio.timeout(PROBE_S):
            entries = await self._complete(endpoint, self._probe, -1 if self._is_whole else self._topk or 0)
        found = served_scores(entries[1:], torch.tensor(self._probe[1:]), self._ids, self._topk or 0).drawn
        if self._probe_scores is None:
            self._probe_scores = found
        # The mean: in bf16 single log-probs differ by tenths from GPU to GPU, and another model's differ everywhere.
        difference = float((found - self._probe_scores).abs().mean())
        if not difference <= SAME_MODEL:  # NaN is not
            raise RefusedError(f"it scores otherwise than {self._endpoints[0].url} did, by {difference:.3g} nats")
        if difference > SAME_SCORES:
            logger.warning("%s scores a text otherwise than the first, by %.2g nats", endpoint.url, difference)
        endpoint.fault = None

    async def _connect_all(self) -> None:
        faults: list[str] = []
        for endpoint in self._endpoints:
            try:
                await self._connect(endpoint)
            except (*FAILURES, RefusedError, LookupError, TypeError) as error:
                faults.append(f"\n- {endpoint.url}: {describe(error)}")
        if faults:
            most = f"--max-logprobs {-1 if self._is_whole else self._topk} " if self._topk else ""
            fix = f"start them with vllm serve MODEL {most}--max-model-len {self._longest + 1}"
            raise ValueError(f"servers of a teacher cannot be used; {fix}{''.join(faults)}")

    async def _find_other_tokens(self) -> list[str]:
        faults: list[str] = []
        for endpoint in self._endpoints:
            # With the last id that it is said to know.
            texts = [*PROBES["texts"], self._tokenizer.convert_ids_to_tokens(self._ids - 1)]
            for text in texts:
                ours = self._tokenizer.encode(text, add_special_tokens=False)
                body = {"model": endpoint.model, "prompt": text, "add_special_tokens": False}
                try:
                    theirs = (await self._request(endpoint, TOKENIZE, body, PULSE_S))["tokens"]
                except (*FAILURES, RefusedError) as error:
                    faults.append(f"{endpoint.url} does not say which tokens a text has: {describe(error)}")
                    break
                if theirs != ours and max(ours, default=0) < self._ids:
                    faults.append(f"{endpoint.url} makes other tokens of {text[:40]!r} than the student: {theirs[:8]}")
                    break
        return faults

    async def _complete(self, endpoint: Endpoint, tokens: list[int], topk: int) -> Entries:
        body = {"model": endpoint.model, "prompt": tokens, "max_tokens": 1, "prompt_logprobs": topk}
        answer = await self._request(endpoint, COMPLETIONS, body)
        entries = answer["choices"][0].get("prompt_logprobs")
        if entries is None or len(entries) != len(tokens):
            raise RefusedError(f"it gives no prompt_logprobs of {len(tokens)} tokens; is it a vLLM server?")
        return entries

    async def _request(
        self, endpoint: Endpoint, path: str, body: Mapping[str, Any] | None = None, timeout_s: float | None = None
    ) -> Any:
        """An endpoint's answer.

        Raises:
            RefusedError: it is an error of ours.
            OSError, TimeoutError, aiohttp.ClientError: it has none.
        """
        limits = aiohttp.ClientTimeout(total=timeout_s or self._timeout_s, sock_connect=PULSE_S)
        method, url = "GET" if body is None else "POST", endpoint.url + path
        async with self._session.request(method, url, json=body, timeout=limits) as response:
            content, status = await response.read(), response.status
        if status >= 400:
            message = f"{path} answers {status}: {content[:300].decode(errors='replace')}"
            # Too many requests, or an error of the server's.
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
        """Ask the endpoint no more unless it answers at all."""
        try:
            await self._request(endpoint, MODELS, timeout_s=PULSE_S)
            logger.warning("%s failed to score a row, which is tried again: %s", endpoint.url, describe(error))
            await asyncio.sleep(PAUSE_S)
        except (*FAILURES, RefusedError):
            if endpoint.fault is None:
                logger.warning("%s does not answer, the others score its rows: %s", endpoint.url, describe(error))
            endpoint.fault = describe(error)

    async def _in_session(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        self._slots = asyncio.Semaphore(ROWS_AT_ONCE * len(self._endpoints))
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(headers=self._headers, connector=connector) as self._session:
            return await work


def describe(error: Exception | None) -> str:
    """An error in one line; some of them have no text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
