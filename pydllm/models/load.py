"""``load``: a model from a directory, a hub id or a loaded module."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import nn

from pydllm._backend.errors import CheckpointError
from pydllm._checks import check_bool, check_int, check_usable, describe
from pydllm.models.adapter import base_of, is_adapter, kept_beside, read_adapter
from pydllm.models.chat import read_chat_template
from pydllm.models.checkpoint import Shards, read_config, read_generation_config
from pydllm.models.config import Config
from pydllm.models.families import find_family
from pydllm.models.from_module import load_module
from pydllm.models.native import NativeModel
from pydllm.models.overrides import Overrides, make_spec
from pydllm.models.parallel import ParallelModel, join_processes
from pydllm.models.parity import check as check_module
from pydllm.models.partition import Partition
from pydllm.models.quantized import KINDS, check_scheme, load_quantized, split_scales
from pydllm.models.tokenizer import read_tokenizer, special_tokens
from pydllm.models.weights import FLOATS, Found, check_tensors, check_tied, slots

_BUNDLED = Path(__file__).parents[1] / "demo/weights"  # models by name, as in the demo
_NAME = re.compile(r"[a-z0-9-]+")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "merges.txt")
_NOT_READ = ("consolidated*", "original/*")  # the same weights once more, under Meta's names
# Looked up in the tokenizer where no file names the mask token.
_MASK_TOKENS = ("<|mask|>", "<|mdm_mask|>", "<|MASK|>", "|<MASK>|")


def load(
    source: str | os.PathLike[str] | nn.Module,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
    block_size: int | None = None,
    block_origin: str | None = None,
    mask_id: int | None = None,
    eos_ids: int | Sequence[int] | None = None,
    shift_logits: bool | None = None,
    causal: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    weights: str | None = None,
    tp: int | None = 1,
    expert_parallel: bool = False,
    check: bool = False,
) -> NativeModel:
    """Load a diffusion language model.

    Args:
        source: a directory in Hugging Face layout (config.json, model.safetensors or shards with
            their index, the tokenizer's files if there are any); the hub id of such a repository,
            where ``huggingface_hub`` is installed; the folder of a LoRA, whose configuration names
            its model; or a loaded module with a ``config``. A module's parameters are shared, not
            copied: they become views of fused tensors, the module goes on working, and moving or
            casting it afterwards ends the sharing. One with LoRA layers of PEFT is copied, with its
            active adapters merged.
        device: where to put the weights; None: the current CUDA device if there is one, else the
            CPU. A module stays where it is, and None or its own device is all that is accepted.
        dtype: of weights, cache and hidden states: fp32, fp16, bf16, or fp64 (torch backend alone).
            None: what config.json says, else what the embedding is stored in; on a CPU fp32 instead
            of fp16 and bf16, which are slow and less exact there. For a module as with ``device``.
        attention, block_size, block_origin, mask_id, eos_ids, shift_logits, causal: facts of
            ``model.spec`` that replace what the files say or lack, see ``ModelSpec``. For a class
            that does not tell: ``attention="full", shift_logits=True, mask_id=...`` makes a
            retrained ``Qwen2ForCausalLM`` (Open-dCoder) a diffusion model.
        adapter: folder or hub id of a LoRA as PEFT saves it, merged into the weights in fp32 and
            rounded once. That of a family's drafts (``linear_spec_lora`` of Nemotron) is kept
            beside them for ``forward(adapter=True)``, and loaded unasked where the checkpoint has
            it.
        revision: branch, tag or commit of a hub id.
        weights: ``"fp8"`` (e4m3, one scale per block of 128 x 128) or ``"int8"`` (one per output
            channel) rounds the projections of attention, MLP and experts (not the router, nor the
            shared expert) to one byte per weight while they are read; ``dtype`` is that of
            everything else. None: as they are stored. FP8 in blocks of 128 x 128 and
            compressed-tensors with 8-bit weights stay as they are stored;
            activations are quantised in no case. For checkpoints only.
        tp: over how many processes the model is spread (tensor parallel); None: over all of the
            default process group, or that ``torchrun`` started, one where there are none. Each
            process reads and holds its part alone, on the CUDA device of its rank if there is one,
            and makes the same calls with the same arguments. For checkpoints only.
        expert_parallel: each of the ``tp`` processes holds ``E / tp`` of a mixture's E experts
            whole, instead of a part of every expert. The rest is spread as without it.
        check: compare with the module's own forward on some random tokens, ``pydllm.models.check``.

    Returns:
        The model: LLaDA, Dream, SDAR, A2D, Qwen, Llama and their like, or the mixtures of experts
        LLaDA2.x, LLaDA-MoE, SDAR-MoE, RND1, Qwen3-MoE and Ling. ``model.tokenizer`` and
        ``model.chat_template`` are set where their files were found. Qwen, Llama and Mistral come
        with causal attention and no mask id.

    Raises:
        CheckpointError: the checkpoint is incomplete, damaged or of an unknown kind; names the key,
            tensor or file, what was expected and what was found. With ``check``: the module's
            forward is another; says by how much.
        TypeError: ``source`` or ``dtype`` is of no accepted type.
        ValueError: another device or dtype than the module's, a check of something else, a model
            that ``tp`` processes cannot share, ``expert_parallel`` without experts, or an override
            that is impossible: an id that is not in the vocabulary, a block size without blocks.
        PydllmError: there are not ``tp`` processes; says how to start them.

    EOS ids are those of config.json, then those of generation_config.json, then the tokenizer's. A
    module that transformers 5 damaged in silence, its rotary buffers or, where
    ``config._name_or_path`` is a directory, its weights, gets a RuntimeWarning that names them. No
    code of a checkpoint is run and no pickle is opened.

    Example:
        >>> model = load("GSAI-ML/LLaDA-8B-Instruct")  # doctest: +SKIP
        >>> model.spec.mask_id  # doctest: +SKIP
        126336
    """
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"dtype: expected {', '.join(map(str, FLOATS))}, got {dtype}")
    if weights is not None and weights not in KINDS:
        raise ValueError(
            f"weights: expected None, {' or '.join(map(repr, KINDS))}, got {weights!r}"
        )
    if tp is not None:
        check_int("tp", tp, 1)
    check_bool("expert_parallel", expert_parallel)
    check_bool("check", check)
    if adapter is not None and not isinstance(adapter, str | os.PathLike):
        raise TypeError(f"adapter: expected a path or a hub id, got {describe(adapter)}")
    overrides = Overrides(
        attention, block_size, block_origin, mask_id, eos_ids, shift_logits, causal
    )
    if isinstance(source, nn.Module):
        if tp not in (None, 1):
            raise ValueError(f"tp: expected 1 for a loaded module, which is whole, got {tp}")
        if expert_parallel:
            raise ValueError("expert_parallel: expected False for a loaded module, which is whole")
        given = {"revision": revision, "adapter": adapter, "weights": weights}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name}: expected None for a loaded module, got {value!r}")
        model = load_module(source, device, dtype, overrides)
        if check:
            check_module(model, source)
        return model
    if check:
        raise ValueError("check: expected a module to compare with, got a checkpoint")
    if not isinstance(source, str | os.PathLike):
        raise TypeError(f"source: expected a path, a hub id or a module, got {type(source)}")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = check_usable("device", device)
    processes = 1 if tp == 1 else join_processes(tp, device)
    folder = find_folder(source, revision)
    if is_adapter(folder):
        if adapter is not None:
            raise ValueError(f"adapter: expected None for {folder}, which is one, got {adapter}")
        folder, adapter = find_folder(*base_of(folder)), folder
    own = None if adapter is None else find_folder(adapter)
    spread = processes, expert_parallel
    return _load_folder(folder, device, dtype, spread, overrides, own, weights)


def bundled(source: str | os.PathLike[str]) -> Path | None:
    """The folder of a bundled model's name; None: it is not one, or a folder here has the name."""
    name = os.fspath(source)
    known = not Path(name).exists() and _NAME.fullmatch(name) and (_BUNDLED / name).is_dir()
    return _BUNDLED / name if known else None


def find_folder(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The directory of a checkpoint: itself, or where the hub's files were put."""
    folder = bundled(source) or Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision: expected None for a directory, got {revision!r}")
        return folder
    if folder.exists():
        raise CheckpointError(f"{source}: expected a directory, found a file")
    if not isinstance(source, str) or not _HUB_ID.fullmatch(source):
        message = f"{source}: expected a directory or a hub id, found neither"
        if Path(source).name == str(source):  # no path: perhaps a bundled model's name, misspelt
            names = sorted(path.parent.name for path in _BUNDLED.glob("*/config.json"))
            message += f"; the bundled models are {', '.join(names)}"
        raise CheckpointError(message)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{source}: found no such directory, and a hub id needs huggingface_hub "
            "(pip install huggingface_hub)"
        ) from None
    try:
        patterns = list(_HUB_FILES)
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns=list(_NOT_READ),
            )
        )
    except (OSError, ValueError) as error:  # what the hub's own errors derive from
        raise CheckpointError(
            f"{source}: found no such directory, and not on the hub: {error}"
        ) from error


def _load_folder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype | None,
    spread: tuple[int, bool],
    overrides: Overrides,
    adapter: Path | None,
    kind: str | None,
) -> NativeModel:
    config = read_config(folder)
    check_scheme(config)
    family = find_family(config, quantized=True)
    sizes = family.sizes(config, family)
    processes, expert_parallel = spread
    if expert_parallel and sizes.moe is None:
        raise ValueError("expert_parallel: expected a mixture of experts, got a dense model")
    tokenizer = read_tokenizer(folder)
    named = {} if tokenizer is None else special_tokens(folder)
    spec = make_spec(
        config,
        family,
        sizes,
        find_mask(tokenizer, sizes.embeddings, named.get("mask_token")),
        eos_id=None if tokenizer is None else tokenizer.token_to_id(named.get("eos_token", "")),
        generation=read_generation_config(folder),
        overrides=overrides,
    )
    shards = Shards(folder)
    if sizes.moe is not None:
        shards.read_layout(family.names, sizes, str(folder))
    wanted = list(slots(family.names, sizes))
    found, scales = split_scales(shards.found)
    check_tensors(wanted, found, family.names, str(folder))
    embedding, head = f"{family.names.embedding}.weight", f"{family.names.head}.weight"
    if dtype is None:
        dtype = _stored_dtype(config, shards.found[embedding])
        if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            dtype = torch.float32
    shapes = {name: shape for slot in wanted for name, shape in slot.sources}
    partition = None
    if processes > 1:
        rank = torch.distributed.get_rank()
        if device == torch.device("cuda"):
            device = torch.device("cuda", rank % torch.cuda.device_count())
        partition = Partition(rank, processes, sizes, spec.vocab_size, expert_parallel)
        wanted = [partition.own(slot) for slot in wanted]
    draft = None if family.draft_adapter is None else folder / family.draft_adapter
    if adapter is not None and draft is not None and adapter.name == draft.name:
        adapter, draft = None, adapter
    updates = None if adapter is None else read_adapter(adapter, shapes)
    beside = {}
    if draft is not None and draft.is_dir():
        beside = kept_beside(read_adapter(draft, shapes), wanted, device, dtype, partition)
    moe = sizes.moe if partition is None else partition.local.moe
    experts = None if moe is None else moe.stored
    small = load_quantized(shards, wanted, scales, kind, device, partition, updates, experts)
    wanted = [slot for slot in wanted if slot.name not in small]
    tensors = shards.load(wanted, device, dtype, partition, updates)
    weights: dict[str, Any] = tensors | beside | small
    if sizes.tied and head in shards.found:
        rows = slice(None) if partition is None else partition.vocab_rows
        check_tied(config.where, head, weights["embedding"], shards.tensor(head, rows))
    if partition is not None:
        model: NativeModel = ParallelModel(spec, partition, weights, tokenizer)
    else:
        model = NativeModel(spec, sizes, weights, tokenizer)
    model.chat_template = read_chat_template(folder)
    return model


def find_mask(tokenizer: Tokenizer | None, limit: int, named: str | None = None) -> int | None:
    """The mask token's id in a tokenizer, for configurations that do not name one.

    ``named``: the token that the tokenizer's files call ``mask_token``.
    """
    texts = _MASK_TOKENS if named is None else (named, *_MASK_TOKENS)
    ids = [tokenizer.token_to_id(token) for token in texts] if tokenizer else []
    return next((token for token in ids if token is not None and token < limit), None)


def _stored_dtype(config: Config, embedding: Found) -> torch.dtype:
    key = "dtype" if config.get("dtype") is not None else "torch_dtype"
    name = config.get(key)
    if name is None:
        return embedding.dtype if isinstance(embedding.dtype, torch.dtype) else torch.float32
    for dtype in FLOATS:
        if str(dtype).removeprefix("torch.") == str(name).removeprefix("torch."):
            return dtype
    raise config.wrong(key, "float32, float16, bfloat16 or float64")
