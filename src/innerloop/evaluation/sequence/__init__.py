"""Every user's last item among the whole catalogue: `innerloop evaluate sequence`."""
