"""The windowed join that tells what adaptation is worth, on Faust: `innerloop quality`."""
