"""Evaluation: perplexity, KL divergence, top-1 agreement, errors by layer, comparisons, tasks.

    evaluate("dist/smollm2", "wiki.test.raw", reference="dist/smollm2-float32").perplexity

Engines are measured without torch and without the compiler.
"""

from amx_tvm.documents import read_documents, read_text
from amx_tvm.evaluation.api import PUBLISHED, compare, evaluate, settings
from amx_tvm.evaluation.layers import LayerError, by_layer, output_errors, weight_errors
from amx_tvm.evaluation.measure import Result, measure, torch_logits
from amx_tvm.evaluation.overlap import overlap
from amx_tvm.evaluation.report import layer_table, plot, table, to_json
from amx_tvm.evaluation.windows import Protocol, Window, cut

__all__ = [
    "PUBLISHED",
    "LayerError",
    "Protocol",
    "Result",
    "Window",
    "by_layer",
    "compare",
    "cut",
    "evaluate",
    "layer_table",
    "measure",
    "output_errors",
    "overlap",
    "plot",
    "read_documents",
    "read_text",
    "settings",
    "table",
    "to_json",
    "torch_logits",
    "weight_errors",
]
