"""Which offsets of Triton kernels are products of run-time numbers in 32 bits.

    python -m tests.offsets      # without TRITON_INTERPRET: one line of JSON per product found

Every kernel that the cases of the benches launch is lowered to Triton's IR for sm_90, where
arguments and variables keep their names. From each 32-bit product of two numbers that are not
constants, and of a stride with a constant, the values that it becomes a term of are followed to the
pointers that they are added to. A 64-bit product ends a path: what is multiplied there was a row.
"""

from __future__ import annotations

import json
import re

VALUE = r"%[\w$.\-]+(?:#\d+)?"
OPERATION = re.compile(rf"(?:({VALUE})(?::(\d+))? = )?\"?([\w.]+)\"?(.*)")
SAME = ("tt.splat", "tt.broadcast", "tt.expand_dims", "tt.reshape")
TERMS = (*SAME, "tt.trans", "arith.select", "arith.muli")
TERMS += tuple(f"arith.{name}" for name in ("addi", "subi", "extsi", "extui", "minsi", "maxsi"))
POINTER = "a pointer"


def products(text: str) -> list[str]:
    """Names of the 32-bit products in one kernel's IR that are added to a pointer."""
    constants: set[str] = set()
    strides: set[str] = set(re.findall(r"(%stride_\w+): i32", text))
    found: dict[str, str] = {}
    followed: dict[str, list[str]] = {}
    enclosing: list[tuple[list[str], list[str]]] = []  # results and arguments of scf operations

    def follow(value: str, into: str) -> None:
        followed.setdefault(value, []).append(into)

    for line in text.splitlines():
        line = re.sub(r" loc\(.*", "", line).strip()
        if line.startswith("}"):
            if enclosing and "else" not in line:
                enclosing.pop()
            continue
        match = OPERATION.match(line)
        if match is None:
            continue
        result, count, name, rest = match.groups()
        operands = re.findall(VALUE, rest)
        if name in ("scf.for", "scf.if", "scf.while"):
            results = [f"{result}#{i}" for i in range(int(count))] if count else [result or ""]
            carried = re.search(r"iter_args\((.*?)\)", rest)
            pairs = re.findall(rf"({VALUE}) = ({VALUE})", carried[1]) if carried else []
            for argument, initial in pairs:
                follow(initial, argument)
            if bounds := re.match(rf" ?({VALUE}) = ({VALUE}) to ", rest):
                follow(bounds[2], bounds[1])
            enclosing.append((results, [argument for argument, _ in pairs]))
        elif name == "scf.yield":
            for into in enclosing[-1]:
                for operand, value in zip(operands, into, strict=False):
                    follow(operand, value)
        elif line.endswith("{"):
            enclosing.append(([], []))
        elif name == "arith.constant":
            constants.add(result)
        elif name == "tt.addptr":
            follow(operands[1], POINTER)
        elif name in TERMS:
            for group in (constants, strides):
                if name in SAME and operands[0] in group:
                    group.add(result)
            wide = "i32" not in rest.rsplit(":", 1)[-1]
            if name == "arith.muli":
                if wide:
                    continue
                variable = [operand for operand in operands if operand not in constants]
                if len(variable) == 2 or strides & set(variable):
                    found[result] = re.sub(r"_\d+$", "", result[1:])
            for operand in operands[1:] if name == "arith.select" else operands:
                follow(operand, result)

    def reaches_a_pointer(value: str) -> bool:
        seen, todo = set(), [value]
        while todo:
            value = todo.pop()
            if value == POINTER:
                return True
            if value not in seen:
                seen.add(value)
                todo += followed.get(value, [])
        return False

    return [name for value, name in found.items() if reaches_a_pointer(value)]


def main() -> None:
    from triton.backends.compiler import GPUTarget, Language
    from triton.compiler import ASTSource
    from triton.compiler.compiler import ir, make_backend

    from bench.gpu import resources
    from bench.ops.cases import CASES

    target = GPUTarget("cuda", 90, 32)
    backend = make_backend(target)
    seen = set()
    for case in CASES.values():
        launches = (each for _, launch in case.launches() for each in resources.record(launch, 90))
        for launch in launches:
            # Its branches; not its sizes.
            branches = {
                k: v for k, v in launch.constexprs.items() if not isinstance(v, int | float)
            }
            flags = {k: v for k, v in launch.constexprs.items() if isinstance(v, bool)}
            key = (launch.kernel.__name__, repr(sorted((branches | flags).items())))
            if key in seen:
                continue
            seen.add(key)
            source = ASTSource(
                launch.kernel,
                launch.signature,
                constexprs=launch.constexprs,
                attrs=launch.attributes,
            )
            options = backend.parse_options(dict(launch.options))
            context = ir.context()
            ir.load_dialects(context)
            backend.load_dialects(context)
            functions = backend.get_codegen_implementation(options)
            modules = backend.get_module_map()
            module = source.make_ir(target, options, functions, modules, context)
            stages: dict = {}
            backend.add_stages(stages, options, Language.TRITON)
            text = str(stages["ttir"](module, {}))
            print(json.dumps({"kernel": launch.kernel.__name__, "products": products(text)}))


if __name__ == "__main__":
    main()
