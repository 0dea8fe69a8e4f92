"""The command line: `main` reads it and calls `evolve` or `finetune`; both build on `settings` and `shared`."""
