"""The language model that is edited: loading it, its linear maps, its tokens, running it and reading it."""
