"""Answers from vLLM on a GPU (the extra `vllm`): same prompts, same tokens, same ends as `evaluation.generate`; adapters stay adapters.

vLLM reads weights from disk. `generator` gives `ask.evaluate` a function that asks it: of a folder or hub id that is named, or of a
model in memory, which is written to a folder for as long as it takes. An adapter is handed over beside its base (`LoRARequest`), never
merged. Prompts go in as token ids, so chat template, system prompt and begun answers are those of `generate` to the token.
What differs: kernels (a near tie may fall the other way, and with other neighbours in a batch), no early stop for judges, no `neg_loss`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator import config
from orchestrator.errors import ConfigError, DataError, ModelError, NonFiniteLogitsError
from orchestrator.evaluation import thinking
from orchestrator.evaluation.metrics import NEG_LOSS
from orchestrator.evaluation.sampling import Sampling
from orchestrator.models import folders, saving

if TYPE_CHECKING:
    from torch import nn

Generate = Callable[..., list[str]]
"""As `generate` with model and tokenizer filled in: (prompts, *, system, max_new_tokens, batch_size, stop_early, progress) -> answers."""

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Greatest ranks of adapters that vLLM can be set up for."""
CHUNK = 512
"""Prompts between two signs of progress; vLLM makes its own batches of them."""
ENGINE = "vllm engine"
GROUP_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Weights:
    """What lies on disk: a model by folder or hub id, and an adapter's folder where there is one."""

    source: str
    revision: str | None = None
    adapter: str | None = None


def chosen(settings: config.Generation, device: str) -> bool:
    """Whether vLLM is to answer on this device. Raises ConfigError where it was asked for and cannot be had."""
    if settings.backend == "transformers":
        return False
    there, gpu = importlib.util.find_spec("vllm") is not None, device.startswith("cuda")
    if settings.backend == "auto":
        return there and gpu
    if not gpu:
        raise ConfigError("safety.generation.backend=vllm needs a GPU and the workers have none; set ray.use_gpu=true, or backend: transformers")
    if not there:
        raise ConfigError(
            "safety.generation.backend=vllm: vllm is not installed; pip install 'safebasin[vllm]' on every node, or set backend: transformers"
        )
    return True


@contextlib.contextmanager
def generator(
    model: nn.Module, tokenizer: Any, experiment: config.Experiment, device: str, cache: MutableMapping[Any, Any] | None = None,
    weights: Weights | None = None,
) -> Iterator[Generate | None]:
    """A function that asks vLLM, or None where transformers answers (`safety.generation.backend`).

    model: in memory, for its settings; without `weights` also what is asked. It leaves the GPU meanwhile. cache: a lane's, in which the engine
    of the untouched model sleeps between trials; without it, and for whole models, the engine ends with the context. Raises ConfigError,
    ModelError.
    """
    if not chosen(experiment.safety.generation, device):
        yield None
        return
    kept = cache if cache is not None else {}
    with contextlib.ExitStack() as stack:
        if weights is None:
            weights = _written(model, experiment, stack.enter_context(tempfile.TemporaryDirectory(prefix="safebasin-vllm-")))
        if experiment.task.metric != NEG_LOSS:  # that one is measured by the model in memory
            stack.enter_context(_off_the_gpu(model))
        engine = _engine(kept, weights, experiment, device)
        try:
            yield _Asker(engine, model, tokenizer, weights, experiment)
        finally:
            if cache is None or engine.source != untouched(experiment).source:
                _close(kept)
            else:
                engine.llm.sleep(level=1)
                engine.asleep = True


def facts(ask: Generate | None, model: Any) -> dict[str, dict[str, str]]:
    """What a result records of who answered: vLLM, or transformers and in which way `model` is asked (`capability`)."""
    if ask is None:
        from orchestrator.evaluation import capability

        return {"generation": {"backend": "transformers", "mode": capability.of(model).mode.name}}
    import vllm

    return {"generation": {"backend": "vllm", "version": str(vllm.__version__)}}


def untouched(experiment: config.Experiment) -> Weights:
    """The untouched model's files."""
    return named(experiment.model)


def named(model: config.Model, adapter: str | None = None) -> Weights:
    """The files of a model as the config names it, with an adapter's folder. Raises ModelError."""
    from orchestrator.models import loading

    return Weights(loading.resolve(model), model.revision, adapter)


def _written(model: nn.Module, experiment: config.Experiment, folder: str) -> Weights:
    """The model in memory, on disk: an adapter beside the untouched model's files, else all its weights."""
    saving.write(model, folder)
    return named(experiment.model, folder) if hasattr(model, "get_base_model") else Weights(folder)


@contextlib.contextmanager
def _off_the_gpu(model: nn.Module) -> Iterator[None]:
    import torch

    device = next(model.parameters()).device
    model.to("cpu")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        model.to(device)


# ------------------------------------------------------------------------------------------------ the engine


@dataclass
class _Engine:
    """vLLM over one model's files, for adapters up to a rank (0: none)."""

    llm: Any
    source: str
    rank: int
    asleep: bool = False
    adapters: int = 0
    """Adapters seen; each gets a number of its own, since vLLM keeps them by number."""


def _engine(kept: MutableMapping[Any, Any], weights: Weights, experiment: config.Experiment, device: str) -> _Engine:
    """The engine in the cache where it fits, woken up; else a new one in its place."""
    rank = _rank(weights.adapter) if weights.adapter else 0
    engine = kept.get(ENGINE)
    if engine is not None and (engine.source != weights.source or engine.rank < rank):
        _close(kept)
        engine = None
    if engine is None:
        engine = kept[ENGINE] = _Engine(_llm(weights, rank, experiment, device), weights.source, rank)
    if engine.asleep:
        engine.llm.wake_up()
        engine.asleep = False
    return engine


def _close(kept: MutableMapping[Any, Any]) -> None:
    kept.pop(ENGINE, None)  # vLLM ends its process when nothing holds the LLM any more
    gc.collect()


def _rank(adapter: str) -> int:
    """The least rank vLLM can be set up for that holds this adapter. Raises ModelError for adapters it cannot load."""
    settings = json.loads((Path(adapter) / "adapter_config.json").read_text(encoding="utf-8"))
    refused = [name for name in ("use_dora", "modules_to_save", "layer_replication", "fan_in_fan_out", "target_parameters") if settings.get(name)]
    if settings.get("bias", "none") != "none":
        refused.append("bias")
    if str(settings.get("peft_type", "LORA")).upper() != "LORA":
        refused.append(f"peft_type {settings['peft_type']}")
    weights = Path(adapter) / folders.ADAPTER_WEIGHTS
    beside = [name for name in (folders.header(weights) if weights.is_file() else ()) if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if beside and not refused:  # embeddings that training resized, trained tokens
        refused.append(f"weights beside the low-rank ones, e.g. {beside[0]}")
    rank = max([int(settings.get("r", 0)), *(settings.get("rank_pattern") or {}).values()])
    fitting = next((r for r in RANKS if r >= rank), None)
    if refused or fitting is None:
        why = ", ".join(refused) if refused else f"a rank of {rank} (at most {RANKS[-1]})"
        raise ModelError(f"vllm cannot load the adapter in {adapter}: it has {why}; set safety.generation.backend=transformers")
    return fitting


def _llm(weights: Weights, rank: int, experiment: config.Experiment, device: str) -> Any:
    import vllm

    settings, model = experiment.safety.generation, experiment.model
    options: dict[str, Any] = {
        "model": weights.source, "dtype": model.dtype, "trust_remote_code": model.trust_remote_code, "load_format": "safetensors",
        "skip_tokenizer_init": True, "generation_config": "vllm", "seed": 0, "enable_sleep_mode": True,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
    }  # fmt: skip
    if weights.revision:
        options["revision"] = weights.revision
    if rank:
        options |= {"enable_lora": True, "max_loras": 1, "max_lora_rank": rank}
    with _one_gpu(device):
        try:
            return vllm.LLM(**(options | settings.options))
        except (ValueError, RuntimeError, OSError, TypeError, NotImplementedError) as error:
            raise ModelError(
                f"vllm cannot load {weights.source!r}: {' '.join(str(error).split())[:300]}; change safety.generation "
                "(gpu_memory_utilization, options) or set safety.generation.backend=transformers"
            ) from error


@contextlib.contextmanager
def _one_gpu(device: str) -> Iterator[None]:
    """vLLM's own process sees this worker's GPU only, and nothing of the workers' process group."""
    index = int(device.partition(":")[2] or 0)
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    before = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", *GROUP_VARIABLES)}
    for name in GROUP_VARIABLES:
        os.environ.pop(name, None)
    os.environ["CUDA_VISIBLE_DEVICES"] = visible[index] if index < len(visible) else str(index)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ------------------------------------------------------------------------------------------------ asking


class _Asker:
    """`generate` with another engine under it."""

    def __init__(self, engine: _Engine, model: nn.Module, tokenizer: Any, weights: Weights, experiment: config.Experiment):
        from orchestrator.evaluation.generate import context_length, stop_tokens

        self.engine, self.tokenizer = engine, tokenizer
        self.stops = sorted(stop_tokens(model, tokenizer))
        limits = (context_length(model), experiment.safety.generation.options.get("max_model_len"))
        self.limit = min((int(limit) for limit in limits if limit), default=None)
        self.adapter: Any = None
        if weights.adapter:
            from vllm.lora.request import LoRARequest

            engine.adapters += 1
            self.adapter = LoRARequest(f"adapter-{engine.adapters}", engine.adapters, weights.adapter)

    def __call__(
        self, prompts: Sequence[Any], *, system: str | None | Sequence[str | None] = None, max_new_tokens: int = 64,
        batch_size: int | str = "auto", stop_early: Callable[[str], bool] | None = None, progress: Callable[[int], None] | None = None,
        sampling: Sampling | None = None,
    ) -> list[str]:
        """One answer per prompt, greedy or drawn (with vLLM's own draws, seeded by prompt and sample). batch_size and stop_early are not used: vLLM
        batches as it goes, and answers go to their end."""
        from orchestrator.evaluation.generate import encode_prompts

        ids = encode_prompts(self.tokenizer, prompts, system) if prompts else []
        for i, row in enumerate(ids):
            if self.limit is not None and len(row) >= self.limit:
                raise DataError(f"prompt {i + 1} has {len(row)} tokens, the model's context holds {self.limit}; shorten it or leave the row out")
        answers: list[str] = []
        for start in range(0, len(ids), CHUNK):
            answers += self._chunk(ids[start : start + CHUNK], max_new_tokens, sampling)
            if progress is not None:
                progress(len(answers) - start)
        return answers

    def _chunk(self, ids: list[list[int]], new: int, sampling: Sampling | None) -> list[str]:
        from vllm import SamplingParams

        how = [
            SamplingParams(
                **_drawn(sampling, row), max_tokens=new if self.limit is None else min(new, self.limit - len(row)), stop_token_ids=self.stops,
                detokenize=False, logprobs=0,
            )  # fmt: skip
            for row in ids
        ]
        asked = [{"prompt_token_ids": row} for row in ids]
        outputs = [found.outputs[0] for found in self.engine.llm.generate(asked, how, use_tqdm=False, lora_request=self.adapter)]
        broken = sum(not _finite(output) for output in outputs)
        if broken:
            raise NonFiniteLogitsError(
                f"the model's logits are NaN or infinite for {broken} of {len(outputs)} prompts; its weights are broken or its dtype "
                "overflows (training diverged: lower training.learning_rate; float16: use model.dtype=bfloat16 or float32)"
            )
        rows = [_until(list(output.token_ids), self.stops) for output in outputs]
        return thinking.decoded(self.tokenizer, rows)


def _drawn(sampling: Sampling | None, row: list[int]) -> dict[str, Any]:
    """How vLLM takes tokens: greedily, or drawn with a seed of the prompt and the sample."""
    if sampling is None:
        return {"temperature": 0.0}
    return {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed(row)}


def _finite(output: Any) -> bool:
    """Whether the probability of every chosen token is a number: of NaN logits vLLM takes a token as if nothing were."""
    return all(math.isfinite(row[token].logprob) for token, row in zip(output.token_ids, output.logprobs or (), strict=True))


def _until(tokens: list[int], stops: Sequence[int]) -> list[int]:
    return tokens[: next((i for i, token in enumerate(tokens) if token in stops), len(tokens))]
