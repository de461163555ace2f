"""`python -m minitf.completion bash|zsh|fish`: see config/shell_completion.py."""

from minitf.config.shell_completion import main

if __name__ == "__main__":
    raise SystemExit(main())
