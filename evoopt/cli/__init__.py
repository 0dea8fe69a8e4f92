"""The command line. `main` dispatches to `evolve` and `finetune`, which share `shared`."""
