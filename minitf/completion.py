"""The command `python -m minitf.completion bash|zsh|fish`: see config/shell_completion.py."""

from minitf.config.shell_completion import main as main

if __name__ == "__main__":
    from minitf.errors import run_command

    raise SystemExit(run_command(main))
