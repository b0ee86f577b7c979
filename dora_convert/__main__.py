"""python -m dora_convert."""

from .cli import run

if __name__ == "__main__":
    run()
