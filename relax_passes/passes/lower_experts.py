"""Lower the routing of a mixture of experts to kernels: which rows go to which expert."""

from __future__ import annotations

import tvm
from tvm import relax, tirx

from relax_passes.kernels.cpu import experts as kernels
from relax_passes.ops import is_op
from relax_passes.rewriting import Context, rewrite


@tvm.transform.module_pass(opt_level=0, name="LowerExperts")
def lower_experts(module: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
    """Replace ``amx.expert_route`` and ``amx.expert_group``; the products are linears."""

    def rule(ctx: Context, _var: relax.Var, value: relax.Expr) -> relax.Expr | None:
        if not (is_op(value, "amx.expert_route") or is_op(value, "amx.expert_group")):
            return None
        given = value.args[0]
        rows, columns = given.ty.shape.values
        count = int(rows) if isinstance(rows, tirx.IntImm) else None
        if value.op.name == "amx.expert_route":
            chosen, over_all = int(value.attrs["chosen"]), bool(value.attrs["over_all"])
            name, kernel = "expert_route", kernels.route(int(columns), chosen, over_all, count)
        else:
            experts = int(value.attrs["experts"])
            name, kernel = "expert_group", kernels.group(experts, int(columns), count)
        made = ctx.add_function(kernel, name)
        return relax.call_tir(made, [given], list(value.ty.fields))

    return rewrite(module, rule)
