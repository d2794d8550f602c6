"""Tool calls that a model wrote into the text of its reply, because its server did not recognize them."""
