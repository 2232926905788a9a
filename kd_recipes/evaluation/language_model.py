"""torchtune's decoders for lm-evaluation-harness, without transformers.

Equal to the harness's own ``hf`` model on the same checkpoint, but that logits exist only where a continuation is
predicted, some tokens at a time, and that the choices of a question share the computation of their context.
"""

# B sequences, S positions, T = B * S, N predicted tokens, D hidden, V vocabulary

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor, distributed
from torch.nn.utils import parametrize
from torchtune.modules import TransformerDecoder
from tqdm import tqdm

from kd_recipes import _torchtune
from kd_recipes._torchtune.heads import Head
from kd_recipes.errors import ConfigError, Problem
from kd_recipes.evaluation.branches import TreeBatch, batches, collate, plant
from kd_recipes.evaluation.generation import generate
from kd_recipes.evaluation.tokens import MAX_LOGITS

_MAX_NEW_TOKENS = 256  # where a task does not say; the harness's default

T = TypeVar("T")
Scored = tuple[float, bool]  # log-likelihood in nats, whether greedy decoding would say the same


class DecoderLM(TemplateLM):
    """A decoder that lm-evaluation-harness can ask.

    Where torch.distributed is initialized, each process has the whole model and does its share of the batches; all of
    them get all results.

    Args:
        model: with its weights and its head, which it keeps.
        tokenizer: of torchtune's protocol: ``encode(text, add_bos, add_eos)``, ``decode(ids)``, ``bos_id``,
            ``eos_id`` and ``stop_tokens``.
        max_length: tokens of a sequence, the model's own by default; what is longer loses its beginning.
        max_batch_tokens: tokens of a batch, padding included; a sequence that is longer comes alone.
        seed: of what tasks draw.

    Example:
        >>> run_tasks(DecoderLM(model, tokenizer), ["arc_easy", "mine.jsonl"], limit=100)
    """

    def __init__(
        self,
        model: TransformerDecoder,
        tokenizer: Any,
        *,
        max_length: int | None = None,
        max_batch_tokens: int = 4096,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self._model = model.eval()
        self._vocabulary = tokenizer  # TemplateLM's `tokenizer` is one of transformers'
        self._device = next(model.parameters()).device
        self.max_length = min(max_length or model.max_seq_len, model.max_seq_len)
        self._max_batch_tokens = max_batch_tokens
        self._seed = seed
        # what the tokenizer puts first where it is asked to; some give nothing for an empty text
        bare = tokenizer.encode("a", add_bos=False, add_eos=False)
        self._beginning: list[int] = tokenizer.encode("a", add_bos=True, add_eos=False)[: -len(bare)]

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return int(self._vocabulary.eos_id)

    @property
    def prefix_token_id(self) -> int:
        """What a text without context follows: BOS where the vocabulary has one."""
        bos_id = self._vocabulary.bos_id
        return self.eot_token_id if bos_id is None else int(bos_id)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """The ids of a text.

        Args:
            string: the text.
            add_special_tokens: whether BOS comes first, if this model uses one; None for where it is not there yet.
        """
        ids: list[int] = self._vocabulary.encode(string, add_bos=False, add_eos=False)
        if add_special_tokens is None:
            add_special_tokens = ids[:1] != [self.prefix_token_id]
        return [*self._beginning, *ids] if add_special_tokens else ids

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[Scored]:
        """Of each continuation, its log-likelihood after the context, and whether it is the greedy one.

        Args:
            requests: what the harness calls it, context, continuation.
            disable_tqdm: show no progress bar.

        Raises:
            ConfigError: a continuation of no tokens, or of more than a sequence has.
        """
        for strings, _context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                wanted = f"1 to {self.max_length} tokens after a context"
                raise ConfigError(Problem("tasks", f"{len(continuation)} tokens: {strings!r:.80}", wanted))
        trees = plant(((context, continuation) for _, context, continuation in requests), self.max_length)
        scored: dict[int, Scored] = {}
        share = _share(list(batches(trees, self._max_batch_tokens)))
        total = sum(len(tree.branches) for tree in chain(*share))
        with (
            _torchtune.without_head(self._model),
            parametrize.cached(),  # weights that are computed, from a lattice say, are computed once
            _progress(total, "log-likelihoods", disable_tqdm) as progress,
        ):
            head = _torchtune.take_head(self._model)
            for batch in share:
                owners = list(chain(*(tree.requests for tree in batch)))
                lengths = [len(branch) for tree in batch for branch in tree.branches]
                log_p_N, is_greedy_N = self._score(collate(batch).to(self._device), head)
                parts = zip(owners, log_p_N.split(lengths), is_greedy_N.split(lengths), strict=True)
                scored |= {owner: (float(log_p.sum()), bool(greedy.all())) for owner, log_p, greedy in parts}
                progress.update(len(owners))
        everywhere = {owner: answer for part in _gather(scored) for owner, answer in part.items()}
        return [everywhere[index] for index in range(len(requests))]

    def _score(self, batch: TreeBatch, head: Head) -> tuple[Tensor, Tensor]:
        """The log-probability of each predicted token, and whether it is the likeliest."""
        hidden_TD = self._model(batch.tokens_BS, mask=batch.mask_BSS, input_pos=batch.input_pos_BS).flatten(0, 1)
        logits, targets_N = head.logits(hidden_TD[batch.positions_N]), batch.targets_N
        log_p, is_greedy = [], []
        for rows_n in torch.arange(len(targets_N)).split(max(1, MAX_LOGITS // logits.num_rows)):
            logits_nV, targets_n = logits.compute(rows_n).float(), targets_N[rows_n]
            # log_softmax, which `hf` takes, is wrong by 1e-5 a token on a CPU: it adds up a vocabulary from end to end
            log_p.append(logits_nV.gather(1, targets_n[:, None])[:, 0] - logits_nV.logsumexp(-1))
            is_greedy.append(logits_nV.argmax(-1) == targets_n)
        return torch.cat(log_p).double().cpu(), torch.cat(is_greedy).cpu()

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in nats, in windows of ``max_length`` where they are longer."""
        windows = [
            list(get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1))
            for (text,) in (request.args for request in requests)
        ]
        flat = [(None, *make_disjoint_window(window)) for window in chain(*windows)]
        scored = iter(self._loglikelihood_tokens(flat, disable_tqdm=disable_tqdm))
        return [sum(next(scored)[0] for _ in of_text) for of_text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the first of the task's own ends."""
        from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

        texts: list[str] = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(index)
        for indices in by_settings.values():
            settings = normalize_gen_kwargs(requests[indices[0]].args[1], _MAX_NEW_TOKENS)
            prompts = [self.tok_encode(requests[index].args[0]) or [self.prefix_token_id] for index in indices]
            for index, text in zip(indices, self._write(prompts, settings, disable_tqdm), strict=True):
                texts[index] = postprocess_generated_text(text, settings["until"], None)
        return texts

    def _write(self, prompts: list[list[int]], settings: Mapping[str, Any], disable_tqdm: bool) -> list[str]:
        """The continuations of some prompts, whole."""
        num_new = settings["max_gen_toks"]
        if num_new >= self.max_length:
            wanted = f"less than {self.max_length}, the length of the model's sequences"
            raise ConfigError(Problem("tasks", f"a task that asks for {num_new} new tokens", wanted))
        share = _share([prompt[-(self.max_length - num_new) :] for prompt in prompts])
        continuations = generate(
            self._model,
            share,
            max_new_tokens=num_new,
            temperature=settings.get("temperature", 1.0) if settings["do_sample"] else 0.0,
            stop_ids=self._vocabulary.stop_tokens,
            seed=self._seed,
        )
        mine = [str(self._vocabulary.decode(list(continuation.ids))) for continuation in continuations]
        parts = _gather(mine)
        return [parts[index % len(parts)][index // len(parts)] for index in range(len(prompts))]


def _share(items: list[T]) -> list[T]:
    """This process's part of some items: every n-th, so that all parts are as long as each other and as hard."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if distributed.is_initialized() else items


def _gather(part: T) -> list[T]:
    """All processes' parts."""
    if not distributed.is_initialized():
        return [part]
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, part)
    return parts


def _progress(total: int, name: str, disable: bool) -> tqdm[Any]:
    is_quiet = disable or (distributed.is_initialized() and distributed.get_rank() > 0)
    return tqdm(total=total, desc=name, disable=is_quiet)
