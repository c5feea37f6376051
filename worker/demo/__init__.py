"""The whole loop in one command, watched from outside: `innerloop demo`."""
