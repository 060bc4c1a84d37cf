"""Talk to a trained model from a script of your own; one path to change.

    .venv/bin/python examples/chat.py [PATH]

An empty line leaves. `raytune-ft chat PATH` is the same with more comfort.
"""

import sys

from raytune_ft.chat import open_chat

MODEL = "runs/quickstart"  # a run, an adapter, a merged or a plain model folder


def main() -> None:
    """Ask, answer as the model writes, and keep what was said."""
    chat = open_chat(sys.argv[1] if len(sys.argv) > 1 else MODEL)
    messages: list[dict[str, str]] = []
    while question := input("> "):
        messages.append({"role": "user", "content": question})
        answer = ""
        for piece in chat.reply(messages):
            print(piece, end="", flush=True)
            answer += piece
        print()
        messages.append({"role": "assistant", "content": answer})


if __name__ == "__main__":
    main()
