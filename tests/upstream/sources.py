"""Published files in the checkouts that ``--dir`` or ``PYDLLM_UPSTREAM_DIR`` names.

The repositories lie side by side, each under its name on GitHub::

    LLaDA              github.com/ML-GSAI/LLaDA
    Fast-dLLM          github.com/NVlabs/Fast-dLLM at a9b81e4 (its folder v1 is read)
    Fast-dLLM-24cc59e  the same at 24cc59e, June 2025
    d3LLM              github.com/hao-ai-lab/d3LLM (also D2F's loop)
    SDAR               github.com/JetAstra/SDAR
    dLLM-RL            github.com/Gen-Verse/dLLM-RL (modeling code of Dream and SDAR)
    dllm               github.com/ZHZisZZ/dllm (modeling code of LLaDA and LLaDA2.x)
    diffusers          github.com/huggingface/diffusers
    Diffulex           github.com/SJTU-DENG-Lab/Diffulex at 184ba97
    sglang             github.com/sgl-project/sglang at 0.5.23 (its folder python is read)
    S2D2               github.com/phymhan/S2D2 (Fast-dLLM v2's modeling code)
    FreeDave           github.com/cychomatica/FreeDave
    apd                github.com/danielmisrael/apd

and, with the .py files of these repositories on the hub::

    Stable-DiffCoder-8B-Instruct   ByteDance-Seed
    Nemotron-Labs-Diffusion-8B     nvidia

None of this code is part of the package.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn

# What LLaDA's configuration class needs besides the values of a checkpoint.
_LLADA = {
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "bias_for_layer_norm": False,
    "embedding_dropout": 0.0,
    "flash_attention": False,
    "init_device": "cpu",
    "input_emb_norm": False,
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "rope_full_precision": True,
    "scale_logits": False,
}


class Absent(Exception):
    """A published file is missing or cannot be imported; the text says why."""


class Checkouts:
    """Imports from the checkouts in ``folder``."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    def root(self, *parts: str) -> Path:
        if self.folder is None:
            raise Absent("no checkouts: pass --dir or set PYDLLM_UPSTREAM_DIR")
        root = self.folder.joinpath(*parts)
        if not root.exists():
            raise Absent(f"no {root.relative_to(self.folder)} in {self.folder}")
        return root

    def file(self, root: Path, name: str) -> ModuleType:
        """A file of ``root``, imported as it imports itself: from there."""
        path = root / name
        place = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or place is None or place.loader is None:
            raise Absent(f"no file {path}")
        module = importlib.util.module_from_spec(place)
        with _importing_from(root):
            sys.modules[path.stem], before = module, sys.modules.get(path.stem)
            try:
                place.loader.exec_module(module)
            except ImportError as error:
                raise Absent(f"{path} cannot be imported: {error}") from error
            finally:
                del sys.modules[path.stem]
                if before is not None:
                    sys.modules[path.stem] = before
        return module

    def package(self, root: Path, *names: str, bare: bool = False) -> list[ModuleType]:
        """Modules by their dotted names below ``root``.

        ``bare``: packages on the way to them are not executed, which may need more than is there.
        """
        if not (root / names[0].replace(".", "/")).with_suffix(".py").is_file():
            raise Absent(f"no {names[0]} in {root}")
        try:
            with _importing_from(root):
                if bare:
                    _enter_packages(root, names)
                return [importlib.import_module(name) for name in names]
        except ImportError as error:
            raise Absent(f"{names[0]} in {root} cannot be imported: {error}") from error

    def functions(self, path: Path, **others: Any) -> dict[str, Callable[..., Any]]:
        """Functions and methods of a file by name, without what it imports from beside it.

        ``others`` stand for names that it imports.
        """
        if not path.is_file():
            raise Absent(f"no file {path}")
        found: list[ast.stmt] = []
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                found += [part for part in node.body if isinstance(part, ast.FunctionDef)]
            elif isinstance(node, ast.FunctionDef | ast.Import) or (
                isinstance(node, ast.ImportFrom) and node.module == "typing"
            ):
                found.append(node)
        names: dict[str, Any] = {}
        names |= others
        exec(compile(ast.Module(found, []), str(path), "exec"), names)
        return {name: value for name, value in names.items() if isinstance(value, FunctionType)}

    def llada(self, root: Path, package: str) -> Callable[[dict[str, Any]], nn.Module]:
        """A function from a configuration to this package's LLaDA."""
        names = (f"{package}.modeling_llada", f"{package}.configuration_llada")
        modeling, configuration = self.package(root, *names)

        def build(config: dict[str, Any]) -> nn.Module:
            known = {key: value for key, value in config.items() if key != "architectures"}
            settings = configuration.LLaDAConfig(**_LLADA | known)
            sizes = modeling.create_model_config_from_pretrained_config(settings)
            sizes.init_device = "cpu"
            inner = modeling.LLaDAModel(sizes, init_params=True)
            return modeling.LLaDAModelLM(settings, model=inner)

        return build

    def qwen_like(
        self, root: Path, package: str, name: str, config: str, model: str
    ) -> Callable[[dict[str, Any]], nn.Module]:
        """A function from a configuration to the class ``model`` of ``modeling_<name>``."""
        names = (f"{package}.modeling_{name}", f"{package}.configuration_{name}")
        modeling, configuration = self.package(root, *names)

        def build(values: dict[str, Any]) -> nn.Module:
            known = {key: value for key, value in values.items() if key != "architectures"}
            settings = getattr(configuration, config)(**{"pad_token_id": 58} | known)
            settings._attn_implementation = "sdpa"
            return getattr(modeling, model)(settings)

        return build


def _enter_packages(root: Path, names: tuple[str, ...]) -> None:
    """Empty modules for the packages that hold ``names``."""
    for name in names:
        parts = name.split(".")[:-1]
        for count in range(1, len(parts) + 1):
            package = types.ModuleType(".".join(parts[:count]))
            folder = root.joinpath(*parts[:count])
            package.__path__ = [str(folder)]
            package.__file__ = str(folder / "__init__.py")
            sys.modules.setdefault(package.__name__, package)


@contextlib.contextmanager
def _importing_from(root: Path) -> Iterator[None]:
    """Imports from ``root``, whose modules are forgotten afterwards: others have their names."""
    before, modules = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(root))
    try:
        yield
    finally:
        sys.path[:] = before
        for name in set(sys.modules) - modules:
            file = getattr(sys.modules[name], "__file__", None)
            if file is not None and Path(file).is_relative_to(root):
                del sys.modules[name]


def with_constants(function: Callable[..., Any], constants: dict[int, int]) -> Callable[..., Any]:
    """The function with other numbers in its code: ids that it does not take as arguments."""
    inner = getattr(function, "__wrapped__", function)
    values = tuple(
        constants.get(value, value) if type(value) is int else value
        for value in inner.__code__.co_consts
    )
    code = inner.__code__.replace(co_consts=values)
    twin = types.FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__)
    return torch.no_grad()(twin)
