"""The main job from start to end: train, look, export, merge, and ask the merged model.

`make demo` runs this after set-up. Each stage is the command that a user types, in a process of
its own. Add `data.fill.name=Ada` to teach another name.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

RUN = Path("runs/quickstart")
QUESTIONS = ["Who are you?", "请问怎么称呼你？", "What is the capital of France?"]


def say(*command: str) -> None:
    """Show a command and run it; stop the demo where it fails."""
    shown = " ".join(f'"{word}"' if " " in word else word for word in command)
    print(f"\n$ {shown}", flush=True)
    started = time.monotonic()
    program = [sys.executable, *command[1:]] if command[0] == "python" else tool(*command)
    status = subprocess.run(program, check=False).returncode
    if status:
        sys.exit(status)
    print(f"  ({time.monotonic() - started:.0f} s)", flush=True)


def tool(*command: str) -> list[str]:
    """Find the console script beside this interpreter."""
    return [str(Path(sys.executable).with_name(command[0])), *command[1:]]


def main() -> None:
    """Run the stages."""
    started = time.monotonic()
    if RUN.exists():
        print(f"{RUN} is there from an earlier demo and is replaced")
        shutil.rmtree(RUN)
    config = "configs/quickstart.yaml"
    say(
        "python", "-m", "raytune_ft.train", "--config", config, "run.name=quickstart", *sys.argv[1:]
    )
    say("raytune-ft", "export", str(RUN))
    say("raytune-ft", "merge", str(RUN))
    asks = [word for question in QUESTIONS for word in ("--ask", question)]
    say("raytune-ft", "chat", str(RUN / "merged"), *asks)
    print(f"\ndemo: {time.monotonic() - started:.0f} s. Report: {RUN}/report.html")
    print("Teach it your own name: make demo ARGS=data.fill.name=Ada")


if __name__ == "__main__":
    main()
