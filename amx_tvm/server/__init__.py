"""The OpenAI-compatible server: one thread that owns the engine, an asyncio front before it.

    protocol.py     what requests may hold, checked field by field
    core.py         the engine's thread: turns the scheduler's crank, messages in, messages out
    answers.py      one request: its choices as they grow, in OpenAI's shapes
    completions.py  /v1/completions      chat.py  /v1/chat/completions
    app.py          routes, keys, limits, start and end

Needs the packages of the extra ``serve``.
"""
