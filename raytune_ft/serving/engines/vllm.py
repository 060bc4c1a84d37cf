"""vLLM behind the same endpoint: requests in, its tokens out as our pieces.

It is the engine that Ray Serve LLM drives, here inside our own Ray Serve replica: Ray's application
renders prompts by templates of its own, and the ids have to be those of training. vLLM gets ids
and gives ids; text, stop strings and chances are written as for every engine. Its continuous
batching, paged cache, prefix reuse and LoRA by name take the place of ours.

Only models that vLLM reads as they lie in their folder: native layouts, not quantised.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, cast

import torch

from raytune_ft.chat.history import Message
from raytune_ft.chat.model import FALLBACK_CONTEXT, ChatModel, Sampling
from raytune_ft.chat.source import ChatSource
from raytune_ft.chat.writing import Writing
from raytune_ft.data.templating.templates import get_template
from raytune_ft.data.tokenizing.tokenizer import TextTokenizer
from raytune_ft.errors import CheckpointError, ServeError
from raytune_ft.model.loading import compute_dtype, prepare_folder, read_config
from raytune_ft.model.sampling import Told
from raytune_ft.serving.engine import ChatEngine, EngineBusyError, Load, Outcome, PieceStream
from raytune_ft.serving.engines.models import BASE, Models

logger = logging.getLogger(__name__)

SLOTS = 256
RANK = 256
"""Of an adapter at most."""
CLOSING = "the endpoint is shutting down"


def is_installed() -> bool:
    """Whether vLLM can be imported."""
    return importlib.util.find_spec("vllm") is not None


def check_installed() -> None:
    """Raise ServeError with what to do if vLLM is not installed."""
    if not is_installed():
        raise ServeError(
            "engine vllm: vLLM is not installed; pip install 'ray[llm]' on a machine with a GPU, "
            "or choose engine: embedded"
        )


def why_not(source: ChatSource) -> str | None:
    """Return why vLLM cannot serve what was found, None if it can."""
    if source.section.quantization != "none":
        return f"the base is quantised ({source.section.quantization}); ask for bits: 16"
    folder = Path(source.base)
    config = read_config(folder) if folder.is_dir() else {}
    if config.get("auto_map"):
        return "the model's folder is in its original layout; merge or export it first"
    if source.section.new_tokens:
        return "the adapter brings tokens of its own; merge it first"
    return None


class VllmEngine(ChatEngine):
    """Answers from vLLM in this process; made where an event loop will run."""

    def __init__(
        self,
        source: ChatSource,
        max_waiting: int = 16,
        *,
        slots: int = SLOTS,
        adapters: str | None = None,
        max_adapters: int = 4,
        start: Callable[[str, str, int, int], Any] | None = None,
    ) -> None:
        """Start vLLM.

        Args:
            source: what is served.
            max_waiting: requests that may wait when all slots are taken.
            slots: requests answered at a time.
            adapters: folder of adapters that are served by their names.
            max_adapters: of those in memory at once.
            start: gets the base's folder, its dtype, slots and adapters; returns vLLM's AsyncLLM.

        Raises:
            ServeError: vLLM cannot serve this.
        """
        reason = why_not(source)
        if reason is not None:
            raise ServeError(f"engine vllm: {reason}, or choose engine: embedded")
        folder = prepare_folder(source.base)
        chat = _without_weights(source, folder)
        self.name, self.context = chat.name, chat.context
        self._models = Models(chat, adapters, max_adapters)
        self._own = source.adapter
        some = max_adapters if adapters or source.adapter else 0
        self._llm = (start or _start)(str(folder), _dtype(source), slots, some)
        self._limit, self._slots = slots + max_waiting, slots
        self._running: set[asyncio.Task[None]] = set()
        self._ids = itertools.count()
        self._adapter_ids: dict[str, int] = {}
        self._read: set[str] = set()
        self._cached_tokens = 0
        self._closed = False

    def models(self) -> tuple[str, ...]:
        """Return the ids that requests may name."""
        names = self._models.names()
        if self._own is None or BASE in names:
            return names
        return (names[0], BASE, *names[1:])

    def encode(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the prompt's ids, by the template that the model was trained with."""
        return self._chat(model).encode(messages, tools or ())

    def encode_text(self, text: str) -> list[int]:
        """Return a plain text's ids."""
        return self._chat(None).encode_text(text)

    def thought(self, prompt_ids: Sequence[int], *, model: str | None = None) -> bool | None:
        """Whether a prompt ends inside a thought."""
        return self._chat(model).thought(prompt_ids)

    def submit(
        self, prompt_ids: Sequence[int], sampling: Sampling, *, model: str | None = None
    ) -> PieceStream:
        """Hand a request to vLLM, which queues it."""
        if self._closed:
            raise ServeError(CLOSING)
        if len(self._running) >= self._limit:
            waiting = self._limit - self._slots
            raise EngineBusyError(f"{waiting} requests wait already; try again later")
        chat, loop = self._chat(model), asyncio.get_running_loop()
        limit = min(sampling.max_new_tokens, self.context - len(prompt_ids))
        out: asyncio.Queue[Outcome] = asyncio.Queue()
        outputs = self._outputs(list(prompt_ids), sampling, chat, limit, self._lora(model))
        writing = Writing(chat.tokenizer, sampling.stop)
        asked = sampling.logprobs or 0
        task = loop.create_task(self._pump(outputs, writing, chat.stop_ids, asked, out))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

        def cancel() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel)

        return PieceStream(out, cancel)

    def healthy(self) -> bool:
        """Whether vLLM answers."""
        return not self._closed and not self._llm.errored

    def load(self) -> Load:
        """Return what there is to do now; vLLM counts its own memory in its own metrics."""
        running = len(self._running)
        return Load(
            running=min(running, self._slots),
            waiting=max(running - self._slots, 0),
            slots=self._slots,
            cached_tokens=self._cached_tokens,
        )

    def close(self) -> None:
        """Stop vLLM; what runs ends with its error."""
        self._closed = True
        for task in list(self._running):
            loop = task.get_loop()
            if not loop.is_closed():
                loop.call_soon_threadsafe(task.cancel, CLOSING)
        self._llm.shutdown()

    def _chat(self, model: str | None) -> ChatModel:
        return self._models.chat(None if model == BASE and self._own is not None else model)

    def _lora(self, model: str | None) -> tuple[str, int, str] | None:
        """Return the name, number and folder of a model's adapter, None for the base."""
        name = self.name if model is None else model
        folder = self._own if name == self.name else self._models.adapter_folder(name)
        if folder is None:
            return None
        number = self._adapter_ids.setdefault(name, len(self._adapter_ids) + 1)
        return name, number, str(folder)

    async def _outputs(
        self,
        prompt: list[int],
        sampling: Sampling,
        chat: ChatModel,
        limit: int,
        lora: tuple[str, int, str] | None,
    ) -> AsyncGenerator[Any, None]:
        """Yield vLLM's outputs, each with what is new."""
        if limit <= 0:
            return
        from vllm import SamplingParams  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
        from vllm.sampling_params import RequestOutputKind  # type: ignore[import-not-found]

        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=limit,
            seed=sampling.seed,
            stop_token_ids=sorted(chat.stop_ids),
            ignore_eos=True,  # where it ends an answer it is among these
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            logprobs=sampling.logprobs,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        request = LoRARequest(*lora) if lora else None
        if request is not None:
            await self._read_adapter(request)
        # closed at once: it is how vLLM learns that nobody reads on
        async with aclosing(
            self._llm.generate(
                {"prompt_token_ids": prompt},
                params,
                f"request-{next(self._ids)}",
                lora_request=request,
            )
        ) as found:
            async for output in found:
                yield output

    async def _read_adapter(self, request: Any) -> None:
        """Have vLLM read an adapter before its first request, in which a failure ends vLLM."""
        if request.lora_name in self._read:
            return
        try:
            await self._llm.add_lora(request)
        except Exception as error:
            if self._llm.errored:
                raise
            raise CheckpointError(
                f"{request.lora_path}: vLLM does not read it ({error})"
            ) from error
        self._read.add(request.lora_name)

    async def _pump(
        self,
        outputs: AsyncGenerator[Any, None],
        writing: Writing,
        stop_ids: frozenset[int],
        asked: int,
        out: asyncio.Queue[Outcome],
    ) -> None:
        """Write one answer; closing `outputs` tells vLLM that nobody reads on."""
        stopped = False
        try:
            async for output in outputs:
                known = output.num_cached_tokens or writing.n_cached
                self._cached_tokens += known - writing.n_cached
                writing.n_cached = known
                for token, told in _tokens(output.outputs[0], asked):
                    if token in stop_ids:
                        stopped = True
                        out.put_nowait(writing.end("stop"))
                        break
                    piece = writing.push(token, told)
                    out.put_nowait(piece)
                    if piece.finish is not None:
                        stopped = True
                        break
                if stopped:
                    break
            if not stopped:
                out.put_nowait(writing.end("length"))
            out.put_nowait(None)
        except asyncio.CancelledError as error:
            out.put_nowait(ServeError(str(error.args[0])) if error.args else None)
            raise
        except Exception as error:  # reported to its reader; other answers go on
            logger.exception("an answer failed")
            out.put_nowait(error)
        finally:
            await outputs.aclose()


def _tokens(completion: Any, asked: int) -> list[tuple[int, Told | None]]:
    """Return the new tokens of an output with their chances, where they were asked for."""
    chances = completion.logprobs or [None] * len(completion.token_ids)
    return [
        (token, None if known is None else _told(token, known, asked))
        for token, known in zip(completion.token_ids, chances, strict=True)
    ]


def _told(token: int, known: Mapping[int, Any], asked: int) -> Told:
    """Return vLLM's logprobs of a token: the likeliest ones, beside the chosen one in any case."""
    ranked = sorted(known.items(), key=lambda item: item[1].rank)
    top = tuple((id_, float(found.logprob)) for id_, found in ranked if found.rank <= asked)
    return Told(token, float(known[token].logprob), top)


def _without_weights(source: ChatSource, folder: Path) -> ChatModel:
    section = source.section
    tokenizer = TextTokenizer.from_folder(folder, section.eos_token, section.new_tokens)
    return ChatModel(
        model=cast(Any, None),
        tokenizer=tokenizer,
        template=get_template(source.template, tokenizer),
        name=source.name,
        system=source.system,
        context=read_config(folder).get("max_position_embeddings") or FALLBACK_CONTEXT,
        folder=str(folder),
    )


def _dtype(source: ChatSource) -> str:
    """Return the type in which the model was trained, by its name; vLLM's own choice may differ."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return str(compute_dtype(source.section, device)).removeprefix("torch.")


def _start(folder: str, dtype: str, slots: int, adapters: int) -> Any:
    """Start vLLM on a folder; it reads safetensors only and no code of the model's."""
    from vllm.engine.arg_utils import AsyncEngineArgs  # type: ignore[import-not-found]
    from vllm.v1.engine.async_llm import AsyncLLM  # type: ignore[import-not-found]

    given: dict[str, Any] = {"model": folder, "max_num_seqs": slots, "trust_remote_code": False}
    given |= {"load_format": "safetensors", "skip_tokenizer_init": True, "dtype": dtype}
    given |= {"enable_prefix_caching": True, "disable_log_stats": True}
    if adapters:
        given |= {"enable_lora": True, "max_loras": adapters, "max_lora_rank": RANK}
    return AsyncLLM.from_engine_args(AsyncEngineArgs(**given))
