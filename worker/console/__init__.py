"""The live page over the whole loop: `innerloop console`."""
