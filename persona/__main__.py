"""`python -m persona` and the console script `persona`: the commands of persona.cli."""

from persona.cli import app


def main() -> None:
    app(prog_name="persona")


if __name__ == "__main__":
    main()
