#!/usr/bin/env python3
"""Generate text on the device with the runtime of this folder; needs Python and NumPy only.

    python3 generate.py "The capital of France is" -n 32
    python3 generate.py --ids 504,3575,282 -n 32

A text as prompt needs the `tokenizers` package; token ids do not, and `bin/amx-run` has a
tokenizer of its own.
"""

import argparse
import resource
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "runtime"))
sys.dont_write_bytecode = True  # the folder may be read-only, and its files have checksums

from amx_tvm.errors import AmxError  # noqa: E402
from amx_tvm.runtime import Engine, load  # noqa: E402


def peak_memory() -> int:
    """Return the most memory that this process has occupied, in KiB.

    Not getrusage first: its maximum is inherited from the process that started this one.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", help="text to continue")
    parser.add_argument("--ids", help="token ids to continue, separated by commas")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--max-memory", help="refuse to use more, such as 300M or 1G")
    parser.add_argument("--ignore-eos", action="store_true", help="go on after the text's end")
    parser.add_argument(
        "--print-ids", action="store_true", help="print the new token ids at the end"
    )
    arguments = parser.parse_args()
    if (arguments.prompt is None) == (arguments.ids is None):
        parser.error("give a prompt, or --ids")
    start = time.perf_counter()
    try:
        engine = load(ROOT, threads=arguments.threads, max_memory=arguments.max_memory)
        if not isinstance(engine, Engine):
            parser.error(f"{ROOT} holds no language model")
        loaded = time.perf_counter() - start
        prompt = arguments.prompt
        if prompt is None:
            prompt = [int(token) for token in arguments.ids.split(",")]
        with engine.stream(
            prompt,
            arguments.max_new_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
            ignore_eos=arguments.ignore_eos,
        ) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
            result = pieces.result
    except AmxError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print()
    if arguments.print_ids:
        print("ids:", ",".join(map(str, result.token_ids)))
    timings = result.timings
    peak = peak_memory() / 1024
    print(
        f"load {loaded:.2f} s, first token {timings.first_token_s:.2f} s, "
        f"{timings.decode_tokens_per_s:.2f} tokens/s, peak memory {peak:.0f} MB, "
        f"code for {engine.manifest.target.key}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
