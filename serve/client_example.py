"""Ask the chat endpoint from Python with OpenAI's client, streaming.

Start the endpoint with `raytune-ft serve runs/NAME`, then:
`python client_example.py "Who are you?"`
"""

import os
import sys

from openai import OpenAI


def main() -> None:
    """Send the question on the command line, print the answer while it comes."""
    question = " ".join(sys.argv[1:]) or "Who are you?"
    client = OpenAI(
        base_url=os.environ.get("RAYTUNE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("RAYTUNE_API_KEY", "none"),  # any text, unless the endpoint has one
    )
    model = client.models.list().data[0].id
    stream = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], stream=True
    )
    for chunk in stream:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
