"""The server's bars: against the engine that it stands on, against llama.cpp's server, under load.

    python -m benchmarks.serving ARTIFACT [PART ...] [--json FILE] [--plot FILE] ...

Parts that measure (all of them by default):

speed        chats of PROMPT tokens and TOKENS new ones, streamed, as many as there are streams and
             all at once; the engine generates as many in turns with the server, so that what else
             the machine does meets both alike. Prompts differ, so nothing is found in a cache.
             Tokens/s count from the first request to the last token on both sides, prompts
             included. ``--llama-server PROGRAM --gguf FILE`` puts llama.cpp's server into the
             turns.
latency      in turns with the engine too: time to first token of one stream, and time between
             tokens of eight, as the scheduler's callbacks see them there.
arrival      eight streams under way, then a prompt of 2048 tokens: times between tokens before and
             meanwhile, and its time to first token beside that alone.
prefix       time to first token behind 1024 and 4096 tokens that an ended answer has left, over
             cold.
forms        tokens/s of eight streams that are held to a schema, over the same without.
speculation  one stream that copies or writes prose, with speculation over without.
rest         time to /health, processor time when idle, memory over 2000 requests.
load         1000 requests, 32 at once: failures, and usages that are wrong.
leave        200 clients that leave at random moments: pages behind.
queue        time to a 429 where the queue is full.

Parts that judge (asked for by name):

schemas      an answer held to each of many schemas, `--schemas` files and folders beside written
             ones: it is refused with a 400, or valid where it ends by "stop".
openapi      every kind of response, and each event of streams, against OpenAI's published
             description (`--openapi FILE`, of the public repository openai/openai-openapi).
same         of a --strict artifact: texts, cold and warm, alone and among 16, with speculation and
             without.
draws        10 000 draws at 16 streams against the softmax, by chi-squared; of a --strict artifact.
judges       programs of others, from the environments whose bin folders ``--judges`` names: the
             clients of `clients.py`, lm-eval, schemathesis and aiperf (``--only`` chooses).

Who asks is a process of its own (`asks`); its processor time is told beside.
"""
