"""`python -m innerloop.worker` is the `innerloop` command."""

from .cli import main

main()
