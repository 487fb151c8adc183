"""Loading corpora from the net: the catalogue, the hubs' listings, resumable transfers, conversion."""
