"""lm-evaluation-harness: the model type ``pydllm``.

    pydllm lm-eval --tasks gsm8k --batch_size 8 \\
        --model_args pretrained=DIR,algorithm=freedave,draft_steps=8,block_length=32

lm-eval finds it by the entry point ``lm_eval.models`` where its release looks for one (those after
0.4.13): ``lm_eval --model pydllm ...`` then does the same. Importing this module registers it in
any release. See docs/evaluation.md.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import LM, CacheHook
from lm_eval.api.registry import register_model

from pydllm import __version__
from pydllm._backend.errors import CheckpointError
from pydllm._backend.signatures import check_called, check_replaced
from pydllm.decoding.settings import fit_blocks, make_algorithm
from pydllm.integrations.evaluation import Evaluator, Tally, merge_tallies
from pydllm.models import load
from pydllm.models.chat import read_chat_template
from pydllm.models.load import find_folder
from pydllm.models.parallel import join_processes, leave_processes, wait_for_all_processes

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_LOG = logging.getLogger("lm_eval.pydllm")
_DTYPES = ("float32", "float16", "bfloat16", "float64")


def check_signatures() -> None:
    """Raise unless the harness has all that the class below calls and overrides, as known."""
    requests = {"": "requests", "bar": "requests, disable_tqdm"}
    for method in (LM.loglikelihood, LM.loglikelihood_rolling, LM.generate_until):
        check_replaced("lm_eval", method, requests)
    check_replaced("lm_eval", LM.apply_chat_template, "chat_history, add_generation_prompt")
    check_replaced("lm_eval", LM.chat_template, "chat_template")
    check_replaced("lm_eval", LM.all_gather, "tensor")
    check_replaced("lm_eval", LM.gather_object, "obj, dst")
    check_replaced("lm_eval", LM.barrier, "")
    check_called("lm_eval", CacheHook.add_partial, "attr, req, res")
    check_called("lm_eval", register_model, "name")


check_signatures()


@register_model("pydllm")
class PydllmLM(LM):
    """A diffusion language model in lm-evaluation-harness.

    Args:
        pretrained: as in ``pydllm.load``.
        algorithm: as in ``pydllm generate --list-algorithms``.
        verifier: the causal model of APD.
        device, dtype: as in ``pydllm.load``; ``dtype`` may be ``"auto"``. Under torchrun each
            process has a model of its own, on a GPU of its own where there are GPUs, and answers
            its part of the requests.
        batch_size, max_gen_toks, max_length, mc_num, check_greedy, seed, backend: as in
            ``pydllm.integrations.evaluation.Evaluator``.
        max_batch_size: not used, there is no automatic batch size.
        settings: the algorithm's parameters by name.
    """

    def __init__(
        self,
        pretrained: str,
        algorithm: str = "threshold",
        *,
        verifier: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
        max_length: int | None = None,
        mc_num: int = 128,
        check_greedy: bool = True,
        seed: int = 0,
        backend: str | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        if not str(batch_size).isdigit():
            raise ValueError(f"batch_size: expected a number, got {batch_size!r}")
        if dtype not in (None, "auto", *_DTYPES):
            raise ValueError(f"dtype: expected auto or one of {', '.join(_DTYPES)}, got {dtype!r}")
        if str(device).startswith("cuda") and not torch.cuda.is_available():
            # The harness names cuda:0 where its user names nothing.
            _LOG.warning("no CUDA device here: on the CPU instead of %s", device)
            device = None
        accelerated = torch.cuda.is_available() if device is None else device.startswith("cuda")
        kind = torch.device("cuda" if accelerated else "cpu")
        self._world_size = join_processes(None, kind)
        if self._world_size > 1:
            self._rank = torch.distributed.get_rank()
            if accelerated:
                device = f"cuda:{self._rank % torch.cuda.device_count()}"
        options: dict[str, Any] = {
            "device": device,
            "dtype": None if dtype in (None, "auto") else getattr(torch, str(dtype)),
        }
        chosen = make_algorithm(
            algorithm, settings, None if verifier is None else lambda: load(verifier, **options)
        )
        model = load(pretrained, **options)
        chosen = fit_blocks(chosen, settings, model)
        self._device = model.device
        self._costs: dict[str, Tally] = {}
        self.pretrained, self.algorithm, self.settings = pretrained, algorithm, settings
        self.evaluator = Evaluator(
            model,
            chosen,
            batch_size=int(batch_size),
            max_gen_toks=max_gen_toks,
            max_length=max_length,
            mc_num=mc_num,
            check_greedy=check_greedy,
            seed=seed,
            backend=backend,
            place=(self._rank, self._world_size),
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        with _bar(len(requests), "generate_until", disable_tqdm) as bar:

            def done(index: int, text: str) -> None:
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
                bar.update()

            tasks = [str(request.task_name) for request in requests]
            arguments = [request.args for request in requests]
            answers = self.evaluator.generate_until(arguments, tasks=tasks, on_done=done)
        self._gather_costs()
        return answers

    def _gather_costs(self) -> None:
        """The costs of all processes, in each: the harness asks the first alone for them."""
        parts = [self.evaluator.tallies]
        if self._world_size > 1:
            parts = [{}] * self._world_size
            torch.distributed.all_gather_object(parts, self.evaluator.tallies)
        self._costs = merge_tallies(parts)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        with _bar(len(requests), "loglikelihood", disable_tqdm) as bar:
            arguments = [request.args for request in requests]
            return self.evaluator.loglikelihood(arguments, on_done=bar.update)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        with _bar(None, "loglikelihood_rolling", disable_tqdm) as bar:
            texts = [request.args[0] for request in requests]
            return self.evaluator.loglikelihood_rolling(texts, on_done=bar.update)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The numbers of all processes, one after the other."""
        if self._world_size == 1:
            return tensor
        flat = tensor.reshape(-1)
        parts = [torch.empty_like(flat) for _ in range(self._world_size)]
        torch.distributed.all_gather(parts, flat)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all processes, in process ``dst``; None in the others."""
        if self._world_size == 1:
            return [obj]
        parts: list[Any] | None = [None] * self._world_size if self._rank == dst else None
        torch.distributed.gather_object(obj, parts, dst=dst)
        return parts

    def barrier(self) -> None:
        wait_for_all_processes()

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into ``config`` of its results: the costs, by task."""
        report = {task: tally.as_row() for task, tally in self._costs.items()}
        for task, row in report.items():
            _LOG.info(
                "%s: %.2f tokens per forward, %.1f tokens per second, %d forwards of %d requests",
                task,
                row["tokens_per_forward"],
                row["tokens_per_second"],
                row["forwards"],
                row["requests"],
            )
        model = self.evaluator.model
        return {
            "model_dtype": str(model.dtype),
            "pydllm": {
                "version": __version__,
                "model": Path(self.pretrained).name,
                "algorithm": self.algorithm,
                "settings": {name: str(value) for name, value in self.settings.items()},
                "described": repr(self.evaluator.algorithm) if self.algorithm != "apd" else "APD",
                "device": str(model.device),
                "mc_num": self.evaluator.mc_num,
                "tasks": report,
            },
        }

    @property
    def tokenizer_name(self) -> str:
        return self.pretrained.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The checkpoint's own template, by name where it has several; None for False."""
        if chat_template is False:
            return None
        template = read_chat_template(find_folder(self.pretrained))
        if template is None:
            raise CheckpointError(
                f"{self.pretrained}: expected a chat_template in tokenizer_config.json or "
                "chat_template.jinja, found none"
            )
        name = chat_template if isinstance(chat_template, str) else "default"
        if name not in template.sources:
            names = ", ".join(template.sources)
            raise ValueError(f"chat_template: expected one of {names}, got {name!r}")
        self._template = template, name
        return template.sources[name]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        if not hasattr(self, "_template"):
            self.chat_template(True)
        template, name = self._template
        return template.render(chat_history, name=name, add_generation_prompt=add_generation_prompt)


def main(arguments: Sequence[str]) -> None:
    """The harness's own command line, with ``--model pydllm`` unless another is named."""
    from lm_eval.__main__ import cli_evaluate

    check_called("lm_eval", cli_evaluate, "")
    arguments = list(arguments)
    commands = {"run", "ls", "validate"}
    named = any(word.partition("=")[0] in ("--model", "-M") for word in arguments)
    if arguments and not named and (arguments[0] == "run" or arguments[0] not in commands):
        arguments += ["--model", "pydllm"]
    before = sys.argv
    sys.argv = ["lm_eval", *arguments]  # where the harness looks
    try:
        cli_evaluate()
    finally:
        sys.argv = before
        leave_processes()


def _bar(total: int | None, name: str, disable: bool) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=f"pydllm {name}", disable=disable)


if __name__ == "__main__":
    main(sys.argv[1:])
