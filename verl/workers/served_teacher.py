"""A teacher that servers are asked for (``teacher_servers``), by the driver, in place of a worker group.

In: rows of a batch. Out: the keys that a `TeacherWorker` gives, from the log-probs of the rows' tokens and of the
likeliest ids. Ids that the teacher lacks are replaced before anything is sent, and a row ends with its last scored
token.

A server's softmax runs over all rows of its head, the teacher's here over the shared ids alone. With z the server's
log-probs, m the mass of the shared ids that it names, and u that of all ids that it does not name::

    log q(v) = z(v) - log(m + u)      too low by at most log(1 + u / m), for a part of u may not be of shared ids
    rest     = log(u / (m + u))       of shared ids that are not named; a sent token beyond the K likeliest adds its q

Where all shared ids are named (``algorithm.distill.topk`` is their number), u is 0 and everything is exact, at any
temperature. Elsewhere the temperature has to be 1: that of the server.

Letters: B rows, R response, S scored positions of a row, W ids that the server names there, K likeliest ids.
"""

import asyncio
import logging
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

import torch

from verl.config import ActorRolloutRefConfig, TeacherConfig
from verl.protocol import DataProto
from verl.single_controller.base.decorator import WorkerGroup
from verl.utils.tokenizer import hf_tokenizer
from verl.utils.torch_functional import real_response_tokens
from verl.utils.vocab_rules import PROBES
from verl.vocabulary import Vocabulary, choose_replacement
from verl.workers.actor.teachers import SHARED_IDS, TOP_TENSORS, empty_scores
from verl.workers.fsdp.token_stats_model import ScoredRows
from verl.workers.rollout.vllm_settings import command_line
from verl.workers.teacher_servers import (
    FAULTS,
    MODELS,
    PULSE_S,
    TOKENIZE,
    Endpoint,
    Entries,
    RefusedError,
    TeacherServers,
    describe,
)

logger = logging.getLogger(__name__)

PROBE_S = 60.0
"""Timeout of the probe, maybe a server's first request."""
SAME_SCORES, SAME_MODEL = 1e-3, 0.1
"""Mean differences in nats between endpoints: up to the first nothing is logged, above the second one is refused."""
PROBE_TOKENS, TURN_TOKENS = 128, 16
"""Tokens of the text that endpoints are compared on, and most that a chat template writes around a system message."""
RESOLUTION = 1e-7
"""Smallest difference that a mass has which is 1 less a sum of float32 numbers."""


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
        self._topk, self._missing = topk, ref.ref_log_prob_replace_val
        if (variable := settings.api_key_env) is not None and not os.environ.get(variable):
            raise ValueError(f"api_key_env={variable}: this environment variable is not set; export it")
        self.servers = TeacherServers(settings.url, os.environ.get(variable or ""), rollout.timeout_s)
        self._wait: Callable[[], TeacherServers] | None = None
        student = model.tokenizer_path or str(model.path)
        own = None if teacher is not None else ref.model.tokenizer_path or ref.model.path
        self._tokenizer = hf_tokenizer(student, trust_remote_code=model.trust_remote_code)
        vocabulary, self._replacement = Vocabulary(len(self._tokenizer), rollout.extend_start), None
        self.ids = vocabulary.ids
        """Number of ids that it knows."""
        if teacher is None or not teacher.knows_extended:
            theirs = hf_tokenizer(own, trust_remote_code=model.trust_remote_code) if own else self._tokenizer
            self.ids = vocabulary.shared_ids(len(theirs))  # as of a teacher of the run
            self._replacement = choose_replacement(ref.ref_replace_token_id, theirs, self.ids)
        self._is_whole = topk is not None and topk >= self.ids
        if rollout.temperature != 1 and not self._is_whole:
            raise ValueError(
                f"actor_rollout_ref.rollout.temperature={rollout.temperature}: a server scores at temperature 1, and "
                f"another follows from log-probs of all {self.ids} ids alone; set it to 1, or with "
                f"algorithm.distill.objective=topk set algorithm.distill.topk={self.ids}"
            )
        self._longest = rollout.prompt_length + rollout.response_length
        if settings.system_prompt:
            self._longest += len(self._tokenizer.encode(settings.system_prompt)) + TURN_TOKENS
        tokens = self._tokenizer.encode("\n".join(PROBES["texts"]), add_special_tokens=False)
        self._probe = [token for token in tokens if token < self.ids][: min(PROBE_TOKENS, self._longest)]
        self._probe_scores: torch.Tensor | None = None

    @property
    def limits(self) -> dict[str, int]:
        """What servers have to be started with, as options of vLLM."""
        named = {"max_logprobs": -1 if self._is_whole else self._topk} if self._topk else {}
        return {**named, "max_model_len": self._longest + 1}

    def expect_servers(self, wait: Callable[[], TeacherServers]) -> None:
        """Have `init_model` ask ``wait`` for servers that the run starts."""
        self._wait = wait

    # ------------------------------------------------------------------ what a worker group has

    def init_model(self) -> None:
        """See that every endpoint serves the model, and all the same one.

        Raises:
            ValueError: one of them does not.
            WorkerError: one that the run starts did not start.
        """
        if self._wait is not None:
            self.servers = self._wait()
        self.servers.run(self._connect_all())

    def find_other_tokens(self) -> list[str]:
        """Endpoints whose tokenizer makes other ids of the probe texts than the student's, a line each."""
        return self.servers.run(self._find_other_tokens())

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """``ref_log_prob`` (B, R): the teacher's log-probs of the responses."""
        return self._score(data, real_response_tokens(data), None)

    def score_for_update(self, data: DataProto) -> DataProto:
        """With ``ref_log_prob`` (B, R) the likeliest ids, at trained positions alone; 0 elsewhere.

        ``meta_info["metrics"]``: how much too low the log-probs can be, nats, and the mass of all ids beside the
        likeliest; means over the positions.
        """
        return self._score(data, data.tensor("response_mask").bool(), self._topk)

    def begin(self, method: str, data: DataProto) -> Callable[[], DataProto]:
        """Call ``compute_ref_log_prob`` or ``score_for_update`` in a thread; what it returns waits for the result."""
        scores: Future[DataProto] = Future()

        def work() -> None:
            try:
                scores.set_result(getattr(self, method)(data))
            except BaseException as error:  # whoever waits gets it
                scores.set_exception(error)

        # A thread that the end of a run does not wait for.
        threading.Thread(target=work, daemon=True).start()
        return scores.result

    # ------------------------------------------------------------------ rows

    def _score(self, data: DataProto, select: torch.Tensor, topk: int | None) -> DataProto:
        input_ids, temperature = data.tensor("input_ids"), data.meta_info["temperature"]
        if self._replacement is not None:
            input_ids = input_ids.masked_fill(input_ids >= self.ids, self._replacement)
        layout = ScoredRows(input_ids, data.tensor("attention_mask"), select)
        scores = empty_scores(select, topk)
        asked = -1 if self._is_whole and (topk is not None or temperature != 1) else topk or 0
        bounds = torch.zeros(select.shape).double()

        async def score_row(row: int) -> None:
            micro = layout.build([row], packed=True)
            # The last scored token is predicted and never read; a server has to be sent it all the same.
            tokens = [*micro.inputs.input_ids[0].tolist(), int(micro.inputs.labels[-1])]
            entries = await self.servers.score(tokens, asked)
            named = [entries[place + 1] for place in micro.inputs.select_index.tolist()]
            settings = micro.inputs.labels, self.ids, topk or 0, temperature
            found = await asyncio.to_thread(served_scores, named, *settings)
            # `scores` has this order: `ref_log_prob`, then TOP_TENSORS.
            for target, values in zip(scores.values(), found, strict=False):
                target[micro.rows, micro.columns] = values.to(target.dtype)
            bounds[micro.rows, micro.columns] = found.bound

        async def score_rows() -> None:
            await self.servers.reconnect(self._connect)
            await asyncio.gather(*map(score_row, layout.lengths.nonzero().flatten().tolist()))

        self.servers.run(score_rows())
        scores["ref_log_prob"].masked_fill_(select & (data.tensor("responses") >= self.ids), self._missing)
        if topk is None or not select.any():
            return DataProto.from_dict(scores)
        metrics = {
            "distill/teacher_log_prob_bound": float(bounds[select].mean()),
            "distill/teacher_rest_mass": float(scores[TOP_TENSORS[-1]][select].exp().mean()),
        }
        return DataProto.from_dict(scores, meta_info={"metrics": metrics})

    # ------------------------------------------------------------------ endpoints

    async def _connect(self, endpoint: Endpoint) -> None:
        """See that an endpoint serves the model that the others do, to rows as long as the run's."""
        model = (await self.servers.request(endpoint, MODELS, timeout_s=PULSE_S))["data"][0]
        endpoint.model, length = model["id"], model.get("max_model_len")
        if length is not None and length <= self._longest:
            raise RefusedError(
                f"its max_model_len={length} is too short: rows have up to {self._longest} tokens, plus 1"
            )
        async with asyncio.timeout(PROBE_S):
            entries = await self.servers.complete(endpoint, self._probe, -1 if self._is_whole else self._topk or 0)
        mass = max(sum(math.exp(each["logprob"]) for each in entry.values()) for entry in entries[1:])
        if mass > 1.001:  # logits in place of log-probs
            raise RefusedError(f"its log-probs add up to {mass:.3g}; serve it with --logprobs-mode raw_logprobs")
        found = served_scores(entries[1:], torch.tensor(self._probe[1:]), self.ids, self._topk or 0).drawn
        if self._probe_scores is None:
            self._probe_scores = found
        # The mean: in bf16 single log-probs differ by tenths from GPU to GPU, and another model's differ everywhere.
        difference = float((found - self._probe_scores).abs().mean())
        if not difference <= SAME_MODEL:  # NaN is not
            first = self.servers.endpoints[0].url
            raise RefusedError(f"it scores otherwise than {first} did, by {difference:.3g} nats")
        if difference > SAME_SCORES:
            logger.warning("%s scores a text otherwise than the first, by %.2g nats", endpoint.url, difference)
        endpoint.fault = None

    async def _connect_all(self) -> None:
        faults: list[str] = []
        for endpoint in self.servers.endpoints:
            try:
                await self._connect(endpoint)
            except FAULTS as error:
                faults.append(f"\n- {endpoint.url}: {describe(error)}")
        if faults:
            fix = self.servers.fix or f"start them with vllm serve MODEL {' '.join(command_line(self.limits))}"
            raise ValueError(f"servers of a teacher cannot be used; {fix}{''.join(faults)}")

    async def _find_other_tokens(self) -> list[str]:
        faults: list[str] = []
        for endpoint in self.servers.endpoints:
            # With the last id that it is said to know.
            texts = [*PROBES["texts"], self._tokenizer.convert_ids_to_tokens(self.ids - 1)]
            for text in texts:
                ours = self._tokenizer.encode(text, add_special_tokens=False)
                body = {"model": endpoint.model, "prompt": text, "add_special_tokens": False}
                try:
                    theirs = (await self.servers.request(endpoint, TOKENIZE, body, PULSE_S))["tokens"]
                except FAULTS as error:
                    faults.append(f"{endpoint.url} does not say which tokens a text has: {describe(error)}")
                    break
                if theirs != ours and max(ours, default=0) < self.ids:
                    faults.append(f"{endpoint.url} makes other tokens of {text[:40]!r} than the student: {theirs[:8]}")
                    break
        return faults


class StitchedGroup:
    """Worker group of a stitched teacher whose base teacher is served: workers get its scores with their rows."""

    def __init__(self, base: ServedTeacher, own: WorkerGroup) -> None:
        self._base, self._own = base, own
        self.init_model = own.init_model

    def compute_ref_log_prob(self, data: DataProto) -> DataProto:
        """As `TeacherWorker.compute_ref_log_prob`."""
        return self._own.compute_ref_log_prob(self._with(data, self._base.compute_ref_log_prob(data)))

    def score_for_update(self, data: DataProto) -> DataProto:
        """As `ServedTeacher.score_for_update`; the metrics are the base teacher's."""
        of_base = self._base.score_for_update(data)
        metrics = of_base.meta_info.pop("metrics", {})
        scores: DataProto = self._own.score_for_update(self._with(data, of_base))
        scores.meta_info["metrics"] = metrics
        return scores

    def _with(self, data: DataProto, of_base: DataProto) -> DataProto:
        of_base.meta_info[SHARED_IDS] = self._base.ids
        return data.select().union(of_base)
