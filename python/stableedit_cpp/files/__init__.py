"""What every room needs of the machine: files written whole or not at all, digests, locks, the environment, words."""
