"""Inline PTX."""

from cutlass._mlir.dialects import llvm


def assemble(result: object, values: list, code: str, constraints: str, *, loc: object, ip: object) -> object:
    """An instruction that the compiler neither drops nor moves past others of the kind."""
    return llvm.inline_asm(
        result,
        values,
        code,
        constraints,
        has_side_effects=True,
        is_align_stack=False,
        asm_dialect=llvm.AsmDialect.AD_ATT,
        loc=loc,
        ip=ip,
    )
