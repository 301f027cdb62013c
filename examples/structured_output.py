"""An answer in the form of a JSON schema, from a running server.

    amx-tvm serve dist/smollm2 &
    python examples/structured_output.py [http://127.0.0.1:8000]

It needs the package openai; any of OpenAI's clients does.
"""

import json
import sys

from openai import OpenAI

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "country": {"type": "string", "maxLength": 20},
        "capital": {"type": "boolean"},
    },
    "required": ["city", "country", "capital"],
    "additionalProperties": False,
}

address = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
client = OpenAI(base_url=f"{address}/v1", api_key="none")
answer = client.chat.completions.create(
    model=client.models.list().data[0].id,
    messages=[{"role": "user", "content": "Tell me about Paris, as JSON."}],
    response_format={"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}},
    temperature=0,
)
print(json.dumps(json.loads(answer.choices[0].message.content), indent=1))
