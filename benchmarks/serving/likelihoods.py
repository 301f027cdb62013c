"""lm-eval's log-likelihoods over HTTP: run by an environment that has lm-eval.

    PYTHON benchmarks/serving/likelihoods.py http://127.0.0.1:8000/v1 MODEL TOKENIZER < PAIRS

PAIRS is JSON, a list of [context, continuation]. The last line printed is the list of what
`local-completions` makes of them, 16 at once.
"""

from __future__ import annotations

import json
import sys


def main(url: str, model: str, tokenizer: str) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    judge = LocalCompletionsAPI(
        base_url=f"{url}/completions",
        model=model,
        tokenizer=tokenizer,
        tokenizer_backend="huggingface",
        num_concurrent=16,
        max_retries=1,
    )
    pairs = json.load(sys.stdin)
    asked = [Instance("loglikelihood", {}, tuple(pair), i) for i, pair in enumerate(pairs)]
    found = judge.loglikelihood(asked)
    print("\n" + json.dumps([value for value, _ in found]))


if __name__ == "__main__":
    main(*sys.argv[1:])
