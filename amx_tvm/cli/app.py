"""Options and help of every command."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from amx_tvm.cli import (
    bench_command,
    embed_command,
    eval_command,
    export_command,
    logs,
    quantize_command,
    run_command,
    serve_command,
    tune_command,
)

app = typer.Typer(
    name="amx-tvm",
    help="Compile language models to 4 bits with TVM, and run them on the machine at hand.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing what draws frames costs a quarter of `amx-tvm --help`
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


class Verify(str, Enum):
    """How deep an artifact's files are checked before they are used."""

    none = "none"
    quick = "quick"
    full = "full"


ArtifactPath = Annotated[
    Path, typer.Argument(metavar="ARTIFACT", help="Directory that `compile` made.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; by default the artifact's.")]
Threads = Annotated[int | None, typer.Option(help="CPU threads; by default the physical cores.")]
Context = Annotated[
    int | None,
    typer.Option(help="Longest prompt and answer in tokens; by default at most 4096."),
]
VerifyOption = Annotated[
    Verify, typer.Option(help="Check sizes only, checksums of all bytes, or SHA-256 of all bytes.")
]
Signature = Annotated[
    Path | None, typer.Option(help="Public key (Ed25519, PEM) that must have signed the artifact.")
]
Tokens = Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to generate.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", help="0 is greedy.")]
TopK = Annotated[int, typer.Option(help="Keep the K most likely tokens; 0 keeps all.")]
TopP = Annotated[float, typer.Option(help="Keep the most likely tokens that make up P.")]
MinP = Annotated[float, typer.Option(help="Drop tokens below P times the most likely one.")]
Penalty = Annotated[float, typer.Option(help="Above 1 makes repetition less likely.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the text.")]

# Keywords of amx_tvm.load.
LOAD = ("device", "context_length", "threads", "verify", "require_signature")
SAMPLING = (  # keywords of Engine.stream
    "max_new_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "seed",
)


@app.command(
    epilog="Examples:\n\n"
    "amx-tvm compile models/SmolLM2-135M-Instruct --output dist/smollm2\n\n"
    "amx-tvm compile model.Q8_0.gguf --quantization mxfp4 --target llvm:x86-64-v3\n\n"
    "amx-tvm compile model.gguf --quantization amxfp4-w4a4 --calibration text.jsonl\n\n"
    "amx-tvm compile models/Llama-3-8B --target cuda:sm_90a --quantization amxfp4"
)
def compile(  # noqa: A001 - the verb that users know
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Hugging Face directory, .gguf file or hub id."),
    ],
    target: Annotated[
        str,
        typer.Option(
            help="llvm and cuda mean this machine; llvm:CPU, cuda:sm_NN or a TVM tag name another."
        ),
    ] = "llvm",
    quantization: Annotated[
        str,
        typer.Option(
            help="amxfp4, mxfp4, nvfp4, int4, none, ...; with -w4a4 or -w4a8 activations too."
        ),
    ] = "amxfp4",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Directory to make; by default dist/MODEL-FORMAT."),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Compute with unrounded float32 activations.")
    ] = False,
    quantize_attention: Annotated[
        bool,
        typer.Option("--quantize-attention", help="Also round the inputs of QK^T and PV (w4a4)."),
    ] = False,
    kv_cache: Annotated[
        str | None,
        typer.Option(help="Keep keys and values as float32, float16, or int8, amxfp4, nvfp4, ..."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text, other than the test's, by which weights are rounded (torch)."),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="How: best (default), train, gptq, smooth, search, plain; best:48: by 48 windows."
        ),
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option(help="Directory of a LoRA adapter (PEFT) to merge first.")
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DIR", help="A LoRA adapter that requests choose by name; repeatable."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an artifact at the output.")
    ] = False,
    dump_ir: Annotated[
        Path | None, typer.Option(help="Write the IR after every phase into this directory.")
    ] = None,
    records: Annotated[
        Path | None, typer.Option(help="Tuning records that `tune` made for this target.")
    ] = None,
    sign: Annotated[
        Path | None, typer.Option(help="Private key (Ed25519, PEM) to sign the artifact with.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print what was made as one JSON object.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Compile a model to an artifact directory."""
    from amx_tvm.cli import compile_command

    compile_command.run(
        model,
        show=not quiet,
        as_json=json,
        target=target,
        quantization=quantization,
        output=output,
        strict=strict,
        attention=quantize_attention,
        kv_cache=kv_cache,
        calibration=calibration,
        recipe=recipe,
        adapter=adapter,
        adapters=compile_command.named(adapters),
        overwrite=overwrite,
        dump_ir=dump_ir,
        records=records,
        sign=sign,
    )


@app.command(
    epilog="Examples:\n\n"
    'amx-tvm generate dist/smollm2 "The capital of France is" -n 32\n\n'
    'amx-tvm generate dist/smollm2 "Write a haiku." --chat --temperature 0.8 --seed 1\n\n'
    "cat story.txt | amx-tvm generate dist/smollm2 - --quiet"
)
def generate(
    artifact: ArtifactPath,
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends it; repeatable.")] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(help="An image of the prompt, in the order of its <image>; repeatable."),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Name of the artifact's LoRA adapter to answer with.")
    ] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after EOS.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object at the end.")] = False,
    quiet: Quiet = False,
    device: Device = None,
    context_length: Context = None,
    threads: Threads = None,
    verify: VerifyOption = Verify.quick,
    require_signature: Signature = None,
) -> None:
    """Continue a prompt; the text streams to stdout, the timings follow on stderr."""
    from amx_tvm.cli import generate_command

    generate_command.run(
        artifact,
        prompt,
        chat=chat,
        as_json=json,
        quiet=quiet,
        load=_pick(locals(), LOAD),
        options={
            **_pick(locals(), SAMPLING),
            "stop": tuple(stop or ()),
            "ignore_eos": ignore_eos,
        },
        images=image or [],
        adapter=adapter,
    )


@app.command(
    epilog="Examples:\n\n"
    "amx-tvm chat dist/smollm2\n\n"
    'amx-tvm chat dist/smollm2 --system "Answer in one sentence." --temperature 0.7\n\n'
    "In the chat, /help lists its commands (/system, /save, /load, /regenerate, /reset, /exit) and "
    "keys; Ctrl-C cuts an answer short. Any other line is said to the model."
)
def chat(
    artifact: ArtifactPath,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: Penalty = 1.0,
    seed: Seed = None,
    quiet: Quiet = False,
    device: Device = None,
    context_length: Context = None,
    threads: Threads = None,
    verify: VerifyOption = Verify.quick,
    require_signature: Signature = None,
) -> None:
    """Talk to a model over several turns; what was said stays in the KV cache."""
    from amx_tvm.cli import chat_command

    chat_command.run(
        artifact,
        system=system,
        quiet=quiet,
        load=_pick(locals(), LOAD),
        options=_pick(locals(), SAMPLING),
    )


@app.command(
    epilog="Examples:\n\n"
    "amx-tvm inspect dist/smollm2\n\n"
    "amx-tvm inspect dist/smollm2 --all\n\n"
    "amx-tvm inspect dist/smollm2 --json | jq .linears\n\n"
    "amx-tvm inspect dist/smollm2 --html smollm2.html\n\n"
    "amx-tvm inspect dist/smollm2 --emit tensorir --kernel layers.0.mlp.down_proj"
)
def inspect(
    artifact: ArtifactPath,
    every: Annotated[
        bool, typer.Option("--all", help="One row a linear, instead of equal layers together.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the manifest and sizes.")] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Write a page: layers, kernels, and what this machine's memory allows."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The model it was made of: --html then has the errors of its weights."),
    ] = None,
    verify: VerifyOption = Verify.none,
    emit: Annotated[
        str | None,
        typer.Option(help="Print one kernel: relax, tensorir, llvm, asm, cuda or ptx."),
    ] = None,
    kernel: Annotated[
        str | None, typer.Option(help="Which: a linear's name or a part of it; NAME@M = 1.")
    ] = None,
) -> None:
    """Show what an artifact holds: its linears and their kernels, sizes, target, versions."""
    from amx_tvm.cli import inspect_command

    if emit is not None:
        inspect_command.run_emit(artifact, emit, kernel)
        return
    if html is not None:
        inspect_command.run_page(artifact, html, model, _depth(verify))
        return
    inspect_command.run(artifact, every=every, as_json=json, verify=_depth(verify))


@app.command(epilog="Examples:\n\namx-tvm devices\n\namx-tvm devices --json")
def devices(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the CPU and the GPUs of this machine and the targets that name them."""
    from amx_tvm.cli import devices_command

    devices_command.run(as_json=json)


@app.command(epilog="Examples:\n\namx-tvm doctor\n\namx-tvm doctor --json")
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what this machine has and lacks, what each is for, and how to install it."""
    from amx_tvm.cli import doctor_command

    raise typer.Exit(doctor_command.run(as_json=json))


def _show_versions(asked: bool) -> None:
    if asked:
        from amx_tvm.artifact.manifest import SCHEMA
        from amx_tvm.version import versions

        packages = [f"{name} {found or 'missing'}" for name, found in versions().items()]
        print(", ".join([*packages, f"artifacts of schema {SCHEMA}"]))
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show the versions of this package, of TVM and of artifacts.",
        ),
    ] = False,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, help="Say what is done; -vv says more."),
    ] = 0,
) -> None:
    """Compile language models to 4 bits with TVM, and run them on the machine at hand."""
    logs.start(verbose)


bench_command.register(app)
embed_command.register(app)
eval_command.register(app)
export_command.register(app)
tune_command.register(app)
quantize_command.register(app)
serve_command.register(app)
run_command.register(app)


def _pick(given: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the named options of a command, as the library's keywords."""
    picked = {name: given[name] for name in names}
    if "verify" in picked:
        picked["verify"] = _depth(picked["verify"])
    return picked


def _depth(verify: Verify) -> Literal[False, "quick", "full"]:
    depths: dict[Verify, Literal[False, "quick", "full"]] = {
        Verify.none: False,
        Verify.quick: "quick",
        Verify.full: "full",
    }
    return depths[verify]
