"""One command of `pi-dist` a module: `parser` makes its parser, `run` does it and returns the exit status."""
